// Compiles the header named by KERNELS once per instruction set, in namespaces baseline, avx2, avx512,
// avx512_bf16 and amx (these two for operands of bfloat16 and int8 only: CALL_AT), so that one build runs everywhere
// and every ISA can be tested on one machine. Use:
//   #define KERNELS "op-inl.h"
//   #include "foreach_isa.h"
#include "prelude.h"

#define VECTOR_BYTES 16  // SSE2, NEON
namespace baseline {
#include "simd-inl.h"
#include "gemm-inl.h"
#include KERNELS
}  // namespace baseline
#undef VECTOR_BYTES

#if defined(__x86_64__)
#define VECTOR_BYTES 32
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "simd-inl.h"
#include "gemm-inl.h"
#include KERNELS
}  // namespace avx2
#pragma GCC pop_options
#undef VECTOR_BYTES

#define VECTOR_BYTES 64
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#include "simd-inl.h"
#include "gemm-inl.h"
#include KERNELS
}  // namespace avx512
#pragma GCC pop_options

#define BF16_DOT
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,prefer-vector-width=512")
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
#pragma GCC pop_options
#undef BF16_DOT
#undef VECTOR_BYTES
#endif
