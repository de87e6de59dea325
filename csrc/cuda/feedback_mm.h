#pragma once

#include <cuda_runtime_api.h>

#include "../common/feedback.h"
#include "../common/packed_signs.h"

namespace bioplaus {

BK_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// dX (M×N) = dY (M×K) · s·σ in fp32, σ in {−1, 0, 1}, by integers that are exact up to one rounding at the end, so that
// every way gives the CPU's bits.
//
// quantise writes a row of dY as 32 bits relative to its largest entry and cuts them into four balanced int8 digits:
// for 8 rows of dY 32 rows of digits, the 8 rows' digits 2 first, then 3, 0 and 1. Digits times σ are summed in int32:
//
//     digits    by multiply_kernel, a tile of dX at a time, which makes results of them; of parts of K, by finish
//     int_mm    by the vendor's product with σ as bytes, for all rows of digits; finish makes results of them

// A sum of numbers below 2³¹ is then below 2⁵¹, and a double holds it.
constexpr int64_t kMaxDepth = int64_t{1} << 20;

struct SignProduct {
  int64_t rows, depth, cols;  // M, K, N
  const float* grad;
  int64_t row_stride, column_stride;
  float* out;  // contiguous
  double scale;

  // One of them: packed planes, aligned to 16 bytes, or a key.
  const int32_t* signs;
  const int64_t* key;

  int8_t* digits;  // (digit_rows(rows), padded(depth))
  double* unit;  // of digit_rows(rows) / 4 rows: the value of the last of 32 bits; NaN where one holds an inf or a NaN

  // Of the way "digits".
  int64_t splits;    // parts of K that are summed apart
  int64_t* partial;  // (splits, rows, cols), or null for one

  // Columns first … first + width − 1 are multiplied at a time: by int_mm, whole words of signs; else all.
  int64_t first, width;

  // Of the way "int_mm".
  int8_t* sign_bytes;  // (width, padded(depth))
  int32_t* sums;       // (digit_rows(rows), width)
};

// Entries along K in a stage of the product: the rows of a flag of packed signs. Digits are padded with zeros to it.
constexpr int kDepth = static_cast<int>(kTileRows);
BK_INLINE int64_t padded(int64_t depth) { return divide_up(depth, kDepth) * kDepth; }

BK_INLINE int64_t digit_rows(int64_t rows) { return divide_up(rows, 8) * 32; }
// The first of row i's digits; the others lie 8, 16 and 24 rows further on.
BK_INLINE int64_t digit_row(int64_t i) { return i / 8 * 32 + i % 8; }

// The sum of a row's numbers from those of its digits 3 … 0.
BK_INLINE int64_t whole_sum(int32_t d3, int32_t d2, int32_t d1, int32_t d0) {
  return (int64_t{d3} * 256 + d2) * 65536 + (int64_t{d1} * 256 + d0);
}

// σ in columns 32w … 32w + 31 of row k.
BK_INLINE SignWord sign_word(const SignProduct& p, int64_t k, int64_t w) {
  return p.key ? seeded_signs(p.key, k, w) : read_signs(p.signs, p.depth, sign_words(p.cols), k, w);
}

int64_t sign_splits(int64_t rows, int64_t depth, int64_t cols);

cudaError_t launch_quantise(const SignProduct& p, cudaStream_t stream);
cudaError_t launch_sign_product(const SignProduct& p, cudaStream_t stream);
cudaError_t launch_sign_bytes(const SignProduct& p, cudaStream_t stream);
// Results from `sums`, else from `partial`; where multiply_kernel has made them, of the rows that it cannot.
cudaError_t launch_finish(const SignProduct& p, cudaStream_t stream);

}  // namespace bioplaus
