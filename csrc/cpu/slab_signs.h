// What the ways to a product by ±s share on the host: which to take, signs of a slab of B, and which of them are 0.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>

#include "../common/form.h"
#include "buffer.h"
#include "feedback_mm.h"
#include "pack_signs.h"

namespace bioplaus {

// Columns that a thread takes at a time, once for all rows. Wide, as a weight is read fastest in long runs; two slabs
// of bits and their non-zero plane for every thread are at most the bits of the whole weight.
constexpr int64_t kSlab = 1024;
// Whether there are sums of table entries (tables.h), and whether they beat digits whatever the shape: not on tile
// units. Which is taken is decided by level, dtype and B's shape, never by rows, as the two differ in their bits.
inline bool has_tables() { return product_level() != ProductLevel::DEFAULT; }
inline bool tables_are_faster() { return has_tables() && product_level() != ProductLevel::AMX; }
// Rows of dY, or a convolution's patches of it, of which tables are faster than digits on tile units.
constexpr int64_t kShortRows = 256;
// Whether lanes of vectors are rows, as registers are too short for a table.
inline bool lanes_are_rows() { return cpu_level() == Level::AVX2; }

// s as the entries of B hold it.
inline double entry_scale(double scale, DType dtype) {
  const float s = static_cast<float>(scale);
  return dtype == DType::Float64    ? scale
         : dtype == DType::BFloat16 ? static_cast<float>(at::BFloat16(s))
         : dtype == DType::Float16  ? static_cast<float>(at::Half(s))
                                    : s;
}

inline void check_way(c10::string_view way, c10::string_view entries, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(way == "digits" || way == "tables", "way: expected one of ('digits', 'tables'), got '", way, "'");
  TORCH_CHECK_VALUE(entries == "constant", "way: expected entries='constant', got '", entries, "'");
  TORCH_CHECK_VALUE(dtype != at::kDouble, "way: expected a grad_output of float32 or a half type, got ",
                    dtype_name(dtype));
}

// At least two slabs a thread where there are the columns.
inline int64_t slab_width(int64_t cols, int64_t threads) {
  return std::clamp<int64_t>(divide_up(cols, kPanel) / (2 * threads), 1, kSlab / kPanel) * kPanel;
}

// Signs of a slab of up to `width` columns. Those of a weight and the seeded ones are formed 64 rows at a time.
class SlabSigns {
 public:
  SlabSigns(const FeedbackParams& b, int64_t width)
      : b_(b),
        rows_(divide_up(b.rows, kTileRows) * kTileRows),
        words_(sign_words(width)),
        memory_(2 * words_ * rows_ + (2 * kTileRows + 1) * words_ + divide_up(words_ * rows_ / kTileRows, 4)),
        strip_(memory_.get() + 2 * words_ * rows_),
        signs_{memory_.get(), memory_.get() + words_ * rows_,
               reinterpret_cast<uint8_t*>(strip_ + (2 * kTileRows + 1) * words_), rows_} {}

  const SignColumns& form(int64_t first, int64_t cols) const {
    const auto arrange = BK_PICK_PRODUCT(arrange);
    const int64_t words = sign_words(cols);
    if (b_.signs) {
      const int64_t width = sign_words(b_.cols);
      const int32_t* planes = b_.signs + first / 32;
      arrange({planes, planes + b_.rows * width, planes + 2 * b_.rows * width, width}, 0, b_.rows, words, signs_);
      return signs_;
    }
    if (b_.key) {
      for (int64_t row = 0; row < b_.rows; row += kTileRows) {
        const int64_t rows = std::min(kTileRows, b_.rows - row);
        BK_PICK_PRODUCT(seeded_signs)(b_.key, row, row + rows, first / kSignsPerCall, words / 4, strip_);
        arrange({strip_, nullptr, nullptr, words}, row, rows, words, signs_);
      }
      return signs_;
    }
    return pack(cols, [&](int64_t row, int64_t) {
      Operand strip = b_.weight;
      strip.data =
          static_cast<char*>(strip.data) + (row * strip.row_stride + first * strip.stride[0]) * size_of(strip.dtype);
      return strip;
    });
  }

  // Of `cols` columns, at(row, rows) being those rows of them: at most 64, of which the first is a multiple of 64.
  template <typename At>
  const SignColumns& pack(int64_t cols, const At& at) const {
    const int64_t words = sign_words(cols);
    FeedbackParams strip = b_;
    strip.cols = cols;
    strip.column_size[0] = cols;
    for (int64_t row = 0; row < b_.rows; row += kTileRows) {
      strip.rows = std::min(kTileRows, b_.rows - row);
      strip.weight = at(row, strip.rows);
      BK_PICK(pack_signs)(strip, strip_, 0, divide_up(cols, kPackColumns));
      BK_PICK_PRODUCT(arrange)
      ({strip_, strip_ + strip.rows * words, strip_ + 2 * strip.rows * words, words}, row, strip.rows, words, signs_);
    }
    return signs_;
  }

 private:
  const FeedbackParams& b_;
  int64_t rows_, words_;
  Buffer<int32_t> memory_;
  int32_t* strip_;
  SignColumns signs_;
};

// Signs that are 0 which tables have room for: one for each 4,096, and one more.
inline int64_t most_zeros(int64_t rows, int64_t cols) { return rows * cols / 4096 + 1; }

// Calls zero(row, column) for each sign that is 0 of the first `rows` rows and `cols` columns, until it says false.
// Planes may call it negative, where what flips signs has passed: here it is not, from then on.
template <typename Zero>
bool for_zeros(const SignColumns& signs, int64_t rows, int64_t cols, const Zero& zero) {
  for (int64_t word = 0; word * 32 < cols; ++word) {
    const int64_t left = cols - word * 32;
    const uint32_t used = left < 32 ? (1u << left) - 1 : ~0u;
    for (int64_t tile = 0; tile * kTileRows < rows; ++tile) {
      if (signs.zeros[word * (signs.rows / kTileRows) + tile]) {
        for (int64_t row = tile * kTileRows; row < std::min(rows, (tile + 1) * kTileRows); ++row) {
          const int32_t nonzero = signs.nonzero[word * signs.rows + row];
          signs.negative[word * signs.rows + row] &= nonzero;
          for (uint32_t z = ~static_cast<uint32_t>(nonzero) & used; z; z &= z - 1) {
            if (!zero(row, word * 32 + std::countr_zero(z))) {
              return false;
            }
          }
        }
      }
    }
  }
  return true;
}

}  // namespace bioplaus
