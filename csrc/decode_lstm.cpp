// Decoding with a LayerNorm-LSTM on CPU. Equations: fastvae/ops/decode_lstm.py.
#include "decode.h"
#include "layer_norm_lstm.h"

template <class T>
struct DecodeLstm {
  const T *weight_hh, *gain, *bias, *h0, *c0;
  double eps;
  Wide<T>*panels, *tiles, *a, *c;
  T* h;
};

#define KERNELS "decode_lstm.kernels.h"
#include "foreach_isa.h"

namespace {

Tensor decode_lstm(Tensor features, Tensor feature_weight, Tensor symbol_rows, Tensor weight_hh, Tensor norm_weight,
                   Tensor norm_bias, Tensor classifier_weight, Tensor classifier_bias, Tensor h0, Tensor c0,
                   std::optional<Tensor> noise, double eps, int64_t end_id, int64_t pad_id) {
  CHECK_DIM(features, 3, "[T, B, D]");
  CHECK_DIM(h0, 2, "[B, H]");
  CHECK_DIM(classifier_weight, 2, "[V, H]");
  const int64_t T = features.size(0), B = features.size(1), D = features.size(2), H = h0.size(1);
  check_decode(features, feature_weight, symbol_rows, classifier_weight, classifier_bias, noise, 4 * H, H, end_id,
               pad_id);
  check_lstm(features, weight_hh, norm_weight, norm_bias, h0, c0, B, H);
  const int64_t V = classifier_weight.size(0);
  make_contiguous(features, feature_weight, symbol_rows, weight_hh, norm_weight, norm_bias, classifier_weight,
                  classifier_bias, h0, c0);
  if (noise) make_contiguous(*noise);
  Tensor tokens = empty(features, {B, T}, ScalarType::Long);
  DISPATCH(features.scalar_type(), "decode_lstm", [&] {
    using S = Wide<scalar_t>;
    Buffer<S> panels(H * packed_columns(4 * H)), tiles(packed_rows(B) * H), a(B * 4 * H), c(B * H);
    Buffer<scalar_t> h(B * H);
    Decode<scalar_t> shared{T,
                            B,
                            D,
                            V,
                            4 * H,
                            H,
                            end_id,
                            pad_id,
                            in<scalar_t>(features),
                            in<scalar_t>(feature_weight),
                            in<scalar_t>(symbol_rows),
                            in<scalar_t>(classifier_weight),
                            in<scalar_t>(classifier_bias),
                            noise ? in<S>(*noise) : nullptr,
                            out<int64_t>(tokens)};
    const DecodeLstm<scalar_t> lstm{in<scalar_t>(weight_hh),
                                    in<scalar_t>(norm_weight),
                                    in<scalar_t>(norm_bias),
                                    in<scalar_t>(h0),
                                    in<scalar_t>(c0),
                                    eps,
                                    panels,
                                    tiles,
                                    a,
                                    c,
                                    h};
    parallel(team_size(4.0 * B * H * H), [&](Team& team) { CALL_BEST(scalar_t, decode_lstm, team, shared, lstm); });
  });
  return tokens;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) { m.impl("decode_lstm", TORCH_BOX(&decode_lstm)); }
