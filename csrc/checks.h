// What ops check of their arguments, on CPUs and GPUs: every message says what is wrong and what was got.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <unistd.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A product of sizes that come from arguments; the largest number where it does not fit.
inline int64_t times(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors)
    if (__builtin_mul_overflow(product, factor, &product)) return std::numeric_limits<int64_t>::max();
  return product;
}

// Throws where so much memory is not to be had: an allocation would fail, or touch it page by page until the system
// ends the process.
inline void check_memory(int64_t count, int64_t size) {
  static const double memory = double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGESIZE));
  const double bytes = double(count) * double(size);
  if (count >= 0 && bytes <= memory) return;
  throw std::runtime_error("sizes too large: " + std::to_string(int64_t(bytes / 1e9)) +
                           " GB are needed at once, this machine has " + std::to_string(int64_t(memory / 1e9)) +
                           " GB of memory");
}

// A clear line for the user, without the place in these sources that STD_TORCH_CHECK would add: a RuntimeError in
// Python.
#define CHECK(condition, message) \
  if (!(condition)) throw std::runtime_error(message)

// A dtype as Python calls it.
inline std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another one";
  }
}
inline std::string name_of(const Tensor& t) { return name_of(t.scalar_type()); }

// Shape, dtype and layout are checked here, where the pointers are taken: a wrong shape must never read out of bounds.
inline bool has_shape(const Tensor& t, std::initializer_list<int64_t> want) {
  if (t.dim() != int64_t(want.size())) return false;
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) != want.begin()[i]) return false;
  return true;
}
inline std::string shape_of(const std::vector<int64_t>& sizes) {
  std::string s = "[";
  for (int64_t n : sizes) s += (s.size() > 1 ? ", " : "") + std::to_string(n);
  return s + "]";
}
inline std::string got(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return ", got " + shape_of(sizes);
}
// Sizes that kernels may multiply by small numbers: a tensor of a repeated element may have any.
constexpr int64_t LARGEST = int64_t(1) << 40;
inline bool has_moderate_sizes(const Tensor& t) {
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) > LARGEST) return false;
  return t.numel() <= LARGEST;
}
#define CHECK_MODERATE(t)                               \
  CHECK(t.defined(), #t " must be a tensor, got None"); \
  CHECK(has_moderate_sizes(t), #t " must have at most 2^40 elements" + got(t))
#define CHECK_SHAPE(t, ...) \
  CHECK_MODERATE(t);        \
  CHECK(has_shape(t, {__VA_ARGS__}), #t " must have shape [" #__VA_ARGS__ "] = " + shape_of({__VA_ARGS__}) + got(t))
#define CHECK_DIM(t, n, shape) \
  CHECK_MODERATE(t);           \
  CHECK(t.dim() == n, #t " must have shape " shape + got(t))
#define CHECK_POSITIVE(t) CHECK(t.numel() > 0, #t " must have no empty dimension" + got(t))
#define CHECK_LIKE(t, ref)                                                               \
  CHECK_MODERATE(t);                                                                     \
  CHECK(t.scalar_type() == ref.scalar_type(),                                            \
        #t " must have the dtype of " #ref ", " + name_of(ref) + ", got " + name_of(t)); \
  CHECK(t.device() == ref.device(), #t " must be on the device of " #ref)
#define CHECK_WIDE(t, ref)                                                                       \
  CHECK(t.scalar_type() == opmath_dtype(ref),                                                    \
        #t " must have dtype float32, or float64 where " #ref " is float64, got " + name_of(t)); \
  CHECK(t.device() == ref.device(), #t " must be on the device of " #ref)

inline ScalarType opmath_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What every decoder is given: features [T, B, ·], token_embeddings [V + 1, width], classifier_weight [V, hidden],
// noise [T, B, V].
inline void check_choice(const Tensor& features, const Tensor& token_embeddings, const Tensor& classifier_weight,
                         const Tensor& classifier_bias, const std::optional<Tensor>& maybe_noise, int64_t width,
                         int64_t hidden, std::optional<int64_t> end_id, std::optional<int64_t> pad_id) {
  const int64_t T = features.size(0), B = features.size(1), V = classifier_weight.size(0);
  CHECK(T > 0 && B > 0, "features must have at least one step and one sequence");
  CHECK_POSITIVE(classifier_weight);
  CHECK_SHAPE(token_embeddings, V + 1, width);
  CHECK_SHAPE(classifier_weight, V, hidden);
  CHECK_SHAPE(classifier_bias, V);
  CHECK_LIKE(token_embeddings, features);
  CHECK_LIKE(classifier_weight, features);
  CHECK_LIKE(classifier_bias, features);
  if (maybe_noise) {
    const Tensor& noise = *maybe_noise;
    CHECK_SHAPE(noise, T, B, V);
    CHECK_WIDE(noise, features);
  }
  if (end_id) {
    CHECK(*end_id >= 0 && *end_id < V,
          "end_id must be from 0 to " + std::to_string(V - 1) + ", got " + std::to_string(*end_id));
    CHECK(pad_id.value_or(-1) >= 0, "pad_id must be 0 or more where end_id is given, got " +
                                        (pad_id ? std::to_string(*pad_id) : std::string("None")));
  }
}

// What the LayerNorm-LSTM is given in each of its ops: x or normalized [T, B, 4H] has been checked.
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
