// Eight neighbouring entries of a row of B, formed in registers by a thread: magnitudes (already scaled), times signs.
//
// A Philox call is 20 wide multiplications: uniform entries take two calls a chunk, seeded signs one, of which 8 of its
// 128 bits are used, as passing the words between threads would cost about what it saves.
#pragma once

#include "../common/packed_signs.h"
#include "element.h"

namespace bioplaus {

constexpr int kColumns = 8;

template <typename acc_t>
struct Chunk {
  int64_t row, first;
  int n;
  acc_t b[kColumns];
};

// Whether a chunk can be moved in whole 16-byte pieces.
static __device__ bool wide(const Operand& x, const void* from) {
  return x.dense && reinterpret_cast<uintptr_t>(from) % 16 == 0;
}

template <typename T, typename acc_t>
static __device__ void load(const FeedbackParams& p, const Operand& x, const Chunk<acc_t>& c, T (&to)[kColumns]) {
  const T* row = static_cast<const T*>(x.data) + c.row * x.row_stride;
  if (c.n == kColumns && wide(x, row + c.first)) {
    *reinterpret_cast<Pack<T, kColumns>*>(to) = *reinterpret_cast<const Pack<T, kColumns>*>(row + c.first);
    return;
  }
#pragma unroll
  for (int t = 0; t < kColumns; ++t) {
    to[t] = t < c.n ? row[column_offset(p, x, c.first + t)] : T(0.0f);
  }
}

template <typename T, typename acc_t>
static __device__ void stored(const FeedbackParams& p, Chunk<acc_t>& c) {
  alignas(16) T m[kColumns];
  load(p, p.magnitude, c, m);
#pragma unroll
  for (int t = 0; t < kColumns; ++t) {
    c.b[t] = static_cast<acc_t>(p.scale) * static_cast<acc_t>(to_float(m[t]));
  }
}

template <typename acc_t>
static __device__ void random(const FeedbackParams& p, Chunk<acc_t>& c) {
  const Key key = read_key(p.key);
#pragma unroll
  for (int t = 0; t < kColumns; t += kNumbersPerCall) {
    const Philox4 x = draw(key, c.row, (c.first + t) / kNumbersPerCall);
    if (p.entries == Entries::Uniform) {
#pragma unroll
      for (int q = 0; q < kNumbersPerCall; ++q) {
        c.b[t + q] = uniform(x.w[q], uniform_scale<acc_t>(p.scale));
      }
    } else {
#pragma unroll
      for (int q = 0; q < kNumbersPerCall; q += 2) {
        acc_t na, nb;
        normal_pair(x.w[q], x.w[q + 1], na, nb);
        c.b[t + q] = na * static_cast<acc_t>(p.scale);
        c.b[t + q + 1] = nb * static_cast<acc_t>(p.scale);
      }
    }
  }
}

template <typename acc_t>
static __device__ void magnitudes(const FeedbackParams& p, Chunk<acc_t>& c) {
  if (p.entries == Entries::Constant) {
#pragma unroll
    for (int t = 0; t < kColumns; ++t) {
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
    for (int t = 0; t < kColumns; ++t) {
      c.b[t] = fabs(c.b[t]);
    }
  }
}

template <typename T, typename acc_t>
static __device__ void weight_signs(const FeedbackParams& p, Chunk<acc_t>& c) {
  alignas(16) T w[kColumns];
  load(p, p.weight, c, w);
#pragma unroll
  for (int t = 0; t < kColumns; ++t) {
    c.b[t] *= sign_of<acc_t>(to_float(w[t]));
  }
}

// A chunk of 8 columns lies in one word.
template <typename acc_t>
static __device__ void flip(Chunk<acc_t>& c, uint32_t negative) {
#pragma unroll
  for (int t = 0; t < kColumns; ++t) {
    c.b[t] = negative & (1u << t) ? -c.b[t] : c.b[t];
  }
}

template <typename acc_t>
static __device__ void signs(const FeedbackParams& p, Chunk<acc_t>& c) {
  const int shift = static_cast<int>(c.first % 32);
  if (p.signs) {
    const SignWord x = read_signs(p.signs, p.rows, sign_words(p.cols), c.row, c.first / 32);
    flip(c, x.negative >> shift);
#pragma unroll
    for (int t = 0; t < kColumns; ++t) {
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
    const Philox4 x = draw(read_key(p.key), c.row, c.first / kSignsPerCall);
    const int q = static_cast<int>(c.first / 32 % 4);
    flip(c, (q < 2 ? (q == 0 ? x.w[0] : x.w[1]) : (q == 2 ? x.w[2] : x.w[3])) >> shift);
  }
}

// The chunk at c.row and c.first, of c.n entries; both are in range, and c.first is a multiple of 8.
template <typename acc_t>
static __device__ void form_entries(const FeedbackParams& p, Chunk<acc_t>& c) {
  magnitudes(p, c);
  signs(p, c);
}

}  // namespace bioplaus
