// A block's part of a LayerNorm-LSTM over a whole sequence. Equations: fastvae/ops/layer_norm_lstm.py.
//
// The sequences are divided among groups of blocks; within a group, every block keeps the recurrent weights of some
// cells in shared memory. A step passes the blocks' parts of the new h, and their moments of u = input + W h, which
// give the norm's (owners.cuh). A block takes N of its sequences at once (a slice), so that one slice is computed while
// another is on its way. What the next step needs of the input is copied to shared memory a step ahead.
#pragma once
#include "exchange.cuh"
#include "fragments.cuh"
#include "owners.cuh"
#include "split.cuh"

constexpr int THREADS = 256;         // of a block, at most
constexpr int MAX_GROUP_SIZE = 160;  // blocks of a group

DEVICE float warp_sum(float x) {
  for (int mask = 16; mask; mask /= 2) x += warp_xor(x, mask);
  return x;
}
DEVICE float sigmoid(float x) { return 1 / (1 + expf(-x)); }
// 1 / σ, or NaN where the variance overflowed, which zeros would hide.
DEVICE float reciprocal_std(float variance, float eps) { return variance < INFINITY ? 1 / sqrtf(variance + eps) : NAN; }

// Of some numbers: how many, their mean, Σ squares about it. Merged as by Chan et al. 1979, so that nothing cancels.
struct Moments {
  float count, mean, squares;
  DEVICE void merge(const Moments& other) {
    const float total = count + other.count;
    if (total == 0) return;
    const float d = other.mean - mean, part = other.count / total;
    mean += d * part;
    squares += other.squares + d * d * count * part;
    count = total;
  }
};

// Four numbers of consecutive cells, in one access where their place is aligned.
template <class T>
using Four = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
template <class T>
DEVICE void read_four(const T* from, float (&x)[4]) {
  const Four<T> words = load_wide<Four<T>>(from);
  T narrow[4];
  memcpy(narrow, &words, sizeof words);
  for (int j = 0; j < 4; ++j) x[j] = float(narrow[j]);
}
template <class T>
DEVICE void write_four(T* to, const float (&x)[4], int count, bool wide) {
  T narrow[4];
  for (int j = 0; j < 4; ++j) narrow[j] = T(x[j]);
  Four<T> words;
  memcpy(&words, narrow, sizeof words);
  if (wide) return store_wide(to, words);
  for (int j = 0; j < 4; ++j)
    if (j < count) to[j] = narrow[j];
}

template <class T>
struct LstmTensors {
  const T *x, *weight_hh, *norm_weight, *norm_bias, *h0, *c0;  // x [T, B, 4H]
  uint32_t* vectors;                                           // [ring, B, exchanged_stride] of exchanged(H) T: h before a step
  bool wide;  // numbers of four cells, and rows of the weights, are aligned to 4 and 8 numbers
};

template <class T, int N>
struct Lstm {
  int steps, B, H, group_size, units, group_batch;  // group_batch: sequences of a group
  int more_rows = 0;                                // of weights, below those of the cells

  HOST_DEVICE Parts cells() const { return {H, group_size, units}; }
  HOST_DEVICE Product<T, N> product() const { return {4 * units + more_rows, H}; }
  HOST_DEVICE int slices() const { return divide_up(group_batch, N); }
  HOST_DEVICE int row_words() const { return exchanged(H) / PER_WORD<T>; }
  HOST_DEVICE int quads() const { return units / 4; }
  // Of a sequence's new h on its way out: an odd number of 16-byte words, so that neighbors are in different banks.
  HOST_DEVICE int stage_words() const { return (divide_up(units / PER_WORD<T>, 4) / 2 * 2 + 1) * 4; }

  // u, c and x have a slice's four cells [4, units / 4, N] for each gate; x has them as [units / 4, N, 4].
  struct Shared {
    uint32_t *weights, *columns;
    float *partial, *u, *c;
    T* x;
    uint32_t* stage;                     // [sequences, stage_words]
    float *merged, *norm, *mean, *rstd;  // [warps, 3, N], [gain and bias, 4 · units]; [sequences]
  };
  HOST_DEVICE Shared shared(Arena& arena, int warps) const {
    const Product<T, N> p = product();
    const int64_t sequences = slices() * N;
    Shared s;
    s.weights = arena.take<uint32_t>(p.weight_words());
    s.columns = arena.take<uint32_t>(p.columns_words());
    s.partial = arena.take<float>(p.partial_floats(warps));
    s.u = arena.take<float>(sequences * 4 * units);
    s.c = arena.take<float>(sequences * units);
    s.x = arena.take<T>(sequences * 4 * units);
    s.stage = arena.take<uint32_t>(sequences * stage_words());
    s.merged = arena.take<float>(warps * 3 * N);
    s.norm = arena.take<float>(2 * 4 * units);
    s.mean = arena.take<float>(sequences);
    s.rstd = arena.take<float>(sequences);
    return s;
  }
};

// What one block does. Everything that its threads share passes through `s`; __syncthreads lies with the caller. A
// thread has the sequence n = its number mod N of a slice wherever `lanes()` is called.
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
  DEVICE int slices() const { return divide_up(sequences, N); }
  DEVICE int cell(int unit) const { return shape.cells().first(rank) + unit; }
  DEVICE int mine() const { return shape.cells().count(rank); }
  DEVICE int64_t place(int t, int n) const { return t * int64_t(shape.B) + first + n; }
  DEVICE float& u(int gate, int unit, int n) const {
    return s.u[(((n / N * 4 + gate) * 4 + unit % 4) * shape.quads() + unit / 4) * N + n % N];
  }
  DEVICE float& c(int unit, int n) const {
    return s.c[((n / N * 4 + unit % 4) * shape.quads() + unit / 4) * N + n % N];
  }
  DEVICE uint32_t* vector(int t, int n) const {
    return tensors.vectors + (t % RING * int64_t(shape.B) + first + n) * exchanged_stride(shape.row_words());
  }

  // Row r of the block's weights: the gates of its cells, gate by gate.
  DEVICE const T* row(int r) const {
    const int gate = r / shape.units, unit = r % shape.units;
    return unit < mine() ? tensors.weight_hh + int64_t(gate * shape.H + cell(unit)) * shape.H : nullptr;
  }

  // fn(n, gate, quad): cells 4 quad to 4 quad + 3 of all sequences' gates; neighbors have neighboring cells.
  template <class Fn>
  DEVICE void each_four(int from, int to, int gates, Fn fn) const {
    const int quads = divide_up(mine(), 4), each = gates * quads;
    for (int i = threadIdx.x; i < (to - from) * each; i += blockDim.x)
      fn(from + i / each, i % each / quads, i % quads);
  }

  // The state before the first step, and the constants.
  DEVICE void start() const {
    for (int i = threadIdx.x; i < sequences * shape.units; i += blockDim.x) {
      const int n = i / shape.units, unit = i % shape.units;
      if (unit < mine()) c(unit, n) = float(tensors.c0[(first + n) * int64_t(shape.H) + cell(unit)]);
    }
    for (int i = threadIdx.x; i < 4 * shape.units; i += blockDim.x) {
      const int gate = i / shape.units, unit = i % shape.units;
      if (unit >= mine()) continue;
      s.norm[i] = float(tensors.norm_weight[gate * shape.H + cell(unit)]);
      s.norm[4 * shape.units + i] = float(tensors.norm_bias[gate * shape.H + cell(unit)]);
    }
    constexpr int PER = PER_WORD<T>;
    const int words = shape.units / PER;
    for (int i = threadIdx.x; i < sequences * words; i += blockDim.x) {
      const int n = i / words, w = i % words;
      float x[PER];
      for (int j = 0; j < PER; ++j) {
        const int unit = w * PER + j;
        x[j] = unit < mine() ? float(tensors.h0[(first + n) * int64_t(shape.H) + cell(unit)]) : 0;
      }
      s.stage[n * shape.stage_words() + w] = word_of<T>(x);
    }
    for (int slice = 0; slice < slices(); ++slice) fetch_input(slice, 0);
    __syncthreads();
    for (int slice = 0; slice < slices(); ++slice) publish_state(slice, 0);
  }

  // x of step t begins to come.
  DEVICE void fetch_input(int slice, int t) const {
    each_four(slice * N, slice * N + in_slice(slice), 4, [&](int n, int gate, int quad) {
      const T* from = tensors.x + (place(t, n) * 4 + gate) * shape.H + cell(4 * quad);
      T* to = s.x + (((n / N * 4 + gate) * shape.quads() + quad) * N + n % N) * 4;
      if (tensors.wide) return copy_async<4 * sizeof(T)>(to, from);
      for (int j = 0; j < 4; ++j)
        if (4 * quad + j < mine()) to[j] = from[j];
    });
  }

  DEVICE void multiply(int slice, int t) const {
    shape.product().multiply(
        s.weights, s.columns, s.partial, [&](int n) { return vector(t, slice * N + n); }, in_slice(slice),
        shape.row_words());
  }

  // u = x + W h, and each warp's moments of it.
  DEVICE void add_product(int slice) const {
    const int n = threadIdx.x % N, at_once = blockDim.x / N, quads = shape.quads(), real = mine();
    const auto product = shape.product();
    Moments m{0, 0, 0};
    for (int i = threadIdx.x / N; i < 4 * quads; i += at_once) {
      const int gate = i / quads, quad = i % quads;
      float x[4];
      read_four(s.x + (((slice * 4 + gate) * quads + quad) * N + n) * 4, x);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x[j] += product.sum(s.partial, gate * shape.units + 4 * quad + j, n);
        u(gate, 4 * quad + j, slice * N + n) = x[j];
        if (4 * quad + j < real) m.mean += x[j], ++m.count;
      }
    }
    if (m.count) m.mean /= m.count;
    for (int i = threadIdx.x / N; i < 4 * quads; i += at_once)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (i % quads * 4 + j < real) {
          const float d = u(i / quads, i % quads * 4 + j, slice * N + n) - m.mean;
          m.squares += d * d;
        }
    for (int mask = N; mask < 32; mask *= 2)
      m.merge({warp_xor(m.count, mask), warp_xor(m.mean, mask), warp_xor(m.squares, mask)});
    float* to = s.merged + threadIdx.x / 32 * 3 * N + n;
    if (threadIdx.x % 32 < N) to[0] = m.count, to[N] = m.mean, to[2 * N] = m.squares;
  }
  // Of sequence n of the slice that add_product() was called for last.
  DEVICE Moments moments(int n) const {
    Moments m{0, 0, 0};
    for (int w = 0, warps = blockDim.x / 32; w < warps; ++w)
      m.merge({s.merged[3 * w * N + n], s.merged[(3 * w + 1) * N + n], s.merged[(3 * w + 2) * N + n]});
    return m;
  }

  // A warp: mean and Σ squares over all blocks of the group, whose offers of W words start with theirs; `also(words)`
  // reads the rest of them. All loads are on their way before the first is waited for.
  template <int W, class Read, class Also>
  DEVICE void all_moments(Read offer, Also also, float& mean, float& squares) const {
    constexpr int MOST = MAX_GROUP_SIZE / 32;
    const int lane = threadIdx.x % 32;
    uint32_t words[MOST][W];
    float sum = 0, about = 0;
#pragma unroll
    for (int i = 0; i < MOST; ++i)
      if (int m = lane + 32 * i; m < shape.group_size) load_words(offer(m), words[i]);
#pragma unroll
    for (int i = 0; i < MOST; ++i)
      if (int m = lane + 32 * i; m < shape.group_size) {
        await(offer(m), words[i]);
        sum += __uint_as_float(words[i][0]) * shape.cells().count(m);
        also(words[i]);
      }
    mean = warp_sum(sum) / shape.H;
#pragma unroll
    for (int i = 0; i < MOST; ++i)
      if (int m = lane + 32 * i; m < shape.group_size) {
        const float d = __uint_as_float(words[i][0]) - mean;
        about += __uint_as_float(words[i][1]) + 4 * shape.cells().count(m) * d * d;
      }
    squares = warp_sum(about);
  }

  // The norm, the gates and the new state of a slice. SAVE: u becomes the normalized values.
  template <bool SAVE>
  DEVICE void update(int slice) const {
    constexpr int PER = PER_WORD<T>;
    const int quads = shape.quads(), at = threadIdx.x % N, n = slice * N + at;
    if (at >= in_slice(slice)) return;
    const float mean = s.mean[n], rstd = s.rstd[n];
    for (int i = threadIdx.x / N; i < quads * 4 / PER; i += blockDim.x / N) {
      const int quad = i % quads, part = i / quads;
      float out[PER];
#pragma unroll
      for (int j = 0; j < PER; ++j) {
        const int unit = 4 * quad + part * PER + j;
        out[j] = 0;
        if (unit >= mine()) continue;
        float z[4];
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          const int r = gate * shape.units + unit;
          float& a = u(gate, unit, n);
          const float v = (a - mean) * rstd;
          if (SAVE) a = v;
          z[gate] = v * s.norm[r] + s.norm[4 * shape.units + r];
        }
        float& state = c(unit, n);
        state = sigmoid(z[1]) * state + sigmoid(z[0]) * tanhf(z[2]);
        out[j] = sigmoid(z[3]) * tanhf(state);
      }
      s.stage[n * shape.stage_words() + quad * (4 / PER) + part] = word_of<T>(out);
    }
  }

  // Words of a vector that this block publishes, the last one those past the end too.
  DEVICE int own_words() const {
    const int from = cell(0);
    return (rank == shape.group_size - 1 ? exchanged(shape.H) - from : shape.units) / PER_WORD<T>;
  }
  // fn.operator()<W>(n, w): words w to w + W - 1 of the block's part of the vectors.
  template <class Fn>
  DEVICE void each_word(int from, int to, Fn fn) const {
    if (shape.units % 8 == 0)
      each_words<4>(from, to, fn);
    else
      each_words<2>(from, to, fn);
  }
  template <int W, class Fn>
  DEVICE void each_words(int from, int to, Fn fn) const {
    const int each = own_words() / W;
    for (int i = threadIdx.x; i < (to - from) * each; i += blockDim.x)
      fn.template operator()<W>(from + i / each, i % each * W);
  }
  DEVICE uint32_t* own_word(int t, int n, int w) const { return vector(t, n) + cell(0) / PER_WORD<T> + w; }
  // The new h of a slice, as h before step t.
  DEVICE void publish_state(int slice, int t) const {
    each_word(slice * N, slice * N + in_slice(slice), [&]<int W>(int n, int w) {
      uint32_t words[W];
      for (int i = 0; i < W; ++i)
        words[i] = w < shape.units / PER_WORD<T> ? s.stage[n * shape.stage_words() + w + i] : 0;
      publish(own_word(t, n, w), words);
    });
  }
  // Between two periods of the ring (exchange.cuh).
  template <class Agreement>
  DEVICE void renew(int t, const Agreement& owners) const {
    if (!begins_period(t)) return;
    __threadfence();
    for (int later = t + 2 * PERIOD; later < least(t + 3 * PERIOD, shape.steps + 1); ++later) {
      each_word(0, sequences, [&]<int W>(int n, int w) { make_empty<W>(own_word(later, n, w)); });
      owners.renew(later);
    }
  }
};
