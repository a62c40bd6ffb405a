// Highway masked convolution, forward and backward. Equations: fastvae/ops/highway_conv.py.
// Rows are (t, b) pairs, n = T · B of them; the row before (t, b) in time lies B rows above it.

// out[k] = Σ over rows of value(row, k) for this thread's columns, in double: sums over thousands of rows must not
// drift.
template <class F>
INLINE void column_sums(const Team& team, int64_t rows, int64_t columns, double* out, F value) {
  const auto [k0, k1] = team.share(columns);
  std::fill(out + k0, out + k1, 0.0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = k0; k < k1; ++k) out[k] += value(r, k);
}

// Panels of [W₀; W₁], each tap k deep: element (k, n) of tap t at weight[k · wk + n · wn + t], wk or wn 2. Blocks of it
// are first taken apart, for a panel is packed fast from what is contiguous.
template <class T>
void pack_taps(const Team& team, const T* weight, int64_t wk, int64_t wn, int64_t k, int64_t n, Packed<T>* out) {
  using P = Packed<T>;
  constexpr int64_t W = NR<P>, DEEP = 64;
  static_assert(DEEP % ROW_STEP<P> == 0);
  T block[2][W * DEEP];
  const bool along_k = wk == 2;
  const auto [p0, p1] = team.share(num_panels<P>(n));
  for (int64_t p = p0; p < p1; ++p)
    for (int64_t k0 = 0; k0 < k; k0 += DEEP) {
      const int64_t depth = std::min(DEEP, k - k0), columns = std::min(W, n - p * W);
      const int64_t lines = along_k ? columns : depth, length = along_k ? depth : columns, width = along_k ? DEEP : W;
      const T* from = weight + k0 * wk + p * W * wn;
      for (int64_t l = 0; l < lines; ++l, from += along_k ? wn : wk)
        for (int64_t i = 0; i < length; ++i)
          block[0][l * width + i] = from[2 * i], block[1][l * width + i] = from[2 * i + 1];
      for (int64_t tap = 0; tap < 2; ++tap)
        pack_panel(block[tap], along_k ? 1 : W, along_k ? DEEP : 1, depth, columns,
                   out + (2 * p + tap) * packed_depth<P>(k) * W + k0 * W);
    }
}

// Tiles of rows [r0, r0 + m): k runs over x of the row before, then of the row itself.
template <class T>
void pack_inputs(const T* x, int64_t B, int64_t C, int64_t r0, int64_t m, Packed<T>* out) {
  const int64_t depth = packed_depth<Packed<T>>(C);
  for (int64_t r = 0; r < m; r += MR) {
    const T* rows[2][MR] = {};
    for (int64_t i = 0; i < std::min(MR, m - r); ++i) {
      rows[1][i] = x + (r0 + r + i) * C;
      if (r0 + r + i >= B) rows[0][i] = rows[1][i] - B * C;
    }
    for (int64_t tap = 0; tap < 2; ++tap) pack_tile(rows[tap], C, tile_at(out, 2 * depth, r, tap * depth));
  }
}

// c [m, n] = packed_a · packed_b, both taps: two sums of half the depth, for the shorter sum rounds less.
template <class P>
void multiply_taps(const Team& team, const P* a, const P* b, int64_t depth, opmath_type<P>* c, int64_t ldc, int64_t m,
                   int64_t n, Upcoming* upcoming = nullptr) {
  multiply_panels(team, a, b, depth / 2, c, ldc, m, n, false, depth, upcoming);
  multiply_panels(team, a + depth / 2 * MR, b + depth / 2 * NR<P>, depth / 2, c, ldc, m, n, true, depth, upcoming);
}

// a = product + b of m rows and up to a panel of columns, rounded to T, with statistics of what was rounded, safe at
// any offset: a pivot near the mean, Σ (a − pivot), Σ (a − pivot)². The pivot of equal values is their value.
template <class T>
INLINE void finish_panel(opmath_type<T>* product, int64_t m, int64_t columns, const T* bias, T* a,
                         opmath_type<T>* statistics, int64_t G) {
  using V = vec<T>;
  constexpr int64_t W = LANES<T>, L = 3 * W;
  V first[3], pivot[3], sum[3] = {}, rest[3] = {}, squares[3] = {};
  for (int64_t r = 0; r < m; ++r)
#pragma GCC unroll 3
    for (int64_t v = 0; v < 3; ++v) {
      const int64_t left = columns - v * W;
      if (left <= 0) break;
      T* to = a + r * G + v * W;
      store(to, load(product + r * L + v * W) + load(bias + v * W, left), left);
      const V value = load(to, left);
      store(product + r * L + v * W, value);
      if (r == 0) first[v] = value;
      sum[v] += value - first[v];
    }
#pragma GCC unroll 3
  for (int64_t v = 0; v < 3; ++v) pivot[v] = first[v] + sum[v] / opmath_type<T>(m);
  for (int64_t r = 0; r < m; ++r)
#pragma GCC unroll 3
    for (int64_t v = 0; v < 3; ++v) {
      const V d = load(product + r * L + v * W) - pivot[v];
      rest[v] += d;
      squares[v] += d * d;
    }
#pragma GCC unroll 3
  for (int64_t v = 0; v < 3; ++v) {
    const int64_t left = columns - v * W;
    if (left <= 0) break;
    store(statistics + v * W, pivot[v], left);
    store(statistics + G + v * W, rest[v], left);
    store(statistics + 2 * G + v * W, squares[v], left);
  }
}

// a = W₀ x₋ + W₁ x + b with column means and sums of squared deviations: slab by slab, a slab panel by panel.
template <class T>
void highway_conv_project(Team& team, const HighwayProject<T>& s) {
  using S = opmath_type<T>;
  using P = Packed<T>;
  const int64_t C = s.C, G = 3 * s.C, n = s.steps * s.B, depth = 2 * packed_depth<P>(C);
  P* const packed = static_cast<P*>(s.packed_b);
  pack_taps(team, s.weight, 2, 2 * C, C, G, packed);
  team.wait();
  P* const slab_tiles = static_cast<P*>(s.packed_a) + team.id * SLAB * depth;
  S* const product = s.product + team.id * SLAB * NR<P>;
  const Team alone{0, 1, team.barrier};
  const auto [s0, s1] = team.share(slabs(n));
  for (int64_t slab = s0; slab < s1; ++slab) {
    const int64_t r0 = slab * SLAB, m = std::min(SLAB, n - r0);
    pack_inputs(s.x, s.B, C, r0, m, slab_tiles);
    Upcoming upcoming;
    upcoming.add(s.a + r0 * G, m * G);
    for (int64_t j = 0; j < G; j += NR<P>) {
      const int64_t columns = std::min(NR<P>, G - j);
      multiply_taps(alone, slab_tiles, packed + j * depth, depth, product, NR<P>, m, columns, &upcoming);
      finish_panel(product, m, columns, s.bias + j, s.a + r0 * G + j, s.statistics + slab * 3 * G + j, G);
    }
  }
  team.wait();
  const auto rows = [&](int64_t slab) { return double(std::min(SLAB, n - slab * SLAB)); };
  const auto part = [&](int64_t slab, int which, int64_t k) {
    return double(s.statistics[(slab * 3 + which) * G + k]);
  };
  double *const mean = s.sums, *const m2 = s.sums + G;
  column_sums(team, slabs(n), G, mean,
              [&](int64_t i, int64_t k) { return (rows(i) * part(i, 0, k) + part(i, 1, k)) / double(n); });
  column_sums(team, slabs(n), G, m2, [&](int64_t i, int64_t k) {
    const double rest = part(i, 1, k), distance = part(i, 0, k) + rest / rows(i) - mean[k];
    return part(i, 2, k) - rest * rest / rows(i) + rows(i) * distance * distance;
  });
  const auto [k0, k1] = team.share(G);
  for (int64_t k = k0; k < k1; ++k) {
    if (!std::isfinite(mean[k])) {  // where ∞ − pivot is NaN, the plain mean may be ∞
      mean[k] = 0;
      for (int64_t r = 0; r < n; ++r) mean[k] += double(opmath_type<T>(s.a[r * G + k])) / double(n);
    }
    s.mean[k] = S(mean[k]);
    s.m2[k] = S(std::max(m2[k], 0.0));
  }
}

// `count` rows x of n values, from k on, to packed operands WIDTH wide: packed_b, or packed_a of their transpose. Null
// rows are zeros; k and count are whole steps. Panel by panel: rows of many of them may share a set of the L1 cache.
template <int64_t WIDTH, class P, class T>
INLINE void put_rows(const T* const (&x)[MR], int64_t count, int64_t n, int64_t k, int64_t depth, P* out) {
  constexpr int64_t step = STEP<P>;
  out += k * WIDTH;
  for (int64_t j0 = 0; j0 < n; j0 += WIDTH, out += depth * WIDTH)
    for (int64_t i = 0; i < count; i += step) {
      P* const to = out + i * WIDTH;
      if (n - j0 >= WIDTH && x[i] && x[i + step - 1])
        pack_steps(x[i] + j0, x[i + step - 1] - x[i], step, WIDTH, to);
      else
        for (int64_t j = 0; j < WIDTH; ++j)
          for (int64_t s = 0; s < step; ++s)
            to[j * step + s] = x[i + s] && j0 + j < n ? convert<P>(x[i + s][j0 + j]) : P(0);
    }
}

// MR rows x of n values, from k on, to packed_a of their transpose. Null rows are zeros.
template <class P, class T>
INLINE void put_transposed(const T* const (&x)[MR], int64_t n, int64_t k, int64_t depth, P* packed_a) {
  if constexpr (ROW_STEP<P> == STEP<P>) {
    put_rows<MR>(x, std::min(MR, depth - k), n, k, depth, packed_a);
  } else {
    static_assert(ROW_STEP<P> == MR);
    for (int64_t j = 0; j < n; j += MR) {
      const T* rows[MR];
      for (int64_t i = 0; i < MR; ++i) rows[i] = x[i] ? x[i] + j : nullptr;
      pack_transposed(rows, std::min(MR, n - j), tile_at(packed_a, depth, j, k));
    }
  }
}

// Rows here are those of packed operands that run over (t, b): every time step's B rows, padded to whole steps of B's.
template <class T>
void highway_conv_project_backward(Team& team, const HighwayProjectBackward<T>& s) {
  using S = opmath_type<T>;
  using P = Packed<T>;
  const int64_t C = s.C, G = 3 * s.C, B = (s.B + STEP<P> - 1) / STEP<P> * STEP<P>, n = s.steps * B;
  const int64_t depth = packed_depth<P>(G);
  // Products over all rows start at row 0 or B and end with a whole step of A's: rows past n are zeros.
  const int64_t all = packed_depth<P>(n) + (ROW_STEP<P> > STEP<P> ? ROW_STEP<P> : 0);
  P* const weights = static_cast<P*>(s.packed_b);
  P* const da_panels = static_cast<P*>(s.da_panels);
  P* const x_tiles = static_cast<P*>(s.x_tiles);
  pack_taps(team, s.weight, 2 * C, 2, G, C, weights);
  team.wait();
  P* const slab_tiles = static_cast<P*>(s.packed_a) + team.id * SLAB * depth;
  P* const rows = static_cast<P*>(s.rows) + team.id * MR * G;
  S* const product = s.product + team.id * SLAB * NR<P>;
  S* const kept = s.kept + team.id * s.kept_rows * C;
  S* const slab_sums = s.slab_sums + team.id * G;
  double* const sums = s.sums + team.id * G;
  std::fill(sums, sums + G, 0.0);
  // Which row of the tensors row k is, or −1: padding, or past the end.
  const auto source = [&](int64_t k) { return k < n && k % B < s.B ? k / B * s.B + k % B : -1; };
  // da with what reaches a through its statistics: d mean / d a = 1 / n, d m2 / d a = 2 (a − mean).
  const auto total = [&](int64_t r, P* out, bool add_up) {
    const S share = S(1) / S(s.steps * s.B);
    for (int64_t j = 0; j < G; j += LANES<T>) {
      const int64_t left = G - j;
      const vec<T> da = load(s.da + r * G + j, left), d = load(s.a + r * G + j, left) - load(s.mean + j, left);
      store(out + j, da + load(s.dmean + j, left) * share + 2 * load(s.dm2 + j, left) * d, left);
      if (add_up) store(slab_sums + j, load(slab_sums + j, left) + da, left);
    }
  };
  const auto [s0, s1] = team.share(slabs(all));
  const int64_t first = s0 * SLAB, last = std::min(s1 * SLAB, all);
  // dx = da₊ W₀ + da W₁, da₊ that of the row after. Of a slab of da, the second part waits until the first of the row
  // after is there; past this thread's rows, only the first is wanted.
  for (int64_t k0 = first; first < last && k0 < last + B; k0 += SLAB) {
    const int64_t m = std::min(SLAB, last + B - k0);
    const bool own = k0 < last;
    std::fill(slab_sums, slab_sums + G, S(0));
    for (int64_t i0 = 0; i0 < m && k0 < all; i0 += MR) {
      const P* tile[MR];
      const T* x[MR];
      for (int64_t i = 0; i < MR; ++i) {
        const int64_t r = i0 + i < m ? source(k0 + i0 + i) : -1;
        tile[i] = r < 0 ? nullptr : rows + i * G;
        x[i] = r < 0 ? nullptr : s.x + r * C;
        if (r >= 0) total(r, rows + i * G, own);
      }
      pack_tile(tile, G, tile_at(slab_tiles, depth, i0));
      if (!own || k0 + i0 >= all) continue;
      put_rows<NR<P>>(tile, std::min(MR, all - k0 - i0), G, k0 + i0, all, da_panels);
      put_transposed(x, C, k0 + i0, all, x_tiles);
    }
    if (own)
      for (int64_t j = 0; j < G; ++j) sums[j] += double(slab_sums[j]);
    Upcoming upcoming;  // what the next slab is made of
    if (const int64_t r = k0 + SLAB, later = std::min({SLAB, n - r, last + B - r}); B == s.B && later > 0) {
      upcoming.add(s.da + r * G, later * G);
      upcoming.add(s.a + r * G, later * G);
    }
    // Every other slab takes the panels backwards: those used last are still in the L2 cache.
    const int64_t end = 2 * num_panels<P>(C) - 1, backwards = k0 / SLAB % 2;
    const bool before = k0 + m > first + B;
    for (int64_t done = 0; done <= end; ++done) {
      const int64_t i = backwards ? end - done : done, next = backwards ? std::max<int64_t>(i - 1, 0) : i + 1;
      const int64_t tap = i % 2, j = i / 2 * NR<P>, columns = std::min(NR<P>, C - j);
      const auto multiply_tap = [&](S* c, int64_t ldc) {
        multiply_panel(slab_tiles, 0, num_tiles(m), weights + i * depth * NR<P>, 0, G, depth, c, ldc, m, columns, false,
                       weights + next * depth * NR<P>, &upcoming);
      };
      if (tap == 1 && own) multiply_tap(kept + k0 % s.kept_rows * C + j, C);
      if (tap == 0 && before && k0 < all) multiply_tap(product, NR<P>);
      if (tap == 0 && before && k0 >= all) std::fill(product, product + m * NR<P>, S(0));
      if (tap == backwards || !before) continue;  // until both are there
      for (int64_t k = std::max(k0, first + B); k < k0 + m; ++k) {
        const int64_t r = source(k - B);
        const S* const other = kept + (k - B) % s.kept_rows * C + j;
        for (int64_t v = 0; r >= 0 && v < columns; v += LANES<T>)
          store(s.dx + r * C + j + v, load(product + (k - k0) * NR<P> + v) + load(other + v, columns - v), columns - v);
      }
    }
  }
  team.wait();
  // dW₀ᵀ = x₋ᵀ da, dW₁ᵀ = xᵀ da
  S *const dw0 = s.dw, *const dw1 = s.dw + C * G;
  multiply_panels(team, x_tiles, da_panels + B * NR<P>, n - B, dw0, G, C, G, false, all);
  multiply_panels(team, x_tiles, da_panels, n, dw1, G, C, G, false, all);
  team.wait();
  const auto [g0, g1] = team.share(G);
  for (int64_t g = g0; g < g1; ++g) {
    // A bias moves the mean alone: Σ (a − mean) = 0, exactly so only on paper.
    double dbias = double(s.dmean[g]);
    for (int t = 0; t < team.size; ++t) dbias += s.sums[t * G + g];
    s.dbias[g] = T(S(dbias));
  }
  for (int64_t b0 = g0; b0 < g1; b0 += 16)  // blocks keep both sides of the transposition in cache
    for (int64_t c = 0; c < C; ++c)
      for (int64_t g = b0; g < std::min(b0 + 16, g1); ++g) {
        s.dweight[(g * C + c) * 2] = T(dw0[c * G + g]);
        s.dweight[(g * C + c) * 2 + 1] = T(dw1[c * G + g]);
      }
}

// y = σ(f) x + σ(i) tanh(g) for one row of normalized pre-activations z(q, k, lanes), q in i, f, g.
template <class T, class Z>
INLINE void gate_row(Z z, const T* x, T* y, int64_t C, bool carry) {
  for (int64_t k = 0; k < C; k += LANES<T>) {
    const int64_t n = C - k;
    vec<T> v = sigmoid(z(0, k, n)) * tanh(z(2, k, n));
    if (carry) v += sigmoid(z(1, k, n)) * load(x + k, n);
    store(y + k, v, n);
  }
}

template <class T>
void highway_conv_gate(Team& team, const HighwayGate<T>& s) {
  const int64_t C = s.C;
  const auto [r0, r1] = team.share(s.rows);
  for (int64_t r = r0; r < r1; ++r) {
    const auto z = [&](int q, int64_t k, int64_t n) __attribute__((always_inline)) {
      const int64_t j = q * C + k;
      return (load(s.a + r * 3 * C + j, n) - load(s.mean + j, n)) * load(s.scale + j, n) + load(s.shift + j, n);
    };
    gate_row(z, s.x + r * C, s.y + r * C, C, s.carry);
  }
}

template <class T>
void highway_conv_gate_backward(Team& team, const HighwayGateBackward<T>& s) {
  const int64_t C = s.C, G = 3 * s.C;
  double* sums = s.sums + team.id * 2 * G;  // of dz and of dz (a − mean), this thread's rows
  opmath_type<T>* row = s.row_sums + team.id * 2 * G;
  std::fill(sums, sums + 2 * G, 0.0);
  const auto [r0, r1] = team.share(s.rows);
  for (int64_t r = r0; r < r1; ++r) {
    for (int64_t k = 0; k < C; k += LANES<T>) {
      const int64_t n = C - k;
      vec<T> d[3], z[3];
#pragma GCC unroll 3
      for (int q = 0; q < 3; ++q) {
        const int64_t j = q * C + k;
        d[q] = load(s.a + r * G + j, n) - load(s.mean + j, n);
        z[q] = d[q] * load(s.scale + j, n) + load(s.shift + j, n);
      }
      vec<T> i_slope, f_slope, g_slope;
      const vec<T> i = sigmoid(z[0], &i_slope), f = sigmoid(z[1], &f_slope), g = tanh(z[2], &g_slope);
      const vec<T> dy = load(s.dy + r * C + k, n);
      const vec<T> through = s.carry ? dy * f : vec<T>{};
      const vec<T> df = s.carry ? dy * load(s.x + r * C + k, n) * f_slope : vec<T>{};
      const vec<T> dz[3] = {dy * g * i_slope, df, dy * i * g_slope};
      store(s.dx + r * C + k, through, n);
#pragma GCC unroll 3
      for (int q = 0; q < 3; ++q) {
        const int64_t j = q * C + k;
        store(s.da + r * G + j, dz[q] * load(s.scale + j, n), n);
        store(row + j, dz[q], n);
        store(row + G + j, dz[q] * d[q], n);
      }
    }
    for (int64_t k = 0; k < 2 * G; ++k) sums[k] += double(row[k]);
  }
  team.wait();
  const auto [k0, k1] = team.share(G);
  for (int64_t k = k0; k < k1; ++k) {
    double dz = 0, along = 0;
    for (int t = 0; t < team.size; ++t) dz += s.sums[t * 2 * G + k], along += s.sums[(t * 2 + 1) * G + k];
    s.dshift[k] = opmath_type<T>(dz);
    s.dscale[k] = opmath_type<T>(along);
    s.dmean[k] = opmath_type<T>(-dz * double(s.scale[k]));
  }
}

// The folded layer: a slab of rows at a time, so that its pre-activations never leave the cache.
template <class T>
void highway_conv(Team& team, const HighwayFolded<T>& s) {
  using S = opmath_type<T>;
  using P = Packed<T>;
  const int64_t C = s.C, G = 3 * s.C, n = s.steps * s.B, depth = 2 * packed_depth<P>(C);
  P* const packed = static_cast<P*>(s.packed_b);
  pack_taps(team, s.weight, 2, 2 * C, C, G, packed);
  team.wait();
  S* slab_a = s.a + team.id * SLAB * G;
  P* slab_tiles = static_cast<P*>(s.packed_a) + team.id * SLAB * depth;
  const Team alone{0, 1, team.barrier};
  const auto [s0, s1] = team.share(slabs(n));
  for (int64_t r0 = s0 * SLAB; r0 < std::min(s1 * SLAB, n); r0 += SLAB) {
    const int64_t m = std::min(SLAB, n - r0);
    pack_inputs(s.x, s.B, C, r0, m, slab_tiles);
    multiply_taps(alone, slab_tiles, packed, depth, slab_a, G, m, G);
    for (int64_t r = 0; r < m; ++r) {
      const auto z = [&](int q, int64_t k, int64_t l) __attribute__((always_inline)) {
        return load(slab_a + r * G + q * C + k, l) + load(s.bias + q * C + k, l);
      };
      gate_row(z, s.x + (r0 + r) * C, s.y + (r0 + r) * C, C, s.carry);
    }
  }
}
