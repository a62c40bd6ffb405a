// Decoding with highway masked convolutions. Equations: fastvae/ops/decode_bytenet.py.
// A panel holds all gates of its channels, so that the thread which multiplies by it goes on to their gates: one
// barrier a layer. What the vectors before give does not wait for a token: all layers' in one go, once a token is
// done.
#include "decode-inl.h"

// The packed weights of a decoder, one after the other.
template <class T, class Q>
struct BytenetPanels {
  Panels<T, Q> feature, first, classifier;  // `first` of 2N alike: every layer's tap 1, then every layer's tap 0
  int64_t layers;
  BytenetPanels(char* data, int64_t D, int64_t C, int64_t V, int64_t layers)
      : feature{data, D, 2 * C},
        first{feature.end(), C, 3 * C, 3},
        classifier{first.data + 2 * layers * (first.end() - first.data), C, V},
        layers(layers) {}
  Panels<T, Q> conv(int64_t layer, int tap) const {
    return {first.data + (layer + (1 - tap) * layers) * (first.end() - first.data), first.k, first.n, first.gates};
  }
};

template <class T, class Q>
void size_of_packed(const BytenetWeights<T, Q>& s, int64_t& bytes) {
  bytes = BytenetPanels<T, Q>(nullptr, s.D, s.C, s.V, s.layers).classifier.end() - static_cast<char*>(nullptr);
}

template <class T, class Q>
void pack_weights(Team& team, const BytenetWeights<T, Q>& s, char* packed) {
  const BytenetPanels<T, Q> panels(packed, s.D, s.C, s.V, s.layers);
  pack_weight(team, s.feature, panels.feature);
  for (int64_t layer = 0; layer < s.layers; ++layer)
    for (int tap = 0; tap < 2; ++tap)
      pack_weight(team, {s.conv.p + layer * s.layer_stride + tap * s.tap_stride, s.conv.sn, s.conv.sk},
                  panels.conv(layer, tap));
  pack_weight(team, s.classifier, panels.classifier);
}

template <class T, class Q>
void decode_bytenet(Team& team, Decode<T, Q>& s, const DecodeBytenet<T>& net) {
  using S = opmath_type<T>;
  using P = Packed<Q>;
  constexpr int64_t w = LANES<T>, W = NR<P>, channels = W / 3;
  constexpr bool integer = std::is_integral_v<P>;
  const int64_t C = s.hidden, B = s.B, N = net.layers;
  const BytenetPanels<T, Q> panels(s.packed, s.D, C, s.V, N);
  const bool alone = integer && B < team.size;  // see DecodeBytenet
  const int64_t set = alone ? team.id * (N + 1) : 0, count = panels.first.count();
  const auto rows = [&](int64_t layer) {
    return Rows<T, Q>{net.rows + (set + layer) * operand_room(B, C), net.scales + (set + layer) * B, B, C};
  };
  // The vectors that go into a layer. Integers need all of a row before its scale is known: the caller waits, then
  // rounds.
  const auto x = [&](int64_t layer) { return net.x + layer % 2 * B * C; };
  const auto before = [&](int64_t layer, int64_t p, int64_t b) {
    return net.before + ((layer * count + p) * B + b) * W;
  };
  const auto keep = [&](int64_t layer, int64_t b, int64_t k, vec<T> y) __attribute__((always_inline)) {
    store(x(layer) + b * C + k, y, C - k);
    if constexpr (!integer) put(rows(layer), b, k, y, C - k);
  };
  const auto [b0, b1] = team.share(B);
  const auto complete = [&](int64_t layer) {
    team.wait();
    if constexpr (integer) {
      for (int64_t b = alone ? 0 : b0; b < (alone ? B : b1); ++b) put_row(rows(layer), b, x(layer) + b * C);
      if (!alone) team.wait();
    }
  };
  // f(b, k, j) for a product's sequences b: lanes from j on of panel p, which are the channels from k on.
  const auto own_channels = [&](int64_t p, int64_t t0, int64_t t1, auto f) __attribute__((always_inline)) {
    for (int64_t b = t0 * MR; b < std::min(t1 * MR, B); ++b)
      for (int64_t j = 0; j < std::min(channels, C - p * channels); j += w) f(b, p * channels + j, j);
  };
  start_decode(team, s);
  share_products(team, count, num_tiles(B), [&](int64_t p, int64_t t0, int64_t t1) {
    for (int64_t layer = 0; layer < N; ++layer)
      std::fill(before(layer, p, t0 * MR), before(layer, p, std::min(t1 * MR, B)), S(0));
  });
  team.wait();
  for (int64_t t = 0;; ++t) {
    if (t < s.steps) project_features(team, s, panels.feature, t);
    for (int64_t b = b0; b < b1; ++b) store_token(team, s, t, b);
    if (t == s.steps) return;
    share_products(team, count, num_tiles(B), [&](int64_t p, int64_t t0, int64_t t1) {
      own_channels(
          p, t0, t1, [&](int64_t b, int64_t k, int64_t) __attribute__((always_inline)) {
            const S* const d = projected_row(s, t, b);
            const T* const e = s.token_embeddings + previous_token(team, s, t, b) * 2 * C;
            const auto a = [&](int64_t i) __attribute__((always_inline)) {
              return load(d + i, C - k) + load(e + i, C - k);
            };
            keep(0, b, k, tanh(a(k)) * sigmoid(a(C + k)));
          });
    });
    complete(0);
    if (s.running.load(std::memory_order_relaxed) == 0) return;
    for (int64_t layer = 0; layer < N; ++layer) {
      const Panels<T, Q> conv = panels.conv(layer, 1);
      const T* bias = net.bias + layer * 3 * C;
      share_products(team, count, num_tiles(B), [&](int64_t p, int64_t t0, int64_t t1) {
        multiply_panel(rows(layer), t0, t1, conv, p, before(layer, p, t0 * MR), W, W, true);
        own_channels(
            p, t0, t1, [&](int64_t b, int64_t k, int64_t j) __attribute__((always_inline)) {
              const auto z = [&](int64_t q) __attribute__((always_inline)) {
                return load(before(layer, p, b) + q * channels + j) + load(bias + q * C + k, C - k);
              };
              vec<T> y = sigmoid(z(0)) * tanh(z(2));
              if (net.carry) y += sigmoid(z(1)) * load(x(layer) + b * C + k, C - k);
              keep(layer + 1, b, k, y);
            });
      });
      complete(layer + 1);
    }
    forget_best(team, s);
    share_products(team, panels.classifier.count(), num_tiles(B), [&](int64_t p, int64_t t0, int64_t t1) {
      classify(team, s, rows(N), panels.classifier, t, p, t0, t1);
    });
    for (int64_t layer = 0; layer < N; ++layer) {
      const Panels<T, Q> conv = panels.conv(layer, 0);
      share_products(team, count, num_tiles(B), [&](int64_t p, int64_t t0, int64_t t1) {
        multiply_panel(rows(layer), t0, t1, conv, p, before(layer, p, t0 * MR), W, W);
      });
    }
    team.wait();
  }
}
