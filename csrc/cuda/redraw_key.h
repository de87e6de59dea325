#pragma once

#include <cuda_runtime_api.h>

#include "../common/redraw.h"

namespace bioplaus {

// How many blocks take the words of W; more than one leave their sums in `sums`.
int redraw_blocks(const RedrawParams& p);
cudaError_t launch_redraw_key(const RedrawParams& p, int blocks, uint64_t* sums, int64_t* out, cudaStream_t stream);

}  // namespace bioplaus
