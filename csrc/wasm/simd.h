// Vectors of four floats, the same in WebAssembly and in native code: no fused multiply-add, no call of a math library.
#pragma once

#include <stdint.h>

typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));

enum { LANES = 4, PANEL = 8 };  // PANEL: rows of a matrix that are multiplied at once; widths are padded to it

static inline int padded(int size) { return (size + PANEL - 1) / PANEL * PANEL; }

static inline f32x4 splat(float x) { return (f32x4){x, x, x, x}; }

static inline f32x4 load(const float *p) { return *(const f32x4 *)p; }

static inline void store(float *p, f32x4 x) { *(f32x4 *)p = x; }

static inline f32x4 choose(i32x4 mask, f32x4 a, f32x4 b) { return (f32x4)((mask & (i32x4)a) | (~mask & (i32x4)b)); }

static inline f32x4 smaller(f32x4 a, f32x4 b) { return choose(a < b, a, b); }

static inline f32x4 larger(f32x4 a, f32x4 b) { return choose(a > b, a, b); }

static inline float sum(f32x4 x) { return (x[0] + x[1]) + (x[2] + x[3]); }

// exp(x) for x of any size, within 2 ulp: 2^n exp(r) with x = n ln 2 + r.
static inline f32x4 exponential(f32x4 x) {
  x = smaller(larger(x, splat(-87.0f)), splat(88.0f));
  const f32x4 shifter = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to a whole number, which its low bits hold
  f32x4 shifted = x * splat(1.44269504f) + shifter;
  f32x4 n = shifted - shifter;
  f32x4 r = x - n * splat(0.693145752f) - n * splat(1.42860677e-6f);
  f32x4 p = splat(1.0f / 5040);
  p = p * r + splat(1.0f / 720);
  p = p * r + splat(1.0f / 120);
  p = p * r + splat(1.0f / 24);
  p = p * r + splat(1.0f / 6);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  i32x4 power = ((i32x4)shifted - (i32x4)shifter + 127) << 23;
  return p * (f32x4)power;
}

static inline f32x4 sigmoid(f32x4 x) { return splat(1.0f) / (splat(1.0f) + exponential(-x)); }

static inline f32x4 tangent(f32x4 x) { return splat(2.0f) * sigmoid(x + x) - splat(1.0f); }  // tanh

// log(x) of a normal positive x in double precision: ln 2 · n + 2 artanh((m − 1) / (m + 1)) with x = m 2^n.
static inline double logarithm(double x) {
  union {
    double value;
    uint64_t bits;
  } split = {x};
  int n = (int)(split.bits >> 52) - 1023;
  split.bits = (split.bits & 0xFFFFFFFFFFFFFull) | 0x3FF0000000000000ull;
  if (split.value > 1.4142135623730951) split.value *= 0.5, n += 1;
  double s = (split.value - 1) / (split.value + 1), square = s * s, series = 0;
  for (int k = 21; k >= 1; k -= 2) series = series * square + 1.0 / k;
  return n * 0.6931471805599453 + 2 * s * series;
}
