// What a tile of a locally-connected product (lc.cu) reads and writes: the addresses of its rows, and of the next
// entries along its sum, as tables in shared memory.
#pragma once

#include "lc.h"

namespace bioplaus {

constexpr int kThreads = 128;
constexpr int kRows = 64;

enum class Product { Forward, BackwardInput, BackwardWeight };

// What a block works on.
struct Tile {
  int64_t place;  // position, or input pixel
  int64_t group;
  int64_t row, column;  // the first
};

// For an input pixel: in each dim the taps first, first + step, … that a position reads it with.
struct Readers {
  int64_t first[kLcDims], step[kLcDims], count[kLcDims], coordinate[kLcDims];
};

static __device__ void split(int64_t index, const int64_t* size, int64_t (&x)[kLcDims]) {
  x[2] = index % size[2];
  index /= size[2];
  x[1] = index % size[1];
  x[0] = index / size[1];
}

static __device__ int64_t join(const int64_t* size, const int64_t (&x)[kLcDims]) {
  return (x[0] * size[1] + x[1]) * size[2] + x[2];
}

static __device__ void find_readers(const LcGeometry& g, int64_t pixel, int d, Readers& r) {
  int64_t at[kLcDims];
  split(pixel, g.in, at);
  const int64_t coordinate = d == 0 ? at[0] : d == 1 ? at[1] : at[2];
  const int64_t s = g.stride[d], dilation = g.dilation[d];
  // Tap t reads the pixel from position (last − t·dilation) / s, where that divides and there is such a position.
  const int64_t last = coordinate + g.before[d];
  const int64_t over = last - (g.out[d] - 1) * s;
  const int64_t end = last / dilation + 1 < g.kernel[d] ? last / dilation + 1 : g.kernel[d];
  int64_t t = over > 0 ? (over + dilation - 1) / dilation : 0;
  while (t < end && (last - t * dilation) % s != 0) {
    ++t;
  }
  int64_t step = 1;
  while (step * dilation % s != 0) {
    ++step;
  }
  r.coordinate[d] = coordinate;
  r.first[d] = t;
  r.step[d] = step;
  r.count[d] = t < end ? (end - 1 - t) / step + 1 : 0;
}

// Offset of a channel at a position or pixel, of sample 0.
static __device__ int64_t activation_offset(const LcActivation& x, const int64_t (&at)[kLcDims], int64_t channel) {
  return at[0] * x.stride[0] + at[1] * x.stride[1] + at[2] * x.stride[2] + channel * x.stride_c;
}

// Offset of column k = (tap, channel) of the patch that a position sees, −1 in the padding.
static __device__ int64_t patch_offset(const LcParams& p, const Tile& tile, int64_t k) {
  const LcGeometry& g = p.g;
  int64_t at[kLcDims], tap[kLcDims];
  split(tile.place, g.out, at);
  split(k / g.c, g.kernel, tap);
  for (int d = 0; d < kLcDims; ++d) {
    at[d] = lc_start(g, d, at[d]) + tap[d] * g.dilation[d];
    if (at[d] < 0 || at[d] >= g.in[d]) {
      return -1;
    }
  }
  return activation_offset(p.in, at, tile.group * g.c + k % g.c);
}

// Where entry (row, k) of the two operands lies: row + k, or nowhere, which is a zero, if either is negative.
template <int kColumns>
struct RowTables {
  int64_t a[kRows], b[kColumns];
  int64_t result[kRows];  // where the rows of the result begin
};
template <int kDepth>
struct DepthTables {
  int64_t a[kDepth], b[kDepth];
  int64_t feedback_row[kDepth];
};

// The sizes of one product: rows and columns of its result, and length of the sum.
struct Extent {
  int64_t rows, columns, depth;
};

template <Product product>
static __device__ Extent extent(const LcParams& p, const Readers& r) {
  const LcGeometry& g = p.g;
  if (product == Product::BackwardInput) {
    return {g.c, g.n, product3(r.count) * g.o};
  }
  return product == Product::Forward ? Extent{g.o, g.n, lc_columns(g)} : Extent{g.o, lc_columns(g), g.n};
}

template <Product product, int kColumns>
static __device__ void fill(const LcParams& p, const Tile& tile, const Extent& e, RowTables<kColumns>& t) {
  const LcGeometry& g = p.g;
  for (int i = threadIdx.x; i < kRows + kColumns; i += kThreads) {
    if (i < kRows) {
      const int64_t row = tile.row + i;
      const int64_t in_weight = ((tile.place * g.groups + tile.group) * g.o + row) * lc_columns(g);
      int64_t at[kLcDims];
      split(tile.place, product == Product::BackwardInput ? g.in : g.out, at);
      const int64_t in_activation = product == Product::BackwardInput
                                        ? activation_offset(p.in, at, tile.group * g.c + row)
                                        : activation_offset(p.out, at, tile.group * g.o + row);
      const int64_t operand = product == Product::Forward         ? in_weight
                              : product == Product::BackwardInput ? row
                                                                  : in_activation;
      t.a[i] = row < e.rows ? operand : -1;
      t.result[i] = product == Product::BackwardWeight ? in_weight : in_activation;
    } else {
      const int64_t column = tile.column + i - kRows;
      int64_t offset = -1;
      if (column < e.columns) {
        offset = product == Product::Forward         ? column * p.in.stride_n
                 : product == Product::BackwardInput ? column * p.out.stride_n
                                                     : patch_offset(p, tile, column);
      }
      t.b[i - kRows] = offset;
    }
  }
}

// Entries first … first + kDepth − 1 of the sum.
template <Product product, int kDepth>
static __device__ void fill(const LcParams& p, const Tile& tile, const Readers& r, const Extent& e, int64_t first,
                            DepthTables<kDepth>& t) {
  const LcGeometry& g = p.g;
  for (int i = threadIdx.x; i < kDepth; i += kThreads) {
    const int64_t k = first + i;
    t.a[i] = t.b[i] = -1;
    if (k >= e.depth) {
      continue;
    }
    if (product == Product::Forward) {
      t.a[i] = k;
      t.b[i] = patch_offset(p, tile, k);
    } else if (product == Product::BackwardWeight) {
      t.a[i] = k * p.out.stride_n;
      t.b[i] = k * p.in.stride_n;
    } else {
      int64_t which[kLcDims], tap[kLcDims], at[kLcDims];
      split(k / g.o, r.count, which);
      for (int d = 0; d < kLcDims; ++d) {
        tap[d] = r.first[d] + which[d] * r.step[d];
        at[d] = (r.coordinate[d] + g.before[d] - tap[d] * g.dilation[d]) / g.stride[d];
      }
      const int64_t channel = tile.group * g.o + k % g.o;
      const int64_t position = join(g.out, at);
      const int64_t entry = (position * g.groups * g.o + channel) * lc_columns(g) + join(g.kernel, tap) * g.c;
      t.feedback_row[i] = p.weight ? 0 : entry / p.feedback.cols;
      t.a[i] = p.weight ? entry : entry % p.feedback.cols;
      t.b[i] = activation_offset(p.out, at, channel);
    }
  }
}

}  // namespace bioplaus
