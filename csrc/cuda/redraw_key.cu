// redraw_key on CUDA: blocks sum the hashes of their words, in any order; one more adds these sums up. A small W takes
// that one block alone. The key, its version with it, is read and written on the device.
//
// Roofline, on paper and not yet on hardware: memory. Each element is read once, at two wide multiplications a word.
#include "element.h"
#include "form_kernels.h"
#include "launch_kernel.h"

namespace bioplaus {
namespace {

constexpr int kThreads = 256;
// A grid is bounded, and threads go on to what lies a grid further.
constexpr int kMaxBlocks = 2048;
constexpr int kWordsOfThread = 16;

// What this thread adds, of all words, or of pieces of 16 bytes where these are whole.
template <typename U>
__device__ __forceinline__ uint64_t sum_of_thread(const RedrawParams& p, bool whole) {
  constexpr int kEach = 16 / sizeof(U);
  const U* data = static_cast<const U*>(p.data);
  const uint64_t start = hash_start(p.key);
  const int each = whole ? kEach : 1;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * each;
  uint64_t sum = 0;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * each; i < p.words; i += step) {
    const WordPlace at = word_place(p, i);
    uint64_t weyl = start + at.index * kGamma;
    if (whole) {
      const auto piece = *reinterpret_cast<const Pack<U, kEach>*>(data + at.offset);
#pragma unroll
      for (int t = 0; t < kEach; ++t, weyl += p.step[0] * kGamma) {
        sum += word_hash(weyl, piece.x[t]);
      }
    } else {
      sum += word_hash(weyl, data[at.offset]);
    }
  }
  return sum;
}

__device__ __forceinline__ uint64_t sum_of_words(const RedrawParams& p, bool whole) {
  return p.bytes == 2 ? sum_of_thread<uint16_t>(p, whole) : sum_of_thread<uint32_t>(p, whole);
}

// Of the block's threads: the sum, or the exclusive or.
__device__ __forceinline__ uint64_t over_block(uint64_t value, bool exclusive) {
  __shared__ uint64_t values[kThreads / 32];
  for (int other = 16; other > 0; other /= 2) {
    const uint64_t x = __shfl_xor_sync(0xFFFFFFFFu, value, other);
    value = exclusive ? value ^ x : value + x;
  }
  if (threadIdx.x % 32 == 0) {
    values[threadIdx.x / 32] = value;
  }
  __syncthreads();
  value = values[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) {
    value = exclusive ? value ^ values[warp] : value + values[warp];
  }
  return value;
}

__global__ void __launch_bounds__(kThreads)
    sum_words_kernel(const __grid_constant__ RedrawParams p, bool whole, uint64_t* sums) {
  const uint64_t sum = over_block(p.key[0] == 1 ? 0 : sum_of_words(p, whole), false);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
  }
}

// One block. `sums` of `blocks` blocks, or null.
__global__ void __launch_bounds__(kThreads) redraw_key_kernel(const __grid_constant__ RedrawParams p, bool whole,
                                                              const uint64_t* sums, int blocks, int64_t* out) {
  const bool samples = p.key[0] == 1;
  const int thread = static_cast<int>(threadIdx.x);
  uint64_t value = 0;
  if (samples) {
    value = thread < kRedrawSamples ? sample_hash(p, thread) : 0;
  } else if (sums) {
    for (int i = thread; i < blocks; i += kThreads) {
      value += sums[i];
    }
  } else {
    value = sum_of_words(p, whole);
  }
  const uint64_t all = over_block(value, samples);
  if (thread == 0) {
    out[0] = p.key[0];
    out[1] = p.key[1];
    out[2] = p.key[2] ^ static_cast<int64_t>(samples ? all : hash_end(p.key, all));
  }
}

}  // namespace

int redraw_blocks(const RedrawParams& p) {
  const int64_t blocks = (p.words + kThreads * kWordsOfThread - 1) / (kThreads * kWordsOfThread);
  return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

cudaError_t launch_redraw_key(const RedrawParams& p, int blocks, uint64_t* sums, int64_t* out, cudaStream_t stream) {
  const int64_t each = 16 / p.bytes;
  bool whole = reinterpret_cast<uintptr_t>(p.data) % 16 == 0 && p.stride[0] == 1 && p.size[0] % each == 0;
  for (int d = 1; d < p.dims; ++d) {
    whole = whole && p.stride[d] % each == 0;
  }
  if (blocks > 1) {
    BK_LAUNCH(sum_words_kernel, blocks, kThreads, 0, stream, p, whole, sums);
  }
  BK_LAUNCH(redraw_key_kernel, 1, kThreads, 0, stream, p, whole, sums, blocks, out);
  return cudaGetLastError();
}

}  // namespace bioplaus
