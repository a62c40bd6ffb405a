// Linear layer over dense inputs and tokens on CPU. Equations: fastvae/ops/linear.py.
#include <vector>

#include "../common.h"

// Rows worked on at a time, at most: packed, they stay in the L2 cache while the weight passes.
template <class T>
constexpr int64_t SLAB = 512 / sizeof(T);
// Rows that backward works on at a time: their da stays in the L3 cache.
template <class T>
constexpr int64_t SLICE_ROWS = 2048 / sizeof(T);

template <class T>
struct Linear {
  int64_t rows, K, S, N;
  const T *x, *weight, *bias;  // x is null where K = 0
  const int64_t* tokens;       // null where S = 0
  T* a;
  // Scratch: the packed weight, a slab of x packed and of a for each thread, and what each token adds [max(S, 1), N].
  void *packed_b, *packed_a;
  opmath_type<T>*slab, *table;
};

template <class T>
struct LinearBackward {
  int64_t rows, K, S, N;
  const T *da, *x, *weight;
  const int64_t *order, *starts;  // rows sorted by token, and where each token's start
  T *dx, *dweight, *dbias;
  // Scratch: the packed weight, a slab of da packed and of dx for each thread, that of a product, and dweight
  // transposed [K + max(S, 1), N]; sums of da [N].
  void *packed_b, *packed_a, *scratch;
  opmath_type<T>*slab, *dw;
  double* total;
};

#define KERNELS "linear-inl.h"
#include "foreach_isa.h"

namespace {

struct Sizes {
  int64_t rows, K, S, N;
};

// Checks the inputs of both directions and makes them contiguous.
Sizes check(std::optional<Tensor>& x, Tensor& weight, std::optional<Tensor>& tokens) {
  CHECK_DIM(weight, 2, "[N, K + S]");
  CHECK(x || tokens, "x or tokens must be given");
  for (const auto& given : {x, tokens})
    CHECK(!given || has_moderate_sizes(*given), "x and tokens must have at most 2^40 elements each");
  CHECK(!x || x->dim() > 0, "x must have shape [..., K], got []");
  const int64_t K = x ? x->size(x->dim() - 1) : 0, S = weight.size(1) - K;
  CHECK(tokens ? S > 0 : S == 0, "weight must have shape [N, K + S], where K = " + std::to_string(K) +
                                     (tokens ? " and S is that of the tokens" : " and S = 0 without tokens") +
                                     got(weight));
  CHECK(weight.size(0) > 0, "weight must have a row");
  if (x) {
    CHECK(x->scalar_type() == weight.scalar_type(), "x must have the dtype of weight");
    CHECK(x->device() == weight.device(), "x must be on the device of weight");
    make_contiguous(*x);
  }
  int64_t rows = x ? (K ? x->numel() / K : 0) : tokens->numel();
  if (tokens) {
    CHECK(tokens->scalar_type() == ScalarType::Long, "tokens must have dtype int64");
    CHECK(tokens->device() == weight.device(), "tokens must be on the device of weight");
    bool same = !x || tokens->dim() == x->dim() - 1;
    for (int64_t i = 0; x && same && i < tokens->dim(); ++i) same = tokens->size(i) == x->size(i);
    CHECK(same, "tokens must have the shape of x without its last dimension");
    rows = tokens->numel();
    make_contiguous(*tokens);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t s = in<int64_t>(*tokens)[i];
      CHECK(s >= 0 && s < S, "tokens hold the id " + std::to_string(s) + "; ids are 0 to " + std::to_string(S - 1));
    }
  }
  CHECK(rows > 0, "x and tokens must have no empty dimension");
  make_contiguous(weight);
  return {rows, K, S, weight.size(0)};
}

std::vector<int64_t> output_shape(const std::optional<Tensor>& x, const std::optional<Tensor>& tokens, int64_t last) {
  std::vector<int64_t> shape;
  const Tensor& like = tokens ? *tokens : *x;
  for (int64_t i = 0; i < like.dim() - (tokens ? 0 : 1); ++i) shape.push_back(like.size(i));
  shape.push_back(last);
  return shape;
}

Tensor linear(std::optional<Tensor> x, Tensor weight, Tensor bias, std::optional<Tensor> tokens) {
  const auto [rows, K, S, N] = check(x, weight, tokens);
  CHECK_SHAPE(bias, N);
  CHECK_LIKE(bias, weight);
  make_contiguous(bias);
  check_memory(times({rows, N}), weight.element_size());
  Tensor a = torch::stable::new_empty(weight, output_shape(x, tokens, N));
  DISPATCH(weight.scalar_type(), "linear", [&] {
    using W = opmath_type<scalar_t>;
    const int threads = team_size(double(rows) * N * (K + 1));
    Buffer<W> packed_b(packed_length(K) * packed_columns(N)), packed_a(threads * SLAB<scalar_t> * packed_length(K)),
        slab(threads * SLAB<scalar_t> * 48);
    Buffer<W> table(std::max<int64_t>(S, 1) * N);
    const Linear<scalar_t> args{.rows = rows,
                                .K = K,
                                .S = S,
                                .N = N,
                                .x = x ? in<scalar_t>(*x) : nullptr,
                                .weight = in<scalar_t>(weight),
                                .bias = in<scalar_t>(bias),
                                .tokens = tokens ? in<int64_t>(*tokens) : nullptr,
                                .a = out<scalar_t>(a),
                                .packed_b = packed_b,
                                .packed_a = packed_a,
                                .slab = slab,
                                .table = table};
    parallel(threads, [&](Team& team) { CALL_BEST(scalar_t, linear, team, args); });
  });
  return a;
}

// Rows in order of their tokens, and where each token's rows start [max(S, 1) + 1]; without tokens all are token 0.
std::pair<std::vector<int64_t>, std::vector<int64_t>> sort(const int64_t* tokens, int64_t rows, int64_t S) {
  std::vector<int64_t> order(rows), starts(std::max<int64_t>(S, 1) + 1, 0);
  for (int64_t r = 0; r < rows; ++r) ++starts[(tokens ? tokens[r] : 0) + 1];
  for (size_t s = 1; s < starts.size(); ++s) starts[s] += starts[s - 1];
  std::vector<int64_t> next(starts);
  for (int64_t r = 0; r < rows; ++r) order[next[tokens ? tokens[r] : 0]++] = r;
  return {order, starts};
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(Tensor da, std::optional<Tensor> x, Tensor weight,
                                                   std::optional<Tensor> tokens) {
  const auto [rows, K, S, N] = check(x, weight, tokens);
  CHECK(da.dim() > 0 && da.size(da.dim() - 1) == N && da.numel() == rows * N,
        "da must have shape [..., N], N = " + std::to_string(N));
  CHECK_LIKE(da, weight);
  make_contiguous(da);
  Tensor dx = x ? torch::stable::new_empty(weight, output_shape(x, tokens, K)) : empty(weight, {0});
  Tensor dweight = empty(weight, {N, K + S}), dbias = empty(weight, {N});
  const auto [order, starts] = sort(tokens ? in<int64_t>(*tokens) : nullptr, rows, S);
  DISPATCH(weight.scalar_type(), "linear_backward", [&] {
    using W = opmath_type<scalar_t>;
    const int threads = team_size(2.0 * rows * N * (K + 1));
    Buffer<W> packed_b(packed_length(N) * packed_columns(K)), packed_a(threads * SLAB<scalar_t> * packed_length(N)),
        slab(threads * SLAB<scalar_t> * 48);
    Buffer<W> scratch(gemm_scratch(K, N, threads)), dw((K + std::max<int64_t>(S, 1)) * N);
    Buffer<double> total(N);
    const LinearBackward<scalar_t> args{.rows = rows,
                                        .K = K,
                                        .S = S,
                                        .N = N,
                                        .da = in<scalar_t>(da),
                                        .x = x ? in<scalar_t>(*x) : nullptr,
                                        .weight = in<scalar_t>(weight),
                                        .order = order.data(),
                                        .starts = starts.data(),
                                        .dx = x ? out<scalar_t>(dx) : nullptr,
                                        .dweight = out<scalar_t>(dweight),
                                        .dbias = out<scalar_t>(dbias),
                                        .packed_b = packed_b,
                                        .packed_a = packed_a,
                                        .scratch = scratch,
                                        .slab = slab,
                                        .dw = dw,
                                        .total = total};
    parallel(threads, [&](Team& team) { CALL_BEST(scalar_t, linear_backward, team, args); });
  });
  return {dx, dweight, dbias};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}
