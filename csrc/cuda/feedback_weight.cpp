#include "feedback_weight.h"

#include <torch/library.h>

#include "../common/form.h"
#include "launch.h"

namespace bioplaus {

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

TORCH_LIBRARY_IMPL(bioplaus, CUDA, m) {
  m.impl("feedback_weight", feedback_weight_cuda);
  m.impl("unpack_signs", unpack_signs_cuda);
}

}  // namespace bioplaus
