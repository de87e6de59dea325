// The input gradient of a convolution of one group by ±s, as sums of table entries: tables.h.
//
//     dX[n, c, x] = s · Σ over taps k and channels o of dY[n, o, (x + padding − k · dilation) / stride] · σ[o, c, k]
//
// A block of dY, samples or a band of a large one, becomes tables that stay in the L2 cache, or stays there itself
// where a few rows' tables are formed for each tap. Pixels of dX that see the same taps are a class, which has no
// padding to multiply. A pixel's sum has one order, by its taps and their channels, so that neither blocks nor threads
// change its bits. What an entry of σ that is 0 gave as 1 is taken off. A block of a half type is widened, and its sums
// are rounded once.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "buffer.h"
#include "feedback_conv_signs.h"
#include "slab_signs.h"
#include "tables.h"

namespace bioplaus {
namespace {

// Taps at most, as every class has a list of its own.
constexpr int64_t kTableTaps = 128;
// What of a block stays in the L2 cache, and about the most where bands would otherwise share most of it, or samples
// would leave lanes empty, in floats.
constexpr int64_t kTablesFloats = int64_t{1} << 17;
constexpr int64_t kMostFloats = 4 * kTablesFloats;
// Floats of dY that are fetched ahead of those that become tables.
constexpr int64_t kAhead = 1024;

// Coordinates x = first + stride · j of dX, j in [begin, end), that see the same taps: pixels j + shift of dY.
struct ReachClass {
  struct Tap {
    int64_t tap, shift;
  };
  int64_t first, begin, end;
  std::vector<Tap> taps;
};

// Those that see any. A tap is seen by the coordinates of one remainder, from some j to another.
inline std::vector<ReachClass> reach_classes(const ConvGeometry& g, int d) {
  std::vector<ReachClass> classes;
  for (int64_t first = 0; first < std::min(g.stride[d], g.in[d]); ++first) {
    const int64_t count = divide_up(g.in[d] - first, g.stride[d]);
    std::vector<ReachClass::Tap> taps;
    std::vector<int64_t> cuts;
    for (int64_t k = 0; k < g.kernel[d]; ++k) {
      int64_t shift;
      if (g.reaches(d, first, k, shift)) {
        taps.push_back({k, shift});
        cuts.push_back(std::clamp<int64_t>(-shift, 0, count));
        cuts.push_back(std::clamp<int64_t>(g.out[d] - shift, 0, count));
      }
    }
    std::sort(cuts.begin(), cuts.end());
    for (size_t i = 1; i < cuts.size(); ++i) {
      ReachClass mine{first, cuts[i - 1], cuts[i], {}};
      std::copy_if(taps.begin(), taps.end(), std::back_inserter(mine.taps), [&](const ReachClass::Tap& tap) {
        return mine.begin + tap.shift >= 0 && mine.end + tap.shift <= g.out[d];
      });
      if (mine.begin < mine.end && !mine.taps.empty()) {
        classes.push_back(std::move(mine));
      }
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

// None where a row of dY, of pixels of so many floats, is too large, or bands would share most of theirs.
inline std::optional<Bands> bands_of(const ConvGeometry& g, double floats) {
  const int outer = g.in[0] > 1 || g.out[0] > 1 ? 0 : g.in[1] > 1 || g.out[1] > 1 ? 1 : 2;
  for (int d = 0; d < kConvDims; ++d) {
    floats *= d == outer ? 1.0 : static_cast<double>(g.out[d]);
  }
  if (g.taps() > kTableTaps || floats > kMostFloats) {
    return std::nullopt;
  }
  const int64_t row = static_cast<int64_t>(floats), all = g.out[outer], stride = g.stride[outer];
  const int64_t shared = divide_up((g.kernel[outer] - 1) * g.dilation[outer], stride);
  const int64_t rows = std::max(kTablesFloats / row, std::min(kMostFloats / row, 2 * shared + 1));
  // As many as there are threads without a sample of their own, too, where that does not decide whether there are any.
  const int64_t own = divide_up(g.in[outer], stride);
  const int64_t fewest = std::min(divide_up(at::get_num_threads(), g.samples), own / (shared + 1));
  const int64_t bands = std::max(rows >= all ? 1 : divide_up(all, std::max<int64_t>(rows - shared, 1)), fewest);
  const int64_t mine = divide_up(own, bands);
  return bands > 1 && shared > mine ? std::nullopt
                                    : std::optional(Bands{outer, mine * stride, std::min(all, mine + shared)});
}

// Whether there are any does not depend on how they are multiplied. Where lanes are rows a pixel of dY and those of dX
// are kept instead of tables.
inline std::optional<Bands> table_bands(const ConvGeometry& g) {
  const double tables = static_cast<double>(table_blocks(g)) * kTableFloats;
  const std::optional<Bands> bands = bands_of(g, tables);
  double of_dx = static_cast<double>(g.in_channels);
  for (const int64_t stride : g.stride) {
    of_dx *= static_cast<double>(stride);
  }
  return bands && lanes_are_rows() ? bands_of(g, std::min(tables, static_cast<double>(g.out_channels) + of_dx)) : bands;
}

struct ZeroSign {
  int64_t tap, out_channel, in_channel;
};

// None where there are too many.
inline std::optional<std::vector<ZeroSign>> zero_signs(const ConvGeometry& g, const ConvSigns& signs) {
  const int64_t most = most_zeros(g.taps() * g.out_channels, g.in_channels);
  std::vector<ZeroSign> zeros;
  for (int64_t tap = 0; tap < g.taps(); ++tap) {
    const bool few = for_zeros(signs.part(0, tap), g.out_channels, g.in_channels, [&](int64_t row, int64_t column) {
      zeros.push_back({tap, row, column});
      return static_cast<int64_t>(zeros.size()) <= most;
    });
    if (!few) {
      return std::nullopt;
    }
  }
  return zeros;
}

class TableProduct {
 public:
  // `planes`: dY and dX have their channels outermost, else innermost.
  TableProduct(const ConvGeometry& g, const Bands& bands, const ConvSigns& signs, std::vector<ZeroSign> zeros,
               double scale, DType dtype, bool planes, const at::Tensor& grad, const at::Tensor& out)
      : g_(g),
        bands_(bands),
        zeros_(std::move(zeros)),
        panels_(divide_up(g.in_channels, kPlaceColumns)),
        panel_(g.taps() * table_blocks(g) * kPlaceColumns),
        places_(panels_ * panel_),
        lanes_(lanes_are_rows()),
        pixel_(lanes_ ? g.out_channels : table_blocks(g) * kTableFloats),
        inner_(g.out[0] * g.out[1] * g.out[2] / g.out[bands.outer]),
        scale_(static_cast<float>(entry_scale(scale, dtype))),
        dtype_(dtype),
        planes_(planes),
        copied_(planes || dtype != DType::Float32),
        grad_(static_cast<const char*>(grad.const_data_ptr())),
        out_(static_cast<char*>(out.mutable_data_ptr())) {
    at::parallel_for(0, panels_, 1, [&](int64_t begin, int64_t end) {
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
      int64_t reached = 0;
      for (const ReachClass& c : classes_[d]) {
        reached += c.end - c.begin;
      }
      whole_ = whole_ && reached == g.in[d];
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
    const int64_t bands = divide_up(g_.in[bands_.outer], bands_.length), threads = at::get_num_threads();
    const int64_t floats = bands_.rows * inner_ * pixel_ + pixels_of(bands_.length) * g_.in_channels;
    // Small samples share a pass over the places, and fill lanes; as many of them for each thread.
    const int64_t most = std::max<int64_t>((lanes_ ? kMostFloats : kTablesFloats) / floats, 1);
    const int64_t fewest = divide_up(divide_up(g_.samples, most), threads) * threads;
    const int64_t groups = bands > 1 ? g_.samples : std::min(fewest, g_.samples), blocks = groups * bands;
    // Where there are too few blocks, parts of the columns, which each form the tables.
    const int64_t parts = std::clamp<int64_t>(threads / blocks, 1, panels_);
    at::parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
      Workspace w(*this, divide_up(g_.samples, groups));
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t group = unit / parts / bands, part = unit % parts;
        const int64_t sample = g_.samples * group / groups, samples = g_.samples * (group + 1) / groups - sample;
        w.first = panels_ * part / parts * kPlaceColumns;
        w.cols = std::min(panels_ * (part + 1) / parts * kPlaceColumns, g_.in_channels) - w.first;
        block(w, sample, samples, unit / parts % bands * bands_.length);
      }
    });
  }

 private:
  struct Workspace {
    Workspace(const TableProduct& p, int64_t group)
        : tables(p.lanes_ ? kLanesScratch : group * p.bands_.rows * p.inner_ * p.pixel_),
          grad(p.copied_ ? group * p.bands_.rows * p.inner_ * p.g_.out_channels : 0),
          out(p.copied_ ? group * p.pixels_of(p.bands_.length) * p.g_.in_channels : 0) {}

    Buffer<float> tables;
    Buffer<float> grad, out;  // of planes and half types: channels innermost
    std::vector<TableRow> pixels;
    std::vector<int64_t> met;  // the entries of dY at which they begin
    int64_t first, cols;       // of dX
  };

  // A class in every dimension, and a TableRun's offsets, or where lanes are rows blocks.
  struct PixelClass {
    std::array<const ReachClass*, kConvDims> of;
    std::vector<int64_t> tables, places;
    std::vector<LaneBlock> blocks;
    std::vector<std::pair<int64_t, ZeroSign>> zeros;  // and entries of dY to the one it meets
  };

  void add_class(const ReachClass& a, const ReachClass& b, const ReachClass& c) {
    PixelClass mine{{&a, &b, &c}, {}, {}, {}, {}};
    std::vector<int64_t> shift_of(g_.taps(), kUnseen);
    // Neighbours along the width read each other's tables: their taps are together.
    for (const auto& [ka, ja] : a.taps) {
      for (const auto& [kb, jb] : b.taps) {
        for (int64_t block = 0; block < table_blocks(g_); ++block) {
          for (const auto& [kc, jc] : c.taps) {
            const int64_t tap = (ka * g_.kernel[1] + kb) * g_.kernel[2] + kc;
            shift_of[tap] = (ja * g_.out[1] + jb) * g_.out[2] + jc;
            const int64_t places = (tap * table_blocks(g_) + block) * kPlaceColumns, entry = block * kTableDepth;
            if (lanes_) {
              mine.blocks.push_back(
                  {shift_of[tap] * g_.out_channels + entry, std::min(kTableDepth, g_.out_channels - entry), places});
            } else {
              mine.tables.push_back(shift_of[tap] * pixel_ + block * kTableFloats);
              mine.places.push_back(places);
            }
          }
        }
      }
    }
    for (const ZeroSign& zero : zeros_) {
      if (shift_of[zero.tap] != kUnseen) {
        mine.zeros.emplace_back(shift_of[zero.tap] * g_.out_channels + zero.out_channel, zero);
      }
    }
    pixels_.push_back(std::move(mine));
  }

  // Of dX along the outermost dimension.
  int64_t pixels_of(int64_t length) const {
    return g_.pixels() / g_.in[bands_.outer] * std::min(length, g_.in[bands_.outer]);
  }

  // Pixels of dX of some samples, `from` on along the outermost dimension.
  void block(Workspace& w, int64_t sample, int64_t samples, int64_t from) const {
    const int outer = bands_.outer;
    const int64_t stride = g_.stride[outer], end = std::min(from + bands_.length, g_.in[outer]);
    const int64_t reach = from + g_.padding[outer] - (g_.kernel[outer] - 1) * g_.dilation[outer];
    const int64_t low = std::clamp<int64_t>(floor_divide(reach + stride - 1, stride), 0, g_.out[outer]);
    const int64_t high = std::clamp<int64_t>(floor_divide(end - 1 + g_.padding[outer], stride) + 1, low, g_.out[outer]);
    TORCH_INTERNAL_ASSERT(high - low <= bands_.rows);
    const int64_t all = g_.out[outer] * inner_, held = (high - low) * inner_;
    const int64_t mine = pixels_of(end) - pixels_of(from), o = g_.out_channels, c = g_.in_channels;
    const int64_t grad_step = (copied_ ? held : all) * o, out_step = (copied_ ? mine : g_.pixels()) * c;
    // Of dY and dX, from the block's first entry of a sample on.
    const auto of_grad = [&](int64_t s) {
      return grad_ + (s * all * o + low * inner_ * (planes_ ? 1 : o)) * size_of(dtype_);
    };
    const auto of_out = [&](int64_t s) {
      const int64_t first = planes_ ? w.first * g_.pixels() + pixels_of(from) : pixels_of(from) * c + w.first;
      return out_ + (s * g_.pixels() * c + first) * size_of(dtype_);
    };
    const float* grad = copied_ ? w.grad.get() : reinterpret_cast<const float*>(of_grad(sample));
    float* out = copied_ ? w.out.get() + w.first : reinterpret_cast<float*>(of_out(sample));
    constexpr DType kFloat = DType::Float32;
    for (int64_t s = 0; s < samples; ++s) {
      if (planes_) {
        to_pixels(w.grad.get() + s * grad_step, of_grad(sample + s), dtype_, all, o, held);
      } else if (copied_) {
        copy_rows(w.grad.get() + s * grad_step, kFloat, o, of_grad(sample + s), dtype_, o, held, o);
      }
      const float* x = grad + s * grad_step;
      if (!lanes_) {
        BK_PICK(form_tables)(x, o, held, o, scale_, w.tables.get() + s * held * pixel_, x + kAhead);
      }
      for (int64_t pixel = 0; !whole_ && pixel < mine; ++pixel) {
        std::fill_n(out + s * out_step + pixel * c, w.cols, 0.0f);
      }
    }
    for (const PixelClass& pixel_class : pixels_) {
      // From pixels of its own to those of the block.
      std::array<int64_t, kConvDims> j_begin, j_end;
      for (int d = 0; d < kConvDims; ++d) {
        const ReachClass& r = *pixel_class.of[d];
        j_begin[d] = d == outer ? std::max(r.begin, from / stride) : r.begin;
        j_end[d] = d == outer ? std::min(r.end, divide_up(end - r.first, stride)) : r.end;
      }
      w.pixels.clear();
      w.met.clear();
      for (int64_t s = 0; s < samples; ++s) {
        ConvSize j;
        for (j[0] = j_begin[0]; j[0] < j_end[0]; ++j[0]) {
          for (j[1] = j_begin[1]; j[1] < j_end[1]; ++j[1]) {
            for (j[2] = j_begin[2]; j[2] < j_end[2]; ++j[2]) {
              const int64_t at = (j[0] * g_.out[1] + j[1]) * g_.out[2] + j[2] - low * inner_;
              int64_t pixel = 0;
              for (int d = 0; d < kConvDims; ++d) {
                pixel = pixel * g_.in[d] + pixel_class.of[d]->first + j[d] * g_.stride[d];
              }
              pixel -= pixels_of(from);
              w.met.push_back(s * grad_step + at * o);
              w.pixels.push_back({lanes_ ? w.met.back() : (s * held + at) * pixel_, out + s * out_step + pixel * c});
            }
          }
        }
      }
      const int64_t count = static_cast<int64_t>(w.pixels.size());
      const int32_t* places = places_.get() + w.first / kPlaceColumns * panel_;
      if (lanes_) {
        const int64_t depth = static_cast<int64_t>(pixel_class.blocks.size());
        const int64_t parts = divide_up(count, kLanes);
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t begin = lanes_begin(count, part, parts);
          BK_PICK(sum_lanes)
          ({grad, scale_, w.pixels.data() + begin, lanes_begin(count, part + 1, parts) - begin,
            pixel_class.blocks.data(), depth, places, panel_, w.cols},
           w.tables.get());
        }
      } else {
        const int64_t depth = static_cast<int64_t>(pixel_class.tables.size());
        BK_PICK(sum_tables)
        ({w.tables.get(), {pixel_class.tables.data(), pixel_class.places.data(), depth}, places, panel_, false},
         w.pixels.data(), count, w.cols);
      }
      for (const auto& [entry, zero] : pixel_class.zeros) {
        if (zero.in_channel >= w.first && zero.in_channel < w.first + w.cols) {
          BK_PICK(take_off)(grad + entry, w.met.data(), scale_, w.pixels.data(), count, zero.in_channel - w.first);
        }
      }
    }
    for (int64_t s = 0; copied_ && s < samples; ++s) {
      const float* sums = out + s * out_step;
      if (planes_) {
        to_planes(of_out(sample + s), dtype_, g_.pixels(), sums, c, w.cols, mine);
      } else {
        copy_rows(of_out(sample + s), dtype_, c, sums, kFloat, c, mine, w.cols);
      }
    }
  }

  static constexpr int64_t kUnseen = INT64_MIN;

  ConvGeometry g_;
  Bands bands_;
  std::vector<ZeroSign> zeros_;
  int64_t panels_, panel_;
  Buffer<int32_t> places_;
  bool lanes_;
  int64_t pixel_;  // floats kept of a pixel of dY
  int64_t inner_;
  float scale_;
  DType dtype_;
  bool planes_, copied_;
  const char* grad_;
  char* out_;
  bool whole_ = true;  // every pixel of dX sees a tap
  std::array<std::vector<ReachClass>, kConvDims> classes_;
  std::vector<PixelClass> pixels_;
};

}  // namespace
}  // namespace bioplaus
