#include "redraw_key.h"

#include <torch/library.h>

#include "../common/form.h"
#include "launch.h"

namespace bioplaus {

at::Tensor redraw_key_cuda(const at::Tensor& key, const at::Tensor& weight) {
  return form_key(key, weight, [&](const RedrawParams& p, int64_t* out) {
    const int blocks = redraw_blocks(p);
    const at::Tensor sums = blocks > 1 ? at::empty({blocks}, key.options()) : at::Tensor();
    auto* to = blocks > 1 ? reinterpret_cast<uint64_t*>(sums.mutable_data_ptr<int64_t>()) : nullptr;
    launch_on(weight.device(), [&](cudaStream_t stream) { return launch_redraw_key(p, blocks, to, out, stream); });
  });
}

TORCH_LIBRARY_IMPL(bioplaus, CUDA, m) { m.impl("redraw_key", redraw_key_cuda); }

}  // namespace bioplaus
