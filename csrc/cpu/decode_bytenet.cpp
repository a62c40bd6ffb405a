// Decoding with highway masked convolutions on CPU. Equations: fastvae/ops/decode_bytenet.py.
#include "decode.h"

template <class T, class Q>
struct BytenetWeights {
  using Operand = Q;
  int64_t D, C, V, layers;
  Weight<T> feature, conv, classifier;  // conv is that of tap 0 of the first layer
  int64_t layer_stride, tap_stride;
};

template <class T>
struct DecodeBytenet {
  int64_t layers;
  const T* bias;
  bool carry;
  // Scratch: every layer's input as operands, and after them the classifier's, with their scales; `before`, what the
  // vectors before give to the pre-activations; two of the vectors themselves.
  opmath_type<T>*rows, *scales, *before, *x;
};

#define KERNELS "decode_bytenet-inl.h"
#include "foreach_isa.h"
#include "decode_pack.h"

namespace {

template <class T, class Q>
BytenetWeights<T, Q> bytenet_weights(const Tensor& feature_weight, const Tensor& conv_weight,
                                     const Tensor& classifier_weight) {
  const Weight<T> conv{in<T>(conv_weight), conv_weight.stride(1), conv_weight.stride(2)};
  return {feature_weight.size(1),       conv_weight.size(2),       classifier_weight.size(0),
          conv_weight.size(0),          weight<T>(feature_weight), conv,
          weight<T>(classifier_weight), conv_weight.stride(0),     conv_weight.stride(3)};
}
PackedHeader bytenet_header(Isa isa, const Tensor& feature_weight, const Tensor& conv_weight,
                            const Tensor& classifier_weight, bool int8) {
  return packed_header(isa, conv_weight, int8,
                       {feature_weight.size(1), conv_weight.size(2), classifier_weight.size(0), conv_weight.size(0)});
}

Tensor decode_bytenet_pack(Tensor feature_weight, Tensor conv_weight, Tensor classifier_weight, bool int8) {
  CHECK_DIM(conv_weight, 4, "[N, 3C, C, 2]");
  CHECK_DIM(feature_weight, 2, "[2C, D]");
  CHECK_DIM(classifier_weight, 2, "[V, C]");
  const int64_t N = conv_weight.size(0), C = conv_weight.size(2), D = feature_weight.size(1);
  const int64_t V = classifier_weight.size(0);
  CHECK_POSITIVE(classifier_weight);
  CHECK_SHAPE(conv_weight, N, 3 * C, C, 2);
  CHECK_SHAPE(feature_weight, 2 * C, D);
  CHECK_SHAPE(classifier_weight, V, C);
  CHECK_LIKE(feature_weight, conv_weight);
  CHECK_LIKE(classifier_weight, conv_weight);
  check_memory(times({N, 6 * C, C + 48}), 1);  // before sizes of packed operands are added up
  const PackedHeader header = bytenet_header(current_isa.load(), feature_weight, conv_weight, classifier_weight, int8);
  return with_operands(conv_weight.scalar_type(), int8, [&]<class T, class Q>() {
    return pack(header, conv_weight, bytenet_weights<T, Q>(feature_weight, conv_weight, classifier_weight));
  });
}

Tensor decode_bytenet(Tensor features, Tensor feature_weight, Tensor token_embeddings, Tensor conv_weight,
                      Tensor conv_bias, Tensor classifier_weight, Tensor classifier_bias, std::optional<Tensor> noise,
                      bool carry, std::optional<int64_t> end_id, std::optional<int64_t> pad_id,
                      std::optional<Tensor> packed, bool int8) {
  CHECK_DIM(features, 3, "[T, B, D]");
  CHECK_DIM(conv_weight, 4, "[N, 3C, C, 2]");
  CHECK_DIM(classifier_weight, 2, "[V, C]");
  const int64_t steps = features.size(0), B = features.size(1), N = conv_weight.size(0), C = classifier_weight.size(1);
  check_decode(features, feature_weight, token_embeddings, classifier_weight, classifier_bias, noise, 2 * C, C, end_id,
               pad_id);
  CHECK_SHAPE(conv_weight, N, 3 * C, C, 2);
  CHECK_SHAPE(conv_bias, N, 3 * C);
  CHECK_LIKE(conv_weight, features);
  CHECK_LIKE(conv_bias, features);
  make_contiguous(features, token_embeddings, conv_bias, classifier_bias);
  if (noise) make_contiguous(*noise);
  const Isa isa = current_isa.load();
  const PackedHeader header = bytenet_header(isa, feature_weight, conv_weight, classifier_weight, int8);
  Tensor tokens = empty(features, {B, steps}, ScalarType::Long);
  with_operands(features.scalar_type(), int8, [&]<class T, class Q>() {
    using S = opmath_type<T>;
    const auto weights = bytenet_weights<T, Q>(feature_weight, conv_weight, classifier_weight);
    const int threads = team_size(6.0 * B * C * C);
    // Where there are fewer sequences than threads, each thread rounds all rows to integers for itself.
    const int64_t sets = (int8 && B < threads ? threads : 1) * (N + 1);
    Buffer<S> rows(times({sets, operand_room(B, C)})), scales(times({sets, B}));
    Buffer<S> before(times({N, B, 3, C + 15})), x(times({2, B, C}));
    Decode<T, Q> shared =
        shared_decode<T, Q>(features, token_embeddings, classifier_weight, classifier_bias, noise, end_id, pad_id,
                            find_packed(packed, header, features, weights), tokens, threads);
    const DecodeBytenet<T> net{.layers = N,
                               .bias = in<T>(conv_bias),
                               .carry = carry,
                               .rows = rows,
                               .scales = scales,
                               .before = before,
                               .x = x};
    parallel(threads, [&](Team& team) { CALL_AT(isa, Q, decode_bytenet, team, shared, net); });
  });
  return tokens;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("decode_bytenet", TORCH_BOX(&decode_bytenet));
  m.impl("decode_bytenet_pack", TORCH_BOX(&decode_bytenet_pack));
}
