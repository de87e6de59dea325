// feedback_weight on CUDA: a thread forms 8 neighbouring columns of one row in registers: magnitudes (already scaled),
// times signs, rounded into the output.
//
// Roofline, on paper and not yet on hardware: memory where entries are read or are signs alone, the bytes of the weight
// and the magnitude that are read and of the output that is written (8 for s·sign(W) in fp32); packed signs add 1/8
// byte. Drawn entries are bound by instructions: 16.7 M uniform ones take some 31 µs of them on an H100, where writing
// them as bf16 takes 10.
#include "entries.cuh"
#include "feedback_weight.h"
#include "launch_kernel.h"

namespace bioplaus {
namespace {

constexpr int kThreads = 256;

template <typename T, typename acc_t, bool kStrided>
__device__ void store_as(const FeedbackParams& p, const Chunk<acc_t, kColumns, kStrided>& c, int64_t first) {
  alignas(16) T from[kColumns];
#pragma unroll
  for (int t = 0; t < kColumns; ++t) {
    round_to(c.b[t], from[t]);
  }
  T* row = static_cast<T*>(p.out.data) + c.row * p.out.row_stride;
  const int64_t at = c.first - first;
  if (c.n == kColumns && wide(p.out, row + at)) {
    *reinterpret_cast<Pack<T, kColumns>*>(row + at) = *reinterpret_cast<const Pack<T, kColumns>*>(from);
    return;
  }
#pragma unroll
  for (int t = 0; t < kColumns; ++t) {
    if (t < c.n) {
      row[kStrided ? strided_offset(p, p.out, at + t) : at + t] = from[t];
    }
  }
}

template <bool kStrided>
__device__ void store(const FeedbackParams& p, const Chunk<double, kColumns, kStrided>& c, int64_t first) {
  store_as<double>(p, c, first);
}

template <bool kStrided>
__device__ void store(const FeedbackParams& p, const Chunk<float, kColumns, kStrided>& c, int64_t first) {
  switch (p.out.dtype) {
    case DType::BFloat16:
      store_as<__nv_bfloat16>(p, c, first);
      break;
    case DType::Float16:
      store_as<__half>(p, c, first);
      break;
    default:
      store_as<float>(p, c, first);
  }
}

// Registers for 4 blocks a multiprocessor, or 2 where numbers are double or columns strided: what fits without
// spilling.
template <typename acc_t, bool kStrided>
__global__ void __launch_bounds__(kThreads, sizeof(acc_t) == 8 || kStrided ? 2 : 4)
    feedback_weight_kernel(const __grid_constant__ FeedbackParams p, int64_t first, int64_t end) {
  const int64_t row_step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  const int64_t column_step = static_cast<int64_t>(gridDim.x) * blockDim.x * kColumns;
  Chunk<acc_t, kColumns, kStrided> c;
  for (c.row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; c.row < p.rows; c.row += row_step) {
    for (c.first = first + (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kColumns; c.first < end;
         c.first += column_step) {
      c.n = static_cast<int>(end - c.first < kColumns ? end - c.first : kColumns);
      form_entries(p, c);
      store(p, c, first);
    }
  }
}

template <typename acc_t>
void launch(const FeedbackParams& p, int64_t first, int64_t cols, dim3 grid, dim3 block, cudaStream_t stream) {
  const auto dense = [](const Operand& x) { return !x.data || x.dense; };
  if (dense(p.weight) && dense(p.magnitude) && dense(p.out)) {
    BK_LAUNCH((feedback_weight_kernel<acc_t, false>), grid, block, 0, stream, p, first, first + cols);
  } else {
    BK_LAUNCH((feedback_weight_kernel<acc_t, true>), grid, block, 0, stream, p, first, first + cols);
  }
}

}  // namespace

cudaError_t launch_feedback_weight(const FeedbackParams& p, int64_t first, int64_t cols, cudaStream_t stream) {
  const int64_t chunks = (cols + kColumns - 1) / kColumns;
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
    launch<double>(p, first, cols, grid, block, stream);
  } else {
    launch<float>(p, first, cols, grid, block, stream);
  }
  return cudaGetLastError();
}

}  // namespace bioplaus
