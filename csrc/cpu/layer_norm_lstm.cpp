// LayerNorm-LSTM on CPU. Equations: fastvae/ops/layer_norm_lstm.py.
#include "../common.h"

// Scratch of both directions: the packed weight, and h (or da) packed, a step's pre-activations (or da), cell state (or
// dc).
template <class T>
struct LayerNormLstm {
  int64_t steps, B, H;
  double eps;
  const T *x, *weight, *gain, *bias, *h0, *c0;
  T *h, *c_n;
  opmath_type<T>* c;  // c, normalized and rstd are kept for backward, or null
  T* normalized;
  opmath_type<T>* rstd;
  void *packed_b, *packed_a;
  opmath_type<T>*a, *state;
};

template <class T>
struct LayerNormLstmBackward {
  int64_t steps, B, H;
  const T *dh, *dc_n, *weight, *gain, *bias, *h0;
  const opmath_type<T>* c0;
  const T* h;
  const opmath_type<T>* c;
  const T* normalized;
  const opmath_type<T>* rstd;
  T *dx, *dweight, *dgain, *dbias, *dh0, *dc0;
  void *packed_b, *packed_a, *scratch;
  opmath_type<T>*da, *dc, *dh_through, *sums, *dweight_opmath;
};

#define KERNELS "layer_norm_lstm-inl.h"
#include "foreach_isa.h"

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_lstm(Tensor x, Tensor weight_hh, Tensor norm_weight,
                                                                   Tensor norm_bias, Tensor h0, Tensor c0, double eps,
                                                                   bool save) {
  CHECK_DIM(x, 3, "[T, B, 4H]");
  CHECK_DIM(h0, 2, "[B, H]");
  const int64_t T = x.size(0), B = x.size(1), H = h0.size(1);
  CHECK_POSITIVE(x);
  CHECK_SHAPE(x, T, B, 4 * H);
  check_lstm(x, weight_hh, norm_weight, norm_bias, h0, c0, B, H);
  make_contiguous(x, weight_hh, norm_weight, norm_bias, h0, c0);

  const auto saved = opmath_dtype(x);
  Tensor h = empty(x, {T, B, H}), c_n = empty(x, {B, H});
  Tensor c = save ? empty(x, {T, B, H}, saved) : empty(x, {0}, saved);
  Tensor normalized = save ? empty(x, {T, B, 4 * H}) : empty(x, {0});
  Tensor rstd = save ? empty(x, {T, B}, saved) : empty(x, {0}, saved);
  DISPATCH(x.scalar_type(), "layer_norm_lstm", [&] {
    using S = opmath_type<scalar_t>;
    Buffer<S> packed_b(packed_length(H) * packed_columns(4 * H)), packed_a(packed_rows(B) * packed_length(H)),
        a(B * 4 * H), state(B * H);
    const LayerNormLstm<scalar_t> args{.steps = T,
                                       .B = B,
                                       .H = H,
                                       .eps = eps,
                                       .x = in<scalar_t>(x),
                                       .weight = in<scalar_t>(weight_hh),
                                       .gain = in<scalar_t>(norm_weight),
                                       .bias = in<scalar_t>(norm_bias),
                                       .h0 = in<scalar_t>(h0),
                                       .c0 = in<scalar_t>(c0),
                                       .h = out<scalar_t>(h),
                                       .c_n = out<scalar_t>(c_n),
                                       .c = save ? out<S>(c) : nullptr,
                                       .normalized = save ? out<scalar_t>(normalized) : nullptr,
                                       .rstd = save ? out<S>(rstd) : nullptr,
                                       .packed_b = packed_b,
                                       .packed_a = packed_a,
                                       .a = a,
                                       .state = state};
    parallel(team_size(4.0 * B * H * H), [&](Team& team) { CALL_BEST(scalar_t, layer_norm_lstm, team, args); });
  });
  return {h, c_n, c, normalized, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_lstm_backward(
    Tensor dh, Tensor dc_n, Tensor weight_hh, Tensor norm_weight, Tensor norm_bias, Tensor h0, Tensor c0, Tensor h,
    Tensor c, Tensor normalized, Tensor rstd) {
  CHECK_DIM(h, 3, "[T, B, H]");
  CHECK_POSITIVE(h);
  const int64_t T = h.size(0), B = h.size(1), H = h.size(2);
  check_lstm(h, weight_hh, norm_weight, norm_bias, h0, c0, B, H);
  CHECK_SHAPE(dh, T, B, H);
  CHECK_SHAPE(dc_n, B, H);
  CHECK_SHAPE(c, T, B, H);
  CHECK_SHAPE(normalized, T, B, 4 * H);
  CHECK_SHAPE(rstd, T, B);
  CHECK_LIKE(dh, h);
  CHECK_LIKE(dc_n, h);
  CHECK_LIKE(normalized, h);
  CHECK_WIDE(c, h);
  CHECK_WIDE(rstd, h);
  make_contiguous(dh, dc_n, weight_hh, norm_weight, norm_bias, h0, c0, h, c, normalized, rstd);

  Tensor dx = empty(h, {T, B, 4 * H}), dweight_hh = empty(h, {4 * H, H}), dnorm_weight = empty(h, {4 * H});
  Tensor dnorm_bias = empty(h, {4 * H}), dh0 = empty(h, {B, H}), dc0 = empty(h, {B, H});
  DISPATCH(h.scalar_type(), "layer_norm_lstm_backward", [&] {
    using S = opmath_type<scalar_t>;
    constexpr bool same = std::is_same_v<S, scalar_t>;
    const int threads = team_size(4.0 * B * H * H);
    Buffer<S> packed_b(packed_length(4 * H) * packed_columns(H)), packed_a(packed_rows(B) * packed_length(4 * H)),
        da(B * 4 * H), dc(B * H);
    Buffer<S> dh_through(B * H), sums(threads * 16 * H), scratch(gemm_scratch(4 * H, H)), c0_opmath(B * H);
    Buffer<S> dweight_opmath(same ? 0 : 4 * H * H);
    std::copy_n(in<scalar_t>(c0), B * H, static_cast<S*>(c0_opmath));
    scalar_t* dweight = out<scalar_t>(dweight_hh);
    const LayerNormLstmBackward<scalar_t> args{.steps = T,
                                               .B = B,
                                               .H = H,
                                               .dh = in<scalar_t>(dh),
                                               .dc_n = in<scalar_t>(dc_n),
                                               .weight = in<scalar_t>(weight_hh),
                                               .gain = in<scalar_t>(norm_weight),
                                               .bias = in<scalar_t>(norm_bias),
                                               .h0 = in<scalar_t>(h0),
                                               .c0 = c0_opmath,
                                               .h = in<scalar_t>(h),
                                               .c = in<S>(c),
                                               .normalized = in<scalar_t>(normalized),
                                               .rstd = in<S>(rstd),
                                               .dx = out<scalar_t>(dx),
                                               .dweight = dweight,
                                               .dgain = out<scalar_t>(dnorm_weight),
                                               .dbias = out<scalar_t>(dnorm_bias),
                                               .dh0 = out<scalar_t>(dh0),
                                               .dc0 = out<scalar_t>(dc0),
                                               .packed_b = packed_b,
                                               .packed_a = packed_a,
                                               .scratch = scratch,
                                               .da = da,
                                               .dc = dc,
                                               .dh_through = dh_through,
                                               .sums = sums,
                                               .dweight_opmath = same ? reinterpret_cast<S*>(dweight) : dweight_opmath};
    parallel(threads, [&](Team& team) { CALL_BEST(scalar_t, layer_norm_lstm_backward, team, args); });
  });
  return {dx, dweight_hh, dnorm_weight, dnorm_bias, dh0, dc0};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("layer_norm_lstm", TORCH_BOX(&layer_norm_lstm));
  m.impl("layer_norm_lstm_backward", TORCH_BOX(&layer_norm_lstm_backward));
}
