// What is done around the integer product of feedback_mm on CUDA: dY's rows as digits before it, σ as bytes for int_mm,
// results from sums after it.
//
// Roofline of all, on paper and not yet on hardware: memory. Quantising reads dY twice (from L2 or L1 the second time)
// and writes 4 bytes an entry; σ is 1/8 to 1/4 byte read, or nothing, and a byte written; of int_mm's sums, 16 bytes an
// entry are read and 4 written.
#include "element.h"
#include "feedback_mm.h"
#include "launch_kernel.h"

namespace bioplaus {
namespace {

constexpr int kThreads = 256;
constexpr int kRun = 16;  // entries that a thread writes at once, as bytes

// Rows of dY as four digits: fixed point relative to their largest entry, rounded once to 32 bits. The CPU's bits.

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
  for (int64_t k = static_cast<int64_t>(threadIdx.x) * kRun; k < row.depth; k += kThreads * kRun) {
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
  for (int w = 0; w < kThreads / 32; ++w) {
    top = shared[w] > top ? shared[w] : top;
  }
  return top;
}

// `to`: the row's digits 2, before the digits 3, 0 and 1 of 8 rows.
__device__ void cut(const Row& row, const Scaling& s, int8_t* to, int64_t length) {
  for (int64_t k = static_cast<int64_t>(threadIdx.x) * kRun; k < length; k += kThreads * kRun) {
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
__global__ void __launch_bounds__(kThreads) quantise_kernel(const __grid_constant__ SignProduct p) {
  __shared__ uint32_t tops[kThreads / 32];
  const int64_t i = blockIdx.x;
  const Row row{p.grad + i * p.row_stride, p.column_stride, i < p.rows ? p.depth : 0};
  const uint32_t top = largest(row, tops);
  const bool finite = top < 0x7F800000u;
  const Scaling s = finite ? scaling(top) : Scaling{0, 0.0f, 0.0f};
  if (threadIdx.x == 0) {
    p.unit[i] = finite ? double_power_of_two(-s.shift) : static_cast<double>(NAN);
  }
  cut(row, s, p.digits + digit_row(i) * padded(p.depth), padded(p.depth));
}

// σ as bytes −1, 0 and 1, transposed: the vendor's int8 products take a row-major left and a column-major right operand
// only. Rows beyond the last are 0, columns anything. A block's tile of 64 rows × 4 words goes through shared memory,
// and 4 neighbouring threads write 64 bytes.

constexpr int kWords = 4;
static_assert(kThreads == kDepth * kWords, "a thread has one word");
constexpr int kRuns = kDepth / kRun;

// Bit `bit` of four words, each in a byte of its own.
__device__ __forceinline__ uint32_t bit_of_four(const uint32_t* words, int bit) {
  return (words[0] >> bit & 1u) | (words[1] >> bit & 1u) << 8 | (words[2] >> bit & 1u) << 16 |
         (words[3] >> bit & 1u) << 24;
}

__global__ void __launch_bounds__(kThreads) sign_bytes_kernel(const __grid_constant__ SignProduct p) {
  // One word more a run: the runs that a warp reads at once lie in different banks.
  __shared__ uint32_t negative[kWords][kRuns][kRun + 1];
  __shared__ uint32_t nonzero[kWords][kRuns][kRun + 1];
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kDepth;
  const int64_t first_word = static_cast<int64_t>(blockIdx.x) * kWords;
  const int row = threadIdx.x / kWords, w = threadIdx.x % kWords;
  const int64_t k = first_row + row, word = p.first / 32 + first_word + w;
  const SignWord x = k < p.depth && word < sign_words(p.cols) ? sign_word(p, k, word) : SignWord{0, 0};
  negative[w][row / kRun][row % kRun] = x.negative;
  nonzero[w][row / kRun][row % kRun] = x.nonzero;
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * kWords * kRuns; i += kThreads) {
    const int run = i % kRuns, col = i / kRuns;
    const int64_t at = 32 * first_word + col;
    if (at < p.width) {
      alignas(16) uint32_t bytes[kRun / 4];
#pragma unroll
      for (int q = 0; q < kRun / 4; ++q) {
        // Bytes 1 → −1, 0 → 1; none carries.
        bytes[q] = (bit_of_four(negative[col / 32][run] + 4 * q, col % 32) * 0xFEu + 0x01010101u) &
                   bit_of_four(nonzero[col / 32][run] + 4 * q, col % 32) * 0xFFu;
      }
      *reinterpret_cast<uint4*>(p.sign_bytes + at * padded(p.depth) + first_row + run * kRun) =
          *reinterpret_cast<const uint4*>(bytes);
    }
  }
}

// Results from the integer sums: the digits' meet in one integer, whose product with the row's unit and s is rounded
// once. Rows that hold infinities or NaNs are done anew by a plain loop.

constexpr uint32_t kAll = 0xFFFFFFFFu;
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

__device__ int64_t sum_of(const SignProduct& p, int64_t row, int64_t col) {
  if (p.sums) {
    const int32_t* digit = p.sums + digit_row(row) * p.width + (col - p.first);
    const int64_t step = 8 * p.width;
    return whole_sum(digit[step], digit[0], digit[3 * step], digit[2 * step]);
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
    } else if (col < p.first + p.width && col < p.cols) {
      p.out[row * p.cols + col] = static_cast<float>(static_cast<double>(sum_of(p, row, col)) * unit);
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

cudaError_t launch_quantise(const SignProduct& p, cudaStream_t stream) {
  const unsigned rows = static_cast<unsigned>(digit_rows(p.rows) / 4);
  BK_LAUNCH(quantise_kernel, dim3(rows), dim3(kThreads), 0, stream, p);
  return cudaGetLastError();
}

cudaError_t launch_sign_bytes(const SignProduct& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(p.width, 32 * kWords)),
                  static_cast<unsigned>(padded(p.depth) / kDepth));
  BK_LAUNCH(sign_bytes_kernel, grid, dim3(kThreads), 0, stream, p);
  return cudaGetLastError();
}

cudaError_t launch_finish(const SignProduct& p, cudaStream_t stream) {
  if (p.sums || p.partial) {
    const dim3 grid(static_cast<unsigned>(divide_up(p.width, kThreads)),
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
