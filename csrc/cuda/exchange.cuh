// How blocks of one launch pass data to each other: the data is the flag.
//
// A buffer is EMPTY before the launch, in every bit. A word of it is stored once, whole, by one block; readers look
// until it is not EMPTY. Nothing is inferred from one word about another, so there is neither fence nor barrier, and
// no word is used twice in a launch, so there is nothing to be re-armed. A replayed launch empties the buffer again.
#pragma once
#include "platform.cuh"

// As floats or as two 16-bit ones, these are NaN: a number's word that says the same is published as another NaN.
constexpr uint32_t EMPTY = 0xffffffff;
constexpr uint32_t STOP = EMPTY - 1;  // instead of data: there will be no more

DEVICE void publish(uint32_t* p, uint32_t word) { store_word(p, word >= STOP ? STOP - 1 : word); }
DEVICE void publish(uint32_t* p, float x) { publish(p, __float_as_uint(x)); }

template <int N>
DEVICE bool complete(const uint32_t (&words)[N]) {
  bool all = true;
  for (int i = 0; i < N; ++i) all &= words[i] != EMPTY;
  return all;
}

// Until all N words at p, aligned to their size, are there.
template <int N>
DEVICE void await(const uint32_t* p, uint32_t (&words)[N]) {
  for (int tries = 0; !complete(words); load_words(p, words)) wait_for_others(tries);
}

// The first look at words at many places does not wait, so that a thread has several on their way:
// place(i) -> pointer, take(i, words) for this thread's share of `count`.
template <int N, class Place, class Take>
DEVICE void gather(int count, Place place, Take take) {
  constexpr int AT_ONCE = 4;
  for (int first = threadIdx.x; first < count; first += AT_ONCE * blockDim.x) {
    uint32_t words[AT_ONCE][N];
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r)
      if (int i = first + r * blockDim.x; i < count) load_words(place(i), words[r]);
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r)
      if (int i = first + r * blockDim.x; i < count) {
        await(place(i), words[r]);
        take(i, words[r]);
      }
  }
}
