// Highway masked convolution on CPU. Equations: fastvae/ops/highway_conv.py.
#include "../common.h"

template <class T>
struct HighwayProject {
  int64_t steps, B, C;
  const T *x, *weight, *bias;
  T* a;
  opmath_type<T>*mean, *m2;
  void *packed_b, *packed_a;
  opmath_type<T>*product, *statistics;
  double* sums;
};

template <class T>
struct HighwayProjectBackward {
  int64_t steps, B, C;
  const T* da;
  const opmath_type<T>*dmean, *dm2;
  const T *x, *weight, *a;
  const opmath_type<T>* mean;
  T *dx, *dweight, *dbias;
  void *packed_b, *packed_a, *rows, *da_panels, *x_tiles;
  opmath_type<T>*product, *kept, *slab_sums, *dw;  // kept [threads, kept_rows, C]
  int64_t kept_rows;
  double* sums;
};

template <class T>
struct HighwayGate {
  int64_t rows, C;
  const T *a, *x;
  const opmath_type<T>*mean, *scale, *shift;
  bool carry;
  T* y;
};

template <class T>
struct HighwayGateBackward {
  int64_t rows, C;
  const T *dy, *a, *x;
  const opmath_type<T>*mean, *scale, *shift;
  bool carry;
  T *da, *dx;
  opmath_type<T>*dmean, *dscale, *dshift, *row_sums;
  double* sums;
};

template <class T>
struct HighwayFolded {
  int64_t steps, B, C;
  const T *x, *weight, *bias;
  bool carry;
  T* y;
  void *packed_b, *packed_a;
  opmath_type<T>* a;
};
constexpr int64_t SLAB = 64;  // rows worked on at a time
constexpr int64_t slabs(int64_t rows) { return (rows + SLAB - 1) / SLAB; }

#define KERNELS "highway_conv-inl.h"
#include "foreach_isa.h"

namespace {

void check_layer(const Tensor& x, const Tensor& weight) {
  CHECK_DIM(x, 3, "[T, B, C]");
  CHECK_POSITIVE(x);
  const int64_t C = x.size(2);
  CHECK_SHAPE(weight, 3 * C, C, 2);
  CHECK_LIKE(weight, x);
}

std::tuple<Tensor, Tensor, Tensor> highway_conv_project(Tensor x, Tensor weight, Tensor bias) {
  check_layer(x, weight);
  const int64_t T = x.size(0), B = x.size(1), C = x.size(2);
  CHECK_SHAPE(bias, 3 * C);
  CHECK_LIKE(bias, x);
  make_contiguous(x, weight, bias);
  Tensor a = empty(x, {T, B, 3 * C}), mean = empty(x, {3 * C}, opmath_dtype(x)),
         m2 = empty(x, {3 * C}, opmath_dtype(x));
  DISPATCH(x.scalar_type(), "highway_conv_project", [&] {
    using S = opmath_type<scalar_t>;
    const int threads = team_size(6.0 * T * B * C * C);
    Buffer<S> packed_b(2 * packed_length(C) * packed_columns(3 * C)), packed_a(threads * SLAB * 2 * packed_length(C)),
        product(threads * SLAB * 48);
    Buffer<S> statistics(slabs(T * B) * 9 * C);
    Buffer<double> sums(6 * C);
    const HighwayProject<scalar_t> args{.steps = T,
                                        .B = B,
                                        .C = C,
                                        .x = in<scalar_t>(x),
                                        .weight = in<scalar_t>(weight),
                                        .bias = in<scalar_t>(bias),
                                        .a = out<scalar_t>(a),
                                        .mean = out<S>(mean),
                                        .m2 = out<S>(m2),
                                        .packed_b = packed_b,
                                        .packed_a = packed_a,
                                        .product = product,
                                        .statistics = statistics,
                                        .sums = sums};
    parallel(threads, [&](Team& team) { CALL_BEST(scalar_t, highway_conv_project, team, args); });
  });
  return {a, mean, m2};
}

std::tuple<Tensor, Tensor, Tensor> highway_conv_project_backward(Tensor da, Tensor dmean, Tensor dm2, Tensor x,
                                                                 Tensor weight, Tensor a, Tensor mean) {
  check_layer(x, weight);
  const int64_t T = x.size(0), B = x.size(1), C = x.size(2);
  CHECK_SHAPE(da, T, B, 3 * C);
  CHECK_SHAPE(a, T, B, 3 * C);
  CHECK_SHAPE(mean, 3 * C);
  CHECK_SHAPE(dmean, 3 * C);
  CHECK_SHAPE(dm2, 3 * C);
  CHECK_LIKE(da, x);
  CHECK_LIKE(a, x);
  CHECK_WIDE(mean, x);
  CHECK_WIDE(dmean, x);
  CHECK_WIDE(dm2, x);
  make_contiguous(da, dmean, dm2, x, weight, a, mean);
  Tensor dx = empty(x, {T, B, C}), dweight = empty(x, {3 * C, C, 2}), dbias = empty(x, {3 * C});
  DISPATCH(x.scalar_type(), "highway_conv_project_backward", [&] {
    using S = opmath_type<scalar_t>;
    const int threads = team_size(6.0 * T * B * C * C);
    Buffer<S> packed_b(2 * packed_length(3 * C) * packed_columns(C)), packed_a(threads * SLAB * packed_length(3 * C)),
        rows(threads * 32 * 3 * C);
    Buffer<S> da_panels((T * B + 32) * packed_columns(3 * C)), x_tiles((T * B + 32) * packed_rows(C));
    const int64_t kept_rows = SLAB + SLAB * std::min(slabs(B + 1), slabs(T * (B + 1) + 64) / threads + 1);
    Buffer<S> product(threads * SLAB * 48), kept(threads * kept_rows * C), slab_sums(threads * 3 * C), dw(6 * C * C);
    Buffer<double> sums(threads * 3 * C);
    const HighwayProjectBackward<scalar_t> args{.steps = T,
                                                .B = B,
                                                .C = C,
                                                .da = in<scalar_t>(da),
                                                .dmean = in<S>(dmean),
                                                .dm2 = in<S>(dm2),
                                                .x = in<scalar_t>(x),
                                                .weight = in<scalar_t>(weight),
                                                .a = in<scalar_t>(a),
                                                .mean = in<S>(mean),
                                                .dx = out<scalar_t>(dx),
                                                .dweight = out<scalar_t>(dweight),
                                                .dbias = out<scalar_t>(dbias),
                                                .packed_b = packed_b,
                                                .packed_a = packed_a,
                                                .rows = rows,
                                                .da_panels = da_panels,
                                                .x_tiles = x_tiles,
                                                .product = product,
                                                .kept = kept,
                                                .slab_sums = slab_sums,
                                                .dw = dw,
                                                .kept_rows = kept_rows,
                                                .sums = sums};
    parallel(threads, [&](Team& team) { CALL_BEST(scalar_t, highway_conv_project_backward, team, args); });
  });
  return {dx, dweight, dbias};
}

void check_gate(const Tensor& a, const Tensor& x, const Tensor& mean, const Tensor& scale, const Tensor& shift) {
  CHECK_DIM(x, 3, "[T, B, C]");
  CHECK_POSITIVE(x);
  const int64_t T = x.size(0), B = x.size(1), C = x.size(2);
  CHECK_SHAPE(a, T, B, 3 * C);
  CHECK_SHAPE(mean, 3 * C);
  CHECK_SHAPE(scale, 3 * C);
  CHECK_SHAPE(shift, 3 * C);
  CHECK_LIKE(a, x);
  CHECK_WIDE(mean, x);
  CHECK_WIDE(scale, x);
  CHECK_WIDE(shift, x);
}

Tensor highway_conv_gate(Tensor a, Tensor x, Tensor mean, Tensor scale, Tensor shift, bool carry) {
  check_gate(a, x, mean, scale, shift);
  make_contiguous(a, x, mean, scale, shift);
  const int64_t T = x.size(0), B = x.size(1), C = x.size(2);
  Tensor y = empty(x, {T, B, C});
  DISPATCH(x.scalar_type(), "highway_conv_gate", [&] {
    using S = opmath_type<scalar_t>;
    const HighwayGate<scalar_t> args{.rows = T * B,
                                     .C = C,
                                     .a = in<scalar_t>(a),
                                     .x = in<scalar_t>(x),
                                     .mean = in<S>(mean),
                                     .scale = in<S>(scale),
                                     .shift = in<S>(shift),
                                     .carry = carry,
                                     .y = out<scalar_t>(y)};
    parallel(team_size(8.0 * T * B * C), [&](Team& team) { CALL_BEST(scalar_t, highway_conv_gate, team, args); });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> highway_conv_gate_backward(Tensor dy, Tensor a, Tensor x,
                                                                              Tensor mean, Tensor scale, Tensor shift,
                                                                              bool carry) {
  check_gate(a, x, mean, scale, shift);
  const int64_t T = x.size(0), B = x.size(1), C = x.size(2);
  CHECK_SHAPE(dy, T, B, C);
  CHECK_LIKE(dy, x);
  make_contiguous(dy, a, x, mean, scale, shift);
  Tensor da = empty(x, {T, B, 3 * C}), dx = empty(x, {T, B, C});
  Tensor dmean = empty(mean, {3 * C}), dscale = empty(mean, {3 * C}), dshift = empty(mean, {3 * C});
  DISPATCH(x.scalar_type(), "highway_conv_gate_backward", [&] {
    using S = opmath_type<scalar_t>;
    const int threads = team_size(8.0 * T * B * C);
    Buffer<S> row_sums(threads * 6 * C);
    Buffer<double> sums(threads * 6 * C);
    const HighwayGateBackward<scalar_t> args{.rows = T * B,
                                             .C = C,
                                             .dy = in<scalar_t>(dy),
                                             .a = in<scalar_t>(a),
                                             .x = in<scalar_t>(x),
                                             .mean = in<S>(mean),
                                             .scale = in<S>(scale),
                                             .shift = in<S>(shift),
                                             .carry = carry,
                                             .da = out<scalar_t>(da),
                                             .dx = out<scalar_t>(dx),
                                             .dmean = out<S>(dmean),
                                             .dscale = out<S>(dscale),
                                             .dshift = out<S>(dshift),
                                             .row_sums = row_sums,
                                             .sums = sums};
    parallel(threads, [&](Team& team) { CALL_BEST(scalar_t, highway_conv_gate_backward, team, args); });
  });
  return {da, dx, dmean, dscale, dshift};
}

Tensor highway_conv(Tensor x, Tensor weight, Tensor bias, bool carry) {
  check_layer(x, weight);
  const int64_t T = x.size(0), B = x.size(1), C = x.size(2);
  CHECK_SHAPE(bias, 3 * C);
  CHECK_LIKE(bias, x);
  make_contiguous(x, weight, bias);
  Tensor y = empty(x, {T, B, C});
  DISPATCH(x.scalar_type(), "highway_conv", [&] {
    using S = opmath_type<scalar_t>;
    const int threads = team_size(6.0 * T * B * C * C);
    Buffer<S> packed_b(2 * packed_length(C) * packed_columns(3 * C)), packed_a(threads * SLAB * 2 * packed_length(C)),
        a(threads * SLAB * 3 * C);
    const HighwayFolded<scalar_t> args{.steps = T,
                                       .B = B,
                                       .C = C,
                                       .x = in<scalar_t>(x),
                                       .weight = in<scalar_t>(weight),
                                       .bias = in<scalar_t>(bias),
                                       .carry = carry,
                                       .y = out<scalar_t>(y),
                                       .packed_b = packed_b,
                                       .packed_a = packed_a,
                                       .a = a};
    parallel(threads, [&](Team& team) { CALL_BEST(scalar_t, highway_conv, team, args); });
  });
  return y;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("highway_conv_project", TORCH_BOX(&highway_conv_project));
  m.impl("highway_conv_project_backward", TORCH_BOX(&highway_conv_project_backward));
  m.impl("highway_conv_gate", TORCH_BOX(&highway_conv_gate));
  m.impl("highway_conv_gate_backward", TORCH_BOX(&highway_conv_gate_backward));
  m.impl("highway_conv", TORCH_BOX(&highway_conv));
}
