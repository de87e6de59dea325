#include "feedback_mm.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_int_mm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "../common/form.h"
#include "form_kernels.h"
#include "launch.h"

namespace bioplaus {
namespace {

// Bytes that a way holds at once beside operands and result, or what a few rows or columns take: of B, or of σ as
// bytes; of dY's digits; of these with their int32 sums.
constexpr int64_t kSlabBytes = int64_t{32} << 20;
constexpr int64_t kDigitBytes = int64_t{64} << 20;
constexpr int64_t kSumBytes = int64_t{256} << 20;

// How many of `count` fit, in whole steps.
int64_t as_fit(int64_t bytes, int64_t each, int64_t count, int64_t step) {
  return std::min(count, std::max<int64_t>(bytes / (each * step), 1) * step);
}

// The planes where the kernel can read them 16 bytes at a time.
at::Tensor aligned(const at::Tensor& signs) {
  const at::Tensor planes = signs.contiguous();
  return reinterpret_cast<uintptr_t>(planes.const_data_ptr()) % 16 == 0 ? planes : planes.clone();
}

void multiply_digits(SignProduct p, const at::TensorOptions& options) {
  p.splits = sign_splits(p.rows, p.depth, p.cols);
  const at::Tensor partial = at::empty({p.splits > 1 ? p.splits * p.rows * p.cols : 0}, options.dtype(at::kLong));
  p.partial = p.splits > 1 ? partial.mutable_data_ptr<int64_t>() : nullptr;
  launch_on(options.device(), launch_sign_product, p);
  launch_on(options.device(), launch_finish, p);
}

// `bytes`: σ of all columns, which are then formed once, or of some at a time.
void multiply_bytes(SignProduct p, const at::Tensor& digits, const at::Tensor& bytes, bool formed) {
  const at::Tensor sums = at::empty({digits.size(0), bytes.size(0)}, digits.options().dtype(at::kInt));
  p.sums = sums.mutable_data_ptr<int32_t>();
  p.sign_bytes = bytes.mutable_data_ptr<int8_t>();
  for (; p.first < p.cols; p.first += p.width) {
    if (!formed) {
      launch_on(digits.device(), launch_sign_bytes, p);
    }
    at::Tensor to = sums;
    at::_int_mm_out(to, digits, bytes.t());
    launch_on(digits.device(), launch_finish, p);
  }
}

// dX = s · (dY · σ).
at::Tensor sign_product(const at::Tensor& grad, const FeedbackArgs& args, bool int_mm) {
  const at::Device device = grad.device();
  const auto pack = [&](const FeedbackParams& w, int32_t* to) { launch_on(device, launch_pack_signs, w, to); };
  const at::Tensor planes = args.weight  ? form_packed(*args.weight, pack)
                            : args.signs ? aligned(*args.signs)
                                         : at::Tensor();
  const at::Tensor key = args.key ? args.key->contiguous() : at::Tensor();
  const int64_t rows = grad.size(0), depth = padded(grad.size(1));
  const at::Tensor out = at::empty({rows, args.size[1]}, grad.options());
  SignProduct p{};
  p.depth = grad.size(1);
  p.cols = args.size[1];
  p.row_stride = grad.stride(0);
  p.column_stride = grad.stride(1);
  p.scale = static_cast<float>(args.scale);
  p.signs = planes.defined() ? planes.const_data_ptr<int32_t>() : nullptr;
  p.key = key.defined() ? key.const_data_ptr<int64_t>() : nullptr;

  p.width = p.cols;
  const at::TensorOptions int8 = grad.options().dtype(at::kChar);
  if (int_mm) {
    // Slabs of one width, as it is the width of the product.
    const int64_t slabs = divide_up(p.cols, as_fit(kSlabBytes, depth, p.cols, 32));
    p.width = divide_up(divide_up(p.cols, slabs), 32) * 32;
  }
  const at::Tensor bytes = at::empty({int_mm ? p.width : 0, depth}, int8);
  const int64_t step =
      int_mm ? as_fit(kSumBytes, 4 * (depth + 4 * p.width), rows, 8) : as_fit(kDigitBytes, 4 * depth, rows, 32);
  for (int64_t first = 0; first < rows; first += step) {
    p.rows = std::min(step, rows - first);
    p.grad = grad.const_data_ptr<float>() + first * p.row_stride;
    p.out = out.mutable_data_ptr<float>() + first * p.cols;
    const at::Tensor digits = at::empty({digit_rows(p.rows), depth}, int8);
    const at::Tensor unit = at::empty({digits.size(0) / 4}, grad.options().dtype(at::kDouble));
    p.digits = digits.mutable_data_ptr<int8_t>();
    p.unit = unit.mutable_data_ptr<double>();
    launch_on(device, launch_quantise, p);
    if (int_mm) {
      multiply_bytes(p, digits, bytes, first > 0 && p.width >= p.cols);
    } else {
      multiply_digits(p, grad.options());
    }
  }
  return out;
}

// dX = dY · B by torch's product, B formed some columns at a time. A stored B is itself.
at::Tensor formed_product(const at::Tensor& grad, const FeedbackArgs& args) {
  // Gradients are the layers' own; with one asked for, a product into a given result is refused.
  const at::AutoDispatchBelowAutograd guard;
  at::Tensor out = at::empty({grad.size(0), args.size[1]}, grad.options());
  if (args.plain(grad.scalar_type())) {
    return at::mm_out(out, grad, *args.magnitude);
  }
  Formula formula(args);
  FeedbackParams& b = formula.p;
  const int64_t width = as_fit(kSlabBytes, b.rows * grad.element_size(), b.cols, kSignsPerCall);
  const at::Tensor slab = at::empty({b.rows, width}, grad.options());
  b.out = {slab.mutable_data_ptr(), to_dtype("grad_output", grad.scalar_type()), true, width, {1}};
  for (int64_t first = 0; first < b.cols; first += width) {
    const int64_t cols = std::min(width, b.cols - first);
    launch_on(grad.device(), launch_feedback_weight, b, first, cols);
    // Columns of a row-major matrix: a result that the product writes in place.
    at::Tensor part = out.narrow(1, first, cols);
    at::mm_out(part, grad, slab.narrow(1, 0, cols));
  }
  return out;
}

at::Tensor feedback_mm_by_cuda(const at::Tensor& grad_output, const std::optional<at::Tensor>& weight,
                               const std::optional<at::Tensor>& signs, const std::optional<at::Tensor>& magnitude,
                               const std::optional<at::Tensor>& key, c10::string_view entries, double scale,
                               int64_t in_features, c10::string_view way) {
  const at::ScalarType dtype = grad_output.scalar_type();
  check_floating("grad_output", grad_output);
  TORCH_CHECK_VALUE(grad_output.dim() == 2, "grad_output: expected 2 dimensions, got shape ",
                    tuple(grad_output.sizes()));
  TORCH_CHECK_VALUE(in_features >= 0, "in_features: expected at least 0, got ", in_features);
  const int64_t size[] = {grad_output.size(1), in_features};
  const FeedbackArgs args{weight, signs, magnitude, key, entries, scale, size};
  args.check(grad_output.device());
  if (way != "formed") {
    TORCH_CHECK_VALUE(way == "digits" || way == "int_mm", "way: expected one of ('digits', 'int_mm', 'formed'), got '",
                      way, "'");
    TORCH_CHECK_VALUE(entries == "constant", "way: expected 'formed' with entries='", entries, "', got '", way, "'");
    TORCH_CHECK_VALUE(dtype == at::kFloat, "way: expected 'formed' for ", dtype_name(dtype), ", got '", way, "'");
    TORCH_CHECK_VALUE(size[0] <= kMaxDepth, "way: expected 'formed' for more than ", kMaxDepth, " rows of B, got '",
                      way, "'");
  }
  if (grad_output.size(0) == 0 || size[0] == 0 || size[1] == 0) {
    return at::zeros({grad_output.size(0), in_features}, grad_output.options());
  }
  return way == "formed" ? formed_product(grad_output, args) : sign_product(grad_output, args, way == "int_mm");
}

at::Tensor feedback_mm_cuda(const at::Tensor& grad_output, const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& signs, const std::optional<at::Tensor>& magnitude,
                            const std::optional<at::Tensor>& key, c10::string_view entries, double scale,
                            int64_t in_features) {
  const bool integers = entries == "constant" && grad_output.scalar_type() == at::kFloat && grad_output.dim() == 2 &&
                        grad_output.size(1) <= kMaxDepth;
  return feedback_mm_by_cuda(grad_output, weight, signs, magnitude, key, entries, scale, in_features,
                             integers ? "digits" : "formed");
}

}  // namespace

TORCH_LIBRARY_IMPL(bioplaus, CUDA, m) {
  m.impl("feedback_mm", feedback_mm_cuda);
  m.impl("feedback_mm_by", feedback_mm_by_cuda);
}

}  // namespace bioplaus
