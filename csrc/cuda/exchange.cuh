// How blocks of one launch pass data to each other: the data is the flag.
//
// A buffer is EMPTY before the launch, in every bit. A word of it is stored once, whole, by one block; readers look
// until it is not EMPTY. Nothing is inferred from one word about another, so there is neither fence nor barrier. A
// replayed launch empties the buffer again.
//
// What a step of the LSTM exchanges lies in a ring of RING buffers, four times PERIOD steps, which stays in the L2 cache
// however long the sequence is. Between two periods, every block has a fence; after that of period j it makes its own
// words of period j + 2 EMPTY, whose place held period j - 2. Blocks read words of all others at every step, so these
// fences pair up: whoever read period j - 2 did so before its fence of period j - 1, whose later words this block has
// read before its own fence of j; and whoever reads period j + 2 has read words that this block published after its
// fence of period j + 1, before its own fence of j + 2. One fence in PERIOD steps, then, whose stores are long done.
#pragma once
#include "platform.cuh"

// As floats or as two 16-bit ones, these are NaN: a number's word that says the same is published as another NaN.
constexpr uint32_t EMPTY = 0xffffffff;
constexpr uint32_t STOP = EMPTY - 1;  // instead of data: there will be no more

DEVICE uint32_t published(uint32_t word) { return word >= STOP ? STOP - 1 : word; }
template <int N>
DEVICE void publish(uint32_t* p, const uint32_t (&words)[N]) {
  constexpr int AT_ONCE = N < 4 ? N : 4;
  for (int i = 0; i < N; i += AT_ONCE) {
    uint32_t w[AT_ONCE];
    for (int j = 0; j < AT_ONCE; ++j) w[j] = published(words[i + j]);
    store_words(p + i, w);
  }
}
DEVICE void publish(uint32_t* p, uint32_t word) {
  const uint32_t w[1] = {published(word)};
  store_words(p, w);
}
DEVICE void publish(uint32_t* p, float x) { publish(p, __float_as_uint(x)); }

constexpr int PERIOD = 4, RING = 4 * PERIOD;  // steps
// What is to be made empty again at step t: the words of steps from t + 2 PERIOD on, of a period.
HOST_DEVICE constexpr bool begins_period(int t) { return t % PERIOD == 0 && t >= 2 * PERIOD; }

template <int N>
DEVICE void make_empty(uint32_t* p) {
  constexpr int AT_ONCE = N < 4 ? N : 4;
  uint32_t w[AT_ONCE];
  for (int j = 0; j < AT_ONCE; ++j) w[j] = EMPTY;
  for (int i = 0; i < N; i += AT_ONCE) store_words(p + i, w);
}

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
