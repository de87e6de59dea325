// Eight floats, and the transpose of eight rows of them, for *_kernel.cpp files.
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
typedef float F4 __attribute__((vector_size(16), aligned(4), may_alias));

// columns[k][i] = rows[i][k].
BK_INLINE void transpose8(const float* const* rows, F8* columns) {
#if defined(BK_SHUFFLE)
  // Four rows beside four others, so that nothing crosses the halves of a register: pairs of rows are interleaved by 1
  // and 2 elements.
  for (int k = 0; k < 8; k += 4) {
    F8 r[4], a[4];
    for (int i = 0; i < 4; ++i) {
      r[i] = __builtin_shufflevector(*reinterpret_cast<const F4*>(rows[i] + k),
                                     *reinterpret_cast<const F4*>(rows[i + 4] + k), 0, 1, 2, 3, 4, 5, 6, 7);
    }
    for (int i = 0; i < 4; i += 2) {
      a[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
      a[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 2; ++i) {
      columns[k + 2 * i] = __builtin_shufflevector(a[i], a[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      columns[k + 2 * i + 1] = __builtin_shufflevector(a[i], a[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
#else
  for (int i = 0; i < 8; ++i) {
    for (int k = 0; k < 8; ++k) {
      columns[k][i] = rows[i][k];
    }
  }
#endif
}

}  // namespace bioplaus
