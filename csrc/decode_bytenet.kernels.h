// Decoding with highway masked convolutions. Equations: fastvae/ops/decode_bytenet.py.
// A layer's tile of a sequence holds the vector before and the current one, [2C]: its product is one pass over [W₀ W₁].
#include "decode.kernels.h"

template <class T>
void decode_bytenet(Team& team, Decode<T>& s, const DecodeBytenet<T>& net) {
  using S = Wide<T>;
  const int64_t C = s.hidden, G = 3 * C, B = s.B, w = LANES<T>;
  const int64_t layer_panels = 2 * C * packed_columns(G), layer_tiles = packed_rows(B) * 2 * C;
  const auto tile = [&](int64_t layer, int64_t b) {
    return net.tiles + layer * layer_tiles + b / ROWS * ROWS * 2 * C + b % ROWS;
  };
  const auto [b0, b1] = team.share(B);
  start_decode(team, s);
  const auto [p0, p1] = team.share(panels<S>(G));
  for (int64_t layer = 0; layer < net.layers; ++layer)
    for (int64_t p = p0; p < p1; ++p)
      for (int tap = 0; tap < 2; ++tap)
        pack_panel(net.weight + layer * G * 2 * C + p * PANEL<S> * 2 * C + tap, 2, 2 * C, C,
                   std::min(PANEL<S>, G - p * PANEL<S>),
                   net.panels + layer * layer_panels + (2 * p + tap) * C * PANEL<S>);
  for (int64_t b = b0; b < b1; ++b)
    for (int64_t layer = 0; layer < net.layers; ++layer) pack_row(static_cast<const T*>(nullptr), 1, C, tile(layer, b));
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
      pack_row(x, 1, C, net.layers ? tile(0, b) + C * ROWS : net.last + b / ROWS * ROWS * C + b % ROWS);
    }
    team.wait();
    for (int64_t layer = 0; layer < net.layers; ++layer) {
      multiply_panels(team, net.tiles + layer * layer_tiles, net.panels + layer * layer_panels, 2 * C, net.a, G, B, G);
      team.wait();
      const T* bias = net.bias + layer * G;
      for (int64_t b = b0; b < b1; ++b) {
        const S* a = net.a + b * G;
        S* x = net.x + b * C;
        pack_row(x, 1, C, tile(layer, b));  // what is current now is before at the next step
        for (int64_t k = 0; k < C; k += w) {
          const int64_t n = C - k;
          const auto z = [&](int q) __attribute__((always_inline)) {
            return load(a + q * C + k, n) + load(bias + q * C + k, n);
          };
          vec<T> y = sigmoid(z(0)) * tanh(z(2));
          if (net.carry) y += sigmoid(z(1)) * load(x + k, n);
          store(x + k, y, n);
        }
        pack_row(x, 1, C,
                 layer + 1 < net.layers ? tile(layer + 1, b) + C * ROWS : net.last + b / ROWS * ROWS * C + b % ROWS);
      }
      team.wait();
    }
    multiply_panels<S>(team, net.last, s.classifier, C, s.logits, s.V, B, s.V);
    team.wait();
    for (int64_t b = b0; b < b1; ++b) choose(s, t, b);
    if (s.end_id >= 0) {
      team.wait();
      if (s.running.load(std::memory_order_relaxed) == 0) return;
    }
  }
}
