// csrc/cuda/platform.cuh on the host: every thread of a launch is a fiber of one thread, and which of them goes on, and
// when a stored word arrives in memory, is drawn at random. So one source runs in any order that a GPU may choose, and
// the same seed gives the same order again.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define DEVICE inline
#define HOST_DEVICE inline
#define KERNEL(threads) void

struct uint4 {
  uint32_t x, y, z, w;
};
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }

namespace simulator {
struct Index {
  int x;
};

// How words travel: at once; at random; late, the last first; or at random, with the first block slower than all
// others.
enum Order { AT_ONCE, RANDOM, LATE, SLOW_BLOCK, ORDERS };

class Launch {
 public:
  Index thread, block, threads, blocks;

  void run(int blocks_, int threads_, int64_t shared, unsigned seed, std::function<void()> kernel) {
    random_.seed(seed);
    order_ = Order(seed % ORDERS);
    threads.x = threads_;
    blocks.x = blocks_;
    kernel_ = std::move(kernel);
    shared_.assign(blocks_, std::vector<uint64_t>((shared + GUARD) / 8, UNTOUCHED));
    barriers_.assign(blocks_, Barrier{});
    warps_.assign(blocks_ * threads_ / 32, Warp{});
    fibers_.clear();
    for (int i = 0; i < blocks_ * threads_; ++i) start(i);
    pending_.clear();
    looking_.clear();
    failure_ = nullptr;
    schedule();
    while (!pending_.empty()) deliver();
    for (const auto& memory : shared_)
      for (size_t i = (shared + 7) / 8; i < memory.size(); ++i)
        if (memory[i] != UNTOUCHED) throw std::runtime_error("a kernel wrote past its shared memory");
  }

  char* shared_memory() { return reinterpret_cast<char*>(shared_[block.x].data()); }

  bool all_threads(bool so) {
    Barrier& barrier = barriers_[block.x];
    barrier.all &= so;
    meet(barrier, threads.x, block.x * threads.x);
    return barrier.result;
  }

  // The pieces of all lanes of the warp; valid until its next call.
  const std::vector<const void*>& share(const void* piece) {
    const int id = (block.x * threads.x + thread.x) / 32;
    Warp& warp = warps_[id];
    warp.pieces[thread.x % 32] = piece;
    meet(warp.barrier, 32, 32 * id);
    return warp.pieces;
  }
  void shared_by_all() {
    const int id = (block.x * threads.x + thread.x) / 32;
    meet(warps_[id].barrier, 32, 32 * id);
  }

  void store(uint32_t* p, uint32_t word) {
    if (word == 0xffffffff) throw std::runtime_error("a published word says that it is empty");
    pending_.push_back({p, word});
    if (order_ == AT_ONCE) deliver();
  }

  // Until a word arrives; at the first look only until others have had a turn, for what was seen may be old.
  void wait(bool first) {
    if (!first) {
      fibers_[now_]->state = LOOKING;
      looking_.push_back(now_);
    }
    pause();
  }

 private:
  static constexpr int64_t STACK = 64 << 10, GUARD = 4096;
  static constexpr uint64_t UNTOUCHED = 0xfff8dead7ff8dead;  // NaN as float, double and two 16-bit floats
  enum State { READY, MEETING, LOOKING, DONE };

  // A fiber starts by its context and goes on by jumps, which ask nothing of the system.
  struct Fiber {
    ucontext_t context;
    jmp_buf here;
    bool started = false;
    std::unique_ptr<char[]> stack;
    Index thread, block;
    State state = READY;
  };
  struct Barrier {
    int arrived = 0;
    bool all = true, result = true;
  };
  struct Warp {
    std::vector<const void*> pieces = std::vector<const void*>(32);
    Barrier barrier;
  };
  struct Store {
    uint32_t* place;
    uint32_t word;
  };

  void start(int i) {
    fibers_.push_back(std::make_unique<Fiber>());
    Fiber& f = *fibers_.back();
    f.thread.x = i % threads.x;
    f.block.x = i / threads.x;
    f.stack = std::make_unique<char[]>(STACK);
    getcontext(&f.context);
    f.context.uc_stack = {f.stack.get(), 0, STACK};
    f.context.uc_link = nullptr;
    makecontext(&f.context, reinterpret_cast<void (*)()>(&enter), 0);
  }
  static void enter();

  void schedule() {
    std::vector<int> ready;
    for (;;) {
      ready.clear();
      bool done = true;
      for (size_t i = 0; i < fibers_.size(); ++i) {
        done &= fibers_[i]->state == DONE;
        if (fibers_[i]->state == READY) ready.push_back(i);
      }
      if (done) return;
      if (ready.empty() && pending_.empty())
        throw std::runtime_error("the launch hangs: every thread waits for another");
      // A batch of turns in random order, some of which make others ready for the next batch.
      std::shuffle(ready.begin(), ready.end(), random_);
      if (order_ == SLOW_BLOCK)
        std::stable_partition(ready.begin(), ready.end(), [&](int i) { return fibers_[i]->block.x != 0; });
      for (int i : ready) {
        if (order_ != LATE && !pending_.empty() && random_() % 4 == 0) deliver();
        if (order_ == SLOW_BLOCK && fibers_[i]->block.x == 0 && random_() % 4) continue;
        resume(i);
      }
      if (ready.empty() || order_ == RANDOM || order_ == SLOW_BLOCK) deliver();
    }
  }
  void resume(int i) {
    now_ = i;
    thread = fibers_[i]->thread;
    block = fibers_[i]->block;
    if (!_setjmp(home_)) {
      if (fibers_[i]->started) _longjmp(fibers_[i]->here, 1);
      fibers_[i]->started = true;
      setcontext(&fibers_[i]->context);
    }
    if (failure_) std::rethrow_exception(failure_);
  }
  void pause() {
    if (!_setjmp(fibers_[now_]->here)) _longjmp(home_, 1);
  }

  void meet(Barrier& barrier, int count, int first) {
    if (++barrier.arrived < count) {
      fibers_[now_]->state = MEETING;
      return pause();
    }
    barrier.arrived = 0;
    barrier.result = barrier.all;
    barrier.all = true;
    for (int i = first; i < first + count; ++i)
      if (fibers_[i]->state == MEETING) fibers_[i]->state = READY;
  }

  void deliver() {
    if (pending_.empty()) return;
    const size_t i = order_ == LATE ? pending_.size() - 1 : random_() % pending_.size();
    const Store store = pending_[i];
    pending_[i] = pending_.back();
    pending_.pop_back();
    if (*store.place != 0xffffffff) throw std::runtime_error("a word was published twice");
    *store.place = store.word;
    for (int i : looking_) fibers_[i]->state = READY;
    looking_.clear();
  }

  std::mt19937 random_;
  Order order_;
  std::function<void()> kernel_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::vector<uint64_t>> shared_;
  std::vector<Barrier> barriers_;
  std::vector<Warp> warps_;
  std::vector<Store> pending_;
  std::vector<int> looking_;
  std::exception_ptr failure_;
  jmp_buf home_;
  int now_;
};
inline Launch launch;
inline unsigned seed = 0;
inline int64_t last_shared = 0;

inline void Launch::enter() {
  try {
    launch.kernel_();
  } catch (...) {
    launch.failure_ = std::current_exception();
  }
  launch.fibers_[launch.now_]->state = DONE;
  launch.pause();
}
}  // namespace simulator

#define threadIdx simulator::launch.thread
#define blockIdx simulator::launch.block
#define blockDim simulator::launch.threads
#define gridDim simulator::launch.blocks

inline char* shared_memory() { return simulator::launch.shared_memory(); }
inline bool all_threads(bool so) { return simulator::launch.all_threads(so); }
inline void __syncthreads() { simulator::launch.all_threads(true); }

template <class X>
X warp_xor(X x, int mask) {
  const int other = (threadIdx.x % 32) ^ mask;
  const X found = *static_cast<const X*>(simulator::launch.share(&x)[other]);
  simulator::launch.shared_by_all();
  return found;
}

template <bool BF16>
void warp_mma(float (&acc)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  using T = std::conditional_t<BF16, torch::headeronly::BFloat16, torch::headeronly::Half>;
  const uint32_t mine[6] = {a.x, a.y, a.z, a.w, b0, b1};
  const auto& lanes = simulator::launch.share(mine);
  const auto number = [&](int lane, int word, int half) {
    T x[2];
    std::memcpy(x, static_cast<const uint32_t*>(lanes[lane]) + word, sizeof x);
    return float(x[half]);
  };
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k)
      acc[i] += number(4 * g + k % 8 / 2, i / 2 + k / 8 * 2, k % 2) *
                number(4 * (2 * q + i % 2) + k % 8 / 2, 4 + k / 8, k % 2);
  simulator::launch.shared_by_all();
}

inline void store_word(uint32_t* p, uint32_t w) { simulator::launch.store(p, w); }
template <int N>
void load_words(const uint32_t* p, uint32_t (&w)[N]) {
  std::memcpy(w, p, sizeof w);
}
inline void wait_for_others(int& looks) { simulator::launch.wait(looks++ == 0); }
