#pragma once

#include <cuda_runtime_api.h>

#include "../common/feedback.h"

namespace bioplaus {

cudaError_t launch_pack_signs(const FeedbackParams& p, int32_t* planes, cudaStream_t stream);

}  // namespace bioplaus
