// Products by one right operand, again and again: those of a recurrent layer's steps.
//
// In float32 on the CPU the operand is copied once into panels of columns, which oneDNN's micro-kernel reads from end
// to end. The BLAS library packs it anew for every product, which for a step's few rows takes as long as multiplying.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <bit>

#include "buffer.h"
#include "gemm.h"

namespace bioplaus {

class StepProduct {
 public:
  // right (K, N), for `count` products of so many rows in all.
  StepProduct(const at::Tensor& right, int64_t count, int64_t rows) : right_(right) {
    if (right.is_cpu() && right.scalar_type() == at::kFloat && right.numel() > 0 && count > 1 && rows >= kWorthACopy &&
        gemm_in_order()) {
      const int64_t panels = divide_up(right.size(1), kColumns), beyond = panels * kColumns - right.size(1);
      const at::Tensor whole = beyond > 0 ? at::constant_pad_nd(right, {0, beyond}) : right;
      panels_ = whole.unflatten(1, {panels, kColumns}).transpose(0, 1).contiguous();
    }
  }

  // out (rows, N) = left (rows, K) · right + plus; out is contiguous, and plus may be it, a row for all or nothing.
  void run(at::Tensor out, const at::Tensor& left, const at::Tensor& plus = {}) const {
    if (!panels_.defined()) {
      plus.defined() ? at::addmm_out(out, plus, left, right_) : at::mm_out(out, left, right_);
      return;
    }
    if (plus.defined() && !plus.is_same(out)) {
      out.copy_(plus);
    }
    const bool add = plus.defined();
    const int64_t rows = out.size(0), depth = right_.size(0), cols = right_.size(1), panels = panels_.size(0);
    const at::Tensor dense = left.stride(1) == 1 && left.stride(0) >= depth ? left : left.contiguous();
    const int64_t ld = std::max(dense.stride(0), depth);
    const float* a = dense.const_data_ptr<float>();
    float* c = out.mutable_data_ptr<float>();
    const int64_t parts = std::clamp<int64_t>(at::get_num_threads() / panels, 1, divide_up(rows, kFewRows));
    const int64_t step = divide_up(rows, parts);
    const int64_t grain = std::max<int64_t>(1, kGrain / (step * depth * kColumns));
    at::parallel_for(0, panels * parts, grain, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t panel = unit / parts, first = panel * kColumns,
                      row_end = std::min(unit % parts * step + step, rows);
        const float* b = panels_.const_data_ptr<float>() + panel * depth * kColumns;
        for (int64_t i = unit % parts * step, m; i < row_end; i += m) {
          // Every number of rows is a kernel of its own: a packed sequence's steps have many.
          m = std::min(kRows, static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(row_end - i))));
          for (int64_t k = 0; k < depth; k += kDepth) {
            gemm(m, std::min(kColumns, cols - first), std::min(kDepth, depth - k), a + i * ld + k, ld, b + k * kColumns,
                 kColumns, c + i * cols + first, cols, add || k > 0);
          }
        }
      }
    });
  }

 private:
  static constexpr int64_t kColumns = 64;
  static constexpr int64_t kRows = 128;
  static constexpr int64_t kDepth = 128;
  // What one thread is given at least: rows, and multiply-adds.
  static constexpr int64_t kFewRows = 8;
  static constexpr int64_t kGrain = int64_t{1} << 18;
  static constexpr int64_t kWorthACopy = 32;

  at::Tensor right_, panels_;
};

}  // namespace bioplaus
