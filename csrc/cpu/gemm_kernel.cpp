// Operands of half_gemm. Memory bandwidth: each element is read and written once.
#include "../common/philox.h"
#include "level.h"

namespace bioplaus {
namespace BK_LEVEL {

void pack_pairs(int64_t k, int64_t n, const uint16_t* b, int64_t ldb, uint16_t* packed) {
  for (int64_t row = 0; row < k; row += 2) {
    const uint16_t* even = b + row * ldb;
    uint16_t* to = packed + row * n;
    if (row + 1 < k) {
      const uint16_t* odd = even + ldb;
      for (int64_t j = 0; j < n; ++j) {
        to[2 * j] = even[j];
        to[2 * j + 1] = odd[j];
      }
    } else {
      for (int64_t j = 0; j < n; ++j) {
        to[2 * j] = even[j];
        to[2 * j + 1] = 0;
      }
    }
  }
}

}  // namespace BK_LEVEL
}  // namespace bioplaus
