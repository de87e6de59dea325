// The feedback matrix B as a formula: what the kernels of every backend are told, and the element formulas they share.
//
//     entries    no sign source    sign source sgn (a weight, or packed signs)
//     constant   ±s (random bits)  s·sgn
//     stored     s·M               sgn·|s·M|
//     uniform    s·u               sgn·|s·u|
//     normal     s·n               sgn·|s·n|
//
// All in acc = float64 for a float64 output, else float32; one rounding to the output's dtype at the end.
#pragma once

#include <math.h>
#include <stdint.h>

#include "philox.h"

#if defined(__GLIBC__) && defined(__x86_64__) && !defined(__CUDACC__)
// That of glibc 2.29 differs in errno alone; under the older name a wheel runs from 2.28 on.
__asm__(".symver log,log@GLIBC_2.2.5");
#endif

namespace bioplaus {

enum class DType : int32_t { Float32, Float64, BFloat16, Float16 };
constexpr int64_t size_of(DType dtype) { return dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2; }

enum class Entries : int32_t { Constant, Stored, Uniform, Normal };

// Column dims left after those that are adjacent in memory are merged; a 3-D locally-connected weight has 7 unmerged.
constexpr int kMaxColumnDims = 12;

// A strided (rows, columns) operand. `data` is null when the operand is absent.
struct Operand {
  void* data;
  DType dtype;
  bool dense;  // columns of a row are adjacent: element (i, j) lies at i·row_stride + j
  int64_t row_stride;
  int64_t stride[kMaxColumnDims];
};

struct FeedbackParams {
  int64_t rows;
  int64_t cols;
  int32_t column_dims;
  int64_t column_size[kMaxColumnDims];  // of the column dims, slowest first
  Operand weight;
  Operand magnitude;
  Operand out;
  const int32_t* signs;  // packed planes (see packed_signs.h), or null
  const int64_t* key;    // (version, key, stream), or null
  Entries entries;
  double scale;
};

// Logical column index → offset within the row.
BK_INLINE int64_t column_offset(const FeedbackParams& p, const Operand& x, int64_t j) {
  if (x.dense) {
    return j;
  }
  int64_t offset = 0;
  for (int d = p.column_dims - 1; d > 0; --d) {
    offset += (j % p.column_size[d]) * x.stride[d];
    j /= p.column_size[d];
  }
  return offset + j * x.stride[0];
}

// torch.sign: 0 for ±0 and for NaN.
template <typename acc_t, typename T>
BK_INLINE acc_t sign_of(T x) {
  return static_cast<acc_t>(x > T(0)) - static_cast<acc_t>(x < T(0));
}

// A uniform draw is an integer in [−2²³, 2²³) times s·2⁻²³: one rounding, so that the backends agree on bits.
template <typename acc_t>
BK_INLINE acc_t uniform_scale(double scale) {
  return static_cast<acc_t>(scale) * acc_t(1.0 / 8388608.0);
}

template <typename acc_t>
BK_INLINE acc_t uniform(uint32_t word, acc_t scale) {
  return static_cast<acc_t>(static_cast<int32_t>(word >> 8) - (1 << 23)) * scale;
}

// Box and Muller: two words → two standard normals. u1 is in (0, 1], so that its logarithm is finite.
BK_INLINE void normal_pair(uint32_t wa, uint32_t wb, float& na, float& nb) {
  const float u1 = static_cast<float>((wa >> 8) + 1) * (1.0f / 16777216.0f);
  const float u2 = static_cast<float>(wb >> 8) * (1.0f / 16777216.0f);
  const float r = sqrtf(-2.0f * logf(u1));
  const float angle = 6.283185307179586f * u2;
  na = r * cosf(angle);
  nb = r * sinf(angle);
}

BK_INLINE void normal_pair(uint32_t wa, uint32_t wb, double& na, double& nb) {
  const double u1 = static_cast<double>((wa >> 8) + 1) * (1.0 / 16777216.0);
  const double u2 = static_cast<double>(wb >> 8) * (1.0 / 16777216.0);
  const double r = sqrt(-2.0 * log(u1));
  const double angle = 6.283185307179586 * u2;
  na = r * cos(angle);
  nb = r * sin(angle);
}

}  // namespace bioplaus
