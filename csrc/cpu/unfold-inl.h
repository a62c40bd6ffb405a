// Windows of convolutions with stride 2, and their sum. Equations: fastvae/ops/unfold.py.
// Rows are (t, b) pairs; x has two of them a row of windows, B rows apart.

template <class T>
void unfold(Team& team, const Unfold<T>& s) {
  const int64_t B = s.B, C = s.C;
  const auto [r0, r1] = team.share(s.steps * B);
  for (int64_t r = r0; r < r1; ++r) {
    const T *const even = s.x + (r / B * 2 * B + r % B) * C, *const odd = even + B * C;
    const T* const before = r < B ? nullptr : even - B * C;
    T* const window = s.windows + r * C * 3;
    if (before) {
      for (int64_t k = 0; k < C; ++k)
        window[3 * k] = before[k], window[3 * k + 1] = even[k], window[3 * k + 2] = odd[k];
    } else {
      for (int64_t k = 0; k < C; ++k) window[3 * k] = T(0), window[3 * k + 1] = even[k], window[3 * k + 2] = odd[k];
    }
  }
}

template <class T>
void fold(Team& team, const Fold<T>& s) {
  using S = opmath_type<T>;
  const int64_t B = s.B, C = s.C;
  const auto [r0, r1] = team.share(s.steps * B);
  for (int64_t r = r0; r < r1; ++r) {
    T *const even = s.x + (r / B * 2 * B + r % B) * C, *const odd = even + B * C;
    const T* const window = s.windows + r * C * 3;
    const T* const after = r + B < s.steps * B ? window + B * C * 3 : nullptr;
    const auto row = [&](auto later, auto bias) __attribute__((always_inline)) {
      for (int64_t k = 0; k < C; ++k) {
        even[k] = T(S(window[3 * k + 1]) + bias(k));
        odd[k] = T(S(window[3 * k + 2]) + later(k) + bias(k));
      }
    };
    const auto none = [](int64_t) { return S(0); };
    const auto later = [&](int64_t k) { return S(after[3 * k]); };
    const auto bias = [&](int64_t k) { return S(s.bias[k]); };
    if (after)
      s.bias ? row(later, bias) : row(later, none);
    else
      s.bias ? row(none, bias) : row(none, none);
  }
}
