// dW_p (O × K) = dY_pᵀ X_pᵀ of the positions p. For lc.cpp.
#pragma once

#include "lc_operands.h"

namespace bioplaus::lc {

template <typename P>
struct BackwardWeight {
  using acc_t = typename P::acc;

  LcGeometry g;
  Activation dy, x;
  char* dw;
  int64_t lanes, chunks, patch, block;
  bool in_place;

  BackwardWeight(const LcGeometry& geometry, const Activation& grad_output, const Activation& input, char* grad_weight)
      : g(geometry), dy(grad_output), x(input), dw(grad_weight) {
    in_place = dy.dtype == acc_dtype<acc_t>;
    // Sums that are rounded to half can take no second chunk.
    const int64_t row = g.kernel[0] * g.kernel[1] * g.in[2] * g.groups * g.c;
    lanes = in_place ? choose_lanes(g.n, row * sizeof(acc_t)) : round_up(g.n, P::kPair);
    chunks = divide_up(g.n, lanes);
    patch = round_up(balanced(lanes, kMaxLanes), P::kPair);
    block = in_place ? g.o : choose_block(g.o, lc_columns(g) * sizeof(acc_t));
  }

  int64_t units() const { return product3(g.out); }
};

template <typename P>
class BackwardWeightTask {
  using acc_t = typename P::acc;
  using left_t = typename P::left;
  using right_t = typename P::right;

 public:
  BackwardWeightTask(const BackwardWeight<P>& op, Arena& arena)
      : op_(op),
        g_(op.g),
        patches_(op.g),
        x_(op.x, Innermost::Channel, op.lanes, patches_.slots(), arena),
        dy_(op.dy, Innermost::Batch, op.lanes, 1, arena) {
    patch_ = arena.take<right_t>(op.patch / P::kPair * lc_columns(g_));
    sums_ = op.in_place ? nullptr : arena.take<acc_t>(op.block * lc_columns(g_));
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t chunk = 0; chunk < op_.chunks; ++chunk) {
      const int64_t first = chunk * op_.lanes;
      const int64_t count = std::min(op_.lanes, g_.n - first);
      int64_t row = -1;
      const left_t* dy = nullptr;
      for (int64_t p = begin; p < end; ++p) {
        const int64_t ow = p % g_.out[2];
        if (p / g_.out[2] != row) {
          row = p / g_.out[2];
          const int64_t od = row / g_.out[1], oh = row % g_.out[1];
          patches_.start(x_, first, count, od, oh);
          dy = dy_.get(first, count, od, oh);
        }
        for (int64_t group = 0; group < g_.groups; ++group) {
          position(p, ow, group, dy + (ow * g_.groups + group) * g_.o * op_.lanes, count, chunk > 0);
        }
      }
    }
    P::release();
  }

 private:
  void position(int64_t p, int64_t ow, int64_t group, const left_t* dy, int64_t count, bool accumulate) {
    const int64_t k = lc_columns(g_);
    char* dw = op_.dw + (p * g_.groups + group) * g_.o * k * op_.dy.bytes();
    if (op_.lanes == 1) {
      patches_.gather(patch_, ow, group, 1, 0);
      BK_PICK(lc_outer)(op_.dy.dtype, dw, k, g_.o, k, dy, patch_);
      return;
    }
    for (int64_t i = 0; i < g_.o; i += op_.block) {
      const int64_t rows = std::min(op_.block, g_.o - i);
      acc_t* to = op_.in_place ? reinterpret_cast<acc_t*>(dw) : sums_;
      for (int64_t n0 = 0; n0 < count; n0 += op_.patch) {
        const int64_t terms = divide_up(std::min(op_.patch, count - n0), P::kPair), t0 = n0 / P::kPair;
        if (patches_.in_place(ow)) {
          const int64_t run = g_.kernel[2] * g_.c;
          patches_.for_runs(ow, 1, [&](int64_t column, const right_t* x) {
            if (x) {
              P::multiply(op_.dy.dtype, rows, run, terms, dy + i * op_.lanes + n0, op_.lanes, x + t0 * x_.stride_n(),
                          x_.stride_n(), to + column, k, accumulate || n0 > 0);
            } else if (!accumulate && n0 == 0) {
              for (int64_t r = 0; r < rows; ++r) {
                std::memset(to + r * k + column, 0, run * sizeof(acc_t));
              }
            }
          });
          continue;
        }
        if (i == 0 || op_.patch < count) {
          for (int64_t t = 0; t < terms; ++t) {
            patches_.gather(patch_ + t * k, ow, group, 1, (t0 + t) * x_.stride_n());
          }
        }
        P::multiply(op_.dy.dtype, rows, k, terms, dy + i * op_.lanes + n0, op_.lanes, patch_, k, to, k,
                    accumulate || n0 > 0);
      }
      if (!op_.in_place) {
        copy_box(dw + i * k * op_.dy.bytes(), op_.dy.dtype, {0, k, 1}, sums_, acc_dtype<acc_t>, {0, k, 1}, 1, rows, k);
      }
    }
  }

  const BackwardWeight<P>& op_;
  const LcGeometry& g_;
  Patches<right_t> patches_;
  typename P::RightRows x_;
  Rows<left_t> dy_;
  right_t* patch_;
  acc_t* sums_;
};

}  // namespace bioplaus::lc
