// Decoding with a LayerNorm-LSTM. Equations: fastvae/ops/decode_lstm.py.
// Two phases a symbol: the products that need hₜ₋₁ (recurrent, and the classifier's for the symbol before), shared out
// by columns; then choice, norm, gates and state, shared out by sequences.
#include "decode.kernels.h"
#include "layer_norm_lstm.kernels.h"

template <class T>
void decode_lstm(Team& team, Decode<T>& s, const DecodeLstm<T>& lstm) {
  using S = Wide<T>;
  const int64_t H = s.hidden, G = 4 * H, B = s.B;
  Packed<T>* const panels = packed<T>(lstm.panels);
  Packed<T>* const tiles = packed<T>(lstm.tiles);
  const auto tile = [&](int64_t b) { return tile_at(tiles, packed_depth<Packed<T>>(H), b); };
  const auto [b0, b1] = team.share(B);
  start_decode(team, s);
  pack_panels(team, Matrix<T>{lstm.weight_hh, 1, H}, H, G, panels);
  for (int64_t b = b0; b < b1; ++b) {
    pack_row(lstm.h0 + b * H, 1, H, tile(b));
    for (int64_t k = 0; k < H; ++k) lstm.c[b * H + k] = S(lstm.c0[b * H + k]);
  }
  team.wait();
  for (int64_t t = 0;; ++t) {
    if (t < s.steps) project_features(team, s, t);
    if (t < s.steps) multiply_panels(team, tiles, panels, H, lstm.a, G, B, G);
    if (t > 0) multiply_panels(team, tiles, packed<T>(s.classifier), H, s.logits, s.V, B, s.V);
    team.wait();
    for (int64_t b = b0; b < b1; ++b) {
      if (t > 0) choose(s, t - 1, b);
      if (t == s.steps) continue;
      S* a = lstm.a + b * G;
      add_inputs(s, t, b, a, true);
      T* h = lstm.h + b * H;
      gate_row(a, lstm.gain, lstm.bias, lstm.c + b * H, lstm.c + b * H, h, static_cast<T*>(nullptr),
               static_cast<S*>(nullptr), H, S(lstm.eps));
      pack_row(h, 1, H, tile(b));
    }
    team.wait();
    if (t == s.steps || s.running.load(std::memory_order_relaxed) == 0) return;
  }
}
