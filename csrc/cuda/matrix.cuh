// Products of weights that stay in shared memory, as a block of threads computes them.
//
//   partial[w, r, n] = Σ_k weight[r, k] x[n, k]     over the k of warp w; the sum over w is left to who reads it
//
// 16-bit numbers go through the matrix units, 32-bit ones are multiplied as they are. N columns at a time.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "platform.cuh"

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Numbers in a word that blocks exchange.
template <class T>
constexpr int PER_WORD = 4 / sizeof(T);

template <class T>
HOST_DEVICE uint32_t word_of(const float* x) {
  T narrow[PER_WORD<T>];
  for (int i = 0; i < PER_WORD<T>; ++i) narrow[i] = T(x[i]);
  uint32_t word;
  memcpy(&word, narrow, sizeof word);
  return word;
}

// What a block holds of a matrix of `rows` x `depth`, and of the columns that it is multiplied by, in words.
template <class T, int N>
struct Matrix {
  int rows, depth;

  static constexpr bool SHORT = sizeof(T) == 2;
  static_assert(!SHORT || N % 8 == 0);

  HOST_DEVICE int tiles() const { return (rows + 15) / 16; }
  HOST_DEVICE int deep() const { return (depth + 15) / 16; }
  // Rows as they are in `partial`.
  HOST_DEVICE int padded_rows() const { return SHORT ? 16 * tiles() : rows; }
  HOST_DEVICE int weight_words() const { return SHORT ? tiles() * deep() * 32 * 4 : rows * depth; }
  // Between columns, such that eight of them lie in different banks.
  HOST_DEVICE int column_words() const { return 8 * deep() + 4; }
  HOST_DEVICE int columns_words() const { return SHORT ? N * column_words() : N * depth; }
  HOST_DEVICE int partial_floats(int warps) const { return warps * padded_rows() * N; }

  // row(r) -> the row's numbers in global memory, or null for zeros. A lane's four words of a 16 x 16 tile lie
  // together.
  template <class Row>
  DEVICE void load(uint32_t* weights, Row row) const {
    for (int i = threadIdx.x; i < weight_words(); i += blockDim.x) {
      if constexpr (SHORT) {
        const int lane = i / 4 % 32, tile = i / 128 / deep(), k0 = i / 128 % deep() * 16;
        const int r = 16 * tile + lane / 4 + i % 2 * 8, k = k0 + lane % 4 * 2 + i % 4 / 2 * 8;
        const T* from = r < rows ? row(r) : nullptr;
        float x[2] = {from && k < depth ? float(from[k]) : 0, from && k + 1 < depth ? float(from[k + 1]) : 0};
        weights[i] = word_of<T>(x);
      } else {
        const T* from = row(i % rows);
        weights[i] = __float_as_uint(from ? from[i / rows] : 0);
      }
    }
  }

  DEVICE void clear(uint32_t* columns) const {
    for (int i = threadIdx.x; i < columns_words(); i += blockDim.x) columns[i] = 0;
  }
  // Words of column n from its word w on.
  template <int W>
  DEVICE void put(uint32_t* columns, int n, int w, const uint32_t (&words)[W]) const {
    for (int i = 0; i < W; ++i) {
      if constexpr (SHORT)
        columns[n * column_words() + w + i] = words[i];
      else if (w + i < depth)
        columns[(w + i) * N + n] = words[i];
    }
  }
  DEVICE float at(const uint32_t* columns, int n, int k) const {
    if constexpr (SHORT) {
      T x[2];
      memcpy(x, &columns[n * column_words() + k / 2], sizeof x);
      return float(k % 2 ? x[1] : x[0]);
    } else {
      return __uint_as_float(columns[k * N + n]);
    }
  }

  DEVICE void multiply(const uint32_t* weights, const uint32_t* columns, float* partial) const {
    if constexpr (SHORT) {
      int tile = 0;
      for (; tile + 4 <= tiles(); tile += 4) multiply_tiles<4>(weights, columns, partial, tile);
      if (tiles() - tile == 3) multiply_tiles<3>(weights, columns, partial, tile);
      if (tiles() - tile == 2) multiply_tiles<2>(weights, columns, partial, tile);
      if (tiles() - tile == 1) multiply_tiles<1>(weights, columns, partial, tile);
    } else {
      multiply_rows(weights, columns, partial);
    }
  }

  // Σ of what the warps have left of row r, column n.
  DEVICE float sum(const float* partial, int r, int n) const {
    float x = 0;
    for (int w = 0, warps = blockDim.x / 32; w < warps; ++w) x += partial[(w * padded_rows() + r) * N + n];
    return x;
  }

 private:
  template <int M>
  DEVICE void multiply_tiles(const uint32_t* weights, const uint32_t* columns, float* partial, int tile) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    float acc[M][N / 8][4] = {};
    for (int k = warp; k < deep(); k += blockDim.x / 32) {
      uint4 a[M];
#pragma unroll
      for (int m = 0; m < M; ++m) a[m] = reinterpret_cast<const uint4*>(weights)[((tile + m) * deep() + k) * 32 + lane];
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const uint32_t* column = columns + (8 * j + g) * column_words() + 8 * k + q;
#pragma unroll
        for (int m = 0; m < M; ++m) warp_mma<std::is_same_v<T, BFloat16>>(acc[m][j], a[m], column[0], column[4]);
      }
    }
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          partial[(warp * padded_rows() + 16 * (tile + m) + g + i / 2 * 8) * N + 8 * j + 2 * q + i % 2] = acc[m][j][i];
  }

  DEVICE void multiply_rows(const uint32_t* weights, const uint32_t* columns, float* partial) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int r = lane; r < rows; r += 32) {
      float acc[N] = {};
      for (int k = warp; k < depth; k += warps) {
        const float w = __uint_as_float(weights[k * rows + r]);
#pragma unroll
        for (int n = 0; n < N; ++n) acc[n] = fmaf(w, __uint_as_float(columns[k * N + n]), acc[n]);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) partial[(warp * rows + r) * N + n] = acc[n];
    }
  }
};
