// What every decoder shares: inputs, tokens, the classifier, its choice, and which sequences have ended.
#pragma once
#include <algorithm>
#include <atomic>
#include <string>

#include "common.h"
#include "scratch.h"

template <class T>
struct Decode {
  using S = Wide<T>;
  // features [steps, B, D], feature_weight [width, D], symbol_rows [V + 1, width], classifier_weight [V, hidden]
  int64_t steps, B, D, V, width, hidden, end_id, pad_id;
  const T *features, *feature_weight, *symbol_rows, *classifier_weight, *classifier_bias;
  const S* noise;   // [steps, B, V], or null
  int64_t* tokens;  // [B, steps]
  // Features are projected a few steps at a time: a product of useful size, in a buffer that does not grow with T.
  int64_t chunk = std::max<int64_t>(1, std::min(steps, 64 / B));
  Buffer<int64_t> symbols{B};  // each sequence's previous symbol
  Buffer<bool> ended{B};
  std::atomic<int64_t> running{B};
  Buffer<S> classifier{hidden * packed_columns(V)}, logits{B * V};
  Buffer<S> feature_panels{D * packed_columns(width)}, feature_tiles{packed_rows(chunk * B) * D};
  Buffer<S> projected{chunk * B * width};
};

inline void check_decode(const Tensor& features, const Tensor& feature_weight, const Tensor& symbol_rows,
                         const Tensor& classifier_weight, const Tensor& classifier_bias,
                         const std::optional<Tensor>& maybe_noise, int64_t width, int64_t hidden, int64_t end_id,
                         int64_t pad_id) {
  const int64_t T = features.size(0), B = features.size(1), D = features.size(2), V = classifier_weight.size(0);
  CHECK(T > 0 && B > 0, "features must have at least one step and one sequence");
  CHECK_POSITIVE(classifier_weight);
  CHECK_SHAPE(feature_weight, width, D);
  CHECK_SHAPE(symbol_rows, V + 1, width);
  CHECK_SHAPE(classifier_weight, V, hidden);
  CHECK_SHAPE(classifier_bias, V);
  CHECK_LIKE(feature_weight, features);
  CHECK_LIKE(symbol_rows, features);
  CHECK_LIKE(classifier_weight, features);
  CHECK_LIKE(classifier_bias, features);
  if (maybe_noise) {
    const Tensor& noise = *maybe_noise;
    CHECK_SHAPE(noise, T, B, V);
    CHECK_WIDE(noise, features);
  }
  CHECK(end_id < V, "end_id must be below V = " + std::to_string(V));
  CHECK(end_id < 0 || pad_id >= 0, "pad_id must be given where end_id is");
}
