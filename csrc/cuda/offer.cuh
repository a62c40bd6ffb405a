// The choice of a symbol among those that lanes and blocks offer.
#pragma once
#include <cmath>

#include "platform.cuh"

struct Offer {
  float logit;
  int symbol;
  float cross = 0;  // what comes with the symbol

  DEVICE static Offer none() { return {-INFINITY, INT32_MAX}; }

  // As torch.argmax chooses: NaN before all, then the largest, then the first.
  DEVICE bool before(const Offer& other) const {
    const bool nan = logit != logit, other_nan = other.logit != other.logit;
    if (nan != other_nan) return nan;
    if (!nan && logit != other.logit) return logit > other.logit;
    return symbol < other.symbol;
  }
  DEVICE void better(const Offer& other) {
    if (other.before(*this)) *this = other;
  }
  DEVICE void over_warp() {
    for (int mask = 16; mask; mask /= 2) better({warp_xor(logit, mask), warp_xor(symbol, mask), warp_xor(cross, mask)});
  }
};
