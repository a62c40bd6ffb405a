// LayerNorm-LSTM over a sequence in one launch, forward. Equations: fastvae/ops/layer_norm_lstm.py.
#include "launch.cuh"

namespace {
constexpr int MOMENTS = 2;  // words: mean, Σ squares

template <class T>
struct Saving : LstmTensors<T> {
  T *h, *c_n, *normalized;  // [T, B, H], [B, H]; normalized [T, B, 4H] or null
  float *c, *rstd;          // [T, B, H], [T, B], or null
  float eps;
};

template <class T, int N>
struct ForwardBlock : LstmBlock<T, N> {
  using Base = LstmBlock<T, N>;
  using Base::first, Base::in_slice, Base::rank, Base::shape;
  Saving<T> d;

  DEVICE int64_t place(int t, int slice, int n) const { return t * int64_t(shape.B) + first + slice * N + n; }
  DEVICE uint32_t* moment_words(int t, int slice, int n, int m) const {
    return d.moments + (place(t, slice, n) * shape.group_size + m) * MOMENTS;
  }

  // A warp for each sequence.
  DEVICE void publish_moments(int slice, int t) const {
    for (int n = threadIdx.x / 32; n < in_slice(slice); n += blockDim.x / 32) {
      float mean, m2;
      this->moments(slice, n, mean, m2);
      const int lane = threadIdx.x % 32;
      if (lane < MOMENTS) publish(moment_words(t, slice, n, rank) + lane, lane ? m2 : mean);
    }
  }
  DEVICE void find_norm(int slice, int t) const {
    for (int n = threadIdx.x / 32; n < in_slice(slice); n += blockDim.x / 32) {
      float mean, m2;
      this->template all_moments<MOMENTS>([&](int m) { return moment_words(t, slice, n, m); },
                                          [](int, const uint32_t (&)[MOMENTS]) {}, mean, m2);
      if (threadIdx.x % 32) continue;
      this->s.mean[n] = mean;
      this->s.rstd[n] = 1 / sqrtf(m2 / (4 * shape.H) + d.eps);
      if (d.rstd && rank == 0) d.rstd[place(t, slice, n)] = this->s.rstd[n];
    }
  }

  DEVICE void advance(int slice, int t) const {
    const int H = shape.H;
    this->update(
        slice, t, [&](int r, int n, int) { return this->u(slice)[r * N + n]; },
        [&](int n, int k, const float (&normalized)[4], float c, float h) {
          const int64_t at = place(t, slice, n);
          d.h[at * H + k] = T(h);
          if (t == shape.steps - 1) d.c_n[(first + slice * N + n) * int64_t(H) + k] = T(c);
          if (!d.c) return;
          d.c[at * H + k] = c;
          for (int gate = 0; gate < 4; ++gate) d.normalized[(at * 4 + gate) * H + k] = T(normalized[gate]);
        });
  }
};

template <class T, int N>
KERNEL(THREADS)
forward(Lstm<T, N> shape, Saving<T> d) {
  Arena arena{shared_memory()};
  ForwardBlock<T, N> block;
  block.join(shape, d, shape.shared(arena, blockDim.x / 32));
  block.d = d;
  shape.matrix().load(block.s.weights, [&](int r) { return block.row(r); });
  block.start();
  __syncthreads();
  const int slices = divide_up(block.sequences, N);
  for (int t = 0; t < shape.steps; ++t) {
    for (int slice = 0; slice < slices; ++slice) {
      block.take_input(slice, t);
      block.take_state(slice, t);
      __syncthreads();
      block.multiply();
      __syncthreads();
      block.add_product(slice);
      __syncthreads();
      block.publish_moments(slice, t);
    }
    for (int slice = 0; slice < slices; ++slice) {
      block.find_norm(slice, t);
      __syncthreads();
      block.advance(slice, t);
      __syncthreads();
    }
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
  Tensor vectors = emptied(x, T * B * exchanged(H) * int64_t(x.element_size()) / 4);
  Tensor moments = emptied(x, T * B * split.group_size * MOMENTS);
  dispatch<BFloat16, Half>(x.scalar_type(), columns, [&]<class S, int N>() {
    const Saving<S> d{{in<S>(x), in<S>(weight_hh), in<S>(norm_weight), in<S>(norm_bias), in<S>(h0), in<S>(c0),
                       words(vectors), words(moments)},
                      out<S>(h),
                      out<S>(c_n),
                      save ? out<S>(normalized) : nullptr,
                      save ? out<float>(c) : nullptr,
                      save ? out<float>(rstd) : nullptr,
                      float(eps)};
    const Lstm<S, N> shape{int(T), int(B), int(H), split.group_size, int(units), split.group_batch};
    Arena arena{nullptr};
    shape.shared(arena, threads / 32);
    launch_cooperative(x, forward<S, N>, split.groups * split.group_size, threads, arena.used, shape, d);
  });
  if (save) return {h, c_n, c, normalized, rstd};
  const auto none = [&](ScalarType dtype) { return empty(x, {0}, dtype); };
  return {h, c_n, none(opmath_dtype(x)), none(x.scalar_type()), none(opmath_dtype(x))};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, DEVICE_KEY, m) {
  m.impl("layer_norm_lstm_persistent", TORCH_BOX(&layer_norm_lstm_persistent));
}
