// What the host code of every CUDA op does around a launch.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace bioplaus {

// Runs launch(arguments …, stream), which returns the launch's cudaError_t, on the device and its current stream.
template <typename Launch, typename... Arguments>
void launch_on(at::Device device, const Launch& launch, const Arguments&... arguments) {
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(launch(arguments..., c10::cuda::getCurrentCUDAStream().stream()));
}

}  // namespace bioplaus
