// csrc/cuda/launch.cuh on the host: launchers register for CPU tensors, and a launch is simulated.
#pragma once
#define DEVICE_KEY CPU

template <class... Parameters, class... Arguments>
void launch_cooperative(const Tensor&, void (*kernel)(Parameters...), int64_t blocks, int64_t threads, int64_t shared,
                        const Arguments&... arguments) {
  simulator::run(int(blocks), int(threads), shared, [&] { kernel(arguments...); });
}
