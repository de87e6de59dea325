// pack_signs on the CPU.
//
// Roofline: memory. Each element is read once (4 bytes in fp32) and 1/4 byte is written; two comparisons and four bit
// operations per element. The share reached: `python -m bench run --op feedback_weight`.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../common/packed_signs.h"
#include "bits.h"
#include "convert.h"
#include "pack_signs.h"
#include "strided.h"

namespace bioplaus {
namespace BK_LEVEL {
namespace {

// Each lane's comparison is masked by the lane's own bit, and all are combined by OR.
template <typename T>
SignWord full_word(const T* w) {
  uint32_t negative = 0;
  uint32_t positive = 0;
// Without the pragma the compiler unrolls the loop whole and then finds nothing to vectorise.
#pragma omp simd reduction(| : negative, positive)
  for (int l = 0; l < 32; ++l) {
    const auto v = to_float(w[l]);
    negative |= v < 0 ? kBit[l] : 0u;
    positive |= v > 0 ? kBit[l] : 0u;
  }
  return {negative, negative | positive};
}

// Compilers do not find the instructions that make a mask of a comparison.
#if defined(__AVX512F__)
SignWord signs_of(__m512 a, __m512 b) {
  const __m512 zero = _mm512_setzero_ps();
  const uint32_t negative =
      _mm512_cmp_ps_mask(a, zero, _CMP_LT_OQ) | static_cast<uint32_t>(_mm512_cmp_ps_mask(b, zero, _CMP_LT_OQ)) << 16;
  const uint32_t nonzero =
      _mm512_cmp_ps_mask(a, zero, _CMP_NEQ_OQ) | static_cast<uint32_t>(_mm512_cmp_ps_mask(b, zero, _CMP_NEQ_OQ)) << 16;
  return {negative, nonzero};
}

SignWord full_word(const float* w) { return signs_of(_mm512_loadu_ps(w), _mm512_loadu_ps(w + 16)); }

SignWord half_word(const void* w, int16_t infinity) {
  const __m512i x = _mm512_loadu_si512(w);
  const __m512i size = _mm512_and_si512(x, _mm512_set1_epi16(0x7FFF));
  const uint32_t nonzero =
      _mm512_cmplt_epu16_mask(_mm512_sub_epi16(size, _mm512_set1_epi16(1)), _mm512_set1_epi16(infinity));
  return {_mm512_movepi16_mask(x) & nonzero, nonzero};
}
#elif defined(__AVX2__)
SignWord full_word(const float* w) {
  SignWord x{0, 0};
  for (int l = 0; l < 32; l += 8) {
    const __m256 v = _mm256_loadu_ps(w + l);
    const __m256 zero = _mm256_setzero_ps();
    x.negative |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, zero, _CMP_LT_OQ))) << l;
    x.nonzero |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, zero, _CMP_NEQ_OQ))) << l;
  }
  return x;
}

SignWord half_word(const void* w, int16_t infinity) {
  const auto* from = static_cast<const __m256i*>(w);
  const __m256i a = _mm256_loadu_si256(from), b = _mm256_loadu_si256(from + 1);
  const auto nonzero = [&](__m256i x) {
    const __m256i size = _mm256_and_si256(x, _mm256_set1_epi16(0x7FFF));
    const __m256i most = _mm256_set1_epi16(static_cast<int16_t>(infinity + 1));
    return _mm256_and_si256(_mm256_cmpgt_epi16(size, _mm256_setzero_si256()), _mm256_cmpgt_epi16(most, size));
  };
  const auto bits = [](__m256i x, __m256i y) {
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(x, y), 0xD8);
    return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
  };
  const uint32_t of = bits(nonzero(a), nonzero(b));
  return {bits(a, b) & of, of};
}
#endif

#if defined(__AVX2__)
// What is neither 0 nor a NaN is, without its sign and as an integer, from 1 to infinity.
SignWord full_word(const BF16* w) { return half_word(w, 0x7F80); }
SignWord full_word(const FP16* w) { return half_word(w, 0x7C00); }
#endif

template <typename T>
SignWord ragged_word(const T* w, int64_t n) {
  T padded[32] = {};
  for (int64_t l = 0; l < n; ++l) {
    padded[l] = w[l];
  }
  return full_word(padded);
}

// Bits of a word of a row that has so many entries left.
uint32_t inside(int64_t left) { return left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0; }

// Which words of a tile have a sign that is 0.
void store_flags(const FeedbackParams& p, int32_t* planes, int64_t row, int64_t first, int64_t words,
                 const uint32_t* zero) {
  int32_t* flags = planes + (2 * p.rows + row / kTileRows) * sign_words(p.cols) + first / 32;
  for (int64_t q = 0; q < words; ++q) {
    flags[q] = zero[q] != 0;
  }
}

// Adjacent rows at once, as memory is read faster in several runs.
constexpr int64_t kRuns = 4;
constexpr int64_t kPrefetchRows = 8;
constexpr int64_t kPrefetchBytes = 2048;
// Columns at a time of what is not adjacent.
constexpr int64_t kGathered = 512;

// Columns first … first + n − 1 of rows begin … end − 1, and the flags of their tile.
template <typename T>
void pack_tile(const FeedbackParams& p, int32_t* planes, int64_t begin, int64_t end, int64_t first, int64_t n) {
  alignas(64) uint64_t scratch[kGathered];
  const int64_t width = sign_words(p.cols), words = sign_words(n);
  uint32_t zero[kPackColumns / 32] = {};
  const T* readable = p.weight.dense
                          ? static_cast<const T*>(p.weight.data) + (p.rows - 1) * p.weight.row_stride + p.cols
                          : reinterpret_cast<const T*>(scratch) + kGathered;
  // Beyond a strip's last rows lie the next strip's; beyond the last of a matrix of few, nothing that is read.
  const bool prefetched = p.weight.dense && p.rows > kPrefetchRows;
  const int64_t ahead =
      n == p.weight.row_stride ? kPrefetchBytes / static_cast<int64_t>(sizeof(T)) : kPrefetchRows * p.weight.row_stride;
  for (int64_t i = begin, rows; i < end; i += rows) {
    rows = p.weight.dense && end - i >= kRuns ? kRuns : 1;
    const T* run = static_cast<const T*>(gather(p, p.weight, i, first, n, scratch));
    int32_t* negative = planes + i * width + first / 32;
    int32_t* nonzero = planes + (p.rows + i) * width + first / 32;
    for (int64_t q = 0; q < words; ++q) {
      const int64_t left = n - 32 * q;
      const uint32_t used = inside(left);
      for (int64_t r = 0; r < rows; ++r) {
        const T* w = run + r * p.weight.row_stride + 32 * q;
        SignWord x{0, 0};
        if (left > 0) {
          if (prefetched) {
            // Hardware alone is slower, most where rows are short and far apart.
            for (int64_t l = 0; l < 32; l += 64 / static_cast<int64_t>(sizeof(T))) {
              __builtin_prefetch(w + ahead + l);
            }
          }
          // Beside the end of a row lie the next row's entries: read them too, which is faster than to copy the end.
          x = w + 32 <= readable ? full_word(w) : ragged_word(w, left);
        }
        negative[r * width + q] = static_cast<int32_t>(x.negative & used);
        nonzero[r * width + q] = static_cast<int32_t>(x.nonzero & used);
        zero[q] |= ~x.nonzero & used;
      }
    }
  }
  store_flags(p, planes, begin, first, words, zero);
}

// Bit c of word r ↔ bit r of word c, in each of kBlocks squares of 32 × 32 bits side by side.
constexpr int64_t kBlocks = kGathered / 32;
template <int J>
void swap_bits(uint32_t (*x)[kBlocks], uint32_t mask) {
  for (int k = 0; k < 32; ++k) {
    for (int64_t b = 0; b < kBlocks && !(k & J); ++b) {
      const uint32_t moved = (x[k][b] >> J ^ x[k + J][b]) & mask;
      x[k + J][b] ^= moved;
      x[k][b] ^= moved << J;
    }
  }
}
void transpose_bits(uint32_t (*x)[kBlocks]) {
  swap_bits<16>(x, 0x0000FFFFu);
  swap_bits<8>(x, 0x00FF00FFu);
  swap_bits<4>(x, 0x0F0F0F0Fu);
  swap_bits<2>(x, 0x33333333u);
  swap_bits<1>(x, 0x55555555u);
}

// The same of a weight whose rows are adjacent, which is read down its columns.
template <typename T>
void pack_columns(const FeedbackParams& p, int32_t* planes, int64_t begin, int64_t end, int64_t first, int64_t n) {
  const int64_t width = sign_words(p.cols), words = sign_words(n);
  uint32_t zero[kBlocks] = {};
  for (int64_t row = begin; row < end; row += 32) {
    const int64_t rows = end - row < 32 ? end - row : 32;
    uint32_t negative[32][kBlocks] = {}, nonzero[32][kBlocks] = {};
    for (int64_t j = 0; j < n; ++j) {
      const T* w = static_cast<const T*>(p.weight.data) + row + (first + j) * p.weight.stride[0];
      const SignWord x = rows == 32 ? full_word(w) : ragged_word(w, rows);
      negative[j % 32][j / 32] = x.negative;
      nonzero[j % 32][j / 32] = x.nonzero;
    }
    transpose_bits(negative);
    transpose_bits(nonzero);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t q = 0; q < words; ++q) {
        planes[(row + r) * width + first / 32 + q] = static_cast<int32_t>(negative[r][q]);
        planes[(p.rows + row + r) * width + first / 32 + q] = static_cast<int32_t>(nonzero[r][q]);
        zero[q] |= ~nonzero[r][q] & inside(n - 32 * q);
      }
    }
  }
  store_flags(p, planes, begin, first, words, zero);
}

template <typename T>
void pack(const FeedbackParams& p, int32_t* planes, int64_t begin, int64_t end) {
  const auto min = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const int64_t column_tiles = (p.cols + kPackColumns - 1) / kPackColumns;
  const int64_t step = p.weight.dense ? kPackColumns : kGathered;
  const bool down = !p.weight.dense && p.weight.row_stride == 1 && p.column_dims == 1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / column_tiles * kTileRows, column = unit % column_tiles * kPackColumns;
    for (int64_t first = column; first < min(column + kPackColumns, p.cols); first += step) {
      (down ? pack_columns<T> : pack_tile<T>)(p, planes, row, min(row + kTileRows, p.rows), first,
                                              min(step, p.cols - first));
    }
  }
}

}  // namespace

void pack_signs(const FeedbackParams& p, int32_t* planes, int64_t begin, int64_t end) {
  switch (p.weight.dtype) {
    case DType::Float32:
      return pack<float>(p, planes, begin, end);
    case DType::Float64:
      return pack<double>(p, planes, begin, end);
    case DType::BFloat16:
      return pack<BF16>(p, planes, begin, end);
    case DType::Float16:
      return pack<FP16>(p, planes, begin, end);
  }
}

}  // namespace BK_LEVEL
}  // namespace bioplaus
