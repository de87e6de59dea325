// Eight floats, and the transpose of eight of them, for *_kernel.cpp files.
#pragma once

#include "../common/feedback.h"

// Vectors are passed between inlined functions alone.
#pragma GCC diagnostic ignored "-Wpsabi"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define BK_SHUFFLE
#endif
#endif

namespace bioplaus {

// At any address. GCC 12 splits a load of it by __builtin_memcpy in halves.
typedef float F8 __attribute__((vector_size(32), aligned(4), may_alias));

BK_INLINE void transpose8(F8* r) {
#if defined(BK_SHUFFLE)
  // Pairs of rows are interleaved by 1, 2 and 4 elements.
  F8 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = __builtin_shufflevector(a[i], a[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    b[i + 2] = __builtin_shufflevector(a[i + 1], a[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    b[i + 3] = __builtin_shufflevector(a[i + 1], a[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#else
  for (int i = 0; i < 8; ++i) {
    for (int j = i + 1; j < 8; ++j) {
      const float x = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = x;
    }
  }
#endif
}

}  // namespace bioplaus
