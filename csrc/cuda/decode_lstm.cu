// Decoding with a LayerNorm-LSTM in one launch. Equations: fastvae/ops/decode_lstm.py.
//
// Choosing token y of step t − 1 and the norm of step t need one exchange together: with a = u + E_y, u = x_t + W h,
//   mean(a) = mean(u) + mean(E_y),   Σ (a − mean)² = Σ (u − mean)² + 2 u·Ẽ_y + |Ẽ_y|²,   Ẽ_y = E_y − mean(E_y),
// and u·Ẽ_y = x_t·Ẽ_y + (Ẽ W h)_y is a product with h like a logit. So every block publishes, with its best
// token, that token's part of the squares ("cross"), and a step passes two exchanges: these choices, and h.
#include "launch.cuh"
#include "argmax.cuh"

namespace {
constexpr int CHOICE_WORDS = 8;  // mean, Σ squares, logit, token, cross, and three unused: a sector of memory

template <class T>
struct Decoding : LstmTensors<T> {
  const T *token_embeddings, *classifier_weight, *classifier_bias, *cross_weight;  // cross_weight [parts, V, H]
  const float *projected_cross, *start_cross, *row_means, *noise;             // [T, B, V], [B], [V + 1]; noise or null
  int64_t* tokens;                                                            // [B, T]
  int V, end_id, pad_id;
  float eps;
};

// 2 Ẽ W is kept as the sum of two 16-bit numbers, or as one of 32 bits.
template <class T>
constexpr int PARTS = sizeof(T) == 2 ? 2 : 1;

template <class T, int N>
struct DecodeShared : Lstm<T, N>::Shared {
  float *logit, *cross;  // [candidates, N]
  int *token, *ended;    // [N], [group_batch]
};

template <class T, int N>
HOST_DEVICE DecodeShared<T, N> carve(Arena& arena, const Lstm<T, N>& shape, int candidates, int warps) {
  DecodeShared<T, N> s;
  static_cast<typename Lstm<T, N>::Shared&>(s) = shape.shared(arena, warps);
  s.logit = arena.take<float>(candidates * N);
  s.cross = arena.take<float>(candidates * N);
  s.token = arena.take<int>(N);
  s.ended = arena.take<int>(shape.group_batch);
  return s;
}

template <class T, int N>
struct DecodeBlock : LstmBlock<T, N> {
  using Base = LstmBlock<T, N>;
  using Base::first, Base::in_slice, Base::rank, Base::shape;
  Decoding<T> d;
  DecodeShared<T, N> own;
  int candidates;  // of each block, at most

  DEVICE Parts vocabulary() const { return {d.V, shape.group_size, candidates}; }

  DEVICE const T* row(int r) const {
    r -= 4 * shape.units;
    if (r < 0) return Base::row(r + 4 * shape.units);
    const int part = r / candidates, v = r % candidates;
    if (v >= vocabulary().count(rank)) return nullptr;
    const int64_t token = vocabulary().first(rank) + v;
    return part ? d.cross_weight + ((part - 1) * int64_t(d.V) + token) * shape.H
                : d.classifier_weight + token * shape.H;
  }

  // What logits (of step t − 1) and crosses (of step t) are without h.
  DEVICE void take_candidates(int slice, int t) const {
    for (int i = threadIdx.x; i < candidates * N; i += blockDim.x) {
      const int v = i / N, n = i % N, token = vocabulary().first(rank) + v;
      own.logit[i] = own.cross[i] = 0;
      if (v >= vocabulary().count(rank) || n >= in_slice(slice)) continue;
      const int64_t b = first + slice * N + n;
      own.logit[i] = float(d.classifier_bias[token]);
      if (d.noise) own.logit[i] += d.noise[((t - 1) * int64_t(shape.B) + b) * d.V + token];
      if (t < shape.steps) own.cross[i] = d.projected_cross[(t * int64_t(shape.B) + b) * d.V + token];
    }
  }
  DEVICE void add_candidates() const {
    const auto m = shape.matrix();
    for (int i = threadIdx.x; i < candidates * N; i += blockDim.x) {
      const int r = 4 * shape.units + i / N, n = i % N;
      own.logit[i] += m.sum(this->s.partial, r, n);
      for (int part = 1; part <= PARTS<T>; ++part) own.cross[i] += m.sum(this->s.partial, r + part * candidates, n);
    }
  }

  DEVICE uint32_t* choice_words(int t, int slice, int n, int m) const {
    const int64_t b = first + slice * N + n;
    return d.moments + ((t * int64_t(shape.B) + b) * shape.group_size + m) * CHOICE_WORDS;
  }

  // A warp for each sequence: the block's moments and its best candidate.
  DEVICE void publish_offers(int slice, int t) const {
    const int lane = threadIdx.x % 32;
    for (int n = threadIdx.x / 32; n < in_slice(slice); n += blockDim.x / 32) {
      float mean = 0, m2 = 0;
      if (t < shape.steps) this->moments(slice, n, mean, m2);
      Choice best = Choice::none();
      if (t > 0) {
        for (int v = lane; v < vocabulary().count(rank); v += 32)
          best.better({own.logit[v * N + n], vocabulary().first(rank) + v, own.cross[v * N + n]});
        best.over_warp();
      }
      const uint32_t words[CHOICE_WORDS] = {__float_as_uint(mean), __float_as_uint(m2), __float_as_uint(best.logit),
                                            uint32_t(best.token), __float_as_uint(best.cross)};
#pragma unroll
      for (int w = 0; w < CHOICE_WORDS; ++w)
        if (lane == w) publish(choice_words(t, slice, n, rank) + w, words[w]);
    }
  }

  // A warp for each sequence: the token of step t − 1, and the norm of step t.
  DEVICE void choose(int slice, int t) const {
    for (int n = threadIdx.x / 32; n < in_slice(slice); n += blockDim.x / 32) {
      const int64_t b = first + slice * N + n;
      float mean, m2;
      Choice best = Choice::none();
      this->template all_moments<CHOICE_WORDS>(
          [&](int m) { return choice_words(t, slice, n, m); },
          [&](int, const uint32_t (&words)[CHOICE_WORDS]) {
            best.better({__uint_as_float(words[2]), int(words[3]), __uint_as_float(words[4])});
          },
          mean, m2);
      best.over_warp();
      if (t == 0) best = {0, d.V, d.start_cross[b]};
      const float squares = m2 + best.cross;
      if (threadIdx.x % 32) continue;
      this->s.mean[n] = mean + d.row_means[best.token];
      this->s.rstd[n] = 1 / sqrtf((squares < 0 ? 0 : squares) / (4 * shape.H) + d.eps);
      own.token[n] = best.token;
      if (t == 0) continue;
      int& ended = own.ended[slice * N + n];
      if (rank == 0) d.tokens[b * shape.steps + t - 1] = ended ? d.pad_id : best.token;
      ended |= best.token == d.end_id;
    }
  }

  DEVICE void advance(int slice, int t) const {
    this->update(
        slice, t,
        [&](int r, int n, int k) {
          return this->u(slice)[r * N + n] + float(d.token_embeddings[int64_t(own.token[n]) * 4 * shape.H + k]);
        },
        [](int, int, const float (&)[4], float, float) {});
  }

  DEVICE bool all_ended() const {
    bool so = true;
    for (int i = threadIdx.x; i < this->sequences; i += blockDim.x) so &= own.ended[i] != 0;
    return all_threads(so);
  }
};

template <class T, int N>
KERNEL(THREADS)
decode(Lstm<T, N> shape, Decoding<T> d, int candidates) {
  Arena arena{shared_memory()};
  DecodeBlock<T, N> block;
  block.own = carve(arena, shape, candidates, blockDim.x / 32);
  block.join(shape, d, block.own);
  block.d = d;
  block.candidates = candidates;
  for (int i = threadIdx.x; i < shape.group_batch; i += blockDim.x) block.own.ended[i] = 0;
  shape.matrix().load(block.s.weights, [&](int r) { return block.row(r); });
  block.start();
  __syncthreads();
  const int slices = divide_up(block.sequences, N);
  for (int t = 0; t <= shape.steps; ++t) {
    for (int slice = 0; slice < slices; ++slice) {
      if (t < shape.steps) block.take_input(slice, t);
      if (t > 0) block.take_candidates(slice, t);
      block.take_state(slice, t);
      __syncthreads();
      block.multiply();
      __syncthreads();
      if (t < shape.steps) block.add_product(slice);
      if (t > 0) block.add_candidates();
      __syncthreads();
      block.publish_offers(slice, t);
      __syncthreads();
    }
    for (int slice = 0; slice < slices; ++slice) {
      block.choose(slice, t);
      __syncthreads();
      if (t < shape.steps) block.advance(slice, t);
      __syncthreads();
    }
    if (d.end_id >= 0 && block.all_ended()) return;
  }
}

template <class T, int N>
void run(const Tensor& like, Lstm<T, N> shape, const Decoding<T>& d, int groups, int threads) {
  const int candidates = divide_up(d.V, shape.group_size);
  shape.more_rows = (1 + PARTS<T>)*candidates;
  Arena arena{nullptr};
  carve(arena, shape, candidates, threads / 32);
  launch_cooperative(like, decode<T, N>, groups * shape.group_size, threads, arena.used, shape, d, candidates);
}

// The plan (`groups`, `units`, `columns`, `threads`) is made by fastvae/kernels/persistent.py.
Tensor decode_lstm_persistent(Tensor projected, Tensor projected_cross, Tensor start_cross, Tensor token_embeddings,
                              Tensor row_means, Tensor weight_hh, Tensor norm_weight, Tensor norm_bias,
                              Tensor classifier_weight, Tensor classifier_bias, Tensor cross_weight, Tensor h0,
                              Tensor c0, std::optional<Tensor> maybe_noise, double eps,
                              std::optional<int64_t> end_id, std::optional<int64_t> pad_id,
                              int64_t groups, int64_t units, int64_t columns, int64_t threads) {
  CHECK_DIM(projected, 3, "[T, B, 4H]");
  CHECK_DIM(h0, 2, "[B, H]");
  const int64_t T = projected.size(0), B = projected.size(1), H = h0.size(1), V = classifier_weight.size(0);
  const int64_t parts = projected.scalar_type() == ScalarType::Float ? 1 : 2;
  CHECK_POSITIVE(projected);
  CHECK_SHAPE(projected, T, B, 4 * H);
  check_lstm(projected, weight_hh, norm_weight, norm_bias, h0, c0, B, H);
  check_choice(projected, token_embeddings, classifier_weight, classifier_bias, maybe_noise, 4 * H, H, end_id, pad_id);
  CHECK_SHAPE(cross_weight, parts, V, H);
  CHECK_SHAPE(projected_cross, T, B, V);
  CHECK_SHAPE(start_cross, B);
  CHECK_SHAPE(row_means, V + 1);
  CHECK_LIKE(cross_weight, projected);
  CHECK_WIDE(projected_cross, projected);
  CHECK_WIDE(start_cross, projected);
  CHECK_WIDE(row_means, projected);
  const Split split = check_split(H, B, groups, units, threads);
  Tensor noise = maybe_noise ? *maybe_noise : start_cross;
  make_contiguous(projected, projected_cross, start_cross, token_embeddings, row_means, weight_hh, norm_weight,
                  norm_bias, classifier_weight, classifier_bias, cross_weight, h0, c0, noise);
  Tensor tokens = filled(projected, {B, T}, ScalarType::Long, pad_id.value_or(-1));
  Tensor vectors = emptied(projected, T * B * exchanged(H) * int64_t(projected.element_size()) / 4);
  Tensor moments = emptied(projected, (T + 1) * B * split.group_size * CHOICE_WORDS);
  dispatch<BFloat16, float>(projected.scalar_type(), columns, [&]<class S, int N>() {
    const Decoding<S> d{{in<S>(projected), in<S>(weight_hh), in<S>(norm_weight), in<S>(norm_bias), in<S>(h0), in<S>(c0),
                         words(vectors), words(moments)},
                        in<S>(token_embeddings),
                        in<S>(classifier_weight),
                        in<S>(classifier_bias),
                        in<S>(cross_weight),
                        in<float>(projected_cross),
                        in<float>(start_cross),
                        in<float>(row_means),
                        maybe_noise ? in<float>(noise) : nullptr,
                        out<int64_t>(tokens),
                        int(V),
                        int(end_id.value_or(-1)),
                        int(pad_id.value_or(-1)),
                        float(eps)};
    const Lstm<S, N> shape{int(T), int(B), int(H), split.group_size, int(units), split.group_batch};
    run<S, N>(projected, shape, d, split.groups, threads);
  });
  return tokens;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, DEVICE_KEY, m) {
  m.impl("decode_lstm_persistent", TORCH_BOX(&decode_lstm_persistent));
}
