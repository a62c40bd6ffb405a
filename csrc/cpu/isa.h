// Which instruction set the kernels run on: found once by cpuid, lowered by tests.
#pragma once
#include <atomic>
#if defined(__linux__)
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

// From the least on: a machine has all up to its best.
#if defined(__aarch64__)
enum class Isa { baseline, neon_bf16 };
constexpr const char* ISA_NAMES[] = {"baseline", "neon_bf16"};
#else
enum class Isa { baseline, avx2, avx512, avx512_bf16, amx };
constexpr const char* ISA_NAMES[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
#endif

// Whether tiles of bf16 and int8 are there and the system lets this process use them: it has to be asked first.
inline bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned BF16 = 1 << 22, TILE = 1 << 24, INT8 = 1 << 25, ALL = BF16 | TILE | INT8;
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  static const bool may =
      __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & ALL) == ALL && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return may;
#else
  return false;
#endif
}

inline Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return !__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni") ? Isa::avx512
           : may_use_amx()                                                                ? Isa::amx
                                                                                          : Isa::avx512_bf16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#elif defined(__aarch64__) && defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP && getauxval(AT_HWCAP2) & HWCAP2_BF16) return Isa::neon_bf16;
#endif
  return Isa::baseline;
}

inline std::atomic<Isa> current_isa{best_isa()};

// Calls `fn`, a kernel on operands of T, as compiled for `isa`. `fn` comes from foreach_isa.h.
#if defined(__x86_64__)
#define CALL_AT(isa, T, fn, ...)      \
  switch (isa) {                      \
    case Isa::amx:                    \
      if constexpr (sizeof(T) <= 2) { \
        amx::fn(__VA_ARGS__);         \
        break;                        \
      }                               \
      [[fallthrough]];                \
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
#elif defined(__aarch64__)
#define CALL_AT(isa, T, fn, ...)      \
  switch (isa) {                      \
    case Isa::neon_bf16:              \
      if constexpr (sizeof(T) <= 2) { \
        neon_bf16::fn(__VA_ARGS__);   \
        break;                        \
      }                               \
      [[fallthrough]];                \
    default:                          \
      baseline::fn(__VA_ARGS__);      \
  }
#else
#define CALL_AT(isa, T, fn, ...) baseline::fn(__VA_ARGS__)
#endif
#define CALL_BEST(T, fn, ...) CALL_AT(current_isa.load(), T, fn, __VA_ARGS__)
