// Decoding with a LayerNorm-LSTM on CPU. Equations: fastvae/ops/decode_lstm.py.
#include "decode.h"

template <class T, class Q>
struct LstmWeights {
  using Operand = Q;
  int64_t D, H, V;
  Weight<T> feature, recurrent, classifier;
};

// Mean and squared deviations from it of n values; add() makes them those of two sets together.
template <class S>
struct Moments {
  S n = 0, mean = 0, squares = 0;
  void add(const Moments& other) {
    if (other.n == 0) return;
    const S delta = other.mean - mean, share = other.n / (n + other.n);
    squares += other.squares + delta * (n * share) * delta;
    mean += delta * share;
    n += other.n;
  }
};

template <class T>
struct DecodeLstm {
  const T *gain, *bias, *h0, *c0;
  double eps;
  // Scratch: h as operands and their scales, cell state, each thread's share of the norm's statistics.
  opmath_type<T>*rows, *scales, *c;
  Moments<opmath_type<T>>* moments;
};

#define KERNELS "decode_lstm-inl.h"
#include "foreach_isa.h"
#include "decode_pack.h"

namespace {

template <class T, class Q>
LstmWeights<T, Q> lstm_weights(const Tensor& feature_weight, const Tensor& weight_hh, const Tensor& classifier_weight) {
  return {.D = feature_weight.size(1),
          .H = weight_hh.size(1),
          .V = classifier_weight.size(0),
          .feature = weight<T>(feature_weight),
          .recurrent = weight<T>(weight_hh),
          .classifier = weight<T>(classifier_weight)};
}
PackedHeader lstm_header(Isa isa, const Tensor& feature_weight, const Tensor& weight_hh,
                         const Tensor& classifier_weight, bool int8) {
  return packed_header(isa, weight_hh, int8, {feature_weight.size(1), weight_hh.size(1), classifier_weight.size(0)});
}

// Token embeddings are read as they are: nothing is packed of them.
Tensor decode_lstm_pack(Tensor feature_weight, Tensor weight_hh, Tensor classifier_weight,
                        std::optional<Tensor> maybe_embeddings, bool int8) {
  CHECK_DIM(weight_hh, 2, "[4H, H]");
  CHECK_DIM(feature_weight, 2, "[4H, D]");
  CHECK_DIM(classifier_weight, 2, "[V, H]");
  const int64_t H = weight_hh.size(1), D = feature_weight.size(1), V = classifier_weight.size(0);
  CHECK_POSITIVE(classifier_weight);
  CHECK_SHAPE(weight_hh, 4 * H, H);
  CHECK_SHAPE(feature_weight, 4 * H, D);
  CHECK_SHAPE(classifier_weight, V, H);
  CHECK_LIKE(feature_weight, weight_hh);
  CHECK_LIKE(classifier_weight, weight_hh);
  if (maybe_embeddings) {
    const Tensor& token_embeddings = *maybe_embeddings;
    CHECK_SHAPE(token_embeddings, V + 1, 4 * H);
    CHECK_LIKE(token_embeddings, weight_hh);
  }
  const PackedHeader header = lstm_header(current_isa.load(), feature_weight, weight_hh, classifier_weight, int8);
  return with_operands(weight_hh.scalar_type(), int8, [&]<class T, class Q>() {
    return pack(header, weight_hh, lstm_weights<T, Q>(feature_weight, weight_hh, classifier_weight));
  });
}

Tensor decode_lstm(Tensor features, Tensor feature_weight, Tensor token_embeddings, Tensor weight_hh,
                   Tensor norm_weight, Tensor norm_bias, Tensor classifier_weight, Tensor classifier_bias, Tensor h0,
                   Tensor c0, std::optional<Tensor> noise, double eps, std::optional<int64_t> end_id,
                   std::optional<int64_t> pad_id, std::optional<Tensor> packed, bool int8) {
  CHECK_DIM(features, 3, "[T, B, D]");
  CHECK_DIM(h0, 2, "[B, H]");
  CHECK_DIM(classifier_weight, 2, "[V, H]");
  const int64_t steps = features.size(0), B = features.size(1), H = h0.size(1);
  check_decode(features, feature_weight, token_embeddings, classifier_weight, classifier_bias, noise, 4 * H, H, end_id,
               pad_id);
  check_lstm(features, weight_hh, norm_weight, norm_bias, h0, c0, B, H);
  make_contiguous(features, token_embeddings, norm_weight, norm_bias, classifier_bias, h0, c0);
  if (noise) make_contiguous(*noise);
  const Isa isa = current_isa.load();
  const PackedHeader header = lstm_header(isa, feature_weight, weight_hh, classifier_weight, int8);
  Tensor tokens = empty(features, {B, steps}, ScalarType::Long);
  with_operands(features.scalar_type(), int8, [&]<class T, class Q>() {
    using S = opmath_type<T>;
    const auto weights = lstm_weights<T, Q>(feature_weight, weight_hh, classifier_weight);
    const int threads = team_size(4.0 * B * H * H);
    Buffer<S> rows(operand_room(B, H)), scales(B), c(B * H);
    Buffer<Moments<S>> moments(threads * B);
    Decode<T, Q> shared =
        shared_decode<T, Q>(features, token_embeddings, classifier_weight, classifier_bias, noise, end_id, pad_id,
                            find_packed(packed, header, features, weights), tokens, threads);
    const DecodeLstm<T> lstm{.gain = in<T>(norm_weight),
                             .bias = in<T>(norm_bias),
                             .h0 = in<T>(h0),
                             .c0 = in<T>(c0),
                             .eps = eps,
                             .rows = rows,
                             .scales = scales,
                             .c = c,
                             .moments = moments};
    parallel(threads, [&](Team& team) { CALL_AT(isa, Q, decode_lstm, team, shared, lstm); });
  });
  return tokens;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("decode_lstm", TORCH_BOX(&decode_lstm));
  m.impl("decode_lstm_pack", TORCH_BOX(&decode_lstm_pack));
}
