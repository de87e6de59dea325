#include <torch/library.h>

#include "../common/form.h"
#include "../common/redraw.h"

namespace bioplaus {

at::Tensor redraw_key_cpu(const at::Tensor& key, const at::Tensor& weight) {
  return form_key(key, weight, [](const FeedbackParams& p, int64_t* out) {
    uint64_t stream = static_cast<uint64_t>(p.key[2]);
    for (int k = 0; k < kRedrawSamples; ++k) {
      stream ^= redraw_hash(p, k);
    }
    out[0] = p.key[0];
    out[1] = p.key[1];
    out[2] = static_cast<int64_t>(stream);
  });
}

TORCH_LIBRARY_IMPL(bioplaus, CPU, m) { m.impl("redraw_key", redraw_key_cpu); }

}  // namespace bioplaus
