// feedback_mm on CUDA for constant entries, first part: rows of dY as fixed point relative to their largest entry,
// rounded once to 32 bits, or to 16 for half types where they lose little, and cut into balanced int8 digits. The CPU's
// bits.
//
// Digits lie in blocks of 16 × padded depth: for 8 rows of dY the upper two digits' block, then the lower two's; in a
// block first the 8 lower digits, then the 8 upper ones. The lower block of a row of 16 bits is not written. A row's
// width is decided from the row alone, so that its result does not depend on the rows beside it.
//
// Roofline: memory. dY is read twice, three times in half types (from L2 or L1 but for the first), and 4 or 2 bytes an
// entry are written. The sums that decide in half types are in the CPU's order, 16 chains of K/32 additions in one
// warp: some 8·K/32 cycles, hidden by the other blocks of a multiprocessor.
#include "element.h"
#include "feedback_mm.h"
#include "launch_kernel.h"

namespace bioplaus {
namespace {

constexpr uint32_t kAll = 0xFFFFFFFFu;
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
__device__ __forceinline__ Scaling scaling(uint32_t top, int bytes) {
  // |x| < 2^e, and balanced digits reach 0x7F7F… only: one bit less where the largest entry would exceed it.
  const int e = top < (1u << 23) ? -126 - (top ? __clz(top) - 9 : 0) : static_cast<int>(top >> 23) - 126;
  const double limit = bytes == 2 ? 0x7F7F.0p0 : 0x7F7F7F00.0p0;
  int shift = 8 * bytes - 1 - e;
  if (static_cast<double>(__uint_as_float(top)) * double_power_of_two(shift) > limit) {
    --shift;
  }
  // 2^shift can exceed a float's range, as rows can be subnormal: in two steps, both exact for what stays above 1/2.
  const int first = shift < 127 ? shift : 127;
  return {shift, power_of_two(first), power_of_two(shift - first)};
}

template <typename T>
struct Row {
  const T* x;
  int64_t stride, depth;

  __device__ float operator[](int64_t k) const { return k < depth ? to_float(x[k * stride]) : 0.0f; }
  __device__ void load(int64_t k, float (&to)[kRun]) const {
    if (stride == 1 && k + kRun <= depth && reinterpret_cast<uintptr_t>(x + k) % 16 == 0) {
      const Pack<T, kRun> piece = *reinterpret_cast<const Pack<T, kRun>*>(x + k);
#pragma unroll
      for (int t = 0; t < kRun; ++t) {
        to[t] = to_float(piece.x[t]);
      }
    } else {
#pragma unroll
      for (int t = 0; t < kRun; ++t) {
        to[t] = (*this)[k + t];
      }
    }
  }
};

template <typename T>
__device__ uint32_t largest(const Row<T>& row, uint32_t* shared) {
  uint32_t top = 0;
  for (int64_t k = static_cast<int64_t>(threadIdx.x) * kRun; k < row.depth; k += kRowThreads * kRun) {
    float x[kRun];
    row.load(k, x);
#pragma unroll
    for (int t = 0; t < kRun; ++t) {
      const uint32_t a = __float_as_uint(x[t]) & 0x7FFFFFFFu;
      top = a > top ? a : top;
    }
  }
  for (int lane = 16; lane > 0; lane /= 2) {
    const uint32_t other = __shfl_xor_sync(kAll, top, lane);
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

// Whether 2 bytes lose less than a rounding of the output, by sums in the CPU's order: 16 of every 32nd entry and the
// one 16 further on, then those. The first warp's halves sum squares, and squares of what is lost; its answer alone
// counts.
template <typename T>
__device__ bool two_bytes_do(const Row<T>& row, const Scaling& s, double allowed) {
  const int lane = threadIdx.x % 32;
  const auto square_at = [&](int64_t k) {
    const float y = row[k] * s.up * s.more;
    const float v = lane < 16 ? y : y - rintf(y);
    return v * v;
  };
  float sum = 0;
  for (int64_t k = threadIdx.x < 32 ? lane % 16 : row.depth; k < row.depth; k += 32) {
    sum += square_at(k) + square_at(k + 16);
  }
  double square = 0;
  double lost = 0;
  for (int l = 0; l < 16; ++l) {
    square += static_cast<double>(__shfl_sync(kAll, sum, l));
    lost += static_cast<double>(__shfl_sync(kAll, sum, 16 + l));
  }
  return lost <= allowed * square;
}

template <typename T>
__device__ void cut(const Row<T>& row, const Scaling& s, int bytes, int8_t* to, int64_t step) {
  const int up = 32 - 8 * bytes;
  for (int64_t k = static_cast<int64_t>(threadIdx.x) * kRun; k < padded(row.depth); k += kRowThreads * kRun) {
    float x[kRun];
    row.load(k, x);
    alignas(16) uint32_t digits[4][kRun / 4] = {};
#pragma unroll
    for (int t = 0; t < kRun; ++t) {
      int32_t q = static_cast<int32_t>(static_cast<uint32_t>(static_cast<int32_t>(rintf(x[t] * s.up * s.more))) << up);
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        digits[d][t / 4] |= (static_cast<uint32_t>(q) & 0xFFu) << (8 * (t % 4));
        q = (q + 128) >> 8;
      }
    }
#pragma unroll
    for (int d = 0; d < 4; ++d) {
      // The upper block holds digits 3 and 2, the lower one, 16 rows further on, 1 and 0.
      if (d >= 2 || bytes == 4) {
        *reinterpret_cast<uint4*>(to + (d >= 2 ? d - 2 : d + 2) * 8 * step + k) =
            *reinterpret_cast<const uint4*>(digits[d]);
      }
    }
  }
}

// One block, one row.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) quantise_kernel(const __grid_constant__ SignProduct p) {
  __shared__ uint32_t tops[kRowThreads / 32];
  __shared__ int narrow;
  const int64_t i = blockIdx.x;
  const Row<T> row{static_cast<const T*>(p.grad) + i * p.row_stride, p.column_stride, p.depth};
  const uint32_t top = largest(row, tops);
  const bool finite = top < 0x7F800000u;
  Scaling s = scaling(finite ? top : 0, 4);
  int bytes = 4;
  if constexpr (sizeof(T) == 2) {
    // The errors of a row add up to about √lost; a rounding of the output is 2^-9 (bf16) or 2^-12 (fp16) of √square on
    // average. An eighth and a quarter of that may be lost.
    const Scaling less = scaling(finite ? top : 0, 2);
    const bool yes = two_bytes_do(row, less, p.dtype == DType::BFloat16 ? 0x1p-24 : 0x1p-28);
    if (threadIdx.x == 0) {
      narrow = yes || !finite;
    }
    __syncthreads();
    if (narrow) {
      bytes = 2;
      s = less;
    }
  }
  if (threadIdx.x == 0) {
    p.row[i].unit = finite ? double_power_of_two(-(s.shift + 8 * (4 - bytes))) : double_power_of_two(0) * NAN;
    p.row[i].bytes = bytes;
  }
  if (!finite) {
    s.up = 0;
    s.more = 0;
  }
  const int64_t step = padded(p.depth);
  cut(row, s, bytes, p.digits + (i / 8 * 32 + i % 8) * step, step);
}

template <typename T>
void quantise_as(const SignProduct& p, cudaStream_t stream) {
  BK_LAUNCH((quantise_kernel<T>), dim3(static_cast<unsigned>(p.rows)), dim3(kRowThreads), 0, stream, p);
}

}  // namespace

void quantise(const SignProduct& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::BFloat16:
      return quantise_as<__nv_bfloat16>(p, stream);
    case DType::Float16:
      return quantise_as<__half>(p, stream);
    default:
      return quantise_as<float>(p, stream);
  }
}

}  // namespace bioplaus
