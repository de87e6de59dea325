// Runs of adjacent Philox calls, for *_kernel.cpp files.
//
// Roofline: 20 wide multiplications a call, one a cycle for 8 calls (AVX-512) or 4 (AVX2). Left to themselves compilers
// take the 64-bit multiplication, three times as long.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../common/philox.h"

namespace bioplaus {

#if defined(__AVX2__)
// Each word in the low half of a 64-bit lane, whose high half nothing reads.
struct DrawLanes {
#if defined(__AVX512F__)
  using Lanes = __m512i;
  static constexpr int64_t kCalls = 8;
  // Calls in the order that `store` brings back to 0, 1, 2, …
  BK_INLINE Lanes calls(int64_t first) {
    return _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
  }
  BK_INLINE Lanes all(uint32_t x) { return _mm512_set1_epi64(x); }
  BK_INLINE Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
  BK_INLINE Lanes high(Lanes x) { return _mm512_maskz_srli_epi64(0xFF, x, 32); }
  BK_INLINE Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  BK_INLINE void store(Lanes w0, Lanes w1, Lanes w2, Lanes w3, uint32_t* to) {
    const Lanes a = _mm512_mask_shuffle_epi32(w0, 0xAAAA, w1, _MM_PERM_CCAA);
    const Lanes b = _mm512_mask_shuffle_epi32(w2, 0xAAAA, w3, _MM_PERM_CCAA);
    _mm512_storeu_si512(to, _mm512_maskz_unpacklo_epi64(0xFF, a, b));
    _mm512_storeu_si512(to + 16, _mm512_maskz_unpackhi_epi64(0xFF, a, b));
  }
#else
  using Lanes = __m256i;
  static constexpr int64_t kCalls = 4;
  BK_INLINE Lanes calls(int64_t first) {
    return _mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_setr_epi64x(0, 2, 1, 3));
  }
  BK_INLINE Lanes all(uint32_t x) { return _mm256_set1_epi64x(x); }
  BK_INLINE Lanes multiply(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
  BK_INLINE Lanes high(Lanes x) { return _mm256_srli_epi64(x, 32); }
  BK_INLINE Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(a, _mm256_xor_si256(b, c)); }
  BK_INLINE void store(Lanes w0, Lanes w1, Lanes w2, Lanes w3, uint32_t* to) {
    const Lanes a = _mm256_blend_epi32(w0, _mm256_slli_epi64(w1, 32), 0xAA);
    const Lanes b = _mm256_blend_epi32(w2, _mm256_slli_epi64(w3, 32), 0xAA);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_unpacklo_epi64(a, b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), _mm256_unpackhi_epi64(a, b));
  }
#endif

  // philox4x32_10 in every lane of two vectors, as one alone would wait for itself.
  BK_INLINE void run(const Key& key, int64_t row, int64_t first, uint32_t* to) {
    Lanes c0[2], c1[2], c2[2], c3[2];
    for (int v = 0; v < 2; ++v) {
      c0[v] = calls(first + v * kCalls);
      c1[v] = all(static_cast<uint32_t>(row));
      c2[v] = all(key.s0);
      c3[v] = all(key.s1);
    }
    uint32_t k0 = key.k0, k1 = key.k1;
    for (int round = 0; round < 10; ++round) {
      const Lanes key0 = all(k0), key1 = all(k1);
      for (int v = 0; v < 2; ++v) {
        const Lanes p0 = multiply(all(0xD2511F53u), c0[v]);
        const Lanes p1 = multiply(all(0xCD9E8D57u), c2[v]);
        c0[v] = exclusive_or(high(p1), c1[v], key0);
        c1[v] = p1;
        c2[v] = exclusive_or(high(p0), c3[v], key1);
        c3[v] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int v = 0; v < 2; ++v) {
      store(c0[v], c1[v], c2[v], c3[v], to + 4 * v * kCalls);
    }
  }
};
#endif

// Words of calls first … first + calls − 1 of `row`, four a call.
BK_INLINE void draw_run(const Key& key, int64_t row, int64_t first, int64_t calls, uint32_t* to) {
  int64_t t = 0;
#if defined(__AVX2__)
  for (; t + 2 * DrawLanes::kCalls <= calls; t += 2 * DrawLanes::kCalls) {
    DrawLanes::run(key, row, first + t, to + 4 * t);
  }
#endif
  for (; t < calls; ++t) {
    const Philox4 x = draw(key, row, first + t);
    for (int q = 0; q < 4; ++q) {
      to[4 * t + q] = x.w[q];
    }
  }
}

}  // namespace bioplaus
