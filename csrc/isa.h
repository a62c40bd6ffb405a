// Which instruction set the kernels run on: found once by cpuid, lowered by tests.
#pragma once
#include <atomic>

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

inline Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") ? Isa::avx512_bf16
                                                                                        : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

inline std::atomic<Isa> current_isa{best_isa()};

// Calls `fn`, a kernel on operands of T, as compiled for `level`. `fn` comes from foreach_isa.h.
#if defined(__x86_64__)
#define CALL_AT(level, T, fn, ...)    \
  switch (level) {                    \
    case Isa::avx512_bf16:            \
      if constexpr (sizeof(T) <= 2) { \
        avx512_bf16::fn(__VA_ARGS__); \
        break;                        \
      }                               \
      [[fallthrough]];                \
    case Isa::avx512:                 \
      avx512::fn(__VA_ARGS__);        \
      break;                          \
    case Isa::avx2:                   \
      avx2::fn(__VA_ARGS__);          \
      break;                          \
    default:                          \
      baseline::fn(__VA_ARGS__);      \
  }
#else
#define CALL_AT(level, T, fn, ...) baseline::fn(__VA_ARGS__)
#endif
#define CALL_BEST(T, fn, ...) CALL_AT(current_isa.load(), T, fn, __VA_ARGS__)
