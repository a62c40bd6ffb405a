// Gumbel noise on CPU. Equations: fastvae/ops/gumbel_noise.py.
#include "../common.h"

struct GumbelNoise {
  int64_t count;
  uint64_t seed;
  float temperature;
  float* noise;
};

#define KERNELS "gumbel_noise-inl.h"
#include "foreach_isa.h"

namespace {

Tensor gumbel_noise(Tensor seed, int64_t steps, int64_t batch, int64_t vocab_size, double temperature) {
  CHECK_SHAPE(seed, 1);
  CHECK(seed.scalar_type() == ScalarType::Long, "seed must have dtype int64, got " + name_of(seed));
  CHECK(steps >= 0 && batch >= 0 && vocab_size >= 0,
        "steps, batch and vocab_size must be 0 or more, got " + shape_of({steps, batch, vocab_size}));
  CHECK(times({steps, batch, vocab_size}) <= LARGEST,
        "noise must have at most 2^40 elements, got " + shape_of({steps, batch, vocab_size}));
  check_memory(times({steps, batch, vocab_size}), sizeof(float));
  Tensor noise = torch::stable::new_empty(seed, {steps, batch, vocab_size}, ScalarType::Float);
  const GumbelNoise args{steps * batch * vocab_size, uint64_t(*in<int64_t>(seed)), float(temperature),
                         out<float>(noise)};
  parallel(team_size(8.0 * args.count), [&](Team& team) { CALL_BEST(float, gumbel_noise, team, args); });
  return noise;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) { m.impl("gumbel_noise", TORCH_BOX(&gumbel_noise)); }
