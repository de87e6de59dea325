// redraw_key on the CPU.
//
// Roofline: memory. Each element is read once, at two wide multiplications a word. The share reached: `python -m bench
// run --op redraw_key`.
#include "draw.h"
#include "redraw_key.h"

namespace bioplaus {
namespace BK_LEVEL {
namespace {

#if defined(__AVX512F__)
__m512i load(const uint32_t* x) {
  return _mm512_maskz_cvtepu32_epi64(0xFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
__m512i load(const uint16_t* x) {
  return _mm512_maskz_cvtepu16_epi64(0xFF, _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
__m512i add(__m512i a, __m512i b) { return _mm512_add_epi64(a, b); }
__m512i exclusive_or(__m512i a, __m512i b) { return _mm512_xor_si512(a, b); }
__m512i halves_swapped(__m512i x) { return _mm512_maskz_shuffle_epi32(0xFFFF, x, _MM_PERM_CDAB); }
#elif defined(__AVX2__)
__m256i load(const uint32_t* x) { return _mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }
__m256i load(const uint16_t* x) { return _mm256_cvtepu16_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))); }
__m256i add(__m256i a, __m256i b) { return _mm256_add_epi64(a, b); }
__m256i exclusive_or(__m256i a, __m256i b) { return _mm256_xor_si256(a, b); }
__m256i halves_swapped(__m256i x) { return _mm256_shuffle_epi32(x, 0xB1); }
#endif

// Of n words `stride` apart in memory, `step` in their weyl numbers.
template <typename U>
uint64_t sum_run(const U* x, int64_t stride, int64_t n, uint64_t weyl, uint64_t step) {
  uint64_t sum = 0;
  int64_t t = 0;
#if defined(__AVX2__)
  constexpr int64_t kLanes = DrawLanes::kCalls;
  if (stride == 1 && n >= kLanes) {
    alignas(64) uint64_t each[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) {
      each[l] = weyl + l * step;
    }
    DrawLanes::Lanes w, sums = DrawLanes::all(0);
    __builtin_memcpy(&w, each, sizeof w);
    for (int64_t l = 0; l < kLanes; ++l) {
      each[l] = kLanes * step;
    }
    DrawLanes::Lanes next;
    __builtin_memcpy(&next, each, sizeof next);
#pragma GCC unroll 4
    for (; t + kLanes <= n; t += kLanes) {
      const auto z = exclusive_or(w, DrawLanes::multiply(load(x + t), DrawLanes::all(kWordFactor)));
      const auto swapped = halves_swapped(z);
      sums = add(sums, exclusive_or(DrawLanes::multiply(z, swapped), swapped));
      w = add(w, next);
    }
    __builtin_memcpy(each, &sums, sizeof each);
    for (int64_t l = 0; l < kLanes; ++l) {
      sum += each[l];
    }
  }
#endif
  for (; t < n; ++t) {
    sum += word_hash(weyl + t * step, x[t * stride]);
  }
  return sum;
}

template <typename U>
uint64_t sum_as(const RedrawParams& p, int64_t begin, int64_t end) {
  const uint64_t start = hash_start(p.key);
  uint64_t sum = 0;
  while (begin < end) {
    const WordPlace at = word_place(p, begin);
    const int64_t left = p.dims > 1 ? p.size[0] - begin % p.size[0] : end - begin;
    const int64_t n = left < end - begin ? left : end - begin;
    sum += sum_run(static_cast<const U*>(p.data) + at.offset, p.stride[0], n, start + at.index * kGamma,
                   p.step[0] * kGamma);
    begin += n;
  }
  return sum;
}

}  // namespace

uint64_t sum_words(const RedrawParams& p, int64_t begin, int64_t end) {
  return p.bytes == 2 ? sum_as<uint16_t>(p, begin, end) : sum_as<uint32_t>(p, begin, end);
}

}  // namespace BK_LEVEL
}  // namespace bioplaus
