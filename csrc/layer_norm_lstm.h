// What the LayerNorm-LSTM kernels are given, and the checks that its ops share.
#pragma once
#include "common.h"

// Scratch of both directions: the packed weight, and h (or da) packed, a step's pre-activations (or da), cell state (or
// dc).
template <class T>
struct LayerNormLstm {
  int64_t steps, B, H;
  double eps;
  const T *x, *weight, *gain, *bias, *h0, *c0;
  T *h, *c_n;
  Wide<T>* c;  // c, normalised and rstd are kept for backward, or null
  T* normalised;
  Wide<T>* rstd;
  void *panels, *tiles;
  Wide<T>*a, *state;
};

template <class T>
struct LayerNormLstmBackward {
  int64_t steps, B, H;
  const T *dh, *dc_n, *weight, *gain, *bias, *h0;
  const Wide<T>* c0;
  const T* h;
  const Wide<T>* c;
  const T* normalised;
  const Wide<T>* rstd;
  T *dx, *dweight, *dgain, *dbias, *dh0, *dc0;
  void *panels, *tiles, *scratch;
  Wide<T>*da, *dc, *dh_through, *sums, *dweight_wide;
};

inline void check_lstm(const Tensor& x, const Tensor& weight_hh, const Tensor& norm_weight, const Tensor& norm_bias,
                       const Tensor& h0, const Tensor& c0, int64_t B, int64_t H) {
  CHECK_SHAPE(weight_hh, 4 * H, H);
  CHECK_SHAPE(norm_weight, 4 * H);
  CHECK_SHAPE(norm_bias, 4 * H);
  CHECK_SHAPE(h0, B, H);
  CHECK_SHAPE(c0, B, H);
  CHECK_LIKE(weight_hh, x);
  CHECK_LIKE(norm_weight, x);
  CHECK_LIKE(norm_bias, x);
  CHECK_LIKE(h0, x);
  CHECK_LIKE(c0, x);
}
