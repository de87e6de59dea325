// Locally-connected ops on CUDA: three products, every block of threads one tile of one of them.
//
//                      for each            rows  columns  summed over
//     forward          position, group     o     sample   taps · c                  Y = W_p X_p
//     input gradient   input pixel, group  c     sample   (position, tap) · o       the positions that read the pixel
//     weight gradient  position, group     o     taps · c sample                    dW_p = dY_p X_pᵀ
//
// The patch that a position sees is gathered while a tile is loaded: the address of an operand's entry is that of its
// row plus that of its index in the sum, each from a small table in shared memory, so that strides, dilation, groups,
// padding and memory format are met once a row and once an index. The input gradient asks which positions read a pixel:
// in each dim they and their taps are arithmetic progressions; so every output has one writer, every entry of B is read
// or formed once for all samples of a tile, and results have the same bits in any order of the blocks.
//
// Half types multiply on tensor cores (mma.m16n8k16); all sums go to a second register after each stage of 128 bytes
// along the sum (64 entries of a half type), as tensor cores truncate. fp32 and fp64 multiply by FFMA and DFMA.
//
// Roofline: max(bytes of the weights once for every 64 samples, and of the activations; 2 · samples flops a weight).
// With up to 8 samples a tile has 8 of them, and the weights, in 16-byte loads where rows allow it, are all that
// counts. A contiguous activation (channels not last) costs a sector of 32 bytes an entry.
#include "entries.cuh"
#include "launch_kernel.h"
#include "lc.h"
#include "ptx.cuh"

namespace bioplaus {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;
constexpr int kStageBytes = 128;
constexpr int kPadBytes = 16;  // Rows 144 bytes apart: ldmatrix and 16-byte loads of 8 rows meet all banks.
constexpr int kFewSamples = 8;

// Blocks on a processor at once, which registers have to allow.
template <typename T, int kColumns>
constexpr int kBlocks = sizeof(T) == 8   ? 2
                        : kColumns == 64 ? 3
                                         : 4;

enum class Product { Forward, BackwardInput, BackwardWeight };

// What a block works on.
struct Tile {
  int64_t place;  // position, or input pixel
  int64_t group;
  int64_t row, column;  // the first
};

// For an input pixel: in each dim the taps first, first + step, … that a position reads it with.
struct Readers {
  int64_t first[kLcDims], step[kLcDims], count[kLcDims], coordinate[kLcDims];
};

__device__ void split(int64_t index, const int64_t* size, int64_t (&x)[kLcDims]) {
  x[2] = index % size[2];
  index /= size[2];
  x[1] = index % size[1];
  x[0] = index / size[1];
}

__device__ int64_t join(const int64_t* size, const int64_t (&x)[kLcDims]) {
  return (x[0] * size[1] + x[1]) * size[2] + x[2];
}

__device__ void find_readers(const LcGeometry& g, int64_t pixel, int d, Readers& r) {
  int64_t at[kLcDims];
  split(pixel, g.in, at);
  const int64_t coordinate = d == 0 ? at[0] : d == 1 ? at[1] : at[2];
  const int64_t s = g.stride[d], dilation = g.dilation[d];
  // Tap t reads the pixel from position (last − t·dilation) / s, where that divides and there is such a position.
  const int64_t last = coordinate + g.before[d];
  const int64_t over = last - (g.out[d] - 1) * s;
  const int64_t end = last / dilation + 1 < g.kernel[d] ? last / dilation + 1 : g.kernel[d];
  int64_t t = over > 0 ? (over + dilation - 1) / dilation : 0;
  while (t < end && (last - t * dilation) % s != 0) {
    ++t;
  }
  int64_t step = 1;
  while (step * dilation % s != 0) {
    ++step;
  }
  r.coordinate[d] = coordinate;
  r.first[d] = t;
  r.step[d] = step;
  r.count[d] = t < end ? (end - 1 - t) / step + 1 : 0;
}

// Offset of a channel at a position or pixel, of sample 0.
__device__ int64_t activation_offset(const LcActivation& x, const int64_t (&at)[kLcDims], int64_t channel) {
  return at[0] * x.stride[0] + at[1] * x.stride[1] + at[2] * x.stride[2] + channel * x.stride_c;
}

// Offset of column k = (tap, channel) of the patch that a position sees, −1 in the padding.
__device__ int64_t patch_offset(const LcParams& p, const Tile& tile, int64_t k) {
  const LcGeometry& g = p.g;
  int64_t at[kLcDims], tap[kLcDims];
  split(tile.place, g.out, at);
  split(k / g.c, g.kernel, tap);
  for (int d = 0; d < kLcDims; ++d) {
    at[d] = lc_start(g, d, at[d]) + tap[d] * g.dilation[d];
    if (at[d] < 0 || at[d] >= g.in[d]) {
      return -1;
    }
  }
  return activation_offset(p.in, at, tile.group * g.c + k % g.c);
}

// Where entry (row, k) of the two operands lies: row + k, or nowhere, which is a zero, if either is negative.
template <int kColumns, int kDepth>
struct Tables {
  int64_t a_row[kRows], b_row[kColumns], a[kDepth], b[kDepth];
  int64_t feedback_row[kDepth];
  int64_t result[kRows];  // where the rows of the result begin
};

// The sizes of one product: rows and columns of its result, and length of the sum.
struct Extent {
  int64_t rows, columns, depth;
};

template <Product product>
__device__ Extent extent(const LcParams& p, const Readers& r) {
  const LcGeometry& g = p.g;
  if (product == Product::BackwardInput) {
    return {g.c, g.n, product3(r.count) * g.o};
  }
  return product == Product::Forward ? Extent{g.o, g.n, lc_columns(g)} : Extent{g.o, lc_columns(g), g.n};
}

template <Product product, int kColumns, int kDepth>
__device__ void fill_rows(const LcParams& p, const Tile& tile, const Extent& e, Tables<kColumns, kDepth>& t) {
  const LcGeometry& g = p.g;
  for (int i = threadIdx.x; i < kRows + kColumns; i += kThreads) {
    if (i < kRows) {
      const int64_t row = tile.row + i;
      const int64_t in_weight = ((tile.place * g.groups + tile.group) * g.o + row) * lc_columns(g);
      int64_t at[kLcDims];
      split(tile.place, product == Product::BackwardInput ? g.in : g.out, at);
      const int64_t in_activation = product == Product::BackwardInput
                                        ? activation_offset(p.in, at, tile.group * g.c + row)
                                        : activation_offset(p.out, at, tile.group * g.o + row);
      const int64_t operand = product == Product::Forward         ? in_weight
                              : product == Product::BackwardInput ? row
                                                                  : in_activation;
      t.a_row[i] = row < e.rows ? operand : -1;
      t.result[i] = product == Product::BackwardWeight ? in_weight : in_activation;
    } else {
      const int64_t column = tile.column + i - kRows;
      int64_t offset = -1;
      if (column < e.columns) {
        offset = product == Product::Forward         ? column * p.in.stride_n
                 : product == Product::BackwardInput ? column * p.out.stride_n
                                                     : patch_offset(p, tile, column);
      }
      t.b_row[i - kRows] = offset;
    }
  }
}

template <Product product, int kColumns, int kDepth>
__device__ void fill_depth(const LcParams& p, const Tile& tile, const Readers& r, const Extent& e, int64_t first,
                           Tables<kColumns, kDepth>& t) {
  const LcGeometry& g = p.g;
  for (int i = threadIdx.x; i < kDepth; i += kThreads) {
    const int64_t k = first + i;
    t.a[i] = t.b[i] = -1;
    if (k >= e.depth) {
      continue;
    }
    if (product == Product::Forward) {
      t.a[i] = k;
      t.b[i] = patch_offset(p, tile, k);
    } else if (product == Product::BackwardWeight) {
      t.a[i] = k * p.out.stride_n;
      t.b[i] = k * p.in.stride_n;
    } else {
      int64_t which[kLcDims], tap[kLcDims], at[kLcDims];
      split(k / g.o, r.count, which);
      for (int d = 0; d < kLcDims; ++d) {
        tap[d] = r.first[d] + which[d] * r.step[d];
        at[d] = (r.coordinate[d] + g.before[d] - tap[d] * g.dilation[d]) / g.stride[d];
      }
      const int64_t channel = tile.group * g.o + k % g.o;
      const int64_t position = join(g.out, at);
      const int64_t entry = (position * g.groups * g.o + channel) * lc_columns(g) + join(g.kernel, tap) * g.c;
      t.feedback_row[i] = p.weight ? 0 : entry / p.feedback.cols;
      t.a[i] = p.weight ? entry : entry % p.feedback.cols;
      t.b[i] = activation_offset(p.out, at, channel);
    }
  }
}

template <typename T>
struct Sum {
  using type = float;
};
template <>
struct Sum<double> {
  using type = double;
};

// A stage of one operand, `kLines` lines of the sum's next entries. Lanes go along the sum, or along the lines.
template <typename T, int kLines, bool kAlongDepth, int kDepth, int kStride>
__device__ void gather(const T* data, const int64_t* line, const int64_t* depth, T* to) {
#pragma unroll 4
  for (int i = threadIdx.x; i < kLines * kDepth; i += kThreads) {
    const int l = kAlongDepth ? i / kDepth : i % kLines;
    const int k = kAlongDepth ? i % kDepth : i / kLines;
    to[l * kStride + k] = line[l] < 0 || depth[k] < 0 ? T(0.0f) : data[line[l] + depth[k]];
  }
}

// The same for operands with 16 bytes of neighbours along the sum.
template <typename T, int kLines, int kDepth, int kStride>
__device__ void gather_wide(const T* data, const int64_t* line, const int64_t* depth, T* to) {
  constexpr int kWide = 16 / sizeof(T), kPieces = kDepth / kWide;
#pragma unroll
  for (int i = threadIdx.x; i < kLines * kPieces; i += kThreads) {
    const int l = i / kPieces, k = i % kPieces * kWide;
    const bool inside = line[l] >= 0 && depth[k] >= 0;
    *reinterpret_cast<int4*>(to + l * kStride + k) =
        inside ? *reinterpret_cast<const int4*>(data + line[l] + depth[k]) : make_int4(0, 0, 0, 0);
  }
}

// The same for neighbours along the lines, which the stage has apart.
template <typename T, int kLines, int kDepth, int kStride>
__device__ void gather_across(const T* data, const int64_t* line, const int64_t* depth, T* to) {
  constexpr int kWide = 16 / sizeof(T), kPieces = kLines / kWide;
#pragma unroll
  for (int i = threadIdx.x; i < kPieces * kDepth; i += kThreads) {
    const int l = i % kPieces * kWide, k = i / kPieces;
    Pack<T, kWide> x{};
    if (line[l] >= 0 && depth[k] >= 0) {
      x = *reinterpret_cast<const Pack<T, kWide>*>(data + line[l] + depth[k]);
    }
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      to[(l + j) * kStride + k] = x.x[j];
    }
  }
}

// A stage of B, formed: N neighbours along the lines, which are channels of one tap.
template <typename T, int N, int kDepth, int kStride, int kColumns>
__device__ void form(const FeedbackParams& p, const Tables<kColumns, kDepth>& t, T* to) {
  using acc_t = typename Sum<T>::type;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows / N * kDepth; i += kThreads) {
    const int l = i % (kRows / N) * N, k = i / (kRows / N);
    Chunk<acc_t, N, false> c{0, 0, N, {}};
    if (t.a_row[l] >= 0 && t.a[k] >= 0) {
      c.row = t.feedback_row[k];
      c.first = t.a[k] + t.a_row[l];
      form_entries(p, c);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      round_to(c.b[j], to[(l + j) * kStride + k]);
    }
  }
}

// A thread's part of the tile's sums: rows row(i), columns column(j).
template <typename T, int kColumns, int kDepth, int kStride>
struct Sums {
  static constexpr int kAcross = kColumns == 64 ? 8 : 16;
  static constexpr int kMine = kRows / kAcross, kTheirs = kColumns * kAcross / kThreads;
  T total[kMine][kTheirs] = {};

  __device__ static int row(int i) { return threadIdx.x % kAcross + i * kAcross; }
  __device__ static int column(int j) { return threadIdx.x / kAcross + j * (kThreads / kAcross); }

  __device__ void add(const T* a, const T* b, int64_t left) {
    constexpr int kWide = 16 / sizeof(T);
    T part[kMine][kTheirs] = {};
    const int depth = left < kDepth ? static_cast<int>(left) : kDepth;
#pragma unroll 1
    for (int k = 0; k < depth; k += kWide) {
      Pack<T, kWide> x[kMine];
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        x[i] = *reinterpret_cast<const Pack<T, kWide>*>(a + row(i) * kStride + k);
      }
#pragma unroll
      for (int j = 0; j < kTheirs; ++j) {
        const auto y = *reinterpret_cast<const Pack<T, kWide>*>(b + column(j) * kStride + k);
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
#pragma unroll
          for (int q = 0; q < kWide; ++q) {
            part[i][j] = fma(x[i].x[q], y.x[q], part[i][j]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
#pragma unroll
      for (int j = 0; j < kTheirs; ++j) {
        total[i][j] += part[i][j];
      }
    }
  }

  // Calls f(row, column, sum).
  template <typename F>
  __device__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
#pragma unroll
      for (int j = 0; j < kTheirs; ++j) {
        f(row(i), column(j), total[i][j]);
      }
    }
  }
};

// Half types: a warp has 16 rows of the tile.
template <typename T, int kColumns, int kDepth, int kStride>
struct TensorSums {
  static constexpr int kParts = kColumns / 8;
  float total[kParts][4] = {};

  __device__ void add(const T* a, const T* b, int64_t) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const T* a_line = a + (16 * warp + lane % 16) * kStride + lane / 16 * 8;
    const T* b_line = b + lane % 8 * kStride + lane / 8 * 8;
    float part[kParts][4] = {};
#pragma unroll
    for (int k = 0; k < kDepth; k += 32) {
      uint32_t x[2][4];
      ldmatrix_x4(x[0], a_line + k);
      ldmatrix_x4(x[1], a_line + k + 16);
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        uint32_t y[4];
        ldmatrix_x4(y, b_line + 8 * j * kStride + k);
        const uint32_t first[2] = {y[0], y[1]}, second[2] = {y[2], y[3]};
        mma_m16n8k16(part[j], x[0], first, T());
        mma_m16n8k16(part[j], x[1], second, T());
      }
    }
#pragma unroll
    for (int j = 0; j < kParts; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        total[j][e] += part[j][e];
      }
    }
  }

  template <typename F>
  __device__ void each(const F& f) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int j = 0; j < kParts; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        f(16 * warp + lane / 4 + 8 * (e / 2), 8 * j + lane % 4 * 2 + e % 2, total[j][e]);
      }
    }
  }
};

template <typename T, int kColumns, int kDepth, int kStride>
struct SumsOf {
  using type = TensorSums<T, kColumns, kDepth, kStride>;
};
template <int kColumns, int kDepth, int kStride>
struct SumsOf<float, kColumns, kDepth, kStride> {
  using type = Sums<float, kColumns, kDepth, kStride>;
};
template <int kColumns, int kDepth, int kStride>
struct SumsOf<double, kColumns, kDepth, kStride> {
  using type = Sums<double, kColumns, kDepth, kStride>;
};

template <typename T, Product product>
__device__ void store(const LcParams& p, const Tile& tile, const int64_t* result, int row, int64_t column,
                      typename Sum<T>::type sum) {
  if (product == Product::Forward && p.bias) {
    const int64_t channel = tile.group * p.g.o + tile.row + row;
    const int64_t first = p.bias_per_position ? tile.place * p.g.groups * p.g.o : 0;
    sum += to_float(static_cast<const T*>(p.bias)[first + channel]);
  }
  void* const to = product == Product::Forward ? p.out.data : product == Product::BackwardInput ? p.in.data : p.weight;
  const int64_t step = product == Product::Forward         ? p.out.stride_n
                       : product == Product::BackwardInput ? p.in.stride_n
                                                           : 1;
  round_to(sum, static_cast<T*>(to)[result[row] + column * step]);
}

template <typename T, Product product, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kColumns>)
    lc_kernel(const __grid_constant__ LcParams p, int64_t places) {
  constexpr int kDepth = kStageBytes / sizeof(T), kStride = (kStageBytes + kPadBytes) / sizeof(T);
  __shared__ alignas(16) T a[kRows * kStride];
  __shared__ alignas(16) T b[kColumns * kStride];
  __shared__ Tables<kColumns, kDepth> t;
  __shared__ Readers r;
  const LcGeometry& g = p.g;
  const bool backward_input = product == Product::BackwardInput;
  const int64_t most_rows = backward_input ? g.c : g.o;
  const int64_t most_columns = product == Product::BackwardWeight ? lc_columns(g) : g.n;
  const int64_t row_tiles = (most_rows + kRows - 1) / kRows, column_tiles = (most_columns + kColumns - 1) / kColumns;
  // Whether the weights can be read 16 bytes at a time: neighbours along the sum, or along the channels.
  constexpr int kWide = 16 / sizeof(T);
  const bool wide_rows =
      reinterpret_cast<uintptr_t>(p.weight) % 16 == 0 && (backward_input ? g.c : lc_columns(g)) % kWide == 0;
  const bool wide_entries = g.c % kNumbersPerCall == 0 && p.feedback.cols % kNumbersPerCall == 0;

  // Tiles of the same weights are neighbours.
  for (int64_t index = blockIdx.x; index < places * g.groups * row_tiles * column_tiles; index += gridDim.x) {
    Tile tile;
    tile.column = index % column_tiles * kColumns;
    tile.row = index / column_tiles % row_tiles * kRows;
    tile.group = index / column_tiles / row_tiles % g.groups;
    tile.place = index / column_tiles / row_tiles / g.groups;
    if (backward_input) {
      if (threadIdx.x < kLcDims) {
        find_readers(g, tile.place, threadIdx.x, r);
      }
      __syncthreads();
    }
    const Extent e = extent<product>(p, r);
    fill_rows<product>(p, tile, e, t);
    typename SumsOf<T, kColumns, kDepth, kStride>::type sums;
    for (int64_t first = 0; first < e.depth; first += kDepth) {
      fill_depth<product>(p, tile, r, e, first, t);
      __syncthreads();
      if (product == Product::BackwardWeight) {
        gather<T, kRows, false, kDepth, kStride>(static_cast<const T*>(p.out.data), t.a_row, t.a, a);
        gather<T, kColumns, false, kDepth, kStride>(static_cast<const T*>(p.in.data), t.b_row, t.b, b);
      } else {
        const T* w = static_cast<const T*>(p.weight);
        if (product == Product::Forward) {
          if (wide_rows) {
            gather_wide<T, kRows, kDepth, kStride>(w, t.a_row, t.a, a);
          } else {
            gather<T, kRows, true, kDepth, kStride>(w, t.a_row, t.a, a);
          }
        } else if (!w) {
          if (wide_entries) {
            form<T, kNumbersPerCall, kDepth, kStride>(p.feedback, t, a);
          } else {
            form<T, 1, kDepth, kStride>(p.feedback, t, a);
          }
        } else if (wide_rows) {
          gather_across<T, kRows, kDepth, kStride>(w, t.a_row, t.a, a);
        } else {
          gather<T, kRows, false, kDepth, kStride>(w, t.a_row, t.a, a);
        }
        const LcActivation& x = backward_input ? p.out : p.in;
        gather<T, kColumns, true, kDepth, kStride>(static_cast<const T*>(x.data), t.b_row, t.b, b);
      }
      __syncthreads();
      sums.add(a, b, e.depth - first);
    }
    // Without terms nothing has waited for the table of results.
    if (e.depth == 0) {
      __syncthreads();
    }
    sums.each([&](int row, int column, auto sum) {
      if (tile.row + row < e.rows && tile.column + column < e.columns) {
        store<T, product>(p, tile, t.result, row, tile.column + column, sum);
      }
    });
    __syncthreads();
  }
}

template <typename T, Product product, int kColumns>
cudaError_t launch(const LcParams& p, cudaStream_t stream) {
  const LcGeometry& g = p.g;
  const int64_t places = product3(product == Product::BackwardInput ? g.in : g.out);
  const int64_t rows = product == Product::BackwardInput ? g.c : g.o;
  const int64_t columns = product == Product::BackwardWeight ? lc_columns(g) : g.n;
  const int64_t tiles = places * g.groups * ((rows + kRows - 1) / kRows) * ((columns + kColumns - 1) / kColumns);
  constexpr int64_t kMaxBlocks = 1 << 20;
  const unsigned blocks = static_cast<unsigned>(tiles < kMaxBlocks ? tiles : kMaxBlocks);
  BK_LAUNCH((lc_kernel<T, product, kColumns>), blocks, kThreads, 0, stream, p, places);
  return cudaGetLastError();
}

template <Product product, int kFew>
cudaError_t launch(const LcParams& p, cudaStream_t stream) {
  const bool few = p.g.n <= kFew;
  switch (p.dtype) {
    case DType::Float64:
      return few ? launch<double, product, kFew>(p, stream) : launch<double, product, 64>(p, stream);
    case DType::BFloat16:
      return few ? launch<__nv_bfloat16, product, kFew>(p, stream) : launch<__nv_bfloat16, product, 64>(p, stream);
    case DType::Float16:
      return few ? launch<__half, product, kFew>(p, stream) : launch<__half, product, 64>(p, stream);
    default:
      return few ? launch<float, product, kFew>(p, stream) : launch<float, product, 64>(p, stream);
  }
}

}  // namespace

cudaError_t launch_lc_forward(const LcParams& p, cudaStream_t stream) {
  return launch<Product::Forward, kFewSamples>(p, stream);
}

cudaError_t launch_lc_backward_input(const LcParams& p, cudaStream_t stream) {
  return launch<Product::BackwardInput, kFewSamples>(p, stream);
}

// Samples are summed over here: there is one tile for any number of them.
cudaError_t launch_lc_backward_weight(const LcParams& p, cudaStream_t stream) {
  return launch<Product::BackwardWeight, 64>(p, stream);
}

}  // namespace bioplaus
