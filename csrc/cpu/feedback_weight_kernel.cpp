// feedback_weight on the CPU: a chunk of one row at a time, in a buffer that stays in the L1 cache:
// magnitudes (already scaled), times signs, rounded into the output. Each step is a plain loop over one dtype;
// what is made of a weight's sign bits alone takes one.
//
// Roofline: memory. Bytes per element = those of the weight and the magnitude that are read and of the output that is
// written (8 for s·sign(W) in fp32); packed signs add 1/8 byte, seeded entries nothing. Three to five operations per
// element, and for uniform entries a quarter of a Philox call (20 wide multiplications), which bounds them; normal ones
// are bound by it and their series. The share reached: `python -m bench run --op feedback_weight`.
#include "../common/packed_signs.h"
#include "bits.h"
#include "convert.h"
#include "draw.h"
#include "feedback_mm.h"
#include "feedback_weight.h"
#include "strided.h"

namespace bioplaus {
namespace BK_LEVEL {
namespace {

template <typename acc_t>
struct Chunk {
  explicit Chunk(const FeedbackParams& p) : p(p), key(p.key ? read_key(p.key) : Key{}) {}

  const FeedbackParams& p;
  const Key key;
  int64_t row, first, n;
  alignas(64) acc_t b[kChunk];
  alignas(64) uint64_t scratch[kChunk];
};

// --- magnitudes ---

float absolute(float x) { return __builtin_fabsf(x); }
double absolute(double x) { return __builtin_fabs(x); }

template <typename acc_t, typename T>
void stored(Chunk<acc_t>& c) {
  const T* m = static_cast<const T*>(gather(c.p, c.p.magnitude, c.row, c.first, c.n, c.scratch));
  const acc_t s = static_cast<acc_t>(c.p.scale);
  if (c.p.weight.data || c.p.signs) {
    for (int64_t t = 0; t < c.n; ++t) {
      c.b[t] = absolute(s * static_cast<acc_t>(to_float(m[t])));
    }
  } else {
    for (int64_t t = 0; t < c.n; ++t) {
      c.b[t] = s * static_cast<acc_t>(to_float(m[t]));
    }
  }
}

template <typename acc_t>
void words(Chunk<acc_t>& c, uint32_t* w) {
  const int64_t call = c.first / kNumbersPerCall;
  const int64_t calls = (c.n + kNumbersPerCall - 1) / kNumbersPerCall;
  draw_run(c.key, c.row, call, calls, w);
}

// ln u for a normal u: with u = m·2^e, √½ ≤ m < √2 and s = (m − 1) / (m + 1), ln u = 2·artanh s + e·ln 2.
float natural_log(float u) {
  const uint32_t shifted = bits_of(u) - bits_of(0.70710678f);
  const float e = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float m = float_of((shifted & 0x7FFFFFu) + bits_of(0.70710678f));
  const float s = (m - 1.0f) / (m + 1.0f);
  const float q = s * s;
  const float series = 2.0f + q * (2.0f / 3 + q * (2.0f / 5 + q * (2.0f / 7 + q * (2.0f / 9))));
  // ln 2 in two parts, the first short enough that its product with e is exact.
  return e * 0.693115234375f + (e * 3.1946183e-05f + s * series);
}

// cos and sin of 2π·u for u in [0, 1): the nearest quarter turn, and Taylor's series of the rest, at most π/4.
void cos_sin(float u, float& cosine, float& sine) {
  const int32_t quarter = static_cast<int32_t>(4.0f * u + 0.5f);
  const float x = 1.5707963267948966f * (4.0f * u - static_cast<float>(quarter));
  const float q = x * x;
  const float s = x * (1.0f - q / 6 * (1.0f - q / 20 * (1.0f - q / 42 * (1.0f - q / 72))));
  const float c = 1.0f - q / 2 * (1.0f - q / 12 * (1.0f - q / 30 * (1.0f - q / 56 * (1.0f - q / 90))));
  const float a = quarter & 1 ? s : c;
  const float b = quarter & 1 ? c : s;
  cosine = (quarter + 1) & 2 ? -a : a;
  sine = quarter & 2 ? -b : b;
}

// Box and Muller as in feedback.h, with functions that compilers vectorise.
void normals(uint32_t wa, uint32_t wb, float& na, float& nb) {
  const float u1 = static_cast<float>(static_cast<int32_t>((wa >> 8) + 1)) * (1.0f / 16777216.0f);
  const float u2 = static_cast<float>(static_cast<int32_t>(wb >> 8)) * (1.0f / 16777216.0f);
  const float r = __builtin_sqrtf(-2.0f * natural_log(u1));
  float c, s;
  cos_sin(u2, c, s);
  na = r * c;
  nb = r * s;
}

void normals(uint32_t wa, uint32_t wb, double& na, double& nb) { normal_pair(wa, wb, na, nb); }

template <typename acc_t>
void random(Chunk<acc_t>& c) {
  uint32_t* w = reinterpret_cast<uint32_t*>(c.scratch);
  words(c, w);
  if (c.p.entries == Entries::Uniform) {
    const acc_t s = uniform_scale<acc_t>(c.p.scale);
    for (int64_t t = 0; t < c.n; ++t) {
      c.b[t] = uniform(w[t], s);
    }
  } else {
    const acc_t s = static_cast<acc_t>(c.p.scale);
    for (int64_t t = 0; t < c.n; t += 2) {
      acc_t na, nb;
      normals(w[t], w[t + 1], na, nb);
      c.b[t] = na * s;
      c.b[t + 1] = nb * s;
    }
  }
  if (c.p.weight.data || c.p.signs) {
    for (int64_t t = 0; t < c.n; ++t) {
      c.b[t] = absolute(c.b[t]);
    }
  }
}

template <typename acc_t>
void magnitudes(Chunk<acc_t>& c) {
  if (c.p.entries == Entries::Constant) {
    const acc_t s = static_cast<acc_t>(c.p.scale);
    for (int64_t t = 0; t < c.n; ++t) {
      c.b[t] = s;
    }
  } else if (c.p.entries == Entries::Stored) {
    switch (c.p.magnitude.dtype) {
      case DType::Float32:
        return stored<acc_t, float>(c);
      case DType::Float64:
        return stored<acc_t, double>(c);
      case DType::BFloat16:
        return stored<acc_t, BF16>(c);
      case DType::Float16:
        return stored<acc_t, FP16>(c);
    }
  } else {
    random(c);
  }
}

// --- signs ---

template <typename acc_t, typename T>
void weight_signs(Chunk<acc_t>& c) {
  const T* w = static_cast<const T*>(gather(c.p, c.p.weight, c.row, c.first, c.n, c.scratch));
  for (int64_t t = 0; t < c.n; ++t) {
    c.b[t] *= static_cast<acc_t>(sign_of<decltype(to_float(w[t]))>(to_float(w[t])));
  }
}

template <typename acc_t>
void flip(acc_t* b, int64_t n, uint32_t negative) {
  for (int64_t t = 0; t < n; ++t) {
    b[t] = negative & kBit[t] ? -b[t] : b[t];
  }
}

template <typename acc_t>
void packed_signs(Chunk<acc_t>& c) {
  const int64_t width = sign_words(c.p.cols);
  for (int64_t t = 0; t < c.n; t += 32) {
    const SignWord x = read_signs(c.p.signs, c.p.rows, width, c.row, (c.first + t) / 32);
    const int64_t n = c.n - t < 32 ? c.n - t : 32;
    flip(c.b + t, n, x.negative);
    if (x.nonzero != 0xFFFFFFFFu) {
      for (int64_t l = 0; l < n; ++l) {
        c.b[t + l] *= x.nonzero & kBit[l] ? acc_t(1) : acc_t(0);
      }
    }
  }
}

template <typename acc_t>
void seeded_signs(Chunk<acc_t>& c) {
  for (int64_t t = 0; t < c.n; t += kSignsPerCall) {
    const Philox4 x = draw(c.key, c.row, (c.first + t) / kSignsPerCall);
    for (int64_t q = 0; q < 4 && t + 32 * q < c.n; ++q) {
      const int64_t left = c.n - t - 32 * q;
      flip(c.b + t + 32 * q, left < 32 ? left : 32, x.w[q]);
    }
  }
}

template <typename acc_t>
void signs(Chunk<acc_t>& c) {
  if (c.p.signs) {
    packed_signs(c);
  } else if (c.p.weight.data) {
    switch (c.p.weight.dtype) {
      case DType::Float32:
        return weight_signs<acc_t, float>(c);
      case DType::Float64:
        return weight_signs<acc_t, double>(c);
      case DType::BFloat16:
        return weight_signs<acc_t, BF16>(c);
      case DType::Float16:
        return weight_signs<acc_t, FP16>(c);
    }
  } else if (c.p.entries == Entries::Constant) {
    seeded_signs(c);
  }
}

// --- output ---

// Entries skip … n − 1 of the chunk.
template <typename T, typename acc_t>
void store_as(const Chunk<acc_t>& c, int64_t skip, void* out) {
  T* to = static_cast<T*>(out);
  for (int64_t t = skip; t < c.n; ++t) {
    round_to(c.b[t], to[t - skip]);
  }
}

void store(const Chunk<double>& c, int64_t skip, void* out) { store_as<double>(c, skip, out); }

void store(const Chunk<float>& c, int64_t skip, void* out) {
  switch (c.p.out.dtype) {
    case DType::BFloat16:
      return store_as<BF16>(c, skip, out);
    case DType::Float16:
      return store_as<FP16>(c, skip, out);
    default:
      return store_as<float>(c, skip, out);
  }
}

// --- s·sign(W) and sign(W)∘|M| whole, of operands of the output's dtype with adjacent elements: one pass over bits ---

bool by_bits(const FeedbackParams& p) {
  const auto ready = [&](const Operand& x) { return x.data && x.dense && x.dtype == p.out.dtype; };
  return p.signs == nullptr && ready(p.weight) &&
         (p.entries == Entries::Constant || (p.entries == Entries::Stored && p.scale == 1 && ready(p.magnitude)));
}

template <typename T, typename acc_t, typename U>
void run_by_bits(const FeedbackParams& p, U infinity, int64_t row, int64_t first, int64_t n, void* out) {
  constexpr U kSign = static_cast<U>(U(1) << (8 * sizeof(U) - 1));
  const U* w = static_cast<const U*>(p.weight.data) + row * p.weight.row_stride + first;
  U* to = static_cast<U*>(out);
  if (p.entries == Entries::Constant) {
    T scale;
    round_to(static_cast<acc_t>(p.scale), scale);
    U s;
    __builtin_memcpy(&s, &scale, sizeof s);
    for (int64_t t = 0; t < n; ++t) {
      const U below = static_cast<U>((w[t] & static_cast<U>(~kSign)) - 1);  // of 0 the largest number
      to[t] = below < infinity ? static_cast<U>((w[t] & kSign) ^ s) : static_cast<U>(s & kSign);
    }
    return;
  }
  const U* m = static_cast<const U*>(p.magnitude.data) + row * p.magnitude.row_stride + first;
  for (int64_t t = 0; t < n; ++t) {
    const U below = static_cast<U>((w[t] & static_cast<U>(~kSign)) - 1);
    const U size = static_cast<U>(m[t] & static_cast<U>(~kSign));
    const U none = size < infinity ? U(0) : static_cast<U>(~kSign);  // ∞·0 and NaN·0 are NaN
    to[t] = below < infinity ? static_cast<U>((w[t] & kSign) | size) : none;
  }
}

void run_by_bits(const FeedbackParams& p, int64_t row, int64_t first, int64_t n, void* out) {
  switch (p.out.dtype) {
    case DType::Float32:
      return run_by_bits<float, float, uint32_t>(p, 0x7F800000u, row, first, n, out);
    case DType::Float64:
      return run_by_bits<double, double, uint64_t>(p, 0x7FF0000000000000u, row, first, n, out);
    case DType::BFloat16:
      return run_by_bits<BF16, float, uint16_t>(p, 0x7F80u, row, first, n, out);
    case DType::Float16:
      return run_by_bits<FP16, float, uint16_t>(p, 0x7C00u, row, first, n, out);
  }
}

template <typename acc_t>
void form(const FeedbackParams& p, int64_t begin, int64_t end) {
  Chunk<acc_t> c(p);
  const int64_t chunks = (p.cols + kChunk - 1) / kChunk;
  for (int64_t unit = begin; unit < end; ++unit) {
    c.row = unit / chunks;
    c.first = unit % chunks * kChunk;
    c.n = p.cols - c.first < kChunk ? p.cols - c.first : kChunk;
    char* to = static_cast<char*>(p.out.data) + (c.row * p.out.row_stride + c.first) * size_of(p.out.dtype);
    if (p.out.dense && by_bits(p)) {
      run_by_bits(p, c.row, c.first, c.n, to);
      continue;
    }
    magnitudes(c);
    signs(c);
    if (p.out.dense) {
      store(c, 0, to);
    } else {
      store(c, 0, c.scratch);
      scatter(p, p.out, c.row, c.first, c.n, c.scratch);
    }
  }
}

template <typename acc_t>
void form_run(const FeedbackParams& p, int64_t row, int64_t first, int64_t n, void* out) {
  Chunk<acc_t> c(p);
  c.row = row;
  const int64_t end = first + n;
  char* to = static_cast<char*>(out);
  while (first < end) {
    // Draws and packed words start at multiples of 128 columns.
    c.first = first / kSignsPerCall * kSignsPerCall;
    c.n = end - c.first < kChunk ? end - c.first : kChunk;
    magnitudes(c);
    signs(c);
    store(c, first - c.first, to);
    to += (c.first + c.n - first) * size_of(p.out.dtype);
    first = c.first + c.n;
  }
}

template <typename T, typename U>
void expand(const SignColumns& signs, int64_t first, int64_t rows, int64_t cols, float scale, U* to) {
  constexpr U kSign = static_cast<U>(U(1) << (8 * sizeof(U) - 1));
  T rounded;
  round_to(scale, rounded);
  U s;
  __builtin_memcpy(&s, &rounded, sizeof s);
  for (int64_t row = first; row < first + rows; ++row, to += cols) {
    for (int64_t t = 0; t < cols; t += 32) {
      const int64_t word = t / 32, n = cols - t < 32 ? cols - t : 32;
      const bool zeros = signs.zeros[word * (signs.rows / kTileRows) + row / kTileRows];
      const uint32_t negative = static_cast<uint32_t>(signs.negative[word * signs.rows + row]);
      const uint32_t nonzero = zeros ? static_cast<uint32_t>(signs.nonzero[word * signs.rows + row]) : ~0u;
      for (int64_t l = 0; l < n; ++l) {
        const U entry = static_cast<U>(s ^ (negative & kBit[l] ? kSign : U(0)));
        to[t + l] = nonzero & kBit[l] ? entry : static_cast<U>(s & kSign);
      }
    }
  }
}

// Element j of a pair of rows: the even one's and, above it, the odd one's.
template <typename T>
void pairs(const SignColumns& signs, int64_t first, int64_t rows, int64_t cols, float scale, uint32_t* to) {
  T rounded;
  round_to(scale, rounded);
  uint16_t s;
  __builtin_memcpy(&s, &rounded, sizeof s);
  const uint32_t both = s * 0x10001u;
  for (int64_t row = first; row < first + rows; row += 2, to += cols) {
    for (int64_t t = 0; t < cols; t += 32) {
      const int64_t word = t / 32, at = word * signs.rows + row, n = cols - t < 32 ? cols - t : 32;
      const uint32_t even = static_cast<uint32_t>(signs.negative[at]);
      const uint32_t odd = static_cast<uint32_t>(signs.negative[at + 1]);
      const bool zeros = signs.zeros[word * (signs.rows / kTileRows) + row / kTileRows];
      const auto entry = [&](int64_t l) {
        return both ^ (even & kBit[l] ? 0x8000u : 0u) ^ (odd & kBit[l] ? 0x80000000u : 0u);
      };
      // A loop without masks, as nearly all words need none.
      if (n == 32 && !zeros && row + 1 < first + rows) {
        for (int l = 0; l < 32; ++l) {
          to[t + l] = entry(l);
        }
        continue;
      }
      const uint32_t even_nonzero = zeros ? static_cast<uint32_t>(signs.nonzero[at]) : ~0u;
      const uint32_t odd_nonzero = row + 1 == first + rows ? 0u
                                   : zeros                 ? static_cast<uint32_t>(signs.nonzero[at + 1])
                                                           : ~0u;
      for (int64_t l = 0; l < n; ++l) {
        to[t + l] = entry(l) & ((even_nonzero & kBit[l] ? 0xFFFFu : 0u) | (odd_nonzero & kBit[l] ? 0xFFFF0000u : 0u));
      }
    }
  }
}

}  // namespace

void expand_signs(const SignColumns& signs, int64_t first, int64_t rows, int64_t cols, float s, DType dtype, void* to) {
  switch (dtype) {
    case DType::BFloat16:
      return expand<BF16>(signs, first, rows, cols, s, static_cast<uint16_t*>(to));
    case DType::Float16:
      return expand<FP16>(signs, first, rows, cols, s, static_cast<uint16_t*>(to));
    default:
      return expand<float>(signs, first, rows, cols, s, static_cast<uint32_t*>(to));
  }
}

void expand_pairs(const SignColumns& signs, int64_t first, int64_t rows, int64_t cols, float s, DType dtype,
                  uint16_t* packed) {
  uint32_t* to = reinterpret_cast<uint32_t*>(packed);
  dtype == DType::BFloat16 ? pairs<BF16>(signs, first, rows, cols, s, to)
                           : pairs<FP16>(signs, first, rows, cols, s, to);
}

void feedback_run(const FeedbackParams& p, int64_t row, int64_t first, int64_t n, void* out) {
  if (by_bits(p)) {
    run_by_bits(p, row, first, n, out);
  } else if (p.out.dtype == DType::Float64) {
    form_run<double>(p, row, first, n, out);
  } else {
    form_run<float>(p, row, first, n, out);
  }
}

void feedback_weight(const FeedbackParams& p, int64_t begin, int64_t end) {
  if (p.out.dtype == DType::Float64) {
    form<double>(p, begin, end);
  } else {
    form<float>(p, begin, end);
  }
}

}  // namespace BK_LEVEL
}  // namespace bioplaus
