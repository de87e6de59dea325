// From the arguments of a locally-connected op to its geometry: checks shared by the CPU's and CUDA's host code.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <optional>

#include "checks.h"
#include "lc_geometry.h"

namespace bioplaus {

using LcSize = c10::SmallVector<int64_t, 8>;

inline void check_same(const char* name, const at::Tensor& x, const at::Tensor& other) {
  TORCH_CHECK_TYPE(x.scalar_type() == other.scalar_type(), name, ": expected ", dtype_name(other.scalar_type()),
                   ", got ", dtype_name(x.scalar_type()));
  check_device(name, x, other.device());
}

inline void check_shape(const char* name, const at::Tensor& x, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(x.sizes().equals(shape), name, ": expected shape ", tuple(shape), ", got ", tuple(x.sizes()));
}

// Stride, padding and dilation as the ops take them; padding is (before, after) per dim.
struct LcArgs {
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;

  int64_t dims() const { return static_cast<int64_t>(stride.size()); }

  void check_rank(const char* name, const at::Tensor& x, int64_t rank) const {
    TORCH_CHECK_VALUE(x.dim() == rank, name, ": expected ", rank, " dimensions, got shape ", tuple(x.sizes()));
  }

  void check(at::IntArrayRef kernel) const {
    const size_t d = stride.size();
    TORCH_CHECK_VALUE(d >= 1 && d <= kLcDims, "stride: expected 1, 2 or 3 integers, got ", tuple(stride));
    check_integers("stride", stride, d, 1);
    check_integers("padding", padding, 2 * d, 0);
    check_integers("dilation", dilation, d, 1);
    check_integers("kernel_size", kernel, d, 1);
    TORCH_CHECK_VALUE(groups >= 1 && groups <= kLargest, "groups: expected 1 to ", kLargest, ", got ", groups);
  }

  // Spatial size of the output.
  LcSize output(at::IntArrayRef input, at::IntArrayRef kernel) const {
    LcSize out;
    for (size_t i = 0; i < stride.size(); ++i) {
      const int64_t room = input[i] + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1;
      TORCH_CHECK_VALUE(room >= 0, "input: expected a padded spatial size of at least the dilated kernel ",
                        tuple(kernel), ", got spatial size ", tuple(input));
      out.push_back(room / stride[i] + 1);
    }
    return out;
  }

  // Of lc_forward, its arguments checked.
  LcGeometry forward(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) const {
    const int64_t d = dims();
    check_floating("input", input);
    check_rank("input", input, d + 2);
    check_rank("weight", weight, 2 * d + 2);
    check(weight.sizes().slice(d + 1, d));
    const LcGeometry g = geometry(input.size(0), weight.sizes(), input.sizes().slice(2));
    TORCH_CHECK_VALUE(input.size(1) == g.c * groups, "input: expected ", g.c * groups, " channels (weight's ", g.c,
                      " x ", groups, " groups), got ", input.size(1));
    check_same("weight", weight, input);
    if (bias) {
      check_same("bias", *bias, input);
      check_shape("bias", *bias, bias->dim() > 1 ? weight.sizes().slice(0, d + 1) : weight.sizes().slice(d, 1));
    }
    return g;
  }

  // Of lc_backward_input.
  LcGeometry backward_input(const at::Tensor& grad_output, at::IntArrayRef weight_size,
                            at::IntArrayRef input_size) const {
    const int64_t d = dims();
    check_floating("grad_output", grad_output);
    check_rank("grad_output", grad_output, d + 2);
    TORCH_CHECK_VALUE(static_cast<int64_t>(weight_size.size()) == 2 * d + 2, "weight: expected ", 2 * d + 2,
                      " dimensions (*out, O, *kernel, C/groups), got shape ", tuple(weight_size));
    TORCH_CHECK_VALUE(static_cast<int64_t>(input_size.size()) == d, "input_size: expected ", d, " integers, got ",
                      tuple(input_size));
    check(weight_size.slice(d + 1, d));
    const LcGeometry g = geometry(grad_output.size(0), weight_size, input_size);
    LcSize shape{grad_output.size(0), weight_size[d]};
    shape.append(weight_size.begin(), weight_size.begin() + d);
    check_shape("grad_output", grad_output, shape);
    return g;
  }

  // Of lc_backward_weight; `weight_size` becomes the gradient's.
  LcGeometry backward_weight(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef kernel_size,
                             LcSize& weight_size) const {
    const int64_t d = dims();
    check_floating("input", input);
    check_same("grad_output", grad_output, input);
    check_rank("input", input, d + 2);
    check_rank("grad_output", grad_output, d + 2);
    check(kernel_size);
    TORCH_CHECK_VALUE(input.size(1) % groups == 0, "groups: expected a divisor of the ", input.size(1),
                      " input channels, got ", groups);
    const auto spatial = input.sizes().slice(2);
    weight_size = output(spatial, kernel_size);
    LcSize shape{input.size(0), grad_output.size(1)};
    shape.append(weight_size.begin(), weight_size.end());
    weight_size.push_back(grad_output.size(1));
    weight_size.append(kernel_size.begin(), kernel_size.end());
    weight_size.push_back(input.size(1) / groups);
    const LcGeometry g = geometry(input.size(0), weight_size, spatial);
    check_shape("grad_output", grad_output, shape);
    return g;
  }

  // `weight` is (*out, O, *kernel, C/groups); `input` the spatial size.
  LcGeometry geometry(int64_t batch, at::IntArrayRef weight, at::IntArrayRef input) const {
    const size_t d = stride.size();
    const auto kernel = weight.slice(d + 1, d);
    const LcSize out = output(input, kernel);
    check_entries("weight", weight);
    LcSize in{groups, weight.back()};
    in.append(input.begin(), input.end());
    check_entries("input", in);
    TORCH_CHECK_VALUE(weight.slice(0, d).equals(out), "weight: expected positions ", tuple(out), " for spatial input ",
                      tuple(input), ", got ", tuple(weight.slice(0, d)));
    TORCH_CHECK_VALUE(weight[d] % groups == 0, "groups: expected a divisor of the ", weight[d],
                      " output channels, got ", groups);
    LcGeometry g{};
    g.n = batch;
    g.groups = groups;
    g.c = weight.back();
    g.o = weight[d] / groups;
    for (size_t i = 0; i < kLcDims; ++i) {
      g.in[i] = g.out[i] = g.kernel[i] = g.stride[i] = g.dilation[i] = 1;
    }
    for (size_t i = 0; i < d; ++i) {
      const size_t to = kLcDims - d + i;
      g.in[to] = input[i];
      g.out[to] = out[i];
      g.kernel[to] = kernel[i];
      g.stride[to] = stride[i];
      g.before[to] = padding[2 * i];
      g.dilation[to] = dilation[i];
    }
    return g;
  }
};

// Results are channels-last where the op's first tensor is, else contiguous.
inline at::MemoryFormat lc_memory_format(const at::Tensor& x) {
  if (x.is_contiguous()) {
    return at::MemoryFormat::Contiguous;
  }
  if (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast)) {
    return at::MemoryFormat::ChannelsLast;
  }
  if (x.dim() == 5 && x.is_contiguous(at::MemoryFormat::ChannelsLast3d)) {
    return at::MemoryFormat::ChannelsLast3d;
  }
  return at::MemoryFormat::Contiguous;
}

}  // namespace bioplaus
