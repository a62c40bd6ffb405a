// How the blocks of a group learn what a sequence's step has in common: its norm, and the chosen token.
//
// Every block publishes an offer for each sequence. With DIRECT sequences or fewer, every block reads all offers of all
// of them. With more, that would be most of what passes through the L2 cache: one block a sequence, its owner, reads the
// offers and publishes the result, for one more exchange.
#pragma once
#include "exchange.cuh"

constexpr int DIRECT = 8;  // sequences of a group

template <int OFFER, int RESULT>
struct Owners {
  uint32_t *offers, *results;  // [ring, B, group_size, OFFER], [ring, B, RESULT]
  int B, group_size, rank, first, sequences;

  DEVICE bool owned() const { return sequences > DIRECT && group_size > 1; }
  // Writes what one block of the group is to write of sequence n.
  DEVICE bool owns(int n) const { return n % group_size == rank; }
  DEVICE int64_t place(int t, int n) const { return t % RING * int64_t(B) + first + n; }
  DEVICE uint32_t* offer(int t, int n, int m) const { return offers + (place(t, n) * group_size + m) * OFFER; }
  DEVICE uint32_t* result(int t, int n) const { return results + place(t, n) * RESULT; }

  // decide(n, result): a warp, from all offers. take(n, result): one thread.
  template <class Decide, class Take>
  DEVICE void agree(int t, Decide decide, Take take) const {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    uint32_t words[RESULT];
    if (owned()) {
      for (int n = rank + warp * group_size; n < sequences; n += warps * group_size) {
        decide(n, words);
        if (threadIdx.x % 32 == 0) publish(result(t, n), words);
      }
      for (int n = threadIdx.x; n < sequences; n += blockDim.x) {
        load_words(result(t, n), words);
        await(result(t, n), words);
        take(n, words);
      }
    } else {
      for (int n = warp; n < sequences; n += warps) {
        decide(n, words);
        if (threadIdx.x % 32 == 0) take(n, words);
      }
    }
    __syncthreads();
  }

  DEVICE void renew(int t) const {
    for (int n = threadIdx.x; n < sequences; n += blockDim.x) {
      make_empty<OFFER>(offer(t, n, rank));
      if (owned() && owns(n)) make_empty<RESULT>(result(t, n));
    }
  }
};
