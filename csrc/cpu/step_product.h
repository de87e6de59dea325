// Products by one right operand, again and again: those of a recurrent layer's steps.
//
// In float32 on the CPU the operand is copied once into panels of columns, which oneDNN's micro-kernel reads from end
// to end. The BLAS library packs it anew for every product of several rows. So are, widened, small ones of half types,
// of which calls are most of the time, and any of one that the processor does not multiply itself.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <bit>

#include "../common/checks.h"
#include "buffer.h"
#include "gemm.h"

namespace bioplaus {

class StepProduct {
 public:
  // right (K, N), for products of at most `most` rows each and `rows` in all.
  StepProduct(const at::Tensor& right, int64_t most, int64_t rows) : right_(right) {
    // A single row is multiplied from where the operand lies: there the copy saves less, of a small one.
    const int64_t least = right.numel() > kLarge ? kManyRows : kSomeRows;
    const at::ScalarType dtype = right.scalar_type();
    if (!right.is_cpu() || dtype == at::kDouble || right.numel() == 0 || rows <= most || rows < least ||
        !gemm_in_order()) {
      return;
    }
    const bool small = right.numel() <= kSmall;
    if (dtype == at::kFloat || !half_units(dtype) ? small || most > 1 : most * right.numel() <= kCall) {
      copy(right.to(at::kFloat));
    }
  }

  // out (rows, N) = left (rows, K) · right + plus; out is contiguous, and plus is it, another matrix, a row or nothing.
  void run(at::Tensor out, const at::Tensor& left, const at::Tensor& plus = {}) const {
    if (!panels_.defined()) {
      plus.defined() ? at::addmm_out(out, plus, left, right_) : at::mm_out(out, left, right_);
      return;
    }
    const bool add = plus.defined();
    const int64_t rows = out.size(0), depth = right_.size(0), cols = right_.size(1);
    if (out.scalar_type() == at::kFloat) {
      if (add && !plus.is_same(out)) {
        out.copy_(plus);
      }
      multiply(left, rows, out.mutable_data_ptr<float>(), add);
      return;
    }
    const at::Tensor wide = at::empty({rows, depth}, out.options().dtype(at::kFloat));
    const at::Tensor x = left.stride(1) == 1 ? left : left.contiguous();
    const DType dtype = to_dtype("left", out.scalar_type());
    copy_rows(wide.mutable_data_ptr(), DType::Float32, depth, x.const_data_ptr(), dtype, x.stride(0), rows, depth);
    const Buffer<float> sums(rows * cols);
    if (add) {
      const at::Tensor y = plus.contiguous();
      copy_rows(sums.get(), DType::Float32, cols, y.const_data_ptr(), dtype, y.dim() > 1 ? cols : 0, rows, cols);
    }
    multiply(wide, rows, sums.get(), add);
    copy_rows(out.mutable_data_ptr(), dtype, cols, sums.get(), DType::Float32, cols, rows, cols);
  }

 private:
  static constexpr int64_t kColumns = 64;
  static constexpr int64_t kDepth = 128;
  static constexpr int64_t kRows = 32;
  static constexpr int64_t kFewRows = 8;
  // What one thread is given at least: multiply-adds, and elements to copy.
  static constexpr int64_t kGrain = int64_t{1} << 18;
  static constexpr int64_t kCopyGrain = int64_t{1} << 15;
  // Rows in all from which the copy is worth it, of an operand whose copy is memory fresh from the system more.
  static constexpr int64_t kSomeRows = 64;
  static constexpr int64_t kManyRows = 256;
  static constexpr int64_t kLarge = int64_t{1} << 23;
  static constexpr int64_t kSmall = int64_t{1} << 17;
  // Multiply-adds of a half type's product that take no longer than its call.
  static constexpr int64_t kCall = int64_t{1} << 21;
  // Terms of a column that are copied at once where they are adjacent: those of a cache line.
  static constexpr int64_t kTerms = 16;

  // c (rows, N) = left · right, or + where `add`.
  void multiply(const at::Tensor& left, int64_t rows, float* c, bool add) const {
    const int64_t depth = right_.size(0), cols = right_.size(1), panels = panels_.size(0);
    // Every distance from row to row is a kernel of its own, and must be within 32 bits.
    const bool near = left.stride(0) >= depth && left.stride(0) <= 2 * depth;
    const at::Tensor dense = left.stride(1) == 1 && near ? left : left.contiguous();
    const int64_t ld = rows > 1 ? dense.stride(0) : depth;
    const float* a = dense.const_data_ptr<float>();
    const int64_t parts = std::clamp<int64_t>(at::get_num_threads() / panels, 1, divide_up(rows, kFewRows));
    const int64_t step = divide_up(rows, parts);
    const int64_t grain = std::max<int64_t>(1, kGrain / (step * depth * kColumns));
    at::parallel_for(0, panels * parts, grain, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t first = unit / parts * kColumns, row = unit % parts * step, row_end = std::min(row + step, rows);
        const float* b = panels_.const_data_ptr<float>() + first * depth;
        for (int64_t i = row, m; i < row_end; i += m) {
          // Every number of rows is a kernel of its own too, and a packed sequence's steps have many.
          m = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(std::min(kRows, row_end - i))));
          for (int64_t k = 0; k < depth; k += kDepth) {
            gemm(m, std::min(kColumns, cols - first), std::min(kDepth, depth - k), a + i * ld + k, ld, b + k * kColumns,
                 kColumns, c + i * cols + first, cols, add || k > 0);
          }
        }
      }
    });
  }

  // Columns beyond the last are left as they are: no kernel reads them.
  void copy(const at::Tensor& right) {
    const int64_t depth = right.size(0), cols = right.size(1), panels = divide_up(cols, kColumns);
    panels_ = at::empty({panels, depth, kColumns}, right.options());
    const float* from = right.const_data_ptr<float>();
    float* to = panels_.mutable_data_ptr<float>();
    const int64_t down = right.stride(0), across = right.stride(1);
    at::parallel_for(0, panels, divide_up(kCopyGrain, depth * kColumns), [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * kColumns; first < std::min(end * kColumns, cols); first += kColumns) {
        const int64_t n = std::min(kColumns, cols - first);
        const float* x = from + first * across;
        float* y = to + first * depth;
        if (across == 1) {
          for (int64_t k = 0; k < depth; ++k) {
            std::copy_n(x + k * down, n, y + k * kColumns);
          }
          continue;
        }
        for (int64_t k = 0; k < depth; k += kTerms) {
          const int64_t last = std::min(k + kTerms, depth);
          for (int64_t j = 0; j < n; ++j) {
            for (int64_t l = k; l < last; ++l) {
              y[l * kColumns + j] = x[l * down + j * across];
            }
          }
        }
      }
    });
  }

  at::Tensor right_, panels_;
};

}  // namespace bioplaus
