// What kernels use from outside (standard headers, team.h), included before any ISA (foreach_isa.h).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../common.h"
#include "isa.h"
#include "scratch.h"
#include "team.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call: what takes them is inlined
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own intrinsics set no value where none is needed
#endif
