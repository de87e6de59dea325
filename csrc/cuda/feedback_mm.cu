// feedback_mm on CUDA for entries that are no constants: dX = dY · B, B formed a tile at a time in shared memory, by
// the thread that then stores it there: stored magnitudes, uniform or normal draws, with or without signs.
//
// Half types: mma with float sums, which tensor cores truncate, so that they go to a second sum every 64 entries along
// K. float: products by FMA, in the same two steps. Both keep dX within the error of torch's own product.
//
// Roofline, on paper and not yet on hardware. Operations: 2·M·N·K, on half types' tensor cores or on FMA units (312
// and 19.5 TFlop/s on sm_80). Bytes: what B is made of (W, M, packed signs, or nothing), once for 128 rows of dY, from
// L2 beyond the first; dY N/64 (half) or N/32 (float) times, from L2. At M ≤ 128 reading W or M is most of it. Forming
// an entry takes some 5 instructions from memory, 25 drawn uniform, 60 normal. For a row of a tile along K that is 2.5,
// 12 or 30 cycles of a multiprocessor in half types, beside 8 of mma; in float 1, 6 or 15 beside 64 of FMA.
//
// So in half types feedback_weight and torch's product are ahead from M of some 128 on where entries are drawn, and of
// some 500 where they are read, at the price of a second matrix of W's size. In float they are ahead by what the
// vendor's kernel is better at FMA, once M pays for forming B. Here no such matrix is ever made.
#include "element.h"
#include "entries.cuh"
#include "feedback_mm.h"
#include "launch_kernel.h"
#include "ptx.cuh"

namespace bioplaus {
namespace {

// Entries along K between two additions to the second sum.
constexpr int kPromote = 64;

// A piece of 8 entries of B, 0 where there are none.
__device__ __forceinline__ Chunk<float> entries(const FeedbackParams& b, int64_t k, int64_t col) {
  Chunk<float> c{};
  c.row = k;
  c.first = col;
  if (k < b.rows && col < b.cols) {
    c.n = static_cast<int>(b.cols - col < kColumns ? b.cols - col : kColumns);
    form_entries(b, c);
#pragma unroll
    for (int t = 0; t < kColumns; ++t) {
      c.b[t] = t < c.n ? c.b[t] : 0.0f;
    }
  }
  return c;
}

// N neighbours along K of dY, zeros beyond its end; whole where they can be moved so.
template <int N, typename T>
__device__ __forceinline__ void load_grad(const TileProduct& p, int64_t row, int64_t k, T (&to)[N]) {
  const T* from = static_cast<const T*>(p.grad) + row * p.row_stride + k * p.column_stride;
  const bool inside = row < p.rows && k + N <= p.b.rows;
  if (inside && p.column_stride == 1 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    *reinterpret_cast<Pack<T, N>*>(to) = *reinterpret_cast<const Pack<T, N>*>(from);
    return;
  }
#pragma unroll
  for (int t = 0; t < N; ++t) {
    to[t] = row < p.rows && k + t < p.b.rows ? from[t * p.column_stride] : T(0.0f);
  }
}

template <typename T>
__device__ __forceinline__ void store(const TileProduct& p, int64_t row, int64_t col, int64_t split, float x) {
  if (row >= p.rows || col >= p.b.cols) {
    return;
  }
  if (p.splits > 1) {
    p.partial[(split * p.rows + row) * p.b.cols + col] = x;
  } else {
    round_to(x, static_cast<T*>(p.out)[row * p.b.cols + col]);
  }
}

// --- half types ---

// 4 warps of 64 × 32.
struct HalfTile {
  static constexpr int kThreads = 128;
  static constexpr int kRows = 128;
  static constexpr int kCols = 64;
  static constexpr int kDepth = 32;
  static constexpr int kStages = 3;
  static constexpr int kGradBytes = kRows * kDepth * 2;
  static constexpr int kEntryBytes = kDepth * kCols * 2;
  static constexpr int kSharedBytes = kStages * kGradBytes + 2 * kEntryBytes;
};

// Chunks of 16 bytes, so placed that the 8 rows an ldmatrix reads lie in different banks: rows of 64 and of 128 bytes.
__device__ __forceinline__ int grad_place(int row, int chunk) { return row * 64 + (chunk ^ (row >> 1 & 3)) * 16; }
__device__ __forceinline__ int entry_place(int row, int chunk) { return row * 128 + (chunk ^ (row & 7)) * 16; }

template <typename T>
__device__ __forceinline__ void fill_grad(const TileProduct& p, int64_t first, int64_t k, char* to) {
#pragma unroll
  for (int i = threadIdx.x; i < HalfTile::kGradBytes / 16; i += HalfTile::kThreads) {
    const int row = i / 4;
    const int64_t at = k + i % 4 * 8;
    char* place = to + grad_place(row, i % 4);
    const T* from = static_cast<const T*>(p.grad) + (first + row) * p.row_stride + at;
    const bool none = first + row >= p.rows || at >= p.b.rows;
    if (p.whole && (none || at + 8 <= p.b.rows)) {
      cp_async_16(place, none ? p.grad : from, !none);
    } else {
      alignas(16) T x[8];
      load_grad(p, first + row, at, x);
      *reinterpret_cast<uint4*>(place) = *reinterpret_cast<const uint4*>(x);
    }
  }
}

template <typename T>
__device__ __forceinline__ void fill_entries(const TileProduct& p, int64_t k, int64_t first, char* to) {
  for (int i = threadIdx.x; i < HalfTile::kEntryBytes / 16; i += HalfTile::kThreads) {
    const Chunk<float> c = entries(p.b, k + i / 8, first + i % 8 * 8);
    alignas(16) T x[8];
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      round_to(c.b[t], x[t]);
    }
    *reinterpret_cast<uint4*>(to + entry_place(i / 8, i % 8)) = *reinterpret_cast<const uint4*>(x);
  }
}

// 2 blocks a multiprocessor: both sums take 128 registers, and one block forms entries while the other multiplies.
template <typename T>
__global__ void __launch_bounds__(HalfTile::kThreads, 2) half_kernel(const __grid_constant__ TileProduct p) {
  using Tile = HalfTile;
  BK_DYNAMIC_SHARED(char, shared);
  char* const formed = shared + Tile::kStages * Tile::kGradBytes;
  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 64 * 64;
  const int warp_col = threadIdx.x / 32 % 2 * 32;
  const int64_t column_tiles = divide_up(p.b.cols, Tile::kCols);
  const int64_t row = blockIdx.x / column_tiles * Tile::kRows;
  const int64_t col = blockIdx.x % column_tiles * Tile::kCols;
  const int64_t tiles = divide_up(p.b.rows, Tile::kDepth);
  const int64_t begin = tiles * blockIdx.y / p.splits;
  const int64_t end = tiles * (blockIdx.y + 1) / p.splits;

  float sums[4][4][4] = {};
  float total[4][4][4] = {};
  for (int s = 0; s < Tile::kStages - 1; ++s) {
    if (begin + s < end) {
      fill_grad<T>(p, row, (begin + s) * Tile::kDepth, shared + s * Tile::kGradBytes);
    }
    cp_async_commit();
  }
  fill_entries<T>(p, begin * Tile::kDepth, col, formed);
  int stage = 0;
  for (int64_t t = begin; t < end; ++t) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();
    const int64_t ahead = t + Tile::kStages - 1;
    if (ahead < end) {
      fill_grad<T>(p, row, ahead * Tile::kDepth,
                   shared + (stage + Tile::kStages - 1) % Tile::kStages * Tile::kGradBytes);
    }
    cp_async_commit();
    if (t + 1 < end) {
      fill_entries<T>(p, (t + 1) * Tile::kDepth, col, formed + (t + 1 - begin) % 2 * Tile::kEntryBytes);
    }
    const char* grad = shared + stage * Tile::kGradBytes;
    const char* entry = formed + (t - begin) % 2 * Tile::kEntryBytes;
#pragma unroll
    for (int k = 0; k < Tile::kDepth; k += 16) {
      uint32_t b[4][2];
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        uint32_t r[4];
        ldmatrix_x4_trans(r, entry + entry_place(k + lane % 16, warp_col / 8 + j + lane / 16));
        b[j][0] = r[0];
        b[j][1] = r[1];
        b[j + 1][0] = r[2];
        b[j + 1][1] = r[3];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t a[4];
        ldmatrix_x4(a, grad + grad_place(warp_row + 16 * i + lane % 16, k / 8 + lane / 16));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          mma_m16n8k16(sums[i][j], a, b[j], T());
        }
      }
    }
    if ((t + 1 - begin) % (kPromote / Tile::kDepth) == 0 || t + 1 == end) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        total[i / 16][i / 4 % 4][i % 4] += sums[i / 16][i / 4 % 4][i % 4];
        sums[i / 16][i / 4 % 4][i % 4] = 0.0f;
      }
    }
    stage = (stage + 1) % Tile::kStages;
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    store<T>(p, row + warp_row + i / 16 * 16 + i / 2 % 2 * 8 + lane / 4,
             col + warp_col + i / 4 % 4 * 8 + lane % 4 * 2 + i % 2, blockIdx.y, total[i / 16][i / 4 % 4][i % 4]);
  }
}

// --- float ---

// THREADS_M × THREADS_N threads of 8 × 4, DEPTH along K.
template <int THREADS_M, int THREADS_N, int DEPTH>
struct FloatTile {
  static constexpr int kThreads = THREADS_M * THREADS_N;
  static constexpr int kRows = 8 * THREADS_M;
  static constexpr int kCols = 4 * THREADS_N;
  static constexpr int kDepth = DEPTH;
  // Rows of dY lie side by side; 4 more floats spread what a warp stores over the banks.
  static constexpr int kGradRow = kRows + 4;
  static constexpr int kLoads = kRows * kDepth / 4;
  static constexpr int kBuffer = kDepth * (kGradRow + kCols);
  static constexpr int kSharedBytes = 2 * kBuffer * static_cast<int>(sizeof(float));
};

template <typename Tile>
__device__ __forceinline__ void fill_entries(const FeedbackParams& b, int64_t k, int64_t first, float* to) {
  constexpr int kChunks = Tile::kCols / kColumns;
  for (int i = threadIdx.x; i < Tile::kDepth * kChunks; i += Tile::kThreads) {
    const Chunk<float> c = entries(b, k + i / kChunks, first + i % kChunks * kColumns);
    float4* place = reinterpret_cast<float4*>(to + i / kChunks * Tile::kCols + i % kChunks * kColumns);
    place[0] = make_float4(c.b[0], c.b[1], c.b[2], c.b[3]);
    place[1] = make_float4(c.b[4], c.b[5], c.b[6], c.b[7]);
  }
}

// 2 blocks a multiprocessor: 64 registers hold both sums, 16 the next piece of dY, and forming entries takes most
// others.
template <int THREADS_M, int THREADS_N, int DEPTH>
__global__ void __launch_bounds__(THREADS_M* THREADS_N, 2) float_kernel(const __grid_constant__ TileProduct p) {
  using Tile = FloatTile<THREADS_M, THREADS_N, DEPTH>;
  constexpr int kPieces = (Tile::kLoads + Tile::kThreads - 1) / Tile::kThreads;
  BK_DYNAMIC_SHARED(float, shared);
  const int m = threadIdx.x / THREADS_N * 8;
  const int n = threadIdx.x % THREADS_N * 4;
  const int64_t column_tiles = divide_up(p.b.cols, Tile::kCols);
  const int64_t row = blockIdx.x / column_tiles * Tile::kRows;
  const int64_t col = blockIdx.x % column_tiles * Tile::kCols;
  const int64_t tiles = divide_up(p.b.rows, Tile::kDepth);
  const int64_t begin = tiles * blockIdx.y / p.splits;
  const int64_t end = tiles * (blockIdx.y + 1) / p.splits;

  constexpr int kFours = Tile::kDepth / 4;
  alignas(16) float next[kPieces][4];
  const auto load = [&](int64_t t) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int piece = threadIdx.x + i * Tile::kThreads;
      if (piece < Tile::kLoads) {
        load_grad(p, row + piece / kFours, t * Tile::kDepth + piece % kFours * 4, next[i]);
      }
    }
  };
  const auto put = [&](float* to) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int piece = threadIdx.x + i * Tile::kThreads;
#pragma unroll
      for (int t = 0; t < 4 && piece < Tile::kLoads; ++t) {
        to[(piece % kFours * 4 + t) * Tile::kGradRow + piece / kFours] = next[i][t];
      }
    }
  };
  constexpr int kEntries = Tile::kDepth * Tile::kGradRow;

  float sums[8][4] = {};
  float total[8][4] = {};
  load(begin);
  put(shared);
  fill_entries<Tile>(p.b, begin * Tile::kDepth, col, shared + kEntries);
  for (int64_t t = begin; t < end; ++t) {
    __syncthreads();
    float* after = shared + (t + 1 - begin) % 2 * Tile::kBuffer;
    if (t + 1 < end) {
      fill_entries<Tile>(p.b, (t + 1) * Tile::kDepth, col, after + kEntries);
      load(t + 1);
    }
    const float* grad = shared + (t - begin) % 2 * Tile::kBuffer;
    const float* entry = grad + kEntries;
#pragma unroll 4
    for (int k = 0; k < Tile::kDepth; ++k) {
      const float4 a0 = *reinterpret_cast<const float4*>(grad + k * Tile::kGradRow + m);
      const float4 a1 = *reinterpret_cast<const float4*>(grad + k * Tile::kGradRow + m + 4);
      const float4 b0 = *reinterpret_cast<const float4*>(entry + k * Tile::kCols + n);
      const float a[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
      const float b[4] = {b0.x, b0.y, b0.z, b0.w};
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        sums[i / 4][i % 4] = fmaf(a[i / 4], b[i % 4], sums[i / 4][i % 4]);
      }
    }
    if (t + 1 < end) {
      put(after);
    }
    if ((t + 1 - begin) % (kPromote / Tile::kDepth) == 0 || t + 1 == end) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        total[i / 4][i % 4] += sums[i / 4][i % 4];
        sums[i / 4][i % 4] = 0.0f;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    store<float>(p, row + m + i / 4, col + n + i % 4, blockIdx.y, total[i / 4][i % 4]);
  }
}

// --- parts of K ---

constexpr int kReduceThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kReduceThreads) add_parts_kernel(const __grid_constant__ TileProduct p) {
  const int64_t count = p.rows * p.b.cols;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kReduceThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x; i < count; i += step) {
    float sum = 0;
    for (int64_t s = 0; s < p.splits; ++s) {
      sum += p.partial[s * count + i];
    }
    round_to(sum, static_cast<T*>(p.out)[i]);
  }
}

// --- launch ---

using Low = FloatTile<2, 64, 16>;
using High = FloatTile<16, 8, 16>;

template <typename Tile>
int64_t tiles_of(int64_t rows, int64_t cols) {
  return divide_up(rows, Tile::kRows) * divide_up(cols, Tile::kCols);
}

template <typename Tile>
dim3 grid_of(const TileProduct& p) {
  return dim3(static_cast<unsigned>(tiles_of<Tile>(p.rows, p.b.cols)), static_cast<unsigned>(p.splits));
}

template <typename T>
void add_parts(const TileProduct& p, cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = 1 << 16;
  const int64_t blocks = divide_up(p.rows * p.b.cols, kReduceThreads);
  BK_LAUNCH((add_parts_kernel<T>), dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks)),
            dim3(kReduceThreads), 0, stream, p);
}

template <typename T>
void half_product(const TileProduct& p, cudaStream_t stream) {
  BK_LAUNCH((half_kernel<T>), grid_of<HalfTile>(p), dim3(HalfTile::kThreads), HalfTile::kSharedBytes, stream, p);
  if (p.splits > 1) {
    add_parts<T>(p, stream);
  }
}

}  // namespace

int64_t tile_splits(int64_t rows, int64_t depth, int64_t cols, DType dtype) {
  const bool half = dtype != DType::Float32;
  const int64_t tiles = half                 ? tiles_of<HalfTile>(rows, cols)
                        : rows <= Low::kRows ? tiles_of<Low>(rows, cols)
                                             : tiles_of<High>(rows, cols);
  // About two blocks a multiprocessor, each of 256 along K at least.
  const int64_t wanted = 256 / tiles;
  const int64_t most = depth / 256;
  return most <= 1 || wanted <= 1 ? 1 : wanted < most ? wanted : most;
}

cudaError_t launch_tile_product(const TileProduct& p, cudaStream_t stream) {
  if (p.b.out.dtype == DType::BFloat16) {
    half_product<__nv_bfloat16>(p, stream);
  } else if (p.b.out.dtype == DType::Float16) {
    half_product<__half>(p, stream);
  } else {
    if (p.rows <= Low::kRows) {
      BK_LAUNCH((float_kernel<2, 64, 16>), grid_of<Low>(p), dim3(Low::kThreads), Low::kSharedBytes, stream, p);
    } else {
      BK_LAUNCH((float_kernel<16, 8, 16>), grid_of<High>(p), dim3(High::kThreads), High::kSharedBytes, stream, p);
    }
    if (p.splits > 1) {
      add_parts<float>(p, stream);
    }
  }
  return cudaGetLastError();
}

}  // namespace bioplaus
