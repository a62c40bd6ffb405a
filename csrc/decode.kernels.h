// The parts of a step that every decoder shares. Included once per level, before a decoder's own kernels.

// A buffer's memory as packed operands.
template <class T>
INLINE Packed<T>* packed(Wide<T>* buffer) {
  return reinterpret_cast<Packed<T>*>(buffer);
}

// Packs the operands that stay, and resets the sequences. The caller waits.
template <class T>
void start_decode(const Team& team, Decode<T>& s) {
  pack_panels(team, Matrix<T>{s.feature_weight, 1, s.D}, s.D, s.width, packed<T>(s.feature_panels));
  pack_panels(team, Matrix<T>{s.classifier_weight, 1, s.hidden}, s.hidden, s.V, packed<T>(s.classifier));
  const auto [b0, b1] = team.share(s.B);
  for (int64_t b = b0; b < b1; ++b) {
    s.symbols[b] = s.V;
    s.ended[b] = false;
    std::fill_n(s.tokens + b * s.steps, s.steps, s.pad_id);
  }
}

// Row b of the features of step t times W_d. On the first step of a chunk the team projects the whole chunk.
template <class T>
void project_features(Team& team, Decode<T>& s, int64_t t) {
  if (t % s.chunk) return;
  const int64_t rows = std::min(s.chunk, s.steps - t) * s.B;
  const auto [r0, r1] = team.share(rows);
  for (int64_t r = r0; r < r1; ++r)
    pack_row(s.features + (t * s.B + r) * s.D, 1, s.D,
             tile_at(packed<T>(s.feature_tiles), packed_depth<Packed<T>>(s.D), r));
  team.wait();
  multiply_panels(team, packed<T>(s.feature_tiles), packed<T>(s.feature_panels), s.D, s.projected, s.width, rows,
                  s.width);
  team.wait();
}

// a [width] += W_d dₜ + E[previous symbol], for one sequence.
template <class T>
INLINE void add_inputs(const Decode<T>& s, int64_t t, int64_t b, Wide<T>* a, bool add) {
  const Wide<T>* projected = s.projected + (t % s.chunk * s.B + b) * s.width;
  const T* row = s.symbol_rows + s.symbols[b] * s.width;
  for (int64_t k = 0; k < s.width; k += LANES<T>) {
    const int64_t n = s.width - k;
    const vec<T> v = load(projected + k, n) + load(row + k, n);
    store(a + k, add ? v + load(a + k, n) : v, n);
  }
}

// The symbol of step t for one sequence from its logits: the first largest; a NaN is larger than any number, as in
// torch.
template <class T>
INLINE void choose(Decode<T>& s, int64_t t, int64_t b) {
  using S = Wide<T>;
  const S* noise = s.noise ? s.noise + (t * s.B + b) * s.V : nullptr;
  int64_t best = 0;
  S top = 0;
  for (int64_t v = 0; v < s.V; ++v) {
    const S logit = s.logits[b * s.V + v] + S(s.classifier_bias[v]) + (noise ? noise[v] : S(0));
    if (v == 0 || logit > top || (logit != logit && top == top)) best = v, top = logit;
  }
  if (!s.ended[b]) s.tokens[b * s.steps + t] = best;
  s.symbols[b] = best;
  if (best == s.end_id && !s.ended[b]) {
    s.ended[b] = true;
    s.running.fetch_sub(1, std::memory_order_relaxed);
  }
}
