// Highway masked convolution, forward and backward. Equations: fastvae/ops/highway_conv.py.
// Rows are (t, b) pairs, n = T · B of them; the row before (t, b) in time lies B rows above it.

// out[k] = Σ over this thread's columns' rows, in double: sums over thousands of rows must not drift.
template <class F>
INLINE void column_sums(const Team& team, int64_t rows, int64_t columns, double* out, F value) {
  const auto [k0, k1] = team.share(columns);
  std::fill(out + k0, out + k1, 0.0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = k0; k < k1; ++k) out[k] += value(r, k);
}

// a = W₀ x₋ + W₁ x + b with column means and sums of squared deviations.
template <class T>
void highway_conv_project(Team& team, const HighwayProject<T>& s) {
  const int64_t C = s.C, G = 3 * s.C, n = s.steps * s.B;
  gemm<T>(team, n, G, C, Matrix<T>{s.x, C, 1}, Matrix<T>{s.weight + 1, 2, 2 * C}, s.wide_a, G, false, s.scratch);
  gemm<T>(team, n - s.B, G, C, Matrix<T>{s.x, C, 1}, Matrix<T>{s.weight, 2, 2 * C}, s.wide_a + s.B * G, G, true,
          s.scratch);
  const auto [r0, r1] = team.share(n);
  for (int64_t r = r0; r < r1; ++r)
    for (int64_t k = 0; k < G; ++k) {
      s.a[r * G + k] = T(s.wide_a[r * G + k] + Wide<T>(s.bias[k]));
      s.wide_a[r * G + k] = Wide<T>(s.a[r * G + k]);
    }
  team.wait();
  column_sums(team, n, G, s.sums, [&](int64_t r, int64_t k) { return s.wide_a[r * G + k]; });
  const auto [k0, k1] = team.share(G);
  for (int64_t k = k0; k < k1; ++k) s.mean[k] = Wide<T>(s.sums[k] / n);
  column_sums(team, n, G, s.sums, [&](int64_t r, int64_t k) {
    const double d = double(s.wide_a[r * G + k]) - double(s.mean[k]);
    return d * d;
  });
  for (int64_t k = k0; k < k1; ++k) s.m2[k] = Wide<T>(s.sums[k]);
}

// The statistics' gradients reach a through d mean / d a = 1 / n and d m2 / d a = 2 (a − mean).
template <class T>
void highway_conv_project_backward(Team& team, const HighwayProjectBackward<T>& s) {
  using S = Wide<T>;
  const int64_t C = s.C, G = 3 * s.C, n = s.steps * s.B;
  const auto [r0, r1] = team.share(n);
  for (int64_t r = r0; r < r1; ++r)
    for (int64_t k = 0; k < G; ++k)
      s.wide_da[r * G + k] = S(s.da[r * G + k]) + s.dmean[k] / S(n) + 2 * s.dm2[k] * (S(s.a[r * G + k]) - s.mean[k]);
  team.wait();
  const int64_t before = n - s.B;
  // dx = da W₁, and row r of dx feeds row r + B of a through W₀.
  gemm<T>(team, n, C, G, Matrix<S>{s.wide_da, G, 1}, Matrix<T>{s.weight + 1, 2 * C, 2}, s.wide_dx, C, false, s.scratch);
  gemm<T>(team, before, C, G, Matrix<S>{s.wide_da + s.B * G, G, 1}, Matrix<T>{s.weight, 2 * C, 2}, s.wide_dx, C, true,
          s.scratch);
  gemm<T>(team, G, C, n, Matrix<S>{s.wide_da, 1, G}, Matrix<T>{s.x, C, 1}, s.dw1, C, false, s.scratch);
  if (before == 0 && team.id == 0) std::fill(s.dw0, s.dw0 + G * C, S(0));
  gemm<T>(team, G, C, before, Matrix<S>{s.wide_da + s.B * G, 1, G}, Matrix<T>{s.x, C, 1}, s.dw0, C, false, s.scratch);
  for (int64_t i = r0 * C; i < r1 * C; ++i) s.dx[i] = T(s.wide_dx[i]);
  // A bias moves the mean alone: Σ (a − mean) = 0, exactly so only on paper.
  column_sums(team, n, G, s.sums, [&](int64_t r, int64_t k) { return S(s.da[r * G + k]); });
  const auto [k0, k1] = team.share(G);
  for (int64_t k = k0; k < k1; ++k) s.dbias[k] = T(s.sums[k] + double(s.dmean[k]));
  team.wait();
  for (int64_t i = k0 * C; i < k1 * C; ++i) {
    s.dweight[2 * i] = T(s.dw0[i]);
    s.dweight[2 * i + 1] = T(s.dw1[i]);
  }
}

// y = σ(f) x + σ(i) tanh(g) for one row of normalised pre-activations z(q, k, lanes), q in i, f, g.
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
  Wide<T>* row = s.row_sums + team.id * 2 * G;
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
    s.dshift[k] = Wide<T>(dz);
    s.dscale[k] = Wide<T>(along);
    s.dmean[k] = Wide<T>(-dz * double(s.scale[k]));
  }
}

// The folded layer: a slab of rows at a time, so that its pre-activations never leave the cache.
template <class T>
void highway_conv(Team& team, const HighwayFolded<T>& s) {
  using S = Wide<T>;
  using P = Packed<T>;
  const int64_t C = s.C, G = 3 * s.C, n = s.steps * s.B, half = packed_depth<P>(C) * PANEL<P>;
  // Panels of [W₀ W₁]: k runs over the row before, then over the row itself.
  P* const packed = static_cast<P*>(s.panels);
  const auto [p0, p1] = team.share(panels<P>(G));
  for (int64_t p = p0; p < p1; ++p)
    for (int tap = 0; tap < 2; ++tap)
      pack_panel(s.weight + p * PANEL<P> * 2 * C + tap, 2, 2 * C, C, std::min(PANEL<P>, G - p * PANEL<P>),
                 packed + (2 * p + tap) * half);
  team.wait();
  S* slab_a = s.a + team.id * SLAB * G;
  const int64_t depth = packed_depth<P>(C);
  P* slab_tiles = static_cast<P*>(s.tiles) + team.id * SLAB * 2 * depth;
  const Team alone{0, 1, team.barrier};
  const auto [s0, s1] = team.share((n + SLAB - 1) / SLAB);
  for (int64_t r0 = s0 * SLAB; r0 < std::min(s1 * SLAB, n); r0 += SLAB) {
    const int64_t m = std::min(SLAB, n - r0);
    for (int64_t r = 0; r < m; ++r) {
      const T* x = s.x + (r0 + r) * C;
      pack_row(r0 + r < s.B ? static_cast<const T*>(nullptr) : x - s.B * C, 1, C, tile_at(slab_tiles, 2 * depth, r));
      pack_row(x, 1, C, tile_at(slab_tiles, 2 * depth, r, depth));
    }
    multiply_panels(alone, slab_tiles, packed, 2 * depth, slab_a, G, m, G);
    for (int64_t r = 0; r < m; ++r) {
      const auto z = [&](int q, int64_t k, int64_t l) __attribute__((always_inline)) {
        return load(slab_a + r * G + q * C + k, l) + load(s.bias + q * C + k, l);
      };
      gate_row(z, s.x + (r0 + r) * C, s.y + (r0 + r) * C, C, s.carry);
    }
  }
}
