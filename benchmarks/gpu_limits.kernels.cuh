// The kernels of gpu_limits.cu.
#pragma once
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../csrc/cuda/exchange.cuh"

constexpr int READERS = 1024;  // threads of a block that reads
constexpr int READS = 2048;    // of 16 bytes by each of them in a round

__host__ __device__ inline uint32_t mix(uint32_t at, uint32_t sum) {
  const uint32_t x = (sum ^ at) * 2654435761u;
  return x ^ x >> 15;
}
__device__ uint32_t total(uint4 v) { return v.x + v.y + v.z + v.w; }

// Each block publishes its share of the words of a round in a buffer of that round's own, and gathers all of them
// before the next.
__global__ void all_gather(uint32_t* buffers, int words, int rounds, uint32_t* sums) {
  const int share = (words + gridDim.x - 1) / gridDim.x, first = blockIdx.x * share, last = min(first + share, words);
  const int threads = blockDim.x;
  uint32_t sum = threadIdx.x;
  for (int round = 0; round < rounds; ++round, buffers += words) {
    for (int w = first + threadIdx.x; w < last; w += threads) publish(buffers + w, mix(w, sum));
    gather<4>(
        words / 4, [&](int i) { return buffers + 4 * i; },
        [&](int, const uint32_t (&found)[4]) { sum += found[0] + found[1] + found[2] + found[3]; });
    __syncthreads();
  }
  sums[blockIdx.x * threads + threadIdx.x] = sum;
}

enum class Barrier { GRID, FLAG, CLUSTER };

template <Barrier KIND>
__device__ void wait(uint32_t* arrived, uint32_t round) {
  if constexpr (KIND == Barrier::GRID) {
    cooperative_groups::this_grid().sync();
  } else if constexpr (KIND == Barrier::FLAG) {
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
      uint32_t seen = 0;
      for (int looks = 0; seen < round * gridDim.x; wait_for_others(looks))
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
    }
    __syncthreads();
  } else {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }
}

// Blocks meet in groups of `peers`. `result` becomes how often a block came through before a peer had arrived, which
// only a checked launch looks for, and how many rounds all blocks have done.
template <Barrier KIND>
__global__ void meet(int rounds, int peers, bool checked, uint32_t* arrived, uint32_t* places, uint32_t* result) {
  const uint32_t* peer = places + blockIdx.x / peers * peers;
  for (uint32_t round = 1; round <= uint32_t(rounds); ++round) {
    if (checked && threadIdx.x == 0) publish(places + blockIdx.x, round);
    wait<KIND>(arrived, round);
    for (int p = threadIdx.x; checked && p < peers; p += blockDim.x)
      if (uint32_t found[1]; load_words(peer + p, found), found[0] < round) atomicAdd(result, 1);
  }
  if (threadIdx.x == 0) atomicAdd(result + 1, rounds);
}

__device__ void add_to(uint32_t* result, uint32_t sum) {
  sum = __reduce_add_sync(~0u, sum);
  if (threadIdx.x % warpSize == 0) atomicAdd(result, sum);
}

// All threads together read `quads`, a power of two, over and over, past the first-level cache.
__global__ void read_global(const uint4* data, uint32_t quads, int rounds, uint32_t* result) {
  const uint32_t threads = gridDim.x * READERS;
  uint32_t sum = 0, at = blockIdx.x * READERS + threadIdx.x;
  for (int round = 0; round < rounds; ++round)
#pragma unroll 8
    for (int n = 0; n < READS; ++n, at += threads) sum += total(__ldcg(data + (at & (quads - 1))));
  add_to(result, sum);
}

// Two tiles of a quad for each thread, read over and over.
__global__ void read_shared(int rounds, uint32_t* result) {
  __shared__ uint4 tile[2 * READERS];
  for (uint32_t i = threadIdx.x; i < 2 * READERS; i += READERS) tile[i] = {i, i, i, i};
  __syncthreads();
  const uint32_t at = __cvta_generic_to_shared(tile + threadIdx.x);
  uint32_t sum = 0;
  for (int round = 0; round < rounds; ++round)
#pragma unroll 8
    for (int n = 0; n < READS; ++n) {
      uint4 v;  // volatile twice: neither compiler nor assembler may keep what does not change
      asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "r"(at + n % 2 * (READERS * 16)));
      sum += total(v);
    }
  add_to(result, sum);
}

__global__ void nothing(uint32_t* launches) {
  if (launches) atomicAdd(launches, 1);
}
