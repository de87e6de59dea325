// Locally-connected ops on CUDA: three products, every block of threads one tile of one of them.
//
//                      for each            rows  columns  summed over
//     forward          position, group     o     sample   taps · c                  Y = W_p X_p
//     input gradient   input pixel, group  c     sample   (position, tap) · o       the positions that read the pixel
//     weight gradient  position, group     o     taps · c sample                    dW_p = dY_p X_pᵀ
//
// The patch that a position sees is gathered while a tile is loaded: the address of an operand's entry is that of its
// row plus that of its index in the sum (lc_tables.cuh). The input gradient asks which positions read a pixel: in each
// dim they and their taps are arithmetic progressions; so every output has one writer, every entry of B is read once
// for all samples of a tile, and results have the same bits in any order of the blocks. B is stored: lc.cpp forms it.
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
#include "lc_tables.cuh"
#include "ptx.cuh"

namespace bioplaus {
namespace {

constexpr int kStageBytes = 128;
constexpr int kFewSamples = 8;

// Blocks on a processor at once, which registers and shared memory have to allow.
template <typename T, int kColumns>
constexpr int kBlocks = sizeof(T) == 8   ? 2
                        : kColumns == 64 ? 3
                                         : 4;

// What sums are made in: float, or double.
template <typename T>
using acc_of = decltype(to_float(T()));

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
  __device__ static void find(int i, int& line, int& k) {
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
        S::template find<S::kWide>(first + threadIdx.x, l, k);
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
      S::template find<1>(i + j * kThreads, l, k);
      x[j] = (line[l] | depth[k]) >= 0 ? data[line[l] + depth[k]] : T(0.0f);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      S::template find<1>(i + j * kThreads, l, k);
      to.x[S::at(l, k)] = x[j];
    }
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
    for (int i = 0; i < kLines; ++i) {
      if (!S::kAcross || i % kWide == 0) {
#pragma unroll
        for (int q = 0; q < (S::kAcross ? kWide : 1); ++q) {
          const auto pack = *reinterpret_cast<const Pack<T, kWide>*>(s.x + S::at(line(i), k + q));
#pragma unroll
          for (int w = 0; w < kWide; ++w) {
            (S::kAcross ? x[(i + w) % kLines][q] : x[i][w]) = pack.x[w];
          }
        }
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
template <typename T, typename A, typename B>
struct TensorSums {
  static constexpr int kParts = B::kLines / 8;
  float total[kParts][4] = {};

  // 16 rows by 16 entries.
  __device__ static void load_rows(const A& a, int row, int k, uint32_t (&x)[4]) {
    const int lane = threadIdx.x % 32, low = lane % 16, high = lane / 16 * 8;
    if (A::kAcross) {
      ldmatrix_x4_trans(x, a.x + A::at(row + lane / 8 % 2 * 8, k + high + lane % 8));
    } else {
      ldmatrix_x4(x, a.x + A::at(row + low, k + high));
    }
  }

  // 8 columns by 32 entries.
  __device__ static void load_columns(const B& b, int column, int k, uint32_t (&y)[4]) {
    const int lane = threadIdx.x % 32;
    if (B::kAcross) {
      ldmatrix_x4_trans(y, b.x + B::at(column, k + lane));
    } else {
      ldmatrix_x4(y, b.x + B::at(column + lane % 8, k + lane / 8 * 8));
    }
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

template <typename T, Product product, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kColumns>)
    lc_kernel(const __grid_constant__ LcParams p, bool a_wide, bool b_wide) {
  using R = Roles<product>;
  using A = Stage<T, kRows, !R::kForward>;
  using B = Stage<T, kColumns, R::kBackwardWeight>;
  using Depths = DepthTables<A::kDepth>;
  __shared__ A a[2];
  __shared__ B b[2];
  __shared__ LineTables<kColumns> lines;
  __shared__ Depths depths[2];
  __shared__ Place place;
  const LcGeometry& g = p.g;
  const Tiles tiles = tiles_of<R, kColumns>(g);

  // Tiles of the same weights are neighbours.
  for (int64_t index = blockIdx.x; index < tiles.all; index += gridDim.x) {
    Tile tile;
    tile.column = index % tiles.columns * kColumns;
    tile.row = index / tiles.columns % tiles.rows * kRows;
    tile.group = index / tiles.columns / tiles.rows % g.groups;
    tile.place = index / tiles.columns / tiles.rows / g.groups;
    if (threadIdx.x < kLcDims) {
      find(g, R::kBackwardInput, tile.place, threadIdx.x, place);
    }
    __syncthreads();
    const int64_t depth = R::kBackwardInput ? product3(place.count) * g.o : count<R::kSum>(g);
    fill<R>(p, tile, place, lines);
    std::conditional_t<sizeof(T) == 2, TensorSums<T, A, B>, Sums<T, A, B>> sums;
    int now = 1;
    for (int64_t first = -A::kDepth; first < depth; first += A::kDepth, now = 1 - now) {
      const int64_t next = first + A::kDepth;
      Depths& t = depths[1 - now];
      if (next < depth) {
        fill<R>(p, tile, place, next, depth, t);
      }
      // All have the tables, and have multiplied the stage that the next one takes the place of.
      __syncthreads();
      if (next < depth) {
        load(static_cast<const T*>(p.data[R::kA]), a_wide, lines.a, t.a, a[1 - now]);
        load(static_cast<const T*>(p.data[R::kB]), b_wide, lines.b, t.b, b[1 - now]);
      }
      cp_async_commit();
      if (first >= 0) {
        cp_async_wait<1>();
        __syncthreads();
        sums.add(a[now], b[now], depth - first);
      }
    }
    sums.each([&](int row, int column, acc_of<T> sum) {
      const int64_t i = tile.row + row, j = tile.column + column;
      if (i < count<R::kRow>(g) && j < count<R::kColumn>(g)) {
        if (R::kForward && p.bias) {
          const int64_t channel = tile.group * g.o + i;
          const int64_t position = p.bias_per_position ? tile.place * g.groups * g.o : 0;
          sum += to_float(static_cast<const T*>(p.bias)[position + channel]);
        }
        const int64_t at = lines.result[row] + j * (R::kForward ? p.out.sample : R::kBackwardInput ? p.in.sample : 1);
        round_to(sum, static_cast<T*>(p.data[R::kResult])[at]);
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
  const int64_t all = tiles_of<R, kColumns>(p.g).all;
  const unsigned blocks = static_cast<unsigned>(all < kMaxBlocks ? all : kMaxBlocks);
  const bool a_wide = wide<T, R>(p, R::kA), b_wide = wide<T, R>(p, R::kB);
  BK_LAUNCH((lc_kernel<T, product, kColumns>), blocks, kThreads, 0, stream, p, a_wide, b_wide);
  return cudaGetLastError();
}

// A weight gradient sums over samples: there is one tile for any number of them.
template <typename T, Product product>
cudaError_t launch(const LcParams& p, cudaStream_t stream) {
  constexpr int kFew = product == Product::BackwardWeight ? 64 : kFewSamples;
  return p.g.n <= kFew ? launch<T, product, kFew>(p, stream) : launch<T, product, 64>(p, stream);
}

template <typename T>
cudaError_t launch(Product product, const LcParams& p, cudaStream_t stream) {
  return product == Product::Forward         ? launch<T, Product::Forward>(p, stream)
         : product == Product::BackwardInput ? launch<T, Product::BackwardInput>(p, stream)
                                             : launch<T, Product::BackwardWeight>(p, stream);
}

}  // namespace

cudaError_t launch_lc(Product product, const LcParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::Float64:
      return launch<double>(product, p, stream);
    case DType::BFloat16:
      return launch<__nv_bfloat16>(product, p, stream);
    case DType::Float16:
      return launch<__half>(product, p, stream);
    default:
      return launch<float>(product, p, stream);
  }
}

}  // namespace bioplaus
