// feedback_weight on CUDA: a thread forms 8 neighbouring columns of one row in registers: magnitudes (already scaled),
// times signs, rounded into the output.
//
// Roofline: memory. Bytes per element = those of the weight and the magnitude that are read and of the output that is
// written (8 for s·sign(W) in fp32); packed signs add 1/8 byte, seeded entries nothing. A Philox call is 20 wide
// multiplications: uniform entries take two calls per thread, seeded signs one, of which 8 of its 128 bits are used, as
// passing the words between threads would cost about what it saves.
#include "entries.cuh"
#include "feedback_weight.h"
#include "launch_kernel.h"

namespace bioplaus {
namespace {

constexpr int kThreads = 256;

template <typename T, typename acc_t>
__device__ void store_as(const FeedbackParams& p, const Chunk<acc_t>& c) {
  alignas(16) T from[kColumns];
#pragma unroll
  for (int t = 0; t < kColumns; ++t) {
    round_to(c.b[t], from[t]);
  }
  T* row = static_cast<T*>(p.out.data) + c.row * p.out.row_stride;
  if (c.n == kColumns && wide(p.out, row + c.first)) {
    *reinterpret_cast<Pack<T, kColumns>*>(row + c.first) = *reinterpret_cast<const Pack<T, kColumns>*>(from);
    return;
  }
#pragma unroll
  for (int t = 0; t < kColumns; ++t) {
    if (t < c.n) {
      row[column_offset(p, p.out, c.first + t)] = from[t];
    }
  }
}

__device__ void store(const FeedbackParams& p, const Chunk<double>& c) { store_as<double>(p, c); }

__device__ void store(const FeedbackParams& p, const Chunk<float>& c) {
  switch (p.out.dtype) {
    case DType::BFloat16:
      store_as<__nv_bfloat16>(p, c);
      break;
    case DType::Float16:
      store_as<__half>(p, c);
      break;
    default:
      store_as<float>(p, c);
  }
}

// Registers for 4 blocks a multiprocessor, or 2 where numbers are double: what fits without spilling.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads, sizeof(acc_t) == 8 ? 2 : 4)
    feedback_weight_kernel(const __grid_constant__ FeedbackParams p) {
  const int64_t row_step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  const int64_t column_step = static_cast<int64_t>(gridDim.x) * blockDim.x * kColumns;
  Chunk<acc_t> c;
  for (c.row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; c.row < p.rows; c.row += row_step) {
    for (c.first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kColumns; c.first < p.cols;
         c.first += column_step) {
      c.n = static_cast<int>(p.cols - c.first < kColumns ? p.cols - c.first : kColumns);
      form_entries(p, c);
      store(p, c);
    }
  }
}

}  // namespace

cudaError_t launch_feedback_weight(const FeedbackParams& p, cudaStream_t stream) {
  const int64_t chunks = (p.cols + kColumns - 1) / kColumns;
  // Short rows share a block, so that its threads have work.
  int width = kThreads;
  while (width > 1 && width / 2 >= chunks) {
    width /= 2;
  }
  const dim3 block(width, kThreads / width);
  const int64_t blocks_x = (chunks + block.x - 1) / block.x;
  const int64_t blocks_y = (p.rows + block.y - 1) / block.y;
  // The loops in the kernel take what a grid of this size leaves.
  constexpr int64_t kMaxBlocks = 1 << 16;
  const int64_t x = blocks_x < kMaxBlocks ? blocks_x : kMaxBlocks;
  const int64_t most_y = (kMaxBlocks + x - 1) / x < 65535 ? (kMaxBlocks + x - 1) / x : 65535;
  const dim3 grid(x, blocks_y < most_y ? blocks_y : most_y);
  if (p.out.dtype == DType::Float64) {
    BK_LAUNCH(feedback_weight_kernel<double>, grid, block, 0, stream, p);
  } else {
    BK_LAUNCH(feedback_weight_kernel<float>, grid, block, 0, stream, p);
  }
  return cudaGetLastError();
}

}  // namespace bioplaus
