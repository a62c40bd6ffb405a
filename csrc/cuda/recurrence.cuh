// A block's part of a LayerNorm-LSTM over a whole sequence. Equations: fastvae/ops/layer_norm_lstm.py.
//
// The sequences are divided among groups of blocks; within a group, every block keeps the recurrent weights of some
// cells in shared memory. A step of N sequences (a slice) passes two exchanges: all blocks' moments of
// u = input + W h, which give the norm's, and all blocks' parts of the new h. A block has several slices, so that one
// is computed while another is on its way.
#pragma once
#include "exchange.cuh"
#include "matrix.cuh"
#include "split.cuh"

constexpr int THREADS = 256;       // of a block, at most
constexpr int MAX_GROUP_SIZE = 160;  // blocks of a group

DEVICE float warp_sum(float x) {
  for (int mask = 16; mask; mask /= 2) x += warp_xor(x, mask);
  return x;
}
DEVICE float sigmoid(float x) { return 1 / (1 + expf(-x)); }

template <class T>
struct LstmTensors {
  const T *x, *weight_hh, *norm_weight, *norm_bias, *h0, *c0;  // x [T, B, 4H]
  uint32_t* vectors;                                           // [T, B, exchanged(H)] of T: h
  uint32_t* moments;                                           // [steps, B, group_size, words]
};

template <class T, int N>
struct Lstm {
  int steps, B, H, group_size, units, group_batch;  // group_batch: sequences of a group
  int more_rows = 0;                       // of weights, below those of the cells

  HOST_DEVICE Parts cells() const { return {H, group_size, units}; }
  HOST_DEVICE Matrix<T, N> matrix() const { return {4 * units + more_rows, H}; }
  HOST_DEVICE int slices() const { return divide_up(group_batch, N); }
  HOST_DEVICE int row_words() const { return exchanged(H) / PER_WORD<T>; }

  struct Shared {
    uint32_t *weights, *columns;
    float *partial, *u, *c, *mean, *rstd;  // u [slices, 4 · units, N], c [slices, units, N]; mean, rstd [N]
  };
  HOST_DEVICE Shared shared(Arena& arena, int warps) const {
    const Matrix<T, N> m = matrix();
    Shared s;
    s.weights = arena.take<uint32_t>(m.weight_words());
    s.columns = arena.take<uint32_t>(m.columns_words());
    s.partial = arena.take<float>(m.partial_floats(warps));
    s.u = arena.take<float>(int64_t(slices()) * 4 * units * N);
    s.c = arena.take<float>(int64_t(slices()) * units * N);
    s.mean = arena.take<float>(N);
    s.rstd = arena.take<float>(N);
    return s;
  }
};

// What one block does. Everything that its threads share passes through `s`; __syncthreads lies with the caller.
template <class T, int N>
struct LstmBlock {
  Lstm<T, N> shape;
  LstmTensors<T> tensors;
  typename Lstm<T, N>::Shared s;
  int rank, first, sequences;  // of this group: the first sequence, and how many

  DEVICE void join(const Lstm<T, N>& whole, const LstmTensors<T>& given, const typename Lstm<T, N>::Shared& shared) {
    shape = whole;
    tensors = given;
    s = shared;
    rank = int(blockIdx.x) % shape.group_size;
    first = int(blockIdx.x) / shape.group_size * shape.group_batch;
    sequences = least(shape.group_batch, shape.B - first);
  }

  DEVICE int in_slice(int slice) const { return least(N, sequences - slice * N); }
  DEVICE float* u(int slice) const { return s.u + slice * 4 * shape.units * N; }

  // Row r of the block's weights: the gates of its cells, gate by gate.
  DEVICE const T* row(int r) const {
    const int gate = r / shape.units, unit = r % shape.units;
    return unit < shape.cells().count(rank) ? tensors.weight_hh + int64_t(gate * shape.H + cell(unit)) * shape.H
                                              : nullptr;
  }
  DEVICE int cell(int unit) const { return shape.cells().first(rank) + unit; }

  DEVICE void start() const {
    shape.matrix().clear(s.columns);
    for (int slice = 0; slice < shape.slices(); ++slice)
      for (int i = threadIdx.x; i < shape.units * N; i += blockDim.x) {
        const int unit = i / N, n = i % N;
        const bool real = unit < shape.cells().count(rank) && n < in_slice(slice);
        s.c[slice * shape.units * N + i] =
            real ? float(tensors.c0[int64_t(first + slice * N + n) * shape.H + cell(unit)]) : 0;
      }
  }

  // u = x at step t, for which nobody has to be waited.
  DEVICE void take_input(int slice, int t) const {
    for (int i = threadIdx.x; i < 4 * shape.units * N; i += blockDim.x) {
      const int r = i / N, n = i % N, gate = r / shape.units, unit = r % shape.units;
      const bool real = unit < shape.cells().count(rank) && n < in_slice(slice);
      const int64_t b = first + slice * N + n;
      u(slice)[i] = real ? float(tensors.x[(t * int64_t(shape.B) + b) * 4 * shape.H + gate * shape.H + cell(unit)]) : 0;
    }
  }

  // Columns = h before step t.
  DEVICE void take_state(int slice, int t) const {
    const Matrix<T, N> m = shape.matrix();
    const int64_t b = first + slice * N;
    if (t == 0) {
      for (int i = threadIdx.x; i < in_slice(slice) * shape.row_words(); i += blockDim.x) {
        const int n = i / shape.row_words(), w = i % shape.row_words();
        float x[PER_WORD<T>];
        for (int j = 0; j < PER_WORD<T>; ++j) {
          const int k = w * PER_WORD<T> + j;
          x[j] = k < shape.H ? float(tensors.h0[(b + n) * shape.H + k]) : 0;
        }
        const uint32_t word[1] = {word_of<T>(x)};
        m.put(s.columns, n, w, word);
      }
      return;
    }
    const uint32_t* from = tensors.vectors + ((t - 1) * int64_t(shape.B) + b) * shape.row_words();
    gather<4>(
        in_slice(slice) * shape.row_words() / 4, [&](int i) { return from + 4 * i; },
        [&](int i, const uint32_t (&words)[4]) {
          const int n = 4 * i / shape.row_words();
          m.put(s.columns, n, 4 * i - n * shape.row_words(), words);
        });
  }

  DEVICE void multiply() const { shape.matrix().multiply(s.weights, s.columns, s.partial); }

  DEVICE void add_product(int slice) const {
    for (int i = threadIdx.x; i < 4 * shape.units * N; i += blockDim.x)
      u(slice)[i] += shape.matrix().sum(s.partial, i / N, i % N);
  }

  // A warp: mean of the block's part of u for sequence n, and the squares' sum about it.
  DEVICE void moments(int slice, int n, float& mean, float& m2) const {
    const int count = shape.cells().count(rank), lane = threadIdx.x % 32;
    float sum = 0, squares = 0;
    for (int i = lane; i < 4 * count; i += 32) sum += value(slice, i, count, n);
    mean = warp_sum(sum) / (4 * count);
    for (int i = lane; i < 4 * count; i += 32) {
      const float d = value(slice, i, count, n) - mean;
      squares += d * d;
    }
    m2 = warp_sum(squares);
  }
  DEVICE float value(int slice, int i, int count, int n) const {
    return u(slice)[(i / count * shape.units + i % count) * N + n];
  }

  // A warp: the same over all blocks of the group, whose words start with the two at place(m); `also(m, words)` reads the rest of
  // them. Every block's moments count as much as it has cells (Chan et al. 1979), so that nothing cancels.
  template <int W, class Place, class Also>
  DEVICE void all_moments(Place place, Also also, float& mean, float& m2) const {
    constexpr int MOST = MAX_GROUP_SIZE / 32;
    const int lane = threadIdx.x % 32;
    uint32_t words[MOST][W];
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < MOST; ++i)
      if (int m = lane + 32 * i; m < shape.group_size) load_words(place(m), words[i]);
#pragma unroll
    for (int i = 0; i < MOST; ++i)
      if (int m = lane + 32 * i; m < shape.group_size) {
        await(place(m), words[i]);
        sum += __uint_as_float(words[i][0]) * shape.cells().count(m);
        also(m, words[i]);
      }
    mean = warp_sum(sum) / shape.H;
#pragma unroll
    for (int i = 0; i < MOST; ++i)
      if (int m = lane + 32 * i; m < shape.group_size) {
        const float d = __uint_as_float(words[i][0]) - mean;
        squares += __uint_as_float(words[i][1]) + 4 * shape.cells().count(m) * d * d;
      }
    m2 = warp_sum(squares);
  }

  // The norm, the gates and the new state of a slice, published as h of step t. a(r, n, gate, unit) -> pre-activation;
  // keep(n, unit, i, f, g, o normalized, c, h) for what is saved.
  template <class A, class Keep>
  DEVICE void update(int slice, int t, A a, Keep keep) const {
    constexpr int PER = PER_WORD<T>;
    const int H = shape.H, from = cell(0), mine = shape.cells().count(rank);
    const int to = rank == shape.group_size - 1 ? exchanged(H) - from : shape.units, words = to / PER;
    for (int i = threadIdx.x; i < in_slice(slice) * words; i += blockDim.x) {
      const int n = i / words, w = i % words;
      float out[PER];
#pragma unroll
      for (int j = 0; j < PER; ++j) {
        const int unit = w * PER + j;
        out[j] = 0;
        if (unit >= mine) continue;
        float v[4], z[4];
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          const int k = gate * H + from + unit;
          v[gate] = (a(gate * shape.units + unit, n, k) - s.mean[n]) * s.rstd[n];
          z[gate] = v[gate] * float(tensors.norm_weight[k]) + float(tensors.norm_bias[k]);
        }
        float& c = s.c[(slice * shape.units + unit) * N + n];
        c = sigmoid(z[1]) * c + sigmoid(z[0]) * tanhf(z[2]);
        out[j] = sigmoid(z[3]) * tanhf(c);
        keep(n, from + unit, v, c, out[j]);
      }
      const int64_t b = first + slice * N + n;
      publish(tensors.vectors + (t * int64_t(shape.B) + b) * shape.row_words() + from / PER + w, word_of<T>(out));
    }
  }
};
