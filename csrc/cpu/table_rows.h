// Some rows of dY at a time times places, by tables.h: what a thread holds for it.
#pragma once

#include <vector>

#include "buffer.h"
#include "slab_signs.h"
#include "tables.h"

namespace bioplaus {

// Rows at once, as many as the kernel has sums for where there are many columns.
constexpr int64_t kTableRows = 6;
// Blocks whose tables stay in the L1 cache.
constexpr int64_t kHeldBlocks = 8;

class RowTables {
 public:
  // dY's rows have `depth` entries.
  explicit RowTables(int64_t depth)
      : depth_(depth),
        blocks_(divide_up(depth, kTableDepth)),
        lanes_(lanes_are_rows()),
        table_steps_(steps(kHeldBlocks, kTableFloats)),
        place_steps_(steps(kHeldBlocks, kPlaceColumns)),
        scratch_(lanes_ ? kLanesScratch : kTableRows * std::min(blocks_, kHeldBlocks) * kTableFloats) {
    for (int64_t i = 0; lanes_ && i < blocks_; ++i) {
      const int64_t k = i * kTableDepth;
      lane_blocks_.push_back({k, std::min(kTableDepth, depth - k), i * kPlaceColumns});
    }
  }

  static int64_t most() { return lanes_are_rows() ? kLanes : kTableRows; }

  // out (count × cols), `out_stride` between rows, = scale · x σ of at most most() rows. Panels of places are `panel`
  // words apart. `more`: whether as many rows follow, which are fetched ahead.
  void sum(const float* x, int64_t stride, int64_t count, bool more, float scale, const int32_t* places, int64_t panel,
           int64_t cols, float* out, int64_t out_stride) {
    x_ = x;
    scale_ = scale;
    met_.clear();
    rows_.clear();
    for (int64_t i = 0; i < count; ++i) {
      met_.push_back(i * stride);
      rows_.push_back({i * stride, out + i * out_stride});
    }
    if (lanes_) {
      BK_PICK(sum_lanes)
      ({x, scale, rows_.data(), count, lane_blocks_.data(), blocks_, places, panel, cols}, scratch_.get());
      return;
    }
    for (int64_t block = 0; block < blocks_; block += kHeldBlocks) {
      const int64_t held = std::min(kHeldBlocks, blocks_ - block), k = block * kTableDepth;
      for (int64_t i = 0; i < count; ++i) {
        rows_[i].from = i * held * kTableFloats;
      }
      // Runs of a row are too short for the processor to foresee the next ones.
      const float* from = x + k;
      const float* next = block + held < blocks_ ? from + held * kTableDepth : more ? x + count * stride : from;
      BK_PICK(form_tables)
      (from, stride, count, std::min(held * kTableDepth, depth_ - k), scale, scratch_.get(), next);
      BK_PICK(sum_tables)
      ({scratch_.get(),
        {table_steps_.data(), place_steps_.data(), held},
        places + block * kPlaceColumns,
        panel,
        block > 0},
       rows_.data(), count, cols);
    }
  }

  // From column `column` of the last sum, counted from its first, what σ's row `row` gave there: it is 0.
  void take_off(int64_t row, int64_t column) {
    BK_PICK(take_off)(x_ + row, met_.data(), scale_, rows_.data(), static_cast<int64_t>(rows_.size()), column);
  }

 private:
  int64_t depth_, blocks_;
  bool lanes_;
  std::vector<int64_t> table_steps_, place_steps_;
  std::vector<LaneBlock> lane_blocks_;
  Buffer<float> scratch_;
  const float* x_ = nullptr;
  float scale_ = 0;
  std::vector<int64_t> met_;
  std::vector<TableRow> rows_;
};

}  // namespace bioplaus
