// dX_p (N × K) = dY_p B_p of the positions p, added to the rows of the input that they read. For lc.cpp.
//
// Where B is ±s, float32 is sums of table entries (tables.h) at the levels that have them; half types are too where
// there are no tile units.
#pragma once

#include <optional>
#include <span>

#include "lc_operands.h"
#include "table_rows.h"

namespace bioplaus::lc {

// Whether B is ±s by the signs of weights whose rows lie in memory as B's do.
inline bool of_weights(const FeedbackParams& b) {
  return b.entries == Entries::Constant && !b.signs && !b.key && b.weight.dense;
}

// These weights from an element of a position on, whose blocks have `rows` rows and `cols` columns.
inline Operand weights_at(const FeedbackParams& b, int64_t rows, int64_t cols, int64_t position, int64_t row,
                          int64_t column) {
  const int64_t e = (position * rows + row) * cols + column;
  Operand w = b.weight;
  w.data = static_cast<char*>(w.data) + (e / b.cols * w.row_stride + e % b.cols) * size_of(w.dtype);
  w.row_stride = cols;
  return w;
}

// Whether its signs alone are multiplied, in float32. One sample would fill one lane.
inline bool takes_tables(const LcGeometry& g, const FeedbackParams& b) {
  const bool faster = b.out.dtype == DType::Float32 ? has_tables() : tables_are_faster();
  return faster && b.entries == Entries::Constant && b.out.dtype != DType::Float64 && g.n > 1 && g.o >= kTableDepth &&
         lc_columns(g) >= kPlaceColumns;
}

// Samples for which all columns of B are multiplied row by row; of more, rows of taps one after the other.
constexpr int64_t kFewLanes = 32;

template <typename P>
struct BackwardInput {
  using acc_t = typename P::acc;
  using Source = typename Blocks<typename P::left>::Source;

  LcGeometry g;
  Activation dy, dx;
  Source b;
  int64_t lanes, chunks, band;
  int64_t pass, block, width;  // terms of one sum, and rows and columns of B at once
  bool in_place;               // sums are formed in dx itself
  bool signs;                  // of one sample: the weights' are multiplied as they are read
  bool tables;

  BackwardInput(const LcGeometry& geometry, const Activation& grad_output, const Activation& grad_input,
                const Source& source)
      : g(geometry), dy(grad_output), dx(grad_input), b(source) {
    lanes = balanced(g.n, kMaxLanes);
    chunks = divide_up(g.n, lanes);
    const int64_t row_bytes = lanes * g.in[2] * g.groups * g.c * static_cast<int64_t>(sizeof(acc_t));
    band = std::clamp<int64_t>(kTileBytes / std::max<int64_t>(row_bytes, 1), 1, g.in[0] * g.in[1]);
    signs = lanes == 1 && b.plain == nullptr && of_weights(*b.feedback) &&
            (b.feedback->weight.dtype == DType::Float64) == (sizeof(acc_t) == 8);
    tables = takes_tables(g, *b.feedback);
    width = lanes > kFewLanes ? g.kernel[2] * g.c : lc_columns(g);
    pass = round_up(balanced(g.o, kMaxSum), P::kPair);
    // A small batch is bound by reading B: rows of it are used up while they are in the cache.
    block =
        b.in_place() && lanes > kFewLanes ? pass : choose_block(g.o, width * sizeof(acc_t) * (b.in_place() ? 2 : 1));
    block = std::min(round_up(block, P::kPair), pass);
    in_place = dx.dtype == acc_dtype<acc_t> && dx.channels_last();
  }

  int64_t units() const { return chunks * g.in[0] * g.in[1]; }
};

template <typename P>
class BackwardInputTask {
  using acc_t = typename P::acc;
  using left_t = typename P::left;
  using right_t = typename P::right;

 public:
  BackwardInputTask(const BackwardInput<P>& op, Arena& arena)
      : op_(op),
        g_(op.g),
        width_(g_.in[2] * g_.groups * g_.c),
        rows_(op.dy, Innermost::Channel, op.lanes, 1, arena),
        blocks_(op.b, op.signs ? 0 : op.block * op.width, arena) {
    sums_ = op.in_place ? nullptr : arena.take<acc_t>(op.band * op.lanes * width_);
    packed_ = P::kPair == 1 ? nullptr : arena.take<right_t>(op.block / P::kPair * op.width);
    tap_ = arena.take<acc_t>(
        std::max(op.tables ? std::min(op.lanes, RowTables::most()) * lc_columns(g_) : 0, op.lanes * op.width));
    scaled_ = op.signs ? arena.take<acc_t>(g_.o) : nullptr;
    if (op.tables) {
      tables_.emplace(op, arena);
    }
  }

  void run(int64_t begin, int64_t end) {
    const int64_t rows = g_.in[0] * g_.in[1];
    for (int64_t unit = begin; unit < end;) {
      first_ = unit / rows * op_.lanes;
      count_ = std::min(op_.lanes, g_.n - first_);
      low_ = unit % rows;
      high_ = std::min({low_ + op_.band, low_ + end - unit, rows});
      run_band();
      unit += high_ - low_;
    }
    P::release();
  }

 private:
  struct Tap {
    int64_t column, row;  // first column of a block, row of the input
  };

  struct Tables {
    Tables(const BackwardInput<P>& op, Arena& arena)
        : shape(matrix(op.g.o, lc_columns(op.g))),
          signs(shape, shape.cols, nullptr),
          unit(*op.b.feedback),
          source{nullptr, DType::Float32, &unit, op.b.rows, op.b.cols},
          blocks(source, of_weights(unit) ? 0 : std::min(op.g.o, kTileRows) * shape.cols, arena),
          rows(op.g.o),
          scale(static_cast<float>(entry_scale(unit.scale, unit.out.dtype))),
          places(arena.take<int32_t>(divide_up(shape.cols, kPlaceColumns) * divide_up(shape.rows, kTableDepth) *
                                     kPlaceColumns)) {
      unit.scale = 1;
      unit.out.dtype = DType::Float32;
    }

    static FeedbackParams matrix(int64_t rows, int64_t cols) {
      FeedbackParams p{};
      p.rows = rows;
      p.cols = cols;
      p.column_dims = 1;
      return p;
    }

    // What has σ's signs: rows first … first + count − 1, columns k0 … k1 − 1 of a position.
    Operand signs_of(int64_t position, int64_t first, int64_t count, int64_t k0, int64_t k1) {
      if (of_weights(unit)) {
        return weights_at(unit, source.rows, source.cols, position, first, k0);
      }
      int64_t ld;
      const float* formed = blocks.get(position, first, count, k0, k1, ld);
      return {const_cast<float*>(formed), DType::Float32, true, ld, {1}};
    }

    FeedbackParams shape;
    SlabSigns signs;
    FeedbackParams unit;  // σ
    Blocks<float>::Source source;
    Blocks<float> blocks;
    RowTables rows;
    float scale;
    int32_t* places;
    std::vector<std::pair<int64_t, int64_t>> zeros;  // row and column
    std::vector<int64_t> zeros_of;                   // of each row of taps
    std::vector<Tap> left;
  };

  acc_t* row(int64_t r) const {
    return op_.in_place ? reinterpret_cast<acc_t*>(op_.dx.at(first_, r / g_.in[1], r % g_.in[1]))
                        : sums_ + (r - low_) * op_.lanes * width_;
  }
  int64_t stride_n() const { return op_.in_place ? op_.dx.stride_n : width_; }

  // Rows low_ … high_ − 1 of the input, from the positions that reach them in their order.
  void run_band() {
    for (int64_t r = low_; r < high_; ++r) {
      for (int64_t n = 0; n < count_; ++n) {
        std::memset(row(r) + n * stride_n(), 0, width_ * sizeof(acc_t));
      }
    }
    for (int64_t od = 0; od < g_.out[0]; ++od) {
      const int64_t d = lc_start(g_, 0, od);
      const LcTaps planes = lc_taps(g_, 0, d, low_ / g_.in[1], (high_ - 1) / g_.in[1] + 1);
      for (int64_t oh = 0; oh < g_.out[1] && planes.begin < planes.end; ++oh) {
        const int64_t h = lc_start(g_, 1, oh);
        const LcTaps lines = lc_taps(g_, 1, h, 0, g_.in[1]);
        taps_.clear();
        for (int64_t i = planes.begin; i < planes.end; ++i) {
          for (int64_t j = lines.begin; j < lines.end; ++j) {
            const int64_t r = (d + i * g_.dilation[0]) * g_.in[1] + h + j * g_.dilation[1];
            if (r >= low_ && r < high_) {
              taps_.push_back({(i * g_.kernel[1] + j) * g_.kernel[2] * g_.c, r});
            }
          }
        }
        if (!taps_.empty()) {
          const left_t* dy = rows_.get(first_, count_, od, oh);
          for (int64_t ow = 0; ow < g_.out[2]; ++ow) {
            position((od * g_.out[1] + oh) * g_.out[2] + ow, ow, dy + ow * g_.groups * g_.o);
          }
        }
      }
    }
    if (!op_.in_place) {
      for (int64_t r = low_; r < high_; ++r) {
        copy_box(op_.dx.at(first_, r / g_.in[1], r % g_.in[1]), op_.dx.dtype,
                 {op_.dx.stride_n, op_.dx.stride[2], op_.dx.stride_c}, row(r), acc_dtype<acc_t>,
                 {width_, g_.groups * g_.c, 1}, count_, g_.in[2], g_.groups * g_.c);
      }
    }
  }

  void position(int64_t p, int64_t ow, const left_t* dy) {
    const int64_t w0 = lc_start(g_, 2, ow);
    const LcTaps inside = lc_taps(g_, 2, w0, 0, g_.in[2]);
    if (inside.begin == inside.end) {
      return;
    }
    for (int64_t group = 0; group < g_.groups; ++group) {
      const std::vector<Tap>* left = &taps_;
      if constexpr (std::is_same_v<P, Plain<float>>) {
        if (op_.tables) {
          by_tables(p, group, dy + group * g_.o, w0, inside);
          left = &tables_->left;
        }
      }
      if (op_.lanes == 1) {
        of_one_sample(p, group, dy + group * g_.o, w0, inside);
        continue;
      }
      const size_t at_once = op_.lanes > kFewLanes ? 1 : std::max<size_t>(left->size(), 1);
      for (size_t i = 0; i < left->size(); i += at_once) {
        by_products({left->data() + i, at_once}, p, group, dy + group * g_.o, w0, inside);
      }
    }
  }

  void by_products(std::span<const Tap> taps, int64_t p, int64_t group, const left_t* dy, int64_t w0, LcTaps inside) {
    // The columns of B that these rows of taps need, and a little between them.
    const int64_t run = g_.kernel[2] * g_.c, k0 = taps.front().column, cols = taps.back().column + run - k0;
    for (int64_t first = 0; first < g_.o; first += op_.pass) {
      const int64_t end = std::min(first + op_.pass, g_.o);
      for (int64_t i = first; i < end; i += op_.block) {
        const int64_t rows = std::min(op_.block, end - i);
        int64_t ld;
        const left_t* b = blocks_.get(p, group * g_.o + i, rows, k0, k0 + cols, ld);
        const right_t* packed = P::pack(rows, cols, b, ld, packed_);
        for (const Tap& tap : taps) {
          P::multiply(op_.b.dtype, count_, run, rows / P::kPair, dy + i, rows_.stride_n(), packed + tap.column - k0, ld,
                      tap_ + tap.column - k0, cols, i > first);
        }
      }
      // A position's sums are added to the others' by themselves: together they would be long.
      for (const Tap& tap : taps) {
        add(tap_ + tap.column - k0, cols, 0, count_, tap.row, group, w0, inside);
      }
    }
  }

  void of_one_sample(int64_t p, int64_t group, const left_t* dy, int64_t w0, LcTaps inside) {
    const int64_t k0 = taps_.front().column, k1 = taps_.back().column + g_.kernel[2] * g_.c;
    std::memset(tap_, 0, (k1 - k0) * sizeof(acc_t));
    if (op_.b.plain) {
      BK_PICK(lc_axpy)(op_.b.dtype, false, op_.b.at(p, group * g_.o, k0), op_.b.cols, g_.o, k1 - k0, dy, tap_);
    } else if (op_.signs) {
      const Operand w = weights_at(*op_.b.feedback, op_.b.rows, op_.b.cols, p, group * g_.o, k0);
      const auto scale = static_cast<acc_t>(entry_scale(op_.b.feedback->scale, op_.b.feedback->out.dtype));
      std::transform(dy, dy + g_.o, scaled_, [&](acc_t x) { return scale * x; });
      BK_PICK(lc_axpy)(w.dtype, true, w.data, w.row_stride, g_.o, k1 - k0, scaled_, tap_);
    } else {
      for (int64_t i = 0; i < g_.o; i += op_.block) {
        const int64_t rows = std::min(op_.block, g_.o - i);
        int64_t ld;
        const left_t* b = blocks_.get(p, group * g_.o + i, rows, k0, k1, ld);
        BK_PICK(lc_axpy)(acc_dtype<acc_t>, false, b, ld, rows, k1 - k0, dy + i, tap_);
      }
    }
    for (const Tap& tap : taps_) {
      add(tap_ + tap.column - k0, 0, 0, 1, tap.row, group, w0, inside);
    }
  }

  // All rows of taps but those with too many signs that are 0, which by themselves say so, whatever the band.
  void by_tables(int64_t p, int64_t group, const float* dy, int64_t w0, LcTaps inside) {
    const int64_t run = g_.kernel[2] * g_.c, k0 = taps_.front().column, cols = taps_.back().column + run - k0;
    Tables& t = *tables_;
    const SignColumns signs = t.signs.pack(
        cols, [&](int64_t row, int64_t rows) { return t.signs_of(p, group * g_.o + row, rows, k0, k0 + cols); });
    t.zeros.clear();
    t.zeros_of.assign(divide_up(cols, run), 0);
    const int64_t most = most_zeros(g_.o, run);
    for_zeros(signs, g_.o, cols, [&](int64_t row, int64_t column) {
      if (++t.zeros_of[column / run] <= most) {
        t.zeros.push_back({row, column});
      }
      return true;
    });
    const int64_t panel = divide_up(g_.o, kTableDepth) * kPlaceColumns;
    for (int64_t c = 0; c < cols; c += kPlaceColumns) {
      BK_PICK(form_places)
      ({signs.negative + c / 32 * signs.rows, nullptr, nullptr, signs.rows}, panel / kPlaceColumns,
       t.places + c / kPlaceColumns * panel);
    }
    t.left.clear();
    for (int64_t n = 0; n < count_; n += RowTables::most()) {
      const int64_t count = std::min(RowTables::most(), count_ - n);
      t.rows.sum(dy + n * rows_.stride_n(), rows_.stride_n(), count, n + 2 * count <= count_, t.scale, t.places, panel,
                 cols, tap_, cols);
      for (const auto& [row, column] : t.zeros) {
        t.rows.take_off(row, column);
      }
      for (const Tap& tap : taps_) {
        if (t.zeros_of[(tap.column - k0) / run] <= most) {
          add(tap_ + tap.column - k0, cols, n, count, tap.row, group, w0, inside);
        } else if (n == 0) {
          t.left.push_back(tap);
        }
      }
    }
  }

  // Adds a row of taps, (samples × kernel width · c), to row r of `count` samples from `first` on.
  void add(const acc_t* from, int64_t ld, int64_t first, int64_t count, int64_t r, int64_t group, int64_t w0,
           LcTaps inside) {
    const int64_t pixel = g_.groups * g_.c;
    const bool adjacent = g_.groups == 1 && g_.dilation[2] == 1;
    const int64_t step = adjacent ? inside.end - inside.begin : 1;
    for (int64_t t = inside.begin; t < inside.end; t += step) {
      BK_PICK(lc_add)(sizeof(acc_t) == 8,
                      row(r) + first * stride_n() + (w0 + t * g_.dilation[2]) * pixel + group * g_.c, stride_n(),
                      from + t * g_.c, ld, count, step * g_.c);
    }
  }

  const BackwardInput<P>& op_;
  const LcGeometry& g_;
  int64_t width_;
  Rows<left_t> rows_;
  Blocks<left_t> blocks_;
  right_t* packed_;
  acc_t *sums_, *tap_, *scaled_;
  std::vector<Tap> taps_;
  std::optional<Tables> tables_;
  int64_t first_, count_, low_, high_;
};

}  // namespace bioplaus::lc
