// Decoding with highway masked convolutions. Equations: fastvae/ops/decode_bytenet.py.
// A layer's tile of a sequence holds the vector before and the current one, [2C]: its product is one pass over [W₀ W₁].
#include "decode.kernels.h"

template <class T>
void decode_bytenet(Team& team, Decode<T>& s, const DecodeBytenet<T>& net) {
  using S = Wide<T>;
  const int64_t C = s.hidden, G = 3 * C, B = s.B, w = LANES<T>;
  using P = Packed<T>;
  const int64_t depth = packed_depth<P>(C);  // of a tap
  const int64_t layer_panels = 2 * depth * PANEL<P> * panels<P>(G), layer_tiles = packed_rows(B) * 2 * depth;
  P* const tiles = packed<T>(net.tiles);
  // Where the input of `layer` goes, or that of the classifier after the last one; tap 0 is the vector before.
  const auto tile = [&](int64_t layer, int64_t b, int tap) {
    return layer < net.layers ? tile_at(tiles + layer * layer_tiles, 2 * depth, b, tap * depth)
                              : tile_at(packed<T>(net.last), depth, b);
  };
  const auto [b0, b1] = team.share(B);
  start_decode(team, s);
  const auto [p0, p1] = team.share(panels<P>(G));
  for (int64_t layer = 0; layer < net.layers; ++layer)
    for (int64_t p = p0; p < p1; ++p)
      for (int tap = 0; tap < 2; ++tap)
        pack_panel(net.weight + layer * G * 2 * C + p * PANEL<P> * 2 * C + tap, 2, 2 * C, C,
                   std::min(PANEL<P>, G - p * PANEL<P>),
                   packed<T>(net.panels) + layer * layer_panels + (2 * p + tap) * depth * PANEL<P>);
  for (int64_t b = b0; b < b1; ++b)
    for (int64_t layer = 0; layer < net.layers; ++layer)
      pack_row(static_cast<const T*>(nullptr), 1, C, tile(layer, b, 0));
  team.wait();
  for (int64_t t = 0; t < s.steps; ++t) {
    project_features(team, s, t);
    for (int64_t b = b0; b < b1; ++b) {
      S* a = net.a + b * G;
      S* x = net.x + b * C;
      add_inputs(s, t, b, a, false);
      for (int64_t k = 0; k < C; k += w) {
        const int64_t n = C - k;
        store(x + k, tanh(load(a + k, n)) * sigmoid(load(a + C + k, n)), n);
      }
      pack_row(x, 1, C, tile(0, b, 1));
    }
    team.wait();
    for (int64_t layer = 0; layer < net.layers; ++layer) {
      multiply_panels(team, tiles + layer * layer_tiles, packed<T>(net.panels) + layer * layer_panels, 2 * depth, net.a,
                      G, B, G);
      team.wait();
      const T* bias = net.bias + layer * G;
      for (int64_t b = b0; b < b1; ++b) {
        const S* a = net.a + b * G;
        S* x = net.x + b * C;
        pack_row(x, 1, C, tile(layer, b, 0));  // what is current now is before at the next step
        for (int64_t k = 0; k < C; k += w) {
          const int64_t n = C - k;
          const auto z = [&](int q) __attribute__((always_inline)) {
            return load(a + q * C + k, n) + load(bias + q * C + k, n);
          };
          vec<T> y = sigmoid(z(0)) * tanh(z(2));
          if (net.carry) y += sigmoid(z(1)) * load(x + k, n);
          store(x + k, y, n);
        }
        pack_row(x, 1, C, tile(layer + 1, b, 1));
      }
      team.wait();
    }
    multiply_panels(team, packed<T>(net.last), packed<T>(s.classifier), C, s.logits, s.V, B, s.V);
    team.wait();
    for (int64_t b = b0; b < b1; ++b) choose(s, t, b);
    if (s.end_id >= 0) {
      team.wait();
      if (s.running.load(std::memory_order_relaxed) == 0) return;
    }
  }
}
