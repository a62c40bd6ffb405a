// The best token among the candidates of lanes and blocks.
#pragma once
#include <cmath>

#include "platform.cuh"

struct Choice {
  float logit;
  int token;
  float cross = 0;  // what comes with the token

  DEVICE static Choice none() { return {-INFINITY, INT32_MAX}; }

  // As torch.argmax chooses: NaN before all, then the largest, then the first.
  DEVICE bool before(const Choice& other) const {
    const bool nan = logit != logit, other_nan = other.logit != other.logit;
    if (nan != other_nan) return nan;
    if (!nan && logit != other.logit) return logit > other.logit;
    return token < other.token;
  }
  DEVICE void better(const Choice& other) {
    if (other.before(*this)) *this = other;
  }
  DEVICE void over_warp() {
    for (int mask = 16; mask; mask /= 2) better({warp_xor(logit, mask), warp_xor(token, mask), warp_xor(cross, mask)});
  }
};
