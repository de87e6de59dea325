// Operands of the locally-connected products on the CPU: the activations' rows in a product's layout, patches of them,
// blocks of the weights or of B, and the two kinds of product. For lc.cpp.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "../common/form.h"
#include "../common/lc_checks.h"
#include "feedback_weight.h"
#include "gemm.h"
#include "lc.h"

namespace bioplaus::lc {

// Samples of one product, and bytes of one thread's rows, of its outputs and of its block of B: they live in the L2
// cache, and beside the weights they are little.
constexpr int64_t kMaxLanes = 128;
constexpr int64_t kMinLanes = 32;
constexpr int64_t kFewSamples = 4;
// Shorter runs of a patch are worth gathering.
constexpr int64_t kLeastRun = 48;
constexpr int64_t kRowBytes = 5 << 18;
constexpr int64_t kTileBytes = 1 << 19;
// Terms, or pairs of them, of one float32 sum in the forward product.
constexpr int64_t kMaxSum = 192;

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
constexpr int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

// Size of the parts, about equal and at most `most` each, that `total` splits into.
inline int64_t balanced(int64_t total, int64_t most) {
  return divide_up(total, divide_up(total, std::max<int64_t>(most, 1)));
}

template <typename acc_t>
constexpr DType acc_dtype = sizeof(acc_t) == 8 ? DType::Float64 : DType::Float32;

inline at::ScalarType scalar_type(DType dtype) { return dtype == DType::BFloat16 ? at::kBFloat16 : at::kHalf; }

// An activation (N, C, *spatial) in memory; strides in elements.
struct Activation {
  char* data;
  DType dtype;
  int64_t n, c, size[kLcDims];
  int64_t stride_n, stride_c, stride[kLcDims];

  char* at(int64_t sample, int64_t d, int64_t h) const {
    return data + (sample * stride_n + d * stride[0] + h * stride[1]) * bytes();
  }
  int64_t bytes() const { return size_of(dtype); }

  // A row is width · channels adjacent elements.
  bool channels_last() const { return (c == 1 || stride_c == 1) && (size[2] == 1 || stride[2] == c); }
};

inline Activation view(const at::Tensor& x) {
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
inline bool one_row(const LcGeometry& g) {
  return g.in[0] * g.in[1] * g.out[0] * g.out[1] * g.kernel[0] * g.kernel[1] == 1;
}

inline void swap_dims(LcGeometry& g) {
  for (auto* x : {g.in, g.out, g.kernel, g.stride, g.before, g.dilation}) {
    std::swap(x[1], x[2]);
  }
}

inline void swap_dims(Activation& a) {
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
inline void copy_box(void* to, DType to_dtype, std::array<int64_t, 3> to_stride, const void* from, DType from_dtype,
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

// Rows of an activation in a product's layout, those used last.
template <typename T>
class RowCache {
 public:
  RowCache(int64_t slots, int64_t size, Arena& arena) {
    for (int64_t i = 0; i < slots; ++i) {
      kept_.push_back({-1, -1, 0, arena.take<T>(size)});
    }
  }

  // Row `row` of the samples from `first` on; fill(to) writes it where it is not kept.
  template <typename Fill>
  const T* get(int64_t first, int64_t row, const Fill& fill) {
    Kept* oldest = &kept_[0];
    for (auto& k : kept_) {
      if (k.row == row && k.first == first) {
        k.used = ++clock_;
        return k.data;
      }
      oldest = k.used < oldest->used ? &k : oldest;
    }
    oldest->row = row;
    oldest->first = first;
    oldest->used = ++clock_;
    fill(oldest->data);
    return oldest->data;
  }

 private:
  struct Kept {
    int64_t row, first, used;
    T* data;
  };

  std::vector<Kept> kept_;
  int64_t clock_ = 0;
};

// Rows as float64, float32 or, where T is uint16_t, as they are: (width, channel, lane) or (sample, width, channel). In
// place where the tensor already is laid out so.
template <typename T>
class Rows {
 public:
  Rows(const Activation& x, Innermost innermost, int64_t lanes, int64_t slots, Arena& arena)
      : x_(x),
        dtype_(sizeof(T) == 2 ? x.dtype : acc_dtype<T>),
        innermost_(innermost),
        lanes_(lanes),
        width_(x.size[2] * x.c),
        // Samples a multiple of 4 KiB apart would share the lines of a cache set.
        stride_n_(innermost == Innermost::Channel && width_ % 256 == 0 ? width_ + 16 : width_),
        in_place_(x.dtype == dtype_ && x.channels_last() && (innermost == Innermost::Channel || lanes == 1)),
        cache_(in_place_ ? 0 : slots, stride_n_ * lanes, arena) {}

  // Row (d, h) of samples first … first + count − 1.
  const T* get(int64_t first, int64_t count, int64_t d, int64_t h) {
    if (in_place_) {
      return reinterpret_cast<const T*>(x_.at(first, d, h));
    }
    return cache_.get(first, d * x_.size[1] + h, [&](T* to) {
      const bool batch = innermost_ == Innermost::Batch;
      if (batch && count < lanes_) {
        std::memset(to, 0, width_ * lanes_ * sizeof(T));
      }
      copy_box(to, dtype_,
               batch ? std::array{int64_t{1}, x_.c * lanes_, lanes_} : std::array{stride_n_, x_.c, int64_t{1}},
               x_.at(first, d, h), x_.dtype, {x_.stride_n, x_.stride[2], x_.stride_c}, count, x_.size[2], x_.c);
    });
  }

  // Between samples, where the channel is innermost.
  int64_t stride_n() const { return in_place_ ? x_.stride_n : stride_n_; }

 private:
  const Activation& x_;
  DType dtype_;
  Innermost innermost_;
  int64_t lanes_, width_, stride_n_;
  bool in_place_;
  RowCache<T> cache_;
};

// Rows of a half type as the right operand of half_gemm, in pairs of elements that take the place of one float: two
// channels, (width, channel / 2, lane), or two samples, (sample / 2, width, channel), an odd last one beside zeros.
class PairRows {
 public:
  PairRows(const Activation& x, Innermost innermost, int64_t lanes, int64_t slots, Arena& arena)
      : x_(x),
        innermost_(innermost),
        lanes_(lanes),
        width_(x.size[2] * x.c),
        direct_(x.channels_last() && (innermost == Innermost::Channel || whole_pairs(x))),
        staged_(direct_ ? nullptr : arena.take<uint16_t>(width_ * lanes)),
        cache_(slots, divide_up(width_ * lanes, 2) + width_, arena) {}

  const float* get(int64_t first, int64_t count, int64_t d, int64_t h) {
    return cache_.get(first, d * x_.size[1] + h, [&](float* to) {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(x_.at(first, d, h));
      int64_t stride_n = x_.stride_n;
      if (staged_) {
        copy_box(staged_, x_.dtype, {width_, x_.c, 1}, from, x_.dtype, {x_.stride_n, x_.stride[2], x_.stride_c}, count,
                 x_.size[2], x_.c);
        from = staged_;
        stride_n = width_;
      }
      if (innermost_ == Innermost::Channel) {
        BK_PICK(pack_pairs)(count, width_, from, stride_n, reinterpret_cast<uint16_t*>(to));
        return;
      }
      if (count < lanes_) {
        std::memset(to, 0, width_ * lanes_ * sizeof(uint16_t));
      }
      const int64_t c = x_.c / 2;
      copy_box(to, DType::Float32, {1, c * lanes_, lanes_}, from, DType::Float32, {stride_n / 2, c, 1}, count,
               x_.size[2], c);
    });
  }

  // Between pairs of samples.
  int64_t stride_n() const { return width_; }

 private:
  static bool whole_pairs(const Activation& x) {
    int64_t odd = reinterpret_cast<uintptr_t>(x.data) / 2 | x.stride_n;
    for (int i = 0; i < kLcDims; ++i) {
      odd |= x.size[i] > 1 ? x.stride[i] : 0;
    }
    return odd % 2 == 0;
  }

  const Activation& x_;
  Innermost innermost_;
  int64_t lanes_, width_;
  bool direct_;
  uint16_t* staged_;
  RowCache<float> cache_;
};

// Products of tiles, the left operand (m × k) row-major, sums (m × n) of type acc.

// Both operands as `acc`, into which half types are widened.
template <typename acc_t>
struct Plain {
  using acc = acc_t;
  using left = acc_t;
  using right = acc_t;
  using RightRows = Rows<acc_t>;
  static constexpr int64_t kPair = 1;  // terms of an element of the right operand

  static const right* pack(int64_t, int64_t, const left* b, int64_t&, right*) { return b; }
  static void multiply(DType, int64_t m, int64_t n, int64_t k, const left* a, int64_t lda, const right* b, int64_t ldb,
                       acc* c, int64_t ldc, bool accumulate) {
    gemm(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
  }
  static void release() {}
};

// Half types as they are, the right operand in pairs along k.
struct Paired {
  using acc = float;
  using left = uint16_t;
  using right = float;
  using RightRows = PairRows;
  static constexpr int64_t kPair = 2;

  // Rows of B, their number even, as the right operand; ld is set.
  static const right* pack(int64_t rows, int64_t cols, const left* b, int64_t& ld, right* scratch) {
    BK_PICK(pack_pairs)(rows, cols, b, ld, reinterpret_cast<uint16_t*>(scratch));
    ld = cols;
    return scratch;
  }
  // k and ldb count pairs.
  static void multiply(DType dtype, int64_t m, int64_t n, int64_t k, const left* a, int64_t lda, const right* b,
                       int64_t ldb, acc* c, int64_t ldc, bool accumulate) {
    half_gemm(scalar_type(dtype), m, n, 2 * k, a, lda, reinterpret_cast<const uint16_t*>(b), ldb, c, ldc, accumulate);
  }
  static void release() { half_gemm_release(); }
};

// The rows of the input that one row of positions reads, tap by tap; null in the padding.
template <typename T>
class Patches {
 public:
  explicit Patches(const LcGeometry& g) : g_(g), rows_(g.kernel[0] * g.kernel[1]) {}

  int64_t slots() const { return static_cast<int64_t>(rows_.size()); }

  template <typename Source>
  void start(Source& rows, int64_t first, int64_t count, int64_t od, int64_t oh) {
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
  void gather(T* to, int64_t ow, int64_t group, int64_t lanes, int64_t offset) const {
    const int64_t w0 = lc_start(g_, 2, ow);
    const LcTaps taps = lc_taps(g_, 2, w0, 0, g_.in[2]);
    const int64_t run = g_.c * lanes;
    const int64_t pixel = g_.groups * run;
    const bool adjacent = g_.groups == 1 && (g_.dilation[2] == 1 || taps.end - taps.begin == 1);
    for (const T* row : rows_) {
      if (row == nullptr || taps.begin == taps.end) {
        std::memset(to, 0, g_.kernel[2] * run * sizeof(T));
      } else {
        const T* from = row + offset + group * run;
        if (taps.begin > 0) {
          std::memset(to, 0, taps.begin * run * sizeof(T));
        }
        if (adjacent) {
          std::memcpy(to + taps.begin * run, from + (w0 + taps.begin * g_.dilation[2]) * pixel,
                      (taps.end - taps.begin) * run * sizeof(T));
        } else {
          for (int64_t t = taps.begin; t < taps.end; ++t) {
            std::memcpy(to + t * run, from + (w0 + t * g_.dilation[2]) * pixel, run * sizeof(T));
          }
        }
        if (taps.end < g_.kernel[2]) {
          std::memset(to + taps.end * run, 0, (g_.kernel[2] - taps.end) * run * sizeof(T));
        }
      }
      to += g_.kernel[2] * run;
    }
  }

 private:
  const LcGeometry& g_;
  std::vector<const T*> rows_;
};

// Samples per product, from the geometry alone: as many as rows and patches leave room for.
inline int64_t choose_lanes(int64_t n, int64_t bytes_per_lane) {
  return balanced(n, std::clamp(kRowBytes / std::max<int64_t>(bytes_per_lane, 1), kMinLanes, kMaxLanes));
}

// Rows of a block of weights that is copied before it is used.
inline int64_t choose_block(int64_t rows, int64_t row_bytes) {
  return balanced(rows, std::max<int64_t>(kTileBytes / 2 / std::max<int64_t>(row_bytes, 1), 8));
}

// Blocks of the weights, or of B, as T, a half type as it is where that is uint16_t: in place where they can be.
template <typename T>
class Blocks {
 public:
  // `plain` (contiguous, of `dtype`), or B formed from `feedback` in `dtype`.
  struct Source {
    const char* plain;
    DType dtype;
    const FeedbackParams* feedback;
    int64_t rows, cols;  // of a position, all groups

    DType wanted() const { return sizeof(T) == 2 ? dtype : acc_dtype<T>; }
    bool in_place() const { return plain != nullptr && dtype == wanted(); }
    int64_t bytes() const { return size_of(dtype); }
    const char* at(int64_t position, int64_t row, int64_t column) const {
      return plain + ((position * rows + row) * cols + column) * bytes();
    }
  };

  // `most`: elements at once.
  Blocks(const Source& source, int64_t most, Arena& arena) : source_(source) {
    if (!source.in_place()) {
      wide_ = arena.take<T>(most);
    }
    if (source.plain == nullptr && source.dtype != source.wanted()) {
      formed_ = arena.take<char>(most * source.bytes());
    }
  }

  // Rows first … first + count − 1, columns k0 … k1 − 1 of a position; ld is set.
  const T* get(int64_t position, int64_t first, int64_t count, int64_t k0, int64_t k1, int64_t& ld) {
    ld = source_.cols;
    if (source_.in_place()) {
      return reinterpret_cast<const T*>(source_.at(position, first, k0));
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
    copy_box(wide_, source_.wanted(), {0, width, 1}, from, source_.dtype, {0, ld, 1}, 1, count, width);
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
      if (i + kAhead < count) {
        prefetch(p, p.weight, e + kAhead * source_.cols, width);
        prefetch(p, p.magnitude, e + kAhead * source_.cols, width);
      }
      run(p, e / p.cols, e % p.cols, width, to + i * width * source_.bytes());
    }
  }

  // Short runs of rows are too little for the processor to foresee the next one.
  static constexpr int64_t kAhead = 2;

  static void prefetch(const FeedbackParams& p, const Operand& x, int64_t e, int64_t width) {
    if (x.data && x.dense) {
      const char* from = static_cast<const char*>(x.data) + (e / p.cols * x.row_stride + e % p.cols) * size_of(x.dtype);
      for (int64_t byte = 0; byte < width * size_of(x.dtype); byte += 64) {
        __builtin_prefetch(from + byte);
      }
    }
  }

  const Source& source_;
  T* wide_ = nullptr;
  char* formed_ = nullptr;
};

}  // namespace bioplaus::lc
