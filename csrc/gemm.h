// Matrix products on packed operands. Included once per level by foreach_isa.h.
//   A is packed in tiles of ROWS rows, [K][ROWS]; B in panels of PANEL columns, [K][PANEL], padded with zeros.
// One tile times one panel fills the register file: ROWS x 3 accumulators (24 of 32 registers, or 12 of 16).

constexpr int64_t ROWS = VECTOR_BYTES == 64 ? 8 : 4;
template <class S>
constexpr int64_t PANEL = 3 * LANES<S>;

template <class S>
constexpr int64_t panels(int64_t n) {
  return (n + PANEL<S> - 1) / PANEL<S>;
}
constexpr int64_t tiles(int64_t m) { return (m + ROWS - 1) / ROWS; }

// Row m of A goes to lane m % ROWS of its tile: out = tile + lane. A null row is zeros.
template <class T, class S>
INLINE void pack_row(const T* row, int64_t stride, int64_t k, S* out) {
  for (int64_t i = 0; i < k; ++i) out[i * ROWS] = row ? S(row[i * stride]) : S(0);
}

// Columns [0, n) of b(k, n) = b[k · bk + n · bn] to one panel; n <= PANEL.
template <class T, class S>
void pack_panel(const T* b, int64_t bk, int64_t bn, int64_t k, int64_t n, S* out) {
  if (n < PANEL<S>) std::memset(out, 0, k * PANEL<S> * sizeof(S));
  if (bn == 1) {
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = 0; j < n; ++j) out[i * PANEL<S> + j] = S(b[i * bk + j]);
  } else {
    for (int64_t i0 = 0; i0 < k; i0 += 16)  // blocks keep both sides of the transposition in cache
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = i0; i < std::min(i0 + 16, k); ++i) out[i * PANEL<S> + j] = S(b[i * bk + j * bn]);
  }
}

// c [M, n] (+)= tile · panel. Few rows leave registers free: they hold several partial sums over k, which hides the
// latency of the multiply-add and rounds less.
template <class S, int M>
INLINE void multiply_rows(const S* a, const S* b, int64_t k, S* c, int64_t ldc, int64_t n, bool add) {
  constexpr int PARTS = M * 4 <= ROWS ? 4 : M * 2 <= ROWS ? 2 : 1;
  vec<S> acc[PARTS][M][3] = {};
  const auto step = [&](int part) __attribute__((always_inline)) {
    const vec<S> b0 = load(b), b1 = load(b + LANES<S>), b2 = load(b + 2 * LANES<S>);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      acc[part][m][0] += b0 * a[m];
      acc[part][m][1] += b1 * a[m];
      acc[part][m][2] += b2 * a[m];
    }
    a += ROWS;
    b += PANEL<S>;
  };
  int64_t i = 0;
  for (; i + PARTS <= k; i += PARTS)
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; ++part) step(part);
  for (; i < k; ++i) step(0);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
    for (int v = 0; v < 3; ++v) {
      const int64_t left = n - v * LANES<S>;
      if (left <= 0) break;
#pragma GCC unroll 4
      for (int part = 1; part < PARTS; ++part) acc[0][m][v] += acc[part][m][v];
      S* out = c + m * ldc + v * LANES<S>;
      store(out, add ? acc[0][m][v] + load(out, left) : acc[0][m][v], left);
    }
}

// c [m, n] (+)= tile · panel, m <= ROWS, n <= PANEL.
template <class S>
void multiply(const S* tile, const S* panel, int64_t k, S* c, int64_t ldc, int64_t m, int64_t n, bool add) {
  switch (m) {
    case 1:
      return multiply_rows<S, 1>(tile, panel, k, c, ldc, n, add);
    case 2:
      return multiply_rows<S, 2>(tile, panel, k, c, ldc, n, add);
    case 3:
      return multiply_rows<S, 3>(tile, panel, k, c, ldc, n, add);
    case 4:
      return multiply_rows<S, 4>(tile, panel, k, c, ldc, n, add);
  }
  if constexpr (ROWS == 8) switch (m) {
      case 5:
        return multiply_rows<S, 5>(tile, panel, k, c, ldc, n, add);
      case 6:
        return multiply_rows<S, 6>(tile, panel, k, c, ldc, n, add);
      case 7:
        return multiply_rows<S, 7>(tile, panel, k, c, ldc, n, add);
      case 8:
        return multiply_rows<S, 8>(tile, panel, k, c, ldc, n, add);
    }
}

// A matrix in memory, element (i, j) at p[i · si + j · sj].
template <class T>
struct Matrix {
  const T* p;
  int64_t si, sj;
  const T* at(int64_t i, int64_t j) const { return p + i * si + j * sj; }
};

// The whole right operand b [k, n] as panels, packed by the team together; the caller waits.
template <class T, class S>
void pack_panels(const Team& team, Matrix<T> b, int64_t k, int64_t n, S* out) {
  const auto [p0, p1] = team.share(panels<S>(n));
  for (int64_t p = p0; p < p1; ++p)
    pack_panel(b.at(0, p * PANEL<S>), b.si, b.sj, k, std::min(PANEL<S>, n - p * PANEL<S>), out + p * k * PANEL<S>);
}

// This thread's panels of c [m, n] = tiles · panels, for the recurrences. Slices of k bound the rounding of long sums.
template <class S>
void multiply_panels(const Team& team, const S* a, const S* b, int64_t k, S* c, int64_t ldc, int64_t m, int64_t n) {
  const auto [p0, p1] = team.share(panels<S>(n));
  for (int64_t p = p0; p < p1; ++p)
    for (int64_t k0 = 0; k0 < std::max<int64_t>(k, 1); k0 += DEPTH)
      for (int64_t t = 0; t < tiles(m); ++t)
        multiply(a + (t * k + k0) * ROWS, b + (p * k + k0) * PANEL<S>, std::min(DEPTH, k - k0),
                 c + t * ROWS * ldc + p * PANEL<S>, ldc, std::min(ROWS, m - t * ROWS),
                 std::min(PANEL<S>, n - p * PANEL<S>), k0 > 0);
}

// c [m, n] (+)= a [m, k] · b [k, n], by the whole team. Every thread of the team must call it; c is complete on return.
template <class S, class TA, class TB>
void gemm(Team& team, int64_t m, int64_t n, int64_t k, Matrix<TA> a, Matrix<TB> b, S* c, int64_t ldc, bool add,
          S* scratch) {
  S* panel = scratch + (tiles(m) * ROWS + team.id * PANEL<S>)*DEPTH;
  const auto [t0, t1] = team.share(tiles(m));
  const auto [p0, p1] = team.share(panels<S>(n));
  for (int64_t k0 = 0; k0 < k; k0 += DEPTH) {
    const int64_t depth = std::min(DEPTH, k - k0);
    for (int64_t t = t0; t < t1; ++t) {
      S* tile = scratch + t * ROWS * DEPTH;
      if (a.si == 1 && (t + 1) * ROWS <= m) {
        for (int64_t i = 0; i < depth; ++i)
          for (int64_t r = 0; r < ROWS; ++r) tile[i * ROWS + r] = S(a.at(t * ROWS + r, k0 + i)[0]);
      } else {
        for (int64_t r = 0; r < std::min(ROWS, m - t * ROWS); ++r)
          pack_row(a.at(t * ROWS + r, k0), a.sj, depth, tile + r);
      }
    }
    team.wait();
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t columns = std::min(PANEL<S>, n - p * PANEL<S>);
      pack_panel(b.at(k0, p * PANEL<S>), b.si, b.sj, depth, columns, panel);
      for (int64_t t = 0; t < tiles(m); ++t)
        multiply(scratch + t * ROWS * DEPTH, panel, depth, c + t * ROWS * ldc + p * PANEL<S>, ldc,
                 std::min(ROWS, m - t * ROWS), columns, add || k0 > 0);
    }
    team.wait();
  }
}
