// LayerNorm-LSTM, forward and backward. Equations: fastvae/ops/layer_norm_lstm.py.
// A step is two phases with a barrier after each: the recurrent product, shared out by columns of gates; then norm,
// gates and state, shared out by rows of the batch.

// One row's norm and gates: a [4H] pre-activations -> h, c [H]. `normalised` [4H] and `rstd` are kept when not null.
template <class T, class S = Wide<T>>
INLINE void gate_row(const S* a, const T* gain, const T* bias, const S* c_before, S* c, T* h, T* normalised, S* rstd,
                     int64_t H, S eps) {
  constexpr int64_t w = LANES<T>;
  vec<T> total{};
  for (int64_t k = 0; k < 4 * H; k += w) total += load(a + k, 4 * H - k);
  const S about = sum(total) / (4 * H);
  vec<T> deviations{}, squares{};
  int64_t k = 0;
  for (; k + w <= 4 * H; k += w) {
    const vec<T> d = load(a + k) - about;
    deviations += d;
    squares += d * d;
  }
  S rest = 0, rest_squares = 0;
  for (; k < 4 * H; ++k) rest += a[k] - about, rest_squares += (a[k] - about) * (a[k] - about);
  const S shift = (sum(deviations) + rest) / (4 * H);  // what rounding left out of a large mean
  const S mean = about + shift;
  const S variance = std::max((sum(squares) + rest_squares) / (4 * H) - shift * shift, S(0));
  const S r = 1 / std::sqrt(variance + eps);
  if (rstd) *rstd = r;
  for (k = 0; k < H; k += w) {
    const int64_t n = H - k;
    vec<T> z[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const vec<T> v = (load(a + q * H + k, n) - mean) * r;
      if (normalised) store(normalised + q * H + k, v, n);
      z[q] = v * load(gain + q * H + k, n) + load(bias + q * H + k, n);
    }
    const vec<T> cell = sigmoid(z[1]) * load(c_before + k, n) + sigmoid(z[0]) * tanh(z[2]);
    store(c + k, cell, n);
    store(h + k, sigmoid(z[3]) * tanh(cell), n);
  }
}

template <class T>
void layer_norm_lstm(Team& team, const LayerNormLstm<T>& s) {
  using S = Wide<T>;
  const int64_t H = s.H, B = s.B, G = 4 * s.H;
  using P = Packed<T>;
  P* const panels = static_cast<P*>(s.panels);
  P* const tiles = static_cast<P*>(s.tiles);
  const int64_t depth = packed_depth<P>(H);
  pack_panels(team, Matrix<T>{s.weight, 1, H}, H, G, panels);
  const auto [b0, b1] = team.share(B);
  for (int64_t b = b0; b < b1; ++b) {
    pack_row(s.h0 + b * H, 1, H, tile_at(tiles, depth, b));
    for (int64_t k = 0; k < H; ++k) s.state[b * H + k] = S(s.c0[b * H + k]);
  }
  team.wait();
  for (int64_t t = 0; t < s.steps; ++t) {
    multiply_panels(team, tiles, panels, H, s.a, G, B, G);
    team.wait();
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t row = t * B + b;
      S* a = s.a + b * G;
      for (int64_t k = 0; k < G; k += LANES<T>)
        store(a + k, load(a + k, G - k) + load(s.x + row * G + k, G - k), G - k);
      S* c = s.c ? s.c + row * H : s.state + b * H;
      const S* c_before = s.c && t ? c - B * H : s.state + b * H;
      T* h = s.h + row * H;
      gate_row(a, s.gain, s.bias, c_before, c, h, s.normalised ? s.normalised + row * G : nullptr,
               s.rstd ? s.rstd + row : nullptr, H, S(s.eps));
      pack_row(h, 1, H, tile_at(tiles, depth, b));
      if (t + 1 == s.steps)
        for (int64_t k = 0; k < H; ++k) s.c_n[b * H + k] = T(c[k]);
    }
    team.wait();
  }
}

// One row's backward: dh, dc [H] and what forward kept -> da [4H], dc of the step before, and dz for the norm's
// parameters.
template <class T, class S = Wide<T>>
INLINE void gate_row_backward(const S* dh, S* dc, const T* gain, const T* bias, const T* normalised, S rstd,
                              const S* c_before, const S* c, S* da, S* dgain, S* dbias, int64_t H) {
  constexpr int64_t w = LANES<T>;
  vec<T> total{}, along{};
  for (int64_t k = 0; k < H; k += w) {
    const int64_t n = H - k;
    vec<T> v[4], z[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      v[q] = load(normalised + q * H + k, n);
      z[q] = v[q] * load(gain + q * H + k, n) + load(bias + q * H + k, n);
    }
    vec<T> i_slope, f_slope, g_slope, o_slope, c_slope;
    const vec<T> i = sigmoid(z[0], &i_slope), f = sigmoid(z[1], &f_slope), g = tanh(z[2], &g_slope);
    const vec<T> o = sigmoid(z[3], &o_slope), tc = tanh(load(c + k, n), &c_slope);
    const vec<T> d = load(dh + k, n), cell = load(dc + k, n) + d * o * c_slope;
    const vec<T> dz[4] = {cell * g * i_slope, cell * load(c_before + k, n) * f_slope, cell * i * g_slope,
                          d * tc * o_slope};
    store(dc + k, cell * f, n);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      store(dgain + q * H + k, load(dgain + q * H + k, n) + dz[q] * v[q], n);
      store(dbias + q * H + k, load(dbias + q * H + k, n) + dz[q], n);
      const vec<T> dn = dz[q] * load(gain + q * H + k, n);
      total += dn;  // lanes past H are zero: c and dh read as zero there
      along += dn * v[q];
      store(da + q * H + k, dn, n);
    }
  }
  const S mean = sum(total) / (4 * H), slope = sum(along) / (4 * H);
  for (int64_t k = 0; k < 4 * H; k += w) {
    const int64_t n = 4 * H - k;
    store(da + k, rstd * (load(da + k, n) - mean - load(normalised + k, n) * slope), n);
  }
}

template <class T>
void layer_norm_lstm_backward(Team& team, const LayerNormLstmBackward<T>& s) {
  using S = Wide<T>;
  const int64_t H = s.H, B = s.B, G = 4 * s.H;
  using P = Packed<T>;
  P* const panels = static_cast<P*>(s.panels);
  P* const tiles = static_cast<P*>(s.tiles);
  pack_panels(team, Matrix<T>{s.weight, H, 1}, G, H, panels);
  const auto [b0, b1] = team.share(B);
  // Sums for gain and bias: of this step, then over steps, so that rounding grows with B + T and not with B · T.
  S* step_sums = s.sums + team.id * 4 * G;
  S* all_sums = step_sums + 2 * G;
  std::fill(all_sums, all_sums + 2 * G, S(0));
  for (int64_t b = b0; b < b1; ++b) {
    std::fill(s.dh_through + b * H, s.dh_through + (b + 1) * H, S(0));
    for (int64_t k = 0; k < H; ++k) s.dc[b * H + k] = S(s.dc_n[b * H + k]);
  }
  for (int64_t t = s.steps - 1; t >= 0; --t) {
    std::fill(step_sums, step_sums + 2 * G, S(0));
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t row = t * B + b;
      S* dh = s.dh_through + b * H;
      S* da = s.da + b * G;
      for (int64_t k = 0; k < H; ++k) dh[k] += S(s.dh[row * H + k]);
      gate_row_backward(dh, s.dc + b * H, s.gain, s.bias, s.normalised + row * G, s.rstd[row],
                        t ? s.c + (row - B) * H : s.c0 + b * H, s.c + row * H, da, step_sums, step_sums + G, H);
      for (int64_t k = 0; k < G; k += LANES<T>) store(s.dx + row * G + k, load(da + k, G - k), G - k);
      if constexpr (std::is_same_v<P, T>)
        pack_row(s.dx + row * G, 1, G, tile_at(tiles, packed_depth<P>(G), b));
      else
        pack_row(da, 1, G, tile_at(tiles, packed_depth<P>(G), b));
    }
    for (int64_t k = 0; k < 2 * G; ++k) all_sums[k] += step_sums[k];
    team.wait();
    multiply_panels(team, tiles, panels, G, s.dh_through, H, B, H);
    team.wait();
  }
  for (int64_t b = b0; b < b1; ++b)
    for (int64_t k = 0; k < H; ++k) {
      s.dh0[b * H + k] = T(s.dh_through[b * H + k]);
      s.dc0[b * H + k] = T(s.dc[b * H + k]);
    }
  if (team.id == 0)
    for (int64_t k = 0; k < 2 * G; ++k) {
      S total = 0;
      for (int i = 0; i < team.size; ++i) total += s.sums[(4 * i + 2) * G + k];
      (k < G ? s.dgain[k] : s.dbias[k - G]) = T(total);
    }
  // dW = Σₜ daₜᵀ hₜ₋₁, one product over all steps; h₋₁ = h0.
  const Matrix<T> da{s.dx, 1, G};
  gemm<T>(team, G, H, B, da, Matrix<T>{s.h0, H, 1}, s.dweight_wide, H, false, s.scratch);
  if (s.steps > 1)
    gemm<T>(team, G, H, (s.steps - 1) * B, Matrix<T>{s.dx + B * G, 1, G}, Matrix<T>{s.h, H, 1}, s.dweight_wide, H, true,
            s.scratch);
  if constexpr (!std::is_same_v<S, T>) {
    const auto [r0, r1] = team.share(G);
    for (int64_t k = r0 * H; k < r1 * H; ++k) s.dweight[k] = T(s.dweight_wide[k]);
  }
}
