// A convolution's geometry, as feedback_conv.cpp and conv_backward_weight.cpp take it.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "../common/lc_checks.h"

namespace bioplaus {

constexpr int kConvDims = 3;
using ConvSize = std::array<int64_t, kConvDims>;

inline int64_t floor_divide(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Missing leading dimensions have size 1.
inline ConvSize conv_size(at::IntArrayRef x, int64_t missing) {
  ConvSize t;
  t.fill(missing);
  std::copy(x.begin(), x.end(), t.end() - static_cast<int64_t>(x.size()));
  return t;
}

struct ConvGeometry {
  int64_t samples, out_channels, in_channels;
  ConvSize in, out, kernel, stride, padding, dilation;

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t pixels() const { return in[0] * in[1] * in[2]; }
  // The pixel of dY that tap k brings to pixel x of dX, where there is one.
  bool reaches(int d, int64_t x, int64_t k, int64_t& o) const {
    const int64_t at = x + padding[d] - k * dilation[d];
    o = floor_divide(at, stride[d]);
    return at == o * stride[d];
  }
};

// Its arguments checked; `input`: the one that has input_size.
inline ConvGeometry conv_geometry(const at::Tensor& grad_output, at::IntArrayRef weight_size,
                                  at::IntArrayRef input_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                  at::IntArrayRef dilation, const char* input = "input_size") {
  const size_t d = input_size.size();
  TORCH_CHECK_VALUE(d >= 1 && d <= kConvDims, input, ": expected 1, 2 or 3 integers, got ", tuple(input_size));
  check_integers(input, input_size, d, 0);
  check_integers("weight_size", weight_size, d + 2, 0);
  check_integers("stride", stride, d, 1);
  check_integers("padding", padding, d, 0);
  check_integers("dilation", dilation, d, 1);
  TORCH_CHECK_VALUE(grad_output.dim() == static_cast<int64_t>(d) + 2, "grad_output: expected ", d + 2,
                    " dimensions, got shape ", tuple(grad_output.sizes()));
  std::vector<int64_t> wanted{grad_output.size(0), weight_size[0]};
  for (size_t i = 0; i < d; ++i) {
    const int64_t room = input_size[i] + 2 * padding[i] - dilation[i] * (weight_size[i + 2] - 1) - 1;
    TORCH_CHECK_VALUE(room >= 0 && weight_size[i + 2] >= 1, input,
                      ": expected a padded size of at least the dilated kernel ", tuple(weight_size.slice(2)), ", got ",
                      tuple(input_size));
    wanted.push_back(room / stride[i] + 1);
  }
  TORCH_CHECK_VALUE(grad_output.sizes().equals(wanted), "grad_output: expected shape ", tuple(wanted), ", got ",
                    tuple(grad_output.sizes()));
  return {grad_output.size(0),
          weight_size[0],
          weight_size[1],
          conv_size(input_size, 1),
          conv_size(grad_output.sizes().slice(2), 1),
          conv_size(weight_size.slice(2), 1),
          conv_size(stride, 1),
          conv_size(padding, 0),
          conv_size(dilation, 1)};
}

}  // namespace bioplaus
