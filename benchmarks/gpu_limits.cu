// What persistent kernels are bound by on the GPU at hand: exchanges between blocks, reading on the chip, launches.
// gpu_limits.py compiles and runs this program, which prints one JSON object. Kernels compute with what they exchange
// or read, and after every launch the result is compared with the host's own: a wrong kernel gets no number.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "gpu_limits.kernels.cuh"

namespace {

constexpr int LAUNCHES = 9;  // that are timed, after one to warm up

void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

struct Words {
  uint32_t* data;
  size_t count;
  explicit Words(size_t n) : count(n) { check(cudaMalloc(&data, n * 4), "memory"); }
  explicit Words(const std::vector<uint32_t>& from) : Words(from.size()) {
    check(cudaMemcpy(data, from.data(), count * 4, cudaMemcpyHostToDevice), "copy");
  }
  ~Words() { cudaFree(data); }
  Words(const Words&) = delete;
  std::vector<uint32_t> read() const {
    std::vector<uint32_t> words(count);
    check(cudaMemcpy(words.data(), data, count * 4, cudaMemcpyDeviceToHost), "copy");
    return words;
  }
};

class Limits {
 public:
  Limits() {
    check(cudaGetDeviceProperties(&device_, 0), "device");
    if (device_.major < 8)
      throw std::runtime_error(std::string(device_.name) + ": compute capability 8.0 is the least");
    check(cudaStreamCreate(&stream_), "stream");
    check(cudaEventCreate(&start_), "event");
    check(cudaEventCreate(&stop_), "event");
  }

  void measure() {
    launch(read_shared, device_.multiProcessorCount, READERS, 0, 0, 2000, Words(1).data);  // until the clocks are up
    for (int blocks : {device_.multiProcessorCount / 2, device_.multiProcessorCount})
      for (int threads : {128, 256, 512, 1024}) {
        barrier<Barrier::GRID>("grid.sync", blocks, threads);
        barrier<Barrier::FLAG>("flag barrier", blocks, threads);
      }
    for (int cluster : {2, 4, 8, 16}) cluster_barrier(cluster);
    for (int threads : {256, 1024})
      for (int words = 64; words <= 1 << 16; words *= 2) gather(words, threads);
    for (int megabytes = 1; megabytes <= 32; megabytes *= 2) reading_global(megabytes);
    reading_shared();
    launching();
  }

  // The JSON object; `error` is what cut it short.
  void print(const std::string& error) const {
    std::printf("{\"device\": \"%s\", \"compute capability\": \"%d.%d\", \"SMs\": %d,", device_.name, device_.major,
                device_.minor, device_.multiProcessorCount);
    if (!error.empty()) std::printf(" \"error\": \"%s\",", error.c_str());
    std::printf(" \"rows\": [");
    for (size_t n = 0; n < rows_.size(); ++n) std::printf("%s\n  {%s}", n ? "," : "", rows_[n].c_str());
    std::printf("\n]}\n");
  }

 private:
  using Step = std::function<void()>;

  void row(const std::string& what, const std::string& setting, const std::string& found) {
    rows_.push_back("\"what\": \"" + what + "\", \"setting\": \"" + setting + "\", " + found);
  }
  static std::string number(const char* unit, double value) {
    char text[64];
    std::snprintf(text, sizeof text, "\"%s\": %.4g", unit, value);
    return text;
  }
  static std::string setting(int blocks, int threads) {
    return std::to_string(blocks) + " blocks x " + std::to_string(threads) + " threads";
  }

  // The median microseconds of a launch; none if a result was wrong.
  std::optional<double> median(const Step& prepare, const Step& launch, const std::function<bool()>& correct) {
    std::vector<float> times;
    for (int n = 0; n <= LAUNCHES; ++n) {
      float milliseconds;
      prepare();
      check(cudaEventRecord(start_, stream_), "event");
      launch();
      check(cudaEventRecord(stop_, stream_), "event");
      check(cudaEventSynchronize(stop_), "kernel");
      check(cudaEventElapsedTime(&milliseconds, start_, stop_), "event");
      if (!correct()) return {};
      if (n) times.push_back(milliseconds);
    }
    std::nth_element(times.begin(), times.begin() + LAUNCHES / 2, times.end());
    return 1e3 * times[LAUNCHES / 2];
  }

  // Adds the time of one of `rounds` in a launch, less what a launch without rounds takes; or with `bytes`, which all
  // read in a round, the rate.
  void time_rounds(const std::string& what, const std::string& setting, int rounds, const Step& prepare,
                   const std::function<void(int)>& launch, const std::function<bool(int)>& correct, double bytes = 0) {
    const auto time = [&](int n) { return median(prepare, [&] { launch(n); }, [&] { return correct(n); }); };
    const auto none = time(0), all = time(rounds);
    if (!none || !all) return row(what, setting, "\"wrong\": true");
    const double each = (*all - *none) / rounds;
    row(what, setting, bytes ? number("gigabytes per second", bytes / each / 1e3) : number("microseconds", each));
  }

  // One attribute makes all blocks, or those of a cluster, run at once.
  template <class... P, class... A>
  void launch(void (*kernel)(P...), int blocks, int threads, size_t shared, int cluster, A... arguments) {
    cudaLaunchAttribute attribute{};
    const auto config = configuration(attribute, blocks, threads, shared, cluster);
    check(cudaLaunchKernelEx(&config, kernel, P(arguments)...), "launch");
  }
  cudaLaunchConfig_t configuration(cudaLaunchAttribute& attribute, int blocks, int threads, size_t shared,
                                   int cluster) {
    attribute.id = cluster ? cudaLaunchAttributeClusterDimension : cudaLaunchAttributeCooperative;
    if (cluster)
      attribute.val.clusterDim = {unsigned(cluster), 1, 1};
    else
      attribute.val.cooperative = 1;
    return {dim3(blocks), dim3(threads), shared, stream_, &attribute, 1};
  }
  void fill(const Words& words, int byte) {
    check(cudaMemsetAsync(words.data, byte, words.count * 4, stream_), "memory");
  }

  template <Barrier KIND>
  void barrier(const std::string& what, int blocks, int threads, int cluster = 0, size_t shared = 0) {
    const int rounds = 2000, peers = cluster ? cluster : blocks;
    const Words arrived(1), places(blocks), result(2);
    const auto prepare = [&] { fill(arrived, 0), fill(places, 0), fill(result, 0); };
    const auto run = [&](int n, bool checked) {
      launch(meet<KIND>, blocks, threads, shared, cluster, n, peers, checked, arrived.data, places.data, result.data);
    };
    const auto correct = [&](int n) { return result.read() == std::vector<uint32_t>{0, uint32_t(n) * blocks}; };
    const std::string name = cluster ? std::to_string(blocks / cluster) + " clusters of " + std::to_string(cluster) +
                                           " x " + std::to_string(threads) + " threads"
                                     : setting(blocks, threads);
    if (!median(prepare, [&] { run(rounds, true); }, [&] { return correct(rounds); }))
      return row(what, name, "\"wrong\": true");
    time_rounds(what, name, rounds, prepare, [&](int n) { run(n, false); }, correct);
  }

  // Every block has a multiprocessor to itself, as one that keeps weights in shared memory does.
  void cluster_barrier(int cluster) {
    const std::string what = "cluster barrier", name = "clusters of " + std::to_string(cluster);
    if (device_.major < 9) return row(what, name, "\"skipped\": \"needs compute capability 9.0\"");
    const auto kernel = meet<Barrier::CLUSTER>;
    const int shared = int(device_.sharedMemPerBlockOptin);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), what);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), what);
    cudaLaunchAttribute attribute{};
    const auto config = configuration(attribute, cluster, 256, shared, cluster);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) cudaGetLastError();
    if (!clusters) return row(what, name, "\"skipped\": \"too large for this GPU\"");
    barrier<Barrier::CLUSTER>(what, clusters * cluster, 256, cluster, shared);
  }

  void gather(int words, int threads) {
    const int blocks = device_.multiProcessorCount, rounds = std::min(512, (1 << 22) / words);
    const Words buffers(size_t(words) * rounds), sums(size_t(blocks) * threads);
    const auto none = gathered(words, 0, blocks, threads), all = gathered(words, rounds, blocks, threads);
    const auto correct = [&](int n) { return sums.read() == (n ? all : none); };
    const std::string payload = words < 256 ? std::to_string(words * 4) + " B" : std::to_string(words / 256) + " KB";
    time_rounds(
        "all-gather", payload + ", " + setting(blocks, threads), rounds, [&] { fill(buffers, 0xFF); },
        [&](int n) { launch(all_gather, blocks, threads, 0, 0, buffers.data, words, n, sums.data); }, correct);
  }

  // What all_gather must find: the sums of a block's threads, which are the same in every block.
  static std::vector<uint32_t> gathered(int words, int rounds, int blocks, int threads) {
    const int share = (words + blocks - 1) / blocks;
    std::vector<uint32_t> sums(threads), buffer(words), all;
    std::iota(sums.begin(), sums.end(), 0);
    for (int round = 0; round < rounds; ++round) {
      for (int w = 0; w < words; ++w) buffer[w] = mix(w, sums[w % share % threads]);
      for (int w = 0; w < words; ++w) sums[w / 4 % threads] += (buffer[w] == EMPTY ? EMPTY - 1 : buffer[w]);
    }
    for (int block = 0; block < blocks; ++block) all.insert(all.end(), sums.begin(), sums.end());
    return all;
  }

  void reading_global(int megabytes) {
    const uint32_t words = megabytes << 18, quads = words / 4, blocks = device_.multiProcessorCount;
    std::vector<uint32_t> values(words);
    for (uint32_t w = 0; w < words; ++w) values[w] = mix(w, 0);
    const uint32_t sum = std::accumulate(values.begin(), values.end(), 0u), passes = READERS * READS / quads * blocks;
    const Words data(values), result(1);
    const double bytes = 16.0 * READERS * READS * blocks;
    time_rounds(
        "reading memory", std::to_string(megabytes) + " MB over and over", 2, [&] { fill(result, 0); },
        [&](int n) {
          launch(read_global, blocks, READERS, 0, 0, reinterpret_cast<uint4*>(data.data), quads, n, result.data);
        },
        [&](int n) { return result.read()[0] == sum * passes * n; }, bytes);
  }

  void reading_shared() {
    const uint32_t blocks = device_.multiProcessorCount, sum = READERS * (2 * READERS - 1) * 4;
    const Words result(1);
    time_rounds(
        "reading shared memory", setting(blocks, READERS), 16, [&] { fill(result, 0); },
        [&](int n) { launch(read_shared, blocks, READERS, 0, 0, n, result.data); },
        [&](int n) { return result.read()[0] == sum * (READS / 2) * n * blocks; }, 16.0 * READERS * READS * blocks);
  }

  // An empty kernel, launched again and again and from a graph; one that counts shows that each of them runs.
  void launching() {
    constexpr int COUNT = 1000;
    const Words result(1);
    for (bool graph : {false, true}) {
      const std::string what = graph ? "graph node" : "kernel launch";
      const auto time = [&](uint32_t* count) {
        const Step launches = [&] {
          for (int n = 0; n < COUNT; ++n) nothing<<<1, 32, 0, stream_>>>(count);
          check(cudaGetLastError(), what);
        };
        const auto prepare = [&] { fill(result, 0); };
        const auto correct = [&] { return result.read()[0] == (count ? COUNT * 32 : 0); };
        if (!graph) return median(prepare, launches, correct);
        cudaGraph_t recorded;
        cudaGraphExec_t ready;
        check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), what);
        launches();
        check(cudaStreamEndCapture(stream_, &recorded), what);
        check(cudaGraphInstantiateWithFlags(&ready, recorded, 0), what);
        const auto found = median(prepare, [&] { check(cudaGraphLaunch(ready, stream_), what); }, correct);
        check(cudaGraphExecDestroy(ready), what);
        check(cudaGraphDestroy(recorded), what);
        return found;
      };
      const auto counted = time(result.data), empty = time(nullptr);
      const std::string found = counted && empty ? number("microseconds", *empty / COUNT) : "\"wrong\": true";
      row(what, std::to_string(COUNT) + " empty kernels", found);
    }
  }

  cudaDeviceProp device_;
  cudaStream_t stream_;
  cudaEvent_t start_, stop_;
  std::vector<std::string> rows_;
};

}  // namespace

int main() {
  try {
    Limits limits;
    std::string error;
    try {
      limits.measure();
    } catch (const std::exception& e) {
      error = e.what();
    }
    limits.print(error);
    return error.empty() ? 0 : 1;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
