// What kernels ask of the machine. Without nvcc, tests/simulator gives the same on the host: `SIMULATOR` names it.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cassert>

#include <cuda_runtime.h>

#define DEVICE __device__ __forceinline__
#define KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define HOST_DEVICE __host__ __device__ __forceinline__

DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

DEVICE float warp_xor(float x, int mask) { return __shfl_xor_sync(0xffffffff, x, mask); }
DEVICE int warp_xor(int x, int mask) { return __shfl_xor_sync(0xffffffff, x, mask); }

// acc [16, 8] += a [16, 16] b [16, 8], spread over a warp as mma.m16n8k16 has it: a word is two 16-bit numbers.
template <bool BF16>
DEVICE void warp_mma(float (&acc)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  if constexpr (BF16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Words that other blocks read and write: each whole, in no order among them.
DEVICE void store_words(uint32_t* p, const uint32_t (&w)[1]) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(w[0]) : "memory");
}
DEVICE void store_words(uint32_t* p, const uint32_t (&w)[2]) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(w[0]), "r"(w[1]) : "memory");
}
DEVICE void store_words(uint32_t* p, const uint32_t (&w)[4]) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
               : "memory");
}
DEVICE void load_words(const uint32_t* p, uint32_t (&w)[1]) {
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(w[0]) : "l"(p) : "memory");
}
DEVICE void load_words(const uint32_t* p, uint32_t (&w)[2]) {
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p) : "memory");
}
DEVICE void load_words(const uint32_t* p, uint32_t (&w)[4]) {
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "l"(p)
               : "memory");
}
DEVICE void load_words(const uint32_t* p, uint32_t (&w)[8]) {
  uint32_t (&first)[4] = reinterpret_cast<uint32_t (&)[4]>(w[0]),
           (&second)[4] = reinterpret_cast<uint32_t (&)[4]>(w[4]);
  load_words(p, first);
  load_words(p + 4, second);
}

// Numbers that lie together, aligned to their size, in one access.
template <class Vector>
DEVICE Vector load_wide(const void* p) {
  return *static_cast<const Vector*>(p);
}
template <class Vector>
DEVICE void store_wide(void* p, const Vector& w) {
  *static_cast<Vector*>(p) = w;
}

// From global to shared memory while the thread goes on; copies_done() waits for those that it has begun.
template <int BYTES>
DEVICE void copy_async(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from),
               "n"(BYTES)
               : "memory");
}
DEVICE void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

DEVICE void converge_warp() { __syncwarp(); }

// Whether it is so for every thread of the block, which all wait here.
DEVICE bool all_threads(bool so) { return __syncthreads_and(so); }

// Called between two reads of words that are not there yet. Blocks of a cooperative launch all run, so only a fault
// can keep one waiting for half a minute: the launch fails instead of hanging.
DEVICE void wait_for_others(int& tries) {
  if (++tries == 1 << 25) __assert_fail("fastvae: another block's word came in time", __FILE__, __LINE__, __func__);
}
#else
#include "platform_simulator.h"
#endif
