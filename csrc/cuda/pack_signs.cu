// pack_signs on CUDA. A block takes a tile of 64 rows, so that every flag has one writer; a warp 8 rows of it, and a
// lane 16 bytes of each of these, all of which are under way before any is looked at; rows that are no whole pieces go
// entry by entry. The signs of 8 columns are a byte; the tile's bytes go through shared memory to become words.
//
// Roofline, on paper and not yet on hardware: memory. Each element is read once (4 bytes in fp32), 1/4 byte is written.
#include "../common/packed_signs.h"
#include "element.h"
#include "form_kernels.h"
#include "launch_kernel.h"
#include "ptx.cuh"

namespace bioplaus {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 8;  // of a warp

// Columns of a lane, and words of a row that is 32 lanes wide.
template <typename T>
constexpr int kEach = 16 / sizeof(T);

// Bit 0: negative; bit 16: not zero. Of neighbours, one register holds both.
template <typename T>
__device__ __forceinline__ uint32_t sign_bits(T x) {
  const auto w = to_float(x);
  return w < 0 ? 0x10001u : w > 0 ? 0x10000u : 0u;
}

// `whole`: rows are whole 16-byte pieces.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pack_signs_kernel(const __grid_constant__ FeedbackParams p, unsigned column_tiles, bool whole, int32_t* planes) {
  constexpr int kWords = kEach<T>, kLanesOfByte = 8 / kEach<T>;
  __shared__ alignas(16) T entries[kTileRows][32 * kEach<T>];
  __shared__ uint32_t negative[kTileRows * kWords];
  __shared__ uint32_t nonzero[kTileRows * kWords];
  __shared__ int32_t zeros[kWords];
  const int lane = threadIdx.x % 32;
  const int first_row = threadIdx.x / 32 * kRows;
  const int64_t width = sign_words(p.cols);
  const int64_t tile = blockIdx.x / column_tiles;
  const int64_t first_word = static_cast<int64_t>(blockIdx.x % column_tiles) * kWords;
  const int64_t first = tile * kTileRows + first_row;
  const T* row = static_cast<const T*>(p.weight.data) + first * p.weight.row_stride;
  if (whole) {
    const int64_t col = 32 * first_word + lane * kEach<T>;
#pragma unroll
    for (int r = 0; r < kRows; ++r, row += p.weight.row_stride) {
      const bool inside = first + r < p.rows && col < p.cols;
      cp_async_16(&entries[first_row + r][lane * kEach<T>], inside ? row + col : p.weight.data, inside);
    }
  } else {
#pragma unroll 4
    for (int i = 0; i < kRows * kEach<T>; ++i) {
      const int r = i / kEach<T>, at = i % kEach<T> * 32 + lane;
      const int64_t col = 32 * first_word + at;
      const bool inside = first + r < p.rows && col < p.cols;
      entries[first_row + r][at] = inside ? row[r * p.weight.row_stride + column_offset(p, p.weight, col)] : T(0.0f);
    }
  }
  cp_async_commit();
  if (threadIdx.x < kWords) {
    zeros[threadIdx.x] = 0;
  }
  cp_async_wait<0>();
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const auto piece = *reinterpret_cast<const Pack<T, kEach<T>>*>(&entries[first_row + r][lane * kEach<T>]);
    uint32_t bits = 0;
#pragma unroll
    for (int t = 0; t < kEach<T>; ++t) {
      bits |= sign_bits(piece.x[t]) << t;
    }
    bits <<= lane % kLanesOfByte * kEach<T>;
#pragma unroll
    for (int other = 1; other < kLanesOfByte; other *= 2) {
      bits |= __shfl_xor_sync(0xFFFFFFFFu, bits, other);
    }
    if (lane % kLanesOfByte == 0) {
      const int at = (first_row + r) * kWords * 4 + lane / kLanesOfByte;
      reinterpret_cast<uint8_t*>(negative)[at] = static_cast<uint8_t>(bits);
      reinterpret_cast<uint8_t*>(nonzero)[at] = static_cast<uint8_t>(bits >> 16);
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < kTileRows * kWords; at += kThreads) {
    const int64_t i = tile * kTileRows + at / kWords;
    const int64_t word = first_word + at % kWords;
    if (i < p.rows && word < width) {
      const int64_t left = p.cols - 32 * word;
      const uint32_t inside = left >= 32 ? 0xFFFFFFFFu : left > 0 ? (1u << left) - 1 : 0u;
      planes[i * width + word] = static_cast<int32_t>(negative[at]);
      planes[(p.rows + i) * width + word] = static_cast<int32_t>(nonzero[at]);
      if (inside & ~nonzero[at]) {
        zeros[at % kWords] = 1;
      }
    }
  }
  __syncthreads();
  if (threadIdx.x < kWords && first_word + threadIdx.x < width) {
    planes[(2 * p.rows + tile) * width + first_word + threadIdx.x] = zeros[threadIdx.x];
  }
}

}  // namespace

cudaError_t launch_pack_signs(const FeedbackParams& p, int32_t* planes, cudaStream_t stream) {
  return of_dtype(p.weight.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool whole = p.weight.dense && reinterpret_cast<uintptr_t>(p.weight.data) % 16 == 0 &&
                       p.weight.row_stride % kEach<T> == 0 && p.cols % kEach<T> == 0;
    const unsigned across = static_cast<unsigned>((sign_words(p.cols) + kEach<T> - 1) / kEach<T>);
    const dim3 grid(static_cast<unsigned>(sign_tiles(p.rows)) * across);
    BK_LAUNCH(pack_signs_kernel<T>, grid, dim3(kThreads), 0, stream, p, across, whole, planes);
    return cudaGetLastError();
  });
}

}  // namespace bioplaus
