// What the ways to a product by ±s share on the host: which to take, signs of a slab of B, and which of them are 0.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/CallOnce.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <optional>

#include "../common/form.h"
#include "buffer.h"
#include "feedback_mm.h"
#include "pack_signs.h"

namespace bioplaus {

// Columns that a thread takes at a time, once for all rows: two slabs of bits and their non-zero plane for every thread
// are at most the bits of the whole weight.
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

// Signs of `part`, at most kTileRows rows of a weight, row-major in `strip`, of strip_words(columns).
inline int64_t strip_words(int64_t cols) { return (2 * kTileRows + 1) * sign_words(cols); }
inline SignPlanes pack_strip(const FeedbackParams& part, int32_t* strip) {
  BK_PICK(pack_signs)(part, strip, 0, divide_up(part.cols, kPackColumns));
  const int64_t words = sign_words(part.cols);
  return {strip, strip + part.rows * words, strip + 2 * part.rows * words, words};
}

// All signs of a weight, if B is of one, by strips of whole rows: it is read from end to end.
class WeightSigns {
 public:
  explicit WeightSigns(const FeedbackParams& b)
      : rows_(b.weight.data ? divide_up(b.rows, kTileRows) * kTileRows : 0),
        words_(sign_words(b.cols)),
        negative_(words_ * rows_),
        zeros_(words_ * rows_ / kTileRows) {
    // Each in parts where they are few.
    const int64_t strips = rows_ / kTileRows;
    const int64_t threads = at::get_num_threads();
    const int64_t panels = words_ / 4, most = divide_up(4 * threads, std::max<int64_t>(strips, 1));
    const int64_t width = divide_up(panels, std::min(most, panels)) * kPanel, parts = divide_up(b.cols, width);
    at::parallel_for(0, strips * parts, 1, [&](int64_t begin, int64_t end) {
      const Buffer<int32_t> strip(strip_words(width));
      FeedbackParams part = b;
      const Operand& w = b.weight;
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t row = unit / parts * kTileRows, first = unit % parts * width;
        part.rows = std::min(kTileRows, b.rows - row);
        part.cols = part.column_size[0] = std::min(width, b.cols - first);
        part.weight.data = static_cast<char*>(w.data) + (row * w.row_stride + first * w.stride[0]) * size_of(w.dtype);
        const SignPlanes planes = pack_strip(part, strip.get());
        const int64_t at = first / 32 * rows_;
        SignColumns to{negative_.get() + at, nullptr, zeros_.get() + at / kTileRows, rows_};
        if (std::any_of(planes.flags, planes.flags + planes.width, [](int32_t flag) { return flag; })) {
          c10::call_once(any_zero_, [&] { nonzero_.emplace(words_ * rows_); });
          to.nonzero = nonzero_->get() + at;
        }
        BK_PICK_PRODUCT(arrange)(planes, row, part.rows, planes.width, to);
      }
    });
  }

  // Those of columns from `first` on, which a word begins.
  SignColumns from(int64_t first) const {
    const int64_t at = first / 32 * rows_;
    // Where no sign is 0 a second plane is never read.
    const Buffer<int32_t>& nonzero = nonzero_ ? *nonzero_ : negative_;
    return {negative_.get() + at, nonzero.get() + at, zeros_.get() + at / kTileRows, rows_};
  }

 private:
  int64_t rows_, words_;
  Buffer<int32_t> negative_;
  Buffer<uint8_t> zeros_;
  c10::once_flag any_zero_;  // std's would be of glibc 2.34
  std::optional<Buffer<int32_t>> nonzero_;
};

// Signs of a slab of up to `width` columns: of `whole`, of b's packed or seeded ones, or what pack is given.
class SlabSigns {
 public:
  SlabSigns(const FeedbackParams& b, int64_t width, const WeightSigns* whole)
      : b_(b),
        whole_(b.weight.data ? whole : nullptr),
        rows_(divide_up(b.rows, kTileRows) * kTileRows),
        words_(whole_ ? 0 : sign_words(width)),
        memory_(2 * words_ * rows_ + divide_up(words_ * rows_ / kTileRows, 4)),
        strip_(whole_ || b.signs ? 0 : strip_words(width)),
        signs_{memory_.get(), memory_.get() + words_ * rows_,
               reinterpret_cast<uint8_t*>(memory_.get() + 2 * words_ * rows_), rows_} {}

  SignColumns form(int64_t first, int64_t cols) const {
    const auto arrange = BK_PICK_PRODUCT(arrange);
    const int64_t words = sign_words(cols);
    if (whole_) {
      return whole_->from(first);
    }
    if (b_.signs) {
      const int64_t width = sign_words(b_.cols);
      const int32_t* planes = b_.signs + first / 32;
      arrange({planes, planes + b_.rows * width, planes + 2 * b_.rows * width, width}, 0, b_.rows, words, signs_);
      return signs_;
    }
    for (int64_t row = 0; row < b_.rows; row += kTileRows) {
      const int64_t rows = std::min(kTileRows, b_.rows - row);
      BK_PICK_PRODUCT(seeded_signs)(b_.key, row, row + rows, first / kSignsPerCall, words / 4, strip_.get());
      arrange({strip_.get(), nullptr, nullptr, words}, row, rows, words, signs_);
    }
    return signs_;
  }

  // Of `cols` columns, at(row, rows) being those rows of them: at most 64, of which the first is a multiple of 64.
  template <typename At>
  SignColumns pack(int64_t cols, const At& at) const {
    FeedbackParams part = b_;
    part.cols = part.column_size[0] = cols;
    for (int64_t row = 0; row < b_.rows; row += kTileRows) {
      part.rows = std::min(kTileRows, b_.rows - row);
      part.weight = at(row, part.rows);
      BK_PICK_PRODUCT(arrange)(pack_strip(part, strip_.get()), row, part.rows, sign_words(cols), signs_);
    }
    return signs_;
  }

 private:
  const FeedbackParams& b_;
  const WeightSigns* whole_;
  int64_t rows_, words_;
  Buffer<int32_t> memory_, strip_;
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
