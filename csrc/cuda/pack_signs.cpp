#include "pack_signs.h"

#include <torch/library.h>

#include "../common/form.h"
#include "launch.h"

namespace bioplaus {

at::Tensor pack_signs_cuda(const at::Tensor& weight) {
  return form_packed(weight, [&](const FeedbackParams& p, int32_t* planes) {
    launch_on(weight.device(), [&](cudaStream_t stream) { return launch_pack_signs(p, planes, stream); });
  });
}

TORCH_LIBRARY_IMPL(bioplaus, CUDA, m) { m.impl("pack_signs", pack_signs_cuda); }

}  // namespace bioplaus
