// The right operand of feedback_mm_product_kernel.cpp: tiles of digits of σ, unfolded from packed signs.
#pragma once

#include "feedback_mm_digits.h"

namespace bioplaus {
namespace BK_LEVEL {
namespace {

// Four words of four rows, `stride` words apart → the four rows of each word, `rows` words apart.
void transpose(const int32_t* from, int64_t stride, int32_t* to, int64_t rows) {
#if defined(__SSE2__)
  const auto row = [&](int64_t r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r * stride)); };
  const auto store = [&](int64_t w, __m128i x) { _mm_store_si128(reinterpret_cast<__m128i*>(to + w * rows), x); };
  const __m128i a = _mm_unpacklo_epi32(row(0), row(1));
  const __m128i b = _mm_unpacklo_epi32(row(2), row(3));
  const __m128i c = _mm_unpackhi_epi32(row(0), row(1));
  const __m128i d = _mm_unpackhi_epi32(row(2), row(3));
  store(0, _mm_unpacklo_epi64(a, b));
  store(1, _mm_unpackhi_epi64(a, b));
  store(2, _mm_unpacklo_epi64(c, d));
  store(3, _mm_unpackhi_epi64(c, d));
#else
  for (int64_t w = 0; w < 4; ++w) {
    for (int64_t r = 0; r < 4; ++r) {
      to[w * rows + r] = from[r * stride + w];
    }
  }
#endif
}

// Four words of up to 64 rows; the rows that are missing become 0.
void arrange_words(const int32_t* from, int64_t width, int64_t rows, int32_t* to, int64_t to_rows) {
  for (int64_t i = 0; i < kTileRows; i += 4) {
    if (i + 4 <= rows) {
      transpose(from + i * width, width, to + i, to_rows);
    } else {
      int32_t edge[16] = {};
      for (int64_t r = 0; i + r < rows; ++r) {
        __builtin_memcpy(edge + 4 * r, from + (i + r) * width, 4 * sizeof(int32_t));
      }
      transpose(edge, 4, to + i, to_rows);
    }
  }
}

#if defined(__AVX2__)
// Four rows of 32 columns are 16 bytes; one shuffle brings to each byte of a tile row the byte that holds its bit.
// kPicks[part][half]: rows kGroup·part …, columns 16·half … of those.
struct Unfold {
  alignas(64) uint8_t pick[sizeof(Digit)][2][64];
  alignas(64) uint8_t bit[64];
};

constexpr Unfold unfold_table() {
  Unfold u{};
  for (int x = 0; x < 64; ++x) {
    const int column = x / 4;
    const int row = x % 4 / static_cast<int>(sizeof(Digit));
    const bool first_byte = x % static_cast<int>(sizeof(Digit)) == 0;
    for (int part = 0; part < static_cast<int>(sizeof(Digit)); ++part) {
      for (int half = 0; half < 2; ++half) {
        u.pick[part][half][x] =
            first_byte ? static_cast<uint8_t>(4 * (kGroup * part + row) + 2 * half + column / 8) : uint8_t{0x80};
      }
    }
    u.bit[x] = first_byte ? static_cast<uint8_t>(1 << column % 8) : uint8_t{0};
  }
  return u;
}

constexpr Unfold kUnfold = unfold_table();

#if defined(__AVX512BW__)
using Vector = __m512i;
Vector load(const void* from) { return _mm512_load_si512(from); }
void store(void* to, Vector x) { _mm512_store_si512(to, x); }
Vector broadcast(const int32_t* quad) {
  return _mm512_maskz_broadcast_i32x4(0xFFFF, _mm_load_si128(reinterpret_cast<const __m128i*>(quad)));
}

template <bool ZEROS>
Vector entries(Vector negative, Vector nonzero, Vector pick, Vector bit) {
  const Vector n = _mm512_shuffle_epi8(negative, pick);
  const Vector z = ZEROS ? _mm512_shuffle_epi8(nonzero, pick) : n;
  if constexpr (sizeof(Digit) == 1) {
    const Vector sign = _mm512_mask_blend_epi8(_mm512_test_epi8_mask(n, bit), _mm512_set1_epi8(1 + kBias),
                                               _mm512_set1_epi8(-1 + kBias));
    return ZEROS ? _mm512_mask_blend_epi8(_mm512_test_epi8_mask(z, bit), _mm512_set1_epi8(kBias), sign) : sign;
  } else {
    const Vector sign =
        _mm512_mask_blend_epi16(_mm512_test_epi16_mask(n, bit), _mm512_set1_epi16(1), _mm512_set1_epi16(-1));
    return ZEROS ? _mm512_maskz_mov_epi16(_mm512_test_epi16_mask(z, bit), sign) : sign;
  }
}
#else
using Vector = __m256i;
Vector load(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }
void store(void* to, Vector x) { _mm256_store_si256(static_cast<__m256i*>(to), x); }
Vector broadcast(const int32_t* quad) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(quad)));
}

Vector has_bit(Vector x, Vector pick, Vector bit) {
  const Vector picked = _mm256_and_si256(_mm256_shuffle_epi8(x, pick), bit);
  return sizeof(Digit) == 1 ? _mm256_cmpeq_epi8(picked, bit) : _mm256_cmpeq_epi16(picked, bit);
}

template <bool ZEROS>
Vector entries(Vector negative, Vector nonzero, Vector pick, Vector bit) {
  const Vector one = sizeof(Digit) == 1 ? _mm256_set1_epi8(1) : _mm256_set1_epi16(1);
  Vector sign = _mm256_or_si256(has_bit(negative, pick, bit), one);
  if (ZEROS) {
    sign = _mm256_and_si256(sign, has_bit(nonzero, pick, bit));
  }
  return kBias ? _mm256_add_epi8(sign, one) : sign;
}
#endif

// The operand of 4 rows × 32 columns.
template <bool ZEROS>
void form_quad(const int32_t* negative, const int32_t* nonzero, int8_t* to, int64_t group_stride) {
  const Vector n = broadcast(negative);
  const Vector z = ZEROS ? broadcast(nonzero) : n;
  for (int half = 0; half < kGroups; ++half) {
    for (int part = 0; part < static_cast<int>(sizeof(Digit)); ++part) {
      for (int x = 0; x < 64; x += sizeof(Vector)) {
        store(to + half * group_stride + 64 * part + x,
              entries<ZEROS>(n, z, load(kUnfold.pick[part][half] + x), load(kUnfold.bit + x)));
      }
    }
  }
}
#else
template <bool ZEROS>
void form_quad(const int32_t* negative, const int32_t* nonzero, int8_t* to, int64_t group_stride) {
  for (int r = 0; r < 4; ++r) {
    for (int j = 0; j < 32; ++j) {
      const uint32_t n = static_cast<uint32_t>(negative[r]) >> j & 1u;
      const uint32_t z = ZEROS ? static_cast<uint32_t>(nonzero[r]) >> j & 1u : 1u;
      Digit* tile_row = reinterpret_cast<Digit*>(to + j / kColumns * group_stride + 64 * (r / kGroup));
      tile_row[j % kColumns * kGroup + r % kGroup] = static_cast<Digit>((z ? 1 - 2 * static_cast<int>(n) : 0) + kBias);
    }
  }
}
#endif

template <bool ZEROS>
void form_tile(const int32_t* negative, const int32_t* nonzero, int8_t* to, int64_t group_stride) {
  for (int quad = 0; quad < kDepth / 4; ++quad) {
    form_quad<ZEROS>(negative + 4 * quad, nonzero + 4 * quad, to + quad * (4 / kGroup) * 64, group_stride);
  }
}

// Tiles of the operand for `blocks` tiles along K from entry k on, and the columns of one word: kGroups runs of
// `blocks` tiles.
void form_operand(const SignColumns& s, int64_t word, int64_t k, int64_t blocks, int8_t* operand) {
  const int64_t group_stride = blocks * kTileBytes;
  const int32_t* negative = s.negative + word * s.rows;
  const int32_t* nonzero = s.nonzero + word * s.rows;
  const uint8_t* zeros = s.zeros + word * (s.rows / kTileRows);
  for (int64_t b = 0; b < blocks; ++b, k += kDepth, operand += kTileBytes) {
    if (zeros[k / kTileRows]) {
      form_tile<true>(negative + k, nonzero + k, operand, group_stride);
    } else {
      form_tile<false>(negative + k, nonzero + k, operand, group_stride);
    }
  }
}

}  // namespace
}  // namespace BK_LEVEL
}  // namespace bioplaus
