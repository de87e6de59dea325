#include "feedback_mm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include "../common/form.h"
#include "feedback_weight.h"
#include "launch.h"
#include "pack_signs.h"

namespace bioplaus {
namespace {

// s as the entries of B hold it.
double entry_scale(double scale, at::ScalarType dtype) {
  const float s = static_cast<float>(scale);
  return dtype == at::kBFloat16 ? static_cast<float>(at::BFloat16(s))
         : dtype == at::kHalf   ? static_cast<float>(at::Half(s))
                                : s;
}

at::Tensor bytes(int64_t count, at::Device device) { return at::empty({count}, at::device(device).dtype(at::kByte)); }

// The planes where the kernel can read them 16 bytes at a time.
at::Tensor aligned(const at::Tensor& signs) {
  const at::Tensor planes = signs.contiguous();
  return reinterpret_cast<uintptr_t>(planes.const_data_ptr()) % 16 == 0 ? planes : planes.clone();
}

// dX = s · (dY · σ).
at::Tensor sign_product(const at::Tensor& grad, const std::optional<at::Tensor>& weight,
                        const std::optional<at::Tensor>& signs, const std::optional<at::Tensor>& key, double scale,
                        int64_t cols) {
  const at::Device device = grad.device();
  const at::Tensor planes =
      weight  ? form_packed(*weight,
                            [&](const FeedbackParams& w, int32_t* to) {
                             launch_on(device, [&](cudaStream_t stream) { return launch_pack_signs(w, to, stream); });
                            })
      : signs ? aligned(*signs)
              : at::Tensor();
  const at::Tensor words = key ? key->contiguous() : at::Tensor();
  const at::Tensor out = at::empty({grad.size(0), cols}, grad.options());
  SignProduct p{};
  p.rows = grad.size(0);
  p.depth = grad.size(1);
  p.cols = cols;
  p.grad = grad.const_data_ptr();
  p.dtype = to_dtype("grad_output", grad.scalar_type());
  p.row_stride = grad.stride(0);
  p.column_stride = grad.stride(1);
  p.out = out.mutable_data_ptr();
  p.scale = entry_scale(scale, grad.scalar_type());
  p.signs = planes.defined() ? planes.const_data_ptr<int32_t>() : nullptr;
  p.key = words.defined() ? words.const_data_ptr<int64_t>() : nullptr;
  p.splits = sign_splits(p.rows, p.depth, p.cols, p.dtype);
  const at::Tensor digits = bytes(digit_bytes(p.rows, p.depth), device);
  const at::Tensor row = bytes(p.rows * static_cast<int64_t>(sizeof(RowScale)), device);
  const at::Tensor partial =
      bytes(partial_sums(p.rows, p.cols, p.splits) * static_cast<int64_t>(sizeof(int64_t)), device);
  p.digits = static_cast<int8_t*>(digits.mutable_data_ptr());
  p.row = static_cast<RowScale*>(row.mutable_data_ptr());
  p.partial = static_cast<int64_t*>(partial.mutable_data_ptr());
  launch_on(device, [&](cudaStream_t stream) { return launch_sign_product(p, stream); });
  return out;
}

// dX = dY · B.
at::Tensor tile_product(const at::Tensor& grad, const FeedbackArgs& args) {
  const at::Device device = grad.device();
  const at::Tensor planes = args.signs ? args.signs->contiguous() : at::Tensor();
  const at::Tensor words = args.key ? args.key->contiguous() : at::Tensor();
  TileProduct p{};
  p.b.entries = to_entries(args.entries);
  p.b.scale = args.scale;
  p.b.signs = planes.defined() ? planes.const_data_ptr<int32_t>() : nullptr;
  p.b.key = words.defined() ? words.const_data_ptr<int64_t>() : nullptr;
  p.b.out.dtype = to_dtype("grad_output", grad.scalar_type());
  Operands operands(p.b, args.size, false);
  if (args.weight) {
    operands.add(p.b.weight, *args.weight, const_cast<void*>(args.weight->const_data_ptr()));
  }
  if (args.magnitude) {
    operands.add(p.b.magnitude, *args.magnitude, const_cast<void*>(args.magnitude->const_data_ptr()));
  }
  operands.finish();
  const at::Tensor out = at::empty({grad.size(0), p.b.cols}, grad.options());
  p.rows = grad.size(0);
  p.grad = grad.const_data_ptr();
  p.row_stride = grad.stride(0);
  p.column_stride = grad.stride(1);
  p.whole = p.column_stride == 1 && p.row_stride % 8 == 0 && reinterpret_cast<uintptr_t>(p.grad) % 16 == 0;
  p.out = out.mutable_data_ptr();
  p.splits = tile_splits(p.rows, p.b.rows, p.b.cols, p.b.out.dtype);
  const at::Tensor partial =
      bytes(partial_sums(p.rows, p.b.cols, p.splits) * static_cast<int64_t>(sizeof(float)), device);
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  launch_on(device, [&](cudaStream_t stream) { return launch_tile_product(p, stream); });
  return out;
}

at::Tensor feedback_mm_cuda(const at::Tensor& grad_output, const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& signs, const std::optional<at::Tensor>& magnitude,
                            const std::optional<at::Tensor>& key, c10::string_view entries, double scale,
                            int64_t in_features) {
  to_dtype("grad_output", grad_output.scalar_type());
  TORCH_CHECK_VALUE(grad_output.dim() == 2, "grad_output: expected 2 dimensions, got shape ",
                    tuple(grad_output.sizes()));
  TORCH_CHECK_VALUE(in_features >= 0, "in_features: expected at least 0, got ", in_features);
  const int64_t size[] = {grad_output.size(1), in_features};
  const FeedbackArgs args{weight, signs, magnitude, key, entries, scale, size};
  args.check(grad_output.device());
  if (grad_output.size(0) == 0 || size[0] == 0 || size[1] == 0) {
    return at::zeros({grad_output.size(0), in_features}, grad_output.options());
  }
  const Entries e = to_entries(entries);
  const at::ScalarType dtype = grad_output.scalar_type();
  if (e == Entries::Stored && !weight && !signs && scale == 1 && magnitude->scalar_type() == dtype) {
    return at::mm(grad_output, *magnitude);
  }
  if (e == Entries::Constant && dtype != at::kDouble && size[0] <= kMaxDepth) {
    return sign_product(grad_output, weight, signs, key, scale, in_features);
  }
  if (dtype != at::kDouble) {
    return tile_product(grad_output, args);
  }
  const at::Device device = grad_output.device();
  return at::mm(grad_output, form(args, device, dtype, [&](const FeedbackParams& b) {
                  launch_on(device, [&](cudaStream_t stream) { return launch_feedback_weight(b, stream); });
                }));
}

}  // namespace

TORCH_LIBRARY_IMPL(bioplaus, CUDA, m) { m.impl("feedback_mm", feedback_mm_cuda); }

}  // namespace bioplaus
