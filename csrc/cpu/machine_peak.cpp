// What this machine can do at best, measured: multiply-adds in fp32, bf16 and int8, and reading.
// Benchmarks tell each op's share of it.
#include <sys/mman.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

#define KERNELS "machine_peak-inl.h"
#include "foreach_isa.h"

namespace {

constexpr int64_t ROUNDS = 1 << 16;  // about a millisecond
constexpr double SECONDS = 0.1;

template <class T>
double multiply_add(int64_t n, float& result) {
  double operations = 0;
  CALL_BEST(T, multiply_add_rounds<T>, n, operations, result);
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

// kind: "fp32", "bf16" or "int8", in 1e9 operations a second as products of the current ISA do them, or "read" over
// and over from `megabytes` (1e6 bytes), in 1e9 bytes a second. A tenth of a second and a little more.
double machine_peak(const std::string& kind, int threads, double megabytes) {
  if (threads < 1) throw std::invalid_argument("threads must be 1 or more, got " + std::to_string(threads));
  if (kind == "read") {
    if (!(megabytes > 0)) throw std::invalid_argument("megabytes must be above 0, got " + std::to_string(megabytes));
    return read_rate(threads, megabytes);
  }
  if (kind != "fp32" && kind != "bf16" && kind != "int8")
    throw std::invalid_argument("kind must be 'fp32', 'bf16', 'int8' or 'read', got '" + kind + "'");
  const auto loop = kind == "int8"   ? multiply_add<int8_t>
                    : kind == "bf16" ? multiply_add<BFloat16>
                                     : multiply_add<float>;
  return best_rate(threads, [&](Team&, float& result) { return loop(ROUNDS, result); });
}
