// Tables of tables.h, each by itself, and the sums of their entries.
//
// Roofline: a permutation and an addition for 64 multiply-adds, where a fused multiply-add does 16; tables are written
// once, 16 bytes an entry of dY, and read from the caches for each kPlaceColumns columns. Every level adds in the
// same order.
#include "tables.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace bioplaus {
namespace BK_LEVEL {
namespace {

#if defined(__AVX512BW__)
// Four tables of 16 entries. Entry i of one is (±a ± b) + (±c ± d): the first sum by i % 4, the second by i / 4.
void form_four(__m512 x, float* to) {
  const auto signed_by = [](__m512 v, int signs) {
    return _mm512_castsi512_ps(
        _mm512_xor_si512(_mm512_castps_si512(v), _mm512_maskz_set1_epi32(static_cast<__mmask16>(signs), INT32_MIN)));
  };
  const __m512 low =
      _mm512_add_ps(signed_by(_mm512_permute_ps(x, 0x00), 0xAAAA), signed_by(_mm512_permute_ps(x, 0x55), 0xCCCC));
  const __m512 high =
      _mm512_add_ps(signed_by(_mm512_permute_ps(x, 0xAA), 0xAAAA), signed_by(_mm512_permute_ps(x, 0xFF), 0xCCCC));
  const __m512i each = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const auto table = [&](__m512 whole, int t) {
    const __m512 second = _mm512_permutexvar_ps(_mm512_add_epi32(each, _mm512_set1_epi32(4 * t)), high);
    _mm512_storeu_ps(to + kEntries * t, _mm512_add_ps(whole, second));
  };
  table(_mm512_shuffle_f32x4(low, low, 0x00), 0);
  table(_mm512_shuffle_f32x4(low, low, 0x55), 1);
  table(_mm512_shuffle_f32x4(low, low, 0xAA), 2);
  table(_mm512_shuffle_f32x4(low, low, 0xFF), 3);
}

#define BK_MEMBER __attribute__((always_inline))

// VECTORS times 16 columns: their places, and a row's sums. Structs of structs, as compilers keep arrays in memory.
template <int VECTORS>
struct Places {
  __m512i x;
  Places<VECTORS - 1> more;

  BK_MEMBER void load(const int32_t* from) {
    x = _mm512_loadu_si512(from);
    more.load(from + 16);
  }
  BK_MEMBER void next() {
    x = _mm512_srli_epi32(x, 4);
    more.next();
  }
};

template <>
struct Places<0> {
  BK_MEMBER void load(const int32_t*) {}
  BK_MEMBER void next() {}
};

template <int VECTORS>
struct Sums {
  __m512 x;
  Sums<VECTORS - 1> more;

  BK_MEMBER void clear() {
    x = _mm512_setzero_ps();
    more.clear();
  }
  BK_MEMBER void add(__m512 table, const Places<VECTORS>& at, __m512 one) {
    // Every other sum by a multiplication by 1: exact, and some processors have multipliers beside their adders.
    const __m512 entry = _mm512_permutexvar_ps(at.x, table);
    x = VECTORS % 2 ? _mm512_add_ps(x, entry) : _mm512_fmadd_ps(entry, one, x);
    more.add(table, at.more, one);
  }
  // Adds what passes before have left in `running`.
  BK_MEMBER void pass(float* running, bool first) {
    x = first ? x : _mm512_add_ps(_mm512_loadu_ps(running), x);
    _mm512_storeu_ps(running, x);
    more.pass(running + 16, first);
  }
  BK_MEMBER void get(const float* out, int64_t cols) {
    x = _mm512_maskz_loadu_ps(lanes(cols), out);
    more.get(out + 16, cols - 16);
  }
  BK_MEMBER void put(float* out, int64_t cols) const {
    _mm512_mask_storeu_ps(out, lanes(cols), x);
    more.put(out + 16, cols - 16);
  }
  static BK_MEMBER __mmask16 lanes(int64_t cols) {
    return cols >= 16 ? 0xFFFF : cols <= 0 ? 0 : static_cast<__mmask16>((1 << cols) - 1);
  }
};

template <>
struct Sums<0> {
  BK_MEMBER void clear() {}
  BK_MEMBER void add(__m512, const Places<0>&, __m512) {}
  BK_MEMBER void pass(float*, bool) {}
  BK_MEMBER void get(const float*, int64_t) {}
  BK_MEMBER void put(float*, int64_t) const {}
};

template <int ROWS, int VECTORS>
struct Block {
  Sums<VECTORS> sums;
  const float* from;
  Block<ROWS - 1, VECTORS> below;

  BK_MEMBER void clear() {
    sums.clear();
    below.clear();
  }
  BK_MEMBER void start(const float* tables, const TableRow* rows) {
    from = tables + rows->from;
    below.start(tables, rows + 1);
  }
  BK_MEMBER void add(int64_t t, const Places<VECTORS>& at, __m512 one) {
    sums.add(_mm512_loadu_ps(from + t), at, one);
    below.add(t, at, one);
  }
  BK_MEMBER void pass(float* running, bool first) {
    sums.pass(running, first);
    below.pass(running + kPlaceColumns, first);
  }
  BK_MEMBER void get(const TableRow* rows, int64_t first, int64_t cols) {
    sums.get(rows->out + first, cols);
    below.get(rows + 1, first, cols);
  }
  BK_MEMBER void put(const TableRow* rows, int64_t first, int64_t cols) const {
    sums.put(rows->out + first, cols);
    below.put(rows + 1, first, cols);
  }
};

template <int VECTORS>
struct Block<0, VECTORS> {
  BK_MEMBER void clear() {}
  BK_MEMBER void start(const float*, const TableRow*) {}
  BK_MEMBER void add(int64_t, const Places<VECTORS>&, __m512) {}
  BK_MEMBER void pass(float*, bool) {}
  BK_MEMBER void get(const TableRow*, int64_t, int64_t) {}
  BK_MEMBER void put(const TableRow*, int64_t, int64_t) const {}
};

// Columns first … first + cols − 1 of ROWS rows.
template <int ROWS, int VECTORS>
__attribute__((noinline)) void sum_some(const TableSums& s, const TableRow* rows, const int32_t* places, int64_t first,
                                        int64_t cols) {
  alignas(64) float running[ROWS * kPlaceColumns];
  Block<ROWS, VECTORS> block;
  __m512 one = _mm512_set1_ps(1.0f);
  asm("" : "+v"(one));  // or compilers would add instead
  block.clear();
  if (s.add) {
    block.get(rows, first, cols);
    block.pass(running, true);
  }
  for (int64_t i = 0; i < s.run.blocks;) {
    const bool begins = !s.add && i == 0;
    block.clear();
    const int64_t end = s.run.blocks - i > kPassBlocks ? i + kPassBlocks : s.run.blocks;
    for (; i < end; ++i) {
      block.start(s.tables + s.run.tables[i], rows);
      Places<VECTORS> at;
      at.load(places + s.run.places[i]);
#pragma GCC unroll 1
      for (int64_t t = 0; t < kTableFloats; t += kEntries) {
        block.add(t, at, one);
        at.next();
      }
    }
    if (!begins || i < s.run.blocks) {
      block.pass(running, begins);
    }
  }
  block.put(rows, first, cols);
}

template <int ROWS, int VECTORS>
void sum_rows(int64_t n, const TableSums& s, const TableRow* rows, const int32_t* places, int64_t first, int64_t cols) {
  if (n == ROWS) {
    sum_some<ROWS, VECTORS>(s, rows, places, first, cols);
  } else if constexpr (ROWS > 1) {
    sum_rows<ROWS - 1, VECTORS>(n, s, rows, places, first, cols);
  }
}

// As many sums at once as there are registers for.
int64_t most_rows(int64_t cols) { return cols > 48 ? 6 : cols > 32 ? 8 : 12; }

void sum_columns(int64_t n, const TableSums& s, const TableRow* rows, const int32_t* places, int64_t first,
                 int64_t cols) {
  const auto kernel = cols > 48   ? sum_rows<6, 4>
                      : cols > 32 ? sum_rows<8, 3>
                      : cols > 16 ? sum_rows<12, 2>
                                  : sum_rows<12, 1>;
  kernel(n, s, rows, places, first, cols);
}
#else
void form_four(const float* x, float* to) {
  for (int i = 0; i < 4 * kEntries; ++i) {
    const float* of = x + i / kEntries * 4;
    const auto entry = [&](int b) { return i >> b & 1 ? -of[b] : of[b]; };
    to[i] = (entry(0) + entry(1)) + (entry(2) + entry(3));
  }
}

int64_t most_rows(int64_t) { return 1; }

void sum_columns(int64_t, const TableSums& s, const TableRow* row, const int32_t* places, int64_t first, int64_t cols) {
  float* out = row->out + first;
  for (int64_t i = 0; i < s.run.blocks; i += kPassBlocks) {
    float sums[kPlaceColumns] = {};
    for (int64_t j = i; j < s.run.blocks && j < i + kPassBlocks; ++j) {
      const float* from = s.tables + row->from + s.run.tables[j];
      const int32_t* at = places + s.run.places[j];
      for (int t = 0; t < kTableFloats / kEntries; ++t) {
        for (int64_t c = 0; c < cols; ++c) {
          sums[c] += from[t * kEntries + (static_cast<uint32_t>(at[c]) >> 4 * t) % kEntries];
        }
      }
    }
    for (int64_t c = 0; c < cols; ++c) {
      out[c] = s.add || i > 0 ? out[c] + sums[c] : sums[c];
    }
  }
}
#endif

}  // namespace

void form_tables(const float* x, int64_t stride, int64_t rows, int64_t depth, float scale, float* to,
                 const float* next) {
  constexpr int64_t kAtOnce = 16;  // entries, of four tables
  for (int64_t i = 0; i < rows; ++i, x += stride, next += stride) {
    for (int64_t k = 0; k < (depth + kTableDepth - 1) / kTableDepth * kTableDepth; k += kAtOnce, to += 4 * kEntries) {
      const int64_t left = depth - k;
      __builtin_prefetch(next + k);
#if defined(__AVX512BW__)
      const __mmask16 some = left >= kAtOnce ? 0xFFFF : left <= 0 ? 0 : static_cast<__mmask16>((1 << left) - 1);
      form_four(_mm512_maskz_mul_ps(some, _mm512_maskz_loadu_ps(some, x + k), _mm512_set1_ps(scale)), to);
#else
      float some[kAtOnce] = {};
      for (int64_t l = 0; l < kAtOnce && l < left; ++l) {
        some[l] = scale * x[k + l];
      }
      form_four(some, to);
#endif
    }
  }
}

void form_places(const SignColumns& signs, int64_t blocks, int32_t* to) {
  for (int64_t i = 0; i < blocks; ++i) {
    for (int64_t word = 0; word < kPlaceColumns / 32; ++word) {
      const int32_t* rows = signs.negative + word * signs.rows + i * kTableDepth;
      int32_t* places = to + i * kPlaceColumns + 32 * word;
#if defined(__AVX512BW__)
      __m512i left = _mm512_setzero_si512(), right = left, bit = _mm512_set1_epi32(1);
      for (int r = 0; r < kTableDepth; ++r, bit = _mm512_slli_epi32(bit, 1)) {
        const uint32_t signs_of_row = static_cast<uint32_t>(rows[r]);
        left = _mm512_mask_or_epi32(left, static_cast<__mmask16>(signs_of_row), left, bit);
        right = _mm512_mask_or_epi32(right, static_cast<__mmask16>(signs_of_row >> 16), right, bit);
      }
      _mm512_storeu_si512(places, left);
      _mm512_storeu_si512(places + 16, right);
#elif defined(__AVX2__)
      // Byte b of all rows in one vector; the top bit of each byte is a column's.
      const auto load = [&](int r) {
        const __m256i x =
            _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + r))),
                                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + 16 + r)), 1);
        return _mm256_shuffle_epi8(
            x, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
      };
      const __m256i r0 = load(0), r4 = load(4), r8 = load(8), r12 = load(12);
      const __m256i low = _mm256_unpacklo_epi32(r0, r4), low8 = _mm256_unpacklo_epi32(r8, r12);
      const __m256i high = _mm256_unpackhi_epi32(r0, r4), high8 = _mm256_unpackhi_epi32(r8, r12);
      __m256i bytes[] = {_mm256_unpacklo_epi64(low, low8), _mm256_unpackhi_epi64(low, low8),
                         _mm256_unpacklo_epi64(high, high8), _mm256_unpackhi_epi64(high, high8)};
      for (int b = 0; b < 4; ++b) {
        for (int c = 7; c >= 0; --c) {
          places[8 * b + c] = _mm256_movemask_epi8(bytes[b]);
          bytes[b] = _mm256_add_epi8(bytes[b], bytes[b]);
        }
      }
#else
      uint32_t of_columns[32] = {};
      for (int r = 0; r < kTableDepth; ++r) {
        for (int c = 0; c < 32; ++c) {
          of_columns[c] |= (static_cast<uint32_t>(rows[r]) >> c & 1u) << r;
        }
      }
      __builtin_memcpy(places, of_columns, sizeof of_columns);
#endif
    }
  }
}

void sum_tables(const TableSums& s, const TableRow* rows, int64_t count, int64_t cols) {
  const int32_t* places = s.places;
  for (int64_t first = 0; first < cols; first += kPlaceColumns, places += s.panel) {
    const int64_t width = cols - first < kPlaceColumns ? cols - first : kPlaceColumns;
    // Of nearly the same number of rows, as a few of them would take as long as many.
    const int64_t parts = (count + most_rows(width) - 1) / most_rows(width);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = count * part / parts;
      sum_columns(count * (part + 1) / parts - begin, s, rows + begin, places, first, width);
    }
  }
}

void take_off(const float* x, const int64_t* at, float scale, const TableRow* rows, int64_t count, int64_t column) {
  for (int64_t i = 0; i < count; ++i) {
    rows[i].out[column] -= scale * x[at[i]];
  }
}

}  // namespace BK_LEVEL
}  // namespace bioplaus
