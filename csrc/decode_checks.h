// What every decoder checks of the tensors that it chooses symbols with, on CPUs and GPUs.
#pragma once
#include "common.h"

// features [T, B, ·], symbol_rows [V + 1, width], classifier_weight [V, hidden], noise [T, B, V].
inline void check_choice(const Tensor& features, const Tensor& symbol_rows, const Tensor& classifier_weight,
                         const Tensor& classifier_bias, const std::optional<Tensor>& maybe_noise, int64_t width,
                         int64_t hidden, int64_t end_id, int64_t pad_id) {
  const int64_t T = features.size(0), B = features.size(1), V = classifier_weight.size(0);
  CHECK(T > 0 && B > 0, "features must have at least one step and one sequence");
  CHECK_POSITIVE(classifier_weight);
  CHECK_SHAPE(symbol_rows, V + 1, width);
  CHECK_SHAPE(classifier_weight, V, hidden);
  CHECK_SHAPE(classifier_bias, V);
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
