#include "gemm.h"

#include <ATen/Context.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

// A private header of torch, included here and nowhere else.
#include <ATen/native/CPUBlas.h>

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

// The micro-kernel's offsets have 32 bits: calls f(first row, rows, first term, terms) for parts within them.
template <typename T, typename F>
void in_reach(int64_t m, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const F& f) {
  const auto fit = [](int64_t bytes, int64_t count) {
    constexpr int64_t kMost = int64_t{1} << 30;
    // An even number, as terms may be pairs.
    return bytes * count <= kMost ? std::max<int64_t>(count, 1) : std::max<int64_t>(kMost / bytes / 2 * 2, 2);
  };
  const int64_t rows = fit(std::max(lda * int64_t{sizeof(T)}, ldc * int64_t{sizeof(float)}), m);
  const int64_t terms = fit(ldb * int64_t{sizeof(T)}, k);
  for (int64_t i = 0; i < m; i += rows) {
    for (int64_t l = 0; l < k; l += terms) {
      f(i, std::min(rows, m - i), l, std::min(terms, k - l));
    }
  }
}

#if defined(BK_X86_PRODUCT_LEVELS) && defined(CPUBLAS_BRGEMM_BF16BF16F32)
// Whether torch's micro-kernel takes bfloat16 in pairs where the processor multiplies it, with tile units or without:
// not if torch was built without oneDNN's, which its packing, for tile units alone, would not tell.
bool takes_pairs() {
  static const bool takes = [] {
    const at::BFloat16 zeros[2 * 16] = {};
    float sums[16];
    try {
      cpublas::brgemm(1, 16, 2, 2, 16, 16, /*add_C=*/false, zeros, zeros, sums, /*is_vnni=*/true);
      cpublas::brgemm_release(/*is_vnni=*/true);
      return true;
    } catch (const std::exception&) {
      return false;
    }
  }();
  return takes;
}
#endif

}  // namespace

void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
          int64_t ldc, bool accumulate) {
#if defined(CPUBLAS_BRGEMM_F32F32F32)
  in_reach<float>(m, k, lda, ldb, ldc, [&](int64_t i, int64_t rows, int64_t l, int64_t terms) {
    // Falls back to the BLAS library by itself.
    cpublas::brgemm(rows, n, terms, lda, ldb, ldc, accumulate || l > 0, a + i * lda + l, b + l * ldb, c + i * ldc,
                    /*is_vnni=*/false);
  });
#else
  plain_gemm(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
#endif
}

void gemm(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb, double* c,
          int64_t ldc, bool accumulate) {
  plain_gemm(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

bool gemm_in_order() {
#if defined(CPUBLAS_BRGEMM_F32F32F32)
  return at::globalContext().userEnabledMkldnn() && product_level() >= ProductLevel::AVX2;
#else
  return true;
#endif
}

bool blas_is_narrow() {
#if defined(BK_X86_LEVELS)
  static const bool narrow = product_level() >= ProductLevel::AVX512 && at::hasMKL() && !__builtin_cpu_is("intel");
  return narrow && gemm_in_order();
#else
  return false;
#endif
}

bool half_units(at::ScalarType dtype) {
  return at::globalContext().userEnabledMkldnn() && half_instructions(dtype == at::kBFloat16);
}

bool torch_takes_pairs(at::ScalarType dtype) {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(CPUBLAS_BRGEMM_F16F16F32)
  return (dtype == at::kBFloat16 || dtype == at::kHalf) && cpublas::could_pack(dtype);
#else
  return false;
#endif
}

bool half_gemm_available(at::ScalarType dtype) {
#if defined(BK_X86_PRODUCT_LEVELS) && defined(CPUBLAS_BRGEMM_BF16BF16F32)
  if (dtype == at::kBFloat16) {
    return half_units(dtype) && takes_pairs();
  }
#endif
  return torch_takes_pairs(dtype);
}

void half_gemm(at::ScalarType dtype, int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda,
               const uint16_t* packed, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(CPUBLAS_BRGEMM_F16F16F32)
  in_reach<uint16_t>(m, k, lda, ldb, ldc, [&](int64_t i, int64_t rows, int64_t l, int64_t terms) {
    const auto product = [&]<typename T>(T) {
      cpublas::brgemm(rows, n, terms, lda, ldb, ldc, accumulate || l > 0, reinterpret_cast<const T*>(a) + i * lda + l,
                      reinterpret_cast<const T*>(packed) + l * ldb, c + i * ldc, /*is_vnni=*/true);
    };
    dtype == at::kBFloat16 ? product(at::BFloat16()) : product(at::Half());
  });
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
