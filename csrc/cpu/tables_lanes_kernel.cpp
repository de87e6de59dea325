// Sums of entries of tables.h where a register is too short for a table: lanes are rows.
//
// Roofline: a vector of rows is read from the L1 cache and added for four multiply-adds a lane, where a fused
// multiply-add does one. Tables of a block along K are formed in 16 KB, once for all columns of a slab.
#include "tables.h"
#include "transpose.h"

namespace bioplaus {
namespace BK_LEVEL {
namespace {

#define BK_MEMBER __attribute__((always_inline))

constexpr int kTables = kTableDepth / 4;  // of a block

BK_INLINE const F8& at(const float* x) { return *reinterpret_cast<const F8*>(x); }
BK_INLINE F8& at(float* x) { return *reinterpret_cast<F8*>(x); }

// LANES floats. A struct of structs, as compilers keep arrays in memory.
template <int LANES>
struct Lanes {
  F8 x;
  Lanes<LANES - 8> more;

  BK_MEMBER void clear() {
    x = F8{};
    more.clear();
  }
  BK_MEMBER void get(const float* from) {
    x = at(from);
    more.get(from + 8);
  }
  BK_MEMBER void add(const float* from) {
    x += at(from);
    more.add(from + 8);
  }
  BK_MEMBER void put(float* to) const {
    at(to) = x;
    more.put(to + 8);
  }
};

template <>
struct Lanes<0> {
  BK_MEMBER void clear() {}
  BK_MEMBER void get(const float*) {}
  BK_MEMBER void add(const float*) {}
  BK_MEMBER void put(float*) const {}
};

// Floats from an entry of a table to the next one, a power of 2.
template <int LANES>
constexpr int64_t kStride = LANES <= kLanes / 4   ? kLanes / 4
                            : LANES <= kLanes / 2 ? kLanes / 2
                                                  : kLanes;

// Floats from a table to the entry that the 4 bits of its place say, which are only moved to where they count.
template <int LANES>
BK_INLINE int64_t entry_of(uint64_t places, int t) {
  constexpr int kTo = __builtin_ctzll(kStride<LANES>);
  return static_cast<int64_t>((4 * t < kTo ? places << (kTo - 4 * t) : places >> (4 * t - kTo)) &
                              ((kEntries - 1) << kTo));
}

// Tables of a block whose entries k are at x + k · LANES. Entry i of one is (±a ± b) + (±c ± d), signs by i's bits.
template <int LANES>
void form(const float* x, int64_t count, float* to) {
  for (int64_t t = 0; t < count; ++t, x += 4 * LANES, to += kEntries * kStride<LANES>) {
    for (int l = 0; l < LANES; l += 8) {
      const F8 a = at(x + l), b = at(x + LANES + l), c = at(x + 2 * LANES + l), d = at(x + 3 * LANES + l);
      const F8 low[] = {a + b, b - a, a - b, -(a + b)}, high[] = {c + d, d - c, c - d, -(c + d)};
#pragma GCC unroll 16
      for (int i = 0; i < kEntries; ++i) {
        at(to + i * kStride<LANES> + l) = low[i % 4] + high[i / 4];
      }
    }
  }
}

// What a block brings to each of some columns: `part` is a pass's sum so far, `sums` that of the passes before.
template <int LANES>
struct BlockSums {
  const float* tables;
  int64_t count;             // of tables
  bool begins, ends, first;  // the pass, and the first one

  template <bool WHOLE>
  void add(const int32_t* places, int64_t cols, float* part, float* sums) const {
    for (int64_t c = 0; c < cols; ++c, part += LANES, sums += LANES) {
      Lanes<LANES> sum;
      begins ? sum.clear() : sum.get(part);
      const uint64_t place = static_cast<uint32_t>(places[c]);
#pragma GCC unroll 8
      for (int t = 0; t < (WHOLE ? kTables : count); ++t) {
        sum.add(tables + t * kEntries * kStride<LANES> + entry_of<LANES>(place, t));
      }
      if (ends && !first) {
        sum.add(sums);
      }
      sum.put(ends ? sums : part);
    }
  }
};

// to[k · LANES + l] = scale · x[l][k] of eight lanes and entries.
template <int LANES>
BK_INLINE void take8(const float* const* x, float scale, float* to) {
  F8 columns[8];
  transpose8(x, columns);
  for (int k = 0; k < 8; ++k) {
    at(to + k * LANES) = columns[k] * scale;
  }
}

// Entry k of lane l, times scale, to to[k · LANES + l], of the block's and 0 for the rest of eight. Lanes beyond the
// last row hold anything.
template <int LANES>
void take_entries(const LaneSums& s, const LaneBlock& block, float* to) {
  const int64_t whole = block.depth / 8 * 8;
  for (int64_t l = 0; l < LANES; l += 8) {
    const float* x[8];
    for (int64_t i = 0; i < 8; ++i) {
      x[i] = s.grad + s.rows[l + i < s.count ? l + i : 0].from + block.entries;
    }
    for (int64_t k = 0; k < whole; k += 8) {
      take8<LANES>(x, s.scale, to + k * LANES + l);
      for (const float*& lane : x) {
        lane += 8;
      }
    }
    if (whole < block.depth) {
      float padded[8][8] = {};
      for (int64_t i = 0; i < 8; ++i) {
        for (int64_t k = whole; k < block.depth; ++k) {
          padded[i][k - whole] = s.scale * x[i][k - whole];
        }
        x[i] = padded[i];
      }
      take8<LANES>(x, 1.0f, to + whole * LANES + l);
    }
  }
}

// sums[c · LANES + l] to column c of lane l.
template <int LANES>
void put_rows(const LaneSums& s, int64_t first, int64_t cols, const float* sums) {
  for (int64_t l = 0; l < s.count; l += 8) {
    int64_t c = 0;
    for (; c + 8 <= cols; c += 8) {
      const float* rows[8];
      for (int64_t i = 0; i < 8; ++i) {
        rows[i] = sums + (c + i) * LANES + l;
      }
      F8 x[8];
      transpose8(rows, x);
      for (int64_t i = 0; i < 8 && l + i < s.count; ++i) {
        at(s.rows[l + i].out + first + c) = x[i];
      }
    }
    for (; c < cols; ++c) {
      for (int64_t i = 0; i < 8 && l + i < s.count; ++i) {
        s.rows[l + i].out[first + c] = sums[c * LANES + l + i];
      }
    }
  }
}

template <int LANES>
void sum_slab(const LaneSums& s, const int32_t* places, int64_t first, int64_t cols, float* scratch) {
  float* const tables = scratch;
  float* const entries = tables + kTables * kEntries * kStride<LANES>;
  float* const part = entries + LANES * kTableDepth;
  float* const sums = part + LANES * kSlabColumns;
  for (int64_t i = 0; i < s.depth; ++i) {
    const LaneBlock& block = s.blocks[i];
    const int64_t count = (block.depth + 3) / 4;
    take_entries<LANES>(s, block, entries);
    form<LANES>(entries, count, tables);
    const BlockSums<LANES> add{tables, count, i % kPassBlocks == 0, (i + 1) % kPassBlocks == 0 || i + 1 == s.depth,
                               i < kPassBlocks};
    const int32_t* panel = places + block.places;
    for (int64_t c = 0; c < cols; c += kPlaceColumns, panel += s.panel) {
      const int64_t width = cols - c < kPlaceColumns ? cols - c : kPlaceColumns;
      float *const to = part + c * LANES, *const of_passes = sums + c * LANES;
      count == kTables ? add.template add<true>(panel, width, to, of_passes)
                       : add.template add<false>(panel, width, to, of_passes);
    }
  }
  put_rows<LANES>(s, first, cols, sums);
}

}  // namespace

void sum_lanes(const LaneSums& s, float* scratch) {
  constexpr int kOne = kRegisterRows;
  const auto sum = s.count <= kOne       ? sum_slab<kOne>
                   : s.count <= 2 * kOne ? sum_slab<2 * kOne>
                   : s.count <= 3 * kOne ? sum_slab<3 * kOne>
                                         : sum_slab<kLanes>;
  const int32_t* places = s.places;
  for (int64_t first = 0; first < s.cols; first += kSlabColumns, places += kSlabColumns / kPlaceColumns * s.panel) {
    sum(s, places, first, s.cols - first < kSlabColumns ? s.cols - first : kSlabColumns, scratch);
  }
}

}  // namespace BK_LEVEL
}  // namespace bioplaus
