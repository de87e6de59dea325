#pragma once

#include <cuda_runtime_api.h>

#include "../common/feedback.h"
#include "../common/lc_geometry.h"

namespace bioplaus {

enum class Product { Forward, BackwardInput, BackwardWeight };

// The tensors of every product: the weights, (positions, groups · o, taps · c), the input and the output, or gradients.
enum Tensor { kWeight, kIn, kOut };

// Of an activation (N, C, *spatial), in elements.
struct LcStrides {
  int64_t sample, channel, spatial[kLcDims];
};

struct LcParams {
  LcGeometry g;
  void* data[3];  // by Tensor
  LcStrides in, out;
  DType dtype;
  const void* bias;     // or null
  int64_t bias_stride;  // from a position to the next
};

cudaError_t launch_lc(Product product, const LcParams& p, cudaStream_t stream);

}  // namespace bioplaus
