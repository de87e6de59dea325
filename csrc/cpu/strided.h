// Elements of a strided operand as a contiguous run, for *_kernel.cpp files.
#pragma once

#include "../common/feedback.h"

namespace bioplaus {

// Calls run(offset within the row, stride, first, count) for the pieces of columns j0 … j0 + n − 1 that lie on one
// stride; first counts from j0. One division per column dim, then an odometer.
template <typename Run>
BK_INLINE void for_runs(const FeedbackParams& p, const Operand& x, int64_t j0, int64_t n, const Run& run) {
  const int last = p.column_dims - 1;
  int64_t index[kMaxColumnDims];
  int64_t rest = j0;
  for (int d = last; d > 0; --d) {
    index[d] = rest % p.column_size[d];
    rest /= p.column_size[d];
  }
  index[0] = rest;
  for (int64_t done = 0; done < n;) {
    int64_t offset = 0;
    for (int d = 0; d <= last; ++d) {
      offset += index[d] * x.stride[d];
    }
    const int64_t left = p.column_size[last] - index[last];
    const int64_t count = left < n - done ? left : n - done;
    run(offset, x.stride[last], done, count);
    done += count;
    index[last] = 0;
    for (int d = last - 1; d >= 0; --d) {
      if (++index[d] < p.column_size[d] || d == 0) {
        break;
      }
      index[d] = 0;
    }
  }
}

template <typename U>
BK_INLINE void gather_as(const FeedbackParams& p, const Operand& x, int64_t i, int64_t j0, int64_t n, void* to) {
  const U* from = static_cast<const U*>(x.data) + i * x.row_stride;
  U* dense = static_cast<U*>(to);
  for_runs(p, x, j0, n, [&](int64_t offset, int64_t stride, int64_t first, int64_t count) {
    for (int64_t t = 0; t < count; ++t) {
      dense[first + t] = from[offset + t * stride];
    }
  });
}

template <typename U>
BK_INLINE void scatter_as(const FeedbackParams& p, const Operand& x, int64_t i, int64_t j0, int64_t n,
                          const void* from) {
  const U* dense = static_cast<const U*>(from);
  U* to = static_cast<U*>(x.data) + i * x.row_stride;
  for_runs(p, x, j0, n, [&](int64_t offset, int64_t stride, int64_t first, int64_t count) {
    for (int64_t t = 0; t < count; ++t) {
      to[offset + t * stride] = dense[first + t];
    }
  });
}

// Columns j0 … j0 + n − 1 of row i: the operand's own memory where they are adjacent, else gathered into `scratch`.
static inline const void* gather(const FeedbackParams& p, const Operand& x, int64_t i, int64_t j0, int64_t n,
                                 void* scratch) {
  const int64_t size = size_of(x.dtype);
  if (x.dense) {
    return static_cast<const char*>(x.data) + (i * x.row_stride + j0) * size;
  }
  switch (size) {
    case 8:
      gather_as<uint64_t>(p, x, i, j0, n, scratch);
      break;
    case 4:
      gather_as<uint32_t>(p, x, i, j0, n, scratch);
      break;
    default:
      gather_as<uint16_t>(p, x, i, j0, n, scratch);
  }
  return scratch;
}

static inline void scatter(const FeedbackParams& p, const Operand& x, int64_t i, int64_t j0, int64_t n,
                           const void* dense) {
  switch (size_of(x.dtype)) {
    case 8:
      scatter_as<uint64_t>(p, x, i, j0, n, dense);
      break;
    case 4:
      scatter_as<uint32_t>(p, x, i, j0, n, dense);
      break;
    default:
      scatter_as<uint16_t>(p, x, i, j0, n, dense);
  }
}

}  // namespace bioplaus
