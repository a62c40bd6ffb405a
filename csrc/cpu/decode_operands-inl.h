// Operands of the decoders' products: weights as panels of one packed tensor, activations as tiles. Included once per
// ISA. Weights and activations of T are multiplied as Q: as T, or rounded to int8_t. Equations: fastvae/ops/int8.py.

// To the nearest integer in [−127, 127], ties to even; NaN to 0. V may be a vector.
template <class T, class V>
INLINE V round_to_int8(V x, opmath_type<T> scale) {
  constexpr opmath_type<T> limit = 127, magic = std::is_same_v<T, double> ? 6755399441055744.0 : 12582912.0;
  V r = x / scale;
  r = r > limit ? V{} + limit : r;
  r = r < -limit ? V{} - limit : r;
  r = r == r ? r : V{};
  return (r + magic) - magic;  // 1.5 · 2^52 or 2^23 leaves no bits for a fraction
}

// The scale of values of which `largest` is the largest magnitude.
template <class S>
INLINE S int8_scale(S largest) {
  return std::max(largest / 127, std::numeric_limits<S>::min());  // NaN stays NaN
}

// The larger one; a NaN is larger than any number.
template <class S>
INLINE S larger(S a, S b) {
  return b > a || b != b ? b : a;
}

// One weight: the right operand [k, n] of products. Its n columns may be `gates` side by side; then a panel holds all
// gates of its channels. After the operands of a panel of integers come, for each column, its scale and what its sums
// start from.
template <class T, class Q>
struct Panels {
  using P = Packed<Q>;
  using S = opmath_type<T>;
  // What operands are stored as: bfloat16 stays half as large where a product converts a vector once for all rows.
  using Stored = std::conditional_t<std::is_same_v<Q, BFloat16> && HOLD_COLUMNS<P>, Q, P>;
  static constexpr int64_t W = NR<P>;
  char* data;
  int64_t k, n, gates = 1;

  int64_t channels() const { return n / gates; }
  int64_t panel_channels() const { return W / gates; }
  int64_t count() const { return (channels() + panel_channels() - 1) / panel_channels(); }
  int64_t operand_bytes() const { return packed_depth<P>(k) * W * sizeof(Stored); }
  int64_t panel_bytes() const {
    return operand_bytes() + (std::is_integral_v<P> ? W * (sizeof(S) + sizeof(int32_t)) : 0);
  }
  char* end() const { return data + count() * panel_bytes(); }

  Stored* operands(int64_t p) const { return reinterpret_cast<Stored*>(data + p * panel_bytes()); }
  S* scales(int64_t p) const { return reinterpret_cast<S*>(data + p * panel_bytes() + operand_bytes()); }
  int32_t* starts(int64_t p) const { return reinterpret_cast<int32_t*>(scales(p) + W); }
};

// This thread's share of the panels of b.
template <class T, class Q>
void pack_weight(const Team& team, const Weight<T>& b, const Panels<T, Q>& to) {
  using P = Packed<Q>;
  using Stored = typename Panels<T, Q>::Stored;
  using S = opmath_type<T>;
  constexpr int64_t W = NR<P>, step = STEP<P>;
  const auto [p0, p1] = team.share(to.count());
  for (int64_t p = p0; p < p1; ++p) {
    std::memset(to.data + p * to.panel_bytes(), 0, to.panel_bytes());
    Stored* out = to.operands(p);
    const T* columns[W];
    for (int64_t j = 0; j < W; ++j) {
      const int64_t channel = p * to.panel_channels() + j % to.panel_channels();
      const int64_t column = j / to.panel_channels() * to.channels() + channel;
      columns[j] = channel < to.channels() ? b.p + column * b.sn : nullptr;
    }
    if constexpr (std::is_integral_v<P>)
      for (int64_t j = 0; j < W; ++j) {
        if (!columns[j]) continue;
        S largest = 0;
        for (int64_t i = 0; i < to.k; ++i) largest = larger(largest, std::abs(S(columns[j][i * b.sk])));
        to.scales(p)[j] = int8_scale(largest);
      }
    for (int64_t i0 = 0; i0 < to.k; i0 += 16)  // blocks keep both sides of the transposition in cache
      for (int64_t j = 0; j < W; ++j)
        for (int64_t i = i0; columns[j] && i < std::min(i0 + 16, to.k); ++i) {
          const T x = columns[j][i * b.sk];
          Stored& y = out[(i / step * W + j) * step + i % step];
          if constexpr (std::is_integral_v<P>) {
            y = Stored(round_to_int8<T>(S(x), to.scales(p)[j]));
            to.starts(p)[j] -= INT8_OFFSET * y;
          } else {
            y = convert<Stored>(x);
          }
        }
  }
}

// Activations: m rows of k as the left operand, in tiles of MR rows, or of m where that is less. Rows of integers
// have a scale each.
template <class T, class Q>
struct Rows {
  using P = Packed<Q>;
  P* data;
  opmath_type<T>* scales;
  int64_t m, k;

  Rows(opmath_type<T>* data, opmath_type<T>* scales, int64_t m, int64_t k)
      : data(reinterpret_cast<P*>(data)), scales(scales), m(m), k(k) {}
  int64_t tile_rows() const { return std::min(m, MR); }
  P* tile(int64_t t, int64_t i = 0) const { return data + (t * packed_depth<P>(k) + i) * tile_rows(); }
};

// Elements [i, i + n) of row r, i in whole vectors.
template <class T, class Q>
INLINE void put(const Rows<T, Q>& to, int64_t r, int64_t i, vec<T> v, int64_t n) {
  using P = Packed<Q>;
  constexpr int64_t w = LANES<T>, step = ROW_STEP<P>;
  P lanes[w];
  if constexpr (std::is_integral_v<P>) {
    opmath_type<T> rounded[w];
    store(rounded, round_to_int8<T>(v, to.scales[r]));
    for (int64_t j = 0; j < w; ++j) lanes[j] = P(int32_t(rounded[j]) + INT8_OFFSET);
  } else {
    store(lanes, v);
  }
  P* out = to.tile(r / MR, i / step * step) + r % MR * step;
  const int64_t steps = (std::min(n, w) + step - 1) / step;
  if constexpr (step >= w) {
    std::memcpy(out + i % step, lanes, sizeof lanes);
    if (n <= w) std::memset(out + i % step + w, 0, (step - i % step - w) * sizeof(P));
  } else if (to.m == 1)
    std::memcpy(out, lanes, steps * step * sizeof(P));
  else
    for (int64_t j = 0; j < steps; ++j)
      std::memcpy(out + j * to.tile_rows() * step, lanes + j * step, step * sizeof(P));
}

// The whole row r, with its own scale.
template <class T, class Q, class X>
INLINE void put_row(const Rows<T, Q>& to, int64_t r, const X* x) {
  if constexpr (std::is_integral_v<Packed<Q>>) {
    vec<T> most{};
    for (int64_t i = 0; i < to.k; i += LANES<T>) {
      const vec<T> v = abs(load(x + i, to.k - i));
      most = v > most ? v : most;
      most = v == v ? most : v;
    }
    opmath_type<T> largest = 0;
    for (int64_t j = 0; j < LANES<T>; ++j) largest = larger(largest, opmath_type<T>(most[j]));
    to.scales[r] = int8_scale(largest);
  }
  for (int64_t i = 0; i < to.k; i += LANES<T>) put(to, r, i, load(x + i, to.k - i), to.k - i);
}

// c [·, n] (+)= rows of tiles [t0, t1) · panel p; c [t1 − t0 tiles] starts at the first of these rows. Slices of k
// bound the rounding of long sums; those of integers are exact. `step`: to the panel that is next.
template <class T, class Q>
void multiply_panel(const Rows<T, Q>& a, int64_t t0, int64_t t1, const Panels<T, Q>& b, int64_t p, opmath_type<T>* c,
                    int64_t ldc, int64_t n, bool add = false, int64_t step = 1) {
  using P = Packed<Q>;
  constexpr int64_t W = NR<P>;
  const auto rows = [&](int64_t t) { return std::min(MR, a.m - t * MR); };
  if constexpr (std::is_integral_v<P>) {
    int32_t sums[MR * W];
    for (int64_t t = t0; t < t1; ++t) {
      for (int64_t r = 0; r < rows(t); ++r) std::copy_n(b.starts(p), W, sums + r * W);
      multiply(a.tile(t), b.operands(p), a.k, sums, W, rows(t), W, true, a.tile_rows());
      for (int64_t r = 0; r < rows(t); ++r) {
        opmath_type<T>* out = c + ((t - t0) * MR + r) * ldc;
        const opmath_type<T> scale = a.scales[t * MR + r];
        for (int64_t j = 0; j < n; ++j) {
          const opmath_type<T> product = opmath_type<T>(sums[r * W + j]) * (b.scales(p)[j] * scale);
          out[j] = add ? out[j] + product : product;
        }
      }
    }
  } else {
    using Stored = typename Panels<T, Q>::Stored;
    constexpr bool as_stored = std::is_same_v<Stored, P>;
    constexpr int64_t slice = as_stored ? KC<P> : SUMMED;
    alignas(LINE) P converted[as_stored ? 1 : SUMMED * W];
    for (int64_t k0 = 0; k0 < std::max<int64_t>(a.k, 1); k0 += slice) {
      const Stored* const panel = b.operands(p) + k0 * W;
      const int64_t here = std::min(slice, a.k - k0);
      const Stored* const next = k0 + here < a.k ? panel + here * W : b.operands(std::max<int64_t>(0, p + step));
      const auto multiply_tiles = [&](const auto* columns) __attribute__((always_inline)) {
        for (int64_t t = t0; t < t1; ++t)
          multiply(a.tile(t, k0), columns, here, c + (t - t0) * MR * ldc, ldc, rows(t), n, add || k0 > 0, a.tile_rows(),
                   share_ahead<P>(next, here, t - t0, t1 - t0));
      };
      if constexpr (!as_stored)
        if (t1 - t0 > 1) {  // several tiles: converted once for all of them
          for (int64_t i = 0; i < here * W; i += LANES<P>) store(converted + i, load(panel + i));
          multiply_tiles(converted);
          continue;
        }
      multiply_tiles(panel);
    }
  }
}

// f(p, t0, t1) for this thread's share of the products of `panels` panels with `tiles` tiles: panel p, tiles [t0, t1).
// The first `backwards` panels are taken in that order, before the others.
template <class F>
INLINE void share_products(const Team& team, int64_t panels, int64_t tiles, F f, int64_t backwards = 0) {
  const auto [i0, i1] = team.share(panels * tiles);
  const int64_t end = std::max(i0, std::min(i1, backwards * tiles));
  for (int64_t i = end; i > i0;) {
    const int64_t p = (i - 1) / tiles, t0 = std::max<int64_t>(0, i0 - p * tiles), t1 = i - p * tiles;
    f(p, t0, t1);
    i -= t1 - t0;
  }
  for (int64_t i = end; i < i1;) {
    const int64_t t0 = i % tiles, t1 = std::min(tiles, t0 + i1 - i);
    f(i / tiles, t0, t1);
    i += t1 - t0;
  }
}
