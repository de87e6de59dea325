// The signs of B tap by tap: what feedback_conv.cpp's ways share.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>

#include "../common/form.h"
#include "buffer.h"
#include "conv_geometry.h"
#include "feedback_conv.h"
#include "pack_signs.h"

namespace bioplaus {

// `pixels` of each channel, channels `plane` elements apart, become float32 pixels of adjacent channels.
inline void to_pixels(float* to, const void* from, DType dtype, int64_t plane, int64_t channels, int64_t pixels) {
  constexpr int64_t kAhead = 64;
  // Of one box: the distance to the next one only says what is fetched ahead.
  BK_PICK(lc_copy)
  ({to, from, DType::Float32, dtype, {1, channels, pixels}, {0, 1, channels}, {kAhead, plane, 1}});
}

// The way back, from pixels `step` floats apart.
inline void to_planes(void* to, DType dtype, int64_t plane, const float* from, int64_t step, int64_t channels,
                      int64_t pixels) {
  BK_PICK(lc_copy)({to, from, dtype, DType::Float32, {1, channels, pixels}, {0, plane, 1}, {0, 1, step}});
}

// σ of all taps: rows tap · padded channels + o.
class ConvSigns {
 public:
  ConvSigns(const ConvGeometry& g, const FeedbackArgs& args)
      : channels_(divide_up(g.out_channels, kTileRows) * kTileRows),
        words_(sign_words(g.in_channels)),
        memory_(2 * words_ * depth(g) + divide_up(words_ * depth(g) / kTileRows, 4)),
        signs_{memory_.get(), memory_.get() + words_ * depth(g),
               reinterpret_cast<uint8_t*>(memory_.get() + 2 * words_ * depth(g)), depth(g)} {
    const bool by_tap = args.weight && args.weight->stride(1) == 1;
    const std::optional<at::Tensor> weight =
        args.weight && !by_tap ? std::optional(args.weight->contiguous()) : args.weight;
    const Formula formula({weight, args.signs, args.magnitude, args.key, args.entries, args.scale, args.size});
    at::parallel_for(0, sign_tiles(g.out_channels), 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        by_tap ? arrange_taps(g, *args.weight, tile) : arrange_tangled(g, formula.p, tile);
      }
    });
  }

  int64_t channels() const { return channels_; }
  int64_t depth(const ConvGeometry& g) const { return g.taps() * channels_; }
  // From a word and a tap on.
  SignColumns part(int64_t word, int64_t tap) const {
    const int64_t at = word * signs_.rows + tap * channels_;
    return {signs_.negative + at, signs_.nonzero + at, signs_.zeros + at / kTileRows, signs_.rows};
  }

 private:
  // Of a weight whose input channels are adjacent: tap by tap.
  void arrange_taps(const ConvGeometry& g, const at::Tensor& weight, int64_t tile) const {
    const int64_t first = tile * kTileRows;
    FeedbackParams p{};
    p.rows = std::min(kTileRows, g.out_channels - first);
    p.cols = g.in_channels;
    p.column_dims = 1;
    p.column_size[0] = p.cols;
    p.weight = {nullptr, to_dtype("weight", weight.scalar_type()), true, weight.stride(0), {1}};
    const Buffer<int32_t> planes((2 * p.rows + 1) * words_);
    const at::IntArrayRef strides = weight.strides().slice(2);
    const at::IntArrayRef kernel = weight.sizes().slice(2);
    for (int64_t tap = 0; tap < g.taps(); ++tap) {
      int64_t offset = first * weight.stride(0);
      for (int64_t d = static_cast<int64_t>(kernel.size()) - 1, rest = tap; d >= 0; rest /= kernel[d--]) {
        offset += rest % kernel[d] * strides[d];
      }
      p.weight.data = static_cast<char*>(const_cast<void*>(weight.const_data_ptr())) + offset * weight.element_size();
      BK_PICK(pack_signs)(p, planes.get(), 0, divide_up(p.cols, kPackColumns));
      const int32_t* nonzero = planes.get() + p.rows * words_;
      BK_PICK_PRODUCT(arrange)
      ({planes.get(), nonzero, nonzero + p.rows * words_, words_}, first, p.rows, words_, part(0, tap));
    }
  }

  // Of rows whose bits are those of channel 0 for every tap, then of channel 1.
  void arrange_tangled(const ConvGeometry& g, const FeedbackParams& b, int64_t tile) const {
    const int64_t first = tile * kTileRows;
    const int64_t rows = std::min(kTileRows, g.out_channels - first);
    const int64_t width = sign_words(b.cols);
    const Buffer<int32_t> strip((2 * rows + 1) * width);
    SignPlanes from{strip.get(), strip.get() + rows * width, strip.get() + 2 * rows * width, width};
    if (b.signs) {
      from = {b.signs + first * width, b.signs + (b.rows + first) * width, b.signs + (2 * b.rows + tile) * width,
              width};
    } else if (b.key) {
      BK_PICK_PRODUCT(seeded_signs)(b.key, first, first + rows, 0, width / 4, strip.get());
      from.flags = nullptr;
    } else {
      FeedbackParams p = b;
      p.rows = rows;
      p.weight.data = static_cast<char*>(b.weight.data) + first * b.weight.row_stride * size_of(b.weight.dtype);
      BK_PICK(pack_signs)(p, strip.get(), 0, divide_up(p.cols, kPackColumns));
    }
    const bool zeros = from.flags && std::any_of(from.flags, from.flags + width, [](int32_t flag) { return flag; });
    // For each tap both planes of all rows, and flags.
    const int64_t planes = 2 * rows * words_;
    const Buffer<int32_t> taken(g.taps() * planes + words_);
    int32_t* flags = taken.get() + g.taps() * planes;
    std::fill(flags, flags + words_, 1);
    for (int64_t row = 0; row < rows; ++row) {
      const auto take = BK_PICK_PRODUCT(take_taps);
      int32_t* to = taken.get() + row * words_;
      take(from.negative + row * width, g.taps(), g.in_channels, to, planes);
      if (zeros) {
        take(from.nonzero + row * width, g.taps(), g.in_channels, to + rows * words_, planes);
      }
    }
    for (int64_t tap = 0; tap < g.taps(); ++tap) {
      const int32_t* negative = taken.get() + tap * planes;
      BK_PICK_PRODUCT(arrange)
      ({negative, negative + rows * words_, zeros ? flags : nullptr, words_}, first, rows, words_, part(0, tap));
    }
  }

  int64_t channels_, words_;
  Buffer<int32_t> memory_;
  SignColumns signs_;
};

}  // namespace bioplaus
