// What tests/test_persistent.py asks of the simulator, and kernels with faults that it must find.
#include "platform_simulator.h"

#include "../../csrc/cuda/exchange.cuh"

extern "C" void set_seed(unsigned seed) { simulator::seed = seed; }
extern "C" int64_t shared_memory_of_last_launch() { return simulator::last_shared; }

namespace {
uint32_t words[64];

void wait(int place) {
  uint32_t word[1];
  load_words(words + place, word);
  await(words + place, word);
}
// Every block's thread publishes a word and waits for the next block's.
void sound() {
  if (threadIdx.x) return;
  publish(words + blockIdx.x, uint32_t(blockIdx.x));
  wait((blockIdx.x + 1) % gridDim.x);
}
void waits_for_nobody() {
  if (blockIdx.x == 0) wait(63);
}
void publishes_twice() {
  if (threadIdx.x == 0) publish(words, 1u);
}
void misses_a_barrier() {
  if (threadIdx.x) __syncthreads();
}
void writes_past_its_memory() { shared_memory()[64] = 1; }
}  // namespace

// What is said about a faulty kernel, "" for the sound one.
extern "C" const char* run_fault(int which) {
  void (*const kernels[])() = {sound, waits_for_nobody, publishes_twice, misses_a_barrier, writes_past_its_memory};
  static std::string said;
  std::memset(words, 0xff, sizeof words);
  try {
    simulator::launch.run(3, 32, 64, simulator::seed, kernels[which]);
    said = "";
  } catch (const std::exception& error) {
    said = error.what();
  }
  return said.c_str();
}
