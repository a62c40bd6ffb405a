// Runs the threads of a launch as fibers, counts what they ask of a GPU, and what tests/test_persistent.py asks of both.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "platform_simulator.h"

#include "../../csrc/cuda/exchange.cuh"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simulator {
Turn turn;
unsigned seed = 0;
int64_t last_shared = 0;  // bytes, of a block of the last launch
Index &thread = turn.thread, &block = turn.block, &threads = turn.threads, &blocks = turn.blocks;
bool& counting = turn.counting;

// What a launch asks of a GPU, as tests read it. Bytes of L2 are those of 32-byte sectors, of each warp's accesses.
struct Counts {
  int64_t read, written;                    // bytes of L2
  int64_t global, wide, sectors, fullest;   // a lane's accesses of global memory, those of 8 bytes or more; sectors, and
                                            // how few the same bytes would fill
  int64_t shared, wavefronts, free;         // of the first blocks: a warp's accesses of shared memory, their wavefronts,
                                            // and how many there were without conflicts of banks
  int64_t polls, barriers, exchanges;       // loads in vain, of lanes; of the first thread; the longest chain of words
} counts;

namespace {
// How words travel: at once; at random; late, the last first; at random, with the first block slower than all others; or
// at random, but a place is emptied only by a fence, or by the next word there.
enum Order { AT_ONCE, RANDOM, LATE, SLOW_BLOCK, STALE, ORDERS };
enum State { READY, MEETING, LOOKING, DONE };
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t STACK = 256 << 10;
#else
constexpr int64_t STACK = 64 << 10;
#endif
constexpr int64_t GUARD = 4096;
constexpr uint64_t UNTOUCHED = 0xfff8dead7ff8dead;  // NaN as float, double and two 16-bit floats
constexpr int COUNTED_BLOCKS = 2;                   // whose accesses of shared memory are looked at
constexpr uintptr_t EXCHANGE = 1;                   // the site of all loads of words: which look finds one is chance

struct Access {
  uintptr_t site, address;
  uint32_t bytes;
  bool write, shared;
};
struct Copy {
  char* to;
  const char* from;
  int bytes;
};
// A fiber starts by its context and goes on by jumps, which ask nothing of the system.
struct Fiber {
  ucontext_t context;
  jmp_buf here;
  bool started = false;
  char* stack = nullptr;
  Index thread, block;
  State state = READY;
  int depth = 0;  // of the words that it knows
  std::vector<Access> accesses;
  std::vector<Copy> copies;
};
struct Barrier {
  int arrived = 0;
  bool all = true, result = true;
  int64_t met = 0;
};
struct Warp {
  const void* pieces[32];
  Barrier barrier;
};
struct Store {
  uint32_t word;
  int fiber, depth;
  int64_t met;  // how often its block had met
};

std::mt19937 random_;
Order order;
std::function<void()> kernel;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<std::vector<uint64_t>> memories;
std::vector<Barrier> barriers;
std::vector<Warp> warps;
// Words of one place arrive as they were stored, all others in any order.
std::unordered_map<uint32_t*, std::vector<Store>> stored;
std::vector<uint32_t*> pending;  // a place for each word stored there
std::unordered_map<const uint32_t*, int> depths;
std::vector<int> looking;
std::exception_ptr failure;
jmp_buf home;
int now = -1;
char* stacks = nullptr;
int64_t stacks_size = 0;

// AddressSanitizer is told which stack is used.
#ifdef __SANITIZE_ADDRESS__
const void* home_stack;
size_t home_size;
void leave(const void* stack, size_t size) { __sanitizer_start_switch_fiber(nullptr, stack, size); }
void leave_for_home() { leave(home_stack, home_size); }
void arrive_home() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }
void arrive_in_fiber() { __sanitizer_finish_switch_fiber(nullptr, &home_stack, &home_size); }
void forget_stacks() { __asan_unpoison_memory_region(stacks, stacks_size); }
#else
void leave(const void*, size_t) {}
void leave_for_home() {}
void arrive_home() {}
void arrive_in_fiber() {}
void forget_stacks() {}
#endif

void pause() {
  if (_setjmp(fibers[now]->here)) return arrive_in_fiber();
  leave_for_home();
  _longjmp(home, 1);
}

void enter() {
  arrive_in_fiber();
  try {
    kernel();
  } catch (...) {
    failure = std::current_exception();
  }
  fibers[now]->state = DONE;
  pause();
}

void resume(int i) {
  Fiber& f = *fibers[i];
  now = i;
  thread = f.thread;
  block = f.block;
  if (!_setjmp(home)) {
    leave(f.stack, STACK);
    if (f.started) _longjmp(f.here, 1);
    f.started = true;
    setcontext(&f.context);
  }
  arrive_home();
  now = -1;
  if (failure) std::rethrow_exception(failure);
}

void arrive(uint32_t* place) {
  std::vector<Store>& words = stored[place];
  const Store store = words.front();
  words.erase(words.begin());
  if (store.word != EMPTY && *place != EMPTY) throw std::runtime_error("a word was published twice");
  *place = store.word;
  if (counting) depths[place] = store.depth;
  if (words.empty()) stored.erase(place);
}
void wake() {
  for (int i : looking) fibers[i]->state = READY;
  looking.clear();
}
void deliver(bool must = true) {
  if (pending.empty()) return;
  size_t i = order == LATE ? pending.size() - 1 : random_() % pending.size();
  if (order == STALE) {
    const auto empties = [](size_t i) {
      const std::vector<Store>& words = stored[pending[i]];
      return words.size() == 1 && words[0].word == EMPTY;
    };
    size_t looked = 0;
    for (; looked < pending.size() && empties(i); ++looked) i = (i + 1) % pending.size();
    if (looked == pending.size() && !must) return;
  }
  uint32_t* const place = pending[i];
  pending[i] = pending.back();
  pending.pop_back();
  arrive(place);
  wake();
}

// What lanes of a warp did since they met: the same access of the source, as often executed, is one of the warp.
struct Lanes {
  uintptr_t site;
  int repeat, lane;
  Access access;
};
void count_shared(const Lanes* first, const Lanes* last) {
  const int bytes = first->access.bytes, each = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;  // lanes of a wavefront
  ++counts.shared;
  for (int lane = 0; lane < 32; lane += each) {
    uintptr_t words[32][32];
    int used[32] = {}, most = 0;
    for (const Lanes* l = first; l != last; ++l) {
      if (l->lane / each != lane / each) continue;
      for (uintptr_t w = l->access.address / 4; w <= (l->access.address + bytes - 1) / 4; ++w) {
        const int bank = w % 32;
        if (std::find(words[bank], words[bank] + used[bank], w) == words[bank] + used[bank]) words[bank][used[bank]++] = w;
        most = std::max(most, used[bank]);
      }
    }
    counts.wavefronts += most;
    counts.free += most > 0;
  }
}
void count_global(const Lanes* first, const Lanes* last) {
  std::vector<uintptr_t> sectors, words;
  for (const Lanes* l = first; l != last; ++l) {
    const uintptr_t from = l->access.address, to = from + l->access.bytes - 1;
    ++counts.global;
    counts.wide += l->access.bytes >= 8;
    for (uintptr_t s = from / 32; s <= to / 32; ++s) sectors.push_back(s);
    for (uintptr_t w = from / 2; w <= to / 2; ++w) words.push_back(w);
  }
  const auto different = [](std::vector<uintptr_t>& v) {
    std::sort(v.begin(), v.end());
    return std::unique(v.begin(), v.end()) - v.begin();
  };
  const int64_t here = different(sectors);
  counts.sectors += here;
  counts.fullest += (2 * different(words) + 31) / 32;
  (first->access.write ? counts.written : counts.read) += 32 * here;
}
void count_warp(int warp) {
  static std::vector<Lanes> all;
  all.clear();
  for (int lane = 0; lane < 32; ++lane) {
    std::vector<Access>& accesses = fibers[32 * warp + lane]->accesses;
    std::stable_sort(accesses.begin(), accesses.end(), [](auto& a, auto& b) { return a.site < b.site; });
    for (size_t i = 0, start = 0; i < accesses.size(); ++i) {
      if (accesses[i].site != accesses[start].site) start = i;
      all.push_back({accesses[i].site, accesses[i].site == EXCHANGE ? 0 : int(i - start), lane, accesses[i]});
    }
    accesses.clear();
  }
  std::stable_sort(all.begin(), all.end(), [](auto& a, auto& b) {
    return a.site != b.site ? a.site < b.site : a.repeat < b.repeat;
  });
  for (size_t i = 0, start = 0; i < all.size(); start = i) {
    while (i < all.size() && all[i].site == all[start].site && all[i].repeat == all[start].repeat) ++i;
    (all[start].access.shared ? count_shared : count_global)(&all[start], all.data() + i);
  }
}

void meet(Barrier& barrier, int count, int first) {
  if (++barrier.arrived < count) {
    fibers[now]->state = MEETING;
    return pause();
  }
  barrier.arrived = 0;
  barrier.result = barrier.all;
  barrier.all = true;
  ++barrier.met;
  int depth = 0;
  for (int i = first; i < first + count; ++i) {
    depth = std::max(depth, fibers[i]->depth);
    if (fibers[i]->state == MEETING) fibers[i]->state = READY;
  }
  if (!counting) return;
  for (int i = first; i < first + count; ++i) fibers[i]->depth = depth;
  for (int warp = first / 32; warp < (first + count) / 32; ++warp) count_warp(warp);
}

void schedule() {
  std::vector<int> ready;
  for (;;) {
    ready.clear();
    bool done = true;
    for (size_t i = 0; i < fibers.size(); ++i) {
      done &= fibers[i]->state == DONE;
      if (fibers[i]->state == READY) ready.push_back(i);
    }
    if (done) return;
    if (ready.empty() && pending.empty()) throw std::runtime_error("the launch hangs: every thread waits for another");
    // A batch of turns in random order, some of which make others ready for the next batch.
    std::shuffle(ready.begin(), ready.end(), random_);
    if (order == SLOW_BLOCK)
      std::stable_partition(ready.begin(), ready.end(), [&](int i) { return fibers[i]->block.x != 0; });
    for (int i : ready) {
      if (order != LATE && !pending.empty() && random_() % 4 == 0) deliver(false);
      if (order == SLOW_BLOCK && fibers[i]->block.x == 0 && random_() % 4) continue;
      resume(i);
    }
    if (ready.empty() || (order != AT_ONCE && order != LATE)) deliver(ready.empty());
  }
}

int warp_of_now() { return (block.x * threads.x + thread.x) / 32; }

void note(uintptr_t site, const void* p, int bytes, bool write) {
  if (!counting || now < 0) return;
  const char* const at = static_cast<const char*>(p);
  if ((at >= stacks && at < stacks + stacks_size) || (p >= &turn && p < &turn + 1)) return;
  const char* const memory = reinterpret_cast<const char*>(memories[block.x].data());
  const bool shared = at >= memory && at < memory + last_shared;
  if (shared && block.x >= COUNTED_BLOCKS) return;
  fibers[now]->accesses.push_back({site, uintptr_t(p), uint32_t(bytes), write, shared});
}
void complete_copy(const Copy& copy) { std::memcpy(copy.to, copy.from, copy.bytes); }
}  // namespace

#define SITE reinterpret_cast<uintptr_t>(__builtin_return_address(0))

void run(int blocks_, int threads_, int64_t shared, std::function<void()> kernel_) {
  random_.seed(seed);
  order = Order(seed % ORDERS);
  threads.x = threads_;
  blocks.x = blocks_;
  last_shared = shared;
  kernel = std::move(kernel_);
  memories.assign(blocks_, std::vector<uint64_t>((shared + GUARD) / 8, UNTOUCHED));
  barriers.assign(blocks_, Barrier{});
  warps.assign(blocks_ * threads_ / 32, Warp{});
  fibers.clear();
  stored.clear();
  pending.clear();
  depths.clear();
  looking.clear();
  failure = nullptr;
  counts = {};
  const int count = blocks_ * threads_;
  stacks_size = count * STACK;
  stacks = static_cast<char*>(
      mmap(nullptr, stacks_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) throw std::runtime_error("no memory for the threads' stacks");
  forget_stacks();
  const std::unique_ptr<char, void (*)(char*)> freed(stacks, [](char* p) {
    forget_stacks();
    munmap(p, stacks_size);
  });
  for (int i = 0; i < count; ++i) {
    fibers.push_back(std::make_unique<Fiber>());
    Fiber& f = *fibers.back();
    f.thread.x = i % threads_;
    f.block.x = i / threads_;
    f.stack = stacks + i * STACK;
    getcontext(&f.context);
    f.context.uc_stack = {f.stack, 0, STACK};
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  schedule();
  while (!pending.empty()) deliver();
  for (const auto& memory : memories)
    for (size_t i = (shared + 7) / 8; i < memory.size(); ++i)
      if (memory[i] != UNTOUCHED) throw std::runtime_error("a kernel wrote past its shared memory");
  if (!counting) return;
  counts.barriers = barriers[0].met;
  for (const auto& fiber : fibers) counts.exchanges = std::max<int64_t>(counts.exchanges, fiber->depth);
  for (size_t warp = 0; warp < warps.size(); ++warp) count_warp(warp);
}

char* shared_memory() { return reinterpret_cast<char*>(memories[block.x].data()); }

bool all_threads(bool so) {
  Barrier& barrier = barriers[block.x];
  barrier.all &= so;
  meet(barrier, threads.x, block.x * threads.x);
  return barrier.result;
}

void share(const void* piece) {
  const int id = warp_of_now();
  warps[id].pieces[thread.x % 32] = piece;
  meet(warps[id].barrier, 32, 32 * id);
}
const void* piece_of(int lane) { return warps[warp_of_now()].pieces[lane]; }
void shared_by_all() {
  const int id = warp_of_now();
  meet(warps[id].barrier, 32, 32 * id);
}

void store(uint32_t* p, const uint32_t* words, int count) {
  if (uintptr_t(p) % (4 * count)) throw std::runtime_error("words are stored at an odd place");
  note(SITE, p, 4 * count, true);
  for (int i = 0; i < count; ++i) {
    stored[p + i].push_back({words[i], now, fibers[now]->depth + 1, barriers[block.x].met});
    pending.push_back(p + i);
    if (order == AT_ONCE) deliver();
  }
}
void load(const uint32_t* p, uint32_t* words, int count) {
  if (uintptr_t(p) % (4 * count) && count <= 4) throw std::runtime_error("words are loaded at an odd place");
  std::memcpy(words, p, 4 * count);
  if (!counting) return;
  if (std::find(words, words + count, EMPTY) != words + count) {
    ++counts.polls;
    return;
  }
  for (int i = 0; i < count; i += 4) note(EXCHANGE, p + i, 4 * std::min(count, 4), false);
  for (int i = 0; i < count; ++i)
    if (const auto found = depths.find(p + i); found != depths.end())
      fibers[now]->depth = std::max(fibers[now]->depth, found->second);
}

// Until a word arrives; at the first look only until others have had a turn, for what was seen may be old.
void wait(bool first) {
  if (!first) {
    fibers[now]->state = LOOKING;
    looking.push_back(now);
  }
  pause();
}

// What this thread has stored, and what its block had when it last met, arrives before anything that comes later.
void fence() {
  const auto before = [](const Store& s) {
    return s.fiber == now || (fibers[s.fiber]->block.x == block.x && s.met < barriers[block.x].met);
  };
  std::vector<uint32_t*> rest;
  for (uint32_t* place : pending) {
    const auto found = stored.find(place);
    if (found != stored.end() && before(found->second.front()))
      arrive(place);
    else
      rest.push_back(place);
  }
  pending.swap(rest);
  wake();
}

// A copy may be made at once or when it is waited for.
void copy_async(void* to, const void* from, int bytes) {
  if (uintptr_t(to) % bytes || uintptr_t(from) % bytes) throw std::runtime_error("a copy is at an odd place");
  note(SITE, from, bytes, false);
  note(SITE + 1, to, bytes, true);
  const Copy copy{static_cast<char*>(to), static_cast<const char*>(from), bytes};
  if (random_() % 2)
    complete_copy(copy);
  else
    fibers[now]->copies.push_back(copy);
}
void copies_done() {
  for (const Copy& copy : fibers[now]->copies) complete_copy(copy);
  fibers[now]->copies.clear();
}
void touch(const void* p, int bytes, bool write) {
  if (uintptr_t(p) % bytes) throw std::runtime_error("a wide access is at an odd place");
  note(SITE, p, bytes, write);
}
}  // namespace simulator

// With -fsanitize=thread the compiler calls these at every access: so they are counted as the source makes them.
extern "C" {
#define SEE(bytes)                                                                 \
  void __tsan_read##bytes(void* p) { simulator::note(SITE, p, bytes, false); }   \
  void __tsan_write##bytes(void* p) { simulator::note(SITE, p, bytes, true); }   \
  void __tsan_unaligned_read##bytes(void* p) { simulator::note(SITE, p, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* p) { simulator::note(SITE, p, bytes, true); }
SEE(1)
SEE(2)
SEE(4)
SEE(8)
SEE(16)
void __tsan_read_range(void* p, size_t bytes) { simulator::note(SITE, p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { simulator::note(SITE, p, bytes, true); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_init() {}
// Of the tensors' own counters of references and static variables.
uint8_t __tsan_atomic8_load(const uint8_t* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_fetch_add(int* p, int by, int) { return __atomic_fetch_add(p, by, __ATOMIC_SEQ_CST); }

void set_seed(unsigned seed) { simulator::seed = seed; }
void set_counting(bool so) { simulator::counting = so; }
int64_t shared_memory_of_last_launch() { return simulator::last_shared; }
// The numbers of Counts, in its order.
const int64_t* counts_of_last_launch() { return reinterpret_cast<const int64_t*>(&simulator::counts); }
}

namespace {
uint32_t words[64];

void wait(int place) {
  uint32_t word[1];
  load_words(words + place, word);
  await(words + place, word);
}
// Every block's thread publishes a word and waits for the next block's.
void sound() {
  if (threadIdx.x) return;
  publish(words + blockIdx.x, uint32_t(blockIdx.x));
  wait((blockIdx.x + 1) % gridDim.x);
}
void waits_for_nobody() {
  if (blockIdx.x == 0) wait(63);
}
void publishes_twice() {
  if (threadIdx.x == 0) publish(words, 1u);
}
void misses_a_barrier() {
  if (threadIdx.x) __syncthreads();
}
void writes_past_its_memory() { shared_memory()[64] = 1; }
// The first block empties a word that the second has read, and tells of it.
template <bool FENCE>
void empties() {
  if (threadIdx.x) return;
  uint32_t word[1];
  if (blockIdx.x == 0) {
    publish(words, 1u);
    wait(1);
    make_empty<1>(words);
    if (FENCE) __threadfence();
    publish(words + 2, 1u);
  } else if (blockIdx.x == 1) {
    wait(0);
    publish(words + 1, 1u);
    wait(2);
    load_words(words, word);
    if (word[0] != EMPTY) throw std::runtime_error("a word is still there that was emptied");
  }
}
}  // namespace

// What is said about a faulty kernel, "" for the sound one.
extern "C" const char* run_fault(int which) {
  void (*const kernels[])() = {sound, waits_for_nobody, publishes_twice, misses_a_barrier, writes_past_its_memory,
                             empties<false>, empties<true>};
  static std::string said;
  std::memset(words, 0xff, sizeof words);
  try {
    simulator::run(3, 32, 64, kernels[which]);
    said = "";
  } catch (const std::exception& error) {
    said = error.what();
  }
  return said.c_str();
}
