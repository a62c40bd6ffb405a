// csrc/cuda/platform.cuh on the host: every thread of a launch is a fiber of one thread, and which of them goes on, and
// when a stored word arrives in memory, is drawn at random. So one source runs in any order that a GPU may choose, and
// the same seed gives the same order again. simulator.cpp does it, and counts what a launch asks of a GPU.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define DEVICE inline
#define HOST_DEVICE inline
#define KERNEL(threads) void

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }

namespace simulator {
struct Index {
  int x;
};
struct Turn {
  Index thread, block, threads, blocks;
  bool counting = false;  // of accesses, instead of products
};
extern Turn turn;  // of the thread that runs

void run(int blocks, int threads, int64_t shared, std::function<void()> kernel);
char* shared_memory();
bool all_threads(bool so);
// Each lane of the warp gives a piece; theirs are valid until shared_by_all has been called.
void share(const void* piece);
const void* piece_of(int lane);
void shared_by_all();
void store(uint32_t* p, const uint32_t* words, int count);
void load(const uint32_t* p, uint32_t* words, int count);
void wait(bool first);
void fence();
void copy_async(void* to, const void* from, int bytes);
void copies_done();
void touch(const void* p, int bytes, bool write);  // an access as wide as that
}  // namespace simulator

#define threadIdx simulator::turn.thread
#define blockIdx simulator::turn.block
#define blockDim simulator::turn.threads
#define gridDim simulator::turn.blocks

inline char* shared_memory() { return simulator::shared_memory(); }
inline bool all_threads(bool so) { return simulator::all_threads(so); }
inline void __syncthreads() { simulator::all_threads(true); }
inline void converge_warp() {}  // warp_mma does
inline void __threadfence() { simulator::fence(); }

template <class X>
X warp_xor(X x, int mask) {
  simulator::share(&x);
  const X found = *static_cast<const X*>(simulator::piece_of((threadIdx.x % 32) ^ mask));
  simulator::shared_by_all();
  return found;
}

template <bool BF16>
void warp_mma(float (&acc)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  using T = std::conditional_t<BF16, torch::headeronly::BFloat16, torch::headeronly::Half>;
  if (simulator::turn.counting) return;
  const uint32_t mine[6] = {a.x, a.y, a.z, a.w, b0, b1};
  simulator::share(mine);
  const auto number = [&](int lane, int word, int half) {
    T x[2];
    std::memcpy(x, static_cast<const uint32_t*>(simulator::piece_of(lane)) + word, sizeof x);
    return float(x[half]);
  };
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k)
      acc[i] += number(4 * g + k % 8 / 2, i / 2 + k / 8 * 2, k % 2) *
                number(4 * (2 * q + i % 2) + k % 8 / 2, 4 + k / 8, k % 2);
  simulator::shared_by_all();
}

template <int N>
void store_words(uint32_t* p, const uint32_t (&w)[N]) {
  simulator::store(p, w, N);
}
template <int N>
void load_words(const uint32_t* p, uint32_t (&w)[N]) {
  simulator::load(p, w, N);
}
inline void wait_for_others(int& looks) { simulator::wait(looks++ == 0); }

template <class Vector>
Vector load_wide(const void* p) {
  simulator::touch(p, sizeof(Vector), false);
  Vector w;
  __builtin_memcpy(&w, p, sizeof w);
  return w;
}
template <class Vector>
void store_wide(void* p, const Vector& w) {
  simulator::touch(p, sizeof(Vector), true);
  __builtin_memcpy(p, &w, sizeof w);
}
template <int BYTES>
void copy_async(void* to, const void* from) {
  simulator::copy_async(to, from, BYTES);
}
inline void copies_done() { simulator::copies_done(); }
