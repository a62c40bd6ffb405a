// Portable SIMD on GCC and Clang vector extensions, VECTOR_BYTES wide. Included once per level by foreach_isa.h.

typedef float f32 __attribute__((vector_size(VECTOR_BYTES)));
typedef double f64 __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t i32 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t u32 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t u16 __attribute__((vector_size(VECTOR_BYTES / 2)));

// Registers compute in f32 for float and bfloat16 tensors, in f64 for double ones.
template <class T>
using vec = std::conditional_t<std::is_same_v<T, double>, f64, f32>;
template <class T>
constexpr int64_t LANES = VECTOR_BYTES / sizeof(Wide<T>);

// load and store the first n lanes (n < LANES only at the end of a row; missing lanes read as 0)
template <class T>
INLINE vec<T> load(const T* p, int64_t n = LANES<T>) {
  constexpr int64_t w = LANES<T>;
  T pad[w];
  if (__builtin_expect(n < w, 0)) {
    std::memset(pad, 0, sizeof pad);
    std::memcpy(pad, p, n * sizeof(T));
    p = pad;
  }
  if constexpr (std::is_same_v<T, BFloat16>) {
    u16 h;
    std::memcpy(&h, p, sizeof h);
    return (f32)(__builtin_convertvector(h, u32) << 16);
  } else {
    vec<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
}

template <class T>
INLINE void store(T* p, vec<T> v, int64_t n = LANES<T>) {
  const bool whole = __builtin_expect(n >= LANES<T>, 1);
  if constexpr (std::is_same_v<T, BFloat16>) {
    const u32 b = (u32)v;
    const u32 rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;  // to nearest even
    const u16 h = __builtin_convertvector((u32)(v == v ? (i32)rounded : (i32)(b >> 16 | 0x40)), u16);
    if (whole)
      std::memcpy(p, &h, sizeof h);
    else
      std::memcpy(p, &h, n * sizeof(T));
  } else {
    if (whole)
      std::memcpy(p, &v, sizeof v);
    else
      std::memcpy(p, &v, n * sizeof(T));
  }
}

template <class V>
INLINE auto sum(V v) {
  auto s = v[0];
  for (unsigned i = 1; i < sizeof(v) / sizeof(s); ++i) s += v[i];
  return s;
}

// exp(x) = 2^n · e^r, n = round(x / ln 2), |r| <= ln 2 / 2: the split of ln 2 and the polynomial of Cephes' expf. 1e-7
// relative.
INLINE f32 exp(f32 x0) {
  const f32 x = x0 > 88.0f ? f32{} + 88.0f : x0 < -87.0f ? f32{} - 87.0f : x0;
  f32 t = x * 1.44269504f + 12582912.0f;  // adding 1.5 · 2^23 rounds to an integer in the low mantissa bits
  const i32 n = (i32)t << 23;
  t -= 12582912.0f;
  const f32 r = x - t * 0.693359375f + t * 2.12194440e-4f;
  f32 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  return x0 == x0 ? (f32)((i32)p + n) : x0;  // NaN stays NaN
}
INLINE f64 exp(f64 x) {
  for (unsigned i = 0; i < sizeof(x) / sizeof(double); ++i) x[i] = std::exp(x[i]);
  return x;
}
template <class V>
INLINE V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}
// 1 − 2 / (1 + e^2|x|), which loses least near ±1; near 0 it would cancel: Cephes' polynomial there.
INLINE f32 tanh(f32 x) {
  const f32 s = x * x;
  f32 p = s * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const f32 magnitude = (f32)((u32)x & 0x7fffffffu), t = 1 - 2 / (1 + exp(magnitude + magnitude));
  return s < 0.390625f ? p * s * x + x : (f32)((u32)t | ((u32)x & 0x80000000u));
}
INLINE f64 tanh(f64 x) {
  for (unsigned i = 0; i < sizeof(x) / sizeof(double); ++i) x[i] = std::tanh(x[i]);
  return x;
}
