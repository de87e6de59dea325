// The input gradient of a convolution of one group by ±s, as the integer products of feedback_mm.cpp.
//
//     dX[n, c, x] = s · Σ over taps k and channels o of dY[n, o, (x + padding − k · dilation) / stride] · σ[o, c, k]
//
// There is no gathered matrix. A block of dY – a sample, or a band of a large one – becomes fixed point under one
// scale, an image of digits with a border of zeros; tiles of the left operand lie in it, adjacent pixels of one row,
// and a tap is an offset to them. Pixels of dX with the same remainder by the stride see the same taps: a phase. The
// operand is formed whole, taps of 64 channels one after the other.
//
// One scale loses more of a patch that is small beside its block. Rounding to q adds an error of √(K/12) last places
// (root mean square); where that is more than 2^−24 of the patch's norm – a rounding of the result – or a patch holds
// an infinity or a NaN, the pixel is done anew: its patch gathered, with a scale of its own. Norms are integers, so
// that every level agrees.
//
// Blocks depend on shapes alone, so that neither threads nor the rest of the batch change a sample's bits. Where their
// images are mostly border, mostly each other's, or large, there are none.
// Roofline: feedback_mm_product_kernel.cpp's, and 8 bytes an entry of dY.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "buffer.h"
#include "feedback_conv_signs.h"

namespace bioplaus {
namespace {

// Digits of a block that stay in the L2 cache, and pixels that are done anew together.
constexpr int64_t kImageBytes = int64_t{1} << 19;
constexpr int64_t kGathered = 32;
// The most of a block that cannot be cut.
constexpr int64_t kMostImageBytes = 8 * kImageBytes;
// Pixels of a block's image for each of dY that is its own, at most.
constexpr double kBorder = 16;
// Pixels of an image at most: its bytes stay within 64 bits, whatever the channels.
constexpr double kPixels = 0x1p32;

// Pixels of dX that see the same taps: x = first + stride · j.
struct Phase {
  ConvSize first;
  int64_t taps;
  std::vector<int64_t> digits, operand;  // a Run's
  std::vector<int64_t> reached;          // pixels of the image from pixel j of it to each tap's
};

// Bands of equal length along the outermost dimension, a multiple of the stride.
struct Blocks {
  int outer = 0;
  ConvSize low, size;  // of the image of a block that begins at pixel 0: its first pixel of dY, and how many
  int64_t band;        // pixels of dX in a block, along the outermost dimension
};

// `bytes`: of a pixel of the image. None where its images are mostly border or each other's, or large.
inline std::optional<Blocks> blocks_of(const ConvGeometry& g, int64_t bytes) {
  Blocks b;
  double image = 1, own = 1;
  for (int d = 0; d < kConvDims; ++d) {
    b.low[d] = floor_divide(g.padding[d] - (g.kernel[d] - 1) * g.dilation[d], g.stride[d]);
    b.size[d] = floor_divide(g.in[d] - 1 + g.padding[d], g.stride[d]) - b.low[d] + 1;
    image *= static_cast<double>(b.size[d]);
    own *= static_cast<double>(divide_up(g.in[d], g.stride[d]));
  }
  if (image > std::min(kBorder * own, kPixels)) {
    return std::nullopt;
  }
  while (b.outer + 1 < kConvDims && g.in[b.outer] == 1 && g.out[b.outer] == 1) {
    ++b.outer;
  }
  int64_t &size = b.size[b.outer], stride = g.stride[b.outer];
  const int64_t all = divide_up(g.in[b.outer], stride), row = b.size[0] * b.size[1] * b.size[2] / size;
  const int64_t bands = divide_up(all, std::max<int64_t>(1, kImageBytes / (row * bytes) - size + all));
  const int64_t mine = divide_up(all, bands);
  b.band = mine * stride;
  size = floor_divide(b.band - 1 + g.padding[b.outer], stride) - b.low[b.outer] + 1;
  return (bands > 1 && size > 2 * mine) || row * size * bytes > kMostImageBytes ? std::nullopt : std::optional(b);
}

class ConvProduct {
 public:
  // `planes`: dY and dX have their channels outermost, else innermost.
  ConvProduct(const ConvGeometry& g, const Blocks& blocks, const FeedbackArgs& args, bool planes,
              const at::Tensor& grad, const at::Tensor& out)
      : g_(g),
        signs_(g, args),
        panel_(BK_PICK_PRODUCT(panel_bytes)(signs_.depth(g))),
        panels_(divide_up(g.in_channels, 32)),
        operand_(panels_ * panel_),
        planes_(planes),
        grad_(grad.const_data_ptr<float>()),
        out_(out.mutable_data_ptr<float>()),
        inner_(g.out[0] * g.out[1] * g.out[2] / g.out[blocks.outer]),
        outer_(blocks.outer),
        low_(blocks.low),
        size_(blocks.size),
        band_(blocks.band) {
    p_.depth = signs_.depth(g);
    at::parallel_for(0, panels_, 1, [&](int64_t begin, int64_t end) {
      BK_PICK_PRODUCT(form_panels)(signs_.part(begin, 0), begin, end, p_.depth, operand_.get());
    });
    p_.out_stride = g.in_channels;
    p_.dtype = DType::Float32;
    p_.scale = static_cast<float>(args.scale);
    p_.bytes = 4;
    in_tile_ = BK_PICK_PRODUCT(tile_rows)(p_.bytes);
    const int64_t depth_blocks = BK_PICK_PRODUCT(digit_bytes)(1, p_.depth, p_.bytes) / kTileBytes;
    blocks_ = depth_blocks / g.taps();
    pixel_bytes_ = kTileBytes / in_tile_;
    add_phases(depth_blocks);
    in_order_ = steps(depth_blocks, kTileBytes);
    operand_order_ = steps(depth_blocks, panel_ / depth_blocks);
  }

  void run() const {
    const int64_t bands = divide_up(g_.in[outer_], band_), threads = at::get_num_threads();
    const int64_t bytes = image_pixels() * blocks_ * pixel_bytes_;
    // Small samples share a pass over the operand; as many of them for each thread.
    const int64_t fewest = divide_up(divide_up(g_.samples, divide_up(kImageBytes, bytes)), threads) * threads;
    const int64_t groups = bands > 1 ? g_.samples : std::min(fewest, g_.samples), blocks = groups * bands;
    // Where there are too few blocks, parts of the columns, which each form the digits.
    const int64_t parts = std::clamp<int64_t>(threads / blocks, 1, panels_);
    at::parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
      Workspace w(*this, divide_up(g_.samples, groups), divide_up(panels_, parts) * 32);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t group = unit / parts / bands, part = unit % parts, sample = g_.samples * group / groups;
        w.panel = panels_ * part / parts;
        w.cols = std::min(panels_ * (part + 1) / parts * 32, g_.in_channels) - w.panel * 32;
        block(w, sample, g_.samples * (group + 1) / groups - sample, unit / parts % bands * band_);
      }
    });
  }

 private:
  struct Workspace {
    Workspace(const ConvProduct& c, int64_t group, int64_t most_cols)
        // A tile may end beyond its row, and so beyond the image.
        : image(group * c.image_pixels() * c.blocks_ * c.pixel_bytes_ + kTileBytes * c.blocks_),
          sums(c.image_pixels()),
          reached(c.size_[2]),
          tops(c.image_pixels()),
          fixed(group * c.out_pixels()),
          grad(c.planes_ ? group * c.held() * c.g_.out_channels : 0),
          out(c.planes_ ? group * c.out_pixels() * most_cols : 0),
          scratch(BK_PICK_PRODUCT(panels_scratch)(c.p_, static_cast<int64_t>(c.in_order_.size()))) {}

    Buffer<int8_t> image;
    Buffer<PixelSums> sums, reached;
    Buffer<uint32_t> tops;
    Buffer<FixedPoint> fixed;
    Buffer<float> grad, out;  // of planes: channels innermost
    Buffer<char> scratch;
    const float* pixels;        // of dY
    int64_t first_pixel, step;  // pixel 0 of the block's first sample among them, and from a sample to the next
    double unit = 0;            // of the last sample's image
    int64_t panel, cols;        // of dX
    std::vector<DigitTile> tiles;
    std::vector<int64_t> anew;  // pixels of dX, counted from the block's first
  };

  int64_t image_pixels() const { return size_[0] * size_[1] * size_[2]; }
  // Pixels of dY that a block of one sample reads, at most, and of dX that it writes.
  int64_t held() const { return std::min(size_[outer_], g_.out[outer_]) * inner_; }
  int64_t out_pixels() const { return g_.pixels() / g_.in[outer_] * std::min(band_, g_.in[outer_]); }

  void add_phases(int64_t depth_blocks) {
    const int64_t tile = panel_ / depth_blocks;
    const int64_t block_bytes = size_[2] * pixel_bytes_;
    ConvSize r;
    for (r[0] = 0; r[0] < std::min(g_.stride[0], g_.in[0]); ++r[0]) {
      for (r[1] = 0; r[1] < std::min(g_.stride[1], g_.in[1]); ++r[1]) {
        for (r[2] = 0; r[2] < std::min(g_.stride[2], g_.in[2]); ++r[2]) {
          Phase phase{r, 0, {}, {}, {}};
          for (int64_t tap = 0; tap < g_.taps(); ++tap) {
            const ConvSize k{tap / (g_.kernel[1] * g_.kernel[2]), tap / g_.kernel[2] % g_.kernel[1],
                             tap % g_.kernel[2]};
            ConvSize o;
            if (!g_.reaches(0, r[0], k[0], o[0]) || !g_.reaches(1, r[1], k[1], o[1]) ||
                !g_.reaches(2, r[2], k[2], o[2])) {
              continue;
            }
            ++phase.taps;
            const int64_t row = (o[0] - low_[0]) * size_[1] + o[1] - low_[1];
            phase.reached.push_back(row * size_[2] + o[2] - low_[2]);
            for (int64_t b = 0; b < blocks_; ++b) {
              phase.digits.push_back((row * blocks_ + b) * block_bytes + (o[2] - low_[2]) * pixel_bytes_);
              phase.operand.push_back((tap * blocks_ + b) * tile);
            }
          }
          phases_.push_back(std::move(phase));
        }
      }
    }
  }

  // Calls row(pixel of the sample's image, pixel of the block, pixels) for every row of a phase.
  template <typename Row>
  void for_rows(const Phase& phase, int64_t from, const Row& row) const {
    ConvSize end = g_.in;
    end[outer_] = std::min(band_, g_.in[outer_] - from);
    ConvSize j;
    for (j[0] = 0; phase.first[0] + j[0] * g_.stride[0] < end[0]; ++j[0]) {
      for (j[1] = 0; phase.first[1] + j[1] * g_.stride[1] < end[1]; ++j[1]) {
        if (phase.first[2] < end[2]) {
          row((j[0] * size_[1] + j[1]) * size_[2],
              ((phase.first[0] + j[0] * g_.stride[0]) * g_.in[1] + phase.first[1] + j[1] * g_.stride[1]) * g_.in[2] +
                  phase.first[2],
              divide_up(end[2] - phase.first[2], g_.stride[2]));
        }
      }
    }
  }

  const float* pixel_of_grad(const Workspace& w, int64_t s, int64_t pixel) const {
    return w.pixels + (w.first_pixel + s * w.step + pixel) * g_.out_channels;
  }

  // dY of some samples, as far as the block needs it.
  void read(Workspace& w, int64_t sample, int64_t samples, int64_t from) const {
    const int64_t all = g_.out[outer_] * inner_;
    if (!planes_) {
      w.pixels = grad_;
      w.first_pixel = sample * all;
      w.step = all;
      return;
    }
    const int64_t low = low_[outer_] + from / g_.stride[outer_];
    const int64_t begin = std::clamp<int64_t>(low, 0, g_.out[outer_]) * inner_;
    const int64_t end = std::clamp<int64_t>(low + size_[outer_], 0, g_.out[outer_]) * inner_;
    w.pixels = w.grad.get();
    w.first_pixel = -begin;
    w.step = end - begin;
    for (int64_t s = 0; s < samples; ++s) {
      to_pixels(w.grad.get() + s * w.step * g_.out_channels, grad_ + (sample + s) * all * g_.out_channels + begin,
                p_.dtype, all, g_.out_channels, w.step);
    }
  }

  // Pixels of dX of some samples, `from` on along the outermost dimension.
  void block(Workspace& w, int64_t sample, int64_t samples, int64_t from) const {
    const int64_t inner = g_.pixels() / g_.in[outer_];
    float* out = out_ + sample * g_.pixels() * g_.in_channels +
                 (planes_ ? w.panel * 32 * g_.pixels() + from * inner : from * inner * g_.in_channels + w.panel * 32);
    SignProduct p = p_;
    p.cols = w.cols;
    p.out_stride = planes_ ? w.cols : g_.in_channels;
    p.fixed = w.fixed.get();
    p.out = planes_ ? w.out.get() : out;
    read(w, sample, samples, from);
    w.anew.clear();
    for (int64_t s = 0; s < samples; ++s) {
      quantise(w, s, from);
      for (const Phase& phase : phases_) {
        weigh(w, phase, s * g_.pixels(), from);
      }
    }
    for (const Phase& phase : phases_) {
      if (phase.taps == 0) {
        clear(phase, p, samples, from);
        continue;
      }
      w.tiles.clear();
      for (int64_t s = 0; s < samples; ++s) {
        const int8_t* image = w.image.get() + s * image_pixels() * blocks_ * pixel_bytes_;
        for_rows(phase, from, [&](int64_t at, int64_t pixel, int64_t count) {
          for (int64_t j = 0; j < count; j += in_tile_) {
            w.tiles.push_back({image + (at * blocks_ + j) * pixel_bytes_, s * g_.pixels() + pixel + j * g_.stride[2],
                               std::min(in_tile_, count - j)});
          }
        });
      }
      BK_PICK_PRODUCT(multiply_panels)
      (p, w.tiles.data(), static_cast<int64_t>(w.tiles.size()), g_.stride[2],
       {phase.digits.data(), phase.operand.data(), static_cast<int64_t>(phase.digits.size())},
       operand_.get() + w.panel * panel_, w.scratch.get());
    }
    for (size_t i = 0; i < w.anew.size(); i += kGathered) {
      gather(w, p, from * inner, i, std::min<int64_t>(kGathered, static_cast<int64_t>(w.anew.size() - i)));
    }
    const int64_t mine = std::min(band_, g_.in[outer_] - from) * inner;
    for (int64_t s = 0; planes_ && s < samples; ++s) {
      to_planes(out + s * g_.pixels() * g_.in_channels, p.dtype, g_.pixels(), w.out.get() + s * g_.pixels() * w.cols,
                w.cols, w.cols, mine);
    }
  }

  // Pixels that no pixel of dY reaches.
  void clear(const Phase& phase, const SignProduct& p, int64_t samples, int64_t from) const {
    for (int64_t s = 0; s < samples; ++s) {
      for_rows(phase, from, [&](int64_t, int64_t pixel, int64_t count) {
        for (int64_t j = 0; j < count; ++j) {
          const int64_t row = s * g_.pixels() + pixel + j * g_.stride[2];
          std::fill_n(static_cast<float*>(p.out) + row * p.out_stride, p.cols, 0.0f);
        }
      });
    }
  }

  // The image of a sample's block, and in `fixed` its unit.
  void quantise(Workspace& w, int64_t s, int64_t from) const {
    ConvSize low = low_;
    low[outer_] += from / g_.stride[outer_];
    const int64_t begin = std::clamp<int64_t>(-low[2], 0, size_[2]);
    const int64_t end = std::clamp<int64_t>(g_.out[2] - low[2], begin, size_[2]);
    // Calls row(row of the image, run of pixels of dY, first of them in the image); an empty run outside of dY.
    const auto for_image = [&](const auto& row) {
      for (int64_t z = 0; z < size_[0]; ++z) {
        for (int64_t y = 0; y < size_[1]; ++y) {
          const int64_t oz = low[0] + z;
          const int64_t oy = low[1] + y;
          const bool inside = oz >= 0 && oz < g_.out[0] && oy >= 0 && oy < g_.out[1];
          const int64_t pixel = (oz * g_.out[1] + oy) * g_.out[2] + low[2] + begin;
          row(z * size_[1] + y, PixelRun{inside ? pixel_of_grad(w, s, pixel) : nullptr, g_.out_channels,
                                         inside ? end - begin : 0, g_.out_channels});
        }
      }
    };
    uint32_t top = 0;
    for_image([&](int64_t row, const PixelRun& run) {
      uint32_t* tops = w.tops.get() + row * size_[2] + begin;
      BK_PICK_PRODUCT(measure_pixels)(run, tops);
      for (int64_t i = 0; i < run.pixels; ++i) {
        top = tops[i] < 0x7F800000u ? std::max(top, tops[i]) : top;
      }
    });
    const int shift = BK_PICK_PRODUCT(pixel_shift)(top);
    w.unit = std::ldexp(1.0, -shift);
    int8_t* image = w.image.get() + s * image_pixels() * blocks_ * pixel_bytes_;
    const int64_t stride = size_[2] * pixel_bytes_;
    for_image([&](int64_t row, const PixelRun& run) {
      int8_t* to = image + row * blocks_ * stride;
      const int64_t last = begin + run.pixels;
      for (int64_t b = 0; b < blocks_; ++b) {
        const bool used = b * signs_.channels() < blocks_ * g_.out_channels;
        std::fill(to + b * stride, to + b * stride + (used ? begin : size_[2]) * pixel_bytes_, int8_t{0});
        std::fill(to + b * stride + last * pixel_bytes_, to + (b + 1) * stride, int8_t{0});
      }
      PixelSums* sums = w.sums.get() + row * size_[2];
      std::fill(sums, sums + size_[2], PixelSums{0, 0});
      BK_PICK_PRODUCT(quantise_pixels)
      (run, w.tops.get() + row * size_[2] + begin, shift, to + begin * pixel_bytes_, stride, sums + begin);
    });
  }

  // What each pixel of a phase reaches: the sum that a biased operand adds, and whether the block's scale is enough.
  void weigh(Workspace& w, const Phase& phase, int64_t base, int64_t from) const {
    // √(K/12) last places against 2^−24 of the norm, of which ⌊q/2²⁰⌋ is counted.
    const double least = 0x1p8 * std::max(static_cast<double>(phase.taps * g_.out_channels) / 12, 1.0);
    PixelSums* reached = w.reached.get();
    FixedPoint* fixed = w.fixed.get() + base;
    for_rows(phase, from, [&](int64_t at, int64_t pixel, int64_t count) {
      std::fill_n(reached, count, PixelSums{0, 0});
      for (const int64_t to : phase.reached) {
        const PixelSums* sums = w.sums.get() + at + to;
        for (int64_t j = 0; j < count; ++j) {
          reached[j].sum += sums[j].sum;
          reached[j].norm += sums[j].norm;
        }
      }
      for (int64_t j = 0; j < count; ++j, pixel += g_.stride[2]) {
        fixed[pixel] = {w.unit, reached[j].sum, false};
        if (reached[j].norm != 0 && !(reached[j].norm >= least)) {
          w.anew.push_back(base + pixel);
        }
      }
    });
  }

  // Rows w.anew[begin … begin + rows − 1] of a block's product, which are pixels counted from pixel `first` of its
  // first sample: their patches, each with its own scale.
  void gather(Workspace& w, const SignProduct& block, int64_t first, size_t begin, int64_t rows) const {
    SignProduct p = block;
    const Buffer<float> patches(rows * p_.depth);
    std::fill(patches.get(), patches.get() + rows * p_.depth, 0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t pixel = first + w.anew[begin + static_cast<size_t>(i)];
      const int64_t sample = pixel / g_.pixels();
      const ConvSize x{pixel / (g_.in[1] * g_.in[2]) % g_.in[0], pixel / g_.in[2] % g_.in[1], pixel % g_.in[2]};
      for (int64_t tap = 0; tap < g_.taps(); ++tap) {
        const ConvSize k{tap / (g_.kernel[1] * g_.kernel[2]), tap / g_.kernel[2] % g_.kernel[1], tap % g_.kernel[2]};
        int64_t at = 0;
        bool inside = true;
        for (int d = 0; d < kConvDims; ++d) {
          int64_t o;
          inside = g_.reaches(d, x[d], k[d], o) && o >= 0 && o < g_.out[d] && inside;
          at = at * g_.out[d] + o;
        }
        if (inside) {
          std::copy_n(pixel_of_grad(w, sample, at), g_.out_channels,
                      patches.get() + i * p_.depth + tap * signs_.channels());
        }
      }
    }
    const int64_t tile = static_cast<int64_t>(in_order_.size()) * kTileBytes;
    const Buffer<int8_t> digits(divide_up(rows, in_tile_) * tile);
    const Buffer<FixedPoint> fixed(rows);
    const Buffer<float> out(rows * p.cols);
    p.rows = rows;
    p.grad = patches.get();
    p.row_stride = p.depth;
    p.column_stride = 1;
    p.digits = digits.get();
    p.fixed = fixed.get();
    p.out = out.get();
    p.out_stride = p.cols;
    BK_PICK_PRODUCT(quantise)(p, 0, divide_up(rows, in_tile_), nullptr);
    w.tiles.clear();
    for (int64_t i = 0; i < rows; i += in_tile_) {
      w.tiles.push_back({digits.get() + i / in_tile_ * tile, i, std::min(in_tile_, rows - i)});
    }
    BK_PICK_PRODUCT(multiply_panels)
    (p, w.tiles.data(), static_cast<int64_t>(w.tiles.size()), 1,
     {in_order_.data(), operand_order_.data(), static_cast<int64_t>(in_order_.size())},
     operand_.get() + w.panel * panel_, w.scratch.get());
    BK_PICK_PRODUCT(multiply_nonfinite)(p, signs_.part(w.panel, 0), 0, rows, 0, p.cols);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = w.anew[begin + static_cast<size_t>(i)];
      std::copy_n(out.get() + i * p.cols, p.cols, static_cast<float*>(block.out) + row * block.out_stride);
    }
  }

  ConvGeometry g_;
  ConvSigns signs_;
  int64_t panel_, panels_;
  Buffer<int8_t> operand_;
  bool planes_;
  const float* grad_;
  float* out_;
  SignProduct p_{};
  int64_t in_tile_, blocks_, pixel_bytes_;
  int64_t inner_;  // pixels of dY for each along the outermost dimension
  int outer_;      // Blocks
  ConvSize low_, size_;
  int64_t band_;
  std::vector<Phase> phases_;
  std::vector<int64_t> in_order_, operand_order_;
};

}  // namespace
}  // namespace bioplaus
