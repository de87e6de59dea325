// dX = s · (dY · σ) in float32 as sums of table entries: tables.h.
//
// Places of all columns are formed once. A few rows of dY at a time, and of them what one sum adds, become tables that
// stay in the L1 cache. What an entry of σ that is 0 gave as 1 is taken off.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <utility>
#include <vector>

#include "slab_signs.h"
#include "tables.h"

namespace bioplaus {

// Rows at once, as many as the kernel has sums for, and columns that are worth forming their tables.
constexpr int64_t kTableRows = 6;
// Blocks whose tables stay in the L1 cache.
constexpr int64_t kHeldBlocks = 8;
constexpr int64_t kUnitColumns = 512;

// No tensor where too many signs are 0.
inline at::Tensor table_product(const at::Tensor& grad_output, const FeedbackParams& b) {
  const at::Tensor grad = grad_output.stride(1) == 1 ? grad_output : grad_output.contiguous();
  const float* x = grad.const_data_ptr<float>();
  const int64_t rows = grad.size(0), row_stride = grad.stride(0), threads = at::get_num_threads();
  const int64_t blocks = divide_up(b.rows, kTableDepth), panel = blocks * kPlaceColumns;
  const int64_t panels = divide_up(b.cols, kPlaceColumns);
  const float scale = static_cast<float>(b.scale);

  const Buffer<int32_t> places(panels * panel);
  const int64_t width = slab_width(b.cols, threads), slabs = divide_up(b.cols, width);
  std::vector<std::vector<std::pair<int64_t, int64_t>>> zeros_of(slabs);
  at::parallel_for(0, slabs, 1, [&](int64_t begin, int64_t end) {
    const SlabSigns signs(b, width);
    for (int64_t slab = begin; slab < end; ++slab) {
      const int64_t first = slab * width, cols = std::min(width, b.cols - first);
      const SignColumns& columns = signs.form(first, cols);
      for (int64_t c = 0; c < cols; c += kPlaceColumns) {
        BK_PICK(form_places)
        ({columns.negative + c / 32 * columns.rows, nullptr, nullptr, columns.rows}, blocks,
         places.get() + (first + c) / kPlaceColumns * panel);
      }
      for_zeros(columns, b.rows, cols,
                [&](int64_t row, int64_t column) { zeros_of[slab].emplace_back(row, first + column); });
    }
  });
  std::vector<std::pair<int64_t, int64_t>> zeros;
  for (const auto& some : zeros_of) {
    zeros.insert(zeros.end(), some.begin(), some.end());
  }
  if (static_cast<int64_t>(zeros.size()) > b.rows * b.cols / kDense + 1) {
    return {};
  }

  at::Tensor out = at::empty({rows, b.cols}, grad.options());
  float* to = out.mutable_data_ptr<float>();
  const std::vector<int64_t> table_steps = steps(kHeldBlocks, kTableFloats);
  const std::vector<int64_t> place_steps = steps(kHeldBlocks, kPlaceColumns);
  const int64_t groups = divide_up(rows, kTableRows);
  const int64_t parts = std::clamp<int64_t>(divide_up(2 * threads, groups), 1, divide_up(b.cols, kUnitColumns));
  at::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> tables(std::min(kTableRows, rows) * std::min(blocks, kHeldBlocks) * kTableFloats);
    std::vector<TableRow> some;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = rows * (unit / parts) / groups, last = rows * (unit / parts + 1) / groups;
      const int64_t panel_begin = panels * (unit % parts) / parts, panel_end = panels * (unit % parts + 1) / parts;
      const int64_t column = panel_begin * kPlaceColumns;
      const int64_t columns = std::min(panel_end * kPlaceColumns, b.cols) - column;
      for (int64_t block = 0; block < blocks; block += kHeldBlocks) {
        const int64_t count = std::min(kHeldBlocks, blocks - block), k = block * kTableDepth;
        some.clear();
        for (int64_t row = first; row < last; ++row) {
          some.push_back({(row - first) * count * kTableFloats, to + row * b.cols + column});
        }
        BK_PICK(form_tables)
        (x + first * row_stride + k, row_stride, last - first, std::min(count * kTableDepth, b.rows - k), tables.get());
        BK_PICK(sum_tables)
        ({tables.get(),
          {table_steps.data(), place_steps.data(), count},
          places.get() + panel_begin * panel + block * kPlaceColumns,
          panel,
          block > 0,
          block + count == blocks ? scale : 1.0f},
         some.data(), last - first, columns);
      }
      for (const auto& [k, n] : zeros) {
        for (int64_t row = first; n >= column && n < column + columns && row < last; ++row) {
          to[row * b.cols + n] -= scale * x[row * row_stride + k];
        }
      }
    }
  });
  return out;
}

}  // namespace bioplaus
