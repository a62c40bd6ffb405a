// Linear layer over dense inputs and tokens, forward and backward. Equations: fastvae/ops/linear.py.
// Products run by slabs of rows, each thread its own, against a weight that the team has packed once.

// out [rows, n] = finish(row, column, m [rows, k] · packed_b), by vectors, for this thread's rows: a slab of rows by a
// panel of columns at a time. Behind the rows of m are as many as `later` of the next call's.
template <class T, class F>
INLINE void multiply_slabs(const Team& team, int64_t rows, int64_t later, int64_t n, int64_t k, const T* m,
                           void* packed_b, void* packed, opmath_type<T>* slab, T* out, F finish) {
  using P = Packed<T>;
  constexpr int64_t W = NR<P>;
  const int64_t depth = packed_depth<P>(k);
  P* const own_tiles = static_cast<P*>(packed) + team.id * SLAB<T> * depth;
  opmath_type<T>* const own = slab + team.id * SLAB<T> * W;
  const auto [t0, t1] = team.share(num_tiles(rows));
  const int64_t last = std::min(t1 * MR, rows);
  const int64_t fitting = L2_BYTES / int64_t(std::max<int64_t>(depth, 1) * sizeof(P)) / MR * MR;
  const int64_t most = std::clamp(fitting, 4 * MR, SLAB<T>);
  for (int64_t r0 = t0 * MR; r0 < last; r0 += most) {
    const int64_t here = std::min(most, last - r0);
    pack_rows(m + r0 * k, 0, here, k, own_tiles);
    Upcoming upcoming;
    if (r0 + here < last) {
      upcoming.add(m + (r0 + here) * k, std::min(most, last - r0 - here) * k);
    } else {
      const auto [l0, l1] = team.share(later);
      upcoming.add(m + (rows + l0) * k, (l1 - l0) * k);
    }
    for (int64_t n0 = 0; n0 < n; n0 += W) {
      const int64_t columns = std::min(W, n - n0);
      for (int64_t k0 = 0; k0 < std::max<int64_t>(k, 1); k0 += KC<P>) {
        const P* const panel = static_cast<P*>(packed_b) + n0 * depth + k0 * W;
        const int64_t length = std::min(KC<P>, k - k0);
        for (int64_t t = 0; t < here; t += MR) {
          const int64_t height = std::min(MR, here - t);
          T* const there = out + (r0 + t) * n + n0;
          if (k0 + length >= k)  // fetched while the product runs
            for (int64_t r = 0; r < height; ++r)
              for (int64_t c = 0; c < columns; c += LINE / sizeof(T)) __builtin_prefetch(there + r * n + c, 1);
          multiply(own_tiles + t * depth + k0 * MR, panel, length, own + t * W, W, height, columns, k0 > 0, MR,
                   share_ahead<P>(panel + length * W, length, t / MR, num_tiles(here), &upcoming));
          if (k0 + length < k) continue;
          for (int64_t r = 0; r < height; ++r)
            for (int64_t c = 0; c < columns; c += LANES<T>)
              store(there + r * n + c, finish(r0 + t + r, n0 + c, load(own + (t + r) * W + c, columns - c)),
                    columns - c);
        }
      }
    }
  }
}

template <class T>
void linear(Team& team, const Linear<T>& s) {
  const int64_t N = s.N, columns = s.K + s.S;
  pack_panels(team, Strided<T>{s.weight, 1, columns}, s.K, N, static_cast<Packed<T>*>(s.packed_b));
  const auto [n0, n1] = team.share(N);
  for (int64_t n = n0; n < n1; ++n) {
    if (s.S == 0) s.table[n] = opmath_type<T>(s.bias[n]);
    for (int64_t v = 0; v < s.S; ++v)
      s.table[v * N + n] = opmath_type<T>(s.weight[n * columns + s.K + v]) + opmath_type<T>(s.bias[n]);
  }
  team.wait();
  multiply_slabs(
      team, s.rows, 0, N, s.K, s.x, s.packed_b, s.packed_a, s.slab,
      s.a, [&](int64_t row, int64_t n, vec<T> product) __attribute__((always_inline)) {
        const opmath_type<T>* token = s.table + (s.tokens ? s.tokens[row] : 0) * N;
        return product + load(token + n, N - n);
      });
}

// total [n0, n1) += da over `count` rows in the order given, in double: sums over many rows must not drift.
template <class T>
INLINE void add_rows(const LinearBackward<T>& s, const int64_t* order, int64_t count, int64_t n0, int64_t n1) {
  double* const total = s.total;
  const auto row = [&](int64_t i) { return s.da + order[i] * s.N; };
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {  // four at a time: the sums are read and written less often
    const T *const a = row(i), *const b = row(i + 1), *const c = row(i + 2), *const d = row(i + 3);
    for (int64_t n = n0; n < n1; ++n)
      total[n] += (double(opmath_type<T>(a[n])) + double(opmath_type<T>(b[n]))) +
                  (double(opmath_type<T>(c[n])) + double(opmath_type<T>(d[n])));
  }
  for (; i < count; ++i) {
    const T* const a = row(i);
    for (int64_t n = n0; n < n1; ++n) total[n] += double(opmath_type<T>(a[n]));
  }
}

template <class T>
void linear_backward(Team& team, const LinearBackward<T>& s) {
  const int64_t N = s.N, K = s.K, columns = K + s.S, tokens = std::max<int64_t>(s.S, 1);
  const auto [n0, n1] = team.share(N);
  const auto sum_rows = [&](int64_t v) {
    for (int64_t n = n0; n < n1; ++n) s.dw[(K + v) * N + n] = opmath_type<T>(s.total[n]);
    std::fill(s.total + n0, s.total + n1, 0.0);
  };
  std::fill(s.total + n0, s.total + n1, 0.0);
  if (s.S || !K)
    for (int64_t v = 0; v < tokens; ++v) {
      add_rows(s, s.order + s.starts[v], s.starts[v + 1] - s.starts[v], n0, n1);
      sum_rows(v);
    }
  if (K) {
    pack_panels(team, Strided<T>{s.weight, columns, 1}, N, K, static_cast<Packed<T>*>(s.packed_b));
    // A slice of rows at a time, whose da stays in the L3 cache.
    for (int64_t r0 = 0; r0 < s.rows; r0 += SLICE_ROWS<T>) {
      const int64_t here = std::min(SLICE_ROWS<T>, s.rows - r0);
      const T* const da = s.da + r0 * N;
      if (!s.S) add_rows(s, s.order + r0, here, n0, n1);
      gemm<T>(team, K, N, here, Strided<T>{s.x + r0 * K, 1, K}, Strided<T>{da, N, 1}, s.dw, N, r0 > 0, s.scratch);
      multiply_slabs(
          team, here, std::min(SLICE_ROWS<T>, s.rows - r0 - here), K, N, da, s.packed_b, s.packed_a, s.slab,
          s.dx + r0 * K, [&](int64_t, int64_t, vec<T> product) __attribute__((always_inline)) { return product; });
    }
    if (!s.S) sum_rows(0);
  }
  for (int64_t n = n0; n < n1; ++n) {
    double total = 0;
    for (int64_t v = 0; v < tokens; ++v) total += double(s.dw[(K + v) * N + n]);
    s.dbias[n] = T(opmath_type<T>(total));
  }
  for (int64_t k0 = 0; k0 < columns; k0 += 16)  // blocks keep both sides of the transposition in cache
    for (int64_t n = n0; n < n1; ++n)
      for (int64_t k = k0; k < std::min(k0 + 16, columns); ++k) s.dweight[n * columns + k] = T(s.dw[k * N + n]);
}
