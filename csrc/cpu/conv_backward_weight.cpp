// The weight gradient of a convolution of one group:
//
//     dW[o, c, k] = Σ over samples n and pixels p of dY[n, o, p] · X[n, c, p · stride − padding + k · dilation]
//
// as a product of dY's pixels by the patches of X that they see, which is for few pixels: of some columns (c, k) at a
// time, whose patches and sums stay in the L2 cache. dW is written once. A sum is in parts of kTerms pixels, as longer
// ones have larger errors than the vendor's; its order is the geometry's alone. Half types are widened first, and their
// sums rounded once. Else the vendor's.
//
// Roofline: max(2 operations for each of dW's entries and pixel, the bytes written, 4 or 2 an entry).
#include <ATen/Parallel.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "buffer.h"
#include "conv_geometry.h"
#include "gemm.h"

namespace bioplaus {
namespace {

constexpr int64_t kTerms = 32;
// Rows of dW at once, its columns at once at most, and floats of their patches about.
constexpr int64_t kRows = 64;
constexpr int64_t kColumns = 256;
constexpr int64_t kPatchFloats = int64_t{1} << 16;
constexpr int64_t kMostPixels = kPatchFloats / 16;
// Pixels are a multiple of it, the last ones of zeros.
constexpr int64_t kStep = 16;

constexpr int64_t kPadding = -1;

// Of every pixel of dY and tap the pixel of X it meets.
std::vector<int64_t> meetings(const ConvGeometry& g) {
  std::vector<int64_t> met;
  met.reserve(g.out[0] * g.out[1] * g.out[2] * g.taps());
  ConvSize o, k;
  for (o[0] = 0; o[0] < g.out[0]; ++o[0]) {
    for (o[1] = 0; o[1] < g.out[1]; ++o[1]) {
      for (o[2] = 0; o[2] < g.out[2]; ++o[2]) {
        for (k[0] = 0; k[0] < g.kernel[0]; ++k[0]) {
          for (k[1] = 0; k[1] < g.kernel[1]; ++k[1]) {
            for (k[2] = 0; k[2] < g.kernel[2]; ++k[2]) {
              int64_t pixel = 0;
              for (int d = 0; d < kConvDims && pixel != kPadding; ++d) {
                const int64_t x = o[d] * g.stride[d] - g.padding[d] + k[d] * g.dilation[d];
                pixel = x >= 0 && x < g.in[d] ? pixel * g.in[d] + x : kPadding;
              }
              met.push_back(pixel);
            }
          }
        }
      }
    }
  }
  return met;
}

// Columns first … first + cols − 1 of the patches of every sample and pixel; `last`: channels are innermost, in X and
// in dW.
void take_patches(const ConvGeometry& g, const std::vector<int64_t>& met, bool last, const float* x, int64_t first,
                  int64_t cols, float* to) {
  const int64_t taps = g.taps(), pixels = static_cast<int64_t>(met.size()) / taps, c = g.in_channels;
  for (int64_t n = 0; n < g.samples; ++n, x += g.pixels() * c) {
    for (int64_t p = 0; p < pixels; ++p, to += cols) {
      const int64_t* at = met.data() + p * taps;
      for (int64_t j = 0; j < cols;) {
        const int64_t outer = (first + j) / (last ? c : taps), inner = (first + j) % (last ? c : taps);
        const int64_t count = std::min((last ? c : taps) - inner, cols - j);
        if (last && at[outer] == kPadding) {
          std::fill_n(to + j, count, 0.0f);
        } else if (last) {
          std::copy_n(x + at[outer] * c + inner, count, to + j);
        } else {
          for (int64_t i = 0; i < count; ++i) {
            const int64_t pixel = at[inner + i];
            to[j + i] = pixel == kPadding ? 0.0f : x[outer * g.pixels() + pixel];
          }
        }
        j += count;
      }
    }
  }
}

at::Tensor conv_backward_weight_cpu(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef kernel_size,
                                    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  check_floating("input", input);
  check_same("grad_output", grad_output, input);
  const int64_t d = input.dim() - 2;
  TORCH_CHECK_VALUE(d >= 1 && d <= kConvDims, "input: expected 3, 4 or 5 dimensions, got shape ", tuple(input.sizes()));
  TORCH_CHECK_VALUE(grad_output.dim() == d + 2, "grad_output: expected ", d + 2, " dimensions, got shape ",
                    tuple(grad_output.sizes()));
  check_integers("kernel_size", kernel_size, d, 1);
  std::vector<int64_t> size{grad_output.size(1), input.size(1)};
  size.insert(size.end(), kernel_size.begin(), kernel_size.end());
  check_entries("kernel_size", size);
  const ConvGeometry g = conv_geometry(grad_output, size, input.sizes().slice(2), stride, padding, dilation, "input");
  TORCH_CHECK_VALUE(input.size(0) == g.samples, "input: expected ", g.samples, " samples, as grad_output has, got ",
                    input.size(0));
  const at::MemoryFormat format = lc_memory_format(input);
  if (grad_output.numel() == 0 || input.numel() == 0) {
    return at::zeros(size, input.options()).contiguous(format);
  }
  const int64_t pixels = grad_output.numel() / g.out_channels;
  const at::ScalarType dtype = input.scalar_type();
  const bool half = dtype == at::kBFloat16 || dtype == at::kHalf;
  if (dtype == at::kDouble || pixels > kMostPixels || !gemm_in_order()) {
    const at::Tensor weight = at::empty(size, input.options(), format);
    return std::get<1>(at::convolution_backward(grad_output, input, weight, std::nullopt, stride, padding, dilation,
                                                false, std::vector<int64_t>(d, 0), 1, {false, true, false}))
        .contiguous(format);
  }
  const at::Tensor out = at::empty(size, input.options(), format);
  // The product's kernels are for one depth and distance of rows each: few of them, whatever the batch.
  const int64_t padded = divide_up(pixels, kStep) * kStep;
  const at::Tensor rows = at::zeros({g.out_channels, padded}, grad_output.options().dtype(at::kFloat));
  rows.narrow(1, 0, pixels).copy_(grad_output.movedim(1, 0).reshape({g.out_channels, pixels}));
  const at::Tensor x = input.contiguous(format).to(at::kFloat);
  const std::vector<int64_t> met = meetings(g);
  const int64_t all = g.taps() * g.in_channels;
  const int64_t width = std::clamp(kPatchFloats / padded / 64 * 64, int64_t{16}, kColumns);
  const float* dy = rows.const_data_ptr<float>();
  auto* dw = static_cast<char*>(out.mutable_data_ptr());
  at::parallel_for(0, divide_up(all, width), 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> patches(padded * width), sums(half ? kRows * width : 0);
    for (int64_t first = begin * width; first < std::min(end * width, all); first += width) {
      const int64_t cols = std::min(width, all - first);
      take_patches(g, met, format != at::MemoryFormat::Contiguous, x.const_data_ptr<float>(), first, cols,
                   patches.get());
      std::fill_n(patches.get() + pixels * cols, (padded - pixels) * cols, 0.0f);
      for (int64_t o = 0; o < g.out_channels; o += kRows) {
        const int64_t n = std::min(kRows, g.out_channels - o);
        char* part = dw + (o * all + first) * out.element_size();
        float* to = half ? sums.get() : reinterpret_cast<float*>(part);
        for (int64_t p = 0; p < padded; p += kTerms) {
          gemm(n, cols, std::min(kTerms, padded - p), dy + o * padded + p, padded, patches.get() + p * cols, cols, to,
               half ? cols : all, p > 0);
        }
        if (half) {
          copy_rows(part, to_dtype("input", dtype), all, to, DType::Float32, cols, n, cols);
        }
      }
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(bioplaus, CPU, m) { m.impl("conv_backward_weight", conv_backward_weight_cpu); }

}  // namespace bioplaus
