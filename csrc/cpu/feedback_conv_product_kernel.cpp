// Pixels of feedback_conv.cpp: digits of dY's channels under the scale of a block, and the signs of one tap of the
// kernel.
//
// Roofline: 4 bytes read and written an entry of dY; the products are feedback_mm_product_kernel.cpp's.
#include "feedback_conv.h"
#include "feedback_mm_digits.h"

namespace bioplaus {
namespace BK_LEVEL {

void measure_pixels(const PixelRun& run, uint32_t* tops) {
  for (int64_t i = 0; i < run.pixels; ++i) {
    tops[i] = largest(run.grad + i * run.stride, run.channels);
  }
}

int pixel_shift(uint32_t top) { return shift_of<4>(top); }

void quantise_pixels(const PixelRun& run, const uint32_t* tops, int shift, int8_t* to, int64_t block_stride,
                     PixelSums* sums) {
  constexpr int64_t kPixelBytes = 64 * (4 / sizeof(Digit));
  for (int64_t i = 0; i < run.pixels; ++i, to += kPixelBytes) {
    if (is_finite(tops[i])) {
      Totals totals;
      cut_row<4, true>(run.grad + i * run.stride, run.channels, shift, to, block_stride, totals);
      sums[i] = {static_cast<double>(totals.sum()), static_cast<double>(totals.norm()) + (tops[i] ? 0x1p-10 : 0)};
    } else {
      for (int64_t c = 0, at = 0; c < run.channels; c += kDepth, at += block_stride) {
        __builtin_memset(to + at, 0, kPixelBytes);
      }
      sums[i] = {0, __builtin_nan("")};
    }
  }
}

void take_taps(const int32_t* words, int64_t taps, int64_t cols, int32_t* to, int64_t tap_stride) {
#if defined(__BMI2__)
  uint64_t every = 0;
  for (int64_t bit = 0; bit < 64; bit += taps) {
    every |= uint64_t{1} << bit;
  }
  // The bits of 64 columns are `taps` times 64.
  for (int64_t j = 0; j < cols; j += 64) {
    const int64_t last = min(64, cols - j) * taps;
    for (int64_t tap = 0; tap < taps; ++tap) {
      __builtin_memset(to + tap * tap_stride + j / 32, 0, 8);
    }
    for (int64_t bit = 0, before = 0; bit < last; bit += 64) {
      // Column bit / taps has begun, or begins here, with tap `before`.
      uint64_t source;
      __builtin_memcpy(&source, words + (j * taps + bit) / 32, sizeof source);
      for (int64_t at = 0, tap = before, column = bit / taps; at < min(64, taps); ++at, ++tap) {
        if (tap == taps) {
          tap = 0;
          ++column;
        }
        uint64_t taken;
        __builtin_memcpy(&taken, to + tap * tap_stride + j / 32, sizeof taken);
        taken |= _pext_u64(source, every << at) << column;
        __builtin_memcpy(to + tap * tap_stride + j / 32, &taken, sizeof taken);
      }
      before = (before + 64) % taps;
    }
  }
#else
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t j = 0; j < cols; j += 32) {
      uint32_t taken = 0;
      for (int64_t l = 0, bit = tap + j * taps; l < min(32, cols - j); ++l, bit += taps) {
        taken |= (static_cast<uint32_t>(words[bit / 32]) >> bit % 32 & 1u) << l;
      }
      to[tap * tap_stride + j / 32] = static_cast<int32_t>(taken);
    }
  }
#endif
}

}  // namespace BK_LEVEL
}  // namespace bioplaus
