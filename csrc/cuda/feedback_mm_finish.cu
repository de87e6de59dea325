// Results from the integer sums of feedback_mm on CUDA: the digits' sums meet in one integer, whose product with the
// row's unit and s is rounded once. Rows that hold infinities or NaNs are done anew by a plain loop.
//
// Roofline, on paper and not yet on hardware: memory. Of int_mm, 16 bytes of sums an entry are read and 4 written.
#include "feedback_mm.h"
#include "launch_kernel.h"

namespace bioplaus {
namespace {

constexpr uint32_t kAll = 0xFFFFFFFFu;
constexpr int kThreads = 256;
constexpr int kWarpRows = 32;

__device__ double sigma(const SignProduct& p, int64_t k, int64_t col) {
  const SignWord word = sign_word(p, k, col / 32);
  return word.nonzero >> col % 32 & 1u ? 1.0 - 2.0 * (word.negative >> col % 32 & 1u) : 0.0;
}

// A row that holds infinities or NaNs: they alone decide. Each product with ±1 or 0 is what IEEE makes of it. A warp,
// one column a lane.
__device__ void nonfinite_row(const SignProduct& p, int64_t row, int64_t col) {
  const int lane = threadIdx.x % 32;
  double sum = 0;
  for (int64_t k = 0; k < p.depth; k += 32) {
    const float x = k + lane < p.depth ? p.grad[row * p.row_stride + (k + lane) * p.column_stride] : 0.0f;
    uint32_t left = __ballot_sync(kAll, (__float_as_uint(x) & 0x7F800000u) == 0x7F800000u);
    while (left) {
      const int from = __ffs(left) - 1;
      left &= left - 1;
      const double value = static_cast<double>(__shfl_sync(kAll, x, from));
      sum += col < p.cols ? value * sigma(p, k + from, col) : value;
    }
    if (__all_sync(kAll, isnan(sum))) {
      break;
    }
  }
  if (col < p.cols) {
    p.out[row * p.cols + col] = static_cast<float>(sum * p.scale);
  }
}

// The columns that have been multiplied.
BK_INLINE int64_t end_of(const SignProduct& p) {
  return p.sums && p.first + p.width < p.cols ? p.first + p.width : p.cols;
}

__device__ int64_t whole_sum(const SignProduct& p, int64_t row, int64_t col) {
  if (p.sums) {
    const int32_t* digit = p.sums + digit_row(row) * p.width + (col - p.first);
    const int64_t step = 8 * p.width;
    const int64_t upper = static_cast<int64_t>(digit[step]) * 256 + digit[0];
    return upper * 65536 + static_cast<int64_t>(digit[3 * step]) * 256 + digit[2 * step];
  }
  int64_t sum = 0;
  for (int64_t s = 0; s < p.splits; ++s) {
    sum += p.partial[(s * p.rows + row) * p.cols + col];
  }
  return sum;
}

// 6 blocks a multiprocessor, as with registers for more sm_80 spills.
__global__ void __launch_bounds__(kThreads, 6) finish_kernel(const __grid_constant__ SignProduct p) {
  const int64_t col = p.first + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const double unit = p.unit[row] * p.scale;
    if (isnan(unit)) {
      nonfinite_row(p, row, col);
    } else if (col < end_of(p)) {
      p.out[row * p.cols + col] = static_cast<float>(static_cast<double>(whole_sum(p, row, col)) * unit);
    }
  }
}

// The rows alone that multiply_kernel cannot do, of which there seldom are any.
__global__ void __launch_bounds__(kThreads) nonfinite_kernel(const __grid_constant__ SignProduct p) {
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kWarpRows;
  const int64_t mine = first + threadIdx.x % kWarpRows;
  for (uint32_t left = __ballot_sync(kAll, mine < p.rows && isnan(p.unit[mine])); left; left &= left - 1) {
    nonfinite_row(p, first + __ffs(left) - 1, col);
  }
}

}  // namespace

cudaError_t launch_finish(const SignProduct& p, cudaStream_t stream) {
  if (p.sums || p.partial) {
    const dim3 grid(static_cast<unsigned>(divide_up(end_of(p) - p.first, kThreads)),
                    static_cast<unsigned>(p.rows < 65535 ? p.rows : 65535));
    BK_LAUNCH(finish_kernel, grid, dim3(kThreads), 0, stream, p);
  } else {
    const dim3 grid(static_cast<unsigned>(divide_up(p.cols, kThreads)),
                    static_cast<unsigned>(divide_up(p.rows, kWarpRows)));
    BK_LAUNCH(nonfinite_kernel, grid, dim3(kThreads), 0, stream, p);
  }
  return cudaGetLastError();
}

}  // namespace bioplaus
