// σ as bytes −1, 0 and 1, transposed: the vendor's int8 products take a row-major left and a column-major right operand
// only. Columns beyond the last, and rows beyond it, are 0.
//
// A block's tile is 64 rows × 4 words; its words go through shared memory, and 4 neighbouring threads write 64 bytes.
//
// Roofline, on paper and not yet on hardware: memory, a byte an entry written; 1/8 to 1/4 byte read, or nothing.
#include "feedback_mm.h"
#include "launch_kernel.h"

namespace bioplaus {
namespace {

constexpr int kWords = 4;
constexpr int kRun = 16;  // bytes that a thread writes at once
constexpr int kRuns = kDepth / kRun;
constexpr int kThreads = kDepth * kWords;

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
  {
    const int row = threadIdx.x / kWords;
    const int w = threadIdx.x % kWords;
    const int64_t k = first_row + row;
    const int64_t word = p.first / 32 + first_word + w;
    const SignWord x = k < p.depth && word < sign_words(p.cols) ? sign_word(p, k, word) : SignWord{0, 0};
    negative[w][row / kRun][row % kRun] = x.negative;
    nonzero[w][row / kRun][row % kRun] = x.nonzero;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * kWords * kRuns; i += kThreads) {
    const int run = i % kRuns;
    const int col = i / kRuns;
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

}  // namespace

cudaError_t launch_sign_bytes(const SignProduct& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(p.width, 32 * kWords)),
                  static_cast<unsigned>(padded(p.depth) / kDepth));
  BK_LAUNCH(sign_bytes_kernel, grid, dim3(kThreads), 0, stream, p);
  return cudaGetLastError();
}

}  // namespace bioplaus
