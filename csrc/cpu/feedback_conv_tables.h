// The input gradient of a convolution of one group by ±s, as sums of table entries: tables.h.
//
//     dX[n, c, x] = s · Σ over taps k and channels o of dY[n, o, (x + padding − k · dilation) / stride] · σ[o, c, k]
//
// A block of dY, samples or a band of a large one, becomes tables that stay in the L2 cache. Pixels of dX that see the
// same taps are a class, which has no padding to multiply. A pixel's sum has one order, by its taps and their channels,
// so that neither blocks nor threads change its bits. What an entry of σ that is 0 gave as 1 is taken off.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "buffer.h"
#include "feedback_conv_operand.h"
#include "lc.h"
#include "slab_signs.h"
#include "tables.h"

namespace bioplaus {
namespace {

// Taps at most: every class has a list of its own.
constexpr int64_t kTableTaps = 128;

// Coordinates x = first + stride · j of dX that see the same taps: pixels j + shift of dY.
struct ReachClass {
  int64_t first;
  std::vector<std::pair<int64_t, int64_t>> taps;  // tap, shift
  std::vector<int64_t> x;
};

std::vector<ReachClass> reach_classes(const ConvGeometry& g, int d) {
  std::vector<ReachClass> classes;
  for (int64_t x = 0; x < g.in[d]; ++x) {
    ReachClass mine{x % g.stride[d], {}, {}};
    for (int64_t k = 0; k < g.kernel[d]; ++k) {
      int64_t o;
      if (g.reaches(d, x, k, o) && o >= 0 && o < g.out[d]) {
        mine.taps.emplace_back(k, o - x / g.stride[d]);
      }
    }
    const auto same = std::find_if(classes.rbegin(), classes.rend(),
                                   [&](const ReachClass& c) { return c.first == mine.first && c.taps == mine.taps; });
    if (same == classes.rend()) {
      classes.push_back(std::move(mine));
      classes.back().x.push_back(x);
    } else {
      same->x.push_back(x);
    }
  }
  return classes;
}

// Bands of a sample along its outermost dimension.
struct Bands {
  int outer;
  int64_t length;  // of dX
  int64_t rows;    // of dY, at most
};

inline int64_t table_blocks(const ConvGeometry& g) { return divide_up(g.out_channels, kTableDepth); }

// None where bands would share most of their tables.
inline std::optional<Bands> table_bands(const ConvGeometry& g) {
  const int outer = g.in[0] > 1 || g.out[0] > 1 ? 0 : g.in[1] > 1 || g.out[1] > 1 ? 1 : 2;
  const int64_t all = g.out[outer], stride = g.stride[outer];
  const int64_t row = g.out[0] * g.out[1] * g.out[2] / all * table_blocks(g) * kTableFloats;
  const int64_t shared = ((g.kernel[outer] - 1) * g.dilation[outer] + stride - 1) / stride;
  // More than fit the L2 cache rather than tables that bands share.
  const int64_t rows = std::max(kTablesFloats / row, std::min(4 * kTablesFloats / row, 2 * shared + 1));
  const int64_t bands = rows >= all ? 1 : divide_up(all, std::max<int64_t>(rows - shared, 1));
  const int64_t mine = divide_up(divide_up(g.in[outer], stride), bands);
  if (g.taps() > kTableTaps || (bands > 1 && shared > mine)) {
    return std::nullopt;
  }
  return Bands{outer, mine * stride, std::min(all, mine + shared)};
}

struct ZeroSign {
  int64_t tap, out_channel, in_channel;
};

// None where there are too many.
inline std::optional<std::vector<ZeroSign>> zero_signs(const ConvGeometry& g, const ConvSigns& signs) {
  std::vector<ZeroSign> zeros;
  for (int64_t tap = 0; tap < g.taps(); ++tap) {
    for_zeros(signs.part(0, tap), g.out_channels, g.in_channels,
              [&](int64_t row, int64_t column) { zeros.push_back({tap, row, column}); });
    if (static_cast<int64_t>(zeros.size()) > g.taps() * g.out_channels * g.in_channels / kDense + 1) {
      return std::nullopt;
    }
  }
  return zeros;
}

class TableProduct {
 public:
  // `planes`: dY and dX have their channels outermost, else innermost.
  TableProduct(const ConvGeometry& g, const Bands& bands, const ConvSigns& signs, std::vector<ZeroSign> zeros,
               double scale, bool planes, const at::Tensor& grad, const at::Tensor& out)
      : g_(g),
        bands_(bands),
        zeros_(std::move(zeros)),
        panel_(g.taps() * table_blocks(g) * kPlaceColumns),
        places_(divide_up(g.in_channels, kPlaceColumns) * panel_),
        pixel_(table_blocks(g) * kTableFloats),
        inner_(g.out[0] * g.out[1] * g.out[2] / g.out[bands.outer]),
        scale_(static_cast<float>(scale)),
        planes_(planes),
        grad_(grad.const_data_ptr<float>()),
        out_(out.mutable_data_ptr<float>()) {
    at::parallel_for(0, divide_up(g.in_channels, kPlaceColumns), 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        for (int64_t tap = 0; tap < g.taps(); ++tap) {
          BK_PICK(form_places)
          (signs.part(panel * kPlaceColumns / 32, tap), table_blocks(g),
           places_.get() + panel * panel_ + tap * table_blocks(g) * kPlaceColumns);
        }
      }
    });
    for (int d = 0; d < kConvDims; ++d) {
      classes_[d] = reach_classes(g, d);
    }
    for (const ReachClass& a : classes_[0]) {
      for (const ReachClass& b : classes_[1]) {
        for (const ReachClass& c : classes_[2]) {
          add_class(a, b, c);
        }
      }
    }
  }

  void run() const {
    const int64_t bands = divide_up(g_.in[bands_.outer], bands_.length);
    const int64_t floats = bands_.rows * inner_ * pixel_;
    // Small samples share a pass over the places.
    const int64_t group =
        bands > 1 ? 1 : std::clamp<int64_t>(kTablesFloats / floats, 1, divide_up(g_.samples, at::get_num_threads()));
    at::parallel_for(0, divide_up(g_.samples, group) * bands, 1, [&](int64_t begin, int64_t end) {
      Workspace w(*this, group);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t sample = unit / bands * group;
        block(w, sample, std::min(group, g_.samples - sample), unit % bands * bands_.length);
      }
    });
  }

 private:
  struct Workspace {
    Workspace(const TableProduct& p, int64_t group)
        : tables(group * p.bands_.rows * p.inner_ * p.pixel_),
          grad(p.planes_ ? group * p.bands_.rows * p.inner_ * p.g_.out_channels : 0),
          out(p.planes_ ? group * p.pixels_of(std::min(p.bands_.length, p.g_.in[p.bands_.outer])) * p.g_.in_channels
                        : 0) {}

    Buffer<float> tables;
    Buffer<float> grad, out;  // of planes: channels innermost
    std::vector<TableRow> pixels;
    std::vector<int64_t> met;  // the entries of dY at which they begin
  };

  // A class in every dimension, and a TableRun's offsets.
  struct PixelClass {
    std::array<const ReachClass*, kConvDims> of;
    std::vector<int64_t> tables, places;
    std::vector<std::pair<int64_t, ZeroSign>> zeros;  // and entries of dY to the one it meets
  };

  void add_class(const ReachClass& a, const ReachClass& b, const ReachClass& c) {
    PixelClass mine{{&a, &b, &c}, {}, {}, {}};
    // Neighbours along the width read each other's tables: their taps are together.
    for (const auto& [ka, ja] : a.taps) {
      for (const auto& [kb, jb] : b.taps) {
        for (int64_t block = 0; block < table_blocks(g_); ++block) {
          for (const auto& [kc, jc] : c.taps) {
            const int64_t tap = (ka * g_.kernel[1] + kb) * g_.kernel[2] + kc;
            mine.tables.push_back(((ja * g_.out[1] + jb) * g_.out[2] + jc) * pixel_ + block * kTableFloats);
            mine.places.push_back((tap * table_blocks(g_) + block) * kPlaceColumns);
          }
        }
      }
    }
    for (const ZeroSign& zero : zeros_) {
      for (const auto& [ka, ja] : a.taps) {
        for (const auto& [kb, jb] : b.taps) {
          for (const auto& [kc, jc] : c.taps) {
            if ((ka * g_.kernel[1] + kb) * g_.kernel[2] + kc == zero.tap) {
              const int64_t shift = (ja * g_.out[1] + jb) * g_.out[2] + jc;
              mine.zeros.emplace_back(shift * g_.out_channels + zero.out_channel, zero);
            }
          }
        }
      }
    }
    pixels_.push_back(std::move(mine));
  }

  // Of dX along the outermost dimension.
  int64_t pixels_of(int64_t length) const { return g_.pixels() / g_.in[bands_.outer] * length; }

  // Pixels of dX of some samples, `from` on along the outermost dimension.
  void block(Workspace& w, int64_t sample, int64_t samples, int64_t from) const {
    const int outer = bands_.outer;
    const int64_t stride = g_.stride[outer], end = std::min(from + bands_.length, g_.in[outer]);
    const int64_t reach = from + g_.padding[outer] - (g_.kernel[outer] - 1) * g_.dilation[outer];
    const int64_t low = std::clamp<int64_t>(floor_divide(reach + stride - 1, stride), 0, g_.out[outer]);
    const int64_t high = std::clamp<int64_t>(floor_divide(end - 1 + g_.padding[outer], stride) + 1, low, g_.out[outer]);
    const int64_t all = g_.out[outer] * inner_, held = (high - low) * inner_;
    const int64_t mine = pixels_of(end - from), o = g_.out_channels, c = g_.in_channels;
    const int64_t grad_step = (planes_ ? held : all) * o, out_step = (planes_ ? mine : g_.pixels()) * c;
    const float* grad = planes_ ? w.grad.get() : grad_ + (sample * all + low * inner_) * o;
    float* out = planes_ ? w.out.get() : out_ + (sample * g_.pixels() + pixels_of(from)) * c;
    constexpr DType kFloat = DType::Float32;
    for (int64_t s = 0; s < samples; ++s) {
      if (planes_) {
        const float* planes = grad_ + (sample + s) * all * o + low * inner_;
        BK_PICK(lc_copy)({w.grad.get() + s * grad_step, planes, kFloat, kFloat, {1, o, held}, {0, 1, o}, {0, all, 1}});
      }
      BK_PICK(form_tables)(grad + s * grad_step, o, held, o, w.tables.get() + s * held * pixel_);
    }
    for (const PixelClass& pixel_class : pixels_) {
      const auto in_band = [&](int d, int64_t x) { return d != outer || (x >= from && x < end); };
      w.pixels.clear();
      w.met.clear();
      for (int64_t s = 0; s < samples; ++s) {
        for (const int64_t x0 : pixel_class.of[0]->x) {
          for (const int64_t x1 : pixel_class.of[1]->x) {
            for (const int64_t x2 : pixel_class.of[2]->x) {
              if (in_band(0, x0) && in_band(1, x1) && in_band(2, x2)) {
                ConvSize j{x0 / g_.stride[0], x1 / g_.stride[1], x2 / g_.stride[2]};
                j[outer] -= low;
                const int64_t at = (j[0] * g_.out[1] + j[1]) * g_.out[2] + j[2];
                const int64_t pixel = (x0 * g_.in[1] + x1) * g_.in[2] + x2 - pixels_of(from);
                w.pixels.push_back({(s * held + at) * pixel_, out + s * out_step + pixel * c});
                w.met.push_back(s * grad_step + at * o);
              }
            }
          }
        }
      }
      const TableRun run{pixel_class.tables.data(), pixel_class.places.data(),
                         static_cast<int64_t>(pixel_class.tables.size())};
      BK_PICK(sum_tables)
      ({w.tables.get(), run, places_.get(), panel_, false, scale_}, w.pixels.data(),
       static_cast<int64_t>(w.pixels.size()), c);
      for (const auto& [entry, zero] : pixel_class.zeros) {
        for (size_t i = 0; i < w.pixels.size(); ++i) {
          w.pixels[i].out[zero.in_channel] -= scale_ * grad[w.met[i] + entry];
        }
      }
    }
    for (int64_t s = 0; planes_ && s < samples; ++s) {
      float* planes = out_ + (sample + s) * g_.pixels() * c + pixels_of(from);
      BK_PICK(lc_copy)
      ({planes, out + s * out_step, kFloat, kFloat, {1, c, mine}, {0, g_.pixels(), 1}, {0, 1, c}});
    }
  }

  ConvGeometry g_;
  Bands bands_;
  std::vector<ZeroSign> zeros_;
  int64_t panel_;
  Buffer<int32_t> places_;
  int64_t pixel_, inner_;
  float scale_;
  bool planes_;
  const float* grad_;
  float* out_;
  std::array<std::vector<ReachClass>, kConvDims> classes_;
  std::vector<PixelClass> pixels_;
};

}  // namespace
}  // namespace bioplaus
