// What every decoder shares: inputs, tokens, which sequences have ended, and weights packed ahead of decoding.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstring>

#include "../common.h"
#include "isa.h"
#include "scratch.h"
#include "team.h"

// The largest of the logits seen so far, and whose it is; token -1: none seen.
template <class S>
struct Best {
  S logit;
  int64_t token;
};

// Room for m rows of k as operands of any type.
inline int64_t operand_room(int64_t m, int64_t k) { return times({packed_rows(m), packed_length(k)}); }

// Weights are multiplied as Q: as T, or rounded to int8_t.
template <class T, class Q>
struct Decode {
  using S = opmath_type<T>;
  // features [steps, B, D], token_embeddings [V + 1, width], classifier [V, hidden]
  int64_t steps, B, D, V, width, hidden, end_id, pad_id;
  const T *features, *token_embeddings, *classifier_bias;
  const S* noise;  // [steps, B, V], or null
  char* packed;
  int64_t* tokens;  // [B, steps]
  int threads;
  // Features are projected a few steps at a time: a product of useful size, in a buffer that does not grow with T.
  int64_t chunk = std::max<int64_t>(1, std::min(steps, 64 / B));
  Buffer<bool> ended{B};
  std::atomic<int64_t> running{B};
  Buffer<S> feature_rows{operand_room(chunk * B, D)}, feature_scales{chunk * B}, projected{times({chunk, B, width})};
  // Each thread's own: the block of a product, and the best of its logits. Padded, so that no two share a cache line.
  int64_t block_size = packed_rows(B) * 48, best_size = packed_rows(B);
  Buffer<S> blocks{threads * block_size};
  Buffer<Best<S>> bests{threads * best_size};
};

inline void check_decode(const Tensor& features, const Tensor& feature_weight, const Tensor& token_embeddings,
                         const Tensor& classifier_weight, const Tensor& classifier_bias,
                         const std::optional<Tensor>& noise, int64_t width, int64_t hidden,
                         std::optional<int64_t> end_id, std::optional<int64_t> pad_id) {
  CHECK_SHAPE(feature_weight, width, features.size(2));
  CHECK_LIKE(feature_weight, features);
  check_choice(features, token_embeddings, classifier_weight, classifier_bias, noise, width, hidden, end_id, pad_id);
}

// What all decoders share, made of contiguous tensors that check_decode has seen.
template <class T, class Q>
Decode<T, Q> shared_decode(const Tensor& features, const Tensor& token_embeddings, const Tensor& classifier_weight,
                           const Tensor& classifier_bias, const std::optional<Tensor>& noise,
                           std::optional<int64_t> end_id, std::optional<int64_t> pad_id, char* packed, Tensor& tokens,
                           int threads) {
  return {.steps = features.size(0),
          .B = features.size(1),
          .D = features.size(2),
          .V = classifier_weight.size(0),
          .width = token_embeddings.size(1),
          .hidden = classifier_weight.size(1),
          .end_id = end_id.value_or(-1),
          .pad_id = pad_id.value_or(-1),
          .features = in<T>(features),
          .token_embeddings = in<T>(token_embeddings),
          .classifier_bias = in<T>(classifier_bias),
          .noise = noise ? in<opmath_type<T>>(*noise) : nullptr,
          .packed = packed,
          .tokens = out<int64_t>(tokens),
          .threads = threads};
}

// A weight that decoding multiplies by: output j of input i at p[j · sn + i · sk].
template <class T>
struct Weight {
  const T* p;
  int64_t sn, sk;
};
template <class T>
Weight<T> weight(const Tensor& w) {
  return {in<T>(w), w.stride(0), w.stride(1)};
}

// The start of a tensor of packed weights: what follows can be read by a decoder that expects the same.
struct PackedHeader {
  uint8_t int8;
  char magic[7];
  int64_t isa, type, sizes[5];
};
constexpr int64_t HEADER = sizeof(PackedHeader);
static_assert(HEADER == 64, "what follows is aligned");

inline PackedHeader packed_header(Isa isa, const Tensor& weight, bool int8, std::initializer_list<int64_t> sizes) {
  PackedHeader header{int8, {'f', 'a', 's', 't', 'v', 'a', 'e'}, int64_t(isa), int64_t(weight.scalar_type()), {}};
  std::copy(sizes.begin(), sizes.end(), header.sizes);
  return header;
}

// f<T, Q>() for tensors of `type`, multiplied as they are or as int8_t.
template <class F>
auto with_operands(ScalarType type, bool int8, F f) {
  return DISPATCH(type, "decoding", [&] {
    if (int8) return f.template operator()<scalar_t, int8_t>();
    return f.template operator()<scalar_t, scalar_t>();
  });
}
