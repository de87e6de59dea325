// feedback_mm on the CPU for constant entries: dX = s · (dY · σ), exactly in integers.
//
// A row of dY is rounded once to fixed point relative to its largest entry: 4 bytes, or 2 for half types where that is
// enough. Its balanced digits (int8, or int16 where bytes have no good instruction) times signs are summed in int32,
// the digits' sums meet in a double that holds them exactly, and one product with the row's unit and s is rounded to
// the output. Every step but that last is exact, so every level, blocking and thread count gives the same bits.
//
// Roofline, for D digits: D·M·N·K integer multiply-adds, 1024 (AMX), 128 (AVX512_VNNI), 64 (AVX2_VNNI) a cycle, int16
// 16 (AVX2: 8/3 of a result where fp32 has 16/4) – against 32 and 16 in fp32; at few rows the sign bits that are read,
// N·K/8 bytes, and their unfolding to N·K bytes in cache, about 2 cycles per 64.
#if defined(__x86_64__)
#include <immintrin.h>
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

// The operand is formed for kBlockSteps tiles along K; sums stay int32 for kPassBlocks tiles; kRowTiles tiles of dY's
// digits of that depth stay in the L2 cache.
constexpr int64_t kFormBlocks = 8;
constexpr int64_t kPassBlocks = 4096 / kDepth;
constexpr int64_t kRowTiles = 16;

}  // namespace

int64_t tile_rows(int bytes) { return 16 * static_cast<int64_t>(sizeof(Digit)) / bytes; }

namespace {

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- digits ---

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

const float* row_floats(const SignProduct& p, int64_t row, float* scratch) {
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

// Sums in a fixed order of 16 lanes, so that every level comes to the same answer.
struct Lanes {
  float square[16];
  float lost[16];
};

void measure(const float* y, const int32_t* q, Lanes& lanes) {
  float square[32];
  float lost[32];
  for (int t = 0; t < 32; ++t) {
    const float r = y[t] - static_cast<float>(q[t]);
    square[t] = y[t] * y[t];
    lost[t] = r * r;
  }
  for (int l = 0; l < 16; ++l) {
    lanes.square[l] += square[l] + square[l + 16];
    lanes.lost[l] += lost[l] + lost[l + 16];
  }
}

template <int BYTES>
void cut(const float* x, float up, float more, Digit* to, int64_t& sum, Lanes& lanes) {
  constexpr int kCount = BYTES / sizeof(Digit);
  int32_t q[kDepth];
  float y[kDepth];
  for (int t = 0; t < kDepth; ++t) {
    y[t] = x[t] * up * more;
  }
  for (int t = 0; t < kDepth; ++t) {
    q[t] = static_cast<int32_t>(__builtin_rintf(y[t]));
  }
  if (BYTES == 2) {
    for (int b = 0; b < kDepth; b += 32) {
      measure(y + b, q + b, lanes);
    }
  }
  if (kBias) {
    for (int t = 0; t < kDepth; ++t) {
      sum += q[t];
    }
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

// One row of dY: `to` is the row's place in its first tile.
template <int BYTES>
void quantise_row(const SignProduct& p, const float* x, int8_t* to, FixedPoint& fixed) {
  uint32_t top = 0;
  for (int64_t t = 0; t < p.depth; ++t) {
    const uint32_t a = bits_of(x[t]) & 0x7FFFFFFFu;
    top = top < a ? a : top;
  }
  const bool finite = top < 0x7F800000u;
  // |x| < 2^e, and balanced digits reach 0x7F7F… only: one bit less where the largest entry would exceed it.
  const float largest = finite ? float_of(top) : 0.0f;
  int e = static_cast<int>(top >> 23) - 126;
  if (top < (1u << 23)) {
    e = -126 - (top ? __builtin_clz(top) - 9 : 0);
  }
  e = finite ? e : 0;
  constexpr double kLimit = BYTES == 2 ? 0x7F7F.0p0 : 0x7F7F7F00.0p0;
  int shift = 8 * BYTES - 1 - e;
  if (static_cast<double>(largest) * double_power_of_two(shift) > kLimit) {
    --shift;
  }
  // 2^shift can exceed a float's range, as rows can be subnormal: in two steps, both exact for what stays above 1/2.
  const int first = shift < 127 ? shift : 127;
  const float up = finite ? power_of_two(first) : 0.0f;
  const float more = power_of_two(shift - first);

  Lanes lanes = {};
  int64_t sum = 0;
  const int64_t blocks = divide_up(p.depth, kDepth);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t left = p.depth - b * kDepth;
    Digit* digits = reinterpret_cast<Digit*>(to + b * kTileBytes);
    if (left >= kDepth && finite) {
      cut<BYTES>(x + b * kDepth, up, more, digits, sum, lanes);
    } else {
      float padded[kDepth] = {};
      for (int64_t t = 0; finite && t < min(left, kDepth); ++t) {
        padded[t] = x[b * kDepth + t];
      }
      cut<BYTES>(padded, up, more, digits, sum, lanes);
    }
  }
  fixed.unit = finite ? double_power_of_two(-shift) : __builtin_nan("");
  fixed.sum = static_cast<double>(sum);
  fixed.lossy = false;
  if (BYTES == 4) {
    return;
  }
  double square = 0;
  double lost = 0;
  for (int l = 0; l < 16; ++l) {
    square += static_cast<double>(lanes.square[l]);
    lost += static_cast<double>(lanes.lost[l]);
  }
  // The errors of a row add up to about √lost; a rounding of the output is 2^-9 (bf16) or 2^-12 (fp16) of √square on
  // average. An eighth and a quarter of that may be lost.
  const double allowed = p.dtype == DType::BFloat16 ? 0x1p-24 : 0x1p-28;
  fixed.lossy = !(lost <= allowed * square);
}

// --- operand ---

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

// --- tile product ---

// c (+)= a · b for `tiles` tiles of digits (a_stride bytes apart) over `blocks` tiles along K, and a panel of the
// operand (runs group_stride bytes apart). c: kGroups tiles of sums per tile of digits. Only the first `rows` rows of
// the last tile matter.
struct Panel {
  const int8_t* a;
  int64_t a_stride;
  int64_t tiles;
  int rows;
  const int8_t* b;
  int64_t group_stride;
  int64_t blocks;
  int32_t* c;
  bool add;
};

#if defined(__AMX_INT8__)
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Sums in 0 … 3, digits in 4 and 5: `rows` rows. The operand in 6 and 7.
void configure(int rows) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = t < 6 ? static_cast<uint8_t>(rows) : 16;
  }
  _tile_loadconfig(&config);
}

void two_tiles(const Panel& p, const int8_t* a, const int8_t* b, int32_t* c) {
  int32_t* below = c + kGroups * kTileInts;
  if (p.add) {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + kTileInts, 64);
    _tile_loadd(2, below, 64);
    _tile_loadd(3, below + kTileInts, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < p.blocks * kTileBytes; k += kTileBytes) {
    _tile_loadd(6, b + k, 64);
    _tile_loadd(4, a + k, 64);
    _tile_loadd(7, b + p.group_stride + k, 64);
    _tile_loadd(5, a + p.a_stride + k, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + kTileInts, 64);
  _tile_stored(2, below, 64);
  _tile_stored(3, below + kTileInts, 64);
}

void one_tile(const Panel& p, const int8_t* a, const int8_t* b, int32_t* c) {
  if (p.add) {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + kTileInts, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  for (int64_t k = 0; k < p.blocks * kTileBytes; k += kTileBytes) {
    _tile_loadd(4, a + k, 64);
    _tile_loadd(6, b + k, 64);
    _tile_loadd(7, b + p.group_stride + k, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + kTileInts, 64);
}

void multiply_panel(const Panel& p) {
  for (int64_t t = 0; t + 2 <= p.tiles; t += 2) {
    two_tiles(p, p.a + t * p.a_stride, p.b, p.c + t * kGroups * kTileInts);
  }
  if (p.tiles % 2) {
    one_tile(p, p.a + (p.tiles - 1) * p.a_stride, p.b, p.c + (p.tiles - 1) * kGroups * kTileInts);
  }
}

#elif defined(__AVX2__)
#define BK_MEMBER __attribute__((always_inline))

#if defined(__AVX512BW__)
using Sums = __m512i;
constexpr int kMaxRows = 8;
Sums load_sums(const int32_t* c) { return _mm512_load_si512(c); }
void store_sums(int32_t* c, Sums x) { _mm512_store_si512(c, x); }
Sums zero_sums() { return _mm512_setzero_si512(); }
Sums digits_of(const int8_t* a) {
  int32_t group;
  __builtin_memcpy(&group, a, 4);
  return _mm512_set1_epi32(group);
}
#if defined(__AVX512VNNI__)
Sums multiply_add(Sums c, Sums a, Sums b) { return _mm512_dpbusd_epi32(c, b, a); }
#else
Sums multiply_add(Sums c, Sums a, Sums b) { return _mm512_add_epi32(c, _mm512_madd_epi16(a, b)); }
#endif
#else
using Sums = __m256i;
Sums load_sums(const int32_t* c) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(c)); }
void store_sums(int32_t* c, Sums x) { _mm256_store_si256(reinterpret_cast<__m256i*>(c), x); }
Sums zero_sums() { return _mm256_setzero_si256(); }
Sums digits_of(const int8_t* a) {
  int32_t group;
  __builtin_memcpy(&group, a, 4);
  return _mm256_set1_epi32(group);
}
#if defined(__AVXVNNI__)
constexpr int kMaxRows = 6;
Sums multiply_add(Sums c, Sums a, Sums b) { return _mm256_dpbusd_avx_epi32(c, b, a); }
#else
constexpr int kMaxRows = 4;
Sums multiply_add(Sums c, Sums a, Sums b) { return _mm256_add_epi32(c, _mm256_madd_epi16(a, b)); }
#endif
#endif

// Sums of ROWS rows of digits by two vectors of the operand. A struct of structs, as compilers keep an array in memory.
template <int ROWS>
struct Block {
  Sums left, right;
  Block<ROWS - 1> below;

  BK_MEMBER void load(const int32_t* c, int64_t second, bool add) {
    left = add ? load_sums(c) : zero_sums();
    right = add ? load_sums(c + second) : zero_sums();
    below.load(c + kColumns, second, add);
  }
  BK_MEMBER void step(const int8_t* a, Sums b0, Sums b1) {
    const Sums d = digits_of(a);
    left = multiply_add(left, d, b0);
    right = multiply_add(right, d, b1);
    below.step(a + 64, b0, b1);
  }
  BK_MEMBER void store(int32_t* c, int64_t second) const {
    store_sums(c, left);
    store_sums(c + second, right);
    below.store(c + kColumns, second);
  }
};

template <>
struct Block<0> {
  BK_MEMBER void load(const int32_t*, int64_t, bool) {}
  BK_MEMBER void step(const int8_t*, Sums, Sums) {}
  BK_MEMBER void store(int32_t*, int64_t) const {}
};

// ROWS rows of digits by b and by b + second; their sums lie c_second apart.
template <int ROWS>
__attribute__((noinline)) void rows_by_two(const Panel& p, const int8_t* a, const int8_t* b, int64_t second, int32_t* c,
                                           int64_t c_second) {
  Block<ROWS> sums;
  sums.load(c, c_second, p.add);
  // One loop and not two: the sums would be copied between the loops' registers at every step.
  for (int64_t i = 0; i < p.blocks * kSteps; ++i) {
    const int8_t* at = b + 64 * i;
    sums.step(a + i / kSteps * kTileBytes + i % kSteps * 4, load_sums(reinterpret_cast<const int32_t*>(at)),
              load_sums(reinterpret_cast<const int32_t*>(at + second)));
  }
  sums.store(c, c_second);
}

template <int ROWS>
void some_rows(int64_t rows, const Panel& p, const int8_t* a, const int8_t* b, int64_t second, int32_t* c,
               int64_t c_second) {
  if (rows >= ROWS) {
    rows_by_two<ROWS>(p, a, b, second, c, c_second);
  } else if constexpr (ROWS > 1) {
    some_rows<ROWS - 1>(rows, p, a, b, second, c, c_second);
  }
}

void multiply_panel(const Panel& p) {
  constexpr bool kTwoGroups = sizeof(Sums) == 64;
  const int64_t second = kTwoGroups ? p.group_stride : 32;
  const int64_t c_second = kTwoGroups ? kTileInts : kColumns / 2;
  for (int g = 0; g < kGroups; g += kTwoGroups ? 2 : 1) {
    for (int64_t t = 0; t < p.tiles; ++t) {
      const int64_t rows = t + 1 < p.tiles ? 16 : p.rows;
      for (int64_t r = 0; r < rows; r += kMaxRows) {
        some_rows<kMaxRows>(rows - r, p, p.a + t * p.a_stride + 64 * r, p.b + g * p.group_stride, second,
                            p.c + (t * kGroups + g) * kTileInts + r * kColumns, c_second);
      }
    }
  }
}

#else
void multiply_panel(const Panel& p) {
  for (int g = 0; g < kGroups; ++g) {
    for (int64_t t = 0; t < p.tiles; ++t) {
      const int rows = t + 1 < p.tiles ? 16 : p.rows;
      for (int r = 0; r < rows; ++r) {
        int32_t* c = p.c + (t * kGroups + g) * kTileInts + r * kColumns;
        int32_t sums[kColumns * kGroup] = {};
        for (int64_t k = 0; k < p.blocks * kTileBytes; k += kTileBytes) {
          const Digit* a = reinterpret_cast<const Digit*>(p.a + t * p.a_stride + k + 64 * r);
          const Digit* b = reinterpret_cast<const Digit*>(p.b + g * p.group_stride + k);
          for (int step = 0; step < kSteps; ++step) {
            for (int x = 0; x < kColumns * kGroup; ++x) {
              sums[x] += a[step * kGroup + x % kGroup] * b[step * kColumns * kGroup + x];
            }
          }
        }
        for (int j = 0; j < kColumns; ++j) {
          c[j] = (p.add ? c[j] : 0) + sums[kGroup * j] + sums[kGroup * j + 1];
        }
      }
    }
  }
}
#endif

// --- result ---

template <typename T>
inline __attribute__((always_inline)) void store_row(const double* v, double sum, double unit, int64_t n, void* out,
                                                     int64_t offset) {
  T* to = static_cast<T*>(out) + offset;
  if (n == kColumns) {
#pragma omp simd
    for (int j = 0; j < kColumns; ++j) {
      round_to(static_cast<float>((v[j] - sum) * unit), to[j]);
    }
    return;
  }
  T rounded[kColumns];
  for (int j = 0; j < kColumns; ++j) {
    round_to(static_cast<float>((v[j] - sum) * unit), rounded[j]);
  }
  __builtin_memcpy(to, rounded, static_cast<size_t>(n) * sizeof(T));
}

// Sums of one row's digits, as one exact number per column.
template <int COUNT>
inline __attribute__((always_inline)) void combine(const int32_t* c, double* v) {
  if (COUNT == 2 && kDigitBits == 8) {
    // A pass adds 2¹² digits of 7 bits: two sums fit 32 bits.
#pragma omp simd
    for (int j = 0; j < kColumns; ++j) {
      v[j] = c[kColumns + j] * (1 << kDigitBits) + c[j];
    }
    return;
  }
#pragma omp simd
  for (int j = 0; j < kColumns; ++j) {
    double x = c[(COUNT - 1) * kColumns + j];
    for (int d = COUNT - 2; d >= 0; --d) {
      x = x * (1 << kDigitBits) + c[d * kColumns + j];
    }
    v[j] = x;
  }
}

// A row that holds infinities or NaNs: they alone decide. Each product with ±1 or 0 is what IEEE makes of it.
void nonfinite_row(const SignProduct& p, const SignColumns& s, int64_t row, int64_t first, int64_t cols) {
  const auto element = [&](int64_t k) {
    const int64_t at = row * p.row_stride + k * p.column_stride;
    return p.dtype == DType::BFloat16  ? to_float(static_cast<const BF16*>(p.grad)[at])
           : p.dtype == DType::Float16 ? to_float(static_cast<const FP16*>(p.grad)[at])
                                       : static_cast<const float*>(p.grad)[at];
  };
  for (int64_t j = 0; j < cols; j += kColumns) {
    double v[kColumns] = {};
    for (int64_t k = 0; k < p.depth; ++k) {
      const float x = element(k);
      if ((bits_of(x) & 0x7F800000u) != 0x7F800000u) {
        continue;
      }
      const int64_t word = j / 32;
      const bool zeros = s.zeros[word * (s.rows / kTileRows) + k / kTileRows];
      const uint32_t negative = static_cast<uint32_t>(s.negative[word * s.rows + k]) >> (j % 32);
      const uint32_t nonzero = zeros ? static_cast<uint32_t>(s.nonzero[word * s.rows + k]) >> (j % 32) : ~0u;
      for (int l = 0; l < kColumns; ++l) {
        v[l] += static_cast<double>(x) * (nonzero >> l & 1u ? 1 - 2 * static_cast<int>(negative >> l & 1u) : 0);
      }
    }
    const int64_t n = min(cols - j, kColumns);
    const int64_t at = row * p.cols + first + j;
    switch (p.dtype) {
      case DType::BFloat16:
        store_row<BF16>(v, 0, p.scale, n, p.out, at);
        break;
      case DType::Float16:
        store_row<FP16>(v, 0, p.scale, n, p.out, at);
        break;
      default:
        store_row<float>(v, 0, p.scale, n, p.out, at);
    }
  }
}

// One workspace per thread: operand, sums of a pass and, where there are several passes, of all.
struct Scratch {
  int8_t* operand;
  int32_t* c;
  double* v;
};

int64_t operand_bytes(const SignProduct& p) {
  return kGroups * min(kFormBlocks, divide_up(p.depth, kDepth)) * kTileBytes;
}
int64_t sum_bytes(const SignProduct& p) {
  return kGroups * min(kRowTiles, divide_up(p.rows, tile_rows(p.bytes))) * kTileBytes;
}

// Tiles [tile, tile + tiles) × one word of columns, over one pass along K.
void pass(const SignProduct& p, const SignColumns& signs, int64_t tile, int64_t tiles, int64_t word, int64_t block,
          int64_t blocks, const Scratch& scratch) {
  const int64_t all = divide_up(p.depth, kDepth);
  const int64_t in_tile = tile_rows(p.bytes);
  const int64_t last = min(in_tile, p.rows - (tile + tiles - 1) * in_tile);
  for (int64_t b = 0; b < blocks; b += kFormBlocks) {
    const int64_t n = min(blocks - b, kFormBlocks);
    form_operand(signs, word, (block + b) * kDepth, n, scratch.operand);
    Panel panel;
    panel.a = p.digits + (tile * all + block + b) * kTileBytes;
    panel.a_stride = all * kTileBytes;
    panel.tiles = tiles;
    panel.rows = static_cast<int>(last * (16 / in_tile));
    panel.b = scratch.operand;
    panel.group_stride = n * kTileBytes;
    panel.blocks = n;
    panel.c = scratch.c;
    panel.add = b > 0;
    multiply_panel(panel);
  }
}

template <int COUNT, typename T>
void finish(const SignProduct& p, int64_t tile, int64_t tiles, int64_t column, int64_t cols, const int32_t* c,
            double* v, bool first, bool last) {
  constexpr int kRows = 16 / COUNT;
  for (int64_t t = 0; t < tiles; ++t) {
    for (int r = 0; r < kRows && (tile + t) * kRows + r < p.rows; ++r) {
      const int64_t row = (tile + t) * kRows + r;
      const FixedPoint& fixed = p.fixed[row];
      const double sum = fixed.sum * kBias;
      const double unit = fixed.unit * p.scale;
      for (int64_t g = 0; g * kColumns < cols; ++g) {
        double x[kColumns];
        combine<COUNT>(c + (t * kGroups + g) * kTileInts + r * COUNT * kColumns, x);
        if (v) {
          double* running = v + ((t * kRows + r) * kGroups + g) * kColumns;
          for (int j = 0; j < kColumns; ++j) {
            running[j] = (first ? 0 : running[j]) + x[j];
            x[j] = running[j];
          }
        }
        if (last) {
          store_row<T>(x, sum, unit, min(cols - g * kColumns, kColumns), p.out, row * p.cols + column + g * kColumns);
        }
      }
    }
  }
}

template <int COUNT, typename T>
void multiply_as(const SignProduct& p, const SignColumns& s, int64_t tile_begin, int64_t tile_end, int64_t first,
                 int64_t cols, const Scratch& scratch) {
  const int64_t blocks = divide_up(p.depth, kDepth);
#if defined(__AMX_INT8__)
  const int64_t rows_left = p.rows - tile_begin * (16 / COUNT);
  configure(tile_end - tile_begin == 1 ? static_cast<int>(min(16, rows_left * COUNT)) : 16);
#endif
  for (int64_t tile = tile_begin; tile < tile_end; tile += kRowTiles) {
    const int64_t tiles = min(tile_end - tile, kRowTiles);
    for (int64_t block = 0; block < blocks; block += kPassBlocks) {
      const int64_t n = min(blocks - block, kPassBlocks);
      for (int64_t word = 0; word * 32 < cols; ++word) {
        pass(p, s, tile, tiles, word, block, n, scratch);
        double* v = blocks > kPassBlocks ? scratch.v + word * 32 * kRowTiles * (16 / COUNT) : nullptr;
        finish<COUNT, T>(p, tile, tiles, first + word * 32, min(cols - word * 32, 32), scratch.c, v, block == 0,
                         block + n == blocks);
      }
    }
  }
  for (int64_t row = tile_begin * (16 / COUNT); row < min(tile_end * (16 / COUNT), p.rows); ++row) {
    if (p.fixed[row].unit != p.fixed[row].unit) {
      nonfinite_row(p, s, row, first, cols);
    }
  }
}

template <int COUNT>
void multiply_digits(const SignProduct& p, const SignColumns& s, int64_t tile_begin, int64_t tile_end, int64_t first,
                     int64_t cols, const Scratch& scratch) {
  switch (p.dtype) {
    case DType::BFloat16:
      return multiply_as<COUNT, BF16>(p, s, tile_begin, tile_end, first, cols, scratch);
    case DType::Float16:
      return multiply_as<COUNT, FP16>(p, s, tile_begin, tile_end, first, cols, scratch);
    default:
      return multiply_as<COUNT, float>(p, s, tile_begin, tile_end, first, cols, scratch);
  }
}

}  // namespace

int64_t digit_bytes(int64_t rows, int64_t depth, int bytes) {
  return divide_up(rows, tile_rows(bytes)) * divide_up(depth, kDepth) * kTileBytes;
}

void quantise(const SignProduct& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t rows = tile_rows(p.bytes);
  const int64_t blocks = divide_up(p.depth, kDepth);
  for (int64_t row = begin * rows; row < min(end * rows, p.rows); ++row) {
    int8_t* to = p.digits + row / rows * blocks * kTileBytes + row % rows * (16 / rows) * 64;
    const float* x = row_floats(p, row, scratch);
    p.bytes == 2 ? quantise_row<2>(p, x, to, p.fixed[row]) : quantise_row<4>(p, x, to, p.fixed[row]);
  }
}

void arrange(const SignPlanes& from, int64_t first, int64_t rows, int64_t words, const SignColumns& to) {
  for (int64_t i = 0; i < rows; i += kTileRows) {
    for (int64_t word = 0; word < words; word += 4) {
      const int64_t at = word * to.rows + first + i;
      arrange_words(from.negative + i * from.width + word, from.width, rows - i, to.negative + at, to.rows);
      bool zeros = false;
      for (int64_t w = word; w < word + 4; ++w) {
        const bool flag = from.flags && from.flags[i / kTileRows * from.width + w];
        to.zeros[(w * to.rows + first + i) / kTileRows] = flag;
        zeros |= flag;
      }
      if (zeros) {
        arrange_words(from.nonzero + i * from.width + word, from.width, rows - i, to.nonzero + at, to.rows);
      }
    }
  }
}

int64_t multiply_scratch(const SignProduct& p, int64_t cols) {
  const int64_t running =
      divide_up(p.depth, kDepth) > kPassBlocks
          ? divide_up(cols, 32) * 32 * kRowTiles * tile_rows(p.bytes) * static_cast<int64_t>(sizeof(double))
          : 0;
  return operand_bytes(p) + sum_bytes(p) + running;
}

void multiply(const SignProduct& p, const SignColumns& signs, int64_t tile_begin, int64_t tile_end, int64_t first,
              int64_t cols, char* scratch) {
  char* sums = scratch + operand_bytes(p);
  const Scratch parts{reinterpret_cast<int8_t*>(scratch), reinterpret_cast<int32_t*>(sums),
                      reinterpret_cast<double*>(sums + sum_bytes(p))};
  if (p.bytes == 2) {
    multiply_digits<2 / sizeof(Digit)>(p, signs, tile_begin, tile_end, first, cols, parts);
  } else {
    multiply_digits<4 / sizeof(Digit)>(p, signs, tile_begin, tile_end, first, cols, parts);
  }
#if defined(__AMX_INT8__)
  _tile_release();
#endif
}

void seeded_signs(const int64_t* key, int64_t begin, int64_t end, int64_t first, int64_t calls, int32_t* words) {
  const Key k = read_key(key);
  for (int64_t row = begin; row < end; ++row) {
    draw_run(k, row, first, calls, reinterpret_cast<uint32_t*>(words + (row - begin) * calls * 4));
  }
}

}  // namespace BK_LEVEL
}  // namespace bioplaus
