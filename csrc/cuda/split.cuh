// Who computes what in a persistent kernel, and where in shared memory: plain arithmetic, for kernels and launchers.
#pragma once
#include "platform.cuh"

HOST_DEVICE constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }
HOST_DEVICE constexpr int round_up(int a, int b) { return divide_up(a, b) * b; }
HOST_DEVICE constexpr int least(int a, int b) { return a < b ? a : b; }

// `whole` items in `parts` parts of at most `each`: part m has count(m) items, from first(m) on.
struct Parts {
  int whole, parts, each;
  HOST_DEVICE int first(int m) const { return least(m * each, whole); }
  HOST_DEVICE int count(int m) const { return least(each, whole - first(m)); }
};

// Vectors that blocks exchange have rows of whole 16-byte words; the last block publishes what is past the end, as 0.
HOST_DEVICE constexpr int exchanged(int size) { return round_up(size, 8); }
// Words of 4 bytes from one such vector to the next: whole lines of the L2 cache, or its loads would take one more.
HOST_DEVICE constexpr int exchanged_stride(int words) { return round_up(words, 32); }

// Hands out shared memory; without a base it measures.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  HOST_DEVICE T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base + used);
    used += (count * int64_t(sizeof(T)) + 15) / 16 * 16;
    return p;
  }
};
