// Locally-connected ops on CUDA: three products, every block of threads one tile of one of them.
//
//                      for each            rows  columns  summed over
//     forward          position, group     o     sample   taps · c                  Y = W_p X_p
//     input gradient   input pixel, group  c     sample   (position, tap) · o       the positions that read the pixel
//     weight gradient  position, group     o     taps · c sample                    dW_p = dY_p X_pᵀ
//
// The patch that a position sees is gathered while a tile is loaded: the address of an operand's entry is that of its
// row plus that of its index in the sum, each from a small table in shared memory (lc_tables.cuh), so that strides,
// dilation, groups, padding and memory format are met once a row and once an index. The input gradient asks which
// positions read a pixel: in each dim they and their taps are arithmetic progressions; so every output has one writer,
// every entry of B is read or formed once for all samples of a tile, and results have the same bits in any order of the
// blocks.
//
// Where channels are whole 16-byte pieces, activations come channels-last and cp.async brings the next stage of both
// operands while this one is multiplied; an operand lies in shared memory as it does in device memory, and ldmatrix
// transposes. Other channels go entry by entry. s · sign(W) is W, turned into entries by the thread that copied it.
//
// Half types multiply on tensor cores (mma.m16n8k16); all sums go to a second register after each stage of 128 bytes
// along the sum (64 entries of a half type), as tensor cores truncate. fp32 and fp64 multiply by FFMA and DFMA.
//
// Roofline, on paper and not yet on hardware: max(bytes of the weights once for every 64 samples, and of the
// activations; 2 · samples flops a weight). With up to 8 samples a tile has 8 of them, and the weights are all that
// counts. By Little's law 12 KB under way on a processor of sm_80 (2 TB/s, 600 ns, 108 of them), 18 KB of sm_90 and 43
// KB of sm_100 keep its memory busy: a block has 9 to 16 KB under way, three or four run together.
#include "entries.cuh"
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

template <typename T>
struct Sum {
  using type = float;
};
template <>
struct Sum<double> {
  using type = double;
};

// A stage of one operand: lines of the tile by kDepth entries along the sum. Lines are adjacent (kAcross), or entries.
template <typename T, int kLines_, bool kAcross_>
struct Stage {
  using Entry = T;
  static constexpr int kLines = kLines_, kDepth = kStageBytes / sizeof(T), kWide = 16 / sizeof(T);
  static constexpr bool kAcross = kAcross_;
  // Rows 16 bytes further apart: ldmatrix and 16-byte loads of 8 rows meet all banks.
  static constexpr int kPitch = (kAcross ? kLines : kDepth) + kWide;
  alignas(16) T x[(kAcross ? kDepth : kLines) * kPitch];

  __device__ static int at(int line, int k) { return kAcross ? k * kPitch + line : line * kPitch + k; }

  // Calls f(line, k) for piece after piece of kWide neighbours, of the calling thread.
  template <typename F>
  __device__ static void pieces(const F& f) {
    constexpr int kInner = (kAcross ? kLines : kDepth) / kWide;
#pragma unroll
    for (int i = threadIdx.x; i < kLines * kDepth / kWide; i += kThreads) {
      const int inner = i % kInner * kWide, outer = i / kInner;
      f(kAcross ? inner : outer, kAcross ? outer : inner);
    }
  }
};

// s · sign(x)
template <typename T>
__device__ T signed_scale(const FeedbackParams& p, T x) {
  using acc_t = typename Sum<T>::type;
  T y;
  round_to(static_cast<acc_t>(p.scale) * sign_of<acc_t>(to_float(x)), y);
  return y;
}

// Starts to fill a stage 16 bytes at a time.
template <typename T, typename S>
__device__ void copy(const T* data, const int64_t* line, const int64_t* depth, S& to) {
  S::pieces([&](int l, int k) {
    const bool inside = (line[l] | depth[k]) >= 0;
    cp_async_16(to.x + S::at(l, k), data + (inside ? line[l] + depth[k] : 0), inside);
  });
}

// Fills a stage, eight loads of a thread under way.
template <typename T, typename S>
__device__ void gather(const T* data, const int64_t* line, const int64_t* depth, const FeedbackParams* signs, S& to) {
  constexpr int kEach = S::kLines * S::kDepth / kThreads, kAtOnce = kEach < 8 ? kEach : 8;
  const auto at = [](int j, int& l, int& k) {
    const int i = threadIdx.x + j * kThreads;
    l = S::kAcross ? i % S::kLines : i / S::kDepth;
    k = S::kAcross ? i / S::kLines : i % S::kDepth;
  };
#pragma unroll 1
  for (int first = 0; first < kEach; first += kAtOnce) {
    T x[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      int l, k;
      at(first + j, l, k);
      x[j] = (line[l] | depth[k]) >= 0 ? data[line[l] + depth[k]] : T(0.0f);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      int l, k;
      at(first + j, l, k);
      to.x[S::at(l, k)] = signs ? signed_scale(*signs, x[j]) : x[j];
    }
  }
}

// A stage of B, formed: N neighbours along the lines, which are channels of one tap.
template <int N, int kColumns, typename S>
__device__ void form(const FeedbackParams& p, const RowTables<kColumns>& rows, const DepthTables<S::kDepth>& t, S& to) {
  using acc_t = typename Sum<typename S::Entry>::type;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows / N * S::kDepth; i += kThreads) {
    const int l = i % (kRows / N) * N, k = i / (kRows / N);
    Chunk<acc_t, N, false> c{0, 0, N, {}};
    if ((rows.a[l] | t.a[k]) >= 0) {
      c.row = t.feedback_row[k];
      c.first = t.a[k] + rows.a[l];
      form_entries(p, c);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      round_to(c.b[j], to.x[S::at(l, k) + j]);
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

template <typename T, typename A, typename B>
struct SumsOf {
  using type = TensorSums<T, A, B>;
};
template <typename A, typename B>
struct SumsOf<float, A, B> {
  using type = Sums<float, A, B>;
};
template <typename A, typename B>
struct SumsOf<double, A, B> {
  using type = Sums<double, A, B>;
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

// Whether 16-byte pieces of a channel's neighbours can be read.
template <typename T>
__device__ bool wide(const LcActivation& x, int64_t channels) {
  constexpr int kWide = 16 / sizeof(T);
  const int64_t apart = x.stride_n | x.stride[0] | x.stride[1] | x.stride[2] | channels;
  return x.stride_c == 1 && apart % kWide == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

template <typename T, Product product, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kColumns>)
    lc_kernel(const __grid_constant__ LcParams p, int64_t places) {
  using A = Stage<T, kRows, product != Product::Forward>;
  using B = Stage<T, kColumns, product == Product::BackwardWeight>;
  constexpr int kDepth = A::kDepth;
  using Depths = DepthTables<kDepth>;
  __shared__ A a[2];
  __shared__ B b[2];
  __shared__ RowTables<kColumns> rows;
  __shared__ Depths depths[2];
  __shared__ Readers r;
  const LcGeometry& g = p.g;
  const bool backward_input = product == Product::BackwardInput;
  const int64_t most_rows = backward_input ? g.c : g.o;
  const int64_t most_columns = product == Product::BackwardWeight ? lc_columns(g) : g.n;
  const int64_t row_tiles = (most_rows + kRows - 1) / kRows, column_tiles = (most_columns + kColumns - 1) / kColumns;
  const T* a_data = static_cast<const T*>(product == Product::BackwardWeight ? p.out.data : p.weight);
  const T* b_data = static_cast<const T*>(backward_input ? p.out.data : p.in.data);
  const FeedbackParams* signs = backward_input && p.signs_of_weight ? &p.feedback : nullptr;
  const bool b_wide = backward_input ? wide<T>(p.out, g.o) : wide<T>(p.in, g.c);
  const bool a_wide = product == Product::BackwardWeight ? wide<T>(p.out, g.o)
                                                         : reinterpret_cast<uintptr_t>(p.weight) % 16 == 0 &&
                                                               (backward_input ? g.c : lc_columns(g)) % A::kWide == 0;
  const bool whole_calls = g.c % kNumbersPerCall == 0 && p.feedback.cols % kNumbersPerCall == 0;

  const auto load = [&](const Depths& t, A& to_a, B& to_b) {
    if (backward_input && !a_data) {
      if (whole_calls) {
        form<kNumbersPerCall>(p.feedback, rows, t, to_a);
      } else {
        form<1>(p.feedback, rows, t, to_a);
      }
    } else if (a_wide) {
      copy(a_data, rows.a, t.a, to_a);
    } else {
      gather(a_data, rows.a, t.a, signs, to_a);
    }
    if (b_wide) {
      copy(b_data, rows.b, t.b, to_b);
    } else {
      gather(b_data, rows.b, t.b, nullptr, to_b);
    }
  };

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
    fill<product>(p, tile, e, rows);
    typename SumsOf<T, A, B>::type sums;
    int now = 1;
    for (int64_t first = -kDepth; first < e.depth; first += kDepth, now = 1 - now) {
      const int64_t next = first + kDepth;
      if (next < e.depth) {
        fill<product>(p, tile, r, e, next, depths[1 - now]);
      }
      // All have the tables, and have multiplied the stage that the next one takes the place of.
      __syncthreads();
      if (next < e.depth) {
        load(depths[1 - now], a[1 - now], b[1 - now]);
      }
      cp_async_commit();
      if (first < 0) {
        continue;
      }
      cp_async_wait<1>();
      if (a_wide && signs) {
        A::pieces([&](int l, int k) {
          auto& piece = *reinterpret_cast<Pack<T, A::kWide>*>(a[now].x + A::at(l, k));
          for (T& x : piece.x) {
            x = signed_scale(*signs, x);
          }
        });
      }
      __syncthreads();
      sums.add(a[now], b[now], e.depth - first);
    }
    sums.each([&](int row, int column, auto sum) {
      if (tile.row + row < e.rows && tile.column + column < e.columns) {
        store<T, product>(p, tile, rows.result, row, tile.column + column, sum);
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
