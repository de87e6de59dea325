// The tile product of feedback_mm_product_kernel.cpp: sums of digits in int32, by the instructions of the level.
#pragma once

#include "feedback_mm_digits.h"

namespace bioplaus {
namespace BK_LEVEL {
namespace {

// c (+)= a · b for `count` tiles of digits along `run`, and a panel of the operand: kGroups runs of tiles, group_stride
// bytes apart, of which the first `groups` are wanted. c: kGroups tiles of sums per tile of digits.
struct Panel {
  const DigitTile* tiles;
  int64_t count;
  int rows_of_row;  // of a tile, for each row of dY
  Run run;
  const int8_t* operand;
  int64_t group_stride;
  int64_t groups;
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
  // GCC takes the instruction to read 8 of its bytes, and leaves out what is written to the others.
  __asm__ volatile("" : : "m"(config));
  _tile_loadconfig(&config);
}

void two_tiles(const Panel& p, const int8_t* a, const int8_t* below_a, int32_t* c) {
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
  for (int64_t i = 0; i < p.run.blocks; ++i) {
    const int8_t* b = p.operand + p.run.operand[i];
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a + p.run.digits[i], 64);
    _tile_loadd(7, b + p.group_stride, 64);
    _tile_loadd(5, below_a + p.run.digits[i], 64);
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

void one_tile(const Panel& p, const int8_t* a, int32_t* c) {
  if (p.add) {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + kTileInts, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  for (int64_t i = 0; i < p.run.blocks; ++i) {
    const int8_t* b = p.operand + p.run.operand[i];
    _tile_loadd(4, a + p.run.digits[i], 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + p.group_stride, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + kTileInts, 64);
}

void multiply_panel(const Panel& p) {
  for (int64_t t = 0; t + 2 <= p.count; t += 2) {
    two_tiles(p, p.tiles[t].digits, p.tiles[t + 1].digits, p.c + t * kGroups * kTileInts);
  }
  if (p.count % 2) {
    one_tile(p, p.tiles[p.count - 1].digits, p.c + (p.count - 1) * kGroups * kTileInts);
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

// Sums of ROWS rows of digits by one vector of the operand or two. A struct of structs, as compilers keep an array in
// memory.
template <int ROWS, bool TWO>
struct Block {
  Sums left, right;
  Block<ROWS - 1, TWO> below;

  BK_MEMBER void load(const int32_t* c, int64_t second, bool add) {
    left = add ? load_sums(c) : zero_sums();
    right = TWO && add ? load_sums(c + second) : zero_sums();
    below.load(c + kColumns, second, add);
  }
  BK_MEMBER void step(const int8_t* a, Sums b0, Sums b1) {
    const Sums d = digits_of(a);
    left = multiply_add(left, d, b0);
    right = TWO ? multiply_add(right, d, b1) : right;
    below.step(a + 64, b0, b1);
  }
  BK_MEMBER void store(int32_t* c, int64_t second) const {
    store_sums(c, left);
    if (TWO) {
      store_sums(c + second, right);
    }
    below.store(c + kColumns, second);
  }
};

template <bool TWO>
struct Block<0, TWO> {
  BK_MEMBER void load(const int32_t*, int64_t, bool) {}
  BK_MEMBER void step(const int8_t*, Sums, Sums) {}
  BK_MEMBER void store(int32_t*, int64_t) const {}
};

// ROWS rows of digits by b and, where TWO, by b + second; their sums lie c_second apart.
template <int ROWS, bool TWO>
__attribute__((noinline)) void by_vectors(const Panel& p, const int8_t* a, const int8_t* b, int64_t second, int32_t* c,
                                          int64_t c_second) {
  Block<ROWS, TWO> sums;
  sums.load(c, c_second, p.add);
  // One loop and not two: the sums would be copied between the loops' registers at every step.
  for (int64_t i = 0; i < p.run.blocks * kSteps; ++i) {
    const int8_t* at = b + p.run.operand[i / kSteps] + i % kSteps * 64;
    const Sums first = load_sums(reinterpret_cast<const int32_t*>(at));
    sums.step(a + p.run.digits[i / kSteps] + i % kSteps * 4, first,
              TWO ? load_sums(reinterpret_cast<const int32_t*>(at + second)) : first);
  }
  sums.store(c, c_second);
}

template <int ROWS, bool TWO>
void some_rows(int64_t rows, const Panel& p, const int8_t* a, const int8_t* b, int64_t second, int32_t* c,
               int64_t c_second) {
  if (rows >= ROWS) {
    by_vectors<ROWS, TWO>(p, a, b, second, c, c_second);
  } else if constexpr (ROWS > 1) {
    some_rows<ROWS - 1, TWO>(rows, p, a, b, second, c, c_second);
  }
}

void multiply_panel(const Panel& p) {
  constexpr bool kTwoGroups = sizeof(Sums) == 64;
  const int64_t second = kTwoGroups ? p.group_stride : 32;
  const int64_t c_second = kTwoGroups ? kTileInts : kColumns / 2;
  const auto multiply_rows = kTwoGroups && p.groups == 1 ? some_rows<kMaxRows, false> : some_rows<kMaxRows, true>;
  for (int64_t g = 0; g < p.groups; g += kTwoGroups ? 2 : 1) {
    for (int64_t t = 0; t < p.count; ++t) {
      const int64_t rows = p.tiles[t].rows * p.rows_of_row;
      for (int64_t r = 0; r < rows; r += kMaxRows) {
        multiply_rows(rows - r, p, p.tiles[t].digits + 64 * r, p.operand + g * p.group_stride, second,
                      p.c + (t * kGroups + g) * kTileInts + r * kColumns, c_second);
      }
    }
  }
}

#else
void multiply_panel(const Panel& p) {
  for (int64_t g = 0; g < p.groups; ++g) {
    for (int64_t t = 0; t < p.count; ++t) {
      for (int64_t r = 0; r < p.tiles[t].rows * p.rows_of_row; ++r) {
        int32_t* c = p.c + (t * kGroups + g) * kTileInts + r * kColumns;
        int32_t sums[kColumns * kGroup] = {};
        for (int64_t i = 0; i < p.run.blocks; ++i) {
          const Digit* a = reinterpret_cast<const Digit*>(p.tiles[t].digits + p.run.digits[i] + 64 * r);
          const Digit* b = reinterpret_cast<const Digit*>(p.operand + g * p.group_stride + p.run.operand[i]);
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

}  // namespace
}  // namespace BK_LEVEL
}  // namespace bioplaus
