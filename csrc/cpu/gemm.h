// Products of small row-major tiles, C (m×n) = A (m×k) · B (k×n), or C += A · B: one thread, no copy, any leading
// dimension. In float32 oneDNN's micro-kernel where the processor and torch's settings have it (AVX2, AVX-512), else
// the BLAS library's product; in float64 a plain loop.
//
// Every (m, n, k, leading dimensions, accumulate) is a kernel compiled at its first use in a thread and kept for good:
// callers pad ragged edges and keep to few shapes.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "level.h"

namespace bioplaus {

void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
          int64_t ldc, bool accumulate);
void gemm(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb, double* c,
          int64_t ldc, bool accumulate);

// Whether float32's micro-kernel is there: it sums along K in order, whatever the shape of the product.
bool gemm_in_order();

// Whether the BLAS library's float32 products leave half of the processor's units idle, and gemm's do not: MKL has
// AVX-512 for Intel's processors alone.
bool blas_is_narrow();

// Whether tiles of bfloat16 (AVX512_BF16) or float16 (AMX_FP16) can be multiplied as they are, into float32. Asked anew
// for each op, as torch.backends.mkldnn can be switched off. Where not, convert both tiles and multiply float32.
bool half_gemm_available(at::ScalarType dtype);

// Whether torch's products of whole matrices read a row of bfloat16 or float16 in pairs, past the end of an odd one
// (tile units).
bool torch_takes_pairs(at::ScalarType dtype);

// Whether torch's products of whole matrices of bfloat16 or float16 are by the processor's own instructions for them.
// Else, in loops or by emulation, they take many times as long as float32's.
bool half_units(at::ScalarType dtype);

// B (k×n, 16-bit elements) as half_gemm wants it: rows in pairs, b[k, j] and b[k + 1, j] side by side, an odd last row
// paired with zeros; 2·ceil(k/2)·n elements.
BK_DECLARE(void pack_pairs(int64_t k, int64_t n, const uint16_t* b, int64_t ldb, uint16_t* packed))

// `k` is even: pad A and B with zeros. `ldb` is the number of pairs from one pair of rows to the next. `dtype` is one
// that half_gemm_available answered yes to.
void half_gemm(at::ScalarType dtype, int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda,
               const uint16_t* packed, int64_t ldb, float* c, int64_t ldc, bool accumulate);

// Each thread calls it after its last half_gemm of an op: gives the tile registers back.
void half_gemm_release();

}  // namespace bioplaus
