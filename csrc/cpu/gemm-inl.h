// Matrix products on packed operands. Included once per ISA by foreach_isa.h.
//   A is packed in tiles of MR rows, [K][MR]; B in panels of NR columns, [K][NR], padded with zeros. Operands
//   of a dot-product instruction hold several consecutive k of a row or column side by side: STEP of a column,
//   [K / STEP][NR][STEP], and as many of a row, or a whole AMX row: [K / ROW_STEP][MR][ROW_STEP].
// One tile times one panel fills the register file: MR x 3 accumulators (24 of 32 registers, or 12 of 16), a row of A
// and, where a multiply-add needs no register besides, three vectors of B. AMX's eight: 2 x 3 of 16 x 16 sums, one of A
// and one of B.
#ifndef VECTOR_BYTES  // as an editor reads this file
#include "simd-inl.h"
#endif

#if VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int64_t VECTOR_MR = 8;
#else
constexpr int64_t VECTOR_MR = 4;
#endif
#ifdef AMX  // a row alone is left to vectors
constexpr int64_t MR = 32, MR_BY_VECTORS = 1;
#else
constexpr int64_t MR = VECTOR_MR, MR_BY_VECTORS = MR;
#endif

// What packed operands of tensors of T are made of, and what their products add up in. Operands of int8_t are rounded
// by their owner (decode_operands-inl.h); products of integers are exact.
#ifdef BF16_DOT
template <class T>
using Packed = T;
#else
template <class T>
using Packed = std::conditional_t<std::is_same_v<T, int8_t>, int16_t, opmath_type<T>>;
#endif
template <class P>
using Sum = std::conditional_t<std::is_integral_v<P>, int32_t, opmath_type<P>>;
template <class P>
constexpr int64_t STEP = sizeof(opmath_type<P>) / sizeof(P);
#ifdef AMX
template <class P>
constexpr int64_t ROW_STEP = 64 / sizeof(P);
#else
template <class P>
constexpr int64_t ROW_STEP = STEP<P>;
#endif
// Products run in slices of k this deep: a slice of a panel stays in the L2 cache.
template <class P>
constexpr int64_t KC = SLICE * STEP<P>;
// Of packed A that stay in the L2 cache while panels pass: CPUs without AVX-512 have as little as 512 KB.
#if VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int64_t L2_BYTES = 1 << 19;
#else
constexpr int64_t L2_BYTES = 1 << 18;
#endif
// So many steps of k are summed in a register before the sum joins the others: this bounds the rounding of long sums.
constexpr int64_t SUMMED = 256;
constexpr int64_t LINE = 64;  // bytes of a cache line
template <class P>
constexpr int64_t NR = 3 * LANES<opmath_type<P>>;

// Whether registers are left for three vectors of B. SSE multiplies into a copy; so do integers but for VNNI.
template <class P>
#if VECTOR_BYTES == 64
constexpr bool HOLD_COLUMNS = true;
#elif defined(__aarch64__)
constexpr bool HOLD_COLUMNS = !std::is_same_v<P, int16_t>;
#else
constexpr bool HOLD_COLUMNS = VECTOR_BYTES == 32 && !std::is_integral_v<P>;
#endif
#if defined(__x86_64__)
#define VECTOR_REGISTER "+v"
#else
#define VECTOR_REGISTER "+w"
#endif
// Keeps v in a register from here on: it is loaded once and not by every instruction that wants it.
template <class V>
INLINE void hold(V& v) {
  asm("" : VECTOR_REGISTER(v));
}
// And where a and b point is known once v is.
template <class V, class P, class E>
INLINE void hold(V& v, const P*& a, const E*& b) {
  asm("" : VECTOR_REGISTER(v), "+r"(a), "+r"(b));
}

template <class P>
constexpr int64_t num_panels(int64_t n) {
  return (n + NR<P> - 1) / NR<P>;
}
constexpr int64_t num_tiles(int64_t m) { return (m + MR - 1) / MR; }
// k as packed: whole steps.
template <class P>
constexpr int64_t packed_depth(int64_t k) {
  return (k + ROW_STEP<P> - 1) / ROW_STEP<P> * ROW_STEP<P>;
}

template <class P, class T>
INLINE P convert(T x) {
  if constexpr (std::is_same_v<P, T>)
    return x;
  else
    return P(opmath_type<T>(x));
}

// Where (row, k) of packed tiles of `depth` is, k in whole steps.
template <class P>
INLINE P* tile_at(P* tiles, int64_t depth, int64_t row, int64_t k = 0) {
  return tiles + (row / MR * depth + k) * MR + row % MR * ROW_STEP<P>;
}

// One row of A to its place tile_at(). A null row is zeros.
template <class P, class T>
INLINE void pack_row(const T* row, int64_t stride, int64_t k, P* out) {
  constexpr int64_t step = ROW_STEP<P>;
  for (int64_t i = 0; i < packed_depth<P>(k); i += step, out += MR * step)
    if (std::is_same_v<P, T> && row && stride == 1 && i + step <= k)
      std::memcpy(out, row + i, step * sizeof(P));
    else
      for (int64_t s = 0; s < step; ++s) out[s] = row && i + s < k ? convert<P>(row[(i + s) * stride]) : P(0);
}

// STEP rows of n values, `stride` apart, to [n][STEP]. Rows from `there` on are zeros.
template <class P, class T>
INLINE void pack_steps(const T* rows, int64_t stride, int64_t there, int64_t n, P* out) {
  if constexpr (STEP<P> == 1) {
    for (int64_t j = 0; j < n; ++j) out[j] = convert<P>(rows[j]);
  } else if (std::is_same_v<T, P> && STEP<P> == 2 && there == 2) {
    uint16_t low, high;  // pairs written as one number vectorize
    for (int64_t j = 0; j < n; ++j) {
      std::memcpy(&low, rows + j, 2);
      std::memcpy(&high, rows + stride + j, 2);
      const uint32_t pair = low | uint32_t(high) << 16;
      std::memcpy(out + 2 * j, &pair, 4);
    }
  } else {
    for (int64_t j = 0; j < n; ++j)
      for (int64_t s = 0; s < STEP<P>; ++s) out[j * STEP<P> + s] = s < there ? convert<P>(rows[s * stride + j]) : P(0);
  }
}

// A vector of operands as they are, STEP of them in a lane.
template <class P>
INLINE vec<P> load_panel(const P* b) {
  vec<P> v;
  std::memcpy(&v, b, sizeof v);
  return v;
}

// A vector of operands of P, which are stored as such or as bfloat16.
template <class P, class E>
INLINE vec<P> load_stored(const E* b) {
  if constexpr (std::is_same_v<P, E>)
    return load_panel(b);
  else
    return load(b);
}

// N rows of k values, each contiguous, to columns of operands `width` wide: [k / STEP][width][STEP]. A null row is
// zeros.
template <int64_t N, class P, class T>
INLINE void pack_together(const T* const (&rows)[N], int64_t k, int64_t width, P* out) {
  constexpr int64_t W = LANES<P> * STEP<P>;  // values in a vector
  int64_t i = 0;
  for (; i + W <= k; i += W) {
    vec<P> v[N];
#pragma GCC unroll 16
    for (int64_t r = 0; r < N; ++r) {
      if (!rows[r])
        v[r] = vec<P>{};
      else if constexpr (STEP<P> == 1)
        v[r] = load(rows[r] + i);
      else
        v[r] = load_panel(rows[r] + i);
    }
    interleave(v);
    if (width == N)
      std::memcpy(out + i * N, v, sizeof v);
    else
      for (int64_t step = 0; step < LANES<P>; ++step)
        std::memcpy(out + (i + step * STEP<P>)*width, reinterpret_cast<const char*>(v) + step * N * sizeof(v[0][0]),
                    N * sizeof(v[0][0]));
  }
  for (; i < k; i += STEP<P>)
    for (int64_t r = 0; r < N; ++r)
      for (int64_t s = 0; s < STEP<P>; ++s)
        out[i * width + r * STEP<P> + s] = rows[r] && i + s < k ? convert<P>(rows[r][i + s]) : P(0);
}
// Whether pack_together takes operands of P from rows of T.
template <class P, class T>
constexpr bool PACKED_TOGETHER = STEP<P> == 1 || std::is_same_v<P, T>;

// MR rows of k values to one tile.
template <class P, class T>
void pack_tile(const T* const (&rows)[MR], int64_t k, P* out) {
#ifdef AMX
  for (int64_t r = 0; r < MR; ++r) pack_row(rows[r], 1, k, out + r * ROW_STEP<P>);
#else
  pack_together(rows, k, MR, out);
#endif
}

// One step of k of a tile, from its transpose: so many rows of n values, n <= MR. Null rows are zeros.
template <class P, class T>
INLINE void pack_transposed(const T* const (&rows)[ROW_STEP<P>], int64_t n, P* out) {
#ifdef AMX
  static_assert(STEP<P> == 2 && std::is_same_v<P, T>);
  for (int64_t j = 0; j < n; j += LANES<P>, out += LANES<P> * ROW_STEP<P>) {
    const auto bits = [&](int64_t k) __attribute__((always_inline)) {
      return rows[k] ? (u32)load(rows[k] + j, n - j) : u32{};
    };
    u32 pairs[LANES<P>];
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES<P>; ++i) pairs[i] = bits(2 * i) >> 16 | bits(2 * i + 1);
    interleave(pairs);
    std::memcpy(out, pairs, sizeof pairs);
  }
#else
  for (int64_t r = 0; r < n; ++r)
    for (int64_t s = 0; s < STEP<P>; ++s) out[r * STEP<P> + s] = rows[s] ? convert<P>(rows[s][r]) : P(0);
#endif
}

// Rows [r0, r1) of k values, each where row(r) points, to their places in tiles.
template <class P, class F>
INLINE void pack_rows_at(F row, int64_t r0, int64_t r1, int64_t k, P* tiles) {
  using T = std::remove_const_t<std::remove_pointer_t<decltype(row(r0))>>;
  const int64_t depth = packed_depth<P>(k);
  for (int64_t r = r0; r < r1;) {
    P* const tile = tile_at(tiles, depth, r);
    if constexpr (PACKED_TOGETHER<P, T>) {
      if (r % MR == 0 && r + MR <= r1) {
        const T* rows[MR];
        for (int64_t i = 0; i < MR; ++i) rows[i] = row(r + i);
        pack_tile(rows, k, tile);
        r += MR;
        continue;
      }
    }
    pack_row(row(r), 1, k, tile);
    ++r;
  }
}
// Rows [r0, r1) of m [·, k].
template <class P, class T>
void pack_rows(const T* m, int64_t r0, int64_t r1, int64_t k, P* tiles) {
  pack_rows_at([&](int64_t r) { return m + r * k; }, r0, r1, k, tiles);
}

// Columns [0, n) of b(k, n) = b[k · bk + n · bn] to one panel; n <= NR.
template <class P, class T>
void pack_panel(const T* b, int64_t bk, int64_t bn, int64_t k, int64_t n, P* out) {
  constexpr int64_t W = NR<P>, s = STEP<P>;
  if (n < W || k % ROW_STEP<P>) std::memset(out, 0, packed_depth<P>(k) * W * sizeof(P));
  if (bn == 1) {
    for (int64_t i = 0; i < k; i += s) pack_steps(b + i * bk, bk, std::min(s, k - i), n, out + i * W);
  } else if (bk == 1 && n == W && PACKED_TOGETHER<P, T>) {
    if constexpr (PACKED_TOGETHER<P, T>)
      for (int64_t j = 0; j < W; j += LANES<P>) {
        const T* columns[LANES<P>];
        for (int64_t l = 0; l < LANES<P>; ++l) columns[l] = b + (j + l) * bn;
        pack_together(columns, k, W, out + j * s);
      }
  } else {
    for (int64_t i0 = 0; i0 < k; i0 += 16)  // blocks keep both sides of the transposition in cache
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = i0; i < std::min(i0 + 16, k); ++i)
          out[(i / s * W + j) * s + i % s] = convert<P>(b[i * bk + j * bn]);
  }
}

// Vectors of operands: a lane of B holds STEP values of one column, one row's STEP values of A are the same in each.
// Integers: int8_t operands of A hold the value + INT8_OFFSET, unsigned, which the sum must make up for.
template <class P>
INLINE vec<P> broadcast(const P* a) {
  if constexpr (STEP<P> == 1) {
    return *a - vec<P>{};  // x − 0 is x, −0 too: no addition is left of it
  } else {
    int32_t step;
    std::memcpy(&step, a, sizeof step);
    return (vec<P>)(i32{} + step);
  }
}
#if defined(BF16_DOT) && defined(__aarch64__)
constexpr int32_t INT8_OFFSET = 0;
INLINE i32 multiply_add(i32 sum, i32 a, i32 b) { return (i32)vdotq_s32((int32x4_t)sum, (int8x16_t)a, (int8x16_t)b); }
INLINE f32 multiply_add(f32 sum, f32 a, f32 b) {
  return (f32)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
#elif defined(BF16_DOT)
constexpr int32_t INT8_OFFSET = 128;
INLINE i32 multiply_add(i32 sum, i32 a, i32 b) {
  return (i32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
INLINE f32 multiply_add(f32 sum, f32 a, f32 b) { return (f32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
#else
constexpr int32_t INT8_OFFSET = 0;
INLINE i32 multiply_add(i32 sum, i32 a, i32 b) {
#if defined(__aarch64__)
  const int32x4_t low = vmull_s16(vget_low_s16((int16x8_t)b), vget_low_s16((int16x8_t)a));
  return sum + (i32)vpaddq_s32(low, vmull_high_s16((int16x8_t)b, (int16x8_t)a));
#elif !defined(__x86_64__)
  return sum + (b << 16 >> 16) * (a << 16 >> 16) + (b >> 16) * (a >> 16);
#elif VECTOR_BYTES == 64
  return sum + (i32)_mm512_madd_epi16((__m512i)b, (__m512i)a);
#elif VECTOR_BYTES == 32
  return sum + (i32)_mm256_madd_epi16((__m256i)b, (__m256i)a);
#else
  return sum + (i32)_mm_madd_epi16((__m128i)b, (__m128i)a);
#endif
}
template <class V>
INLINE V multiply_add(V sum, V a, V b) {
  return sum + b * a;
}
#endif

// Memory that is fetched into the L2 cache while a product runs: `stride` bytes further on with every step of k.
struct Ahead {
  const char* p = nullptr;
  int64_t stride = 0;
};

// c [M, V vectors] (+)= tile · the first V vectors of a panel, a tile of `rows` rows. Few rows or columns leave
// registers free: they hold several partial sums over k, which hides the latency of the multiply-add and rounds less.
// A function of its own and without special cases: compilers then keep all sums in registers.
template <class P, int M, int V, class E, class S>
NOINLINE void multiply_rows(const P* a, const E* b, int64_t k, S* c, int64_t ldc, bool add, int64_t rows, Ahead ahead) {
#if defined(__clang__)  // loads the columns of the next part early
  constexpr int ROOM = 3 * VECTOR_MR - 1;
#else
  constexpr int ROOM = HOLD_COLUMNS<P> ? 3 * VECTOR_MR : 2 * VECTOR_MR - 1;
#endif
  constexpr int PARTS = M * V * 4 <= ROOM ? 4 : M * V * 2 <= ROOM ? 2 : 1;
  constexpr int64_t W = LANES<S>;
  vec<S> acc[PARTS][M][V] = {};
  if (!ahead.p) ahead.p = reinterpret_cast<const char*>(a);
  const auto step = [&](int part) __attribute__((always_inline)) {
    vec<P> columns[V];
    __builtin_prefetch(ahead.p, 0, 2);
    ahead.p += ahead.stride;
    const auto load_columns = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) columns[v] = load_stored<P>(b + v * W * STEP<P>);
    };
    load_columns();
    if constexpr (HOLD_COLUMNS<P>)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) hold(columns[v]);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      vec<P> row = broadcast(a + m * STEP<P>);
      hold(row);
      if constexpr (!HOLD_COLUMNS<P>) {
        asm("" : "+r"(b));  // or clang would keep the columns of the row before, in registers that are not there
        load_columns();
      }
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) acc[part][m][v] = multiply_add(acc[part][m][v], row, columns[v]);
#if defined(__aarch64__)
        // Or later rows and columns would be loaded first, for which no registers are left.
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) hold(acc[part][m][v], a, b);
#endif
    }
    a += rows * STEP<P>;
    b += NR<P> * STEP<P>;
  };
  if (add)  // c comes from far away where the product has many slices: fetched while the registers fill
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) __builtin_prefetch(c + m * ldc + v * W, 1);
  const int64_t steps = packed_depth<P>(k) / STEP<P>;
  int64_t i = 0;
  for (; i + PARTS <= steps; i += PARTS)
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; ++part) step(part);
  if constexpr (PARTS > 1)
    for (; i < steps; ++i) step(0);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
#pragma GCC unroll 4
      for (int part = 1; part < PARTS; ++part) acc[0][m][v] += acc[part][m][v];
      S* out = c + m * ldc + v * W;
      store(out, add ? acc[0][m][v] + load(out) : acc[0][m][v]);
    }
}

// multiply_rows for m <= MR_BY_VECTORS rows and so many whole vectors that n columns fit, in sums of bounded length.
template <class P, class E, class S>
INLINE void multiply_vectors(const P* tile, const E* panel, int64_t k, S* c, int64_t ldc, int64_t m, int64_t n,
                             bool add, int64_t rows, Ahead ahead) {
  constexpr int64_t length = SUMMED * STEP<P>;
  const auto run = [&]<int M, int V = 3>() {
    for (int64_t k0 = 0; k0 < std::max<int64_t>(k, 1); k0 += length) {
      multiply_rows<P, M, V>(tile + k0 * rows, panel + k0 * NR<P>, std::min(length, k - k0), c, ldc, add || k0 > 0,
                             rows, ahead);
      ahead.p += SUMMED * ahead.stride;
    }
  };
  if constexpr (MR_BY_VECTORS == MR) {
    if (m == MR && n <= LANES<S>) return run.template operator()<MR, 1>();
    if (m == MR && n <= 2 * LANES<S>) return run.template operator()<MR, 2>();
  }
  const auto choose = [&]<int... M>(std::integer_sequence<int, M...>) {
    ((m == M + 1 ? run.template operator()<M + 1>() : void()), ...);
  };
  choose(std::make_integer_sequence<int, MR_BY_VECTORS>());
}

#ifdef AMX
// AMX's tile registers, named by constants.
template <int R>
INLINE void load_tile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(R) : "memory");
}
template <int R>
INLINE void store_tile(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(R) : "memory");
}
template <class P, int SUM, int A, int B>
INLINE void multiply_tiles() {
  if constexpr (std::is_integral_v<P>)
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
  else
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}
template <int N, class F>
INLINE void unrolled(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }
  (std::make_integer_sequence<int, N>());
}

// Zeros and shapes: so many registers of sums [m, n], one of A [m, ROW_STEP] and one of B, [ROW_STEP, n] in steps.
template <int SUMS>
INLINE void configure_tiles(int64_t m, int64_t n) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  for (int r = 0; r < SUMS; ++r) shapes.rows[r] = m, shapes.bytes[r] = 4 * n;
  shapes.rows[SUMS] = m, shapes.bytes[SUMS] = 64;
  shapes.rows[SUMS + 1] = 16, shapes.bytes[SUMS + 1] = 4 * n;
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}

// c [M · m, V · n] (+)= M · m rows of a tile · columns of a panel; m, n <= 16, full ones where M, V > 1.
template <class P, int M, int V, class S>
NOINLINE void multiply_block(const P* a, const P* b, int64_t k, S* c, int64_t ldc, int64_t m, int64_t n, bool add,
                             int64_t rows) {
  constexpr int A = M * V, B = A + 1;  // the registers after the sums
  configure_tiles<A>(m, n);
  const auto each_sum = [&](auto f) __attribute__((always_inline)) {
    unrolled<A>([&](auto r) __attribute__((always_inline)) { f(r, c + r / V * 16 * ldc + r % V * 16); });
  };
  if (add) each_sum([&](auto r, S* sums) __attribute__((always_inline)) { load_tile<r>(sums, ldc * sizeof(S)); });
  for (int64_t i = 0; i < k; i += ROW_STEP<P>) {
    unrolled<V>([&](auto v) __attribute__((always_inline)) {
      load_tile<B>(b + v * 16 * STEP<P>, NR<P> * STEP<P> * sizeof(P));
      unrolled<M>([&](auto r) __attribute__((always_inline)) {
        load_tile<A>(a + r * 16 * ROW_STEP<P>, 64);
        multiply_tiles<P, r * V + v, A, B>();
      });
    });
    a += rows * ROW_STEP<P>;
    b += NR<P> * ROW_STEP<P>;
  }
  each_sum([&](auto r, S* sums) __attribute__((always_inline)) { store_tile<r>(sums, ldc * sizeof(S)); });
  asm volatile("tilerelease");
}

// multiply() by AMX: whole tiles where there are such, the rest by what is left.
template <class P, class S>
INLINE void multiply_amx(const P* tile, const P* panel, int64_t k, S* c, int64_t ldc, int64_t m, int64_t n, bool add,
                         int64_t rows) {
  const auto columns = [&]<int M>(int64_t r, int64_t height) {
    const P* const a = tile + r * ROW_STEP<P>;
    S* const out = c + r * ldc;
    const int64_t whole = n / 16;
    if (whole == 3) multiply_block<P, M, 3>(a, panel, k, out, ldc, height, 16, add, rows);
    if (whole == 2) multiply_block<P, M, 2>(a, panel, k, out, ldc, height, 16, add, rows);
    if (whole == 1) multiply_block<P, M, 1>(a, panel, k, out, ldc, height, 16, add, rows);
    if (n % 16)
      multiply_block<P, M, 1>(a, panel + whole * 16 * STEP<P>, k, out + whole * 16, ldc, height, n % 16, add, rows);
  };
  if (m == 32) return columns.template operator()<2>(0, 16);
  columns.template operator()<1>(0, std::min<int64_t>(m, 16));
  if (m > 16) columns.template operator()<1>(16, m - 16);
}
#endif

// c [m, n] (+)= tile · panel, m <= MR, n <= NR; the tile has `rows` rows.
template <class P, class E, class S>
void multiply(const P* tile, const E* panel, int64_t k, S* c, int64_t ldc, int64_t m, int64_t n, bool add,
              int64_t rows = MR, Ahead ahead = {}) {
  constexpr int64_t W = NR<P>;
#ifdef AMX
  if (rows > 1) return multiply_amx(tile, panel, k, c, ldc, m, n, add, rows);
#endif
  if (n == W || (m == MR && n % LANES<S> == 0)) return multiply_vectors(tile, panel, k, c, ldc, m, n, add, rows, ahead);
  S block[MR * W];  // the end of a row: nothing is written past it
  multiply_vectors(tile, panel, k, block, W, m, n, false, rows, ahead);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) c[i * ldc + j] = add ? c[i * ldc + j] + block[i * W + j] : block[i * W + j];
}

// Memory that the next phase touches, to be fetched while products run.
class Upcoming {
 public:
  template <class T>
  void add(const T* p, int64_t n) {
    if (p) pieces_[count_++] = {reinterpret_cast<const char*>(p), (n * int64_t(sizeof(T)) + LINE - 1) / LINE};
  }
  // A line a step, or what is left of a piece and a little of what lies behind it; nothing once all is fetched.
  Ahead next(int64_t steps) {
    for (; now_ < count_; ++now_) {
      auto& [p, left] = pieces_[now_];
      if (left <= 0) continue;
      left -= steps;
      p += steps * LINE;
      return {p - steps * LINE, LINE};
    }
    return {};
  }
  bool left() const { return now_ + 1 < count_ || (now_ < count_ && pieces_[now_].second > 0); }

 private:
  std::pair<const char*, int64_t> pieces_[4];
  int count_ = 0, now_ = 0;
};

// What the i-th of so many products with k steps of a panel fetches: an even share of as many steps at `next`, so that
// they have come from far away once the last product is done; two products leave out every third line, which the
// machine fetches with its neighbor. Or, while `upcoming` has something left, as few products as can fetch them all at
// a line a step, and the others that.
template <class P, class E>
INLINE Ahead share_ahead(const E* next, int64_t k, int64_t i, int64_t products, Upcoming* upcoming = nullptr) {
  constexpr int64_t STEP_BYTES = NR<P> * STEP<P> * int64_t(sizeof(E)), LEAST = (STEP_BYTES + LINE - 1) / LINE;
  if (products < std::min<int64_t>(2, LEAST)) return {};  // left to the machine
  const int64_t fetching = upcoming && upcoming->left() ? std::min(LEAST, products) : products;
  if (i >= fetching) return upcoming->next(k / STEP<P>);
  return {reinterpret_cast<const char*>(next) + i * (k / STEP<P> * STEP_BYTES / fetching),
          (STEP_BYTES + fetching - 1) / fetching};
}

// A matrix in memory, element (i, j) at p[i · si + j · sj].
template <class T>
struct Strided {
  const T* p;
  int64_t si, sj;
  const T* at(int64_t i, int64_t j) const { return p + i * si + j * sj; }
};

// The whole right operand b [k, n] as panels, packed by the team together; the caller waits.
template <class P, class T>
void pack_panels(const Team& team, Strided<T> b, int64_t k, int64_t n, P* out) {
  const auto [p0, p1] = team.share(num_panels<P>(n));
  for (int64_t p = p0; p < p1; ++p)
    pack_panel(b.at(0, p * NR<P>), b.si, b.sj, k, std::min(NR<P>, n - p * NR<P>), out + p * packed_depth<P>(k) * NR<P>);
}

// c [m, n] (+)= tiles [t0, t1) · one panel: steps [k0, k1) of k, of `depth` that there are. Then `next` is wanted.
template <class P>
INLINE void multiply_panel(const P* a, int64_t t0, int64_t t1, const P* panel, int64_t k0, int64_t k1, int64_t depth,
                           opmath_type<P>* c, int64_t ldc, int64_t m, int64_t n, bool add, const P* next,
                           Upcoming* upcoming) {
  constexpr int64_t W = NR<P>;
  for (int64_t k = k0; k < std::max(k1, k0 + 1); k += KC<P>) {
    const int64_t here = std::min(KC<P>, k1 - k);
    const P* const ahead = k + here < k1 ? panel + (k + here) * W : next;
    for (int64_t t = t0; t < t1; ++t)
      multiply(a + (t * depth + k) * MR, panel + k * W, here, c + t * MR * ldc, ldc, std::min(MR, m - t * MR), n,
               add || k > 0, MR, share_ahead<P>(ahead, here, t - t0, t1 - t0, upcoming));
  }
}

// c [m, n] (+)= tiles · panels: this thread's share of the (panel, tile) pairs; the caller waits. `depth`: how deep
// tiles and panels are, where k is only a part of that. All panels pass for each slice of k where the tiles are too
// many for the L2 cache. `backwards` takes the panels in that order.
template <class P>
void multiply_panels(const Team& team, const P* a, const P* b, int64_t k, opmath_type<P>* c, int64_t ldc, int64_t m,
                     int64_t n, bool add = false, int64_t depth = 0, Upcoming* upcoming = nullptr,
                     bool backwards = false) {
  const int64_t rows = num_tiles(m);
  if (!depth) depth = packed_depth<P>(k);
  const auto [i0, i1] = team.share(num_panels<P>(n) * rows);
  const int64_t own_rows = std::min(rows, i1 - i0) * MR;
  const int64_t together = own_rows * k * int64_t(sizeof(P)) > L2_BYTES ? KC<P> : std::max<int64_t>(k, 1);
  for (int64_t first = 0; first < std::max<int64_t>(k, 1); first += together)
    for (int64_t done = 0; done < i1 - i0;) {
      const int64_t i = backwards ? i1 - 1 - done : i0 + done, p = i / rows;
      const int64_t t0 = std::max<int64_t>(0, i0 - p * rows), t1 = std::min(rows, i1 - p * rows);
      const int64_t following = backwards ? std::max<int64_t>(0, p - 1) : p + 1;
      multiply_panel(a, t0, t1, b + p * depth * NR<P>, first, std::min(k, first + together), depth, c + p * NR<P>, ldc,
                     m, std::min(NR<P>, n - p * NR<P>), add, b + (following * depth + first) * NR<P>, upcoming);
      done += t1 - t0;
    }
}

// Tiles [t0, t1) of steps [k0, k0 + depth) of a [m, ·], to where tile t0 is to be.
template <class P, class T>
INLINE void pack_tiles(Strided<T> a, int64_t m, int64_t k0, int64_t depth, int64_t t0, int64_t t1, P* tile) {
  const int64_t length = packed_depth<P>(depth) * MR;
  // A step of as many tiles as share a line of it. Those of operands that stand alone are faster one by one.
  constexpr int64_t TOGETHER = STEP<P> == 1 ? 1 : std::max<int64_t>(1, LINE / (MR * int64_t(sizeof(T))));
  for (int64_t t = t0; t < t1;) {
    const int64_t r0 = t * MR, rows = std::min(MR, m - r0);
    int64_t together = 1;
    if (a.si == 1 && (ROW_STEP<P> > STEP<P> || rows == MR)) {
      if (t + TOGETHER <= t1 && r0 + TOGETHER * MR <= m) together = TOGETHER;
      for (int64_t i = 0; i < depth; i += ROW_STEP<P>) {
        if constexpr (ROW_STEP<P> == STEP<P>) {
          for (int64_t j = 0; j < together; ++j)
            pack_steps(a.at(r0 + j * MR, k0 + i), a.sj, std::min(STEP<P>, depth - i), MR, tile + j * length + i * MR);
        } else {
          const T* columns[ROW_STEP<P>];
          for (int64_t s = 0; s < ROW_STEP<P>; ++s) columns[s] = i + s < depth ? a.at(r0, k0 + i + s) : nullptr;
          pack_transposed(columns, rows, tile + i * MR);
        }
      }
    } else {
      for (int64_t r = 0; r < rows; ++r) pack_row(a.at(r0 + r, k0), a.sj, depth, tile + r * ROW_STEP<P>);
    }
    t += together, tile += together * length;
  }
}

// c [m, n] (+)= a [m, k] · b [k, n], by the whole team, operands of tensors of T. Every thread of the team must call
// it; c is complete on return. Threads share tiles: each packs a few of its own at a time, which stay in the L2 cache
// while panels that the team has packed pass. Or, where tiles are few, panels: each packs all tiles, and a panel of its
// own at a time.
template <class T, class TA, class TB>
void gemm(Team& team, int64_t m, int64_t n, int64_t k, Strided<TA> a, Strided<TB> b, opmath_type<T>* c, int64_t ldc,
          bool add, void* scratch) {
  using P = Packed<T>;
  constexpr int64_t W = NR<P>;
  constexpr int64_t TILES = std::min(TOGETHER_ROWS, L2_BYTES / (KC<P> * int64_t(sizeof(P)))) / MR;
  const int64_t tiles = num_tiles(m), panels = num_panels<P>(n);
  const bool by_panels = shares_columns(m, n);
  const auto [i0, i1] = team.share(by_panels ? panels : tiles);
  P* const packed = static_cast<P*>(scratch);
  P* const own_a = packed + (by_panels ? team.id * (tiles * MR + W) : panels * W + team.id * TOGETHER_ROWS) * KC<P>;
  for (int64_t k0 = 0; k0 < k; k0 += KC<P>) {
    const int64_t depth = std::min(KC<P>, k - k0), length = packed_depth<P>(depth);
    const auto product = [&](const P* tile, const P* panel, int64_t t, int64_t p, Ahead ahead) {
      multiply(tile, panel, depth, c + t * MR * ldc + p * W, ldc, std::min(MR, m - t * MR), std::min(W, n - p * W),
               add || k0 > 0, MR, ahead);
    };
    if (by_panels) {
      P* const panel = own_a + tiles * MR * KC<P>;
      pack_tiles(a, m, k0, depth, 0, tiles, own_a);
      for (int64_t p = i0; p < i1; ++p) {
        pack_panel(b.at(k0, p * W), b.si, b.sj, depth, std::min(W, n - p * W), panel);
        for (int64_t t = 0; t < tiles; ++t) product(own_a + t * length * MR, panel, t, p, {});
      }
      continue;
    }
    pack_panels(team, Strided<TB>{b.at(k0, 0), b.si, b.sj}, depth, n, packed);
    team.wait();
    Upcoming upcoming;  // the next slice
    if (const int64_t later = std::min(KC<P>, k - k0 - depth); later > 0) {
      const auto [l0, l1] = team.share(later);
      if (b.sj == 1) upcoming.add(b.at(k0 + depth + l0, 0), (l1 - l0) * b.si);
      if (a.si == 1) upcoming.add(a.at(0, k0 + depth + l0), (l1 - l0) * a.sj);
    }
    for (int64_t t0 = i0; t0 < i1; t0 += TILES) {
      const int64_t here = std::min(TILES, i1 - t0);
      pack_tiles(a, m, k0, depth, t0, t0 + here, own_a);
      for (int64_t p = 0; p < panels; ++p) {
        const P* const panel = packed + p * length * W;
        for (int64_t t = 0; t < here; ++t)
          product(own_a + t * length * MR, panel, t0 + t, p,
                  share_ahead<P>(panel + length * W, depth, t, here, &upcoming));
      }
    }
    team.wait();
  }
  if (by_panels) team.wait();
}
