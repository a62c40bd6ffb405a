// Products of 16-bit weights in shared memory with vectors that other blocks publish.
//
//   partial[w, r, n] = Σ_k weight[r, k] x[n, k]     over the k of warps w and w + half; the sum over w is left to who
//                                                   reads it
//
// A lane loads 16 bytes of a vector at once and waits for them itself: they are its operands of two tiles of the matrix
// units, which may take the k in any order. So vectors pass neither shared memory nor a barrier, and a warp's loads are
// all on their way before it waits for the first.
#pragma once
#include "exchange.cuh"
#include "matrix.cuh"
#include "split.cuh"

template <class T, int N>
struct Fragments {
  int rows, depth;

  static_assert(sizeof(T) == 2 && N % 8 == 0);
  static constexpr int TILES = N == 32 ? 4 : N == 16 ? 5 : 8;  // of 16 rows, whose sums a thread has registers for
  static constexpr int CHUNKS = 4;               // of 32 k, loaded at once

  HOST_DEVICE int tiles() const { return divide_up(rows, 16); }
  HOST_DEVICE int chunks() const { return divide_up(depth, 32); }
  HOST_DEVICE int weight_words() const { return tiles() * chunks() * 256; }
  HOST_DEVICE int columns_words() const { return 0; }
  HOST_DEVICE static int half(int warps) { return (warps + 1) / 2; }
  // Row r lies with every fourth row, such that neither the eight rows of a warp's sums nor the fours of rows that
  // neighbors read share banks.
  HOST_DEVICE int fourth() const { return 4 * tiles() * N + 8; }
  HOST_DEVICE int at(int w, int r, int n) const { return (4 * w + r % 4) * fourth() + r / 4 * N + n; }
  HOST_DEVICE int partial_floats(int warps) const { return half(warps) * 4 * fourth(); }

  // row(r) -> the row's numbers in global memory, or null for zeros. wide: they are aligned to 16 bytes.
  template <class Row>
  DEVICE void load(uint32_t* weights, uint32_t*, Row row, bool wide) const {
    constexpr int AT_ONCE = 4;
    const int count = tiles() * chunks() * 32;
    for (int first = threadIdx.x; first < count; first += AT_ONCE * blockDim.x) {
      uint4 x[AT_ONCE][2];
#pragma unroll
      for (int s = 0; s < AT_ONCE; ++s)
        if (const int i = first + s * blockDim.x; i < count)
#pragma unroll
          for (int below = 0; below < 2; ++below) {
            const int r = i / 32 / chunks() * 16 + i % 32 / 4 + 8 * below, k = i / 32 % chunks() * 32 + i % 4 * 8;
            x[s][below] = eight(r < rows ? row(r) : nullptr, k, wide);
          }
#pragma unroll
      for (int s = 0; s < AT_ONCE; ++s)
        if (const int i = first + s * blockDim.x; i < count) {
          uint4* to = reinterpret_cast<uint4*>(weights) + i / 32 * 64 + i % 32;
          store_wide(to, uint4{x[s][0].x, x[s][1].x, x[s][0].y, x[s][1].y});
          store_wide(to + 32, uint4{x[s][0].z, x[s][1].z, x[s][0].w, x[s][1].w});
        }
    }
  }

  // vector(n) -> where the `words` of vector n are, for n < count. The block's partial sums are there after the next
  // barrier; every thread calls it, after one.
  template <class Vector>
  DEVICE void multiply(const uint32_t* weights, uint32_t*, float* partial, Vector vector, int count, int words) const {
    for (int tile = 0; tile < tiles(); tile += TILES)
      multiply_most<TILES>(weights, partial, vector, count, words, tile);
  }

  // Σ of what the warps have left of row r, vector n.
  DEVICE float sum(const float* partial, int r, int n) const {
    float x = 0;
    for (int w = 0, slots = half(blockDim.x / 32); w < slots; ++w) x += partial[at(w, r, n)];
    return x;
  }

 private:
  DEVICE uint4 eight(const T* from, int k, bool wide) const {
    if (!from || k >= depth) return uint4{0, 0, 0, 0};
    if (wide) return load_wide<uint4>(from + k);
    uint4 words;
    T x[8];
    for (int j = 0; j < 8; ++j) x[j] = k + j < depth ? from[k + j] : T(0.0f);
    memcpy(&words, x, sizeof words);
    return words;
  }

  template <int M, class Vector>
  DEVICE void multiply_most(const uint32_t* weights, float* partial, Vector vector, int count, int words,
                            int tile) const {
    if constexpr (M > 1)
      if (tiles() - tile < M) return multiply_most<M - 1>(weights, partial, vector, count, words, tile);
    multiply_tiles<M>(weights, partial, vector, count, words, tile);
  }

  template <int M, class Vector>
  DEVICE void multiply_tiles(const uint32_t* weights, float* partial, Vector vector, int count, int words,
                             int tile) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4, q = lane % 4;
    float acc[M][N / 8][4] = {};
    for (int first = warp; first < chunks(); first += CHUNKS * warps) {
      uint32_t b[CHUNKS][N / 8][4];
      const auto there = [&](int c, int j) { return 8 * j + g < count && (first + c * warps) * 16 + 4 * q < words; };
      const auto from = [&](int c, int j) { return vector(8 * j + g) + (first + c * warps) * 16 + 4 * q; };
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
          b[c][j][0] = b[c][j][1] = b[c][j][2] = b[c][j][3] = 0;
          if (there(c, j)) load_words(from(c, j), b[c][j]);
        }
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const int chunk = first + c * warps;
        if (chunk >= chunks()) break;
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
          if (there(c, j)) await(from(c, j), b[c][j]);
        converge_warp();
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int m = 0; m < M; ++m) {
            const uint4* tiles_of_lane = reinterpret_cast<const uint4*>(weights) + lane;
            const uint4 a = load_wide<uint4>(tiles_of_lane + (((tile + m) * chunks() + chunk) * 2 + k) * 32);
#pragma unroll
            for (int j = 0; j < N / 8; ++j)
              warp_mma<std::is_same_v<T, BFloat16>>(acc[m][j], a, b[c][j][2 * k], b[c][j][2 * k + 1]);
          }
      }
    }
    // The upper half of the warps leave their sums, the others add theirs.
    const int slots = half(warps), slot = warp % slots;
    const auto each_pair = [&](auto take) {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
#pragma unroll
          for (int below = 0; below < 2; ++below)
            take(partial + at(slot, 16 * (tile + m) + g + 8 * below, 8 * j + 2 * q), acc[m][j][2 * below],
                 acc[m][j][2 * below + 1]);
    };
    const auto leave = [](float* p, float& x, float& y) {
      store_wide(p, uint2{__float_as_uint(x), __float_as_uint(y)});
    };
    if (warp >= slots) each_pair(leave);
    __syncthreads();
    if (warp >= slots) return;
    if (warp + slots < warps)
      each_pair([](float* p, float& x, float& y) {
        const uint2 other = load_wide<uint2>(p);
        x += __uint_as_float(other.x);
        y += __uint_as_float(other.y);
      });
    each_pair(leave);
  }
};

// The same of 32-bit weights, by way of shared memory.
template <class T, int N>
struct Staged : Matrix<T, N> {
  template <class Row>
  DEVICE void load(uint32_t* weights, uint32_t* columns, Row row, bool) const {
    Matrix<T, N>::load(weights, row);
    Matrix<T, N>::clear(columns);
  }
  template <class Vector>
  DEVICE void multiply(const uint32_t* weights, uint32_t* columns, float* partial, Vector vector, int count,
                       int words) const {
    gather<4>(
        count * words / 4, [&](int i) { return vector(4 * i / words) + 4 * i % words; },
        [&](int i, const uint32_t (&found)[4]) { this->put(columns, 4 * i / words, 4 * i % words, found); });
    __syncthreads();
    Matrix<T, N>::multiply(weights, columns, partial);
  }
};

template <class T, int N>
using Product = std::conditional_t<sizeof(T) == 2, Fragments<T, N>, Staged<T, N>>;
