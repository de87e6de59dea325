// dX = s · (dY · σ) in float32 as sums of table entries: tables.h.
//
// Places of all columns are formed once. Some rows of dY at a time, and of them a few blocks of entries, become tables
// that stay in the L1 cache. What an entry of σ that is 0 gave as 1 is taken off.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <atomic>
#include <numeric>
#include <vector>

#include "slab_signs.h"
#include "tables.h"

namespace bioplaus {

// Rows at once, as many as the kernel has sums for where there are many columns.
constexpr int64_t kTableRows = 6;
// Blocks whose tables stay in the L1 cache.
constexpr int64_t kHeldBlocks = 8;
// Columns that are worth forming a row's tables once more.
constexpr int64_t kUnitColumns = 512;

// No tensor where too many signs are 0.
inline at::Tensor table_product(const at::Tensor& grad_output, const FeedbackParams& b) {
  struct ZeroSign {
    int64_t row, column;
  };
  const at::Tensor grad = grad_output.stride(1) == 1 ? grad_output : grad_output.contiguous();
  const float* x = grad.const_data_ptr<float>();
  const int64_t rows = grad.size(0), row_stride = grad.stride(0), threads = at::get_num_threads();
  const int64_t blocks = divide_up(b.rows, kTableDepth), panel = blocks * kPlaceColumns;
  const int64_t panels = divide_up(b.cols, kPlaceColumns);
  const float scale = static_cast<float>(b.scale);

  const Buffer<int32_t> places(panels * panel);
  const int64_t width = slab_width(b.cols, threads), slabs = divide_up(b.cols, width);
  const int64_t most = most_zeros(b.rows, b.cols);
  std::atomic<int64_t> found = 0;
  std::vector<std::vector<ZeroSign>> zeros_of(slabs);
  at::parallel_for(0, slabs, 1, [&](int64_t begin, int64_t end) {
    const SlabSigns signs(b, width);
    for (int64_t slab = begin; slab < end && found <= most; ++slab) {
      const int64_t first = slab * width, cols = std::min(width, b.cols - first);
      const SignColumns& columns = signs.form(first, cols);
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
  float* to = out.mutable_data_ptr<float>();
  const std::vector<int64_t> table_steps = steps(kHeldBlocks, kTableFloats);
  const std::vector<int64_t> place_steps = steps(kHeldBlocks, kPlaceColumns);
  const bool lanes = lanes_are_rows();
  std::vector<LaneBlock> lane_blocks;
  for (int64_t i = 0; lanes && i < blocks; ++i) {
    const int64_t k = i * kTableDepth;
    lane_blocks.push_back({k, std::min(kTableDepth, b.rows - k), i * kPlaceColumns});
  }
  int64_t groups = divide_up(rows, lanes ? kLanes : kTableRows);
  const int64_t parts = std::clamp<int64_t>(divide_up(2 * threads, groups), 1, divide_up(b.cols, kUnitColumns));
  // As many units for each thread; fewer rows at once rather than threads without any.
  const int64_t step = threads / std::gcd(threads, parts);
  groups = std::min(divide_up(groups, step) * step, lanes ? divide_up(rows, kRegisterRows) : rows);
  at::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> tables(lanes ? kLanesScratch
                                     : std::min(kTableRows, rows) * std::min(blocks, kHeldBlocks) * kTableFloats);
    std::vector<TableRow> some;
    std::vector<int64_t> met;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t g = unit / parts;
      const int64_t row = lanes ? lanes_begin(rows, g, groups) : rows * g / groups;
      const int64_t count = (lanes ? lanes_begin(rows, g + 1, groups) : rows * (g + 1) / groups) - row;
      const int64_t panel_begin = panels * (unit % parts) / parts, panel_end = panels * (unit % parts + 1) / parts;
      const int64_t column = panel_begin * kPlaceColumns;
      const int64_t columns = std::min(panel_end * kPlaceColumns, b.cols) - column;
      met.clear();
      some.clear();
      for (int64_t i = 0; i < count; ++i) {
        met.push_back((row + i) * row_stride);
        some.push_back({met.back(), to + (row + i) * b.cols + column});
      }
      if (lanes) {
        BK_PICK(sum_lanes)
        ({x, scale, some.data(), count, lane_blocks.data(), blocks, places.get() + panel_begin * panel, panel, columns},
         tables.get());
      } else {
        for (int64_t block = 0; block < blocks; block += kHeldBlocks) {
          const int64_t held = std::min(kHeldBlocks, blocks - block), k = block * kTableDepth;
          for (int64_t i = 0; i < count; ++i) {
            some[i].from = i * held * kTableFloats;
          }
          // Runs of a row are too short for the processor to foresee the next ones.
          const float* from = x + row * row_stride + k;
          const float* next = block + held < blocks     ? from + held * kTableDepth
                              : row + 2 * count <= rows ? x + (row + count) * row_stride
                                                        : from;
          BK_PICK(form_tables)
          (from, row_stride, count, std::min(held * kTableDepth, b.rows - k), scale, tables.get(), next);
          BK_PICK(sum_tables)
          ({tables.get(),
            {table_steps.data(), place_steps.data(), held},
            places.get() + panel_begin * panel + block * kPlaceColumns,
            panel,
            block > 0},
           some.data(), count, columns);
        }
      }
      for (const auto& zeros : zeros_of) {
        for (const ZeroSign& zero : zeros) {
          if (zero.column >= column && zero.column < column + columns) {
            BK_PICK(take_off)(x + zero.row, met.data(), scale, some.data(), count, zero.column - column);
          }
        }
      }
    }
  });
  return out;
}

}  // namespace bioplaus
