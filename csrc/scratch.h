// Scratch memory and its sizes.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

// A product of sizes that come from arguments; the largest number where it does not fit.
inline int64_t times(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors)
    if (__builtin_mul_overflow(product, factor, &product)) return std::numeric_limits<int64_t>::max();
  return product;
}

// Throws where so much memory is not to be had: an allocation would fail, or touch it page by page until the system
// ends the process.
inline void check_memory(int64_t count, int64_t size) {
  static const double memory = double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGESIZE));
  const double bytes = double(count) * double(size);
  if (count >= 0 && bytes <= memory) return;
  throw std::runtime_error("sizes too large: " + std::to_string(int64_t(bytes / 1e9)) +
                           " GB are needed at once, this machine has " + std::to_string(int64_t(memory / 1e9)) +
                           " GB of memory");
}

// Sizes of packed operands (gemm.h) in numbers of the wide type, large enough at every level: rows of A, columns of B,
// k of either, scratch of a whole product.
inline int64_t packed_rows(int64_t m) { return (m + 31) / 32 * 32; }
inline int64_t packed_columns(int64_t n) { return n + 47; }
inline int64_t packed_length(int64_t k) { return std::max<int64_t>(k, 16); }
constexpr int64_t SLICE =
    512;  // of k: a packed slice holds at most as many numbers of the wide type for a row or column
inline int64_t gemm_scratch(int64_t m, int64_t n) { return (packed_rows(m) + packed_columns(n)) * SLICE; }

// Allocated before a region starts so that nothing throws inside one.
template <class S>
class Buffer {
 public:
  explicit Buffer(int64_t n) {
    check_memory(n, sizeof(S));
    const size_t bytes = n * sizeof(S);
    alignment_ = std::align_val_t{bytes < 2 * HUGE_PAGE ? 64 : HUGE_PAGE};
    data_ = static_cast<S*>(::operator new(bytes, alignment_));
    static const bool fill = std::getenv("FASTVAE_FILL_SCRATCH") != nullptr;
    if (fill) std::memset(static_cast<void*>(data_), 0xff, bytes);  // NaN: tests see what is read before it is written
#if defined(MADV_HUGEPAGE)
    if (bytes >= 2 * HUGE_PAGE) madvise(data_, bytes, MADV_HUGEPAGE);  // a weight spans thousands of small ones
#endif
  }
  ~Buffer() { ::operator delete(data_, alignment_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator S*() const { return data_; }

 private:
  static constexpr size_t HUGE_PAGE = 2 << 20;
  std::align_val_t alignment_;
  S* data_;
};
