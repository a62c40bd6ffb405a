// LayerNorm-LSTM, forward and backward. Equations: fastvae/ops/layer_norm_lstm.py.
// A step is two phases with a barrier after each: the recurrent product, shared out by columns of gates; then norm,
// gates and state, shared out by rows of the batch. Every other product takes the panels backwards: those used last are
// still in the cache.

// What a thread computes of the steps of a batch. Each goes through all steps alone with its own sequences, and nobody
// waits; they stand longest first and are dealt in turn, those of one length side by side. Or the team shares each
// step: where the weight is too large for an L2 cache and every thread would read all of it for few rows, or where it
// is not small and sequences are fewer than threads.
struct Work {
  Team group;
  int64_t rank = 0, stride = 1, own, first = 0;  // own: rank, rank + stride, ..., with scratch from row `first` on

  Work(const Team& team, const LstmRows& rows, int64_t weight_bytes)
      : group(shares(team.size, rows.B, weight_bytes) ? team : Team{0, 1, team.barrier}), own(rows.B) {
    if (group.size == team.size) return;
    const auto [b0, b1] = team.share(rows.B);
    const bool same = rows.count[rows.steps - 1] == rows.B;
    rank = same ? b0 : team.id, stride = same ? 1 : team.size, own = same ? b1 - b0 : rows.B;
    first = team.id * num_tiles((rows.B + team.size - 1) / team.size) * MR;
  }
  static bool shares(int64_t threads, int64_t B, int64_t weight_bytes) {
    return weight_bytes > (B < threads ? 1 : 2) * L2_BYTES && B <= 2 * MR * threads;
  }
  // How many of the first n sequences are the group's, and its b-th one.
  int64_t count(int64_t n) const { return std::min(own, std::max<int64_t>(n + stride - 1 - rank, 0) / stride); }
  int64_t sequence(int64_t b) const { return b * stride + rank; }
  // Those of the group's `rows` rows whose gates this thread computes: whole tiles where there are enough of them.
  std::pair<int64_t, int64_t> share(int64_t rows) const {
    if (num_tiles(rows) < 2 * group.size) return group.share(rows);
    const auto [t0, t1] = group.share(num_tiles(rows));
    return {t0 * MR, std::min(t1 * MR, rows)};
  }
};

// Zeros in the rows of m [., n] that are no step of a sequence.
template <class T>
INLINE void clear_pads(const Team& team, const LstmRows& rows, T* m, int64_t n) {
  if (!m) return;
  const auto [p0, p1] = team.share(rows.num_pads);
  for (int64_t p = p0; p < p1; ++p) std::fill_n(m + rows.pads[p] * n, n, T(0));
}

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
INLINE void gate_row(S* a, const T* x, const S* gain, const S* bias, const S* c_before, S* c, T* h, T* normalized,
                     S* rstd, int64_t H, S eps) {
  constexpr int64_t w = LANES<T>;
  const auto [mean, variance] = add_and_measure(a, x, 4 * H);
  const S r = reciprocal_std(variance, eps);
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
    store(c + k, sigmoid(z[1]) * load(c_before + k, n) + sigmoid(z[0]) * tanh(z[2]), n);
    store(a + k, sigmoid(z[3]), n);
  }
  // A loop of its own, whose iterations overlap, for above they would wait for the cell.
  for (int64_t k = 0; k < H; k += w) store(h + k, load(a + k, H - k) * tanh(load(c + k, H - k)), H - k);
}

// The gates of B rows alone, for benchmarks.
template <class T>
void gate_rows(const LayerNormLstm<T>& s, int64_t B) {
  const int64_t H = s.H, G = 4 * H;
  for (int64_t b = 0; b < B; ++b)
    gate_row(s.a + b * G, s.x + b * G, s.gain, s.bias, s.state + b * H, s.c + b * H, s.h + b * H, s.normalized + b * G,
             s.rstd + b, H, opmath_type<T>(s.eps));
}

template <class T>
void layer_norm_lstm(Team& team, const LayerNormLstm<T>& s) {
  using S = opmath_type<T>;
  const LstmRows& rows = s.rows;
  const int64_t H = s.H, G = 4 * s.H;
  using P = Packed<T>;
  P* const packed_b = static_cast<P*>(s.packed_b);
  const int64_t depth = packed_depth<P>(H);
  pack_panels(team, Strided<T>{s.weight, 1, H}, H, G, packed_b);
  Work work(team, rows, H * G * int64_t(sizeof(P)));
  Team& group = work.group;
  P* const packed_a = tile_at(static_cast<P*>(s.packed_a), depth, work.first);
  S *const a = s.a + work.first * G, *const state = s.state + work.first * H;
  const auto [all0, all1] = work.share(work.count(rows.B));
  const bool side_by_side = work.stride == 1 && rows.num_pads == 0;
  const auto order = [&](int64_t b) { return rows.order[work.sequence(b)]; };
  pack_rows_at([&](int64_t b) { return s.h0 + order(b) * H; }, all0, all1, H, packed_a);
  for (int64_t b = all0; b < all1; ++b) {
    const T* const c0 = s.c0 + order(b) * H;
    for (int64_t k = 0; k < H; ++k) state[b * H + k] = S(c0[k]);
    if (work.sequence(b) >= rows.count[0]) std::copy_n(c0, H, s.c_n + order(b) * H);
  }
  clear_pads(team, rows, s.h, H);
  clear_pads(team, rows, s.c, H);
  clear_pads(team, rows, s.normalized, G);
  clear_pads(team, rows, s.rstd, 1);
  team.wait();
  for (int64_t t = 0; t < rows.steps; ++t) {
    const int64_t count = work.count(rows.count[t]);
    const auto [b0, b1] = work.share(count);
    Upcoming upcoming;
    if (side_by_side && b0 < b1) {
      const int64_t row = rows.now[rows.first[t] + work.sequence(b0)], here = b1 - b0;
      upcoming.add(s.x + row * G, here * G);
      if (s.normalized) upcoming.add(s.normalized + row * G, here * G);
      if (s.c) upcoming.add(s.c + row * H, here * H);
      upcoming.add(s.h + row * H, here * H);
    }
    multiply_panels(group, packed_a, packed_b, H, a, G, count, G, false, 0, &upcoming, t % 2);
    group.wait();
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t sequence = work.sequence(b), i = rows.first[t] + sequence, row = rows.now[i];
      S* const c = s.c ? s.c + row * H : state + b * H;
      const S* const c_before = s.c && t ? s.c + rows.before[i] * H : state + b * H;
      gate_row(a + b * G, s.x + row * G, s.gain, s.bias, c_before, c, s.h + row * H,
               s.normalized ? s.normalized + row * G : nullptr, s.rstd ? s.rstd + row : nullptr, H, S(s.eps));
      if (sequence >= rows.count[t + 1])
        for (int64_t k = 0; k < H; ++k) s.c_n[rows.order[sequence] * H + k] = T(c[k]);
    }
    const auto h = [&](int64_t b) { return s.h + rows.now[rows.first[t] + work.sequence(b)] * H; };
    pack_rows_at(h, b0, b1, H, packed_a);
    group.wait();
  }
}

// Backward of a row of all steps: da [4H] from dh_through, of the step after, and dc [H], which becomes that of the
// step before; adds what reaches gain and bias to dgain, dbias [4H].
template <class T, class S = opmath_type<T>>
INLINE void gate_row_backward(const LayerNormLstmBackward<T>& s, int64_t row, const S* c_before, const S* dh_through,
                              S* dc, S* da, S* dgain, S* dbias) {
  constexpr int64_t w = LANES<T>;
  const int64_t H = s.H, G = 4 * s.H;
  const T *const normalized = s.normalized + row * G, *const dh = s.dh + row * H;
  const S* const c = s.c + row * H;
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
void gate_rows_backward(const LayerNormLstmBackward<T>& s, int64_t B) {
  const int64_t H = s.H, G = 4 * H;
  for (int64_t b = 0; b < B; ++b)
    gate_row_backward(s, b, s.c0 + b * H, s.dh_through + b * H, s.dc + b * H, s.da + b * G, s.sums, s.sums + G);
}

template <class T>
void layer_norm_lstm_backward(Team& team, const LayerNormLstmBackward<T>& s) {
  using S = opmath_type<T>;
  using P = Packed<T>;
  const LstmRows& rows = s.rows;
  const int64_t H = s.H, G = 4 * s.H;
  P* const packed_b = static_cast<P*>(s.packed_b);
  pack_panels(team, Strided<T>{s.weight, H, 1}, G, H, packed_b);
  Work work(team, rows, H * G * int64_t(sizeof(P)));
  Team& group = work.group;
  P* const packed_a = tile_at(static_cast<P*>(s.packed_a), packed_depth<P>(G), work.first);
  S *const dh_through = s.dh_through + work.first * H, *const dc = s.dc + work.first * H;
  S* const da = s.da + work.first * G;
  // Sums for gain and bias: of this step, then over steps, so that rounding grows with B + T and not with B · T.
  S* step_sums = s.sums + team.id * 4 * G;
  S* all_sums = step_sums + 2 * G;
  std::fill(all_sums, all_sums + 2 * G, S(0));
  const auto [all0, all1] = work.share(work.count(rows.B));
  const bool side_by_side = work.stride == 1 && rows.num_pads == 0;
  const auto order = [&](int64_t b) { return rows.order[work.sequence(b)]; };
  std::fill(dh_through + all0 * H, dh_through + all1 * H, S(0));
  for (int64_t b = all0; b < all1; ++b)
    for (int64_t k = 0; k < H; ++k) dc[b * H + k] = S(s.dc_n[order(b) * H + k]);
  clear_pads(team, rows, s.dx, G);
  team.wait();
  for (int64_t t = rows.steps - 1; t >= 0; --t) {
    const int64_t count = work.count(rows.count[t]);
    const auto row = [&](int64_t b) { return rows.now[rows.first[t] + work.sequence(b)]; };
    const auto da_row = [&](int64_t b) {
      if constexpr (std::is_same_v<S, T>)
        return s.dx + row(b) * G;
      else
        return da + b * G;
    };
    std::fill(step_sums, step_sums + 2 * G, S(0));
    const auto [b0, b1] = work.share(count);
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t before = rows.before[rows.first[t] + work.sequence(b)];
      gate_row_backward(s, row(b), (t ? s.c : s.c0) + before * H, dh_through + b * H, dc + b * H, da_row(b), step_sums,
                        step_sums + G);
    }
    if constexpr (std::is_same_v<P, T>)
      pack_rows_at([&](int64_t b) { return s.dx + row(b) * G; }, b0, b1, G, packed_a);
    else
      pack_rows_at(da_row, b0, b1, G, packed_a);
    for (int64_t k = 0; k < 2 * G; ++k) all_sums[k] += step_sums[k];
    group.wait();
    Upcoming upcoming;
    if (t > 0 && side_by_side && b0 < b1) {
      const auto at = [&](int64_t step) { return rows.now[rows.first[step] + work.sequence(b0)]; };
      const int64_t here = b1 - b0;
      upcoming.add(s.normalized + at(t - 1) * G, here * G);
      upcoming.add(s.dh + at(t - 1) * H, here * H);
      if (t > 1) upcoming.add(s.c + at(t - 2) * H, here * H);
      upcoming.add(s.dx + at(t - 1) * G, here * G);
    }
    multiply_panels(group, packed_a, packed_b, G, dh_through, H, count, H, false, 0, &upcoming, t % 2);
    group.wait();
  }
  for (int64_t b = all0; b < all1; ++b)
    for (int64_t k = 0; k < H; ++k) {
      s.dh0[order(b) * H + k] = T(dh_through[b * H + k]);
      s.dc0[order(b) * H + k] = T(dc[b * H + k]);
    }
  team.wait();
  const auto [g0, g1] = team.share(2 * G);
  for (int64_t k = g0; k < g1; ++k) {
    S total = 0;
    for (int i = 0; i < team.size; ++i) total += s.sums[(4 * i + 2) * G + k];
    (k < G ? s.dgain[k] : s.dbias[k - G]) = T(total);
  }
  // dW = Σₜ daₜᵀ hₜ₋₁, a product for the first step, whose h₋₁ is h0, and one for the others. Where not all sequences
  // have all steps it is of rows side by side: h_before, and dx_real where pads are between.
  const T *dx = s.dx, *before = s.h0, *h = s.h;
  const int64_t first = rows.count[0], others = rows.total - first;
  if (s.h_before) {
    dx = s.dx_real, before = s.h_before, h = before + first * H;
    const auto [i0, i1] = team.share(rows.total);
    for (int64_t i = i0; i < i1; ++i) {
      std::copy_n((i < first ? s.h0 : s.h) + rows.before[i] * H, H, s.h_before + i * H);
      if (dx != s.dx) std::copy_n(s.dx + rows.now[i] * G, G, s.dx_real + i * G);
    }
    if (first == 0 && team.id == 0) std::fill_n(s.dweight_opmath, G * H, S(0));
    team.wait();
  }
  gemm<T>(team, G, H, first, Strided<T>{dx, 1, G}, Strided<T>{before, H, 1}, s.dweight_opmath, H, false, s.scratch);
  gemm<T>(team, G, H, others, Strided<T>{dx + first * G, 1, G}, Strided<T>{h, H, 1}, s.dweight_opmath, H, true,
          s.scratch);
  if constexpr (!std::is_same_v<S, T>) {
    const auto [r0, r1] = team.share(G);
    for (int64_t k = r0 * H; k < r1 * H; ++k) s.dweight[k] = T(s.dweight_opmath[k]);
  }
}
