// pack_signs on CUDA: a block takes a tile of 64 rows × 128 columns, so that every flag has one writer; a warp takes a
// row of it at a time, and a ballot makes a word.
//
// Roofline: memory. Each element is read once (4 bytes in fp32) and 1/4 byte is written; two ballots per 32 elements.
#include "../common/packed_signs.h"
#include "element.h"
#include "launch_kernel.h"
#include "pack_signs.h"

namespace bioplaus {
namespace {

constexpr int kWarps = 8;
constexpr int kWords = 4;

template <typename T>
__global__ void __launch_bounds__(32 * kWarps)
    pack_signs_kernel(const __grid_constant__ FeedbackParams p, int32_t* planes) {
  __shared__ uint32_t zeros[kWarps][kWords];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t width = sign_words(p.cols);
  const int64_t column_tiles = width / kWords;
  const int64_t tiles = sign_tiles(p.rows) * column_tiles;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row_tile = tile / column_tiles;
    const int64_t first_word = tile % column_tiles * kWords;
    uint32_t zero[kWords] = {};
    for (int r = warp; r < kTileRows; r += kWarps) {
      const int64_t i = row_tile * kTileRows + r;
      if (i >= p.rows) {
        break;
      }
      const T* row = static_cast<const T*>(p.weight.data) + i * p.weight.row_stride;
      int4 negative, nonzero;
      int32_t* negative_word = &negative.x;
      int32_t* nonzero_word = &nonzero.x;
#pragma unroll
      for (int q = 0; q < kWords; ++q) {
        const int64_t j = (first_word + q) * 32 + lane;
        const bool inside = j < p.cols;
        const auto w = inside ? to_float(row[column_offset(p, p.weight, j)]) : to_float(T(0.0f));
        const uint32_t lower = __ballot_sync(0xFFFFFFFFu, w < 0);
        const uint32_t upper = __ballot_sync(0xFFFFFFFFu, w > 0);
        negative_word[q] = static_cast<int32_t>(lower);
        nonzero_word[q] = static_cast<int32_t>(lower | upper);
        zero[q] |= __ballot_sync(0xFFFFFFFFu, inside) & ~(lower | upper);
      }
      if (lane == 0) {
        *reinterpret_cast<int4*>(planes + i * width + first_word) = negative;
        *reinterpret_cast<int4*>(planes + (p.rows + i) * width + first_word) = nonzero;
      }
    }
    if (lane == 0) {
#pragma unroll
      for (int q = 0; q < kWords; ++q) {
        zeros[warp][q] = zero[q];
      }
    }
    __syncthreads();
    if (threadIdx.x < kWords) {
      uint32_t any = 0;
      for (int w = 0; w < kWarps; ++w) {
        any |= zeros[w][threadIdx.x];
      }
      planes[(2 * p.rows + row_tile) * width + first_word + threadIdx.x] = any != 0;
    }
    __syncthreads();
  }
}

template <typename T>
cudaError_t launch(const FeedbackParams& p, int32_t* planes, cudaStream_t stream) {
  const int64_t tiles = sign_tiles(p.rows) * (sign_words(p.cols) / kWords);
  constexpr int64_t kMaxBlocks = 1 << 16;
  const unsigned blocks = static_cast<unsigned>(tiles < kMaxBlocks ? tiles : kMaxBlocks);
  BK_LAUNCH(pack_signs_kernel<T>, blocks, 32 * kWarps, 0, stream, p, planes);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_pack_signs(const FeedbackParams& p, int32_t* planes, cudaStream_t stream) {
  switch (p.weight.dtype) {
    case DType::Float64:
      return launch<double>(p, planes, stream);
    case DType::BFloat16:
      return launch<__nv_bfloat16>(p, planes, stream);
    case DType::Float16:
      return launch<__half>(p, planes, stream);
    default:
      return launch<float>(p, planes, stream);
  }
}

}  // namespace bioplaus
