// Packed signs of an R × C matrix: an int32 tensor of fixed shape (2·R + ceil(R/64), W), W = 4·ceil(C/128).
//
//     rows 0 … R−1     sign plane: bit j % 32 of word j / 32 is 1 where entry j is negative (0 where it is zero)
//     rows R … 2R−1    non-zero plane: 1 where the entry is not zero
//     last rows        flags: word w of flag row t is 1 when the 64 × 32 tile (t, w) holds an exact zero, else 0
//
// Bits beyond C are 0 in both planes and raise no flag. A reader needs the non-zero plane only where the flag is 1.
// A row of the sign plane has the words of a seeded ±s row: Philox's, 128 signs a call.
#pragma once

#include "philox.h"

namespace bioplaus {

constexpr int64_t kTileRows = 64;

BK_INLINE int64_t sign_words(int64_t cols) { return (cols + 127) / 128 * 4; }
BK_INLINE int64_t sign_tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// The word that holds columns 32w … 32w+31 of row i, in each plane.
struct SignWord {
  uint32_t negative;
  uint32_t nonzero;
};

BK_INLINE SignWord read_signs(const int32_t* signs, int64_t rows, int64_t words, int64_t i, int64_t w) {
  const int32_t flag = signs[(2 * rows + i / kTileRows) * words + w];
  const uint32_t negative = static_cast<uint32_t>(signs[i * words + w]);
  return {negative, flag ? static_cast<uint32_t>(signs[(rows + i) * words + w]) : 0xFFFFFFFFu};
}

BK_INLINE SignWord seeded_signs(const int64_t* key, int64_t i, int64_t w) {
  const Philox4 x = draw(read_key(key), i, w / 4);
  // On a GPU, an index that is not known would put the words into memory.
  const int q = static_cast<int>(w % 4);
  return {q < 2 ? (q == 0 ? x.w[0] : x.w[1]) : (q == 2 ? x.w[2] : x.w[3]), 0xFFFFFFFFu};
}

}  // namespace bioplaus
