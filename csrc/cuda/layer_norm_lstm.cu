// LayerNorm-LSTM over a sequence in one launch, forward. Equations: fastvae/ops/layer_norm_lstm.py.
#include "launch.cuh"

namespace {
constexpr int MOMENTS = 2;  // words: mean, Σ squares; of all blocks: mean, 1 / standard deviation

template <class T>
struct Saving : LstmTensors<T> {
  T *h, *c_n, *normalized;  // [T, B, H], [B, H]; normalized [T, B, 4H] or null
  float *c, *rstd;          // [T, B, H], [T, B], or null
  float eps;
};

template <class T, int N>
struct ForwardBlock : LstmBlock<T, N> {
  using Base = LstmBlock<T, N>;
  using Base::cell, Base::in_slice, Base::mine, Base::place, Base::shape;
  Saving<T> d;
  Owners<MOMENTS, MOMENTS> owners;

  DEVICE void publish_moments(int slice, int t) const {
    const int n = threadIdx.x;
    if (n >= in_slice(slice)) return;
    const Moments m = this->moments(n);
    const uint32_t words[MOMENTS] = {__float_as_uint(m.mean), __float_as_uint(m.squares)};
    publish(owners.offer(t, slice * N + n, this->rank), words);
  }
  DEVICE void find_norm(int t) const {
    owners.agree(
        t,
        [&](int n, uint32_t (&words)[MOMENTS]) {
          float mean, squares;
          this->template all_moments<MOMENTS>([&](int m) { return owners.offer(t, n, m); },
                                              [](const uint32_t (&)[MOMENTS]) {}, mean, squares);
          words[0] = __float_as_uint(mean);
          words[1] = __float_as_uint(reciprocal_std(squares / (4 * shape.H), d.eps));
        },
        [&](int n, const uint32_t (&words)[MOMENTS]) {
          this->s.mean[n] = __uint_as_float(words[0]);
          this->s.rstd[n] = __uint_as_float(words[1]);
          if (d.rstd && owners.owns(n)) d.rstd[place(t, n)] = this->s.rstd[n];
        });
  }

  // What the step leaves, after its h has been published.
  DEVICE void save(int t) const {
    const int H = shape.H, sequences = this->sequences;
    const auto real = [&](int quad) { return least(4, mine() - 4 * quad); };
    this->each_four(0, sequences, 1, [&](int n, int, int quad) {
      float h[4], c[4];
      for (int j = 0; j < 4; ++j) c[j] = this->c(4 * quad + j, n);
      read_four(reinterpret_cast<const T*>(this->s.stage + n * shape.stage_words()) + 4 * quad, h);
      write_four(d.h + place(t, n) * H + cell(4 * quad), h, real(quad), H % 4 == 0);
      if (d.c) write_four(d.c + place(t, n) * H + cell(4 * quad), c, real(quad), H % 4 == 0);
      if (t == shape.steps - 1) write_four(d.c_n + place(0, n) * H + cell(4 * quad), c, real(quad), H % 4 == 0);
    });
    if (!d.c) return;
    this->each_four(0, sequences, 4, [&](int n, int gate, int quad) {
      float v[4];
      for (int j = 0; j < 4; ++j) v[j] = this->u(gate, 4 * quad + j, n);
      write_four(d.normalized + (place(t, n) * 4 + gate) * H + cell(4 * quad), v, real(quad), H % 4 == 0);
    });
  }
};

template <class T, int N>
KERNEL(THREADS)
forward(Lstm<T, N> shape, Saving<T> d, uint32_t* offers, uint32_t* results) {
  Arena arena{shared_memory()};
  ForwardBlock<T, N> block;
  block.join(shape, d, shape.shared(arena, blockDim.x / 32));
  block.d = d;
  block.owners = {offers, results, shape.B, shape.group_size, block.rank, block.first, block.sequences};
  shape.product().load(block.s.weights, block.s.columns, [&](int r) { return block.row(r); }, d.wide);
  block.start();
  const int slices = block.slices();
  for (int t = 0; t < shape.steps; ++t) {
    block.renew(t, block.owners);
    for (int slice = 0; slice < slices; ++slice) {
      block.multiply(slice, t);
      copies_done();
      __syncthreads();
      block.add_product(slice);
      __syncthreads();
      block.publish_moments(slice, t);
    }
    if (t + 1 < shape.steps)
      for (int slice = 0; slice < slices; ++slice) block.fetch_input(slice, t + 1);
    block.find_norm(t);
    for (int slice = 0; slice < slices; ++slice) {
      if (d.c)
        block.template update<true>(slice);
      else
        block.template update<false>(slice);
      __syncthreads();
      if (t + 1 < shape.steps) block.publish_state(slice, t + 1);
    }
    block.save(t);
  }
}

// The plan (`groups`, `units`, `columns`, `threads`) is made by fastvae/kernels/persistent.py.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_lstm_persistent(Tensor x, Tensor weight_hh,
                                                                              Tensor norm_weight, Tensor norm_bias,
                                                                              Tensor h0, Tensor c0, double eps,
                                                                              bool save, int64_t groups, int64_t units,
                                                                              int64_t columns, int64_t threads) {
  CHECK_DIM(x, 3, "[T, B, 4H]");
  CHECK_DIM(h0, 2, "[B, H]");
  const int64_t T = x.size(0), B = x.size(1), H = h0.size(1);
  CHECK_POSITIVE(x);
  CHECK_SHAPE(x, T, B, 4 * H);
  check_lstm(x, weight_hh, norm_weight, norm_bias, h0, c0, B, H);
  const Split split = check_split(H, B, groups, units, threads);
  make_contiguous(x, weight_hh, norm_weight, norm_bias, h0, c0);
  const int64_t kept = save ? T : 0;
  Tensor h = empty(x, {T, B, H}), c_n = empty(x, {B, H}), c = empty(x, {kept, B, H}, opmath_dtype(x));
  Tensor normalized = empty(x, {kept, B, 4 * H}), rstd = empty(x, {kept, B}, opmath_dtype(x));
  const int64_t ring = std::min<int64_t>(T, RING), vectors = vector_words(ring * B, H, x);
  const int64_t offers = ring * B * split.group_size * MOMENTS;
  Tensor buffers = emptied(x, vectors + offers + ring * B * MOMENTS);
  uint32_t* const exchange = words(buffers);
  dispatch<BFloat16, Half>(x.scalar_type(), columns, [&]<class S, int N>() {
    const Saving<S> d{{in<S>(x), in<S>(weight_hh), in<S>(norm_weight), in<S>(norm_bias), in<S>(h0), in<S>(c0),
                       exchange, aligned<S>(H, x, weight_hh)},
                      out<S>(h),
                      out<S>(c_n),
                      save ? out<S>(normalized) : nullptr,
                      save ? out<float>(c) : nullptr,
                      save ? out<float>(rstd) : nullptr,
                      float(eps)};
    const Lstm<S, N> shape{int(T), int(B), int(H), split.group_size, int(units), split.group_batch};
    Arena arena{nullptr};
    shape.shared(arena, threads / 32);
    launch_cooperative(x, forward<S, N>, split.groups * split.group_size, threads, arena.used, shape, d,
                       exchange + vectors, exchange + vectors + offers);
  });
  if (save) return {h, c_n, c, normalized, rstd};
  const auto none = [&](ScalarType dtype) { return empty(x, {0}, dtype); };
  return {h, c_n, none(opmath_dtype(x)), none(x.scalar_type()), none(opmath_dtype(x))};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, DEVICE_KEY, m) {
  m.impl("layer_norm_lstm_persistent", TORCH_BOX(&layer_norm_lstm_persistent));
}
