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
#include "feedback_mm_digits.h"
#include "feedback_mm_operand.h"
#include "feedback_mm_tiles.h"

namespace bioplaus {
namespace BK_LEVEL {
namespace {

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

// Sums of one row's digits, as one exact number per column. A pass adds 2¹² digits of 7 bits: two such sums fit 32
// bits.
template <int COUNT>
inline __attribute__((always_inline)) void combine(const int32_t* c, double* v) {
  constexpr bool kPairs = kDigitBits == 8;
  constexpr int kWords = kPairs ? COUNT / 2 : COUNT;
#pragma omp simd
  for (int j = 0; j < kColumns; ++j) {
    const auto word = [&](int w) {
      return kPairs ? c[(2 * w + 1) * kColumns + j] * 256 + c[2 * w * kColumns + j] : c[w * kColumns + j];
    };
    v[j] = kWords == 2 ? word(1) * 65536.0 + word(0) : word(0);
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
    const int64_t at = row * p.out_stride + first + j;
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

template <int N>
struct Count {
  static constexpr int value = N;
};

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

// Of a panel that has so many columns left.
int64_t groups_of(int64_t cols) { return min(kGroups, divide_up(cols, kColumns)); }

// Tiles along K that follow one another.
struct InOrder {
  int64_t digits[kPassBlocks];

  constexpr InOrder() : digits() {
    for (int64_t i = 0; i < kPassBlocks; ++i) {
      digits[i] = i * kTileBytes;
    }
  }
};
constexpr InOrder kInOrder;

// Some tiles × one word of columns, over one pass along K from `block` on.
void pass(const SignProduct& p, const SignColumns& signs, DigitTile* tiles, int64_t count, int64_t word, int64_t groups,
          int64_t block, int64_t blocks, const Scratch& scratch) {
  for (int64_t b = 0; b < blocks; b += kFormBlocks) {
    const int64_t n = min(blocks - b, kFormBlocks);
    form_operand(signs, word, (block + b) * kDepth, n, scratch.operand);
    // Digits lie from the pass's first block on: their offsets are those of this part of it.
    multiply_panel({tiles,
                    count,
                    static_cast<int>(16 / tile_rows(p.bytes)),
                    {kInOrder.digits + b, kInOrder.digits, n},
                    scratch.operand,
                    n * kTileBytes,
                    groups,
                    scratch.c,
                    b > 0});
  }
}

// `v`: where there are several passes, what those before this one came to.
template <int COUNT, typename T>
void finish(const SignProduct& p, const DigitTile* tiles, int64_t count, int64_t row_step, int64_t column, int64_t cols,
            const int32_t* c, double* v, bool first, bool last) {
  constexpr int kRows = 16 / COUNT;
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t r = 0; r < tiles[t].rows; ++r) {
      const int64_t row = tiles[t].row + r * row_step;
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
          store_row<T>(x, sum, unit, min(cols - g * kColumns, kColumns), p.out,
                       row * p.out_stride + column + g * kColumns);
        }
      }
    }
  }
}

template <int COUNT, typename T>
void multiply_as(const SignProduct& p, const SignColumns& s, int64_t tile_begin, int64_t tile_end, int64_t first,
                 int64_t cols, const Scratch& scratch) {
  constexpr int64_t kRows = 16 / COUNT;
  const int64_t blocks = divide_up(p.depth, kDepth);
#if defined(__AMX_INT8__)
  const int64_t rows_left = p.rows - tile_begin * kRows;
  configure(tile_end - tile_begin == 1 ? static_cast<int>(min(16, rows_left * COUNT)) : 16);
#endif
  for (int64_t tile = tile_begin; tile < tile_end; tile += kRowTiles) {
    const int64_t count = min(tile_end - tile, kRowTiles);
    for (int64_t block = 0; block < blocks; block += kPassBlocks) {
      const int64_t n = min(blocks - block, kPassBlocks);
      DigitTile tiles[kRowTiles];
      for (int64_t t = 0; t < count; ++t) {
        tiles[t] = {p.digits + ((tile + t) * blocks + block) * kTileBytes, (tile + t) * kRows,
                    min(kRows, p.rows - (tile + t) * kRows)};
      }
      for (int64_t word = 0; word * 32 < cols; ++word) {
        pass(p, s, tiles, count, word, groups_of(cols - word * 32), block, n, scratch);
        double* v = blocks > kPassBlocks ? scratch.v + word * 32 * kRowTiles * kRows : nullptr;
        finish<COUNT, T>(p, tiles, count, 1, first + word * 32, min(cols - word * 32, 32), scratch.c, v, block == 0,
                         block + n == blocks);
      }
    }
  }
  multiply_nonfinite(p, s, tile_begin * kRows, min(tile_end * kRows, p.rows), first, cols);
}

template <int COUNT, typename T>
void multiply_formed(const SignProduct& p, const DigitTile* tiles, int64_t count, int64_t row_step, const Run& run,
                     const int8_t* operand, int32_t* c, double* v) {
#if defined(__AMX_INT8__)
  configure(16);
#endif
  const int64_t step = divide_up(run.blocks, divide_up(run.blocks, kPassBlocks));
  for (int64_t word = 0; word * 32 < p.cols; ++word) {
    const int8_t* panel = operand + word * panel_bytes(p.depth);
    for (int64_t t = 0; t < count; t += kRowTiles) {
      const int64_t some = min(count - t, kRowTiles);
      for (int64_t block = 0; block < run.blocks; block += step) {
        const int64_t blocks = min(step, run.blocks - block);
        multiply_panel({tiles + t,
                        some,
                        COUNT,
                        {run.digits + block, run.operand + block, blocks},
                        panel,
                        kTileBytes,
                        groups_of(p.cols - word * 32),
                        c,
                        false});
        finish<COUNT, T>(p, tiles + t, some, row_step, word * 32, min(p.cols - word * 32, 32), c,
                         run.blocks > kPassBlocks ? v : nullptr, block == 0, block + blocks == run.blocks);
      }
    }
  }
}

// call(number of digits, an element of dY's and dX's dtype)
template <typename Call>
void with_types(const SignProduct& p, const Call& call) {
  const auto with_count = [&](auto count) {
    switch (p.dtype) {
      case DType::BFloat16:
        return call(count, BF16{});
      case DType::Float16:
        return call(count, FP16{});
      default:
        return call(count, float{});
    }
  };
  p.bytes == 2 ? with_count(Count<2 / sizeof(Digit)>{}) : with_count(Count<4 / sizeof(Digit)>{});
#if defined(__AMX_INT8__)
  _tile_release();
#endif
}

}  // namespace

int64_t tile_rows(int bytes) { return 16 * static_cast<int64_t>(sizeof(Digit)) / bytes; }

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
  with_types(p, [&](auto count, auto element) {
    multiply_as<count.value, decltype(element)>(p, signs, tile_begin, tile_end, first, cols, parts);
  });
}

void multiply_nonfinite(const SignProduct& p, const SignColumns& signs, int64_t begin, int64_t end, int64_t first,
                        int64_t cols) {
  for (int64_t row = begin; row < end; ++row) {
    if (p.fixed[row].unit != p.fixed[row].unit) {
      nonfinite_row(p, signs, row, first, cols);
    }
  }
}

int64_t panel_bytes(int64_t depth) { return kGroups * divide_up(depth, kDepth) * kTileBytes; }

void form_panels(const SignColumns& signs, int64_t begin, int64_t end, int64_t depth, int8_t* operand) {
  for (int64_t panel = begin; panel < end; ++panel) {
    int8_t* to = operand + panel * panel_bytes(depth);
    for (int64_t k = 0; k < depth; k += kDepth, to += kGroups * kTileBytes) {
      form_operand(signs, panel - begin, k, 1, to);
    }
  }
}

int64_t panels_scratch(const SignProduct& p, int64_t blocks) {
  const int64_t running = kGroups * kColumns * kRowTiles * tile_rows(p.bytes) * static_cast<int64_t>(sizeof(double));
  return kGroups * kRowTiles * kTileBytes + (blocks > kPassBlocks ? running : 0);
}

void multiply_panels(const SignProduct& p, const DigitTile* tiles, int64_t count, int64_t row_step, const Run& run,
                     const int8_t* operand, char* scratch) {
  double* running = reinterpret_cast<double*>(scratch + kGroups * kRowTiles * kTileBytes);
  with_types(p, [&](auto digits, auto element) {
    multiply_formed<digits.value, decltype(element)>(p, tiles, count, row_step, run, operand,
                                                     reinterpret_cast<int32_t*>(scratch), running);
  });
}

void seeded_signs(const int64_t* key, int64_t begin, int64_t end, int64_t first, int64_t calls, int32_t* words) {
  const Key k = read_key(key);
  for (int64_t row = begin; row < end; ++row) {
    draw_run(k, row, first, calls, reinterpret_cast<uint32_t*>(words + (row - begin) * calls * 4));
  }
}

}  // namespace BK_LEVEL
}  // namespace bioplaus
