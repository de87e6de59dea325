// Locally-connected ops on the CPU: three products per position p and group, W_p (O × K) being the position's block of
// weights, K = taps · channels, X_p (K × N) the patch it sees, dY_p its output gradient:
//
//     forward          Y_pᵀ (O × N) = W_p X_p       X_p gathered with the batch innermost, W_p read in place
//     input gradient   (N × K) = dY_p B_p           B_p in place, or formed block by block; added to the input's rows
//     weight gradient  dW_p (O × K) = dY_pᵀ X_pᵀ    X_pᵀ gathered with the channel innermost, dW_p written in place
//
// so that each weight is read, or written, once, as long contiguous runs, and never copied or transposed in float32.
// Rows of the activations are brought into the product's layout in a small cache of rows; there is no im2col tensor.
//
// Every output element is formed by one thread in an order that the geometry alone decides: the same bits for any
// number of threads. In the input gradient a thread owns rows of the input, and visits the positions that reach them.
//
// Roofline, float32: max(2·N operations per weight at the tile product's speed, 4 bytes per weight at memory
// bandwidth); the weight gradient writes its 4 bytes into a fresh tensor, is bound by page faults there and asks for
// huge pages. With few channels the activations are as large as the weights, and changing their layout takes its time.
// The share reached: `python -m bench run --op locally_connected`.
// Half types are widened block by block and multiplied in float32: memory traffic halves, products do not get faster.
#include "lc.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "../common/form.h"
#include "../common/lc_checks.h"
#include "feedback_weight.h"
#include "gemm.h"

namespace bioplaus {

namespace {

// Samples of one product, and bytes of one thread's rows, of its outputs and of its block of B: they live in the L2
// cache, and beside the weights they are little.
constexpr int64_t kMaxLanes = 128;
constexpr int64_t kMinLanes = 32;
constexpr int64_t kFewSamples = 4;
// Shorter runs of a patch are worth gathering.
constexpr int64_t kLeastRun = 48;
constexpr int64_t kRowBytes = 5 << 18;
constexpr int64_t kTileBytes = 1 << 19;
// Terms of one float32 sum in the forward product.
constexpr int64_t kMaxSum = 192;

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
constexpr int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

// Size of the parts, about equal and at most `most` each, that `total` splits into.
int64_t balanced(int64_t total, int64_t most) { return divide_up(total, divide_up(total, std::max<int64_t>(most, 1))); }

template <typename acc_t>
constexpr DType acc_dtype = sizeof(acc_t) == 8 ? DType::Float64 : DType::Float32;

// An activation (N, C, *spatial) in memory; strides in elements.
struct Activation {
  char* data;
  DType dtype;
  int64_t n, c, size[kLcDims];
  int64_t stride_n, stride_c, stride[kLcDims];

  char* at(int64_t sample, int64_t d, int64_t h) const {
    return data + (sample * stride_n + d * stride[0] + h * stride[1]) * bytes();
  }
  int64_t bytes() const { return dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2; }

  // A row is width · channels adjacent elements.
  bool channels_last() const { return (c == 1 || stride_c == 1) && (size[2] == 1 || stride[2] == c); }
};

Activation view(const at::Tensor& x) {
  Activation a{};
  a.data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
  a.dtype = to_dtype("dtype", x.scalar_type());
  a.n = x.size(0);
  a.c = x.size(1);
  a.stride_n = x.stride(0);
  a.stride_c = x.stride(1);
  const int64_t d = x.dim() - 2;
  for (int64_t i = 0; i < kLcDims; ++i) {
    const int64_t from = 2 + i - (kLcDims - d);
    a.size[i] = from < 2 ? 1 : x.size(from);
    a.stride[i] = from < 2 ? 0 : x.stride(from);
  }
  return a;
}

// Rows run along the last dim; a 1-D op gets as many rows as it has coordinates.
bool one_row(const LcGeometry& g) { return g.in[0] * g.in[1] * g.out[0] * g.out[1] * g.kernel[0] * g.kernel[1] == 1; }

void swap_dims(LcGeometry& g) {
  for (auto* x : {g.in, g.out, g.kernel, g.stride, g.before, g.dilation}) {
    std::swap(x[1], x[2]);
  }
}

void swap_dims(Activation& a) {
  std::swap(a.size[1], a.size[2]);
  std::swap(a.stride[1], a.stride[2]);
}

// Hands out pieces of one task's scratch; with no memory behind it, counts.
class Arena {
 public:
  explicit Arena(char* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ = round_up(used_ + count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  uintptr_t base_;
  int64_t used_ = 0;
};

// Splits units 0 … units − 1 among the threads, a contiguous range and a Task with its own scratch for each.
template <typename Task, typename Op>
void run_tasks(const Op& op, int64_t units) {
  Arena counter(nullptr);
  Task(op, counter);
  const int64_t bytes = round_up(counter.used(), 4096);
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t tasks = std::min<int64_t>(units, threads);
  const at::Tensor scratch = at::empty({tasks * bytes + 64}, at::kByte);
  char* base = reinterpret_cast<char*>(round_up(reinterpret_cast<intptr_t>(scratch.mutable_data_ptr()), 64));
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      Arena arena(base + t * bytes);
      Task(op, arena).run(t * units / tasks, (t + 1) * units / tasks);
    }
  });
}

// Copies a (samples, width, channels) box between layouts.
void copy_box(void* to, DType to_dtype, std::array<int64_t, 3> to_stride, const void* from, DType from_dtype,
              std::array<int64_t, 3> from_stride, int64_t samples, int64_t width, int64_t channels) {
  const LcCopy copy{to,
                    from,
                    to_dtype,
                    from_dtype,
                    {samples, width, channels},
                    {to_stride[0], to_stride[1], to_stride[2]},
                    {from_stride[0], from_stride[1], from_stride[2]}};
  BK_PICK(lc_copy)(copy);
}

enum class Innermost { Batch, Channel };

// Rows of an activation as acc_t in the layout of a product's operand, the `slots` used last are kept:
// (width, channel, lane) or (sample, width, channel). In place where the tensor already is laid out so.
template <typename acc_t>
class Rows {
 public:
  Rows(const Activation& x, Innermost innermost, int64_t lanes, int64_t slots, Arena& arena)
      : x_(x), innermost_(innermost), lanes_(lanes), width_(x.size[2] * x.c) {
    // Samples a multiple of 4 KiB apart would share the lines of a cache set.
    stride_n_ = innermost == Innermost::Channel && width_ % 256 == 0 ? width_ + 16 : width_;
    in_place_ = x.dtype == acc_dtype<acc_t> && x.channels_last() && (innermost == Innermost::Channel || lanes == 1);
    if (!in_place_) {
      for (int64_t i = 0; i < slots; ++i) {
        kept_.push_back({-1, -1, 0, arena.take<acc_t>(stride_n_ * lanes)});
      }
    }
  }

  // Row (d, h) of samples first … first + count − 1.
  const acc_t* get(int64_t first, int64_t count, int64_t d, int64_t h) {
    if (in_place_) {
      return reinterpret_cast<const acc_t*>(x_.at(first, d, h));
    }
    const int64_t row = d * x_.size[1] + h;
    Kept* oldest = &kept_[0];
    for (auto& k : kept_) {
      if (k.row == row && k.first == first) {
        k.used = ++clock_;
        return k.data;
      }
      oldest = k.used < oldest->used ? &k : oldest;
    }
    Kept& k = *oldest;
    k.row = row;
    k.first = first;
    k.used = ++clock_;
    const bool batch = innermost_ == Innermost::Batch;
    if (batch && count < lanes_) {
      std::memset(k.data, 0, width_ * lanes_ * sizeof(acc_t));
    }
    copy_box(k.data, acc_dtype<acc_t>,
             batch ? std::array{int64_t{1}, x_.c * lanes_, lanes_} : std::array{stride_n_, x_.c, int64_t{1}},
             x_.at(first, d, h), x_.dtype, {x_.stride_n, x_.stride[2], x_.stride_c}, count, x_.size[2], x_.c);
    return k.data;
  }

  // Between samples, where the channel is innermost.
  int64_t stride_n() const { return in_place_ ? x_.stride_n : stride_n_; }

 private:
  struct Kept {
    int64_t row, first, used;
    acc_t* data;
  };

  const Activation& x_;
  Innermost innermost_;
  int64_t lanes_, width_, stride_n_;
  bool in_place_;
  std::vector<Kept> kept_;
  int64_t clock_ = 0;
};

// The rows of the input that one row of positions reads, tap by tap; null in the padding.
template <typename acc_t>
class Patches {
 public:
  explicit Patches(const LcGeometry& g) : g_(g), rows_(g.kernel[0] * g.kernel[1]) {}

  int64_t slots() const { return static_cast<int64_t>(rows_.size()); }

  void start(Rows<acc_t>& rows, int64_t first, int64_t count, int64_t od, int64_t oh) {
    for (int64_t i = 0; i < g_.kernel[0]; ++i) {
      const int64_t d = lc_start(g_, 0, od) + i * g_.dilation[0];
      for (int64_t j = 0; j < g_.kernel[1]; ++j) {
        const int64_t h = lc_start(g_, 1, oh) + j * g_.dilation[1];
        const bool inside = d >= 0 && d < g_.in[0] && h >= 0 && h < g_.in[1];
        rows_[i * g_.kernel[1] + j] = inside ? rows.get(first, count, d, h) : nullptr;
      }
    }
  }

  // Whether the runs of position `ow` are whole and lie together in each row: a product can then read them in place.
  bool in_place(int64_t ow) const {
    const int64_t w0 = lc_start(g_, 2, ow);
    return g_.groups == 1 && g_.dilation[2] == 1 && w0 >= 0 && w0 + g_.kernel[2] <= g_.in[2] &&
           g_.kernel[2] * g_.c >= kLeastRun;
  }

  // Calls f(first column, run of kernel width · c channels of `lanes` elements, or null in the padding) row by row.
  template <typename F>
  void for_runs(int64_t ow, int64_t lanes, const F& f) const {
    const int64_t run = g_.kernel[2] * g_.c, start = lc_start(g_, 2, ow) * g_.c * lanes;
    for (size_t t = 0; t < rows_.size(); ++t) {
      f(static_cast<int64_t>(t) * run, rows_[t] ? rows_[t] + start : nullptr);
    }
  }

  // The patch of position `ow`, taps · c runs of `lanes` elements; `offset` into the rows selects a sample.
  void gather(acc_t* to, int64_t ow, int64_t group, int64_t lanes, int64_t offset) const {
    const int64_t w0 = lc_start(g_, 2, ow);
    const LcTaps taps = lc_taps(g_, 2, w0, 0, g_.in[2]);
    const int64_t run = g_.c * lanes;
    const int64_t pixel = g_.groups * run;
    const bool adjacent = g_.groups == 1 && (g_.dilation[2] == 1 || taps.end - taps.begin == 1);
    for (const acc_t* row : rows_) {
      if (row == nullptr || taps.begin == taps.end) {
        std::memset(to, 0, g_.kernel[2] * run * sizeof(acc_t));
      } else {
        const acc_t* from = row + offset + group * run;
        if (taps.begin > 0) {
          std::memset(to, 0, taps.begin * run * sizeof(acc_t));
        }
        if (adjacent) {
          std::memcpy(to + taps.begin * run, from + (w0 + taps.begin * g_.dilation[2]) * pixel,
                      (taps.end - taps.begin) * run * sizeof(acc_t));
        } else {
          for (int64_t t = taps.begin; t < taps.end; ++t) {
            std::memcpy(to + t * run, from + (w0 + t * g_.dilation[2]) * pixel, run * sizeof(acc_t));
          }
        }
        if (taps.end < g_.kernel[2]) {
          std::memset(to + taps.end * run, 0, (g_.kernel[2] - taps.end) * run * sizeof(acc_t));
        }
      }
      to += g_.kernel[2] * run;
    }
  }

 private:
  const LcGeometry& g_;
  std::vector<const acc_t*> rows_;
};

// Samples per product, from the geometry alone: as many as rows and patches leave room for.
int64_t choose_lanes(int64_t n, int64_t bytes_per_lane) {
  return balanced(n, std::clamp(kRowBytes / std::max<int64_t>(bytes_per_lane, 1), kMinLanes, kMaxLanes));
}

// Rows of a block of weights that is copied before it is used.
int64_t choose_block(int64_t rows, int64_t row_bytes) {
  return balanced(rows, std::max<int64_t>(kTileBytes / 2 / std::max<int64_t>(row_bytes, 1), 8));
}

// Blocks of the weights, or of B, as acc_t: in place where they can be.
template <typename acc_t>
class Blocks {
 public:
  // `plain` (contiguous, of `dtype`), or B formed from `feedback` in `dtype`.
  struct Source {
    const char* plain;
    DType dtype;
    const FeedbackParams* feedback;
    int64_t rows, cols;  // of a position, all groups

    bool in_place() const { return plain != nullptr && dtype == acc_dtype<acc_t>; }
    int64_t bytes() const { return dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2; }
    const char* at(int64_t position, int64_t row, int64_t column) const {
      return plain + ((position * rows + row) * cols + column) * bytes();
    }
  };

  Blocks(const Source& source, int64_t block, Arena& arena) : source_(source) {
    if (!source.in_place()) {
      wide_ = arena.take<acc_t>(block * source.cols);
    }
    if (source.plain == nullptr && source.dtype != acc_dtype<acc_t>) {
      formed_ = arena.take<char>(block * source.cols * source.bytes());
    }
  }

  // Rows first … first + count − 1, columns k0 … k1 − 1 of a position; ld is set.
  const acc_t* get(int64_t position, int64_t first, int64_t count, int64_t k0, int64_t k1, int64_t& ld) {
    ld = source_.cols;
    if (source_.in_place()) {
      return reinterpret_cast<const acc_t*>(source_.at(position, first, k0));
    }
    const int64_t width = k1 - k0;
    const char* from = source_.plain ? source_.at(position, first, k0) : nullptr;
    if (source_.plain == nullptr) {
      char* to = formed_ ? formed_ : reinterpret_cast<char*>(wide_);
      form(position, first, count, k0, width, to);
      if (formed_ == nullptr) {
        ld = width;
        return wide_;
      }
      from = to;
      ld = width;
    }
    copy_box(wide_, acc_dtype<acc_t>, {0, width, 1}, from, source_.dtype, {0, ld, 1}, 1, count, width);
    ld = width;
    return wide_;
  }

 private:
  // Element (position, row, column) of the weights is flat element e, which is element (e / cols, e % cols) of B as a
  // matrix; a position never straddles two of its rows.
  void form(int64_t position, int64_t first, int64_t count, int64_t k0, int64_t width, char* to) {
    const FeedbackParams& p = *source_.feedback;
    const auto run = BK_PICK(feedback_run);
    if (width == source_.cols) {
      const int64_t e = (position * source_.rows + first) * source_.cols;
      run(p, e / p.cols, e % p.cols, count * width, to);
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t e = (position * source_.rows + first + i) * source_.cols + k0;
      run(p, e / p.cols, e % p.cols, width, to + i * width * source_.bytes());
    }
  }

  const Source& source_;
  acc_t* wide_ = nullptr;
  char* formed_ = nullptr;
};

// --- forward ---

template <typename acc_t>
struct Forward {
  LcGeometry g;
  Activation x, y;
  typename Blocks<acc_t>::Source w;
  const char* bias;  // of the weights' dtype, or null
  bool bias_per_position;

  int64_t lanes, chunks, tile, tiles, block;
  bool few;  // each sample's patch is a row of its own, and each output a dot product

  Forward(const LcGeometry& geometry, const Activation& input, const Activation& output, const at::Tensor& weight,
          const at::Tensor& b, bool per_position)
      : g(geometry), x(input), y(output), bias_per_position(per_position) {
    const int64_t k = lc_columns(g), o = g.groups * g.o;
    w = {static_cast<const char*>(weight.const_data_ptr()), x.dtype, nullptr, o, k};
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

template <typename acc_t>
class ForwardTask {
 public:
  ForwardTask(const Forward<acc_t>& op, Arena& arena)
      : op_(op),
        g_(op.g),
        patches_(op.g),
        rows_(op.x, op.few ? Innermost::Channel : Innermost::Batch, op.lanes, patches_.slots(), arena),
        blocks_(op.w, op.block, arena) {
    patch_ = arena.take<acc_t>(lc_columns(g_) * op.lanes);
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
        const acc_t* w = blocks_.get(p, group * g_.o + i, count, 0, k, ld);
        bool more = false;
        if (!in_place) {
          multiply(count, k, w, ld, patch_, to + i * lanes, more);
          continue;
        }
        patches_.for_runs(ow, lanes, [&](int64_t column, const acc_t* x) {
          if (x) {
            multiply(count, g_.kernel[2] * g_.c, w + column, ld, x, to + i * lanes, more);
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
  void multiply(int64_t rows, int64_t depth, const acc_t* w, int64_t ld, const acc_t* x, acc_t* y, bool& more) {
    const int64_t lanes = op_.lanes, step = balanced(depth, kMaxSum);
    for (int64_t k = 0; k < depth; k += step) {
      gemm(rows, lanes, std::min(step, depth - k), w + k, ld, x + k * lanes, lanes, more ? sums_ : y, lanes, false);
      if (more) {
        BK_PICK(lc_add)(sizeof(acc_t) == 8, y, lanes, sums_, lanes, rows, lanes);
      }
      more = true;
    }
  }

  const Forward<acc_t>& op_;
  const LcGeometry& g_;
  Patches<acc_t> patches_;
  Rows<acc_t> rows_;
  Blocks<acc_t> blocks_;
  acc_t *patch_, *out_, *bias_, *sums_;
};

// --- input gradient ---

template <typename acc_t>
struct BackwardInput {
  LcGeometry g;
  Activation dy, dx;
  typename Blocks<acc_t>::Source b;
  int64_t lanes, chunks, band, block;
  bool in_place;  // sums are formed in dx itself

  BackwardInput(const LcGeometry& geometry, const Activation& grad_output, const Activation& grad_input,
                const typename Blocks<acc_t>::Source& source)
      : g(geometry), dy(grad_output), dx(grad_input), b(source) {
    lanes = balanced(g.n, kMaxLanes);
    chunks = divide_up(g.n, lanes);
    const int64_t row_bytes = lanes * g.in[2] * g.groups * g.c * static_cast<int64_t>(sizeof(acc_t));
    band = std::clamp<int64_t>(kTileBytes / std::max<int64_t>(row_bytes, 1), 1, g.in[0] * g.in[1]);
    // A small batch is bound by reading B: rows of it are used up while they are in the cache.
    const bool whole = (b.in_place() && lanes > 32) || (b.plain && lanes == 1);
    block = whole ? g.o : choose_block(g.o, lc_columns(g) * sizeof(acc_t) * (b.in_place() ? 2 : 1));
    in_place = dx.dtype == acc_dtype<acc_t> && dx.channels_last();
  }

  int64_t units() const { return chunks * g.in[0] * g.in[1]; }
};

template <typename acc_t>
class BackwardInputTask {
 public:
  BackwardInputTask(const BackwardInput<acc_t>& op, Arena& arena)
      : op_(op),
        g_(op.g),
        width_(g_.in[2] * g_.groups * g_.c),
        rows_(op.dy, Innermost::Channel, op.lanes, 1, arena),
        blocks_(op.b, op.block, arena) {
    sums_ = op.in_place ? nullptr : arena.take<acc_t>(op.band * op.lanes * width_);
    tap_ = arena.take<acc_t>(op.lanes == 1 ? lc_columns(g_) : op.lanes * g_.kernel[2] * g_.c);
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
  }

 private:
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
        if (!taps_.empty() && g_.o > 0) {
          const acc_t* dy = rows_.get(first_, count_, od, oh);
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

  void position(int64_t p, int64_t ow, const acc_t* dy) {
    const int64_t w0 = lc_start(g_, 2, ow);
    const LcTaps inside = lc_taps(g_, 2, w0, 0, g_.in[2]);
    if (inside.begin == inside.end) {
      return;
    }
    // The columns of B that this band needs, and a little between them.
    const int64_t k0 = taps_.front().column, k1 = taps_.back().column + g_.kernel[2] * g_.c;
    for (int64_t group = 0; group < g_.groups; ++group) {
      if (op_.lanes == 1) {
        std::memset(tap_, 0, (k1 - k0) * sizeof(acc_t));
      }
      for (int64_t i = 0; i < g_.o; i += op_.block) {
        const int64_t rows = std::min(op_.block, g_.o - i);
        const acc_t* g = dy + group * g_.o + i;
        if (op_.lanes == 1 && op_.b.plain) {
          BK_PICK(lc_axpy)(op_.b.dtype, op_.b.at(p, group * g_.o, k0), op_.b.cols, rows, k1 - k0, g, tap_);
          continue;
        }
        int64_t ld;
        const acc_t* b = blocks_.get(p, group * g_.o + i, rows, k0, k1, ld);
        if (op_.lanes == 1) {
          BK_PICK(lc_axpy)(acc_dtype<acc_t>, b, ld, rows, k1 - k0, g, tap_);
        } else {
          multiply(g, rows, b, ld, group, w0, inside, k0);
        }
      }
      if (op_.lanes == 1) {
        for (const Tap& tap : taps_) {
          add(tap_ + tap.column - k0, 0, tap.row, group, w0, inside);
        }
      }
    }
  }

  void multiply(const acc_t* g, int64_t rows, const acc_t* b, int64_t ld, int64_t group, int64_t w0, LcTaps inside,
                int64_t k0) {
    const int64_t n = g_.kernel[2] * g_.c;
    const bool whole = g_.groups == 1 && g_.dilation[2] == 1 && inside.begin == 0 && inside.end == g_.kernel[2];
    for (const Tap& tap : taps_) {
      const acc_t* from = b + tap.column - k0;
      if (whole) {
        gemm(count_, n, rows, g, rows_.stride_n(), from, ld, row(tap.row) + w0 * g_.c, stride_n(), true);
      } else {
        gemm(count_, n, rows, g, rows_.stride_n(), from, ld, tap_, n, false);
        add(tap_, n, tap.row, group, w0, inside);
      }
    }
  }

  // Adds a row of taps, (samples × kernel width · c), to row r.
  void add(const acc_t* from, int64_t ld, int64_t r, int64_t group, int64_t w0, LcTaps inside) {
    const int64_t pixel = g_.groups * g_.c;
    const bool adjacent = g_.groups == 1 && g_.dilation[2] == 1;
    const int64_t step = adjacent ? inside.end - inside.begin : 1;
    for (int64_t t = inside.begin; t < inside.end; t += step) {
      BK_PICK(lc_add)(sizeof(acc_t) == 8, row(r) + (w0 + t * g_.dilation[2]) * pixel + group * g_.c, stride_n(),
                      from + t * g_.c, ld, count_, step * g_.c);
    }
  }

  struct Tap {
    int64_t column, row;  // first column of a block, row of the input
  };

  const BackwardInput<acc_t>& op_;
  const LcGeometry& g_;
  int64_t width_;
  Rows<acc_t> rows_;
  Blocks<acc_t> blocks_;
  acc_t *sums_, *tap_;
  std::vector<Tap> taps_;
  int64_t first_, count_, low_, high_;
};

// --- weight gradient ---

template <typename acc_t>
struct BackwardWeight {
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
    lanes = in_place ? choose_lanes(g.n, row * sizeof(acc_t)) : g.n;
    chunks = divide_up(g.n, lanes);
    patch = balanced(lanes, kMaxLanes);
    block = in_place ? g.o : choose_block(g.o, lc_columns(g) * sizeof(acc_t));
  }

  int64_t units() const { return product3(g.out); }
};

template <typename acc_t>
class BackwardWeightTask {
 public:
  BackwardWeightTask(const BackwardWeight<acc_t>& op, Arena& arena)
      : op_(op),
        g_(op.g),
        patches_(op.g),
        x_(op.x, Innermost::Channel, op.lanes, patches_.slots(), arena),
        dy_(op.dy, Innermost::Batch, op.lanes, 1, arena) {
    patch_ = arena.take<acc_t>(op.patch * lc_columns(g_));
    sums_ = op.in_place ? nullptr : arena.take<acc_t>(op.block * lc_columns(g_));
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t chunk = 0; chunk < op_.chunks; ++chunk) {
      const int64_t first = chunk * op_.lanes;
      const int64_t count = std::min(op_.lanes, g_.n - first);
      int64_t row = -1;
      const acc_t* dy = nullptr;
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
  }

 private:
  void position(int64_t p, int64_t ow, int64_t group, const acc_t* dy, int64_t count, bool accumulate) {
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
        const int64_t samples = std::min(op_.patch, count - n0);
        if (patches_.in_place(ow)) {
          const int64_t run = g_.kernel[2] * g_.c;
          patches_.for_runs(ow, 1, [&](int64_t column, const acc_t* x) {
            if (x) {
              gemm(rows, run, samples, dy + i * op_.lanes + n0, op_.lanes, x + n0 * x_.stride_n(), x_.stride_n(),
                   to + column, k, accumulate || n0 > 0);
            } else if (!accumulate && n0 == 0) {
              for (int64_t r = 0; r < rows; ++r) {
                std::memset(to + r * k + column, 0, run * sizeof(acc_t));
              }
            }
          });
          continue;
        }
        if (i == 0 || op_.patch < count) {
          for (int64_t n = 0; n < samples; ++n) {
            patches_.gather(patch_ + n * k, ow, group, 1, (n0 + n) * x_.stride_n());
          }
        }
        gemm(rows, k, samples, dy + i * op_.lanes + n0, op_.lanes, patch_, k, to, k, accumulate || n0 > 0);
      }
      if (!op_.in_place) {
        copy_box(dw + i * k * op_.dy.bytes(), op_.dy.dtype, {0, k, 1}, sums_, acc_dtype<acc_t>, {0, k, 1}, 1, rows, k);
      }
    }
  }

  const BackwardWeight<acc_t>& op_;
  const LcGeometry& g_;
  Patches<acc_t> patches_;
  Rows<acc_t> x_, dy_;
  acc_t *patch_, *sums_;
};

// --- host ---

// Calls f with a pointer of the type that sums of `dtype` are formed in.
template <typename F>
void with_acc(at::ScalarType dtype, const F& f) {
  if (dtype == at::kDouble) {
    f(static_cast<double*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

// Asks for huge pages in a large new tensor: writing one is bound by page faults.
at::Tensor with_huge_pages(at::Tensor x) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr()) / kPage * kPage + kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(x.mutable_data_ptr()) + x.nbytes()) / kPage * kPage;
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return x;
}

at::Tensor empty_activation(const at::Tensor& like, int64_t channels, at::IntArrayRef spatial) {
  LcSize size{like.size(0), channels};
  size.append(spatial.begin(), spatial.end());
  return with_huge_pages(at::empty(size, like.options(), lc_memory_format(like)));
}

at::Tensor lc_forward_cpu(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                          at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const LcArgs args{stride, padding, dilation, groups};
  LcGeometry g = args.forward(input, weight, bias);
  const bool per_position = bias && bias->dim() > 1;
  const at::Tensor b = bias ? bias->contiguous() : at::Tensor();
  const at::Tensor output = empty_activation(input, groups * g.o, weight.sizes().slice(0, args.dims()));
  if (output.numel() == 0) {
    return output;
  }
  const at::Tensor w = weight.contiguous();
  Activation x = view(input), y = view(output);
  if (one_row(g)) {
    swap_dims(g);
    swap_dims(x);
    swap_dims(y);
  }
  with_acc(input.scalar_type(), [&]<typename acc_t>(acc_t*) {
    const Forward<acc_t> op(g, x, y, w, b, per_position);
    run_tasks<ForwardTask<acc_t>>(op, op.units());
  });
  return output;
}

at::Tensor lc_backward_input_cpu(const at::Tensor& grad_output, const std::optional<at::Tensor>& weight,
                                 const std::optional<at::Tensor>& signs, const std::optional<at::Tensor>& magnitude,
                                 const std::optional<at::Tensor>& key, c10::string_view entries, double scale,
                                 at::IntArrayRef weight_size, at::IntArrayRef input_size, at::IntArrayRef stride,
                                 at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const LcArgs args{stride, padding, dilation, groups};
  const DType dtype = to_dtype("grad_output", grad_output.scalar_type());
  LcGeometry g = args.backward_input(grad_output, weight_size, input_size);
  const FeedbackArgs feedback{weight, signs, magnitude, key, entries, scale, weight_size};
  feedback.check(grad_output.device());

  const at::Tensor grad_input = empty_activation(grad_output, groups * g.c, input_size);
  if (grad_input.numel() == 0) {
    return grad_input;
  }
  const bool plain = magnitude && !weight && !signs && scale == 1 && magnitude->is_contiguous() &&
                     magnitude->scalar_type() == grad_output.scalar_type();
  const at::Tensor planes = signs ? signs->contiguous() : at::Tensor();
  const at::Tensor words = key ? key->contiguous() : at::Tensor();
  FeedbackParams p{};
  if (!plain) {
    p.entries = to_entries(entries);
    p.scale = scale;
    p.signs = signs ? planes.const_data_ptr<int32_t>() : nullptr;
    p.key = key ? words.const_data_ptr<int64_t>() : nullptr;
    p.out.dtype = dtype;
    Operands operands(p, weight_size, false);
    if (weight) {
      operands.add(p.weight, *weight, const_cast<void*>(weight->const_data_ptr()));
    }
    if (magnitude) {
      operands.add(p.magnitude, *magnitude, const_cast<void*>(magnitude->const_data_ptr()));
    }
    operands.finish();
  }
  Activation dy = view(grad_output), dx = view(grad_input);
  const int64_t k = lc_columns(g);
  if (one_row(g)) {
    swap_dims(g);
    swap_dims(dy);
    swap_dims(dx);
  }
  with_acc(grad_output.scalar_type(), [&]<typename acc_t>(acc_t*) {
    const typename Blocks<acc_t>::Source source{plain ? static_cast<const char*>(magnitude->const_data_ptr()) : nullptr,
                                                dtype, &p, groups * g.o, k};
    const BackwardInput<acc_t> op(g, dy, dx, source);
    run_tasks<BackwardInputTask<acc_t>>(op, op.units());
  });
  return grad_input;
}

at::Tensor lc_backward_weight_cpu(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef kernel_size,
                                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                  int64_t groups) {
  const LcArgs args{stride, padding, dilation, groups};
  LcSize size;
  LcGeometry g = args.backward_weight(grad_output, input, kernel_size, size);
  const at::Tensor grad_weight = with_huge_pages(at::empty(size, grad_output.options()));
  if (grad_weight.numel() == 0 || g.n == 0) {
    return grad_weight.zero_();
  }
  Activation dy = view(grad_output), x = view(input);
  if (one_row(g)) {
    swap_dims(g);
    swap_dims(dy);
    swap_dims(x);
  }
  with_acc(grad_output.scalar_type(), [&]<typename acc_t>(acc_t*) {
    const BackwardWeight<acc_t> op(g, dy, x, static_cast<char*>(grad_weight.mutable_data_ptr()));
    run_tasks<BackwardWeightTask<acc_t>>(op, op.units());
  });
  return grad_weight;
}

}  // namespace

TORCH_LIBRARY_IMPL(bioplaus, CPU, m) {
  m.impl("lc_forward", lc_forward_cpu);
  m.impl("lc_backward_input", lc_backward_input_cpu);
  m.impl("lc_backward_weight", lc_backward_weight_cpu);
}

}  // namespace bioplaus
