// LayerNorm-LSTM, forward and backward. Equations: fastvae/ops/layer_norm_lstm.py.
// A step is two phases with a barrier after each: the recurrent product, shared out by columns of gates; then norm,
// gates and state, shared out by rows of the batch.

// The rows of the batch whose gates this thread computes: whole tiles where there are enough of them.
INLINE std::pair<int64_t, int64_t> share_rows(const Team& team, int64_t B) {
  if (num_tiles(B) < 2 * team.size) return team.share(B);
  const auto [t0, t1] = team.share(num_tiles(B));
  return {t0 * MR, std::min(t1 * MR, B)};
}
// Whether each thread goes through all steps with its own rows: nobody waits then, but each reads all of the weight.
INLINE bool apart(const Team& team, int64_t B) { return B >= 2 * MR * team.size; }

// a [n] += x, and the mean and the variance of the sums. Deviations are from a guess, and where that was far from the
// mean, once more from the mean.
template <class T, class S = opmath_type<T>>
INLINE std::pair<S, S> add_and_measure(S* a, const T* x, int64_t n) {
  constexpr int64_t w = LANES<T>;
  S about = 0;
  for (int64_t i = 0; i < 8; ++i) about += a[i * n / 8] + S(x[i * n / 8]);
  about /= 8;
  for (int pass = 0;; ++pass) {
    vec<T> deviations{}, squares{};
    S rest = 0, rest_squares = 0;
    const auto take = [&](auto value) __attribute__((always_inline)) {
      int64_t k = 0;
      for (; k + w <= n; k += w) {
        const vec<T> d = value(k, w) - about;
        deviations += d;
        squares += d * d;
      }
      if (k < n) {
        const vec<T> d = value(k, n - k) - about;
        for (int64_t i = 0; i < n - k; ++i) rest += d[i], rest_squares += d[i] * d[i];
      }
    };
    if (pass == 0)
      take([&](int64_t k, int64_t left) __attribute__((always_inline)) {
        const vec<T> v = load(a + k, left) + load(x + k, left);
        store(a + k, v, left);
        return v;
      });
    else
      take([&](int64_t k, int64_t left) __attribute__((always_inline)) { return load(a + k, left); });
    const S shift = (sum(deviations) + rest) / n, variance = (sum(squares) + rest_squares) / n - shift * shift;
    if (pass > 0 || shift * shift <= variance / 4) return {about + shift, std::max(variance, S(0))};
    about += shift;
  }
}

// One row's norm and gates: a [4H] recurrent products, x [4H] -> h, c [H]. a becomes the pre-activations; `normalized`
// [4H] and `rstd` are kept when not null.
template <class T, class S = opmath_type<T>>
INLINE void gate_row(S* a, const T* x, const T* gain, const T* bias, const S* c_before, S* c, T* h, T* normalized,
                     S* rstd, int64_t H, S eps) {
  constexpr int64_t w = LANES<T>;
  const auto [mean, variance] = add_and_measure(a, x, 4 * H);
  const S r = 1 / std::sqrt(variance + eps);
  if (rstd) *rstd = r;
  for (int64_t k = 0; k < H; k += w) {
    const int64_t n = H - k;
    vec<T> z[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const vec<T> v = (load(a + q * H + k, n) - mean) * r;
      if (normalized) store(normalized + q * H + k, v, n);
      z[q] = v * load(gain + q * H + k, n) + load(bias + q * H + k, n);
    }
    const vec<T> cell = sigmoid(z[1]) * load(c_before + k, n) + sigmoid(z[0]) * tanh(z[2]);
    store(c + k, cell, n);
    store(h + k, sigmoid(z[3]) * tanh(cell), n);
  }
}

template <class T>
void layer_norm_lstm(Team& team, const LayerNormLstm<T>& s) {
  using S = opmath_type<T>;
  const int64_t H = s.H, B = s.B, G = 4 * s.H;
  using P = Packed<T>;
  P* const packed_b = static_cast<P*>(s.packed_b);
  P* const packed_a = static_cast<P*>(s.packed_a);
  const int64_t depth = packed_depth<P>(H);
  pack_panels(team, Strided<T>{s.weight, 1, H}, H, G, packed_b);
  const auto [b0, b1] = share_rows(team, B);
  pack_rows(s.h0, b0, b1, H, packed_a);
  for (int64_t k = b0 * H; k < b1 * H; ++k) s.state[k] = S(s.c0[k]);
  team.wait();
  const bool alone = apart(team, B);
  Team group = alone ? Team{0, 1, team.barrier} : team;
  const int64_t first = alone ? b0 : 0, rows = alone ? b1 - b0 : B;
  for (int64_t t = 0; t < s.steps; ++t) {
    multiply_panels(group, tile_at(packed_a, depth, first), packed_b, H, s.a + first * G, G, rows, G);
    group.wait();
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t row = t * B + b;
      S* c = s.c ? s.c + row * H : s.state + b * H;
      const S* c_before = s.c && t ? c - B * H : s.state + b * H;
      gate_row(s.a + b * G, s.x + row * G, s.gain, s.bias, c_before, c, s.h + row * H,
               s.normalized ? s.normalized + row * G : nullptr, s.rstd ? s.rstd + row : nullptr, H, S(s.eps));
      if (t + 1 == s.steps)
        for (int64_t k = 0; k < H; ++k) s.c_n[b * H + k] = T(c[k]);
    }
    pack_rows(s.h + t * B * H, b0, b1, H, packed_a);
    group.wait();
  }
}

// Backward of row b of step t: da [4H], dc of the step before; adds what reaches gain and bias to dgain, dbias [4H].
template <class T, class S = opmath_type<T>>
INLINE void gate_row_backward(const LayerNormLstmBackward<T>& s, int64_t t, int64_t b, S* da, S* dgain, S* dbias) {
  constexpr int64_t w = LANES<T>;
  const int64_t H = s.H, G = 4 * s.H, row = t * s.B + b;
  const T *const normalized = s.normalized + row * G, *const dh = s.dh + row * H;
  const S *const c = s.c + row * H, *const c_before = t ? c - s.B * H : s.c0 + b * H;
  const S* const dh_through = s.dh_through + b * H;
  S* const dc = s.dc + b * H;
  vec<T> total{}, along{};
  for (int64_t k = 0; k < H; k += w) {
    const int64_t n = H - k;
    vec<T> v[4], z[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      v[q] = load(normalized + q * H + k, n);
      z[q] = v[q] * load(s.gain + q * H + k, n) + load(s.bias + q * H + k, n);
    }
    vec<T> i_slope, f_slope, g_slope, o_slope, c_slope;
    const vec<T> i = sigmoid(z[0], &i_slope), f = sigmoid(z[1], &f_slope), g = tanh(z[2], &g_slope);
    const vec<T> o = sigmoid(z[3], &o_slope), tc = tanh(load(c + k, n), &c_slope);
    const vec<T> d = load(dh_through + k, n) + load(dh + k, n), cell = load(dc + k, n) + d * o * c_slope;
    const vec<T> dz[4] = {cell * g * i_slope, cell * load(c_before + k, n) * f_slope, cell * i * g_slope,
                          d * tc * o_slope};
    store(dc + k, cell * f, n);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      store(dgain + q * H + k, load(dgain + q * H + k, n) + dz[q] * v[q], n);
      store(dbias + q * H + k, load(dbias + q * H + k, n) + dz[q], n);
      const vec<T> dn = dz[q] * load(s.gain + q * H + k, n);
      total += dn;  // lanes past H are zero: c and dh read as zero there
      along += dn * v[q];
      store(da + q * H + k, dn, n);
    }
  }
  const S mean = sum(total) / G, slope = sum(along) / G, rstd = s.rstd[row];
  for (int64_t k = 0; k < G; k += w) {
    const vec<T> d = rstd * (load(da + k, G - k) - mean - load(normalized + k, G - k) * slope);
    store(s.dx + row * G + k, d, G - k);
    if constexpr (std::is_same_v<Packed<T>, S> && !std::is_same_v<S, T>) store(da + k, d, G - k);
  }
}

template <class T>
void layer_norm_lstm_backward(Team& team, const LayerNormLstmBackward<T>& s) {
  using S = opmath_type<T>;
  using P = Packed<T>;
  const int64_t H = s.H, B = s.B, G = 4 * s.H;
  P* const packed_b = static_cast<P*>(s.packed_b);
  P* const packed_a = static_cast<P*>(s.packed_a);
  pack_panels(team, Strided<T>{s.weight, H, 1}, G, H, packed_b);
  const auto [b0, b1] = share_rows(team, B);
  // Sums for gain and bias: of this step, then over steps, so that rounding grows with B + T and not with B · T.
  S* step_sums = s.sums + team.id * 4 * G;
  S* all_sums = step_sums + 2 * G;
  std::fill(all_sums, all_sums + 2 * G, S(0));
  std::fill(s.dh_through + b0 * H, s.dh_through + b1 * H, S(0));
  for (int64_t k = b0 * H; k < b1 * H; ++k) s.dc[k] = S(s.dc_n[k]);
  team.wait();
  const bool alone = apart(team, B);
  Team group = alone ? Team{0, 1, team.barrier} : team;
  const int64_t first = alone ? b0 : 0, rows = alone ? b1 - b0 : B;
  for (int64_t t = s.steps - 1; t >= 0; --t) {
    std::fill(step_sums, step_sums + 2 * G, S(0));
    T* const dx = s.dx + t * B * G;
    S* da = s.da;
    if constexpr (std::is_same_v<S, T>) da = dx;
    for (int64_t b = b0; b < b1; ++b) gate_row_backward(s, t, b, da + b * G, step_sums, step_sums + G);
    if constexpr (std::is_same_v<P, T>)
      pack_rows(dx, b0, b1, G, packed_a);
    else
      pack_rows(da, b0, b1, G, packed_a);
    for (int64_t k = 0; k < 2 * G; ++k) all_sums[k] += step_sums[k];
    group.wait();
    multiply_panels(group, tile_at(packed_a, packed_depth<P>(G), first), packed_b, G, s.dh_through + first * H, H, rows,
                    H);
    group.wait();
  }
  for (int64_t k = b0 * H; k < b1 * H; ++k) {
    s.dh0[k] = T(s.dh_through[k]);
    s.dc0[k] = T(s.dc[k]);
  }
  team.wait();
  const auto [g0, g1] = team.share(2 * G);
  for (int64_t k = g0; k < g1; ++k) {
    S total = 0;
    for (int i = 0; i < team.size; ++i) total += s.sums[(4 * i + 2) * G + k];
    (k < G ? s.dgain[k] : s.dbias[k - G]) = T(total);
  }
  // dW = Σₜ daₜᵀ hₜ₋₁, one product over all steps; h₋₁ = h0.
  const Strided<T> da{s.dx, 1, G};
  gemm<T>(team, G, H, B, da, Strided<T>{s.h0, H, 1}, s.dweight_opmath, H, false, s.scratch);
  if (s.steps > 1)
    gemm<T>(team, G, H, (s.steps - 1) * B, Strided<T>{s.dx + B * G, 1, G}, Strided<T>{s.h, H, 1}, s.dweight_opmath, H,
            true, s.scratch);
  if constexpr (!std::is_same_v<S, T>) {
    const auto [r0, r1] = team.share(G);
    for (int64_t k = r0 * H; k < r1 * H; ++k) s.dweight[k] = T(s.dweight_opmath[k]);
  }
}
