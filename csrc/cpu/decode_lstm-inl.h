// Decoding with a LayerNorm-LSTM. Equations: fastvae/ops/decode_lstm.py.
// Three phases a token: the products that need hₜ₋₁ (recurrent, and the classifier's for the token before); its
// choice, the inputs and the norm's statistics; gates and state. Threads share the first by columns and the others by
// channels. Every other token takes the recurrent panels backwards: those used last are still in the cache.
#include "decode-inl.h"

// The packed weights of a decoder, one after the other.
template <class T, class Q>
struct LstmPanels {
  Panels<T, Q> feature, recurrent, classifier;
  LstmPanels(char* data, int64_t D, int64_t H, int64_t V)
      : feature{data, D, 4 * H}, recurrent{feature.end(), H, 4 * H}, classifier{recurrent.end(), H, V} {}
};

template <class T, class Q>
void size_of_packed(const LstmWeights<T, Q>& s, int64_t& bytes) {
  bytes = LstmPanels<T, Q>(nullptr, s.D, s.H, s.V).classifier.end() - static_cast<char*>(nullptr);
}

template <class T, class Q>
void pack_weights(Team& team, const LstmWeights<T, Q>& s, char* packed) {
  const LstmPanels<T, Q> panels(packed, s.D, s.H, s.V);
  pack_weight(team, s.feature, panels.feature);
  pack_weight(team, s.recurrent, panels.recurrent);
  pack_weight(team, s.classifier, panels.classifier);
}

// a [4H] += row, at this thread's channels [c0, c1) of each gate -> moments of the sums.
template <class T, class S = opmath_type<T>>
INLINE Moments<S> add_row(S* a, const T* row, int64_t H, int64_t c0, int64_t c1) {
  constexpr int64_t w = LANES<T>;
  const S count = S(4 * (c1 - c0));
  if (count == 0) return {};
  vec<T> total{}, deviations{}, squares{};
  for (int64_t q = 0; q < 4 * H; q += H)
    for (int64_t k = c0; k < c1; k += w) {
      const vec<T> v = load(a + q + k, c1 - k) + load(row + q + k, c1 - k);
      store(a + q + k, v, c1 - k);
      total += v;
    }
  const S about = sum(total) / count;
  for (int64_t q = 0; q < 4 * H; q += H)
    for (int64_t k = c0; k < c1; k += w) {
      vec<T> d = load(a + q + k, c1 - k) - about;
      for (int64_t j = c1 - k; j < w; ++j) d[j] = 0;
      deviations += d;
      squares += d * d;
    }
  const S shift = sum(deviations) / count, total_squares = sum(squares);  // shift: what rounding left out of the mean
  if (!(total_squares <= std::numeric_limits<S>::max())) return {count, about, total_squares};
  return {count, about + shift, std::max(total_squares - shift * shift * count, S(0))};
}

template <class T, class Q>
void decode_lstm(Team& team, Decode<T, Q>& s, const DecodeLstm<T>& lstm) {
  using S = opmath_type<T>;
  constexpr int64_t w = LANES<T>;
  const int64_t H = s.hidden, G = 4 * H, B = s.B;
  const LstmPanels<T, Q> panels(s.packed, s.D, H, s.V);
  const Rows<T, Q> hidden{lstm.rows, lstm.scales, B, H};
  const auto [b0, b1] = team.share(B);
  auto [c0, c1] = team.share((H + w - 1) / w);
  c0 *= w, c1 = std::min(c1 * w, H);
  // h as operands. As integers its scale is fixed, |h| < 1; a NaN is told by the scale, and stays.
  const auto put_hidden = [&](int64_t b, auto h_at) __attribute__((always_inline)) {
    vec<T> wrong{};
    for (int64_t k = c0; k < c1; k += w) {
      const vec<T> h = h_at(k, H - k);
      put(hidden, b, k, h, H - k);
      wrong = h == h ? wrong : h;
    }
    if (const S found = sum(wrong); found != found)
      std::atomic_ref<S>(lstm.scales[b]).store(found, std::memory_order_relaxed);
  };
  start_decode(team, s);
  if (team.id == 0) std::fill(lstm.scales, lstm.scales + B, S(1) / 127);
  team.wait();
  for (int64_t b = 0; b < B; ++b) {
    put_hidden(
        b, [&](int64_t k, int64_t n) __attribute__((always_inline)) { return load(lstm.h0 + b * H + k, n); });
    for (int64_t k = c0; k < c1; ++k) lstm.c[b * H + k] = S(lstm.c0[b * H + k]);
  }
  team.wait();
  for (int64_t t = 0;; ++t) {
    if (t < s.steps) project_features(team, s, panels.feature, t);
    forget_best(team, s);
    const int64_t recurrent = t < s.steps ? panels.recurrent.count() : 0;
    share_products(
        team, recurrent + (t > 0 ? panels.classifier.count() : 0), num_tiles(B),
        [&](int64_t p, int64_t t0, int64_t t1) {
          if (p >= recurrent) return classify(team, s, hidden, panels.classifier, t - 1, p - recurrent, t0, t1);
          const int64_t column = p * panels.recurrent.W;
          multiply_panel(hidden, t0, t1, panels.recurrent, p, projected_row(s, t, t0 * MR) + column, G,
                         std::min(panels.recurrent.W, G - column), true, t % 2 ? -1 : 1);
        },
        t % 2 ? recurrent : 0);
    team.wait();
    for (int64_t b = b0; b < b1; ++b) store_token(team, s, t, b);
    if (t == s.steps) return;
    for (int64_t b = 0; b < B; ++b) {
      const int64_t token = previous_token(team, s, t, b);
      lstm.moments[team.id * B + b] = add_row(projected_row(s, t, b), s.token_embeddings + token * G, H, c0, c1);
    }
    team.wait();
    if (s.running.load(std::memory_order_relaxed) == 0) return;
    for (int64_t b = 0; b < B; ++b) {
      Moments<S> all{0, 0, 0};
      for (int i = 0; i < team.size; ++i) all.add(lstm.moments[i * B + b]);
      const S mean = all.mean, r = reciprocal_std(all.squares / G, S(lstm.eps));
      const S* const a = projected_row(s, t, b);
      const T *const gain = lstm.gain, *const bias = lstm.bias;
      S* const c = lstm.c + b * H;
      put_hidden(
          b, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
            const auto z = [&](int64_t q) __attribute__((always_inline)) {
              const vec<T> v = (load(a + q * H + k, n) - mean) * r;
              return v * load(gain + q * H + k, n) + load(bias + q * H + k, n);
            };
            const vec<T> cell = sigmoid(z(1)) * load(c + k, n) + sigmoid(z(0)) * tanh(z(2));
            store(c + k, cell, n);
            return sigmoid(z(3)) * tanh(cell);
          });
    }
    team.wait();
  }
}
