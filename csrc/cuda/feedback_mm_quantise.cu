// Rows of dY as four digits: fixed point relative to their largest entry, rounded once to 32 bits. The CPU's bits.
//
// Roofline, on paper and not yet on hardware: memory. dY is read twice (from L2 or L1 the second time), and 4 bytes an
// entry are written.
#include "element.h"
#include "feedback_mm.h"
#include "launch_kernel.h"

namespace bioplaus {
namespace {

constexpr int kRowThreads = 256;
constexpr int kRun = 16;  // entries whose digits a thread writes in pieces of 16 bytes

__device__ __forceinline__ float power_of_two(int e) { return __uint_as_float(static_cast<uint32_t>(e + 127) << 23); }

__device__ __forceinline__ double double_power_of_two(int e) {
  return __longlong_as_double(static_cast<int64_t>(e + 1023) << 52);
}

// A row's fixed point: q = rint(x · up · more).
struct Scaling {
  int shift;
  float up, more;
};

// `top`: bits of the row's largest magnitude, finite.
__device__ __forceinline__ Scaling scaling(uint32_t top) {
  // |x| < 2^e, and balanced digits reach 0x7F7F… only: one bit less where the largest entry would exceed it.
  const int e = top < (1u << 23) ? -126 - (top ? __clz(top) - 9 : 0) : static_cast<int>(top >> 23) - 126;
  int shift = 31 - e;
  if (static_cast<double>(__uint_as_float(top)) * double_power_of_two(shift) > 0x7F7F7F00.0p0) {
    --shift;
  }
  // 2^shift can exceed a float's range, as rows can be subnormal: in two steps, both exact for what stays above 1/2.
  const int first = shift < 127 ? shift : 127;
  return {shift, power_of_two(first), power_of_two(shift - first)};
}

struct Row {
  const float* x;
  int64_t stride, depth;

  __device__ void load(int64_t k, float (&to)[kRun]) const {
    if (stride == 1 && k + kRun <= depth && reinterpret_cast<uintptr_t>(x + k) % 16 == 0) {
      *reinterpret_cast<Pack<float, kRun>*>(to) = *reinterpret_cast<const Pack<float, kRun>*>(x + k);
    } else {
#pragma unroll
      for (int t = 0; t < kRun; ++t) {
        to[t] = k + t < depth ? x[(k + t) * stride] : 0.0f;
      }
    }
  }
};

__device__ uint32_t largest(const Row& row, uint32_t* shared) {
  uint32_t top = 0;
  for (int64_t k = static_cast<int64_t>(threadIdx.x) * kRun; k < row.depth; k += kRowThreads * kRun) {
    alignas(16) float x[kRun];
    row.load(k, x);
#pragma unroll
    for (int t = 0; t < kRun; ++t) {
      const uint32_t a = __float_as_uint(x[t]) & 0x7FFFFFFFu;
      top = a > top ? a : top;
    }
  }
  for (int lane = 16; lane > 0; lane /= 2) {
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, top, lane);
    top = other > top ? other : top;
  }
  if (threadIdx.x % 32 == 0) {
    shared[threadIdx.x / 32] = top;
  }
  __syncthreads();
  for (int w = 0; w < kRowThreads / 32; ++w) {
    top = shared[w] > top ? shared[w] : top;
  }
  return top;
}

// `to`: the row's digits 2, before the digits 3, 0 and 1 of 8 rows.
__device__ void cut(const Row& row, const Scaling& s, int8_t* to, int64_t length) {
  for (int64_t k = static_cast<int64_t>(threadIdx.x) * kRun; k < length; k += kRowThreads * kRun) {
    alignas(16) float x[kRun];
    row.load(k, x);
    alignas(16) uint32_t digits[4][kRun / 4] = {};
#pragma unroll
    for (int t = 0; t < kRun; ++t) {
      int32_t q = static_cast<int32_t>(rintf(x[t] * s.up * s.more));
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        digits[d][t / 4] |= (static_cast<uint32_t>(q) & 0xFFu) << (8 * (t % 4));
        q = (q + 128) >> 8;
      }
    }
#pragma unroll
    for (int d = 0; d < 4; ++d) {
      *reinterpret_cast<uint4*>(to + (d + 2) % 4 * 8 * length + k) = *reinterpret_cast<const uint4*>(digits[d]);
    }
  }
}

// One block, one row; those that fill up the last 8 are zero.
__global__ void __launch_bounds__(kRowThreads) quantise_kernel(const __grid_constant__ SignProduct p) {
  __shared__ uint32_t tops[kRowThreads / 32];
  const int64_t i = blockIdx.x;
  const Row row{p.grad + i * p.row_stride, p.column_stride, i < p.rows ? p.depth : 0};
  const uint32_t top = largest(row, tops);
  const bool finite = top < 0x7F800000u;
  Scaling s = scaling(finite ? top : 0);
  if (threadIdx.x == 0) {
    p.unit[i] = finite ? double_power_of_two(-s.shift) : static_cast<double>(NAN);
  }
  if (!finite) {
    s.up = 0;
    s.more = 0;
  }
  cut(row, s, p.digits + digit_row(i) * padded(p.depth), padded(p.depth));
}

}  // namespace

cudaError_t launch_quantise(const SignProduct& p, cudaStream_t stream) {
  const unsigned rows = static_cast<unsigned>(digit_rows(p.rows) / 4);
  BK_LAUNCH(quantise_kernel, dim3(rows), dim3(kRowThreads), 0, stream, p);
  return cudaGetLastError();
}

}  // namespace bioplaus
