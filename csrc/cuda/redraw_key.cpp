#include "redraw_key.h"

#include <torch/library.h>

#include "../common/form.h"
#include "launch.h"

namespace bioplaus {

at::Tensor redraw_key_cuda(const at::Tensor& key, const at::Tensor& weight) {
  return form_key(key, weight, [&](const FeedbackParams& p, int64_t* out) {
    launch_on(weight.device(), [&](cudaStream_t stream) { return launch_redraw_key(p, out, stream); });
  });
}

TORCH_LIBRARY_IMPL(bioplaus, CUDA, m) { m.impl("redraw_key", redraw_key_cuda); }

}  // namespace bioplaus
