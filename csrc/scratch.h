// Scratch memory and its sizes.
#pragma once
#include <cstdint>
#include <new>

// Sizes of packed operands (gemm.h), large enough at every level: rows of A, columns of B, scratch of a whole product.
inline int64_t packed_rows(int64_t m) { return (m + 7) / 8 * 8; }
inline int64_t packed_columns(int64_t n) { return n + 47; }
constexpr int64_t SLICE = 256;  // of k: a packed slice holds as many numbers of the wide type for a row or column
inline int64_t gemm_scratch(int64_t m, int64_t n) { return (packed_rows(m) + packed_columns(n)) * SLICE; }

// Allocated before a region starts so that nothing throws inside one.
template <class S>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<S*>(::operator new(n * sizeof(S), ALIGNMENT))) {}
  ~Buffer() { ::operator delete(data_, ALIGNMENT); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator S*() const { return data_; }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};
  S* data_;
};
