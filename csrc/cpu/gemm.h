// Products of small row-major tiles, C (m×n) = A (m×k) · B (k×n), or C += A · B: one thread, no copy, any leading
// dimension. In float32 oneDNN's micro-kernel where the processor and torch's settings have it (AVX2, AVX-512), else
// the BLAS library's product; in float64 a plain loop.
//
// Every (m, n, k, leading dimensions, accumulate) is a kernel compiled at its first use in a thread and kept for good:
// callers pad ragged edges and keep to few shapes.
#pragma once

#include <cstdint>

namespace bioplaus {

void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
          int64_t ldc, bool accumulate);
void gemm(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb, double* c,
          int64_t ldc, bool accumulate);

}  // namespace bioplaus
