#pragma once

#include "feedback_mm.h"

namespace bioplaus {

// The input gradient of a convolution as integer products of its pixels: what feedback_conv_product_kernel.cpp is told.
//
// A block of samples' pixels becomes an image of digits under one scale. A row of it along the width is, for each
// kDepth channels, the digits of its pixels one after the other, so that any tile_rows(4) of them are a tile.
struct PixelRun {
  const float* grad;  // channels adjacent, pixels `stride` apart
  int64_t stride;
  int64_t pixels, channels;
};

// Of a pixel in units of the last place: Σq, and Σ⌊q/2²⁰⌋² with a little more where an entry is not 0; NaN where one is
// not finite, whose digits are 0.
struct PixelSums {
  double sum, norm;
};

// The bits of each pixel's largest magnitude.
BK_DECLARE_PRODUCT(void measure_pixels(const PixelRun& run, uint32_t* tops))

// The shift of fixed point whose largest entry has these bits: last places are 2^−shift.
BK_DECLARE_PRODUCT(int pixel_shift(uint32_t top))

// Digits from `to` on, those of the next channels block_stride bytes further.
BK_DECLARE_PRODUCT(void quantise_pixels(const PixelRun& run, const uint32_t* tops, int shift, int8_t* to,
                                        int64_t block_stride, PixelSums* sums))

// Of a row of sign words whose bits are those of column 0 for every tap, then of column 1: words of their own for each
// tap, with room for a multiple of 64 columns.
BK_DECLARE_PRODUCT(void take_taps(const int32_t* words, int64_t taps, int64_t cols, int32_t* to, int64_t tap_stride))

}  // namespace bioplaus
