// Decoding with highway masked convolutions on CPU. Equations: fastvae/ops/decode_bytenet.py.
#include "decode.h"

template <class T>
struct DecodeBytenet {
  int64_t layers;
  const T *weight, *bias;
  bool carry;
  // Scratch: packed weights and inputs of every layer, the last layer's output packed, pre-activations, current
  // vectors.
  Wide<T>*panels, *tiles, *last, *a, *x;
};

#define KERNELS "decode_bytenet.kernels.h"
#include "foreach_isa.h"

namespace {

Tensor decode_bytenet(Tensor features, Tensor feature_weight, Tensor symbol_rows, Tensor conv_weight, Tensor conv_bias,
                      Tensor classifier_weight, Tensor classifier_bias, std::optional<Tensor> noise, bool carry,
                      int64_t end_id, int64_t pad_id) {
  CHECK_DIM(features, 3, "[T, B, D]");
  CHECK_DIM(conv_weight, 4, "[N, 3C, C, 2]");
  CHECK_DIM(classifier_weight, 2, "[V, C]");
  const int64_t T = features.size(0), B = features.size(1), D = features.size(2);
  const int64_t N = conv_weight.size(0), V = classifier_weight.size(0), C = classifier_weight.size(1);
  check_decode(features, feature_weight, symbol_rows, classifier_weight, classifier_bias, noise, 2 * C, C, end_id,
               pad_id);
  CHECK_SHAPE(conv_weight, N, 3 * C, C, 2);
  CHECK_SHAPE(conv_bias, N, 3 * C);
  CHECK_LIKE(conv_weight, features);
  CHECK_LIKE(conv_bias, features);
  make_contiguous(features, feature_weight, symbol_rows, conv_weight, conv_bias, classifier_weight, classifier_bias);
  if (noise) make_contiguous(*noise);
  Tensor tokens = empty(features, {B, T}, ScalarType::Long);
  DISPATCH(features.scalar_type(), "decode_bytenet", [&] {
    using S = Wide<scalar_t>;
    Buffer<S> panels(N * 2 * C * packed_columns(3 * C)), tiles(N * packed_rows(B) * 2 * C), last(packed_rows(B) * C);
    Buffer<S> a(B * 3 * C), x(B * C);
    Decode<scalar_t> shared{T,
                            B,
                            D,
                            V,
                            2 * C,
                            C,
                            end_id,
                            pad_id,
                            in<scalar_t>(features),
                            in<scalar_t>(feature_weight),
                            in<scalar_t>(symbol_rows),
                            in<scalar_t>(classifier_weight),
                            in<scalar_t>(classifier_bias),
                            noise ? in<S>(*noise) : nullptr,
                            out<int64_t>(tokens)};
    const DecodeBytenet<scalar_t> net{
        N, in<scalar_t>(conv_weight), in<scalar_t>(conv_bias), carry, panels, tiles, last, a, x};
    parallel(team_size(6.0 * B * C * C), [&](Team& team) { CALL_BEST(scalar_t, decode_bytenet, team, shared, net); });
  });
  return tokens;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) { m.impl("decode_bytenet", TORCH_BOX(&decode_bytenet)); }
