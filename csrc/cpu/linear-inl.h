// Linear layer over dense inputs and tokens, forward and backward. Equations: fastvae/ops/linear.py.
// Products run by slabs of rows, each thread its own, against a weight that the team has packed once.

// m [rows, k] · packed_b for this thread's rows, a slab of rows by a panel of columns at a time:
// finish(row, its column n0, n1, the product from n0 on).
template <class T, class F>
INLINE void multiply_slabs(const Team& team, int64_t rows, int64_t n, int64_t k, const T* m, void* packed_b,
                           void* packed, opmath_type<T>* slab, F finish) {
  using P = Packed<T>;
  constexpr int64_t W = NR<P>;
  const int64_t depth = packed_depth<P>(k);
  const Team alone{0, 1, team.barrier};
  P* const own_tiles = static_cast<P*>(packed) + team.id * SLAB<T> * depth;
  opmath_type<T>* const own = slab + team.id * SLAB<T> * W;
  const auto [t0, t1] = team.share(num_tiles(rows));
  const int64_t last = std::min(t1 * MR, rows);
  for (int64_t r0 = t0 * MR; r0 < last; r0 += SLAB<T>) {
    const int64_t here = std::min(SLAB<T>, last - r0);
    pack_rows(m + r0 * k, 0, here, k, own_tiles);
    for (int64_t n0 = 0; n0 < n; n0 += W) {
      const int64_t n1 = std::min(n0 + W, n);
      multiply_panels(alone, own_tiles, static_cast<P*>(packed_b) + n0 * depth, k, own, W, here, n1 - n0);
      for (int64_t r = 0; r < here; ++r) finish(r0 + r, n0, n1, own + r * W);
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
  multiply_slabs(team, s.rows, N, s.K, s.x, s.packed_b, s.packed_a, s.slab,
                 [&](int64_t row, int64_t n0, int64_t n1, const opmath_type<T>* product) {
                   const opmath_type<T>* token = s.table + (s.tokens ? s.tokens[row] : 0) * N;
                   for (int64_t n = n0; n < n1; n += LANES<T>)
                     store(s.a + row * N + n, load(product + n - n0, n1 - n) + load(token + n, n1 - n), n1 - n);
                 });
}

// sums [N] of da over the rows of one token, columns [n0, n1), in double: sums over many rows must not drift.
template <class T>
INLINE void sum_rows(const LinearBackward<T>& s, const int64_t* order, int64_t count, int64_t n0, int64_t n1,
                     opmath_type<T>* sums) {
  double* const total = s.total;
  std::fill(total + n0, total + n1, 0.0);
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
  for (int64_t n = n0; n < n1; ++n) sums[n] = opmath_type<T>(total[n]);
}

template <class T>
void linear_backward(Team& team, const LinearBackward<T>& s) {
  const int64_t N = s.N, K = s.K, columns = K + s.S, tokens = std::max<int64_t>(s.S, 1);
  const auto [n0, n1] = team.share(N);
  for (int64_t v = 0; v < tokens; ++v)
    sum_rows(s, s.order + s.starts[v], s.starts[v + 1] - s.starts[v], n0, n1, s.dw + (K + v) * N);
  for (int64_t n = n0; n < n1; ++n) {
    double total = 0;
    for (int64_t v = 0; v < tokens; ++v) total += double(s.dw[(K + v) * N + n]);
    s.dbias[n] = T(opmath_type<T>(total));
  }
  if (K) {
    pack_panels(team, Strided<T>{s.weight, columns, 1}, N, K, static_cast<Packed<T>*>(s.packed_b));
    gemm<T>(team, K, N, s.rows, Strided<T>{s.x, 1, K}, Strided<T>{s.da, N, 1}, s.dw, N, false, s.scratch);
    multiply_slabs(team, s.rows, K, N, s.da, s.packed_b, s.packed_a, s.slab,
                   [&](int64_t row, int64_t k0, int64_t k1, const opmath_type<T>* product) {
                     for (int64_t k = k0; k < k1; k += LANES<T>)
                       store(s.dx + row * K + k, load(product + k - k0, k1 - k), k1 - k);
                   });
  }
  for (int64_t k0 = 0; k0 < columns; k0 += 16)  // blocks keep both sides of the transposition in cache
    for (int64_t n = n0; n < n1; ++n)
      for (int64_t k = k0; k < std::min(k0 + 16, columns); ++k) s.dweight[n * columns + k] = T(s.dw[k * N + n]);
}
