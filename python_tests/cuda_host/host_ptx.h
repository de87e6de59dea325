// C++ twins of csrc/cuda/ptx.cuh, for tests: the PTX ISA's definitions, with a warp's fragments put together as
// matrices.
//
// Sums of mma.sync in float: to nearest, the sum of a step's products and the accumulator, rounded once; or truncating,
// as tensor cores were found to do (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores",
// 2021): the products of 8 k and the accumulator are cut off below the last bit of the largest of them, towards zero,
// and so is their sum. The extra bits that newer generations keep are left out.
#pragma once

#include <string.h>

#include "host_execution.h"

namespace bioplaus {

namespace host_ptx {

using host_execution::Place;

template <typename T>
T part(const uint32_t& word, int i) {
  T x;
  memcpy(&x, reinterpret_cast<const char*>(&word) + i * sizeof(T), sizeof(T));
  return x;
}

// Row and column of element e of a lane's fragments, PTX ISA "Matrix fragments for mma.m16n8k16/m16n8k32"; `each` is
// how many elements a register holds.
struct Element {
  int row, col;
};
inline Element of_a(int lane, int e, int each) {
  const int reg = e / each;
  return {lane / 4 + 8 * (reg % 2), lane % 4 * each + e % each + 4 * each * (reg / 2)};
}
inline Element of_b(int lane, int e, int each) {
  return {lane % 4 * each + e % each + 4 * each * (e / each), lane / 4};
}
inline Element of_d(int lane, int e) { return {lane / 4 + 8 * (e / 2), lane % 4 * 2 + e % 2}; }

// One of the instruction's sums: acc + Σ a·b over k.
__attribute__((no_sanitize("address", "undefined"))) inline float sum(float acc, const float* a, const float* b,
                                                                      int k) {
  if (!host_execution::truncating) {
    double total = acc;
    for (int i = 0; i < k; ++i) {
      total += static_cast<double>(a[i]) * b[i];
    }
    return static_cast<float>(total);
  }
  for (int first = 0; first < k; first += 8) {
    double term[9] = {acc}, largest = fabs(term[0]);
    for (int i = 0; i < 8; ++i) {
      term[i + 1] = static_cast<double>(a[first + i]) * b[first + i];
      largest = fmax(largest, fabs(term[i + 1]));
    }
    if (!(largest < INFINITY)) {
      acc = static_cast<float>(term[0] + term[1] + term[2] + term[3] + term[4] + term[5] + term[6] + term[7] + term[8]);
      continue;
    }
    int exponent;
    frexp(largest, &exponent);
    const double unit = ldexp(1.0, exponent - 24);
    double total = 0;
    for (const double x : term) {
      total += trunc(x / unit);
    }
    frexp(total, &exponent);
    const double cut = exponent > 24 ? ldexp(1.0, exponent - 24) : 1.0;
    acc = static_cast<float>(trunc(total / cut) * cut * unit);
  }
  return acc;
}

inline void sum(int32_t acc, const int32_t* a, const int32_t* b, int k, int32_t& out) {
  int64_t total = acc;
  for (int i = 0; i < k; ++i) {
    total += a[i] * b[i];
  }
  if (total != static_cast<int32_t>(total)) {
    host_execution::fail("mma.sync s8: an int32 sum overflows");
  }
  out = static_cast<int32_t>(total);
}
inline void sum(float acc, const float* a, const float* b, int k, float& out) { out = sum(acc, a, b, k); }

// d += a·b for a 16 × K matrix a of entries `In`, widened to `Wide` as the sums are.
template <typename In, typename Wide, int K, typename Sum>
void mma(const char* name, Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place) {
  constexpr int kEach = 4 / sizeof(In);
  struct Lane {
    Sum* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  host_execution::meet(name, 0xFFFFFFFFu, place, &mine, [](void* const* lanes) {
    static Wide wide_a[16][K], wide_b[8][K];
    for (int lane = 0; lane < 32; ++lane) {
      const Lane* l = static_cast<const Lane*>(lanes[lane]);
      for (int e = 0; e < 4 * kEach; ++e) {
        const Element at = of_a(lane, e, kEach);
        wide_a[at.row][at.col] = static_cast<Wide>(part<In>(l->a[e / kEach], e % kEach));
      }
      for (int e = 0; e < 2 * kEach; ++e) {
        const Element at = of_b(lane, e, kEach);
        wide_b[at.col][at.row] = static_cast<Wide>(part<In>(l->b[e / kEach], e % kEach));
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      Sum* out = static_cast<const Lane*>(lanes[lane])->d;
      for (int e = 0; e < 4; ++e) {
        const Element at = of_d(lane, e);
        sum(out[e], wide_a[at.row], wide_b[at.col], K, out[e]);
      }
    }
  });
}

inline void ldmatrix(uint32_t (&r)[4], const void* from, bool transposed, Place place) {
  struct Lane {
    uint32_t* r;
    const void* from;
    bool transposed;
  } mine{r, from, transposed};
  if (reinterpret_cast<uintptr_t>(from) % 16) {
    host_execution::fail("ldmatrix: address %p is not aligned to 16 bytes", from);
  }
  host_execution::meet("ldmatrix", 0xFFFFFFFFu, place, &mine, [](void* const* lanes) {
    uint16_t matrix[4][8][8];
    for (int lane = 0; lane < 32; ++lane) {
      memcpy(matrix[lane / 8][lane % 8], static_cast<const Lane*>(lanes[lane])->from, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const Lane* l = static_cast<const Lane*>(lanes[lane]);
      for (int m = 0; m < 4; ++m) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = l->transposed ? matrix[m][j][i] : matrix[m][i][j];
        const uint32_t high = l->transposed ? matrix[m][j + 1][i] : matrix[m][i][j + 1];
        l->r[m] = low | high << 16;
      }
    }
  });
}

}  // namespace host_ptx

inline void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            host_ptx::Place place = host_ptx::Place::current()) {
  host_ptx::mma<int8_t, int32_t, 32>("mma.m16n8k32", d, a, b, place);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T,
                  host_ptx::Place place = host_ptx::Place::current()) {
  host_ptx::mma<T, float, 16>("mma.m16n8k16", d, a, b, place);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared, host_ptx::Place place = host_ptx::Place::current()) {
  host_ptx::ldmatrix(r, shared, false, place);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared,
                              host_ptx::Place place = host_ptx::Place::current()) {
  host_ptx::ldmatrix(r, shared, true, place);
}

inline void cp_async_16(void* shared, const void* global, bool valid) {
  host_execution::copy_later(shared, valid ? global : nullptr);
}
inline void cp_async_commit() { host_execution::commit_copies(); }
template <int N>
void cp_async_wait() {
  host_execution::wait_copies(N);
}

}  // namespace bioplaus
