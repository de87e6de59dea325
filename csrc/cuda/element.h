// Element types on the device: conversions to and from the accumulating type, for .cu files.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/feedback.h"

namespace bioplaus {

static __device__ __forceinline__ float to_float(float x) { return x; }
static __device__ __forceinline__ double to_float(double x) { return x; }
static __device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
static __device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

static __device__ __forceinline__ void round_to(double x, double& y) { y = x; }
static __device__ __forceinline__ void round_to(float x, float& y) { y = x; }
static __device__ __forceinline__ void round_to(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
static __device__ __forceinline__ void round_to(float x, __half& y) { y = __float2half_rn(x); }

// N neighbours, moved in pieces of 16 bytes.
template <typename T, int N>
struct alignas(16) Pack {
  T x[N];
};

// f(a T) of the element type; what calls it is compiled for host or device.
#pragma nv_exec_check_disable
template <typename F>
BK_INLINE auto of_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::Float64:
      return f(double());
    case DType::BFloat16:
      return f(__nv_bfloat16());
    case DType::Float16:
      return f(__half());
    default:
      return f(float());
  }
}

}  // namespace bioplaus
