#include "feedback_weight.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "../common/form.h"

namespace bioplaus {

// Fewer elements than this are not worth a second thread.
constexpr int64_t kGrain = 32768;

void form_on_cpu(const FeedbackParams& p) {
  const auto kernel = BK_PICK(feedback_weight);
  const int64_t chunks = (p.cols + kChunk - 1) / kChunk;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(p.cols, kChunk));
  at::parallel_for(0, p.rows * chunks, grain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

at::Tensor feedback_weight_cpu(const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& signs,
                               const std::optional<at::Tensor>& magnitude, const std::optional<at::Tensor>& key,
                               c10::string_view entries, double scale, at::IntArrayRef size, at::ScalarType dtype) {
  return form({weight, signs, magnitude, key, entries, scale, size}, at::kCPU, dtype, form_on_cpu);
}

// ±1 and 0 from packed signs are the constant entries of scale 1.
at::Tensor unpack_signs_cpu(const at::Tensor& signs, at::IntArrayRef size, at::ScalarType dtype) {
  return form({std::nullopt, signs, std::nullopt, std::nullopt, "constant", 1.0, size}, at::kCPU, dtype, form_on_cpu);
}

TORCH_LIBRARY_IMPL(bioplaus, CPU, m) {
  m.impl("feedback_weight", feedback_weight_cpu);
  m.impl("unpack_signs", unpack_signs_cpu);
}

}  // namespace bioplaus
