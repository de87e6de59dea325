#pragma once

#include <cuda_runtime_api.h>

#include "../common/feedback.h"

namespace bioplaus {

cudaError_t launch_redraw_key(const FeedbackParams& p, int64_t* out, cudaStream_t stream);

}  // namespace bioplaus
