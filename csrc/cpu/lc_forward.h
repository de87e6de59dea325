// Y_pᵀ (O × N) = W_p X_p of the positions p. For lc.cpp.
#pragma once

#include "lc_operands.h"

namespace bioplaus::lc {

template <typename P>
struct Forward {
  using acc_t = typename P::acc;

  LcGeometry g;
  Activation x, y;
  typename Blocks<typename P::left>::Source w;
  const char* bias;  // of the weights' dtype, or null
  bool bias_per_position;

  int64_t lanes, chunks, tile, tiles, block;
  bool few;  // each sample's patch is a row of its own, and each output a dot product

  Forward(const LcGeometry& geometry, const Activation& input, const Activation& output, const at::Tensor& weight,
          const at::Tensor& b, bool per_position)
      : g(geometry), x(input), y(output), bias_per_position(per_position) {
    const int64_t k = lc_columns(g), o = g.groups * g.o;
    w = {static_cast<const char*>(weight.const_data_ptr()), x.dtype, nullptr, o, k};
    g.c /= P::kPair;
    bias = b.defined() ? static_cast<const char*>(b.const_data_ptr()) : nullptr;
    lanes = choose_lanes(g.n, (g.kernel[0] * g.kernel[1] * g.in[2] * g.groups * g.c) * sizeof(acc_t));
    chunks = divide_up(g.n, lanes);
    few = g.n <= kFewSamples;
    // Whole vectors.
    lanes = few ? g.n : round_up(lanes, lanes <= 8 ? 8 : 16);
    tile = balanced(g.out[2], std::clamp<int64_t>(kTileBytes / (o * lanes * sizeof(acc_t)), 1, 16));
    tiles = divide_up(g.out[2], tile);
    block = w.in_place() ? g.o : choose_block(g.o, k * sizeof(acc_t));
  }

  int64_t units() const { return chunks * g.out[0] * g.out[1] * tiles; }
};

template <typename P>
class ForwardTask {
  using acc_t = typename P::acc;
  using left_t = typename P::left;
  using right_t = typename P::right;

 public:
  ForwardTask(const Forward<P>& op, Arena& arena)
      : op_(op),
        g_(op.g),
        patches_(op.g),
        rows_(op.x, op.few ? Innermost::Channel : Innermost::Batch, op.lanes, patches_.slots(), arena),
        blocks_(op.w, op.block * op.w.cols, arena) {
    patch_ = arena.take<right_t>(lc_columns(g_) * op.lanes);
    out_ = arena.take<acc_t>(op.tile * g_.groups * g_.o * op.lanes);
    bias_ = arena.take<acc_t>(g_.groups * g_.o);
    sums_ = arena.take<acc_t>(op.block * op.lanes);
  }

  void run(int64_t begin, int64_t end) {
    const int64_t n = divide_up(g_.n, op_.chunks);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / op_.tiles % (g_.out[0] * g_.out[1]);
      const int64_t first = unit / op_.tiles / (g_.out[0] * g_.out[1]) * n;
      const int64_t count = std::min(n, g_.n - first);
      const int64_t w0 = unit % op_.tiles * op_.tile;
      const int64_t w1 = std::min(w0 + op_.tile, g_.out[2]);
      const int64_t od = row / g_.out[1], oh = row % g_.out[1];
      patches_.start(rows_, first, count, od, oh);
      for (int64_t ow = w0; ow < w1; ++ow) {
        position(row * g_.out[2] + ow, ow, out_ + (ow - w0) * size());
      }
      copy_box(op_.y.at(first, od, oh) + w0 * op_.y.stride[2] * op_.y.bytes(), op_.y.dtype,
               {op_.y.stride_n, op_.y.stride[2], op_.y.stride_c}, out_, acc_dtype<acc_t>, {1, size(), op_.lanes}, count,
               w1 - w0, g_.groups * g_.o);
    }
    P::release();
  }

 private:
  int64_t size() const { return g_.groups * g_.o * op_.lanes; }

  void position(int64_t p, int64_t ow, acc_t* y) {
    const int64_t k = lc_columns(g_), lanes = op_.lanes;
    for (int64_t group = 0; group < g_.groups; ++group) {
      acc_t* to = y + group * g_.o * lanes;
      if (k == 0) {
        std::memset(to, 0, g_.o * lanes * sizeof(acc_t));
        continue;
      }
      if (op_.few) {
        for (int64_t n = 0; n < lanes; ++n) {
          patches_.gather(patch_ + n * k, ow, group, 1, n * rows_.stride_n());
        }
        BK_PICK(lc_dot)(op_.w.dtype, op_.w.at(p, group * g_.o, 0), k, g_.o, k, patch_, lanes, to);
        continue;
      }
      const bool in_place = patches_.in_place(ow);
      if (!in_place) {
        patches_.gather(patch_, ow, group, lanes, 0);
      }
      for (int64_t i = 0; i < g_.o; i += op_.block) {
        const int64_t count = std::min(op_.block, g_.o - i);
        int64_t ld;
        const left_t* w = blocks_.get(p, group * g_.o + i, count, 0, k * P::kPair, ld);
        bool more = false;
        if (!in_place) {
          multiply(count, k, w, ld, patch_, to + i * lanes, more);
          continue;
        }
        patches_.for_runs(ow, lanes, [&](int64_t column, const right_t* x) {
          if (x) {
            multiply(count, g_.kernel[2] * g_.c, w + column * P::kPair, ld, x, to + i * lanes, more);
          }
        });
        if (!more) {
          std::memset(to + i * lanes, 0, count * lanes * sizeof(acc_t));
        }
      }
    }
    if (op_.bias) {
      const int64_t o = g_.groups * g_.o;
      const char* bias = op_.bias + (op_.bias_per_position ? p * o * op_.w.bytes() : 0);
      copy_box(bias_, acc_dtype<acc_t>, {0, 0, 1}, bias, op_.w.dtype, {0, 0, 1}, 1, 1, o);
      BK_PICK(lc_add_bias)(sizeof(acc_t) == 8, y, bias_, o, lanes);
    }
  }

  // y (rows × lanes) = W (rows × depth) X, or += where there is `more` already, in sums of at most kMaxSum terms: one
  // long float32 sum would lose the accuracy of torch's product, which cuts its sums as well.
  void multiply(int64_t rows, int64_t depth, const left_t* w, int64_t ld, const right_t* x, acc_t* y, bool& more) {
    const int64_t lanes = op_.lanes, step = balanced(depth, kMaxSum);
    for (int64_t k = 0; k < depth; k += step) {
      P::multiply(op_.w.dtype, rows, lanes, std::min(step, depth - k), w + k * P::kPair, ld, x + k * lanes, lanes,
                  more ? sums_ : y, lanes, false);
      if (more) {
        BK_PICK(lc_add)(sizeof(acc_t) == 8, y, lanes, sums_, lanes, rows, lanes);
      }
      more = true;
    }
  }

  const Forward<P>& op_;
  const LcGeometry& g_;
  Patches<right_t> patches_;
  typename P::RightRows rows_;
  Blocks<left_t> blocks_;
  right_t* patch_;
  acc_t *out_, *bias_, *sums_;
};

}  // namespace bioplaus::lc
