// Half types on the CPU, as bits: conversions to and from float by integer arithmetic, which every level vectorises.
// Round to nearest even, subnormals kept, NaN stays NaN. The functions are for *_kernel.cpp files.
#pragma once

#include "../common/philox.h"

namespace bioplaus {

struct BF16 {
  uint16_t bits;
};
struct FP16 {
  uint16_t bits;
};

BK_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
}

BK_INLINE float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
}

BK_INLINE float to_float(BF16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

BK_INLINE float to_float(FP16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7FFFu) << 13;
  // Exponent rebiased by 112; a subnormal is made normal by adding its implicit bit, then subtracting it as a float.
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t special = magnitude + (224u << 23);
  const float subnormal = float_of(magnitude + (113u << 23)) - float_of(113u << 23);
  const uint32_t finite = magnitude < (1u << 23) ? bits_of(subnormal) : normal;
  return float_of(sign | (magnitude >= (31u << 23) ? special : finite));
}

BK_INLINE float to_float(float x) { return x; }
BK_INLINE double to_float(double x) { return x; }

BK_INLINE void round_to(double x, double& y) { y = x; }
BK_INLINE void round_to(float x, float& y) { y = x; }

BK_INLINE void round_to(float x, BF16& y) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  y.bits = static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

BK_INLINE void round_to(float x, FP16& y) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7FFFFFFFu;
  const uint32_t normal = (a + 0xFFFu + ((a >> 13) & 1u) - (112u << 23)) >> 13;
  // Adding 1/2, whose last place is fp16's smallest subnormal, lets the adder do the rounding.
  const uint32_t subnormal = bits_of(float_of(a) + 0.5f) - bits_of(0.5f);
  const uint32_t special = a > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t finite = a < (113u << 23) ? subnormal : normal;
  y.bits = static_cast<uint16_t>(sign | (a >= (143u << 23) ? special : finite));
}

}  // namespace bioplaus
