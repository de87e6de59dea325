// redraw_key on CUDA: one block, one thread per sample; the key is read and written on the device.
//
// Roofline: none to speak of. 64 scattered loads and 64 Philox calls; the launch is the cost.
#include "../common/redraw.h"
#include "launch_kernel.h"
#include "redraw_key.h"

namespace bioplaus {
namespace {

__global__ void __launch_bounds__(kRedrawSamples)
    redraw_key_kernel(const __grid_constant__ FeedbackParams p, int64_t* out) {
  __shared__ uint64_t hash[kRedrawSamples];
  hash[threadIdx.x] = redraw_hash(p, static_cast<int>(threadIdx.x));
  __syncthreads();
  if (threadIdx.x == 0) {
    uint64_t stream = static_cast<uint64_t>(p.key[2]);
    for (int k = 0; k < kRedrawSamples; ++k) {
      stream ^= hash[k];
    }
    out[0] = p.key[0];
    out[1] = p.key[1];
    out[2] = static_cast<int64_t>(stream);
  }
}

}  // namespace

cudaError_t launch_redraw_key(const FeedbackParams& p, int64_t* out, cudaStream_t stream) {
  BK_LAUNCH(redraw_key_kernel, 1, kRedrawSamples, 0, stream, p, out);
  return cudaGetLastError();
}

}  // namespace bioplaus
