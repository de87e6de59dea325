#pragma once

#include <cuda_runtime_api.h>

#include "../common/feedback.h"
#include "../common/lc_geometry.h"

namespace bioplaus {

// An activation (N, C, *spatial) in memory; strides in elements.
struct LcActivation {
  void* data;
  int64_t stride_n, stride_c, stride[kLcDims];
};

struct LcParams {
  LcGeometry g;
  LcActivation in, out;  // input or its gradient, output or its gradient
  void* weight;          // (positions, groups · o, taps · c): read, or the gradient written; null where B is formed
  bool signs_of_weight;  // B = feedback.scale · sign(weight)
  DType dtype;
  const void* bias;  // or null
  bool bias_per_position;
  // B, where it is not `weight`: as rows and columns of the weight's first dim and the others.
  FeedbackParams feedback;
};

cudaError_t launch_lc_forward(const LcParams& p, cudaStream_t stream);
cudaError_t launch_lc_backward_input(const LcParams& p, cudaStream_t stream);
cudaError_t launch_lc_backward_weight(const LcParams& p, cudaStream_t stream);

}  // namespace bioplaus
