// Compiles the header named by KERNELS once per instruction set, in namespaces baseline, avx2, avx512,
// avx512_bf16 and amx, or baseline and neon_bf16 (those two and this one for operands of bfloat16 and int8 only:
// CALL_AT), so that one build runs everywhere and every ISA can be tested on one machine. Use:
//   #define KERNELS "op-inl.h"
//   #include "foreach_isa.h"
#include "prelude.h"

#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#ifdef __clang__
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define BEGIN_TARGET_512(features) BEGIN_TARGET(features)
#define END_TARGET PRAGMA(clang attribute pop)
#define DOT_FEATURES "arch=armv8.2-a,dotprod,bf16"
#else
#define BEGIN_TARGET(...) PRAGMA(GCC push_options) PRAGMA(GCC target(__VA_ARGS__))
#define BEGIN_TARGET_512(features) BEGIN_TARGET(features, "prefer-vector-width=512")
#define END_TARGET PRAGMA(GCC pop_options)
#define DOT_FEATURES "arch=armv8.2-a+dotprod+bf16"
#endif

#define VECTOR_BYTES 16  // SSE2, NEON
namespace baseline {
#include "simd-inl.h"
#include "gemm-inl.h"
#include KERNELS
}  // namespace baseline
#if defined(__aarch64__)
#define BF16_DOT
BEGIN_TARGET(DOT_FEATURES)
namespace neon_bf16 {
#include "simd-inl.h"
#include "gemm-inl.h"
#include KERNELS
}  // namespace neon_bf16
END_TARGET
#undef BF16_DOT
#endif
#undef VECTOR_BYTES

#if defined(__x86_64__)
#define VECTOR_BYTES 32
BEGIN_TARGET("avx2,fma")
namespace avx2 {
#include "simd-inl.h"
#include "gemm-inl.h"
#include KERNELS
}  // namespace avx2
END_TARGET
#undef VECTOR_BYTES

#define VECTOR_BYTES 64
BEGIN_TARGET_512("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
#include "simd-inl.h"
#include "gemm-inl.h"
#include KERNELS
}  // namespace avx512
END_TARGET

#define BF16_DOT
BEGIN_TARGET_512("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma")
namespace avx512_bf16 {
#include "simd-inl.h"
#include "gemm-inl.h"
#include KERNELS
}  // namespace avx512_bf16

#define AMX  // its instructions stand in gemm-inl.h as such: no compiler option is needed
namespace amx {
#include "simd-inl.h"
#include "gemm-inl.h"
#include KERNELS
}  // namespace amx
#undef AMX
END_TARGET
#undef BF16_DOT
#undef VECTOR_BYTES
#endif
