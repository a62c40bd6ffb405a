// Windows of convolutions with stride 2 on CPU. Equations: fastvae/ops/unfold.py.
#include "../common.h"

template <class T>
struct Unfold {
  int64_t steps, B, C;  // of the windows
  const T* x;
  T* windows;
};

template <class T>
struct Fold {
  int64_t steps, B, C;
  const T *windows, *bias;  // bias may be null
  T* x;
};

#define KERNELS "unfold-inl.h"
#include "foreach_isa.h"

namespace {

Tensor unfold(Tensor x) {
  CHECK_DIM(x, 3, "[2T, B, C]");
  CHECK_POSITIVE(x);
  CHECK(x.size(0) % 2 == 0, "x must have an even number of steps" + got(x));
  make_contiguous(x);
  const int64_t T = x.size(0) / 2, B = x.size(1), C = x.size(2);
  Tensor windows = empty(x, {T, B, C, 3});
  DISPATCH(x.scalar_type(), "unfold", [&] {
    const Unfold<scalar_t> args{.steps = T, .B = B, .C = C, .x = in<scalar_t>(x), .windows = out<scalar_t>(windows)};
    parallel(team_size(double(windows.numel())), [&](Team& team) { CALL_BEST(scalar_t, unfold, team, args); });
  });
  return windows;
}

Tensor fold(Tensor windows, std::optional<Tensor> bias) {
  CHECK_DIM(windows, 4, "[T, B, C, 3]");
  CHECK_POSITIVE(windows);
  CHECK(windows.size(3) == 3, "windows must have shape [T, B, C, 3]" + got(windows));
  const int64_t T = windows.size(0), B = windows.size(1), C = windows.size(2);
  if (bias) {
    CHECK(has_moderate_sizes(*bias) && has_shape(*bias, {C}),
          "bias must have shape [C] = " + shape_of({C}) + got(*bias));
    CHECK(bias->scalar_type() == windows.scalar_type(), "bias must have the dtype of windows");
    CHECK(bias->device() == windows.device(), "bias must be on the device of windows");
    make_contiguous(*bias);
  }
  make_contiguous(windows);
  Tensor x = empty(windows, {2 * T, B, C});
  DISPATCH(windows.scalar_type(), "fold", [&] {
    const Fold<scalar_t> args{.steps = T,
                              .B = B,
                              .C = C,
                              .windows = in<scalar_t>(windows),
                              .bias = bias ? in<scalar_t>(*bias) : nullptr,
                              .x = out<scalar_t>(x)};
    parallel(team_size(double(windows.numel())), [&](Team& team) { CALL_BEST(scalar_t, fold, team, args); });
  });
  return x;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("unfold", TORCH_BOX(&unfold));
  m.impl("fold", TORCH_BOX(&fold));
}
