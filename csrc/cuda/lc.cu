// Locally-connected ops on CUDA: three products, every block of threads one tile of one of them.
//
//                      for each            rows    columns  summed over
//     forward          position, group     Output  Sample   Patch          Y = W_p X_p
//     weight gradient  position, group     Output  Patch    Sample         dW_p = dY_p X_pᵀ
//     input gradient   input pixel, group  Input   Sample   Reader         the positions that read the pixel
//
// Each tensor takes two of a product's three indices, and an entry's address is the sum of what these add to it, from
// tables in shared memory, so that strides, dilation, groups, padding and memory format are met once an index:
//
//     index      weights               input                 output
//     Sample                           sample                sample
//     Output     row of the block                            channel at the position
//     Patch      tap and channel       the pixel's channel
//     Input      channel               channel at the pixel
//     Reader     row and tap                                 channel at a position that reads the pixel with that tap
//
// The positions that read a pixel and their taps are, in each dim, arithmetic progressions; so every output has one
// writer, every entry of B is read once for all samples of a tile, and results have the same bits in any order of the
// blocks. B is stored: lc.cpp forms it.
//
// Where channels are whole 16-byte pieces, activations come channels-last and cp.async brings the next stage of both
// operands while this one is multiplied; an operand lies in shared memory as it does in device memory, and ldmatrix
// transposes. Other channels go entry by entry.
//
// Half types multiply on tensor cores (mma.m16n8k16); all sums go to a second register after each stage of 128 bytes
// along the sum (64 entries of a half type), as tensor cores truncate. fp32 and fp64 multiply by FFMA and DFMA.
//
// Roofline, on paper and not yet on hardware: max(bytes of the weights once for every 64 samples, and of the
// activations; 2 · samples flops a weight). With up to 8 samples a tile has 8 of them, and the weights are all that
// counts. By Little's law 12 KB under way on a processor of sm_80 (2 TB/s, 600 ns, 108 of them), 18 KB of sm_90 and 43
// KB of sm_100 keep its memory busy: a block has 9 to 16 KB under way, three or four run together.
#include <type_traits>

#include "element.h"
#include "launch_kernel.h"
#include "lc.h"
#include "ptx.cuh"

namespace bioplaus {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;
constexpr int kStageBytes = 128;
constexpr int kFewSamples = 8;

// Blocks on a processor at once, which registers and shared memory have to allow.
template <typename T, int kColumns>
constexpr int kBlocks = sizeof(T) == 8 ? 2 : (kColumns == 64 ? 3 : 4);

// What each is: above.
enum class Index { Sample, Output, Patch, Input, Reader };

// Of a product: its indices, and the tensors of result = a · b.
template <Product product>
struct Roles {
  static constexpr bool kForward = product == Product::Forward, kBackwardInput = product == Product::BackwardInput;
  static constexpr bool kBackwardWeight = product == Product::BackwardWeight;
  static constexpr Index kRow = kBackwardInput ? Index::Input : Index::Output;
  static constexpr Index kColumn = kBackwardWeight ? Index::Patch : Index::Sample;
  static constexpr Index kSum = kForward ? Index::Patch : kBackwardInput ? Index::Reader : Index::Sample;
  static constexpr Tensor kA = kBackwardWeight ? kOut : kWeight, kB = kBackwardInput ? kOut : kIn;
  static constexpr Tensor kResult = kForward ? kOut : kBackwardInput ? kIn : kWeight;
};

// How many there are of an index of rows or columns.
template <Index kind>
BK_INLINE int64_t count(const LcGeometry& g) {
  return kind == Index::Sample ? g.n : kind == Index::Output ? g.o : kind == Index::Input ? g.c : lc_columns(g);
}

struct Tiles {
  int64_t rows, columns, all;
};

// What a block works on: a tile, from `row` and `column` on, of the product at a position or an input pixel.
struct Tile {
  int64_t place, group, row, column;
};

// Coordinates of the place; of a pixel, in each dim, the taps first, first + step, … that a position reads it with.
struct Place {
  int64_t at[kLcDims], first[kLcDims], step[kLcDims], count[kLcDims];
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

// Dim d of a place.
__device__ void find(const LcGeometry& g, bool pixel, int64_t index, int d, Place& to) {
  int64_t at[kLcDims];
  split(index, pixel ? g.in : g.out, at);
  to.at[d] = d == 0 ? at[0] : d == 1 ? at[1] : at[2];
  if (!pixel) {
    return;
  }
  const int64_t s = g.stride[d], dilation = g.dilation[d];
  // Tap t reads the pixel from position (last − t·dilation) / s, where that divides and there is such a position.
  const int64_t last = to.at[d] + g.before[d];
  const int64_t over = last - (g.out[d] - 1) * s;
  const int64_t end = last / dilation + 1 < g.kernel[d] ? last / dilation + 1 : g.kernel[d];
  int64_t t = over > 0 ? (over + dilation - 1) / dilation : 0;
  while (t < end && (last - t * dilation) % s != 0) {
    ++t;
  }
  int64_t step = 1;
  while (step < g.kernel[d] && step * dilation % s != 0) {
    ++step;
  }
  to.first[d] = t;
  to.step[d] = step;
  to.count[d] = t < end ? (end - 1 - t) / step + 1 : 0;
}

// Offset of a channel at a position or pixel, of sample 0.
__device__ int64_t channel_at(const LcStrides& x, const int64_t (&at)[kLcDims], int64_t channel) {
  return at[0] * x.spatial[0] + at[1] * x.spatial[1] + at[2] * x.spatial[2] + channel * x.channel;
}

// What index i adds to an address in each tensor; −1 in the padding.
struct Offsets {
  int64_t of[3];
};

template <Index kind>
__device__ Offsets offsets(const LcParams& p, const Tile& tile, const Place& place, int64_t i) {
  const LcGeometry& g = p.g;
  if (kind == Index::Sample) {
    return {0, i * p.in.sample, i * p.out.sample};
  }
  if (kind == Index::Output) {
    const int64_t channel = tile.group * g.o + i;
    return {(tile.place * g.groups * g.o + channel) * lc_columns(g), 0, channel_at(p.out, place.at, channel)};
  }
  if (kind == Index::Input) {
    return {i, channel_at(p.in, place.at, tile.group * g.c + i), 0};
  }
  int64_t at[kLcDims], tap[kLcDims];
  if (kind == Index::Patch) {
    split(i / g.c, g.kernel, tap);
    bool inside = true;
    for (int d = 0; d < kLcDims; ++d) {
      at[d] = lc_start(g, d, place.at[d]) + tap[d] * g.dilation[d];
      inside = inside && at[d] >= 0 && at[d] < g.in[d];
    }
    return {i, inside ? channel_at(p.in, at, tile.group * g.c + i % g.c) : -1, 0};
  }
  split(i / g.o, place.count, at);
  for (int d = 0; d < kLcDims; ++d) {
    tap[d] = place.first[d] + at[d] * place.step[d];
    at[d] = (place.at[d] + g.before[d] - tap[d] * g.dilation[d]) / g.stride[d];
  }
  const int64_t channel = tile.group * g.o + i % g.o;
  const int64_t row = join(g.out, at) * g.groups * g.o + channel;
  return {row * lc_columns(g) + join(g.kernel, tap) * g.c, 0, channel_at(p.out, at, channel)};
}

// What N neighbours of an index add to an address, in two tensors; −1 where there is none.
template <int N>
struct Table {
  int64_t x[2][N];
};

// Thread i has the neighbour first + i.
template <Index kind, Tensor one, Tensor other, int N>
__device__ void fill(const LcParams& p, const Tile& tile, const Place& place, int i, int64_t first, int64_t end,
                     Table<N>& to) {
  if (i < N) {
    const Offsets o = first + i < end ? offsets<kind>(p, tile, place, first + i) : Offsets{-1, -1, -1};
    to.x[0][i] = o.of[one];
    to.x[1][i] = o.of[other];
  }
}

// A stage of one operand: lines of the tile by kDepth entries along the sum. Lines are adjacent (kAcross), or entries.
template <typename T, int kLines_, bool kAcross_>
struct Stage {
  static constexpr int kLines = kLines_, kDepth = kStageBytes / sizeof(T), kWide = 16 / sizeof(T);
  static constexpr bool kAcross = kAcross_;
  // Rows 16 bytes further apart: ldmatrix and 16-byte loads of 8 rows meet all banks.
  static constexpr int kPitch = (kAcross ? kLines : kDepth) + kWide;
  alignas(16) T x[(kAcross ? kDepth : kLines) * kPitch];

  // Piece i of N neighbours.
  template <int N>
  __device__ static void piece(int i, int& line, int& k) {
    constexpr int kInner = (kAcross ? kLines : kDepth) / N;
    line = kAcross ? i % kInner * N : i / kInner;
    k = kAcross ? i / kInner : i % kInner * N;
  }
  __device__ static int at(int line, int k) { return kAcross ? k * kPitch + line : line * kPitch + k; }
};

// Fills a stage, or starts to: 16 bytes at a time, or entry by entry, eight loads of a thread under way.
template <typename T, typename S>
__device__ void load(const T* data, bool wide, const int64_t* line, const int64_t* depth, S& to) {
  constexpr int kEntries = S::kLines * S::kDepth, kPieces = kEntries / S::kWide;
  constexpr int kAtOnce = kEntries < 8 * kThreads ? kEntries / kThreads : 8;
  int l, k;
  if (wide) {
#pragma unroll
    for (int first = 0; first < kPieces; first += kThreads) {
      if (kPieces % kThreads == 0 || first + threadIdx.x < kPieces) {
        S::template piece<S::kWide>(first + threadIdx.x, l, k);
        const bool inside = (line[l] | depth[k]) >= 0;
        cp_async_16(to.x + S::at(l, k), data + (inside ? line[l] + depth[k] : 0), inside);
      }
    }
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < kEntries; i += kAtOnce * kThreads) {
    T x[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      S::template piece<1>(i + j * kThreads, l, k);
      x[j] = (line[l] | depth[k]) >= 0 ? data[line[l] + depth[k]] : T(0.0f);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      S::template piece<1>(i + j * kThreads, l, k);
      to.x[S::at(l, k)] = x[j];
    }
  }
}

template <typename T, int N, int M>
__device__ void add_to(T (&total)[N][M], const T (&part)[N][M]) {
#pragma unroll
  for (int i = 0; i < N * M; ++i) {
    total[i / M][i % M] += part[i / M][i % M];
  }
}

// A thread's part of the tile's sums: rows row(i), columns column(j).
template <typename T, typename A, typename B>
struct Sums {
  static constexpr int kWide = A::kWide, kUp = B::kLines == 64 ? 8 : 16;
  static constexpr int kMine = kRows / kUp, kTheirs = B::kLines * kUp / kThreads;
  T total[kMine][kTheirs] = {};

  // Line i of thread `me` of `of`: neighbours where they are adjacent.
  template <typename S>
  __device__ static int line(int me, int of, int i) {
    return S::kAcross ? me * kWide + i % kWide + i / kWide * kWide * of : me + i * of;
  }
  __device__ static int row(int i) { return line<A>(threadIdx.x % kUp, kUp, i); }
  __device__ static int column(int j) { return line<B>(threadIdx.x / kUp, kThreads / kUp, j); }

  // Entries k … k + kWide − 1 of a thread's lines.
  template <typename S, int kLines, typename F>
  __device__ static void load(const S& s, int k, const F& line, T (&x)[kLines][kWide]) {
#pragma unroll
    for (int n = 0; n < kLines; ++n) {
      const int i = S::kAcross ? n / kWide * kWide : n, q = S::kAcross ? n % kWide : 0;
      const auto pack = *reinterpret_cast<const Pack<T, kWide>*>(s.x + S::at(line(i), k + q));
#pragma unroll
      for (int w = 0; w < kWide; ++w) {
        (S::kAcross ? x[(i + w) % kLines][q] : x[i][w]) = pack.x[w];
      }
    }
  }

  __device__ void add(const A& a, const B& b, int64_t left) {
    T part[kMine][kTheirs] = {};
    const int depth = left < A::kDepth ? static_cast<int>(left) : A::kDepth;
#pragma unroll 1
    for (int k = 0; k < depth; k += kWide) {
      T x[kMine][kWide], y[kTheirs][kWide];
      load(a, k, row, x);
      load(b, k, column, y);
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
#pragma unroll
        for (int j = 0; j < kTheirs; ++j) {
#pragma unroll
          for (int q = 0; q < kWide; ++q) {
            part[i][j] = fma(x[i][q], y[j][q], part[i][j]);
          }
        }
      }
    }
    add_to(total, part);
  }

  // Calls f(row, column, sum).
  template <typename F>
  __device__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kMine * kTheirs; ++i) {
      f(row(i / kTheirs), column(i % kTheirs), total[i / kTheirs][i % kTheirs]);
    }
  }
};

// Half types: a warp has 16 rows of the tile.
template <typename T, typename A, typename B>
struct TensorSums {
  static constexpr int kParts = B::kLines / 8;
  float total[kParts][4] = {};

  template <typename S>
  __device__ static void load(const S& s, int line, int k, uint32_t (&x)[4]) {
    S::kAcross ? ldmatrix_x4_trans(x, s.x + S::at(line, k)) : ldmatrix_x4(x, s.x + S::at(line, k));
  }
  // 16 rows by 16 entries.
  __device__ static void load_rows(const A& a, int row, int k, uint32_t (&x)[4]) {
    const int lane = threadIdx.x % 32, high = k + lane / 16 * 8;
    A::kAcross ? load(a, row + lane / 8 % 2 * 8, high + lane % 8, x) : load(a, row + lane % 16, high, x);
  }
  // 8 columns by 32 entries.
  __device__ static void load_columns(const B& b, int column, int k, uint32_t (&y)[4]) {
    const int lane = threadIdx.x % 32;
    B::kAcross ? load(b, column, k + lane, y) : load(b, column + lane % 8, k + lane / 8 * 8, y);
  }

  __device__ void add(const A& a, const B& b, int64_t) {
    float part[kParts][4] = {};
#pragma unroll
    for (int k = 0; k < A::kDepth; k += 32) {
      uint32_t x[2][4];
      load_rows(a, threadIdx.x / 32 * 16, k, x[0]);
      load_rows(a, threadIdx.x / 32 * 16, k + 16, x[1]);
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        uint32_t y[4];
        load_columns(b, 8 * j, k, y);
        const uint32_t first[2] = {y[0], y[1]}, second[2] = {y[2], y[3]};
        mma_m16n8k16(part[j], x[0], first, T());
        mma_m16n8k16(part[j], x[1], second, T());
      }
    }
    add_to(total, part);
  }

  template <typename F>
  __device__ void each(const F& f) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < kParts * 4; ++i) {
      f(16 * warp + lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2, total[i / 4][i % 4]);
    }
  }
};

template <typename T, Product product, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kColumns>)
    lc_kernel(const __grid_constant__ LcParams p, Tiles tiles, bool a_wide, bool b_wide) {
  using R = Roles<product>;
  using A = Stage<T, kRows, !R::kForward>;
  using B = Stage<T, kColumns, R::kBackwardWeight>;
  __shared__ A a[2];
  __shared__ B b[2];
  __shared__ Table<kRows> rows;
  __shared__ Table<kColumns> columns;
  __shared__ Table<A::kDepth> depths[2];
  __shared__ Place place;
  const LcGeometry& g = p.g;

  // Tiles of the same weights are neighbours.
  for (int64_t index = blockIdx.x; index < tiles.all; index += gridDim.x) {
    const int64_t rest = index / tiles.columns, block = rest / tiles.rows;
    const Tile tile{block / g.groups, block % g.groups, rest % tiles.rows * kRows, index % tiles.columns * kColumns};
    if (threadIdx.x < kLcDims) {
      find(g, R::kBackwardInput, tile.place, threadIdx.x, place);
    }
    __syncthreads();
    const int64_t depth = R::kBackwardInput ? product3(place.count) * g.o : count<R::kSum>(g);
    fill<R::kRow, R::kA, R::kResult>(p, tile, place, threadIdx.x, tile.row, count<R::kRow>(g), rows);
    // The last threads', while the first have rows.
    const int last = kThreads - 1 - threadIdx.x;
    fill<R::kColumn, R::kB, R::kResult>(p, tile, place, last, tile.column, count<R::kColumn>(g), columns);
    std::conditional_t<sizeof(T) == 2, TensorSums<T, A, B>, Sums<T, A, B>> sums;
    int now = 1;
    for (int64_t first = -A::kDepth; first < depth; first += A::kDepth, now = 1 - now) {
      const int64_t next = first + A::kDepth;
      Table<A::kDepth>& t = depths[1 - now];
      if (next < depth) {
        fill<R::kSum, R::kA, R::kB>(p, tile, place, threadIdx.x, next, depth, t);
      }
      // All have the tables, and have multiplied the stage that the next one takes the place of.
      __syncthreads();
      if (next < depth) {
        load(static_cast<const T*>(p.data[R::kA]), a_wide, rows.x[0], t.x[0], a[1 - now]);
        load(static_cast<const T*>(p.data[R::kB]), b_wide, columns.x[0], t.x[1], b[1 - now]);
      }
      cp_async_commit();
      if (first >= 0) {
        cp_async_wait<1>();
        __syncthreads();
        sums.add(a[now], b[now], depth - first);
      }
    }
    sums.each([&](int row, int column, auto sum) {
      if ((rows.x[1][row] | columns.x[1][column]) >= 0) {
        if (R::kForward && p.bias) {
          const int64_t channel = tile.group * g.o + tile.row + row;
          sum += to_float(static_cast<const T*>(p.bias)[tile.place * p.bias_stride + channel]);
        }
        round_to(sum, static_cast<T*>(p.data[R::kResult])[rows.x[1][row] + columns.x[1][column]]);
      }
    });
    __syncthreads();
  }
}

// Whether pieces of 16 bytes can be read of a tensor's neighbours, which are channels or columns of the weights.
template <typename T, typename R>
bool wide(const LcParams& p, Tensor tensor) {
  const LcStrides& x = tensor == kIn ? p.in : p.out;
  const int64_t apart = tensor == kWeight ? (R::kForward ? lc_columns(p.g) : p.g.c)
                        : x.channel != 1
                            ? 1
                            : x.sample | x.spatial[0] | x.spatial[1] | x.spatial[2] | (tensor == kIn ? p.g.c : p.g.o);
  return apart * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(p.data[tensor]) % 16 == 0;
}

template <typename T, Product product, int kColumns>
cudaError_t launch(const LcParams& p, cudaStream_t stream) {
  using R = Roles<product>;
  constexpr int64_t kMaxBlocks = 1 << 20;
  const LcGeometry& g = p.g;
  const int64_t rows = (count<R::kRow>(g) + kRows - 1) / kRows;
  const int64_t columns = (count<R::kColumn>(g) + kColumns - 1) / kColumns;
  const int64_t all = product3(R::kBackwardInput ? g.in : g.out) * g.groups * rows * columns;
  const unsigned blocks = static_cast<unsigned>(all < kMaxBlocks ? all : kMaxBlocks);
  const bool a_wide = wide<T, R>(p, R::kA), b_wide = wide<T, R>(p, R::kB);
  BK_LAUNCH((lc_kernel<T, product, kColumns>), blocks, kThreads, 0, stream, p, Tiles{rows, columns, all}, a_wide,
            b_wide);
  return cudaGetLastError();
}

// A weight gradient sums over samples: there is one tile for any number of them.
template <typename T, Product product>
cudaError_t launch(const LcParams& p, cudaStream_t stream) {
  constexpr int kFew = product == Product::BackwardWeight ? 64 : kFewSamples;
  return p.g.n <= kFew ? launch<T, product, kFew>(p, stream) : launch<T, product, 64>(p, stream);
}

}  // namespace

cudaError_t launch_lc(Product product, const LcParams& p, cudaStream_t stream) {
  return of_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    return product == Product::Forward         ? launch<T, Product::Forward>(p, stream)
           : product == Product::BackwardInput ? launch<T, Product::BackwardInput>(p, stream)
                                               : launch<T, Product::BackwardWeight>(p, stream);
  });
}

}  // namespace bioplaus
