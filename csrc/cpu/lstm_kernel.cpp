// What is pointwise in a step of an LSTM, in one pass.
//
// Roofline: arithmetic. An exponential, and with it a division, for each of three sigmoids and two tanh a unit, about
// 25 operations on vectors each; ten numbers a unit are read or written, most of them in the caches. The share reached:
// `python -m bench run --op recurrent`.
// Half types are widened, and what is kept of them rounded.
#include "lstm.h"

namespace bioplaus {
namespace BK_LEVEL {
namespace {

template <typename T>
struct Exponential;

// ln 2 in two parts, of which multiples of the first are exact; adding and taking off `round` rounds to an integer,
// which is then in the low bits; terms 1/2!, 1/3!, … of the series until they are below a rounding at ln 2 / 2.
template <>
struct Exponential<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23, kBias = 127, kTerms = 7;
  static constexpr float kLargest = 88.8f, kSmallest = -87, kInverse = 1.44269504f, kHigh = 0.693359375f,
                         kLow = -2.12194440e-4f, kRound = 12582912;
};
template <>
struct Exponential<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52, kBias = 1023, kTerms = 13;
  static constexpr double kLargest = 710, kSmallest = -708, kInverse = 1.4426950408889634,
                          kHigh = 0.693147180369123816490, kLow = 1.90821492927058770002e-10, kRound = 6755399441055744;
};
constexpr double kFactorial[] = {1,    1,     2,      6,       24,       120,       720,
                                 5040, 40320, 362880, 3628800, 39916800, 479001600, 6227020800};

// eˣ = scale · (1 + rest), |rest| < 0.42 without the cancellation of eˣ − 1.
template <typename T>
struct Parts {
  T scale, rest;
};

template <typename T>
inline __attribute__((always_inline)) Parts<T> exponential(T x) {
  using E = Exponential<T>;
  // NaN stays. The scale of the largest is infinite.
  x = x > E::kLargest ? E::kLargest : x;
  x = x < E::kSmallest ? E::kSmallest : x;
  const T shifted = x * E::kInverse + E::kRound, n = shifted - E::kRound;
  const T r = x - n * E::kHigh - n * E::kLow;
  T sum = T(1 / kFactorial[E::kTerms]);
#pragma GCC unroll 16
  for (int k = E::kTerms - 1; k > 0; --k) {
    sum = sum * r + T(1 / kFactorial[k]);
  }
  typename E::Bits bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + E::kBias) << E::kMantissa;
  T scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return {scale, sum * r};
}

template <typename T>
inline __attribute__((always_inline)) T sigmoid(T x) {
  const Parts<T> e = exponential(-x);
  return 1 / (1 + e.scale * (1 + e.rest));
}

// (e²ˣ − 1) / (e²ˣ + 1), which small x keep their digits in.
template <typename T>
inline __attribute__((always_inline)) T tanh(T x) {
  const T bound = T(20);
  x = x > bound ? bound : x;
  x = x < -bound ? -bound : x;
  const Parts<T> e = exponential(2 * x);
  const T less_one = e.scale * e.rest + (e.scale - 1);
  return less_one / (less_one + 2);
}

template <typename T>
void step(const LstmStep<T>& p, int64_t begin, int64_t end) {
  const int64_t u = p.units;
  for (int64_t row = begin; row < end; ++row) {
    T* i = p.gates + 4 * row * u;
    T *f = i + u, *g = f + u, *o = g + u;
    const T* before = p.before + row * u;
    T *c = p.cells + row * u, *out = p.output + row * u;
#pragma omp simd
    for (int64_t k = 0; k < u; ++k) {
      const auto in = sigmoid(to_float(i[k])), keep = sigmoid(to_float(f[k])), proposed = tanh(to_float(g[k]));
      const auto open = sigmoid(to_float(o[k])), cell = keep * to_float(before[k]) + in * proposed;
      round_to(in, i[k]);
      round_to(keep, f[k]);
      round_to(proposed, g[k]);
      round_to(open, o[k]);
      round_to(cell, c[k]);
      round_to(open * tanh(cell), out[k]);
    }
  }
}

template <typename T>
void step(const LstmStepBack<T>& p, int64_t begin, int64_t end) {
  const int64_t u = p.units;
  for (int64_t row = begin; row < end; ++row) {
    const T* i = p.gates + 4 * row * u;
    const T *f = i + u, *g = f + u, *o = g + u;
    const T *before = p.before + row * u, *c = p.cells + row * u, *grad = p.grad_output + row * u;
    T *dc = p.grad_cells + row * u, *di = p.grad_gates + 4 * row * u;
    T *df = di + u, *dg = df + u, *d_o = dg + u;
#pragma omp simd
    for (int64_t k = 0; k < u; ++k) {
      const auto in = to_float(i[k]), keep = to_float(f[k]), proposed = to_float(g[k]), open = to_float(o[k]);
      const auto out = to_float(grad[k]), squashed = tanh(to_float(c[k]));
      const auto along = to_float(dc[k]) + out * open * (1 - squashed * squashed);
      round_to(along * proposed * in * (1 - in), di[k]);
      round_to(along * to_float(before[k]) * keep * (1 - keep), df[k]);
      round_to(along * in * (1 - proposed * proposed), dg[k]);
      round_to(out * squashed * open * (1 - open), d_o[k]);
      round_to(along * keep, dc[k]);
    }
  }
}

}  // namespace

template <typename Params>
void lstm_step(const Params& p, int64_t begin, int64_t end) {
  step(p, begin, end);
}
template void lstm_step(const LstmStep<float>&, int64_t, int64_t);
template void lstm_step(const LstmStep<double>&, int64_t, int64_t);
template void lstm_step(const LstmStep<BF16>&, int64_t, int64_t);
template void lstm_step(const LstmStep<FP16>&, int64_t, int64_t);
template void lstm_step(const LstmStepBack<float>&, int64_t, int64_t);
template void lstm_step(const LstmStepBack<double>&, int64_t, int64_t);
template void lstm_step(const LstmStepBack<BF16>&, int64_t, int64_t);
template void lstm_step(const LstmStepBack<FP16>&, int64_t, int64_t);

}  // namespace BK_LEVEL
}  // namespace bioplaus
