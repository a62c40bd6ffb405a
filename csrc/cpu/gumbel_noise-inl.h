// Gumbel noise. Equations: fastvae/ops/gumbel_noise.py.

typedef uint64_t u64 __attribute__((vector_size(VECTOR_BYTES)));

// The low words of a's 64-bit lanes times m, whole products.
INLINE u64 multiply_low(u64 a, uint32_t m) {
#if !defined(__x86_64__)
  return (a & 0xffffffff) * m;
#elif VECTOR_BYTES == 64
  return (u64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi32(int(m)));
#elif VECTOR_BYTES == 32
  return (u64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32(int(m)));
#else
  return (u64)_mm_mul_epu32((__m128i)a, _mm_set1_epi32(int(m)));
#endif
}
// a · m in each lane: the high words, and the low ones.
INLINE u32 multiply(u32 a, uint32_t m, u32& low) {
  const u64 even = multiply_low((u64)a, m), odd = multiply_low((u64)a >> 32, m);
  low = (u32)((even & 0xffffffff) | odd << 32);
  return (u32)(even >> 32 | (odd & 0xffffffff00000000));
}

// Philox4x32-10: the four words of the counters first, first + 1, .. in the lanes of c; first is a multiple of LANES.
INLINE void philox(uint64_t first, uint64_t seed, u32 (&c)[4]) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  u32 lanes;
  for (int64_t l = 0; l < LANES<float>; ++l) lanes[l] = l;
  c[0] = lanes + uint32_t(first);
  c[1] = u32{} + uint32_t(first >> 32);
  c[2] = c[3] = u32{};
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    constexpr uint32_t M0 = 0xD2511F53, M1 = 0xCD9E8D57;
    u32 low0, low1;
    const u32 high0 = multiply(c[0], M0, low0), high1 = multiply(c[2], M1, low1);
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
}

// −log(−log(1 − u)), u = (x + ½) / 2³². The smaller one of u and 1 − u is exact to its last bits.
INLINE f32 gumbel(u32 x) {
  const i32 upper = (i32)x < 0;
  const f32 smaller = (__builtin_convertvector((i32)x ^ upper, f32) + 0.5f) * 0x1p-32f;
  const f32 rest = 1 - smaller;
  // log(1 − u) = log(rest) + what rounding took from rest, or log(smaller)
  const f32 lost = (1 - rest - smaller) / rest;
  const f32 exponential = -log(upper ? smaller : rest) - (upper ? f32{} : lost);
  return -log(exponential);
}

inline void gumbel_noise(Team& team, const GumbelNoise& s) {
  constexpr int64_t w = 4 * LANES<float>;
  const auto [i0, i1] = team.share((s.count + w - 1) / w);
  for (int64_t i = i0; i < i1; ++i) {
    u32 words[4];
    philox(uint64_t(i) * LANES<float>, s.seed, words);
    interleave(words);
    float* const out = s.noise + i * w;
#pragma GCC unroll 4
    for (int64_t v = 0; v < 4; ++v)
      if (const int64_t left = s.count - i * w - v * LANES<float>; left > 0)
        store(out + v * LANES<float>, s.temperature * gumbel(words[v]), left);
  }
}
