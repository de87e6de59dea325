// The host side of the ops that form: feedback_weight and unpack_signs, pack_signs, redraw_key.
#include "../common/form.h"

#include <torch/library.h>

#include "form_kernels.h"
#include "launch.h"

namespace bioplaus {
namespace {

at::Tensor feedback_weight_cuda(const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& signs,
                                const std::optional<at::Tensor>& magnitude, const std::optional<at::Tensor>& key,
                                c10::string_view entries, double scale, at::IntArrayRef size, at::ScalarType dtype) {
  at::Device device = at::kCUDA;
  for (const auto* x : {&weight, &signs, &magnitude, &key}) {
    if (*x && (*x)->is_cuda()) {
      device = (*x)->device();
      break;
    }
  }
  return form({weight, signs, magnitude, key, entries, scale, size}, device, dtype,
              [&](const FeedbackParams& p) { launch_on(device, launch_feedback_weight, p, 0, p.cols); });
}

// ±1 and 0 from packed signs are the constant entries of scale 1.
at::Tensor unpack_signs_cuda(const at::Tensor& signs, at::IntArrayRef size, at::ScalarType dtype) {
  return feedback_weight_cuda(std::nullopt, signs, std::nullopt, std::nullopt, "constant", 1.0, size, dtype);
}

at::Tensor pack_signs_cuda(const at::Tensor& weight) {
  return form_packed(weight, [&](const FeedbackParams& p, int32_t* planes) {
    launch_on(weight.device(), launch_pack_signs, p, planes);
  });
}

at::Tensor redraw_key_cuda(const at::Tensor& key, const at::Tensor& weight) {
  return form_key(key, weight, [&](const RedrawParams& p, int64_t* out) {
    const int blocks = redraw_blocks(p);
    const at::Tensor sums = blocks > 1 ? at::empty({blocks}, key.options()) : at::Tensor();
    auto* to = blocks > 1 ? reinterpret_cast<uint64_t*>(sums.mutable_data_ptr<int64_t>()) : nullptr;
    launch_on(weight.device(), launch_redraw_key, p, blocks, to, out);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(bioplaus, CUDA, m) {
  m.impl("feedback_weight", feedback_weight_cuda);
  m.impl("unpack_signs", unpack_signs_cuda);
  m.impl("pack_signs", pack_signs_cuda);
  m.impl("redraw_key", redraw_key_cuda);
}

}  // namespace bioplaus
