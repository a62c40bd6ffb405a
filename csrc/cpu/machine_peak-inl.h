// Loops that do nothing but multiply and add, or read. Timed by machine_peak.cpp.

// n rounds of independent multiply-adds of packed operands of T, as many as hide their latency in the registers there
// are. Gives the operations done, and a result so that no compiler drops them.
template <class T>
void multiply_add_rounds(int64_t n, double& operations, float& result) {
  using P = Packed<T>;
#ifdef AMX
  constexpr int SUMS = 6;
  configure_tiles<SUMS>(16, 16);
  for (int64_t k = 0; k < n; ++k)
    unrolled<SUMS>([](auto i) __attribute__((always_inline)) { multiply_tiles<P, i, SUMS, SUMS + 1>(); });
  asm volatile("tilerelease");
  result = 0;
  operations = 2.0 * SUMS * 16 * 16 * ROW_STEP<P> * n;
#else
  constexpr int SUMS = 3 * VECTOR_MR;
  vec<P> sums[SUMS] = {}, x{};
  for (int i = 0; i < SUMS; ++i) sums[i] += Sum<P>(i);
  for (int64_t k = 0; k < n; ++k) {
    hold(x);  // or a compiler would multiply once
#pragma GCC unroll 24
    for (int i = 0; i < SUMS; ++i) sums[i] = multiply_add(sums[i], x, x);
  }
  for (int i = 1; i < SUMS; ++i) sums[0] += sums[i];
  result = float(sum(sums[0]));
  operations = 2.0 * SUMS * LANES<P> * STEP<P> * n;
#endif
}

// `bytes` is a multiple of 8 vectors for every ISA.
inline void read(const char* data, int64_t bytes, int64_t passes, float& result) {
  i32 acc[8] = {};
  for (int64_t pass = 0; pass < passes; ++pass) {
    for (const char* p = data; p < data + bytes; p += 8 * VECTOR_BYTES)
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        i32 v;
        std::memcpy(&v, p + i * VECTOR_BYTES, sizeof v);
        acc[i] ^= v;
      }
    // Every pass reads anew: without this, loops may be interchanged.
    asm volatile("" ::: "memory");
  }
  for (int i = 1; i < 8; ++i) acc[0] ^= acc[i];
  result = sum(acc[0]);
}
