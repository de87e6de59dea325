#include "gemm.h"

// A private header of torch, included here and nowhere else.
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

namespace bioplaus {

namespace cpublas = at::native::cpublas;

namespace {

// torch exports its micro-kernel product alone. One row of C stays in the L1 cache while B streams through.
template <typename T>
void plain_gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
                bool accumulate) {
  for (int64_t i = 0; i < m; ++i) {
    T* ci = c + i * ldc;
    if (!accumulate) {
      std::fill_n(ci, n, T(0));
    }
    for (int64_t l = 0; l < k; ++l) {
      const T x = a[i * lda + l];
      const T* bl = b + l * ldb;
      for (int64_t j = 0; j < n; ++j) {
        ci[j] += x * bl[j];
      }
    }
  }
}

}  // namespace

void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
          int64_t ldc, bool accumulate) {
#if defined(CPUBLAS_BRGEMM_F32F32F32)
  // Falls back to the BLAS library by itself.
  cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, /*is_vnni=*/false);
#else
  plain_gemm(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
#endif
}

void gemm(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb, double* c,
          int64_t ldc, bool accumulate) {
  plain_gemm(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

bool half_gemm_available(at::ScalarType dtype) {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(CPUBLAS_BRGEMM_F16F16F32)
  return (dtype == at::kBFloat16 || dtype == at::kHalf) && cpublas::could_pack(dtype);
#else
  return false;
#endif
}

void half_gemm(at::ScalarType dtype, int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda,
               const uint16_t* packed, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(CPUBLAS_BRGEMM_F16F16F32)
  if (dtype == at::kBFloat16) {
    cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, reinterpret_cast<const at::BFloat16*>(a),
                    reinterpret_cast<const at::BFloat16*>(packed), c, /*is_vnni=*/true);
  } else {
    cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, reinterpret_cast<const at::Half*>(a),
                    reinterpret_cast<const at::Half*>(packed), c, /*is_vnni=*/true);
  }
#else
  TORCH_INTERNAL_ASSERT(false, "half_gemm_available() is false");
#endif
}

void half_gemm_release() {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
  cpublas::brgemm_release(/*is_vnni=*/true);
#endif
}

}  // namespace bioplaus
