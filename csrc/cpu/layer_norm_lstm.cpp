// LayerNorm-LSTM on CPU. Equations: fastvae/ops/layer_norm_lstm.py.
#include <algorithm>
#include <numeric>
#include <vector>

#include "../common.h"

// Where the rows of each step are. Sequences are taken longest first, so those of step t are the first count[t]; i =
// first[t] + n counts the rows of all steps. x [T, B, ·] has rows for pads too, x [N, ·] has none.
struct LstmRows {
  int64_t steps, B, total, num_pads;
  const int64_t* order;   // [B]: a sequence's place in the batch
  const int64_t* count;   // [steps + 1], the last is 0
  const int64_t* first;   // [steps]
  const int64_t* now;     // [total]: the row in x and what is like it
  const int64_t* before;  // [total]: that of the step before in h and c, at first the sequence's in h0 and c0
  const int64_t* pads;    // [num_pads]: rows of x
};

// Scratch of both directions: the packed weight, and h (or da) packed, a step's pre-activations (or da), cell state (or
// dc).
template <class T>
struct LayerNormLstm {
  LstmRows rows;
  int64_t H;
  double eps;
  const T *x, *weight, *h0, *c0;
  const opmath_type<T>*gain, *bias;
  T *h, *c_n;
  opmath_type<T>* c;  // c, normalized and rstd are kept for backward, or null
  T* normalized;
  opmath_type<T>* rstd;
  void *packed_b, *packed_a;
  opmath_type<T>*a, *state;
};

template <class T>
struct LayerNormLstmBackward {
  LstmRows rows;
  int64_t H;
  const T *dh, *dc_n, *weight, *h0;
  const opmath_type<T>*gain, *bias, *c0;
  const T* h;
  const opmath_type<T>* c;
  const T* normalized;
  const opmath_type<T>* rstd;
  T *dx, *dweight, *dgain, *dbias, *dh0, *dc0;
  void *packed_b, *packed_a, *scratch;
  opmath_type<T>*da, *dc, *dh_through, *sums, *dweight_opmath;
  T *h_before, *dx_real;  // null where every sequence has every step; dx_real may be dx
};

#define KERNELS "layer_norm_lstm-inl.h"
#include "foreach_isa.h"

namespace {

// LstmRows and what it points to, for x [T, B, ·] or, with lengths, [N, ·].
struct Rows {
  std::vector<int64_t> order, count, first, now, before, pads;
  LstmRows view;

  Rows(const Tensor& x, int64_t B, const std::optional<Tensor>& lengths) : order(B) {
    const bool packed = x.dim() == 2;
    const int64_t most = x.size(0);
    check_memory(times({packed ? most : times({most, B}), 3}), sizeof(int64_t));
    std::vector<int64_t> length(B, most);
    if (lengths) read(*lengths, packed, most, length);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length[a] > length[b]; });
    const int64_t steps = packed ? length[order[0]] : most;
    for (int64_t t = 0, live = B; t <= steps; ++t) {
      while (live > 0 && length[order[live - 1]] <= t) --live;
      count.push_back(live);
    }
    for (int64_t t = 0; t < steps; ++t) {
      first.push_back(now.size());
      for (int64_t n = 0; n < B && (!packed || n < count[t]); ++n) {
        const int64_t row = packed ? now.size() : t * B + order[n];
        if (n >= count[t]) {
          pads.push_back(row);
          continue;
        }
        before.push_back(t ? now[first[t - 1] + n] : order[n]);
        now.push_back(row);
      }
    }
    view = {.steps = steps,
            .B = B,
            .total = int64_t(now.size()),
            .num_pads = int64_t(pads.size()),
            .order = order.data(),
            .count = count.data(),
            .first = first.data(),
            .now = now.data(),
            .before = before.data(),
            .pads = pads.data()};
  }

 private:
  static void read(Tensor lengths, bool packed, int64_t most, std::vector<int64_t>& length) {
    const int64_t B = length.size();
    CHECK_SHAPE(lengths, B);
    CHECK(lengths.scalar_type() == ScalarType::Long, "lengths must have dtype int64, got " + name_of(lengths));
    CHECK(lengths.is_cpu(), "lengths must be on the device of x");
    make_contiguous(lengths);
    std::copy_n(in<int64_t>(lengths), B, length.begin());
    int64_t total = 0;
    for (const int64_t n : length) {
      CHECK(n >= 0 && n <= most, "lengths must be from 0 to " + std::to_string(most) + ", got " + std::to_string(n));
      if (packed) total = std::min(total + n, most + 1);
    }
    if (!packed) return;
    CHECK(std::is_sorted(length.rbegin(), length.rend()), "lengths must not increase where x is packed, [N, ·]");
    CHECK(total == most, "lengths must add up to the rows of x, " + std::to_string(most));
  }
};

// With lengths x may be [N, ·]: without pads, as in PackedSequence.data.
bool is_packed(const Tensor& x, const std::optional<Tensor>& lengths) { return lengths && x.defined() && x.dim() == 2; }
// Shape [T, B, columns], or packed [N, columns].
#define CHECK_ROWS(t, columns)     \
  if (packed) {                    \
    CHECK_SHAPE(t, N, columns);    \
  } else {                         \
    CHECK_SHAPE(t, T, B, columns); \
  }

// A tensor with the rows of x: of so many columns, or of one number each.
Tensor empty_rows(const Tensor& x, std::optional<int64_t> columns, std::optional<ScalarType> dtype = {}) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < x.dim() - 1; ++i) shape.push_back(x.size(i));
  if (columns) shape.push_back(*columns);
  check_memory(times({x.numel() / x.size(x.dim() - 1), columns.value_or(1)}), dtype ? 8 : x.element_size());
  return torch::stable::new_empty(x, shape, dtype);
}

// A tensor's numbers in the opmath type.
template <class T>
Buffer<opmath_type<T>> in_opmath(const Tensor& t) {
  Buffer<opmath_type<T>> numbers(t.numel());
  std::copy_n(in<T>(t), t.numel(), static_cast<opmath_type<T>*>(numbers));
  return numbers;
}

// Rows of scratch for B sequences, each thread's own from a whole tile on.
int64_t rows_of_teams(int64_t B, int threads) { return packed_rows(B) + 32 * threads; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_lstm(Tensor x, Tensor weight_hh, Tensor norm_weight,
                                                                   Tensor norm_bias, Tensor h0, Tensor c0, double eps,
                                                                   bool save, std::optional<Tensor> lengths) {
  CHECK_DIM(h0, 2, "[B, H]");
  const bool packed = is_packed(x, lengths);
  if (!packed) {
    CHECK_DIM(x, 3, "[T, B, 4H]");
  }
  const int64_t B = packed ? h0.size(0) : x.size(1), H = h0.size(1), T = x.size(0), N = T;
  CHECK_POSITIVE(x);
  CHECK_ROWS(x, 4 * H);
  check_lstm(x, weight_hh, norm_weight, norm_bias, h0, c0, B, H);
  make_contiguous(x, weight_hh, norm_weight, norm_bias, h0, c0);

  const auto saved = opmath_dtype(x);
  Tensor h = empty_rows(x, {H}), c_n = empty(x, {B, H});
  Tensor c = save ? empty_rows(x, {H}, saved) : empty(x, {0}, saved);
  Tensor normalized = save ? empty_rows(x, {4 * H}) : empty(x, {0});
  Tensor rstd = save ? empty_rows(x, {}, saved) : empty(x, {0}, saved);
  const Rows rows(x, B, lengths);
  DISPATCH(x.scalar_type(), "layer_norm_lstm", [&] {
    using S = opmath_type<scalar_t>;
    const int threads = team_size(4.0 * B * H * H);
    const int64_t own = rows_of_teams(B, threads);
    Buffer<S> packed_b(packed_length(H) * packed_columns(4 * H)), packed_a(own * packed_length(H)), a(own * 4 * H),
        state(own * H);
    const Buffer<S> gain = in_opmath<scalar_t>(norm_weight), bias = in_opmath<scalar_t>(norm_bias);
    const LayerNormLstm<scalar_t> args{.rows = rows.view,
                                       .H = H,
                                       .eps = eps,
                                       .x = in<scalar_t>(x),
                                       .weight = in<scalar_t>(weight_hh),
                                       .h0 = in<scalar_t>(h0),
                                       .c0 = in<scalar_t>(c0),
                                       .gain = gain,
                                       .bias = bias,
                                       .h = out<scalar_t>(h),
                                       .c_n = out<scalar_t>(c_n),
                                       .c = save ? out<S>(c) : nullptr,
                                       .normalized = save ? out<scalar_t>(normalized) : nullptr,
                                       .rstd = save ? out<S>(rstd) : nullptr,
                                       .packed_b = packed_b,
                                       .packed_a = packed_a,
                                       .a = a,
                                       .state = state};
    parallel(threads, [&](Team& team) { CALL_BEST(scalar_t, layer_norm_lstm, team, args); });
  });
  return {h, c_n, c, normalized, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_lstm_backward(
    Tensor dh, Tensor dc_n, Tensor weight_hh, Tensor norm_weight, Tensor norm_bias, Tensor h0, Tensor c0, Tensor h,
    Tensor c, Tensor normalized, Tensor rstd, std::optional<Tensor> lengths) {
  const bool packed = is_packed(h, lengths);
  if (packed) {
    CHECK_DIM(h0, 2, "[B, H]");
  } else {
    CHECK_DIM(h, 3, "[T, B, H]");
  }
  CHECK_POSITIVE(h);
  const int64_t B = packed ? h0.size(0) : h.size(1), H = h.size(h.dim() - 1), T = h.size(0), N = T;
  check_lstm(h, weight_hh, norm_weight, norm_bias, h0, c0, B, H);
  CHECK_ROWS(dh, H);
  CHECK_SHAPE(dc_n, B, H);
  CHECK_ROWS(c, H);
  CHECK_ROWS(normalized, 4 * H);
  if (packed) {
    CHECK_SHAPE(rstd, N);
  } else {
    CHECK_SHAPE(rstd, T, B);
  }
  CHECK_LIKE(dh, h);
  CHECK_LIKE(dc_n, h);
  CHECK_LIKE(normalized, h);
  CHECK_WIDE(c, h);
  CHECK_WIDE(rstd, h);
  make_contiguous(dh, dc_n, weight_hh, norm_weight, norm_bias, h0, c0, h, c, normalized, rstd);

  Tensor dx = empty_rows(h, {4 * H}), dweight_hh = empty(h, {4 * H, H}), dnorm_weight = empty(h, {4 * H});
  Tensor dnorm_bias = empty(h, {4 * H}), dh0 = empty(h, {B, H}), dc0 = empty(h, {B, H});
  const Rows rows(h, B, lengths);
  const int64_t real = lengths ? rows.view.total : 0;
  DISPATCH(h.scalar_type(), "layer_norm_lstm_backward", [&] {
    using S = opmath_type<scalar_t>;
    constexpr bool same = std::is_same_v<S, scalar_t>;
    const int threads = team_size(4.0 * B * H * H);
    const int64_t own = rows_of_teams(B, threads);
    Buffer<S> packed_b(packed_length(4 * H) * packed_columns(H)), packed_a(own * packed_length(4 * H)), da(own * 4 * H),
        dc(own * H);
    Buffer<scalar_t> h_before(real * H), dx_real(packed ? 0 : real * 4 * H);
    Buffer<S> dh_through(own * H), sums(threads * 16 * H), scratch(gemm_scratch(4 * H, H, threads));
    Buffer<S> dweight_opmath(same ? 0 : 4 * H * H);
    const Buffer<S> gain = in_opmath<scalar_t>(norm_weight), bias = in_opmath<scalar_t>(norm_bias),
                    c0_opmath = in_opmath<scalar_t>(c0);
    scalar_t *const dweight = out<scalar_t>(dweight_hh), *const dx_out = out<scalar_t>(dx);
    const LayerNormLstmBackward<scalar_t> args{.rows = rows.view,
                                               .H = H,
                                               .dh = in<scalar_t>(dh),
                                               .dc_n = in<scalar_t>(dc_n),
                                               .weight = in<scalar_t>(weight_hh),
                                               .h0 = in<scalar_t>(h0),
                                               .gain = gain,
                                               .bias = bias,
                                               .c0 = c0_opmath,
                                               .h = in<scalar_t>(h),
                                               .c = in<S>(c),
                                               .normalized = in<scalar_t>(normalized),
                                               .rstd = in<S>(rstd),
                                               .dx = dx_out,
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
                                               .dweight_opmath = same ? reinterpret_cast<S*>(dweight) : dweight_opmath,
                                               .h_before = lengths ? static_cast<scalar_t*>(h_before) : nullptr,
                                               .dx_real = packed ? dx_out : static_cast<scalar_t*>(dx_real)};
    parallel(threads, [&](Team& team) { CALL_BEST(scalar_t, layer_norm_lstm_backward, team, args); });
  });
  return {dx, dweight_hh, dnorm_weight, dnorm_bias, dh0, dc0};
}

template <class T>
void run_gates(int64_t H, int64_t B, int64_t steps, bool backward) {
  using S = opmath_type<T>;
  const int64_t G = 4 * H, rows = times({B, H});
  check_memory(rows, 8 * (sizeof(T) + 2 * sizeof(S)));
  Buffer<S> a(4 * rows), c(rows), state(rows), rstd(B), gain(G), bias(G), sums(2 * G);
  Buffer<T> x(4 * rows), h(rows), normalized(4 * rows);
  for (Buffer<S>* const b : {&a, &gain, &bias}) std::fill_n(static_cast<S*>(*b), b == &a ? 4 * rows : G, S(0.5));
  for (Buffer<S>* const b : {&c, &state}) std::fill_n(static_cast<S*>(*b), rows, S(0.5));
  std::fill_n(static_cast<S*>(rstd), B, S(1)), std::fill_n(static_cast<S*>(sums), 2 * G, S(0));
  for (int64_t i = 0; i < 4 * rows; ++i) x[i] = normalized[i] = T(S(i % 31 - 15) / 8);
  std::fill_n(static_cast<T*>(h), rows, T(S(0.5)));
  LayerNormLstm<T> forward{};
  forward.H = H, forward.eps = 1e-4, forward.x = x, forward.gain = gain, forward.bias = bias, forward.h = h;
  forward.c = c, forward.normalized = normalized, forward.rstd = rstd, forward.a = a, forward.state = state;
  LayerNormLstmBackward<T> back{};
  back.H = H, back.dh = h, back.gain = gain, back.bias = bias, back.c0 = state, back.c = c, back.rstd = rstd;
  back.normalized = normalized, back.dx = x, back.da = a, back.dc = state, back.dh_through = c, back.sums = sums;
  for (int64_t t = 0; t < steps; ++t)
    if (backward) {
      CALL_BEST(T, gate_rows_backward, back, B);
    } else {
      CALL_BEST(T, gate_rows, forward, B);
    }
}
}  // namespace

// Norm, gates and state of so many steps without their products, on one thread: kind "fp32" or "bf16".
void layer_norm_lstm_gates(const std::string& kind, int64_t H, int64_t B, int64_t steps, bool backward) {
  if (H < 1 || B < 1 || steps < 1) throw std::invalid_argument("sizes must be 1 or more");
  if (kind != "fp32" && kind != "bf16")
    throw std::invalid_argument("kind must be 'fp32' or 'bf16', got '" + kind + "'");
  kind == "fp32" ? run_gates<float>(H, B, steps, backward) : run_gates<BFloat16>(H, B, steps, backward);
}

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("layer_norm_lstm", TORCH_BOX(&layer_norm_lstm));
  m.impl("layer_norm_lstm_backward", TORCH_BOX(&layer_norm_lstm_backward));
}
