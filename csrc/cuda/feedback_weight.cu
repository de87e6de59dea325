// feedback_weight on CUDA: a thread forms 8 neighbouring columns of one row in registers, by the table of
// common/feedback.h: magnitudes (already scaled), times signs, rounded into the output. The rule is the same for a
// whole launch, so its branches do not diverge. A Philox call is 20 wide multiplications: eight uniform entries take
// two calls, seeded signs one, of which 8 of its 128 bits are used, as passing the words between threads would cost
// about what it saves.
//
// Roofline, on paper and not yet on hardware: memory where entries are read or are signs alone, the bytes of the weight
// and the magnitude that are read and of the output that is written (8 for s·sign(W) in fp32); packed signs add 1/8
// byte. Drawn entries are bound by instructions: 16.7 M uniform ones take some 31 µs of them on an H100, where writing
// them as bf16 takes 10.
#include <type_traits>

#include "../common/packed_signs.h"
#include "element.h"
#include "form_kernels.h"
#include "launch_kernel.h"

namespace bioplaus {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 8;

// Columns first … first + n − 1 of a row, `first` a multiple of kColumns. Where every operand is known to be dense,
// kStrided is false: to find a strided column takes divisions.
template <typename acc_t, bool kStrided>
struct Chunk {
  int64_t row, first;
  int n;
  acc_t b[kColumns];
};

// Whether a chunk can be moved in whole 16-byte pieces.
template <typename C>
__device__ __forceinline__ bool wide(const C& c, const Operand& x, const void* from) {
  return c.n == kColumns && x.dense && reinterpret_cast<uintptr_t>(from) % 16 == 0;
}

// Its divisions once in a kernel: inlined for every entry and dtype they are most of its code and of its compilation.
__device__ __noinline__ int64_t strided_offset(const FeedbackParams& p, const Operand& x, int64_t j) {
  return column_offset(p, x, j);
}

// Calls f(b[t], x) with the operand's entries x.
template <typename acc_t, bool kStrided, typename F>
__device__ __forceinline__ void with_entries(const FeedbackParams& p, const Operand& x, Chunk<acc_t, kStrided>& c,
                                             const F& f) {
  of_dtype(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* row = static_cast<const T*>(x.data) + c.row * x.row_stride;
    Pack<T, kColumns> entries{};
    if (wide(c, x, row + c.first)) {
      entries = *reinterpret_cast<const Pack<T, kColumns>*>(row + c.first);
    } else {
#pragma unroll
      for (int t = 0; t < kColumns; ++t) {
        if (t < c.n) {
          entries.x[t] = row[kStrided ? strided_offset(p, x, c.first + t) : c.first + t];
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kColumns; ++t) {
      f(c.b[t], to_float(entries.x[t]));
    }
  });
}

template <typename acc_t, bool kStrided>
__device__ void random(const FeedbackParams& p, Chunk<acc_t, kStrided>& c) {
  const Key key = read_key(p.key);
  const acc_t scale = static_cast<acc_t>(p.scale);
#pragma unroll
  for (int t = 0; t < kColumns; t += kNumbersPerCall) {
    const Philox4 x = draw(key, c.row, (c.first + t) / kNumbersPerCall);
#pragma unroll
    for (int q = 0; q < kNumbersPerCall; q += 2) {
      acc_t &a = c.b[t + q], &b = c.b[t + q + 1];
      if (p.entries == Entries::Uniform) {
        a = uniform(x.w[q], uniform_scale<acc_t>(p.scale));
        b = uniform(x.w[q + 1], uniform_scale<acc_t>(p.scale));
      } else {
        normal_pair(x.w[q], x.w[q + 1], a, b);
        a *= scale;
        b *= scale;
      }
    }
  }
}

template <typename acc_t, bool kStrided>
__device__ void magnitudes(const FeedbackParams& p, Chunk<acc_t, kStrided>& c) {
  const acc_t scale = static_cast<acc_t>(p.scale);
  if (p.entries == Entries::Constant) {
#pragma unroll
    for (int t = 0; t < kColumns; ++t) {
      c.b[t] = scale;
    }
  } else if (p.entries == Entries::Stored) {
    with_entries(p, p.magnitude, c, [&](acc_t& b, auto m) { b = scale * static_cast<acc_t>(m); });
  } else {
    random(p, c);
  }
}

template <typename acc_t, bool kStrided>
__device__ void signs(const FeedbackParams& p, Chunk<acc_t, kStrided>& c) {
  if (p.entries != Entries::Constant && (p.weight.data || p.signs)) {
#pragma unroll
    for (int t = 0; t < kColumns; ++t) {
      c.b[t] = fabs(c.b[t]);
    }
  }
  if (p.weight.data) {
    with_entries(p, p.weight, c, [](acc_t& b, auto w) { b *= sign_of<acc_t>(w); });
  } else if (p.signs || p.entries == Entries::Constant) {
    // A chunk lies in one word.
    const int64_t w = c.first / 32;
    const SignWord word =
        p.signs ? read_signs(p.signs, p.rows, sign_words(p.cols), c.row, w) : seeded_signs(p.key, c.row, w);
    const uint32_t negative = word.negative >> c.first % 32, nonzero = word.nonzero >> c.first % 32;
#pragma unroll
    for (int t = 0; t < kColumns; ++t) {
      c.b[t] = negative & (1u << t) ? -c.b[t] : c.b[t];
      c.b[t] *= nonzero & (1u << t) ? acc_t(1) : acc_t(0);
    }
  }
}

// Columns from `first` on are the output's.
template <typename T, typename acc_t, bool kStrided>
__device__ void store(const FeedbackParams& p, const Chunk<acc_t, kStrided>& c, int64_t first) {
  Pack<T, kColumns> from;
#pragma unroll
  for (int t = 0; t < kColumns; ++t) {
    round_to(c.b[t], from.x[t]);
  }
  T* row = static_cast<T*>(p.out.data) + c.row * p.out.row_stride;
  const int64_t at = c.first - first;
  if (wide(c, p.out, row + at)) {
    *reinterpret_cast<Pack<T, kColumns>*>(row + at) = from;
    return;
  }
#pragma unroll
  for (int t = 0; t < kColumns; ++t) {
    if (t < c.n) {
      row[kStrided ? strided_offset(p, p.out, at + t) : at + t] = from.x[t];
    }
  }
}

// Registers for 4 blocks a multiprocessor, or 2 where numbers are double or columns strided: what fits without
// spilling.
template <typename acc_t, bool kStrided>
__global__ void __launch_bounds__(kThreads, sizeof(acc_t) == 8 || kStrided ? 2 : 4)
    feedback_weight_kernel(const __grid_constant__ FeedbackParams p, int64_t first, int64_t end) {
  const int64_t row_step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  const int64_t column_step = static_cast<int64_t>(gridDim.x) * blockDim.x * kColumns;
  Chunk<acc_t, kStrided> c;
  for (c.row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; c.row < p.rows; c.row += row_step) {
    for (c.first = first + (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kColumns; c.first < end;
         c.first += column_step) {
      c.n = static_cast<int>(end - c.first < kColumns ? end - c.first : kColumns);
      magnitudes(p, c);
      signs(p, c);
      of_dtype(p.out.dtype, [&](auto zero) {
        if constexpr (std::is_same_v<decltype(to_float(zero)), acc_t>) {
          store<decltype(zero)>(p, c, first);
        }
      });
    }
  }
}

template <typename acc_t>
void launch(const FeedbackParams& p, int64_t first, int64_t cols, dim3 grid, dim3 block, cudaStream_t stream) {
  const auto dense = [](const Operand& x) { return !x.data || x.dense; };
  if (dense(p.weight) && dense(p.magnitude) && dense(p.out)) {
    BK_LAUNCH((feedback_weight_kernel<acc_t, false>), grid, block, 0, stream, p, first, first + cols);
  } else {
    BK_LAUNCH((feedback_weight_kernel<acc_t, true>), grid, block, 0, stream, p, first, first + cols);
  }
}

}  // namespace

cudaError_t launch_feedback_weight(const FeedbackParams& p, int64_t first, int64_t cols, cudaStream_t stream) {
  const int64_t chunks = (cols + kColumns - 1) / kColumns;
  // Short rows share a block, so that its threads have work.
  int width = kThreads;
  while (width > 1 && width / 2 >= chunks) {
    width /= 2;
  }
  const dim3 block(width, kThreads / width);
  const int64_t blocks_x = (chunks + block.x - 1) / block.x;
  const int64_t blocks_y = (p.rows + block.y - 1) / block.y;
  // The loops in the kernel take what a grid of this size leaves.
  constexpr int64_t kMaxBlocks = 1 << 16;
  const int64_t x = blocks_x < kMaxBlocks ? blocks_x : kMaxBlocks;
  const int64_t most_y = (kMaxBlocks + x - 1) / x < 65535 ? (kMaxBlocks + x - 1) / x : 65535;
  const dim3 grid(x, blocks_y < most_y ? blocks_y : most_y);
  if (p.out.dtype == DType::Float64) {
    launch<double>(p, first, cols, grid, block, stream);
  } else {
    launch<float>(p, first, cols, grid, block, stream);
  }
  return cudaGetLastError();
}

}  // namespace bioplaus
