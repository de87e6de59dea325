// AMX's tile instructions in plain C++, so that the kernels of that level run on any processor with AVX512_VNNI. As the
// architecture says it: a tile has rows of bytes, what is beyond them reads as zero and is not written.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace emulated {

struct Tile {
  uint8_t bytes[16][64];
};

struct State {
  Tile tile[8];
  uint16_t row_bytes[16];
  uint8_t rows[16];
  bool configured;
};

inline thread_local State state;

inline void check(int t) {
  if (!state.configured || state.rows[t] == 0) {
    __builtin_trap();
  }
}

inline void load_config(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  if (bytes[0] != 1) {
    __builtin_trap();
  }
  memcpy(state.row_bytes, bytes + 16, sizeof state.row_bytes);
  memcpy(state.rows, bytes + 48, sizeof state.rows);
  memset(state.tile, 0, sizeof state.tile);
  state.configured = true;
}

inline void zero(int t) {
  check(t);
  memset(&state.tile[t], 0, sizeof(Tile));
}

inline void load(int t, const void* from, int64_t stride) {
  zero(t);
  for (int r = 0; r < state.rows[t]; ++r) {
    memcpy(state.tile[t].bytes[r], static_cast<const char*>(from) + r * stride, state.row_bytes[t]);
  }
}

inline void store(int t, void* to, int64_t stride) {
  check(t);
  for (int r = 0; r < state.rows[t]; ++r) {
    memcpy(static_cast<char*>(to) + r * stride, state.tile[t].bytes[r], state.row_bytes[t]);
  }
}

// c += a · b of signed bytes in groups of four.
inline void multiply(int c, int a, int b) {
  check(a);
  check(b);
  check(c);
  if (state.rows[a] != state.rows[c] || state.row_bytes[a] / 4 != state.rows[b] ||
      state.row_bytes[b] != state.row_bytes[c]) {
    __builtin_trap();
  }
  for (int m = 0; m < state.rows[c]; ++m) {
    for (int n = 0; n < state.row_bytes[c] / 4; ++n) {
      int32_t sum;
      memcpy(&sum, state.tile[c].bytes[m] + 4 * n, 4);
      for (int k = 0; k < state.row_bytes[a]; ++k) {
        sum += static_cast<int8_t>(state.tile[a].bytes[m][k]) *
               static_cast<int8_t>(state.tile[b].bytes[k / 4][4 * n + k % 4]);
      }
      memcpy(state.tile[c].bytes[m] + 4 * n, &sum, 4);
    }
  }
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_loadconfig
#undef _tile_release
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_zero emulated::zero
#define _tile_dpbssd emulated::multiply
#define _tile_loadconfig emulated::load_config
#define _tile_release() (emulated::state.configured = false)
