#pragma once

#include <cuda_runtime_api.h>

#include "../common/feedback.h"

namespace bioplaus {

cudaError_t launch_feedback_weight(const FeedbackParams& p, cudaStream_t stream);

}  // namespace bioplaus
