// Loops that do nothing but multiply and add, or read. Timed by machine_peak.cpp.

// Twelve chains hide the latency of a multiply-add on two ports, in 16 registers.
// Gives the operations done, and a result so that no compiler drops them.
inline void multiply_add(int64_t n, float x, double& operations, float& result) {
  f32 acc[12];
  for (int i = 0; i < 12; ++i) acc[i] = f32{} + float(i);  // or the chains would be one
  for (int64_t k = 0; k < n; ++k)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) acc[i] = acc[i] * x + x;
  for (int i = 1; i < 12; ++i) acc[0] += acc[i];
  result = sum(acc[0]);
  operations = 12.0 * 2 * LANES<float> * n;
}

// `bytes` is a multiple of 8 vectors at every level.
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
