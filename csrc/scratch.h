// Scratch memory and its sizes.
#pragma once
#include <cstdint>
#include <cstdlib>
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
  explicit Buffer(int64_t n) : data_(static_cast<S*>(std::aligned_alloc(64, (n * sizeof(S) + 127) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator S*() const { return data_; }

 private:
  S* data_;
};
