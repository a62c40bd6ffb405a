// Decoding with a LayerNorm-LSTM in one launch. Equations: fastvae/ops/decode_lstm.py.
//
// Choosing token y of step t − 1 and the norm of step t need one exchange together: with a = u + E_y, u = x_t + W h,
//   mean(a) = mean(u) + mean(E_y),   Σ (a − mean)² = Σ (u − mean)² + 2 u·Ẽ_y + |Ẽ_y|²,   Ẽ_y = E_y − mean(E_y),
// and u·Ẽ_y = x_t·Ẽ_y + (Ẽ W h)_y is a product with h like a logit. So every block publishes, with its best
// token, that token's part of the squares ("cross"), and a step passes two exchanges: these choices, and h.
#include "launch.cuh"
#include "argmax.cuh"

namespace {
constexpr int OFFER = 8;   // words: mean, Σ squares, logit, token, cross, and three unused: a sector of memory
constexpr int MOST_COLUMNS = 16;  // there are not registers for the sums of more
constexpr int RESULT = 4;  // mean, 1 / standard deviation, token, and one unused

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
  float *logit, *cross, *given;  // [candidates, N]; [slices, 2, candidates, N]: noise and what features give to crosses
  float *bias, *row_means;       // [candidates], [V + 1]
  int *token, *ended;            // [sequences]
};

template <class T, int N>
HOST_DEVICE DecodeShared<T, N> carve(Arena& arena, const Lstm<T, N>& shape, int candidates, int V, int warps) {
  const int sequences = shape.slices() * N;
  DecodeShared<T, N> s;
  static_cast<typename Lstm<T, N>::Shared&>(s) = shape.shared(arena, warps);
  s.logit = arena.take<float>(candidates * N);
  s.cross = arena.take<float>(candidates * N);
  s.given = arena.take<float>(2 * candidates * sequences);
  s.bias = arena.take<float>(candidates);
  s.row_means = arena.take<float>(V + 1);
  s.token = arena.take<int>(sequences);
  s.ended = arena.take<int>(sequences);
  return s;
}

template <class T, int N>
struct DecodeBlock : LstmBlock<T, N> {
  using Base = LstmBlock<T, N>;
  using Base::cell, Base::in_slice, Base::place, Base::rank, Base::sequences, Base::shape, Base::slices;
  Decoding<T> d;
  DecodeShared<T, N> own;
  int candidates;  // of each block, at most
  Owners<OFFER, RESULT> owners;

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

  DEVICE void start() const {
    for (int i = threadIdx.x; i < shape.slices() * N; i += blockDim.x) own.ended[i] = 0;
    for (int i = threadIdx.x; i < vocabulary().count(rank); i += blockDim.x)
      own.bias[i] = float(d.classifier_bias[vocabulary().first(rank) + i]);
    for (int i = threadIdx.x; i <= d.V; i += blockDim.x) own.row_means[i] = d.row_means[i];
    Base::start();
  }

  DEVICE float* given(int n, int v) const { return own.given + (n / N * 2 * candidates + v) * N + n % N; }
  // What logits (of step t − 1) and crosses (of step t) are without h begins to come.
  DEVICE void fetch_candidates(int t) const {
    const int count = vocabulary().count(rank), from = vocabulary().first(rank);
    for (int i = threadIdx.x; i < sequences * count; i += blockDim.x) {
      const int n = i / count, v = i % count;
      if (d.noise) copy_async<4>(given(n, v), d.noise + place(t - 1, n) * d.V + from + v);
      if (t < shape.steps) copy_async<4>(given(n, candidates + v), d.projected_cross + place(t, n) * d.V + from + v);
    }
  }
  DEVICE void add_candidates(int slice, int t) const {
    const auto product = shape.product();
    for (int i = threadIdx.x; i < vocabulary().count(rank) * N; i += blockDim.x) {
      const int v = i / N, at = i % N, n = slice * N + at, r = 4 * shape.units + v;
      own.logit[i] = own.bias[v] + (d.noise ? *given(n, v) : 0) + product.sum(this->s.partial, r, at);
      if (t == shape.steps) continue;
      float cross = *given(n, candidates + v);
      for (int part = 1; part <= PARTS<T>; ++part) cross += product.sum(this->s.partial, r + part * candidates, at);
      own.cross[i] = cross;
    }
  }

  // The block's moments and its best candidate: a thread for each sequence.
  DEVICE void publish_offers(int slice, int t) const {
    const int n = threadIdx.x;
    if (n >= in_slice(slice)) return;
    Moments m{0, 0, 0};
    if (t < shape.steps) m = this->moments(n);
    Choice best = Choice::none();
    if (t > 0)
      for (int v = 0; v < vocabulary().count(rank); ++v)
        best.better({own.logit[v * N + n], vocabulary().first(rank) + v, t < shape.steps ? own.cross[v * N + n] : 0});
    const uint32_t words[OFFER] = {__float_as_uint(m.mean), __float_as_uint(m.squares), __float_as_uint(best.logit),
                                   uint32_t(best.token), __float_as_uint(best.cross)};
    publish(owners.offer(t, slice * N + n, rank), words);
  }

  // The token of step t − 1, and the norm of step t.
  DEVICE void choose(int t) const {
    owners.agree(
        t,
        [&](int n, uint32_t (&words)[RESULT]) {
          float mean, squares;
          Choice best = Choice::none();
          this->template all_moments<OFFER>(
              [&](int m) { return owners.offer(t, n, m); },
              [&](const uint32_t (&offer)[OFFER]) {
                best.better({__uint_as_float(offer[2]), int(offer[3]), __uint_as_float(offer[4])});
              },
              mean, squares);
          best.over_warp();
          if (t == 0) best = {0, d.V, d.start_cross[place(0, n)]};
          squares += best.cross;
          words[0] = __float_as_uint(mean + own.row_means[best.token]);
          words[1] = __float_as_uint(reciprocal_std((squares < 0 ? 0 : squares) / (4 * shape.H), d.eps));
          words[2] = best.token;
          words[3] = 0;
        },
        [&](int n, const uint32_t (&words)[RESULT]) {
          this->s.mean[n] = __uint_as_float(words[0]);
          this->s.rstd[n] = __uint_as_float(words[1]);
          const int token = int(words[2]);
          own.token[n] = token;
          if (t == 0) return;
          int& ended = own.ended[n];
          if (owners.owns(n)) d.tokens[place(0, n) * shape.steps + t - 1] = ended ? d.pad_id : token;
          ended |= token == d.end_id;
        });
  }

  // u += the chosen tokens' embeddings, whose loads are on their way before the first is waited for.
  DEVICE void add_embeddings() const {
    constexpr int AT_ONCE = 4;
    const int quads = divide_up(this->mine(), 4), count = sequences * 4 * quads;
    const auto from = [&](int i) {
      const int64_t row = int64_t(own.token[i / quads / 4]) * 4 + i / quads % 4;
      return d.token_embeddings + row * shape.H + cell(i % quads * 4);
    };
    for (int first = threadIdx.x; first < count; first += AT_ONCE * blockDim.x) {
      float x[AT_ONCE][4];
#pragma unroll
      for (int r = 0; r < AT_ONCE; ++r)
        if (const int i = first + r * blockDim.x; i < count) {
          if (d.wide)
            read_four(from(i), x[r]);
          else
            for (int j = 0; j < 4; ++j) x[r][j] = i % quads * 4 + j < this->mine() ? float(from(i)[j]) : 0;
        }
#pragma unroll
      for (int r = 0; r < AT_ONCE; ++r)
        if (const int i = first + r * blockDim.x; i < count)
          for (int j = 0; j < 4; ++j) this->u(i / quads % 4, i % quads * 4 + j, i / quads / 4) += x[r][j];
    }
  }

  DEVICE bool all_ended() const {
    bool so = true;
    for (int i = threadIdx.x; i < sequences; i += blockDim.x) so &= own.ended[i] != 0;
    return all_threads(so);
  }
};

template <class T, int N>
KERNEL(THREADS)
decode(Lstm<T, N> shape, Decoding<T> d, uint32_t* offers, uint32_t* results, int candidates) {
  Arena arena{shared_memory()};
  DecodeBlock<T, N> block;
  block.own = carve(arena, shape, candidates, d.V, blockDim.x / 32);
  block.join(shape, d, block.own);
  block.d = d;
  block.candidates = candidates;
  block.owners = {offers, results, shape.B, shape.group_size, block.rank, block.first, block.sequences};
  shape.product().load(block.s.weights, block.s.columns, [&](int r) { return block.row(r); }, d.wide);
  block.start();
  const int slices = block.slices();
  for (int t = 0; t <= shape.steps; ++t) {
    block.renew(t, block.owners);
    for (int slice = 0; slice < slices; ++slice) {
      block.multiply(slice, t);
      copies_done();
      __syncthreads();
      if (t < shape.steps) block.add_product(slice);
      if (t > 0) block.add_candidates(slice, t);
      __syncthreads();
      block.publish_offers(slice, t);
    }
    if (t + 1 < shape.steps)
      for (int slice = 0; slice < slices; ++slice) block.fetch_input(slice, t + 1);
    if (t < shape.steps) block.fetch_candidates(t + 1);
    block.choose(t);
    if (t < shape.steps) {
      block.add_embeddings();
      __syncthreads();
      for (int slice = 0; slice < slices; ++slice) {
        block.template update<false>(slice);
        __syncthreads();
        block.publish_state(slice, t + 1);
      }
    }
    if (d.end_id >= 0 && block.all_ended()) return;
  }
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
  const int64_t ring = std::min<int64_t>(T + 1, RING), offers = ring * B * split.group_size * OFFER;
  const int64_t vectors = vector_words(ring * B, H, projected);
  Tensor buffers = emptied(projected, vectors + offers + ring * B * RESULT);
  uint32_t* const exchange = words(buffers);
  dispatch<BFloat16, float>(projected.scalar_type(), columns, [&]<class S, int N>() {
    if constexpr (N > MOST_COLUMNS) {
      CHECK(false, "columns must be at most " + std::to_string(MOST_COLUMNS) + " to decode, got " + std::to_string(N));
    } else {
      const Decoding<S> d{{in<S>(projected), in<S>(weight_hh), in<S>(norm_weight), in<S>(norm_bias), in<S>(h0), in<S>(c0),
                           exchange, aligned<S>(H, projected, token_embeddings, weight_hh, classifier_weight, cross_weight)},
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
      const int candidates = divide_up(int(V), split.group_size);
      const Lstm<S, N> shape{int(T), int(B), int(H), split.group_size, int(units), split.group_batch,
                             (1 + PARTS<S>)*candidates};
      Arena arena{nullptr};
      carve(arena, shape, candidates, int(V), threads / 32);
      launch_cooperative(projected, decode<S, N>, split.groups * split.group_size, threads, arena.used, shape, d,
                         exchange + vectors, exchange + vectors + offers, candidates);
    }
  });
  return tokens;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, DEVICE_KEY, m) {
  m.impl("decode_lstm_persistent", TORCH_BOX(&decode_lstm_persistent));
}
