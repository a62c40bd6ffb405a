// Decoding with highway masked convolutions in one launch. Equations: fastvae/ops/decode_bytenet.py.
//
// Each layer has blocks of its own, which keep the weights of some channels in shared memory, and so has the
// classifier. A vector passes one exchange a layer, and the chosen token one more; what the step before gives to a
// layer's sum is made after its vector has been published, while others wait for nothing. Slices of the sequences
// follow each other through the layers.
#include <algorithm>

#include "launch.cuh"
#include "argmax.cuh"

namespace {
constexpr int CHOICE_WORDS = 2;  // logit, token
constexpr int MAX_CLASSIFIER_BLOCKS = 32;

template <class T>
struct Layers {
  const T *projected, *token_embeddings;  // [T, B, 2C], [V + 1, 2C]
  const T *conv_weight, *conv_bias;  // [layers, 2, 3C, C], [layers, 3C]: the step before, then this one
  const T *classifier_weight, *classifier_bias;
  const float* noise;         // [T, B, V] or null
  int64_t* tokens;            // [B, T]
  uint32_t *vectors, *choices;  // [layers, T, B, exchanged(C)] of T; [T, B, classifier_blocks, CHOICE_WORDS]
  int V, end_id, pad_id;
  bool carry;
};

template <class T, int N>
struct Net {
  // candidates: tokens of a classifier block, at most; group_batch: sequences of a group
  int steps, B, C, layers, group_size, units, classifier_blocks, candidates, group_batch;

  HOST_DEVICE Parts channels() const { return {C, group_size, units}; }
  HOST_DEVICE int blocks() const { return layers * group_size + classifier_blocks; }  // of a group
  HOST_DEVICE int slices() const { return divide_up(group_batch, N); }
  HOST_DEVICE int row_words() const { return exchanged(C) / PER_WORD<T>; }

  struct Shared {
    uint32_t *before, *now, *columns;  // weights of the step before and of this one
    float *partial, *sums;             // sums [slices, 3 · units, N] of a layer, [candidates, N] of a classifier
    int *token, *ended, *stopped;      // [N], [group_batch], [slices]
  };
  HOST_DEVICE Shared shared(Arena& arena, int warps, bool classifier) const {
    const Matrix<T, N> m{classifier ? candidates : 3 * units, C};
    Shared s;
    s.before = arena.take<uint32_t>(classifier ? 0 : m.weight_words());
    s.now = arena.take<uint32_t>(m.weight_words());
    s.columns = arena.take<uint32_t>(m.columns_words());
    s.partial = arena.take<float>(m.partial_floats(warps));
    s.sums = arena.take<float>(classifier ? candidates * N : int64_t(slices()) * 3 * units * N);
    s.token = arena.take<int>(N);
    s.ended = arena.take<int>(group_batch);
    s.stopped = arena.take<int>(slices());
    return s;
  }
};

template <class T, int N>
struct NetBlock {
  Net<T, N> shape;
  Layers<T> d;
  typename Net<T, N>::Shared s;
  Matrix<T, N> matrix;
  int layer, rank, first, sequences;

  DEVICE int in_slice(int slice) const { return least(N, sequences - slice * N); }
  DEVICE int64_t place(int t, int slice) const { return t * int64_t(shape.B) + first + slice * N; }
  // The vectors that layer `of` makes for a slice.
  DEVICE uint32_t* vectors(int of, int t, int slice) const {
    return d.vectors + (of * int64_t(shape.steps) * shape.B + place(t, slice)) * shape.row_words();
  }

  // Columns = the vectors of the layer below; or it says that the slice has stopped.
  DEVICE bool take_vectors(int slice, int t) const {
    const uint32_t* from = vectors(layer - 1, t, slice);
    bool goes_on = true;
    gather<4>(
        in_slice(slice) * shape.row_words() / 4, [&](int i) { return from + 4 * i; },
        [&](int i, const uint32_t (&words)[4]) {
          const int n = 4 * i / shape.row_words();
          if (i == 0) goes_on = words[0] != STOP;
          matrix.put(s.columns, n, 4 * i - n * shape.row_words(), words);
        });
    return all_threads(goes_on);
  }

  // The first layer's: x = tanh(p) σ(q) of the features and the token before.
  DEVICE void take_symbols(int slice, int t) const {
    const int C = shape.C;
    for (int i = threadIdx.x; i < in_slice(slice) * shape.row_words(); i += blockDim.x) {
      const int n = i / shape.row_words(), w = i % shape.row_words();
      const T* projected = d.projected + (place(t, slice) + n) * 2 * C;
      const T* row = d.token_embeddings + int64_t(s.token[n]) * 2 * C;
      float x[PER_WORD<T>];
      for (int j = 0; j < PER_WORD<T>; ++j) {
        const int c = w * PER_WORD<T> + j;
        x[j] = c < C ? tanhf(float(projected[c]) + float(row[c])) * sigmoid(float(projected[C + c]) + float(row[C + c]))
                     : 0;
      }
      const uint32_t word[1] = {word_of<T>(x)};
      matrix.put(s.columns, n, w, word);
    }
    __syncthreads();
  }

  // What the classifier blocks chose at step t − 1 -> whether any sequence of the slice goes on.
  DEVICE bool choose(int slice, int t) const {
    const int lane = threadIdx.x % 32;
    for (int n = threadIdx.x / 32; n < in_slice(slice); n += blockDim.x / 32) {
      Choice best = Choice::none();
      if (t == 0) {
        best.token = d.V;
      } else {
        if (lane < shape.classifier_blocks) {
          const int64_t sequence = place(t - 1, slice) + n;
          const uint32_t* from = d.choices + (sequence * shape.classifier_blocks + lane) * CHOICE_WORDS;
          uint32_t words[CHOICE_WORDS];
          load_words(from, words);
          await(from, words);
          best = {__uint_as_float(words[0]), int(words[1])};
        }
        best.over_warp();
      }
      if (lane) continue;
      s.token[n] = best.token;
      if (t == 0) continue;
      int& ended = s.ended[slice * N + n];
      if (rank == 0) d.tokens[int64_t(first + slice * N + n) * shape.steps + t - 1] = ended ? d.pad_id : best.token;
      ended |= best.token == d.end_id;
    }
    __syncthreads();
    bool over = d.end_id >= 0;
    for (int n = threadIdx.x; n < in_slice(slice); n += blockDim.x) over &= s.ended[slice * N + n] != 0;
    return !all_threads(over);
  }

  DEVICE void stop(int slice, int t) const {
    const int from = shape.channels().first(rank) / PER_WORD<T>, words = own_words();
    const uint32_t stopped[1] = {STOP};
    for (int i = threadIdx.x; i < in_slice(slice) * words; i += blockDim.x)
      store_words(vectors(layer, t, slice) + i / words * shape.row_words() + from + i % words, stopped);
    if (threadIdx.x == 0) s.stopped[slice] = 1;
    __syncthreads();
  }
  // Words of a vector that this block publishes, the last one those past the end too.
  DEVICE int own_words() const {
    const int from = shape.channels().first(rank);
    return (rank == shape.group_size - 1 ? exchanged(shape.C) - from : shape.units) / PER_WORD<T>;
  }

  DEVICE float& sum(int slice, int r, int n) const { return s.sums[(slice * 3 * shape.units + r) * N + n]; }

  DEVICE void publish_vectors(int slice, int t) const {
    const int C = shape.C, U = shape.units, words = own_words(), from = shape.channels().first(rank);
    const T* bias = d.conv_bias + int64_t(layer) * 3 * C + from;
    for (int i = threadIdx.x; i < in_slice(slice) * words; i += blockDim.x) {
      const int n = i / words, w = i % words;
      float y[PER_WORD<T>];
      for (int j = 0; j < PER_WORD<T>; ++j) {
        const int unit = w * PER_WORD<T> + j;
        y[j] = 0;
        if (unit >= shape.channels().count(rank)) continue;
        float a[3];
        for (int gate = 0; gate < 3; ++gate)
          a[gate] =
              sum(slice, gate * U + unit, n) + matrix.sum(s.partial, gate * U + unit, n) + float(bias[gate * C + unit]);
        y[j] = sigmoid(a[0]) * tanhf(a[2]);
        if (d.carry) y[j] += sigmoid(a[1]) * matrix.at(s.columns, n, from + unit);
      }
      publish(vectors(layer, t, slice) + n * shape.row_words() + from / PER_WORD<T> + w, word_of<T>(y));
    }
    __syncthreads();
  }

  // What this step's vectors will add to the next step's sums.
  DEVICE void look_ahead(int slice) const {
    matrix.multiply(s.before, s.columns, s.partial);
    __syncthreads();
    for (int i = threadIdx.x; i < 3 * shape.units * N; i += blockDim.x)
      sum(slice, i / N, i % N) = matrix.sum(s.partial, i / N, i % N);
    __syncthreads();
  }

  DEVICE void load_layer() const {
    const Parts channels = shape.channels();
    for (int tap = 0; tap < 2; ++tap)
      matrix.load(tap ? s.now : s.before, [&](int r) -> const T* {
        const int gate = r / shape.units, unit = r % shape.units;
        if (unit >= channels.count(rank)) return nullptr;
        const int64_t row = ((layer * 2 + tap) * 3 + gate) * int64_t(shape.C) + channels.first(rank) + unit;
        return d.conv_weight + row * shape.C;
      });
    for (int i = threadIdx.x; i < shape.slices() * 3 * shape.units * N; i += blockDim.x) s.sums[i] = 0;
  }

  DEVICE void run_layer() const {
    const int slices = divide_up(sequences, N);
    for (int t = 0, going = slices; t < shape.steps + (layer == 0) && going > 0; ++t) {
      for (int slice = 0; slice < slices; ++slice) {
        if (s.stopped[slice]) continue;
        const bool goes_on = layer ? take_vectors(slice, t) : choose(slice, t);
        if (t == shape.steps) continue;
        if (!goes_on) {
          stop(slice, t);
          --going;
          continue;
        }
        if (layer == 0) take_symbols(slice, t);
        matrix.multiply(s.now, s.columns, s.partial);
        __syncthreads();
        publish_vectors(slice, t);
        look_ahead(slice);
      }
    }
  }

  DEVICE Parts vocabulary() const { return {d.V, shape.classifier_blocks, shape.candidates}; }

  DEVICE void load_voter() const {
    matrix.load(s.now, [&](int r) -> const T* {
      if (r >= vocabulary().count(rank)) return nullptr;
      return d.classifier_weight + int64_t(vocabulary().first(rank) + r) * shape.C;
    });
  }

  // A warp for each sequence.
  DEVICE void publish_votes(int slice, int t) const {
    const int lane = threadIdx.x % 32, from = vocabulary().first(rank);
    for (int n = threadIdx.x / 32; n < in_slice(slice); n += blockDim.x / 32) {
      Choice best = Choice::none();
      for (int v = lane; v < vocabulary().count(rank); v += 32) {
        float logit = matrix.sum(s.partial, v, n) + float(d.classifier_bias[from + v]);
        if (d.noise) logit += d.noise[(place(t, slice) + n) * d.V + from + v];
        best.better({logit, from + v});
      }
      best.over_warp();
      uint32_t* to = d.choices + ((place(t, slice) + n) * shape.classifier_blocks + rank) * CHOICE_WORDS;
      if (lane < CHOICE_WORDS) publish(to + lane, lane ? uint32_t(best.token) : __float_as_uint(best.logit));
    }
    __syncthreads();
  }

  DEVICE void run_voter() const {
    const int slices = divide_up(sequences, N);
    for (int t = 0, going = slices; t < shape.steps && going > 0; ++t) {
      for (int slice = 0; slice < slices; ++slice) {
        if (s.stopped[slice]) continue;
        if (!take_vectors(slice, t)) {
          if (threadIdx.x == 0) s.stopped[slice] = 1;
          --going;
          continue;
        }
        matrix.multiply(s.now, s.columns, s.partial);
        __syncthreads();
        publish_votes(slice, t);
      }
    }
  }
};

template <class T, int N>
KERNEL(THREADS)
decode(Net<T, N> shape, Layers<T> d) {
  const int group = blockIdx.x / shape.blocks(), id = blockIdx.x % shape.blocks(), first = group * shape.group_batch;
  const bool classifier = id >= shape.layers * shape.group_size;
  Arena arena{shared_memory()};
  const NetBlock<T, N> block{shape,
                             d,
                             shape.shared(arena, blockDim.x / 32, classifier),
                             {classifier ? shape.candidates : 3 * shape.units, shape.C},
                             classifier ? shape.layers : id / shape.group_size,
                             classifier ? id - shape.layers * shape.group_size : id % shape.group_size,
                             first,
                             least(shape.group_batch, shape.B - first)};
  for (int i = threadIdx.x; i < shape.group_batch; i += blockDim.x) block.s.ended[i] = 0;
  for (int i = threadIdx.x; i < shape.slices(); i += blockDim.x) block.s.stopped[i] = 0;
  block.matrix.clear(block.s.columns);
  if (classifier)
    block.load_voter();
  else
    block.load_layer();
  __syncthreads();
  if (classifier)
    block.run_voter();
  else
    block.run_layer();
}

// The plan (`groups`, `units`, `classifier_blocks`, `columns`, `threads`) is made by fastvae/kernels/persistent.py.
Tensor decode_bytenet_persistent(Tensor projected, Tensor token_embeddings, Tensor conv_weight, Tensor conv_bias,
                                 Tensor classifier_weight, Tensor classifier_bias, std::optional<Tensor> maybe_noise,
                                 bool carry, std::optional<int64_t> end_id, std::optional<int64_t> pad_id,
                                 int64_t groups, int64_t units,
                                 int64_t classifier_blocks, int64_t columns, int64_t threads) {
  CHECK_DIM(projected, 3, "[T, B, 2C]");
  CHECK_DIM(conv_weight, 4, "[N, 2, 3C, C]");
  CHECK_DIM(classifier_weight, 2, "[V, C]");
  const int64_t T = projected.size(0), B = projected.size(1), N = conv_weight.size(0), C = conv_weight.size(3);
  const int64_t V = classifier_weight.size(0);
  CHECK_POSITIVE(projected);
  CHECK_POSITIVE(conv_weight);
  CHECK_SHAPE(projected, T, B, 2 * C);
  CHECK_SHAPE(conv_weight, N, 2, 3 * C, C);
  CHECK_SHAPE(conv_bias, N, 3 * C);
  CHECK_LIKE(conv_weight, projected);
  CHECK_LIKE(conv_bias, projected);
  check_choice(projected, token_embeddings, classifier_weight, classifier_bias, maybe_noise, 2 * C, C, end_id, pad_id);
  const Split split = check_split(C, B, groups, units, threads);
  const int64_t candidates = classifier_blocks > 0 ? (V - 1) / classifier_blocks + 1 : 0;
  CHECK(classifier_blocks > 0 && classifier_blocks <= MAX_CLASSIFIER_BLOCKS && (classifier_blocks - 1) * candidates < V,
        "classifier_blocks must be from 1 to " + std::to_string(MAX_CLASSIFIER_BLOCKS) +
            " and leave each block a token, got " + std::to_string(classifier_blocks));
  Tensor noise = maybe_noise ? *maybe_noise : classifier_bias;
  make_contiguous(projected, token_embeddings, conv_weight, conv_bias, classifier_weight, classifier_bias, noise);
  Tensor tokens = filled(projected, {B, T}, ScalarType::Long, pad_id.value_or(-1));
  Tensor vectors = emptied(projected, N * T * B * exchanged(C) * int64_t(projected.element_size()) / 4);
  Tensor choices = emptied(projected, T * B * classifier_blocks * CHOICE_WORDS);
  dispatch<BFloat16, float>(projected.scalar_type(), columns, [&]<class S, int COLUMNS>() {
    const Net<S, COLUMNS> shape{.steps = int(T),
                                .B = int(B),
                                .C = int(C),
                                .layers = int(N),
                                .group_size = split.group_size,
                                .units = int(units),
                                .classifier_blocks = int(classifier_blocks),
                                .candidates = int(candidates),
                                .group_batch = split.group_batch};
    const Layers<S> d{in<S>(projected),
                      in<S>(token_embeddings),
                      in<S>(conv_weight),
                      in<S>(conv_bias),
                      in<S>(classifier_weight),
                      in<S>(classifier_bias),
                      maybe_noise ? in<float>(noise) : nullptr,
                      out<int64_t>(tokens),
                      words(vectors),
                      words(choices),
                      int(V),
                      int(end_id.value_or(-1)),
                      int(pad_id.value_or(-1)),
                      carry};
    Arena layer{nullptr}, classifier{nullptr};
    shape.shared(layer, threads / 32, false);
    shape.shared(classifier, threads / 32, true);
    launch_cooperative(projected, decode<S, COLUMNS>, split.groups * shape.blocks(), threads,
                       std::max(layer.used, classifier.used), shape, d);
  });
  return tokens;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, DEVICE_KEY, m) {
  m.impl("decode_bytenet_persistent", TORCH_BOX(&decode_bytenet_persistent));
}
