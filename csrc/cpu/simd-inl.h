// Portable SIMD on GCC and Clang vector extensions, VECTOR_BYTES wide. Included once per ISA by foreach_isa.h.
#ifndef VECTOR_BYTES  // as an editor reads this file
#define VECTOR_BYTES 16
#include "prelude.h"
#endif

typedef float f32 __attribute__((vector_size(VECTOR_BYTES)));
typedef double f64 __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t i32 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t u32 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t u16 __attribute__((vector_size(VECTOR_BYTES / 2)));

// Registers compute in f32 for float and bfloat16 tensors, in f64 for double ones, in i32 for integers.
template <class T>
using vec = std::conditional_t<std::is_integral_v<T>, i32, std::conditional_t<std::is_same_v<T, double>, f64, f32>>;
template <class T>
constexpr int64_t LANES = VECTOR_BYTES / sizeof(opmath_type<T>);

// The first n lanes' worth of memory as V, the rest zeros; and back. Masked where there are such instructions.
template <class V, class T>
INLINE V load_bits(const T* p, int64_t n) {
  V v;
  if (__builtin_expect(n * int64_t(sizeof(T)) >= int64_t(sizeof v), 1)) {
    std::memcpy(&v, p, sizeof v);
    return v;
  }
#if VECTOR_BYTES == 64
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 2)
    return (V)_mm256_maskz_loadu_epi16(mask, p);
  else if constexpr (sizeof(T) == 4)
    return (V)_mm512_maskz_loadu_epi32(mask, p);
  else
    return (V)_mm512_maskz_loadu_epi64(mask, p);
#else
  v = V{};
  std::memcpy(&v, p, n * sizeof(T));
  return v;
#endif
}
template <class V, class T>
INLINE void store_bits(T* p, V v, int64_t n) {
  if (__builtin_expect(n * int64_t(sizeof(T)) >= int64_t(sizeof v), 1)) {
    std::memcpy(p, &v, sizeof v);
    return;
  }
#if VECTOR_BYTES == 64
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 2)
    _mm256_mask_storeu_epi16(p, mask, (__m256i)v);
  else if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_epi32(p, mask, (__m512i)v);
  else
    _mm512_mask_storeu_epi64(p, mask, (__m512i)v);
#else
  std::memcpy(p, &v, n * sizeof(T));
#endif
}

// One instruction where there is one: GCC makes several of __builtin_convertvector.
INLINE u32 upcast(u16 v) {
#if VECTOR_BYTES == 64
  return (u32)_mm512_cvtepu16_epi32((__m256i)v);
#elif VECTOR_BYTES == 32
  return (u32)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, u32);
#endif
}

// load and store the first n lanes (n < LANES only at the end of a row; missing lanes read as 0)
template <class T>
INLINE vec<T> load(const T* p, int64_t n = LANES<T>) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return (f32)(upcast(load_bits<u16>(p, n)) << 16);
  else
    return load_bits<vec<T>>(p, n);
}

template <class T>
INLINE void store(T* p, vec<T> v, int64_t n = LANES<T>) {
  if constexpr (std::is_same_v<T, BFloat16>) {
#if defined(BF16_DOT) && VECTOR_BYTES == 64
    // The instruction takes numbers below the normal ones for 0.
    if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, 0x20) == 0, 1))
      return store_bits(p, (u16)_mm512_cvtneps_pbh((__m512)v), n);
#endif
    const u32 b = (u32)v;
    const u32 rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;  // to nearest even
    store_bits(p, __builtin_convertvector((u32)(v == v ? (i32)rounded : (i32)(b >> 16 | 0x40)), u16), n);
  } else {
    store_bits(p, v, n);
  }
}

template <class V>
INLINE auto sum(V v) {
  auto s = v[0];
  for (unsigned i = 1; i < sizeof(v) / sizeof(s); ++i) s += v[i];
  return s;
}

// The elements of a and b in turn: the first half of that sequence (HALF = 0) or the second.
template <int HALF, class V, int... I>
INLINE V interleave_half(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, (HALF * n / 2 + I / 2 + I % 2 * n)...);
#else  // GCC 11
  return __builtin_shuffle(a, b, decltype(a == b){(HALF * n / 2 + I / 2 + I % 2 * n)...});
#endif
}
// The elements of N vectors in turn: v[0][0], v[1][0], .., v[N - 1][0], v[0][1], ..; N a power of 2.
template <class V, int N>
INLINE void interleave(V (&v)[N]) {
  const std::make_integer_sequence<int, sizeof(V) / sizeof(v[0][0])> lanes;
#pragma GCC unroll 4
  for (int n = N; n > 1; n /= 2) {
    V w[N];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
      w[2 * i] = interleave_half<0>(v[i], v[i + N / 2], lanes);
      w[2 * i + 1] = interleave_half<1>(v[i], v[i + N / 2], lanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) v[i] = w[i];
  }
}

// e^x for x <= 0 as scale · (1 + rest): scale = 2^n, n = round(x / ln 2), rest = e^r − 1, |r| <= ln 2 / 2, by a
// minimax polynomial, 1e-7 relative. The split of ln 2 is that of Cephes' expf.
template <class V>
struct Exp {
  V scale, rest;
  V value() const { return scale * rest + scale; }
  V minus_one() const { return scale * rest + (scale - 1); }  // exact to the last bits where x is small
};
INLINE Exp<f32> exp_parts(f32 x0) {
#if VECTOR_BYTES == 64
  const f32 x = (f32)_mm512_max_ps(_mm512_set1_ps(-200.f), (__m512)x0);  // NaN stays NaN
#else
  const f32 x = x0 < -87.f ? f32{} - 87.f : x0;
#endif
  f32 t = x * 1.44269504f + 12582912.f;  // adding 1.5 · 2^23 rounds to an integer in the low mantissa bits
#if VECTOR_BYTES == 64
  t -= 12582912.f;
  const f32 scale = (f32)_mm512_scalef_ps(_mm512_set1_ps(1.f), (__m512)t);
#else
  const f32 scale = x0 < -87.f ? f32{} : (f32)(((i32)t << 23) + 0x3f800000);
  t -= 12582912.f;
#endif
  const f32 r = x - t * 0.693359375f + t * 2.12194440e-4f;
  f32 p = r * 1.3950542394e-3f + 8.3689199329e-3f;
  p = p * r + 4.1666205032e-2f;
  p = p * r + 1.6666518586e-1f;
  p = p * r + 0.5f;
  return {scale, p * (r * r) + r};
}
INLINE Exp<f64> exp_parts(f64 x) {
  for (unsigned i = 0; i < sizeof(x) / sizeof(double); ++i) x[i] = std::expm1(x[i]);
  return {f64{} + 1, x};
}
// log x of a normal number above 0, 1e-7 relative: log m by a minimax polynomial, m in [√½, √2), and the exponent's.
INLINE f32 log(f32 x) {
  const i32 bits = (i32)x, exponent = (bits - 0x3f3504f3) >> 23;
  const f32 f = (f32)(bits - (exponent << 23)) - 1, e = __builtin_convertvector(exponent, f32);
  f32 p = f * -7.634310468e-2f + 1.276150216e-1f;
  p = p * f - 1.316021758e-1f;
  p = p * f + 1.420177053e-1f;
  p = p * f - 1.662335495e-1f;
  p = p * f + 2.000122629e-1f;
  p = p * f - 2.500082109e-1f;
  p = p * f + 3.333333171e-1f;
  const f32 square = f * f;
  return f - 0.5f * square + (p * f * square - e * 2.12194440e-4f) + e * 0.693359375f;
}
INLINE f32 abs(f32 x) { return (f32)((u32)x & 0x7fffffffu); }
INLINE f64 abs(f64 x) { return x < 0 ? -x : x; }
INLINE f32 minus_abs(f32 x) { return (f32)((u32)x | 0x80000000u); }
INLINE f64 minus_abs(f64 x) { return -abs(x); }

// 1 / x for x in [1, 2].
template <class V>
INLINE V reciprocal(V x) {
#if VECTOR_BYTES == 64
  if constexpr (std::is_same_v<V, f32>) {  // a division takes several times as long: Newton's step on 14 bits
    const f32 r = (f32)_mm512_rcp14_ps((__m512)x);
    return r + r * (1 - x * r);
  }
#endif
  return 1 / x;
}

// 1 / √(variance + eps), or NaN where the variance overflowed, which zeros would hide.
template <class S>
INLINE S reciprocal_std(S variance, S eps) {
  constexpr S infinity = std::numeric_limits<S>::infinity();
  return variance < infinity ? 1 / std::sqrt(variance + eps) : std::numeric_limits<S>::quiet_NaN();
}

// σ(x) and its slope σ(x) (1 − σ(x)), from e^−|x|: nothing overflows, and the slope does not cancel where σ is near 1.
template <class V>
INLINE V sigmoid(V x, V* slope = nullptr) {
  const V e = exp_parts(minus_abs(x)).value(), r = reciprocal(1 + e), smaller = e * r;  // of σ(x) and 1 − σ(x)
  if (slope) *slope = smaller * r;
  return x < 0 ? smaller : r;
}
// tanh(x) = (1 − e) / (1 + e), e = e^−2|x|, and its slope 1 − tanh²(x) = 4 e / (1 + e)², likewise.
template <class V>
INLINE V tanh(V x, V* slope = nullptr) {
  const Exp<V> e = exp_parts(2 * minus_abs(x));
  const V less = e.minus_one(), r = reciprocal(1 + 0.5f * less);  // of (1 + e) / 2
  if (slope) *slope = e.value() * r * r;
  const V t = -0.5f * less * r;
  return x < 0 ? -t : t;
}
