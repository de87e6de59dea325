#pragma once

#include <cuda_runtime_api.h>

#include "../common/feedback.h"

namespace bioplaus {

// Columns first … first + cols − 1 of B, into an output of these alone; `first` is a multiple of 128.
cudaError_t launch_feedback_weight(const FeedbackParams& p, int64_t first, int64_t cols, cudaStream_t stream);

}  // namespace bioplaus
