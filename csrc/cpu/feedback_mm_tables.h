// dX = s · (dY · σ) as sums of table entries: tables.h.
//
// Places of all columns are formed once. Some rows of dY at a time, and of them a few blocks of entries, become tables
// that stay in the L1 cache. What an entry of σ that is 0 gave as 1 is taken off. Rows of a half type are widened
// first, and their sums rounded once.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <atomic>
#include <numeric>
#include <vector>

#include "table_rows.h"

namespace bioplaus {

// Columns that are worth forming a row's tables once more.
constexpr int64_t kUnitColumns = 512;

// No tensor where too many signs are 0.
inline at::Tensor table_product(const at::Tensor& grad_output, const FeedbackParams& b, const WeightSigns& whole) {
  struct ZeroSign {
    int64_t row, column;
  };
  const at::Tensor grad = grad_output.stride(1) == 1 ? grad_output : grad_output.contiguous();
  const auto* x = static_cast<const char*>(grad.const_data_ptr());
  const int64_t element = grad.element_size();
  const bool half = b.out.dtype != DType::Float32;
  const int64_t rows = grad.size(0), row_stride = grad.stride(0), threads = at::get_num_threads();
  const int64_t blocks = divide_up(b.rows, kTableDepth), panel = blocks * kPlaceColumns;
  const int64_t panels = divide_up(b.cols, kPlaceColumns);
  const auto scale = static_cast<float>(entry_scale(b.scale, b.out.dtype));

  const Buffer<int32_t> places(panels * panel);
  const int64_t width = slab_width(b.cols, threads), slabs = divide_up(b.cols, width);
  const int64_t most = most_zeros(b.rows, b.cols);
  std::atomic<int64_t> found = 0;
  std::vector<std::vector<ZeroSign>> zeros_of(slabs);
  at::parallel_for(0, slabs, 1, [&](int64_t begin, int64_t end) {
    const SlabSigns signs(b, width, &whole);
    for (int64_t slab = begin; slab < end && found <= most; ++slab) {
      const int64_t first = slab * width, cols = std::min(width, b.cols - first);
      const SignColumns columns = signs.form(first, cols);
      const bool few = for_zeros(columns, b.rows, cols, [&](int64_t row, int64_t column) {
        zeros_of[slab].push_back({row, first + column});
        return ++found <= most;
      });
      for (int64_t c = 0; few && c < cols; c += kPlaceColumns) {
        BK_PICK(form_places)
        ({columns.negative + c / 32 * columns.rows, nullptr, nullptr, columns.rows}, blocks,
         places.get() + (first + c) / kPlaceColumns * panel);
      }
    }
  });
  if (found > most) {
    return {};
  }

  at::Tensor out = at::empty({rows, b.cols}, grad.options());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const bool lanes = lanes_are_rows();
  int64_t groups = divide_up(rows, RowTables::most());
  const int64_t parts = std::clamp<int64_t>(divide_up(2 * threads, groups), 1, divide_up(b.cols, kUnitColumns));
  // As many units for each thread; fewer rows at once rather than threads without any.
  const int64_t step = threads / std::gcd(threads, parts);
  groups = std::min(divide_up(groups, step) * step, lanes ? divide_up(rows, kRegisterRows) : rows);
  at::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
    RowTables tables(b.rows);
    const int64_t most_rows =
        lanes ? divide_up(divide_up(rows, kRegisterRows), groups) * kRegisterRows : divide_up(rows, groups);
    const Buffer<float> widened(half ? most_rows * b.rows : 0),
        sums(half ? most_rows * divide_up(panels, parts) * kPlaceColumns : 0);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t g = unit / parts;
      const int64_t row = lanes ? lanes_begin(rows, g, groups) : rows * g / groups;
      const int64_t count = (lanes ? lanes_begin(rows, g + 1, groups) : rows * (g + 1) / groups) - row;
      const int64_t panel_begin = panels * (unit % parts) / parts, panel_end = panels * (unit % parts + 1) / parts;
      const int64_t column = panel_begin * kPlaceColumns;
      const int64_t columns = std::min(panel_end * kPlaceColumns, b.cols) - column;
      const char* from = x + row * row_stride * element;
      char* part = to + (row * b.cols + column) * element;
      if (half) {
        copy_rows(widened.get(), DType::Float32, b.rows, from, b.out.dtype, row_stride, count, b.rows);
      }
      tables.sum(half ? widened.get() : reinterpret_cast<const float*>(from), half ? b.rows : row_stride, count,
                 !half && row + 2 * count <= rows, scale, places.get() + panel_begin * panel, panel, columns,
                 half ? sums.get() : reinterpret_cast<float*>(part), half ? columns : b.cols);
      for (const auto& zeros : zeros_of) {
        for (const ZeroSign& zero : zeros) {
          if (zero.column >= column && zero.column < column + columns) {
            tables.take_off(zero.row, zero.column - column);
          }
        }
      }
      if (half) {
        copy_rows(part, b.out.dtype, b.cols, sums.get(), DType::Float32, columns, count, columns);
      }
    }
  });
  return out;
}

}  // namespace bioplaus
