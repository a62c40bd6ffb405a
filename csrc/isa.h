// Which instruction set the kernels run on: found once by cpuid, lowered by tests.
#pragma once
#include <atomic>

enum class Isa { baseline, avx2, avx512 };

inline Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

inline std::atomic<Isa> current_isa{best_isa()};

// Calls `fn` as compiled for the current instruction set. `fn` comes from foreach_isa.h.
#if defined(__x86_64__)
#define CALL_BEST(fn, ...)       \
  switch (current_isa.load()) {  \
    case Isa::avx512:            \
      avx512::fn(__VA_ARGS__);   \
      break;                     \
    case Isa::avx2:              \
      avx2::fn(__VA_ARGS__);     \
      break;                     \
    default:                     \
      baseline::fn(__VA_ARGS__); \
  }
#else
#define CALL_BEST(fn, ...) baseline::fn(__VA_ARGS__)
#endif
