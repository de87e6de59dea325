#pragma once

#include "../common/feedback.h"
#include "level.h"

namespace bioplaus {

// dX (M×N) = dY (M×K) · s·σ, σ in {−1, 0, 1}, in integers: what feedback_mm_product_kernel.cpp is told.
//
// A row of dY becomes fixed point of 2 or 4 bytes relative to its largest entry, cut into digits. Digits lie in tiles
// of 16 rows × 64 bytes, those of one row of dY one below the other, tiles along K adjacent.
constexpr int64_t kTileBytes = 1024;

// Columns are formed in panels of four words of packed signs.
constexpr int64_t kPanel = 128;

// A sum of numbers below 2³¹ is then below 2⁵¹, and a double holds it.
constexpr int64_t kMaxDepth = int64_t{1} << 20;

struct FixedPoint {
  double unit;  // value of the last place; NaN marks a row that holds an infinity or a NaN
  double sum;   // of the row's entries, in units
  bool lossy;   // two bytes lose too much
};

struct SignProduct {
  int64_t rows, depth, cols;  // M, K, N
  const void* grad;
  DType dtype;  // of dY and dX
  int64_t row_stride, column_stride;
  void* out;
  int64_t out_stride;  // from a row to the next
  double scale;

  int bytes;  // of a fixed-point entry: 2 or 4
  int8_t* digits;
  FixedPoint* fixed;
};

// Where a product finds its blocks along K, kDepth entries each: bytes from a tile's first block of digits, and from a
// panel's of the operand.
struct Run {
  const int64_t* digits;
  const int64_t* operand;
  int64_t blocks;
};

// Digits of `rows` rows of dY, those of the first at `digits`, that become rows `row`, row + row_step … of dX.
struct DigitTile {
  const int8_t* digits;
  int64_t row;
  int64_t rows;
};

// Some columns of row-major sign planes, from some row on: row i's words start at negative + i·width. nonzero and flags
// (one row of them for 64) are null where no entry is 0.
struct SignPlanes {
  const int32_t* negative;
  const int32_t* nonzero;
  const int32_t* flags;
  int64_t width;
};

// The same words column by column, so that operands are formed from adjacent memory: word w of row i lies at
// w·rows + i. `rows` is a multiple of 64; those after the last hold 0.
struct SignColumns {
  int32_t* negative;
  int32_t* nonzero;
  uint8_t* zeros;  // w·rows/64 + i/64: whether the non-zero plane is needed
  int64_t rows;
};

// Rows first … first + rows − 1 of s·σ, densely, in float32 or a half type.
BK_DECLARE(void expand_signs(const SignColumns& signs, int64_t first, int64_t rows, int64_t cols, float s, DType dtype,
                             void* to))
// The same of a half type, in pairs as pack_pairs makes them.
BK_DECLARE(void expand_pairs(const SignColumns& signs, int64_t first, int64_t rows, int64_t cols, float s, DType dtype,
                             uint16_t* packed))

// Rows of dY in a tile, and bytes of all its digits.
BK_DECLARE_PRODUCT(int64_t tile_rows(int bytes))
BK_DECLARE_PRODUCT(int64_t digit_bytes(int64_t rows, int64_t depth, int bytes))

// Rows of tiles begin … end − 1. `scratch`: depth floats.
BK_DECLARE_PRODUCT(void quantise(const SignProduct& p, int64_t begin, int64_t end, float* scratch))

// Words of a seeded sign plane: rows begin … end − 1, `calls` calls each from call `first` on.
BK_DECLARE_PRODUCT(void seeded_signs(const int64_t* key, int64_t begin, int64_t end, int64_t first, int64_t calls,
                                     int32_t* words))

// Rows first … first + rows − 1 of `words` words (a multiple of 4); first is a multiple of 64, and so is rows but for
// the last.
BK_DECLARE_PRODUCT(void arrange(const SignPlanes& from, int64_t first, int64_t rows, int64_t words,
                                const SignColumns& to))

// The operand of all columns, whole: panels of 32 columns, of tiles along K, of kTileBytes for each 16 columns.
// `begin` … `end` − 1: panels of it, from signs whose first word is panel `begin`'s.
BK_DECLARE_PRODUCT(int64_t panel_bytes(int64_t depth))
BK_DECLARE_PRODUCT(void form_panels(const SignColumns& signs, int64_t begin, int64_t end, int64_t depth,
                                    int8_t* operand))

// Rows of dX whose row of dY holds an infinity or a NaN, among begin … end − 1: columns first … first + cols − 1.
BK_DECLARE_PRODUCT(void multiply_nonfinite(const SignProduct& p, const SignColumns& signs, int64_t begin, int64_t end,
                                           int64_t first, int64_t cols))

// All columns of some tiles by an operand formed whole. `scratch`: panels_scratch(…) bytes.
BK_DECLARE_PRODUCT(int64_t panels_scratch(const SignProduct& p, int64_t blocks))
BK_DECLARE_PRODUCT(void multiply_panels(const SignProduct& p, const DigitTile* tiles, int64_t count, int64_t row_step,
                                        const Run& run, const int8_t* operand, char* scratch))

// Tiles tile_begin … tile_end − 1 of the rows, columns first … first + cols − 1, whose signs are `signs`. `scratch`:
// multiply_scratch(…) bytes.
BK_DECLARE_PRODUCT(int64_t multiply_scratch(const SignProduct& p, int64_t cols))
BK_DECLARE_PRODUCT(void multiply(const SignProduct& p, const SignColumns& signs, int64_t tile_begin, int64_t tile_end,
                                 int64_t first, int64_t cols, char* scratch))

}  // namespace bioplaus
