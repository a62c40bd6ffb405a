// What the launchers of persistent kernels share: checks of a plan, buffers, dispatch, and the launch itself.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../common.h"
#include "exchange.cuh"
#include "recurrence.cuh"
#include "split.cuh"

using torch::headeronly::Half;

// The blocks of a plan, checked: all sequences and all cells are somebody's. A small batch needs fewer groups.
struct Split {
  int groups, group_size, group_batch;  // of a group: blocks, and sequences
};

inline Split check_split(int64_t size, int64_t batch, int64_t groups, int64_t units, int64_t threads) {
  CHECK(units > 0 && units % 4 == 0 && units < size + 4,
        "units must be a positive multiple of 4 up to " + std::to_string(size + 3) + ", got " + std::to_string(units));
  CHECK(groups > 0, "groups must be positive, got " + std::to_string(groups));
  CHECK(threads > 0 && threads % 32 == 0 && threads <= THREADS,
        "threads must be a multiple of 32 up to " + std::to_string(THREADS) + ", got " + std::to_string(threads));
  const int64_t group_size = (size - 1) / units + 1, group_batch = (batch - 1) / groups + 1;
  CHECK(group_size <= MAX_GROUP_SIZE, "units must be larger: " + std::to_string(group_size) +
                                          " blocks would share a step, of " + std::to_string(MAX_GROUP_SIZE) +
                                          " at most");
  return {int((batch - 1) / group_batch + 1), int(group_size), int(group_batch)};
}

inline Tensor filled(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype, double value) {
  Tensor t = empty(like, size, dtype);
  return torch::stable::fill_(t, value);
}
// Words that blocks exchange (exchange.cuh), before a launch.
inline Tensor emptied(const Tensor& like, int64_t words) { return filled(like, {words}, ScalarType::Int, -1); }
// Words of so many vectors that pass from block to block.
inline int64_t vector_words(int64_t count, int64_t size, const Tensor& like) {
  return count * exchanged_stride(exchanged(size) * like.element_size() / 4);
}
inline uint32_t* words(Tensor& t) { return reinterpret_cast<uint32_t*>(t.mutable_data_ptr<int32_t>()); }

// Whether numbers of four cells of these tensors, and eight of a row of their weights, can be accessed at once.
template <class S, class... Tensors>
bool aligned(int64_t H, const Tensors&... tensors) {
  return H % 8 == 0 && (... && (reinterpret_cast<uintptr_t>(in<S>(tensors)) % 16 == 0));
}

template <class S>
constexpr ScalarType dtype_of = std::is_same_v<S, float>      ? ScalarType::Float
                                : std::is_same_v<S, BFloat16> ? ScalarType::BFloat16
                                                              : ScalarType::Half;

// fn<S, columns>() for the first of the types that a tensor has, and the columns of a plan.
template <class S, class... Others, class Fn>
void dispatch(ScalarType dtype, int64_t columns, Fn fn) {
  if (dtype != dtype_of<S>) {
    if constexpr (sizeof...(Others) > 0) return dispatch<Others...>(dtype, columns, fn);
    CHECK(false, "no persistent kernel has this dtype");
  } else if constexpr (sizeof(S) == 2) {
    if (columns == 8) return fn.template operator()<S, 8>();
    if (columns == 16) return fn.template operator()<S, 16>();
    if (columns == 32) return fn.template operator()<S, 32>();
  } else {
    if (columns == 1) return fn.template operator()<S, 1>();
    if (columns == 8) return fn.template operator()<S, 8>();
  }
  CHECK(false, "columns must be 8, 16 or 32 in 16 bits, 1 or 8 in float32, got " + std::to_string(columns));
}

#ifdef __CUDACC__
#define DEVICE_KEY CUDA

// Weak, so that the module can be imported beside a torch without CUDA, which has no such function and no use for it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

inline void check_cuda(cudaError_t error, const char* doing) {
  if (error != cudaSuccess) cudaGetLastError();  // forgets it, or PyTorch would find it after a launch of its own
  CHECK(error == cudaSuccess, std::string(doing) + ": " + cudaGetErrorString(error));
}

// While it lives, calls of this thread may load a kernel, as its first use does, though a stream is being captured.
struct LoadingAllowed {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  LoadingAllowed() { check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "allowing a kernel to be loaded"); }
  ~LoadingAllowed() { cudaThreadExchangeStreamCaptureMode(&mode); }
  LoadingAllowed(const LoadingAllowed&) = delete;
};

// One launch whose blocks all run at the same time, on the current stream of the device of `like`.
template <class... Parameters, class... Arguments>
void launch_cooperative(const Tensor& like, void (*kernel)(Parameters...), int64_t blocks, int64_t threads,
                        int64_t shared, const Arguments&... arguments) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  void* stream = nullptr;
  CHECK(aoti_torch_get_current_cuda_stream, "this torch has no CUDA streams");
  CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream) == 0, "no current stream");
  const void* entry = reinterpret_cast<const void*>(kernel);
  const int device = like.get_device_index();
  // This runtime is linked into the module, beside that of PyTorch, and has a current device of its own.
  check_cuda(cudaSetDevice(device), "choosing the device");
  const LoadingAllowed loading;
  int each = 0, processors = 0, most = 0;
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "asking for shared memory");
  CHECK(shared <= most, "the plan needs " + std::to_string(shared) + " bytes of shared memory a block, but there are " +
                            std::to_string(most));
  // Always the same value: launches of other threads may lie between this line and the launch.
  check_cuda(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
             "setting the shared memory of a persistent kernel");
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, entry, int(threads), shared),
             "asking how many blocks run at once");
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
             "asking for the number of multiprocessors");
  CHECK(blocks <= int64_t(each) * processors, "the plan has " + std::to_string(blocks) + " blocks, but only " +
                                                  std::to_string(each * processors) + " can run at once");
  void* parameters[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check_cuda(cudaLaunchCooperativeKernel(entry, dim3(blocks), dim3(threads), parameters, shared, cudaStream_t(stream)),
             "launching a persistent kernel");
}
#else
#include "launch_simulator.h"
#endif
