// Kernels around one instruction each, and a pipeline of cp.async, for the tests of host_ptx.h.
#include "host_ptx.h"
#include "launch_kernel.h"

namespace bioplaus {
namespace {

struct Fragments {
  uint32_t *d, *a, *b;  // registers of lane l at [l]
};

enum Kind { S8, BFloat16, Float16 };

__global__ void mma_kernel(Fragments f, int kind) {
  const int lane = threadIdx.x;
  uint32_t a[4], b[2];
  memcpy(a, f.a + 4 * lane, sizeof a);
  memcpy(b, f.b + 2 * lane, sizeof b);
  int32_t whole[4];
  float sums[4];
  memcpy(whole, f.d + 4 * lane, sizeof whole);
  memcpy(sums, f.d + 4 * lane, sizeof sums);
  if (kind == S8) {
    mma_m16n8k32_s8(whole, a, b);
    memcpy(f.d + 4 * lane, whole, sizeof whole);
    return;
  }
  if (kind == BFloat16) {
    mma_m16n8k16(sums, a, b, __nv_bfloat16());
  } else {
    mma_m16n8k16(sums, a, b, __half());
  }
  memcpy(f.d + 4 * lane, sums, sizeof sums);
}

// Lane l gives the address of row row[l] of a matrix of 16 rows of 16 half-words.
__global__ void ldmatrix_kernel(uint32_t* r, const uint16_t* matrix, const int* row, const int* column,
                                bool transposed) {
  BK_DYNAMIC_SHARED(uint16_t, tile);
  for (int i = threadIdx.x; i < 256; i += 32) {
    tile[i] = matrix[i];
  }
  __syncthreads();
  uint32_t out[4];
  const uint16_t* from = tile + 16 * row[threadIdx.x] + column[threadIdx.x];
  if (transposed) {
    ldmatrix_x4_trans(out, from);
  } else {
    ldmatrix_x4(out, from);
  }
  memcpy(r + 4 * threadIdx.x, out, sizeof out);
}

constexpr int kStages = 3;
constexpr int kThreads = 64;

// out[i] = Σ over tiles of the entry of its neighbour; the last tile is ragged.
__global__ void pipeline_kernel(int* out, const int4* in, int tiles, int count) {
  __shared__ int4 tile[kStages][kThreads];
  const int me = threadIdx.x;
  const auto fetch = [&](int t) {
    if (t < tiles) {
      const int i = t * kThreads + me;
      cp_async_16(&tile[t % kStages][me], in + i, i < count);
    }
    cp_async_commit();
  };
  for (int t = 0; t < kStages - 1; ++t) {
    fetch(t);
  }
  int sum = 0;
  for (int t = 0; t < tiles; ++t) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    sum += tile[t % kStages][(me + 1) % kThreads].x;
    fetch(t + kStages - 1);
  }
  out[me] = sum;
}

}  // namespace
}  // namespace bioplaus

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void twin_mma(uint32_t* d, uint32_t* a, uint32_t* b, int kind) {
  BK_LAUNCH(bioplaus::mma_kernel, 1, 32, 0, nullptr, bioplaus::Fragments{d, a, b}, kind);
}
EXPORT void twin_ldmatrix(uint32_t* r, const uint16_t* matrix, const int* row, const int* column, int transposed) {
  BK_LAUNCH(bioplaus::ldmatrix_kernel, 1, 32, 512, nullptr, r, matrix, row, column, transposed != 0);
}
EXPORT void twin_pipeline(int* out, const int4* in, int tiles, int count) {
  BK_LAUNCH(bioplaus::pipeline_kernel, 1, bioplaus::kThreads, 0, nullptr, out, in, tiles, count);
}
