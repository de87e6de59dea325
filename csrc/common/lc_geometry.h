// The geometry of a locally-connected op, for host and device. 1-D and 2-D ops are 3-D with leading dims of size 1.
//
// Weights are (positions, groups · o, taps · c), row-major: the block of position p and group g is `o` rows of
// columns() entries, the channel innermost. Tap t of position p reads input coordinate p·stride − before + t·dilation
// in each dim; taps outside the input are zero padding.
#pragma once

#include "philox.h"

namespace bioplaus {

constexpr int kLcDims = 3;

struct LcGeometry {
  int64_t n;  // batch
  int64_t groups;
  int64_t c, o;  // input and output channels of one group
  int64_t in[kLcDims], out[kLcDims], kernel[kLcDims];
  int64_t stride[kLcDims], before[kLcDims], dilation[kLcDims];
};

BK_INLINE int64_t product3(const int64_t* x) { return x[0] * x[1] * x[2]; }

// Entries of one row of a position's block.
BK_INLINE int64_t lc_columns(const LcGeometry& g) { return product3(g.kernel) * g.c; }

// Input coordinate that tap 0 of `position` reads, in dim `dim`; it may lie in the padding.
BK_INLINE int64_t lc_start(const LcGeometry& g, int dim, int64_t position) {
  return position * g.stride[dim] - g.before[dim];
}

struct LcTaps {
  int64_t begin, end;
};

// The taps of a position starting at `start` that read coordinates in [low, high) of dim `dim`.
BK_INLINE LcTaps lc_taps(const LcGeometry& g, int dim, int64_t start, int64_t low, int64_t high) {
  const int64_t d = g.dilation[dim];
  int64_t begin = start < low ? (low - start + d - 1) / d : 0;
  int64_t end = start < high ? (high - start + d - 1) / d : 0;
  end = end < g.kernel[dim] ? end : g.kernel[dim];
  begin = begin < end ? begin : end;
  return {begin, end};
}

}  // namespace bioplaus
