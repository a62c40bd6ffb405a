// The parts of a step that every decoder shares. Included once per ISA, before a decoder's own kernels.
#include "decode_operands-inl.h"

// Resets this thread's share of the sequences. The caller waits.
template <class T, class Q>
void start_decode(const Team& team, Decode<T, Q>& s) {
  const auto [b0, b1] = team.share(s.B);
  std::fill(s.ended + b0, s.ended + b1, false);
  std::fill(s.tokens + b0 * s.steps, s.tokens + b1 * s.steps, s.pad_id);
}

// On the first step of a chunk, the whole team: projected = W_d d for all steps of the chunk.
template <class T, class Q>
void project_features(Team& team, Decode<T, Q>& s, const Panels<T, Q>& weight, int64_t t) {
  if (t % s.chunk) return;
  const int64_t m = std::min(s.chunk, s.steps - t) * s.B;
  const Rows<T, Q> rows{s.feature_rows, s.feature_scales, m, s.D};
  const auto [r0, r1] = team.share(m);
  for (int64_t r = r0; r < r1; ++r) put_row(rows, r, s.features + (t * s.B + r) * s.D);
  team.wait();
  share_products(team, weight.count(), num_tiles(m), [&](int64_t p, int64_t t0, int64_t t1) {
    const int64_t column = p * weight.W;
    multiply_panel(rows, t0, t1, weight, p, s.projected + t0 * MR * s.width + column, s.width,
                   std::min(weight.W, s.width - column));
  });
  team.wait();
}

// W_d dₜ [width] of sequence b.
template <class T, class Q>
INLINE opmath_type<T>* projected_row(const Decode<T, Q>& s, int64_t t, int64_t b) {
  return s.projected + (t % s.chunk * s.B + b) * s.width;
}

// A thread looks at its share of the logits of step t, then all threads' best ones are compared. In order of the
// tokens, so that the first of equal ones is taken; a NaN is larger than any number, as in torch.
template <class T, class Q>
void forget_best(const Team& team, Decode<T, Q>& s) {
  Best<opmath_type<T>>* best = s.bests + team.id * s.best_size;
  std::fill(best, best + s.B, Best<opmath_type<T>>{0, -1});
}
template <class S>
INLINE bool better(S logit, const Best<S>& best) {
  return best.token < 0 || logit > best.logit || (logit != logit && best.logit == best.logit);
}

// The best of n logits, the tokens from `first` on, and what was best before.
template <class T, int N>
INLINE void take_best(const vec<T> (&logits)[N], int64_t n, int64_t first, Best<opmath_type<T>>& best) {
  using S = opmath_type<T>;
  vec<T> top = logits[0], wrong{};
  for (int v = 0; v < N; ++v) {
    top = logits[v] > top ? logits[v] : top;
    wrong = logits[v] == logits[v] ? wrong : logits[v];
  }
  const bool some_wrong = sum(wrong) != 0;
  S largest = top[0];
  for (int l = 1; l < LANES<T>; ++l) largest = top[l] > largest ? S(top[l]) : largest;
  if (!some_wrong && best.token >= 0 && !(largest > best.logit)) return;
  S values[N * LANES<T>];
  std::memcpy(values, logits, sizeof values);
  for (int64_t j = 0; j < n; ++j)
    if ((some_wrong || values[j] == largest) && better(values[j], best)) best = {values[j], first + j};
}

// The classifier's product of panel p with tiles [t0, t1).
template <class T, class Q>
void classify(const Team& team, Decode<T, Q>& s, const Rows<T, Q>& rows, const Panels<T, Q>& weight, int64_t t,
              int64_t p, int64_t t0, int64_t t1) {
  using S = opmath_type<T>;
  constexpr int64_t w = LANES<T>, N = Panels<T, Q>::W / w;
  S* block = s.blocks + team.id * s.block_size;
  Best<S>* bests = s.bests + team.id * s.best_size;
  const int64_t first = p * weight.W, n = std::min(weight.W, s.V - first);
  multiply_panel(rows, t0, t1, weight, p, block, weight.W, n);
  for (int64_t b = t0 * MR; b < std::min(t1 * MR, s.B); ++b, block += weight.W) {
    const S* noise = s.noise ? s.noise + (t * s.B + b) * s.V + first : nullptr;
    vec<T> logits[N];
    for (int64_t v = 0; v < N; ++v) {
      const int64_t k = v * w, left = n - k;
      logits[v] = vec<T>{} - std::numeric_limits<S>::infinity();
      if (left <= 0) continue;
      vec<T> sums = load(block + k, left) + load(s.classifier_bias + first + k, left);
      if (noise) sums += load(noise + k, left);
      for (int64_t l = left; l < w; ++l) sums[l] = -std::numeric_limits<S>::infinity();
      logits[v] = sums;
    }
    take_best<T>(logits, n, first, bests[b]);
  }
}

// The token before step t of sequence b.
template <class T, class Q>
INLINE int64_t previous_token(const Team& team, const Decode<T, Q>& s, int64_t t, int64_t b) {
  if (t == 0) return s.V;
  Best<opmath_type<T>> best = s.bests[b];
  for (int i = 1; i < team.size; ++i) {
    const Best<opmath_type<T>>& other = s.bests[i * s.best_size + b];
    if (other.token >= 0 && better(other.logit, best)) best = other;
  }
  return best.token;
}

// That token becomes the sequence's token, unless it has ended. One thread for each sequence.
template <class T, class Q>
void store_token(const Team& team, Decode<T, Q>& s, int64_t t, int64_t b) {
  if (t == 0 || s.ended[b]) return;
  const int64_t token = previous_token(team, s, t, b);
  s.tokens[b * s.steps + t - 1] = token;
  if (token != s.end_id) return;
  s.ended[b] = true;
  s.running.fetch_sub(1, std::memory_order_relaxed);
}
