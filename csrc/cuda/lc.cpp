#include "lc.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../common/form.h"
#include "../common/lc_checks.h"
#include "launch.h"

namespace bioplaus {

namespace {

LcActivation view(const at::Tensor& x) {
  LcActivation a{};
  a.data = const_cast<void*>(x.const_data_ptr());
  a.stride_n = x.stride(0);
  a.stride_c = x.stride(1);
  for (int64_t d = 2; d < x.dim(); ++d) {
    a.stride[d - (x.dim() - kLcDims)] = x.stride(d);
  }
  return a;
}

// Channels adjacent, where the kernel can then read 16 bytes of those of a group at a time.
at::Tensor for_wide_reads(const at::Tensor& x, int64_t channels) {
  return x.stride(1) != 1 && channels * x.element_size() % 16 == 0 ? x.movedim(1, -1).contiguous().movedim(-1, 1) : x;
}

at::Tensor empty_activation(const at::Tensor& like, int64_t channels, at::IntArrayRef spatial) {
  LcSize size{like.size(0), channels};
  size.append(spatial.begin(), spatial.end());
  return at::empty(size, like.options(), lc_memory_format(like));
}

at::Tensor lc_forward_cuda(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const LcArgs args{stride, padding, dilation, groups};
  LcParams p{};
  p.dtype = to_dtype("input", input.scalar_type());
  p.g = args.forward(input, weight, bias);
  p.bias_per_position = bias && bias->dim() > 1;
  const at::Tensor b = bias ? bias->contiguous() : at::Tensor();
  p.bias = bias ? b.const_data_ptr() : nullptr;
  const at::Tensor output = empty_activation(input, groups * p.g.o, weight.sizes().slice(0, args.dims()));
  if (output.numel() == 0) {
    return output;
  }
  const at::Tensor w = weight.contiguous();
  p.weight = const_cast<void*>(w.const_data_ptr());
  const at::Tensor x = for_wide_reads(input, p.g.c);
  p.in = view(x);
  p.out = view(output);
  launch_on(input.device(), [&](cudaStream_t stream) { return launch_lc_forward(p, stream); });
  return output;
}

at::Tensor lc_backward_input_cuda(const at::Tensor& grad_output, const std::optional<at::Tensor>& weight,
                                  const std::optional<at::Tensor>& signs, const std::optional<at::Tensor>& magnitude,
                                  const std::optional<at::Tensor>& key, c10::string_view entries, double scale,
                                  at::IntArrayRef weight_size, at::IntArrayRef input_size, at::IntArrayRef stride,
                                  at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const LcArgs args{stride, padding, dilation, groups};
  LcParams p{};
  p.dtype = to_dtype("grad_output", grad_output.scalar_type());
  p.g = args.backward_input(grad_output, weight_size, input_size);
  const FeedbackArgs feedback{weight, signs, magnitude, key, entries, scale, weight_size};
  feedback.check(grad_output.device());

  const at::Tensor grad_input = empty_activation(grad_output, groups * p.g.c, input_size);
  if (grad_input.numel() == 0) {
    return grad_input;
  }
  const at::Tensor planes = signs ? signs->contiguous() : at::Tensor();
  const at::Tensor words = key ? key->contiguous() : at::Tensor();
  at::Tensor dense_weight, dense_magnitude;
  if (magnitude && !weight && !signs && scale == 1 && magnitude->is_contiguous() &&
      magnitude->scalar_type() == grad_output.scalar_type()) {
    p.weight = const_cast<void*>(magnitude->const_data_ptr());
  } else {
    FeedbackParams& f = p.feedback;
    f.entries = to_entries(entries);
    f.scale = scale;
    f.signs = signs ? planes.const_data_ptr<int32_t>() : nullptr;
    f.key = key ? words.const_data_ptr<int64_t>() : nullptr;
    Operands operands(f, weight_size, false);
    for (const auto& [from, dense, to] :
         {std::tuple(&weight, &dense_weight, &f.weight), std::tuple(&magnitude, &dense_magnitude, &f.magnitude)}) {
      if (*from) {
        *dense = (*from)->contiguous();
        operands.add(*to, *dense, const_cast<void*>(dense->const_data_ptr()));
      }
    }
    operands.finish();
    if (f.entries == Entries::Constant && weight && !signs && weight->scalar_type() == grad_output.scalar_type()) {
      p.weight = const_cast<void*>(dense_weight.const_data_ptr());
      p.signs_of_weight = true;
    }
  }
  const at::Tensor g = for_wide_reads(grad_output, p.g.o);
  p.in = view(grad_input);
  p.out = view(g);
  launch_on(grad_output.device(), [&](cudaStream_t stream) { return launch_lc_backward_input(p, stream); });
  return grad_input;
}

at::Tensor lc_backward_weight_cuda(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef kernel_size,
                                   at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                   int64_t groups) {
  const LcArgs args{stride, padding, dilation, groups};
  LcSize size;
  LcParams p{};
  p.dtype = to_dtype("input", input.scalar_type());
  p.g = args.backward_weight(grad_output, input, kernel_size, size);
  const at::Tensor grad_weight = at::empty(size, grad_output.options());
  if (grad_weight.numel() == 0) {
    return grad_weight;
  }
  p.weight = grad_weight.mutable_data_ptr();
  const at::Tensor x = for_wide_reads(input, p.g.c), g = for_wide_reads(grad_output, p.g.o);
  p.in = view(x);
  p.out = view(g);
  launch_on(input.device(), [&](cudaStream_t stream) { return launch_lc_backward_weight(p, stream); });
  return grad_weight;
}

}  // namespace

TORCH_LIBRARY_IMPL(bioplaus, CUDA, m) {
  m.impl("lc_forward", lc_forward_cuda);
  m.impl("lc_backward_input", lc_backward_input_cuda);
  m.impl("lc_backward_weight", lc_backward_weight_cuda);
}

}  // namespace bioplaus
