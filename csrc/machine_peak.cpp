// What this machine can do at best, measured: multiply-adds in fp32, bf16 and int8, and reading.
// Benchmarks tell each op's share of it.
#include <sys/mman.h>

#include <chrono>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#define KERNELS "machine_peak.kernels.h"
#include "foreach_isa.h"

namespace {

constexpr int64_t ROUNDS = 1 << 18;  // of twelve instructions: about a millisecond
constexpr double SECONDS = 0.1;

#if defined(__x86_64__)
// Each lane adds two products of bf16.
__attribute__((target("avx512f,avx512bf16"))) double dot_bf16(int64_t n, float& result) {
  const __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  __m512 acc[12];
  for (int i = 0; i < 12; ++i) acc[i] = _mm512_set1_ps(float(i));
  for (int64_t k = 0; k < n; ++k)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], x, x);
  for (int i = 1; i < 12; ++i) acc[0] = _mm512_add_ps(acc[0], acc[i]);
  result = _mm512_cvtss_f32(acc[0]);
  return 12.0 * 64 * n;
}

// Each lane adds four products of int8.
__attribute__((target("avx512f,avx512vnni"))) double dot_int8(int64_t n, float& result) {
  const __m512i x = _mm512_set1_epi8(1);
  __m512i acc[12];
  for (int i = 0; i < 12; ++i) acc[i] = _mm512_set1_epi32(i);
  for (int64_t k = 0; k < n; ++k)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) acc[i] = _mm512_dpbusd_epi32(acc[i], x, x);
  for (int i = 1; i < 12; ++i) acc[0] = _mm512_add_epi32(acc[0], acc[i]);
  result = float(_mm512_cvtsi512_si32(acc[0]));
  return 12.0 * 128 * n;
}

bool has_bf16() { return __builtin_cpu_supports("avx512bf16"); }
bool has_int8() { return __builtin_cpu_supports("avx512vnni"); }
#else
double dot_bf16(int64_t, float&) { return 0; }
double dot_int8(int64_t, float&) { return 0; }
bool has_bf16() { return false; }
bool has_int8() { return false; }
#endif

double multiply_add(int64_t n, float& result) {
  double operations = 0;
  CALL_BEST(float, multiply_add, n, 1e-3f, operations, result);
  return operations;
}

// The best rate, in 1e9 a second, of f(team, result) -> amount done by one thread, all threads at it together.
template <class F>
double best_rate(int threads, F f) {
  using Clock = std::chrono::steady_clock;
  const auto seconds_since = [](Clock::time_point t) {
    return std::chrono::duration<double>(Clock::now() - t).count();
  };
  std::vector<double> done(threads);
  std::atomic<bool> more{true};
  double best = 0;
  parallel(threads, [&](Team& team) {
    const auto start = Clock::now();
    volatile float sink;
    while (true) {
      team.wait();
      const auto trial = Clock::now();
      float result = 0;
      done[team.id] = f(team, result);
      sink = result;
      team.wait();
      if (team.id == 0) {
        double amount = 0;
        for (int i = 0; i < team.size; ++i) amount += done[i];
        best = std::max(best, amount / seconds_since(trial) / 1e9);
        more = seconds_since(start) < SECONDS;
      }
      team.wait();
      if (!more) break;
    }
    (void)sink;
  });
  return best;
}

double read_rate(int threads, double megabytes) {
  constexpr int64_t UNIT = 4096, PAGE = 1 << 21;
  const int64_t share = std::max<int64_t>(1, int64_t(megabytes * 1e6 / threads / UNIT)) * UNIT;
  const int64_t bytes = (share * threads + PAGE - 1) / PAGE * PAGE;
  char* data = static_cast<char*>(std::aligned_alloc(PAGE, bytes));
  if (!data) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
  std::memset(data, 1, bytes);
  const int64_t passes = std::max<int64_t>(1, int64_t(1e8 / share));
  const double rate = best_rate(threads, [&](Team& team, float& result) {
    CALL_BEST(float, read, data + team.id * share, share, passes, result);
    return double(share) * passes;
  });
  std::free(data);
  return rate;
}

}  // namespace

// kind: "fp32", "bf16" or "int8", in 1e9 operations a second, or "read" over and over from `megabytes` (1e6 bytes), in
// 1e9 bytes a second. A tenth of a second and a little more. bf16 is fp32's where nothing multiplies bf16; nothing for
// int8 likewise.
std::optional<double> machine_peak(const std::string& kind, int threads, double megabytes) {
  if (threads < 1) throw std::invalid_argument("threads must be 1 or more, got " + std::to_string(threads));
  if (kind == "read") {
    if (!(megabytes > 0)) throw std::invalid_argument("megabytes must be above 0, got " + std::to_string(megabytes));
    return read_rate(threads, megabytes);
  }
  if (kind != "fp32" && kind != "bf16" && kind != "int8")
    throw std::invalid_argument("kind must be 'fp32', 'bf16', 'int8' or 'read', got '" + kind + "'");
  if (kind == "int8" && !has_int8()) return {};
  const auto loop = kind == "int8" ? dot_int8 : kind == "bf16" && has_bf16() ? dot_bf16 : multiply_add;
  return best_rate(threads, [&](Team&, float& result) { return loop(ROUNDS, result); });
}
