// Products of feedback_mm.cpp in floating point, and those by ±s that neither digits nor tables pay for.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>

#include "feedback_weight.h"
#include "gemm.h"
#include "slab_signs.h"

namespace bioplaus {

// dY as a product takes it that reads a row's entries in pairs: beside an odd last one a zero, not the first entry of
// the next row, which B's zero would turn into NaN where it is Inf.
inline at::Tensor in_pairs(const at::Tensor& grad, bool pairs) {
  return pairs && grad.size(1) % 2 ? at::constant_pad_nd(grad, {0, 1}) : grad;
}

// dX = dY · B by B in tiles of dY's dtype that stay in the L2 cache, each formed once for all rows (of signs, in pairs,
// for kHeldRows) and multiplied by oneDNN's micro-kernel, whose sums run along K in order: bits depend neither on the
// number of threads nor on how many rows there are. Where there is none the BLAS library's order depends on the shape
// of a product, and on its own threads but in a parallel region: there the work is cut as for kUnits threads, whatever
// their number.
class TileProduct {
 public:
  // `by_signs`: B is ±s, whose signs are formed first.
  TileProduct(const at::Tensor& grad, const FeedbackParams& b, const at::Tensor& out, bool by_signs)
      : b_(b),
        dtype_(grad.scalar_type()),
        half_(dtype_ != at::kFloat),
        native_(half_ && half_gemm_available(dtype_)),
        grad_(in_pairs(readable(grad), native_)),
        ld_(grad_.size(0) > 1 ? grad_.stride(0) : grad_.size(1)),
        out_(static_cast<char*>(out.mutable_data_ptr())),
        rows_(grad.size(0)),
        in_order_(gemm_in_order()),
        threads_(in_order_ ? at::get_num_threads() : kUnits),
        pairs_(native_ && by_signs),
        width_(std::min(b.cols, pairs_ ? std::min(divide_up(divide_up(b.cols, threads_), kPanel) * kPanel, kMinColumns)
                                       : std::clamp(divide_up(b.cols, 2 * threads_), kMinColumns, kColumns))),
        depth_(pairs_ ? kDeep : kDepthBlock),
        terms_(b.cols < kNarrow && b.rows <= kShallow ? kFewTerms : kDepthBlock) {
    if (by_signs) {
      whole_.emplace(b);
    }
  }

  void run() const {
    const int64_t slabs = divide_up(b_.cols, width_);
    const int64_t parts = std::clamp<int64_t>(threads_ / slabs, 1, divide_up(rows_, kRowBlock));
    const int64_t step = divide_up(rows_, parts);
    const int64_t units = slabs * parts;
    // The BLAS library has threads of its own where there is a single unit: an empty one makes a parallel region.
    at::parallel_for(0, in_order_ ? units : std::max<int64_t>(units, 2), 1, [&](int64_t begin, int64_t end) {
      const Workspace w(*this, step);
      for (int64_t unit = begin; unit < std::min(end, units); ++unit) {
        const int64_t row = unit % parts * step;
        const int64_t first = unit / parts * width_, rows = std::min(step, rows_ - row);
        const SignColumns signs = w.signs ? w.signs->form(first, std::min(width_, b_.cols - first)) : SignColumns{};
        const int64_t most = pairs_ ? kHeldRows : rows;
        for (int64_t i = 0; i < rows; i += most) {
          block(w, signs, row + i, std::min(most, rows - i), first);
        }
      }
      if (native_) {
        half_gemm_release();
      }
    });
  }

 private:
  static constexpr int64_t kDepthBlock = 128;
  // In float32 torch's product of a narrow B has a sum for each lane of a vector, and smaller errors than one sum of
  // kDepthBlock terms. Here a sum has few, but for a B so deep that there would be too many sums.
  static constexpr int64_t kNarrow = 64;
  static constexpr int64_t kShallow = 1024;
  static constexpr int64_t kFewTerms = 32;
  static constexpr int64_t kRowBlock = 128;
  // Pairs are formed of signs, which takes little, anew for so many rows: fewer sums, which stay in the L2 cache, and
  // longer ones.
  static constexpr int64_t kHeldRows = 512;
  static constexpr int64_t kDeep = 512;
  static constexpr int64_t kUnits = 16;
  static constexpr int64_t kMinColumns = 256;
  static constexpr int64_t kColumns = 1024;

  struct Workspace {
    Workspace(const TileProduct& p, int64_t rows)
        : Workspace(p, p.pairs_ ? std::min(rows, kHeldRows) : rows, std::min(p.depth_, p.b_.rows + 1)) {}
    Workspace(const TileProduct& p, int64_t rows, int64_t depth)
        : tile(p.pairs_ ? 0 : depth * p.width_ * p.grad_.element_size()),
          packed(p.native_ ? depth * p.width_ : 0),
          wide_tile(p.half_ && !p.native_ ? depth * p.width_ : 0),
          wide_grad(p.half_ && !p.native_ ? std::min(kRowBlock, rows) * depth : 0),
          sums(p.half_ ? rows * p.width_ : 0) {
      if (p.whole_) {
        signs.emplace(p.b_, p.width_, &*p.whole_);
      }
    }

    std::optional<SlabSigns> signs;
    Buffer<char> tile;
    Buffer<uint16_t> packed;
    Buffer<float> wide_tile, wide_grad, sums;
  };

  // Rows of adjacent elements.
  static at::Tensor readable(const at::Tensor& grad) {
    return grad.stride(1) == 1 && grad.stride(0) >= grad.size(1) ? grad : grad.contiguous();
  }

  // dX [row, row + rows) × a block of columns from `first` on.
  void block(const Workspace& w, const SignColumns& signs, int64_t row, int64_t rows, int64_t first) const {
    const int64_t cols = std::min(width_, b_.cols - first);
    const int64_t element = grad_.element_size();
    char* out = out_ + (row * b_.cols + first) * element;
    float* sums = half_ ? w.sums.get() : reinterpret_cast<float*>(out);
    const int64_t ld = half_ ? width_ : b_.cols;
    for (int64_t k = 0; k < b_.rows; k += depth_) {
      const int64_t depth = std::min(depth_, b_.rows - k);
      form(w, signs, k, depth, first, cols);
      for (int64_t i = 0; i < rows; i += kRowBlock) {
        const int64_t m = std::min(kRowBlock, rows - i);
        const char* a = static_cast<const char*>(grad_.const_data_ptr()) + ((row + i) * ld_ + k) * element;
        float* c = sums + i * ld;
        if (native_) {
          half_gemm(dtype_, m, cols, divide_up(depth, 2) * 2, reinterpret_cast<const uint16_t*>(a), ld_, w.packed.get(),
                    cols, c, ld, k > 0);
        } else if (half_) {
          widen(a, ld_, m, depth, w.wide_grad.get());
          gemm(m, cols, depth, w.wide_grad.get(), depth, w.wide_tile.get(), cols, c, ld, k > 0);
        } else {
          for (int64_t l = 0; l < depth; l += terms_) {
            gemm(m, cols, std::min(terms_, depth - l), reinterpret_cast<const float*>(a) + l, ld_,
                 reinterpret_cast<const float*>(w.tile.get()) + l * cols, cols, c, ld, k + l > 0);
          }
        }
      }
    }
    if (half_) {
      copy_rows(out, b_.out.dtype, b_.cols, sums, DType::Float32, ld, rows, cols);
    }
  }

  // Rows k … k + depth − 1 of a block of columns of B, as they are multiplied.
  void form(const Workspace& w, const SignColumns& signs, int64_t k, int64_t depth, int64_t first, int64_t cols) const {
    const auto scale = static_cast<float>(b_.scale);
    if (pairs_) {
      BK_PICK(expand_pairs)(signs, k, depth, cols, scale, b_.out.dtype, w.packed.get());
      return;
    }
    if (w.signs) {
      BK_PICK(expand_signs)(signs, k, depth, cols, scale, b_.out.dtype, w.tile.get());
    }
    for (int64_t l = 0; l < depth && !w.signs; ++l) {
      BK_PICK(feedback_run)(b_, k + l, first, cols, w.tile.get() + l * cols * grad_.element_size());
    }
    if (native_) {
      BK_PICK(pack_pairs)(depth, cols, reinterpret_cast<const uint16_t*>(w.tile.get()), cols, w.packed.get());
    } else if (half_) {
      widen(w.tile.get(), cols, depth, cols, w.wide_tile.get());
    }
  }

  void widen(const void* from, int64_t ld, int64_t rows, int64_t cols, float* to) const {
    copy_rows(to, DType::Float32, cols, from, b_.out.dtype, ld, rows, cols);
  }

  const FeedbackParams& b_;
  std::optional<WeightSigns> whole_;  // where signs are formed first
  at::ScalarType dtype_;
  bool half_;
  bool native_;
  at::Tensor grad_;
  int64_t ld_;  // of one row its stride says nothing
  char* out_;
  int64_t rows_;
  bool in_order_;
  int64_t threads_;
  bool pairs_;
  int64_t width_;
  int64_t depth_;
  int64_t terms_;
};

inline at::Tensor tile_product(const at::Tensor& grad, const FeedbackParams& b) {
  const at::Tensor out = at::empty({grad.size(0), b.cols}, grad.options());
  // Where tiles are no pairs they are few columns; a weight of dY's own dtype is read faster as it is there.
  const bool ready = b.weight.data && b.weight.dense && b.weight.dtype == b.out.dtype;
  const bool by_signs = half_gemm_available(grad.scalar_type()) || (b.cols <= kPanel && !ready);
  TileProduct(grad, b, out, b.entries == Entries::Constant && by_signs).run();
  return out;
}

}  // namespace bioplaus
