#include "lc.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../common/form.h"
#include "../common/lc_checks.h"
#include "form_kernels.h"
#include "launch.h"

namespace bioplaus {
namespace {

// Channels adjacent, where the kernel can then read 16 bytes of those of a group at a time.
at::Tensor for_wide_reads(const at::Tensor& x, int64_t channels) {
  return x.stride(1) != 1 && channels * x.element_size() % 16 == 0 ? x.movedim(1, -1).contiguous().movedim(-1, 1) : x;
}

at::Tensor empty_activation(const at::Tensor& like, int64_t channels, at::IntArrayRef spatial) {
  LcSize size{like.size(0), channels};
  size.append(spatial.begin(), spatial.end());
  return at::empty(size, like.options(), lc_memory_format(like));
}

LcStrides strides(const at::Tensor& x) {
  LcStrides s{x.stride(0), x.stride(1), {}};
  for (int64_t d = 2; d < x.dim(); ++d) {
    s.spatial[d - (x.dim() - kLcDims)] = x.stride(d);
  }
  return s;
}

void multiply(Product product, LcParams p, const at::Tensor& weight, const at::Tensor& in, const at::Tensor& out) {
  for (const auto& [to, x] : {std::pair(kWeight, &weight), std::pair(kIn, &in), std::pair(kOut, &out)}) {
    p.data[to] = const_cast<void*>(x->const_data_ptr());
  }
  p.dtype = to_dtype("dtype", in.scalar_type());
  p.in = strides(in);
  p.out = strides(out);
  launch_on(in.device(), launch_lc, product, p);
}

at::Tensor lc_forward_cuda(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const LcArgs args{stride, padding, dilation, groups};
  LcParams p{};
  p.g = args.forward(input, weight, bias);
  p.bias_stride = bias && bias->dim() > 1 ? groups * p.g.o : 0;
  const at::Tensor b = bias ? bias->contiguous() : at::Tensor();
  p.bias = bias ? b.const_data_ptr() : nullptr;
  const at::Tensor output = empty_activation(input, groups * p.g.o, weight.sizes().slice(0, args.dims()));
  if (output.numel() > 0) {
    multiply(Product::Forward, p, weight.contiguous(), for_wide_reads(input, p.g.c), output);
  }
  return output;
}

at::Tensor lc_backward_input_cuda(const at::Tensor& grad_output, const std::optional<at::Tensor>& weight,
                                  const std::optional<at::Tensor>& signs, const std::optional<at::Tensor>& magnitude,
                                  const std::optional<at::Tensor>& key, c10::string_view entries, double scale,
                                  at::IntArrayRef weight_size, at::IntArrayRef input_size, at::IntArrayRef stride,
                                  at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  LcParams p{};
  p.g = LcArgs{stride, padding, dilation, groups}.backward_input(grad_output, weight_size, input_size);
  const FeedbackArgs feedback{weight, signs, magnitude, key, entries, scale, weight_size};
  const at::Device device = grad_output.device();
  feedback.check(device);
  const at::Tensor grad_input = empty_activation(grad_output, groups * p.g.c, input_size);
  if (grad_input.numel() > 0) {
    const at::ScalarType dtype = grad_output.scalar_type();
    const at::Tensor b =
        feedback.plain(dtype) ? *magnitude : form(feedback, device, dtype, [&](const FeedbackParams& f) {
          launch_on(device, launch_feedback_weight, f, 0, f.cols);
        });
    multiply(Product::BackwardInput, p, b.contiguous(), grad_input, for_wide_reads(grad_output, p.g.o));
  }
  return grad_input;
}

at::Tensor lc_backward_weight_cuda(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef kernel_size,
                                   at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                   int64_t groups) {
  LcSize size;
  LcParams p{};
  p.g = LcArgs{stride, padding, dilation, groups}.backward_weight(grad_output, input, kernel_size, size);
  const at::Tensor grad_weight = at::empty(size, grad_output.options());
  if (grad_weight.numel() > 0) {
    multiply(Product::BackwardWeight, p, grad_weight, for_wide_reads(input, p.g.c), for_wide_reads(grad_output, p.g.o));
  }
  return grad_weight;
}

}  // namespace

TORCH_LIBRARY_IMPL(bioplaus, CUDA, m) {
  m.impl("lc_forward", lc_forward_cuda);
  m.impl("lc_backward_input", lc_backward_input_cuda);
  m.impl("lc_backward_weight", lc_backward_weight_cuda);
}

}  // namespace bioplaus
