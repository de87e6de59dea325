// The key of a draw that changes exactly when W changes: 64 evenly spread elements of W, in logical order, each hashed
// by one Philox call under the layer's own key; the stream takes the exclusive or of all.
#pragma once

#include "feedback.h"

namespace bioplaus {

constexpr int kRedrawSamples = 64;

// `weight` is described as an operand of p; bits of 2- and 4-byte elements are zero-extended.
BK_INLINE uint64_t element_bits(const FeedbackParams& p, int64_t index) {
  const int64_t offset = index / p.cols * p.weight.row_stride + column_offset(p, p.weight, index % p.cols);
  switch (p.weight.dtype) {
    case DType::Float64:
      return static_cast<const uint64_t*>(p.weight.data)[offset];
    case DType::Float32:
      return static_cast<const uint32_t*>(p.weight.data)[offset];
    default:
      return static_cast<const uint16_t*>(p.weight.data)[offset];
  }
}

BK_INLINE uint64_t redraw_hash(const FeedbackParams& p, int k) {
  // k·numel / 64 without overflow.
  const int64_t numel = p.rows * p.cols;
  const int64_t index = numel / kRedrawSamples * k + numel % kRedrawSamples * k / kRedrawSamples;
  const uint64_t bits = element_bits(p, index);
  const Key key = read_key(p.key);
  const Philox4 x = philox4x32_10(static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32),
                                  static_cast<uint32_t>(k), 0x42525346u, key.k0, key.k1);
  return x.w[0] | static_cast<uint64_t>(x.w[1]) << 32;
}

}  // namespace bioplaus
