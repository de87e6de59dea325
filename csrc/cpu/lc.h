// Entry points of the locally-connected ops' CPU kernels: what surrounds the tile products of gemm.h.
#pragma once

#include "../common/feedback.h"
#include "level.h"

namespace bioplaus {

// A 3-D box copied between two strided layouts, elements converted on the way. Strides are in elements.
struct LcCopy {
  void* to;
  const void* from;
  DType to_dtype, from_dtype;
  int64_t size[3], to_stride[3], from_stride[3];
};

// `acc` below is float64 where the dtype is float64, else float32.
BK_DECLARE(void lc_copy(const LcCopy& copy))

// `w` is (rows × cols) of `dtype` with leading dimension ldw; x, g and y hold `acc`.
// y[i, s] = Σ_j w[i, j] · x[s, j], for few samples s
BK_DECLARE(void lc_dot(DType dtype, const void* w, int64_t ldw, int64_t rows, int64_t cols, const void* x,
                       int64_t samples, void* y))
// y[j] += Σ_i g[i] · w[i, j], or of w's signs where `signs`, the sum over i taken in order
BK_DECLARE(void lc_axpy(DType dtype, bool signs, const void* w, int64_t ldw, int64_t rows, int64_t cols, const void* g,
                        void* y))
// w[i, j] = g[i] · x[j]
BK_DECLARE(void lc_outer(DType dtype, void* w, int64_t ldw, int64_t rows, int64_t cols, const void* g, const void* x))

// to[i, j] += from[i, j], rows × cols of float64 where `wide`, else float32.
BK_DECLARE(void lc_add(bool wide, void* to, int64_t ld_to, const void* from, int64_t ld_from, int64_t rows,
                       int64_t cols))
// rows × cols, densely: y[i, j] += b[i].
BK_DECLARE(void lc_add_bias(bool wide, void* y, const void* b, int64_t rows, int64_t cols))

}  // namespace bioplaus
