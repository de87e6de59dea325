// A step of an LSTM on the CPU, what is pointwise in it: rows × units, every matrix contiguous.
#pragma once

#include <cstdint>

#include "convert.h"
#include "level.h"

namespace bioplaus {

// Rows of 4 · units in `gates`, in torch.nn's order i, f, g, o.
template <typename T>
struct LstmStep {
  int64_t units;
  T* gates;
  const T* before;  // the cell state that the step started from
  T* cells;
  T* output;  // o · tanh(c): before the projection, where there is one
};

template <typename T>
struct LstmStepBack {
  int64_t units;
  const T* gates;
  const T* before;
  const T* cells;
  const T* grad_output;
  T* grad_cells;  // of c in all, then of the state before
  T* grad_gates;
};

// Rows begin … end − 1, forward of LstmStep, backward of LstmStepBack, each of float, double, BF16 or FP16.
BK_DECLARE(template <typename Params> void lstm_step(const Params& p, int64_t begin, int64_t end))

}  // namespace bioplaus
