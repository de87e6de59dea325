// What forms B, packed signs and keys.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/redraw.h"

namespace bioplaus {

// Columns first … first + cols − 1 of B, into an output of these alone; `first` is a multiple of 128.
cudaError_t launch_feedback_weight(const FeedbackParams& p, int64_t first, int64_t cols, cudaStream_t stream);

cudaError_t launch_pack_signs(const FeedbackParams& p, int32_t* planes, cudaStream_t stream);

// How many blocks take the words of W; more than one leave their sums in `sums`.
int redraw_blocks(const RedrawParams& p);
cudaError_t launch_redraw_key(const RedrawParams& p, int blocks, uint64_t* sums, int64_t* out, cudaStream_t stream);

}  // namespace bioplaus
