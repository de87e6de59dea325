// Digits of feedback_mm_product_kernel.cpp: a row of dY as fixed point, cut into the tiles of the left operand; and the
// sizes of tiles that all of that file shares.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(BK_EMULATED_AMX) && defined(__AMX_INT8__)
#include "../../python_tests/amx/emulated.h"
#endif

#include "../common/packed_signs.h"
#include "convert.h"
#include "draw.h"
#include "feedback_mm.h"
#include "strided.h"

namespace bioplaus {
namespace BK_LEVEL {
namespace {

// Where one factor of the byte product is unsigned the operand holds σ + 1, and Σd is taken off at the end.
#if defined(__AMX_INT8__)
using Digit = int8_t;
constexpr int kBias = 0;
#elif defined(__AVX512VNNI__) || defined(__AVXVNNI__)
using Digit = int8_t;
constexpr int kBias = 1;
#else
using Digit = int16_t;
constexpr int kBias = 0;
#endif

constexpr int kDigitBits = 8 * sizeof(Digit);
constexpr int kDepth = 64 / sizeof(Digit);  // entries along K in a tile
constexpr int kSteps = 16;                  // groups of 4 bytes along K in a tile
constexpr int kGroup = kDepth / kSteps;     // entries in a group
constexpr int kColumns = 16;                // of dX in a tile of the operand
constexpr int kGroups = 32 / kColumns;      // tiles of the operand side by side: the columns of a word of signs
constexpr int kTileInts = kTileBytes / 4;   // 16 rows × 16 columns of sums

// The operand is formed for kFormBlocks tiles along K, which stay in the L1 cache; sums stay int32 for kPassBlocks
// tiles; kRowTiles tiles of dY's digits of that depth stay in the L2 cache.
constexpr int64_t kFormBlocks = 8;
constexpr int64_t kPassBlocks = 4096 / kDepth;
constexpr int64_t kRowTiles = 16;

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

float power_of_two(int e) { return float_of(static_cast<uint32_t>(e + 127) << 23); }

double double_power_of_two(int e) {
  const uint64_t bits = static_cast<uint64_t>(e + 1023) << 52;
  double x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// The row as adjacent floats.
template <typename T>
void to_floats(const T* x, int64_t n, int64_t stride, float* to) {
  if (stride == 1) {
    for (int64_t t = 0; t < n; ++t) {
      to[t] = to_float(x[t]);
    }
  } else {
    for (int64_t t = 0; t < n; ++t) {
      to[t] = to_float(x[t * stride]);
    }
  }
}

inline const float* row_floats(const SignProduct& p, int64_t row, float* scratch) {
  const char* x = static_cast<const char*>(p.grad) + row * p.row_stride * size_of(p.dtype);
  switch (p.dtype) {
    case DType::BFloat16:
      to_floats(reinterpret_cast<const BF16*>(x), p.depth, p.column_stride, scratch);
      return scratch;
    case DType::Float16:
      to_floats(reinterpret_cast<const FP16*>(x), p.depth, p.column_stride, scratch);
      return scratch;
    default:
      if (p.column_stride == 1) {
        return reinterpret_cast<const float*>(x);
      }
      to_floats(reinterpret_cast<const float*>(x), p.depth, p.column_stride, scratch);
      return scratch;
  }
}

// Of a row: Σq, where the operand is biased; of two bytes Σ|y| and Σ(y − q)² for y rounded to q, floats in 16 lanes in
// a fixed order, so that every level comes to the same answer; where NORM, Σ⌊q/2²⁰⌋².
#if defined(__AVX512VNNI__)
struct Totals {
  __m512 size = _mm512_setzero_ps();
  __m512 lost = _mm512_setzero_ps();
  __m512i digits[4] = {};
  __m512i high = _mm512_setzero_si512();

  int64_t norm() const { return _mm512_reduce_add_epi64(high); }
  int64_t sum() const {
    int64_t x = 0;
    for (int d = 3; d >= 0; --d) {
      x = (x << kDigitBits) + _mm512_reduce_add_epi32(digits[d]);
    }
    return x;
  }
};

// Adding 2⁷ to each digit but the highest carries as rounding to the nearest does; the bytes are then 2⁷ too large.
template <int BYTES, bool NORM = false>
void cut(const float* x, float up, float more, Digit* to, Totals& totals) {
  const __m512i carry = _mm512_set1_epi32(BYTES == 2 ? 0x80 : 0x808080);
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i q[4];
  __m512 size[4], lost[4];
  for (int i = 0; i < 4; ++i) {
    const __m512 y =
        _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), _mm512_set1_ps(up)), _mm512_set1_ps(more));
    q[i] = _mm512_cvtps_epi32(y);
    if (BYTES == 2) {
      const __m512 r = _mm512_sub_ps(y, _mm512_cvtepi32_ps(q[i]));
      size[i] = _mm512_abs_ps(y);
      lost[i] = _mm512_mul_ps(r, r);
    }
    if (NORM) {
      const __m512i high = _mm512_srai_epi16(_mm512_srli_epi32(q[i], 16), 4);
      const __m512i squares = _mm512_madd_epi16(high, high);
      totals.high = _mm512_add_epi64(
          totals.high, _mm512_add_epi64(_mm512_srli_epi64(squares, 32), _mm512_maskz_mov_epi32(0x5555, squares)));
    }
    q[i] = _mm512_shuffle_epi8(_mm512_xor_si512(_mm512_add_epi32(q[i], carry), carry), bytes);
  }
  for (int i = 0; BYTES == 2 && i < 4; i += 2) {
    totals.size = _mm512_add_ps(totals.size, _mm512_add_ps(size[i], size[i + 1]));
    totals.lost = _mm512_add_ps(totals.lost, _mm512_add_ps(lost[i], lost[i + 1]));
  }
  // Double words 4·lane + d hold digit d of four entries: a transposition.
  const auto pick = [](int d) {
    return _mm512_add_epi32(_mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29),
                            _mm512_set1_epi32(d));
  };
  for (int d = 0; d < BYTES; d += 2) {
    const __m512i left = _mm512_permutex2var_epi32(q[0], pick(d), q[1]);
    const __m512i right = _mm512_permutex2var_epi32(q[2], pick(d), q[3]);
    const __m512i low = _mm512_shuffle_i64x2(left, right, 0x44);
    const __m512i high = _mm512_shuffle_i64x2(left, right, 0xEE);
    _mm512_store_si512(to + d * kDepth, low);
    _mm512_store_si512(to + (d + 1) * kDepth, high);
    if (kBias) {
      totals.digits[d] = _mm512_dpbusd_epi32(totals.digits[d], _mm512_set1_epi8(1), low);
      totals.digits[d + 1] = _mm512_dpbusd_epi32(totals.digits[d + 1], _mm512_set1_epi8(1), high);
    }
  }
}

float in_order(const __m512& lanes, int l) { return reinterpret_cast<const float*>(&lanes)[l]; }
#else
struct Totals {
  float size[16] = {};
  float lost[16] = {};
  int64_t digits = 0;
  int64_t high = 0;

  int64_t norm() const { return high; }
  int64_t sum() const { return digits; }
};

template <int BYTES, bool NORM = false>
void cut(const float* x, float up, float more, Digit* to, Totals& totals) {
  constexpr int kCount = BYTES / sizeof(Digit);
  int32_t q[kDepth];
  float y[kDepth];
  for (int t = 0; t < kDepth; ++t) {
    y[t] = x[t] * up * more;
  }
  for (int t = 0; t < kDepth; ++t) {
    q[t] = static_cast<int32_t>(__builtin_rintf(y[t]));
  }
  for (int b = 0; BYTES == 2 && b < kDepth; b += 32) {
    float size[32];
    float lost[32];
    for (int t = 0; t < 32; ++t) {
      const float r = y[b + t] - static_cast<float>(q[b + t]);
      size[t] = __builtin_fabsf(y[b + t]);
      lost[t] = r * r;
    }
    for (int l = 0; l < 16; ++l) {
      totals.size[l] += size[l] + size[l + 16];
      totals.lost[l] += lost[l] + lost[l + 16];
    }
  }
  if (kBias) {
    for (int t = 0; t < kDepth; ++t) {
      totals.digits += q[t];
    }
  }
  if (NORM) {
    int32_t high = 0;
    for (int t = 0; t < kDepth; ++t) {
      high += (q[t] >> 20) * (q[t] >> 20);
    }
    totals.high += high;
  }
  for (int d = 0; d < kCount; ++d) {
    for (int t = 0; t < kDepth; ++t) {
      to[d * kDepth + t] = static_cast<Digit>(q[t]);
    }
    for (int t = 0; t < kDepth; ++t) {
      q[t] = (q[t] + (1 << (kDigitBits - 1))) >> kDigitBits;
    }
  }
}

float in_order(const float* lanes, int l) { return lanes[l]; }
#endif

// The bits of the largest magnitude.
uint32_t largest(const float* x, int64_t n) {
  uint32_t top = 0;
  for (int64_t t = 0; t < n; ++t) {
    const uint32_t a = bits_of(x[t]) & 0x7FFFFFFFu;
    top = top < a ? a : top;
  }
  return top;
}

bool is_finite(uint32_t top) { return top < 0x7F800000u; }

// Fixed point has its last place at 2^−shift: |x| < 2^e, and balanced digits reach 0x7F7F… only, so that there is one
// bit less where the largest entry would exceed it.
template <int BYTES>
int shift_of(uint32_t top) {
  int e = static_cast<int>(top >> 23) - 126;
  if (top < (1u << 23)) {
    e = -126 - (top ? __builtin_clz(top) - 9 : 0);
  }
  constexpr double kLimit = BYTES == 2 ? 0x7F7F.0p0 : 0x7F7F7F00.0p0;
  const int shift = 8 * BYTES - 1 - e;
  return shift - (static_cast<double>(float_of(top)) * double_power_of_two(shift) > kLimit);
}

// Digits of n entries, a tile's worth at a time, block_stride bytes apart. 2^shift can exceed a float's range, as rows
// can be subnormal: in two steps, both exact for what stays above 1/2.
template <int BYTES, bool NORM = false>
void cut_row(const float* x, int64_t n, int shift, int8_t* to, int64_t block_stride, Totals& totals) {
  const int first = shift < 127 ? shift : 127;
  const float up = power_of_two(first);
  const float more = power_of_two(shift - first);
  for (int64_t t = 0; t < n; t += kDepth, to += block_stride) {
    Digit* digits = reinterpret_cast<Digit*>(to);
    if (t + kDepth <= n) {
      cut<BYTES, NORM>(x + t, up, more, digits, totals);
    } else {
      float padded[kDepth] = {};
      __builtin_memcpy(padded, x + t, static_cast<size_t>(n - t) * sizeof(float));
      cut<BYTES, NORM>(padded, up, more, digits, totals);
    }
  }
}

// One row of dY: `to` is the row's place in its first tile. One that is not finite has digits of 0.
template <int BYTES>
void quantise_row(const SignProduct& p, const float* x, int8_t* to, FixedPoint& fixed) {
  const uint32_t top = largest(x, p.depth);
  const bool finite = is_finite(top);
  const int shift = shift_of<BYTES>(finite ? top : 0);
  Totals totals;
  if (finite) {
    cut_row<BYTES>(x, p.depth, shift, to, kTileBytes, totals);
  } else {
    for (int64_t b = 0; b < divide_up(p.depth, kDepth); ++b) {
      __builtin_memset(to + b * kTileBytes, 0, 64 * (BYTES / sizeof(Digit)));
    }
  }
  fixed.unit = finite ? double_power_of_two(-shift) : __builtin_nan("");
  fixed.sum = static_cast<double>(totals.sum());
  fixed.lossy = false;
  if (BYTES == 4) {
    return;
  }
  double size = 0;
  double lost = 0;
  for (int l = 0; l < 16; ++l) {
    size += static_cast<double>(in_order(totals.size, l));
    lost += static_cast<double>(in_order(totals.lost, l));
  }
  // The errors of a row add up to about √lost. What may be lost is 2^-14 of √K entries of mean size, not of the row's
  // norm: that may be a few large entries', which a column can cancel or have zeros for.
  fixed.lossy = !(lost * static_cast<double>(p.depth) <= 0x1p-28 * size * size);
}

}  // namespace
}  // namespace BK_LEVEL
}  // namespace bioplaus
