// Where the entries of a locally-connected product (lc.cu) lie.
//
// A product has an index of its rows, one of its columns and one that it sums over, and each of its three tensors takes
// two of them. An entry's address is the sum of what these add to it, from tables in shared memory, so that strides,
// dilation, groups, padding and memory format are met once an index:
//
//     index      weights               input                 output
//     Sample                           sample                sample
//     Output     row of the block                            channel at the position
//     Patch      tap and channel       the pixel's channel
//     Input      channel               channel at the pixel
//     Reader     row and tap                                 channel at a position that reads the pixel with that tap
#pragma once

#include "lc.h"

namespace bioplaus {

constexpr int kThreads = 128;
constexpr int kRows = 64;

enum class Index { Sample, Output, Patch, Input, Reader };

// result = a · b
template <Product product>
struct Roles {
  static constexpr bool kForward = product == Product::Forward, kBackwardInput = product == Product::BackwardInput;
  static constexpr bool kBackwardWeight = product == Product::BackwardWeight;
  static constexpr Index kRow = kBackwardInput ? Index::Input : Index::Output;
  static constexpr Index kColumn = kBackwardWeight ? Index::Patch : Index::Sample;
  static constexpr Index kSum = kForward ? Index::Patch : kBackwardInput ? Index::Reader : Index::Sample;
  static constexpr Tensor kA = kBackwardWeight ? kOut : kWeight, kB = kBackwardInput ? kOut : kIn;
  static constexpr Tensor kResult = kForward ? kOut : kBackwardInput ? kIn : kWeight;
};

// How many there are of an index of rows or columns.
template <Index kind>
BK_INLINE int64_t count(const LcGeometry& g) {
  return kind == Index::Sample ? g.n : kind == Index::Output ? g.o : kind == Index::Input ? g.c : lc_columns(g);
}

struct Tiles {
  int64_t rows, columns, all;
};

template <typename R, int kColumns>
BK_INLINE Tiles tiles_of(const LcGeometry& g) {
  const int64_t rows = (count<R::kRow>(g) + kRows - 1) / kRows;
  const int64_t columns = (count<R::kColumn>(g) + kColumns - 1) / kColumns;
  return {rows, columns, product3(R::kBackwardInput ? g.in : g.out) * g.groups * rows * columns};
}

// What a block works on: a tile, from `row` and `column` on, of the product at a position or an input pixel.
struct Tile {
  int64_t place, group, row, column;
};

// Coordinates of the place; of a pixel, in each dim, the taps first, first + step, … that a position reads it with.
struct Place {
  int64_t at[kLcDims], first[kLcDims], step[kLcDims], count[kLcDims];
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

// Dim d of a place.
static __device__ void find(const LcGeometry& g, bool pixel, int64_t index, int d, Place& to) {
  int64_t at[kLcDims];
  split(index, pixel ? g.in : g.out, at);
  to.at[d] = d == 0 ? at[0] : d == 1 ? at[1] : at[2];
  if (!pixel) {
    return;
  }
  const int64_t s = g.stride[d], dilation = g.dilation[d];
  // Tap t reads the pixel from position (last − t·dilation) / s, where that divides and there is such a position.
  const int64_t last = to.at[d] + g.before[d];
  const int64_t over = last - (g.out[d] - 1) * s;
  const int64_t end = last / dilation + 1 < g.kernel[d] ? last / dilation + 1 : g.kernel[d];
  int64_t t = over > 0 ? (over + dilation - 1) / dilation : 0;
  while (t < end && (last - t * dilation) % s != 0) {
    ++t;
  }
  int64_t step = 1;
  while (step < g.kernel[d] && step * dilation % s != 0) {
    ++step;
  }
  to.first[d] = t;
  to.step[d] = step;
  to.count[d] = t < end ? (end - 1 - t) / step + 1 : 0;
}

// Offset of a channel at a position or pixel, of sample 0.
static __device__ int64_t channel_at(const LcStrides& x, const int64_t (&at)[kLcDims], int64_t channel) {
  return at[0] * x.spatial[0] + at[1] * x.spatial[1] + at[2] * x.spatial[2] + channel * x.channel;
}

// What index i adds to an address in each tensor; a negative sum is in the padding.
struct Offsets {
  int64_t of[3];
};

template <Index kind>
static __device__ Offsets offsets(const LcParams& p, const Tile& tile, const Place& place, int64_t i) {
  const LcGeometry& g = p.g;
  if (kind == Index::Sample) {
    return {0, i * p.in.sample, i * p.out.sample};
  }
  if (kind == Index::Output) {
    const int64_t channel = tile.group * g.o + i;
    return {(tile.place * g.groups * g.o + channel) * lc_columns(g), 0, channel_at(p.out, place.at, channel)};
  }
  if (kind == Index::Input) {
    return {i, channel_at(p.in, place.at, tile.group * g.c + i), 0};
  }
  int64_t at[kLcDims], tap[kLcDims];
  if (kind == Index::Patch) {
    split(i / g.c, g.kernel, tap);
    bool inside = true;
    for (int d = 0; d < kLcDims; ++d) {
      at[d] = lc_start(g, d, place.at[d]) + tap[d] * g.dilation[d];
      inside = inside && at[d] >= 0 && at[d] < g.in[d];
    }
    return {i, inside ? channel_at(p.in, at, tile.group * g.c + i % g.c) : -1, 0};
  }
  split(i / g.o, place.count, at);
  for (int d = 0; d < kLcDims; ++d) {
    tap[d] = place.first[d] + at[d] * place.step[d];
    at[d] = (place.at[d] + g.before[d] - tap[d] * g.dilation[d]) / g.stride[d];
  }
  const int64_t channel = tile.group * g.o + i % g.o;
  const int64_t row = join(g.out, at) * g.groups * g.o + channel;
  return {row * lc_columns(g) + join(g.kernel, tap) * g.c, 0, channel_at(p.out, at, channel)};
}

// Entry (line, k) of an operand lies at line + k, or nowhere, which is a zero, if either is negative.
template <int kColumns>
struct LineTables {
  int64_t a[kRows], b[kColumns], result[kRows];
};
template <int kDepth>
struct DepthTables {
  int64_t a[kDepth], b[kDepth];
};

template <typename R, int kColumns>
static __device__ void fill(const LcParams& p, const Tile& tile, const Place& place, LineTables<kColumns>& t) {
  const int i = threadIdx.x, j = kThreads - 1 - i;  // other warps' than the rows
  if (i < kRows) {
    const Offsets x = offsets<R::kRow>(p, tile, place, tile.row + i);
    t.a[i] = tile.row + i < count<R::kRow>(p.g) ? x.of[R::kA] : -1;
    t.result[i] = x.of[R::kResult];
  }
  if (j < kColumns) {
    const int64_t column = tile.column + j;
    t.b[j] = column < count<R::kColumn>(p.g) ? offsets<R::kColumn>(p, tile, place, column).of[R::kB] : -1;
  }
}

// Entries first … first + kDepth − 1 of `depth` of the sum.
template <typename R, int kDepth>
static __device__ void fill(const LcParams& p, const Tile& tile, const Place& place, int64_t first, int64_t depth,
                            DepthTables<kDepth>& t) {
  const int i = threadIdx.x;
  if (i < kDepth) {
    const Offsets x = first + i < depth ? offsets<R::kSum>(p, tile, place, first + i) : Offsets{-1, -1, -1};
    t.a[i] = x.of[R::kA];
    t.b[i] = x.of[R::kB];
  }
}

}  // namespace bioplaus
