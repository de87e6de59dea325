#pragma once

#include <cuda_runtime_api.h>

#include "../common/feedback.h"
#include "../common/packed_signs.h"

namespace bioplaus {

BK_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// dX (M×N) = dY (M×K) · s·σ, σ in {−1, 0, 1}, in integers: see feedback_mm_quantise.cu and feedback_mm_digits.cu.

// More than this and the double that takes a sum of digits is no longer exact.
constexpr int64_t kMaxDepth = int64_t{1} << 20;

struct RowScale {
  double unit;    // value of the last of a row's 32 bits; NaN marks a row that holds an infinity or a NaN
  int64_t bytes;  // that are not all zero: 4, or the upper 2
};

struct SignProduct {
  int64_t rows, depth, cols;  // M, K, N
  const void* grad;
  DType dtype;  // of dY and dX
  int64_t row_stride, column_stride;
  void* out;  // contiguous
  double scale;

  // One of them: packed planes, aligned to 16 bytes, or a key.
  const int32_t* signs;
  const int64_t* key;

  // Workspace of the sizes below.
  int8_t* digits;
  RowScale* row;     // one a row
  int64_t* partial;  // null where splits is 1
  int64_t splits;    // parts of K that are summed apart
};

// Entries along K in a stage of the product: the rows of a flag of packed signs. Digits are padded with zeros to it.
constexpr int kDepth = static_cast<int>(kTileRows);
BK_INLINE int64_t padded(int64_t depth) { return divide_up(depth, kDepth) * kDepth; }

inline int64_t digit_bytes(int64_t rows, int64_t depth) { return divide_up(rows, 8) * 32 * padded(depth); }
int64_t sign_splits(int64_t rows, int64_t depth, int64_t cols, DType dtype);
// Its launch is checked by launch_sign_product, which calls it first.
void quantise(const SignProduct& p, cudaStream_t stream);

cudaError_t launch_sign_product(const SignProduct& p, cudaStream_t stream);

// dX = dY · B, B formed a tile at a time: see feedback_mm.cu.
struct TileProduct {
  int64_t rows;  // M; b.rows and b.cols are K and N, b.out.dtype is dY's and dX's
  const void* grad;
  int64_t row_stride, column_stride;
  bool whole;  // pieces of 8 neighbours along K are adjacent and aligned to 16 bytes
  void* out;   // contiguous
  float* partial;
  int64_t splits;
  FeedbackParams b;
};

int64_t tile_splits(int64_t rows, int64_t depth, int64_t cols, DType dtype);
cudaError_t launch_tile_product(const TileProduct& p, cudaStream_t stream);

// Numbers of `partial`.
inline int64_t partial_sums(int64_t rows, int64_t cols, int64_t splits) {
  return splits > 1 ? splits * rows * cols : 0;
}

}  // namespace bioplaus
