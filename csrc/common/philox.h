// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011), for host and device.
//
// Random layout, versions 1 and 2, which differ in redraw.h alone (part of the file format: it never changes meaning).
// Element (i, j) of a feedback matrix, i = dim 0, j = logical C-order index over the other dims, comes from the counter
//     (j / n, i, low half of stream, high half of stream)        n = 128 signs or 4 numbers a call
// under the key words (low half of key, high half of key).
#pragma once

#include <stdint.h>

// Internal linkage everywhere: the CPU kernels are compiled once per instruction-set level, and a function with
// external linkage would be merged across levels by the linker, so that a plain processor could run AVX-512 code.
#if defined(__CUDACC__)
#define BK_INLINE static __host__ __device__ __forceinline__
#else
#define BK_INLINE static inline __attribute__((always_inline))
#endif

namespace bioplaus {

constexpr int64_t kLayoutVersion = 2;
constexpr int kSignsPerCall = 128;
constexpr int kNumbersPerCall = 4;

struct Philox4 {
  uint32_t w[4];
};

BK_INLINE Philox4 philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The layer's key tensor (version, key, stream), split into the generator's words.
struct Key {
  uint32_t k0, k1, s0, s1;
};

BK_INLINE Key read_key(const int64_t* key) {
  const uint64_t k = static_cast<uint64_t>(key[1]);
  const uint64_t s = static_cast<uint64_t>(key[2]);
  return {static_cast<uint32_t>(k), static_cast<uint32_t>(k >> 32), static_cast<uint32_t>(s),
          static_cast<uint32_t>(s >> 32)};
}

// Call number `call` of row `row`: the words of columns n·call … n·call + n − 1.
BK_INLINE Philox4 draw(const Key& key, int64_t row, int64_t call) {
  return philox4x32_10(static_cast<uint32_t>(call), static_cast<uint32_t>(row), key.s0, key.s1, key.k0, key.k1);
}

}  // namespace bioplaus
