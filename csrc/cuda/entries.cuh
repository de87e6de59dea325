// Neighbouring entries of B in a thread's registers, by the table of common/feedback.h: magnitudes (already scaled),
// times signs. The rule is the same for a whole launch, so its branches do not diverge.
//
// A Philox call is 20 wide multiplications: eight uniform entries take two calls, seeded signs one, of which 8 of its
// 128 bits are used, as passing the words between threads would cost about what it saves.
#pragma once

#include "../common/packed_signs.h"
#include "element.h"

namespace bioplaus {

constexpr int kColumns = 8;

// Columns first … first + n − 1 of a row. N is 1, or first is a multiple of N and N a divisor of 32, at least 4. Where
// every operand is known to be dense, kStrided is false: to find a strided column takes divisions.
template <typename acc_t, int N = kColumns, bool kStrided = true>
struct Chunk {
  int64_t row, first;
  int n;
  acc_t b[N];
};

// Whether a chunk can be moved in whole 16-byte pieces.
static __device__ __forceinline__ bool wide(const Operand& x, const void* from) {
  return x.dense && reinterpret_cast<uintptr_t>(from) % 16 == 0;
}

// Its divisions once in a kernel: inlined for every entry and dtype they are most of its code and of its compilation.
static __device__ __noinline__ int64_t strided_offset(const FeedbackParams& p, const Operand& x, int64_t j) {
  return column_offset(p, x, j);
}

template <typename T, typename acc_t, int N, bool kStrided>
static __device__ void load(const FeedbackParams& p, const Operand& x, const Chunk<acc_t, N, kStrided>& c, T (&to)[N]) {
  const T* row = static_cast<const T*>(x.data) + c.row * x.row_stride;
  if constexpr (N * sizeof(T) % 16 == 0) {
    if (c.n == N && wide(x, row + c.first)) {
      *reinterpret_cast<Pack<T, N>*>(to) = *reinterpret_cast<const Pack<T, N>*>(row + c.first);
      return;
    }
  }
#pragma unroll
  for (int t = 0; t < N; ++t) {
    to[t] = t < c.n ? row[kStrided ? strided_offset(p, x, c.first + t) : c.first + t] : T(0.0f);
  }
}

template <typename T, typename acc_t, int N, bool kStrided>
static __device__ void stored(const FeedbackParams& p, Chunk<acc_t, N, kStrided>& c) {
  alignas(16) T m[N];
  load(p, p.magnitude, c, m);
#pragma unroll
  for (int t = 0; t < N; ++t) {
    c.b[t] = static_cast<acc_t>(p.scale) * static_cast<acc_t>(to_float(m[t]));
  }
}

template <typename T>
static __device__ T pick(const T (&x)[4], int q) {
  return q < 2 ? (q == 0 ? x[0] : x[1]) : (q == 2 ? x[2] : x[3]);
}

template <typename acc_t, int N, bool kStrided>
static __device__ void random(const FeedbackParams& p, Chunk<acc_t, N, kStrided>& c) {
  const Key key = read_key(p.key);
#pragma unroll
  for (int t = 0; t < N; t += kNumbersPerCall) {
    const Philox4 x = draw(key, c.row, (c.first + t) / kNumbersPerCall);
    acc_t number[kNumbersPerCall];
    if (p.entries == Entries::Uniform) {
#pragma unroll
      for (int q = 0; q < kNumbersPerCall; ++q) {
        number[q] = uniform(x.w[q], uniform_scale<acc_t>(p.scale));
      }
    } else {
#pragma unroll
      for (int q = 0; q < kNumbersPerCall; q += 2) {
        acc_t na, nb;
        normal_pair(x.w[q], x.w[q + 1], na, nb);
        number[q] = na * static_cast<acc_t>(p.scale);
        number[q + 1] = nb * static_cast<acc_t>(p.scale);
      }
    }
    if constexpr (N == 1) {
      c.b[0] = pick(number, static_cast<int>(c.first % kNumbersPerCall));
    } else {
#pragma unroll
      for (int q = 0; q < kNumbersPerCall; ++q) {
        c.b[t + q] = number[q];
      }
    }
  }
}

template <typename acc_t, int N, bool kStrided>
static __device__ void magnitudes(const FeedbackParams& p, Chunk<acc_t, N, kStrided>& c) {
  if (p.entries == Entries::Constant) {
#pragma unroll
    for (int t = 0; t < N; ++t) {
      c.b[t] = static_cast<acc_t>(p.scale);
    }
    return;
  }
  if (p.entries == Entries::Stored) {
    switch (p.magnitude.dtype) {
      case DType::Float32:
        stored<float>(p, c);
        break;
      case DType::Float64:
        stored<double>(p, c);
        break;
      case DType::BFloat16:
        stored<__nv_bfloat16>(p, c);
        break;
      case DType::Float16:
        stored<__half>(p, c);
        break;
    }
  } else {
    random(p, c);
  }
  if (p.weight.data || p.signs) {
#pragma unroll
    for (int t = 0; t < N; ++t) {
      c.b[t] = fabs(c.b[t]);
    }
  }
}

template <typename T, typename acc_t, int N, bool kStrided>
static __device__ void weight_signs(const FeedbackParams& p, Chunk<acc_t, N, kStrided>& c) {
  alignas(16) T w[N];
  load(p, p.weight, c, w);
#pragma unroll
  for (int t = 0; t < N; ++t) {
    c.b[t] *= sign_of<acc_t>(to_float(w[t]));
  }
}

// A chunk lies in one word.
template <typename acc_t, int N, bool kStrided>
static __device__ void flip(Chunk<acc_t, N, kStrided>& c, uint32_t negative) {
#pragma unroll
  for (int t = 0; t < N; ++t) {
    c.b[t] = negative & (1u << t) ? -c.b[t] : c.b[t];
  }
}

template <typename acc_t, int N, bool kStrided>
static __device__ void signs(const FeedbackParams& p, Chunk<acc_t, N, kStrided>& c) {
  const int shift = static_cast<int>(c.first % 32);
  if (p.signs) {
    const SignWord x = read_signs(p.signs, p.rows, sign_words(p.cols), c.row, c.first / 32);
    flip(c, x.negative >> shift);
#pragma unroll
    for (int t = 0; t < N; ++t) {
      c.b[t] *= x.nonzero >> shift & (1u << t) ? acc_t(1) : acc_t(0);
    }
  } else if (p.weight.data) {
    switch (p.weight.dtype) {
      case DType::Float32:
        weight_signs<float>(p, c);
        break;
      case DType::Float64:
        weight_signs<double>(p, c);
        break;
      case DType::BFloat16:
        weight_signs<__nv_bfloat16>(p, c);
        break;
      case DType::Float16:
        weight_signs<__half>(p, c);
        break;
    }
  } else if (p.entries == Entries::Constant) {
    flip(c, seeded_signs(p.key, c.row, c.first / 32).negative >> shift);
  }
}

// The chunk at c.row and c.first, of c.n entries; both are in range.
template <typename acc_t, int N, bool kStrided>
static __device__ void form_entries(const FeedbackParams& p, Chunk<acc_t, N, kStrided>& c) {
  magnitudes(p, c);
  signs(p, c);
}

}  // namespace bioplaus
