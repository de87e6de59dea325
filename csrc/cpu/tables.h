// Products by ±1 in float32 as sums of table entries.
//
// Four entries of a row of dY have 16 signed sums ±a ± b ± c ± d, a table. The signs that four rows of σ have in a
// column are a place in it. On AVX-512 a table fills one vector register: one permutation and one addition bring 16
// columns what would be four fused multiply-adds (tables_kernel.cpp, and its plain loops). Registers of AVX2 are
// shorter: tables of many rows lie side by side, and one addition from memory does so for a vector of rows
// (tables_lanes_kernel.cpp). All add in the same order. An entry of σ that is 0 counts as 1 here.
#pragma once

#include "feedback_mm.h"

namespace bioplaus {

// Of so many entries along K the places in a column are one word, 4 bits each from the lowest: bit b of a place is set
// where the sign of entry b is negative.
constexpr int64_t kTableDepth = 32;
constexpr int kEntries = 16;  // of a table
constexpr int64_t kTableFloats = kTableDepth / 4 * kEntries;
constexpr int64_t kPlaceColumns = 64;
// Errors grow with the length of a sum: so many blocks are a pass, added before they are added to the others.
constexpr int64_t kPassBlocks = 4;
// Where lanes are rows: rows of a register, rows at once, columns whose sums stay in the L2 cache, and floats of memory
// for those, and for the entries and tables of a block.
constexpr int64_t kRegisterRows = 8;
constexpr int64_t kLanes = 4 * kRegisterRows;
constexpr int64_t kSlabColumns = 512;
constexpr int64_t kLanesScratch = kLanes * (kTableFloats + kTableDepth + 2 * kSlabColumns);

// Where part `part` of `parts` of `count` rows begins: of whole registers, nearly as many in each.
inline int64_t lanes_begin(int64_t count, int64_t part, int64_t parts) {
  const int64_t begin = (count + kRegisterRows - 1) / kRegisterRows * part / parts * kRegisterRows;
  return begin < count ? begin : count;
}

// A row of dX: where its tables, or its row of dY, begin, in floats.
struct TableRow {
  int64_t from;
  float* out;
};

// The blocks of kTableDepth that a row sums: floats from its first table, and words from a panel's first place.
struct TableRun {
  const int64_t* tables;
  const int64_t* places;
  int64_t blocks;
};

// Tables of `rows` rows of `depth` adjacent floats, `stride` apart, times scale; the last block is filled with zeros.
// `next`: what is fetched ahead, row for row, or x where nothing is.
BK_DECLARE(void form_tables(const float* x, int64_t stride, int64_t rows, int64_t depth, float scale, float* to,
                            const float* next))

// Places of `blocks` blocks of rows of σ, and its first kPlaceColumns columns.
BK_DECLARE(void form_places(const SignColumns& signs, int64_t blocks, int32_t* to))

// Sums of the entries of `run`, added to dX where `add`. Panels of kPlaceColumns columns have their places `panel`
// words apart.
struct TableSums {
  const float* tables;
  TableRun run;
  const int32_t* places;
  int64_t panel;
  bool add;
};

BK_DECLARE(void sum_tables(const TableSums& s, const TableRow* rows, int64_t count, int64_t cols))

// A block of a run where lanes are rows: floats from where a row of dY begins to its entries, how many there are, and
// words from a panel's first place.
struct LaneBlock {
  int64_t entries, depth, places;
};

// dX of at most kLanes rows, of dY times scale.
struct LaneSums {
  const float* grad;
  float scale;
  const TableRow* rows;
  int64_t count;
  const LaneBlock* blocks;
  int64_t depth;  // how many
  const int32_t* places;
  int64_t panel;
  int64_t cols;
};

// `scratch`: kLanesScratch floats.
BK_DECLARE(void sum_lanes(const LaneSums& s, float* scratch))

// From one column of the rows what x[at[i]], times scale, gave to row i.
BK_DECLARE(void take_off(const float* x, const int64_t* at, float scale, const TableRow* rows, int64_t count,
                         int64_t column))

}  // namespace bioplaus
