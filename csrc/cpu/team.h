// A team of threads that runs one sequence together, with a barrier between the phases of a step.
#pragma once
#include <sched.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>

struct Barrier {
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> round{0};
};

struct Team {
  int id, size;
  Barrier& barrier;

  // Spins briefly, yields a few times, then sleeps: a thread may share its core with others, which a pure spin would
  // starve, and which a yield gives no more than a turn.
  void wait() {
    if (size == 1) return;
    constexpr int SPINS = 2000, YIELDS = 20;
    const int round = barrier.round.load(std::memory_order_relaxed);
    if (barrier.arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      barrier.arrived.store(0, std::memory_order_relaxed);
      // Sequentially consistent, or notify_all may look for sleepers before the store is seen, and one sleeps on.
      barrier.round.store(round + 1, std::memory_order_seq_cst);
      barrier.round.notify_all();
      return;
    }
    for (int tries = 0; barrier.round.load(std::memory_order_acquire) == round; ++tries) {
      if (tries >= SPINS + YIELDS) {
        barrier.round.wait(round, std::memory_order_acquire);
      } else if (tries >= SPINS) {
        sched_yield();
      } else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  }

  // This thread's share [first, last) of n items.
  std::pair<int64_t, int64_t> share(int64_t n) const { return {n * id / size, n * (id + 1) / size}; }
};

// How many threads are worth starting for `work` multiply-adds (or as many elementary operations).
inline int team_size(double work) {
  return std::max(1, int(std::min(double(torch::stable::get_num_threads()), work / 2e4)));
}

// OpenMP's runtime, which torch's threads run in too, as GCC calls it for `#pragma omp parallel`. With OpenMP switched
// on clang cannot capture structured bindings.
extern "C" {
void GOMP_parallel(void (*f)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}

// Runs f(team) on at most `threads` threads; OpenMP may give fewer, so the size is read inside the region.
template <class F>
void parallel(int threads, F f) {
  struct Shared {
    F& f;
    Barrier barrier;
  } shared{f, {}};
  GOMP_parallel(
      [](void* data) {
        auto& [f, barrier] = *static_cast<Shared*>(data);
        Team team{omp_get_thread_num(), omp_get_num_threads(), barrier};
        f(team);
      },
      &shared, unsigned(threads), 0);
}
