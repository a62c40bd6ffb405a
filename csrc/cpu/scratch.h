// Scratch memory of the CPU kernels and its sizes.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "../checks.h"

// Sizes of packed operands (gemm-inl.h) in numbers of the opmath type, large enough for every ISA: rows of A, columns
// of B, k of either, scratch of a whole product.
inline int64_t packed_rows(int64_t m) { return (m + 31) / 32 * 32; }
inline int64_t packed_columns(int64_t n) { return n + 47; }
inline int64_t packed_length(int64_t k) { return std::max<int64_t>(k, 16); }
// Products run in slices of k: of so many numbers of the opmath type for a row or column.
constexpr int64_t SLICE = 1024;
constexpr int64_t TOGETHER_ROWS = 128;  // of A that a thread packs at a time
// Whether a whole product [m, n] is shared out by columns, each thread packing all of A, and not by rows.
inline bool shares_columns(int64_t m, int64_t n) { return 2 * m <= n; }
inline int64_t gemm_scratch(int64_t m, int64_t n, int64_t threads) {
  return SLICE * (shares_columns(m, n) ? threads * (packed_rows(m) + 48) : packed_columns(n) + threads * TOGETHER_ROWS);
}

// Allocated before a region starts so that nothing throws inside one.
template <class S>
class Buffer {
 public:
  explicit Buffer(int64_t n) {
    check_memory(n, sizeof(S));
    bytes_ = n * sizeof(S);
    alignment_ = std::align_val_t{bytes_ < 2 * HUGE_PAGE ? 64 : HUGE_PAGE};
    static const bool fill = std::getenv("FASTVAE_FILL_SCRATCH") != nullptr;
    guard_ = fill ? GUARD : 0;
    data_ = static_cast<S*>(::operator new(bytes_ + guard_, alignment_));
    // NaN: tests see what is read before it is written, and what is written past the end.
    if (fill) std::memset(static_cast<void*>(data_), 0xff, bytes_ + guard_);
#if defined(MADV_HUGEPAGE)
    if (bytes_ >= 2 * HUGE_PAGE) madvise(data_, bytes_, MADV_HUGEPAGE);  // a weight spans thousands of small ones
#endif
  }
  ~Buffer() {
    const uint8_t* const end = reinterpret_cast<const uint8_t*>(data_) + bytes_;
    if (data_ && !std::all_of(end, end + guard_, [](uint8_t byte) { return byte == 0xff; })) {
      std::fputs("fastvae: a kernel wrote past its scratch memory\n", stderr);
      std::abort();
    }
    ::operator delete(data_, alignment_);
  }
  Buffer(Buffer&& other)
      : bytes_(other.bytes_),
        guard_(other.guard_),
        alignment_(other.alignment_),
        data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&&) = delete;
  operator S*() const { return data_; }

 private:
  static constexpr size_t HUGE_PAGE = 2 << 20, GUARD = 4096;
  size_t bytes_, guard_;
  std::align_val_t alignment_;
  S* data_;
};
