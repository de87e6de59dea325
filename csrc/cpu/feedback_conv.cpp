// The input gradient of a convolution of one group on the CPU: checks, and which way it is computed.
//
// By ±s there are two ways, feedback_conv_digits.h in float32 for tile units and below AVX2, and feedback_conv_tables.h
// from AVX2 on, in half types too but on tile units; else B is formed and the product is the vendor's.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "feedback_conv_digits.h"
#include "feedback_conv_tables.h"

namespace bioplaus {
namespace {

constexpr int64_t kManyPixels = 16;

// False where the shape is not for this way. `grad` and `out` are in the same of the two formats.
bool by_digits(const ConvGeometry& g, const FeedbackArgs& args, bool planes, const at::Tensor& grad,
               const at::Tensor& out) {
  const int64_t channels = divide_up(g.out_channels, kTileRows) * kTileRows;
  const int64_t bytes = BK_PICK_PRODUCT(digit_bytes)(1, channels, 4) / BK_PICK_PRODUCT(tile_rows)(4);
  const std::optional<Blocks> blocks = g.taps() <= kMaxDepth / channels ? blocks_of(g, bytes) : std::nullopt;
  if (blocks) {
    ConvProduct(g, *blocks, args, planes, grad, out).run();
  }
  return blocks.has_value();
}

// False where the shape, or zeros among the signs, are not for this way.
bool by_tables(const ConvGeometry& given, const FeedbackArgs& args, bool planes, const at::Tensor& grad,
               const at::Tensor& out) {
  ConvGeometry g = given;
  if (g.taps() == 1 && g.in == g.out && g.stride == ConvSize{1, 1, 1}) {
    // Its bands can be of any pixels.
    g.in = g.out = {1, 1, g.pixels()};
  }
  const std::optional<Bands> bands = table_bands(g);
  if (!bands) {
    return false;
  }
  const ConvSigns signs(g, args);
  const std::optional<std::vector<ZeroSign>> zeros = zero_signs(g, signs);
  if (zeros) {
    const DType dtype = to_dtype("grad_output", grad.scalar_type());
    TableProduct(g, *bands, signs, *zeros, args.scale, dtype, planes, grad, out).run();
  }
  return zeros.has_value();
}

// Whether digits are faster than tables, where there are any, by `python -m bench run --op convolution`: on tile units,
// but not where channels fill half of a tile's depth or less, or terms or pixels are few.
bool digits_are_faster(const ConvGeometry& g) {
  return !has_tables() || (!tables_are_faster() && g.out_channels > kTileRows / 2 &&
                           g.taps() * g.out_channels > kShortRows && g.pixels() >= kManyPixels);
}

// An empty `way`: the faster, of those that are for the shape. By ±s the way named, else and where it is not for them
// by B and the vendor's convolution.
at::Tensor product(const at::Tensor& grad_output, const std::optional<at::Tensor>& weight,
                   const std::optional<at::Tensor>& signs, const std::optional<at::Tensor>& magnitude,
                   const std::optional<at::Tensor>& key, c10::string_view entries, double scale,
                   at::IntArrayRef weight_size, at::IntArrayRef input_size, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, c10::string_view way) {
  check_floating("grad_output", grad_output);
  const ConvGeometry g = conv_geometry(grad_output, weight_size, input_size, stride, padding, dilation);
  const FeedbackArgs args{weight, signs, magnitude, key, entries, scale, weight_size};
  args.check(at::kCPU);
  std::vector<int64_t> size{g.samples, g.in_channels};
  size.insert(size.end(), input_size.begin(), input_size.end());
  check_entries("input_size", size);
  const at::MemoryFormat format = lc_memory_format(grad_output);
  if (grad_output.numel() == 0 || g.in_channels == 0 || g.pixels() == 0) {
    return at::zeros(size, grad_output.options()).contiguous(format);
  }
  const at::ScalarType dtype = grad_output.scalar_type();
  const at::Tensor grad = grad_output.contiguous(format);
  const at::Tensor out = at::empty(size, grad.options(), format);
  const bool digits = way.empty() ? digits_are_faster(g) : way == "digits";
  const bool any_dtype = !digits && (way == "tables" || tables_are_faster());
  if (to_entries(entries) == Entries::Constant && (any_dtype ? dtype != at::kDouble : dtype == at::kFloat)) {
    const bool planes = format == at::MemoryFormat::Contiguous;
    const bool tables_next = digits && way.empty() && has_tables();
    if ((digits ? by_digits : by_tables)(g, args, planes, grad, out) ||
        (tables_next && by_tables(g, args, planes, grad, out))) {
      return out;
    }
  }
  static const auto form_weight =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("bioplaus::feedback_weight", "")
          .typed<at::Tensor(const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                            const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, c10::string_view,
                            double, c10::SymIntArrayRef, at::ScalarType)>();
  const at::Tensor b =
      form_weight.call(weight, signs, magnitude, key, entries, scale, c10::fromIntArrayRefSlow(weight_size), dtype);
  const std::vector<int64_t> none(stride.size(), 0);
  return std::get<0>(at::convolution_backward(grad, out, b, std::nullopt, stride, padding, dilation, false, none, 1,
                                              {true, false, false}))
      .contiguous(format);
}

at::Tensor feedback_conv_cpu(const at::Tensor& grad_output, const std::optional<at::Tensor>& weight,
                             const std::optional<at::Tensor>& signs, const std::optional<at::Tensor>& magnitude,
                             const std::optional<at::Tensor>& key, c10::string_view entries, double scale,
                             at::IntArrayRef weight_size, at::IntArrayRef input_size, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation) {
  return product(grad_output, weight, signs, magnitude, key, entries, scale, weight_size, input_size, stride, padding,
                 dilation, "");
}

at::Tensor feedback_conv_by_cpu(const at::Tensor& grad_output, const std::optional<at::Tensor>& weight,
                                const std::optional<at::Tensor>& signs, const std::optional<at::Tensor>& magnitude,
                                const std::optional<at::Tensor>& key, c10::string_view entries, double scale,
                                at::IntArrayRef weight_size, at::IntArrayRef input_size, at::IntArrayRef stride,
                                at::IntArrayRef padding, at::IntArrayRef dilation, c10::string_view way) {
  check_way(way, entries, grad_output.scalar_type());
  TORCH_CHECK_VALUE(way == "tables" || grad_output.scalar_type() == at::kFloat,
                    "way: expected a grad_output of float32 for 'digits', got ", dtype_name(grad_output.scalar_type()));
  return product(grad_output, weight, signs, magnitude, key, entries, scale, weight_size, input_size, stride, padding,
                 dilation, way);
}

}  // namespace

TORCH_LIBRARY_IMPL(bioplaus, CPU, m) {
  m.impl("feedback_conv", feedback_conv_cpu);
  m.impl("feedback_conv_by", feedback_conv_by_cpu);
}

}  // namespace bioplaus
