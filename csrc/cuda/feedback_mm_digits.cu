// feedback_mm on CUDA for constant entries: dX = s · (dY · σ), exactly in integers, with the bits of the CPU's kernel.
// feedback_mm_quantise.cu has made digits of dY.
//
// multiply sums digits times σ in int32 on tensor cores; the digits' sums meet in one integer a result. That, the row's
// unit and s make the result, rounded once. reduce adds the integers of several parts of K first. No step before that
// rounding is inexact, so any tiling, split and order of threads gives the same bits.
//
// A lane's sums of an mma are all digits of its result, by the digits' layout. Rows of 16 bits have no lower block;
// where a tile has none but such rows, upper blocks follow one another and it is done in one pass, else in two. σ stays
// bits until it is a fragment: 4 rows of sign words, byte-transposed, give one register a shift. 5.5 instructions a
// lane are the price of 4 entries, and all that moves is 1/32 of fp32's operand.
//
// Roofline, on paper and not yet on hardware, D digits (4, or 2 for half types). Operations: 2·D·M·N·K int8; at sm_80's
// 624 Tops 4 digits are as fast as TF32 and 2 as fast as bf16. Bytes: D·M·K of digits, read N/128 times (from L2),
// signs N·K/8, or nothing if seeded, dX written. At M ≤ 8 the signs are most of it, and 256 entries (11 instructions
// and 2 mma a warp) are formed and multiplied at 1.5 TB/s of signs on 108 multiprocessors. A weight is packed first:
// its bytes are read once and N·K/4 written, 1/16 of fp32's.
//
// Against torch's product with B from feedback_weight, which moves N·K·(W's bytes + 2·dX's) and does 2·M·N·K at the
// dtype's rate, by backends/rule.py and for 4096² weights: in fp32 without TF32 this is ahead at any M. In half types 2
// digits are twice the operations on instructions of at most twice the rate, so fewer bytes win only while M is small:
// signs from W below M = 35 on sm_80, 33 on sm_90 and nowhere on sm_100, of whose rate mma.sync reaches a quarter;
// packed ones below 62, 65 and 17.
//
// One file: small, middle and large tiles, one pass or two, and the second pass over parts of K share the digits'
// layout and the rounding of results.
#include "element.h"
#include "feedback_mm.h"
#include "launch_kernel.h"
#include "ptx.cuh"

namespace bioplaus {
namespace {

constexpr int kStages = 4;
constexpr int kWarpColumns = 64;
constexpr uint32_t kAll = 0xFFFFFFFFu;

__device__ __forceinline__ bool is_nan(double x) { return x != x; }

// --- results ---

template <typename T>
__device__ __forceinline__ void store_as(const SignProduct& p, int64_t row, int64_t col, double x) {
  round_to(static_cast<float>(x), static_cast<T*>(p.out)[row * p.cols + col]);
}

template <typename T>
__device__ __forceinline__ void store_two_as(const SignProduct& p, int64_t row, int64_t col, const double (&x)[2]) {
  struct alignas(2 * sizeof(T)) Two {
    T x[2];
  } y;
  round_to(static_cast<float>(x[0]), y.x[0]);
  round_to(static_cast<float>(x[1]), y.x[1]);
  *reinterpret_cast<Two*>(static_cast<T*>(p.out) + row * p.cols + col) = y;
}

__device__ __forceinline__ void store(const SignProduct& p, int64_t row, int64_t col, double x) {
  switch (p.dtype) {
    case DType::BFloat16:
      return store_as<__nv_bfloat16>(p, row, col, x);
    case DType::Float16:
      return store_as<__half>(p, row, col, x);
    default:
      return store_as<float>(p, row, col, x);
  }
}

// Neighbours, the first in an even column.
__device__ __forceinline__ void store_two(const SignProduct& p, int64_t row, int64_t col, const double (&x)[2]) {
  if (p.cols % 2 != 0) {
    store(p, row, col, x[0]);
    if (col + 1 < p.cols) {
      store(p, row, col + 1, x[1]);
    }
    return;
  }
  switch (p.dtype) {
    case DType::BFloat16:
      return store_two_as<__nv_bfloat16>(p, row, col, x);
    case DType::Float16:
      return store_two_as<__half>(p, row, col, x);
    default:
      return store_two_as<float>(p, row, col, x);
  }
}

__device__ float entry(const SignProduct& p, int64_t row, int64_t k) {
  const int64_t at = row * p.row_stride + k * p.column_stride;
  switch (p.dtype) {
    case DType::BFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(p.grad)[at]);
    case DType::Float16:
      return to_float(static_cast<const __half*>(p.grad)[at]);
    default:
      return static_cast<const float*>(p.grad)[at];
  }
}

__device__ double sigma(const SignProduct& p, int64_t k, int64_t col) {
  SignWord word{0, kAll};
  if (p.key) {
    const Philox4 x = draw(read_key(p.key), k, col / kSignsPerCall);
    const int q = static_cast<int>(col / 32 % 4);
    word.negative = q < 2 ? (q == 0 ? x.w[0] : x.w[1]) : (q == 2 ? x.w[2] : x.w[3]);
  } else {
    word = read_signs(p.signs, p.depth, sign_words(p.cols), k, col / 32);
  }
  return word.nonzero >> col % 32 & 1u ? 1.0 - 2.0 * (word.negative >> col % 32 & 1u) : 0.0;
}

// A row that holds infinities or NaNs: they alone decide. Each product with ±1 or 0 is what IEEE makes of it. A warp,
// one column a lane.
__device__ void nonfinite_row(const SignProduct& p, int64_t row, int64_t col) {
  const int lane = threadIdx.x % 32;
  double sum = 0;
  for (int64_t k = 0; k < p.depth; k += 32) {
    const float x = k + lane < p.depth ? entry(p, row, k + lane) : 0.0f;
    uint32_t left = __ballot_sync(kAll, (__float_as_uint(x) & 0x7F800000u) == 0x7F800000u);
    while (left) {
      const int from = __ffs(left) - 1;
      left &= left - 1;
      const double value = static_cast<double>(__shfl_sync(kAll, x, from));
      sum += col < p.cols ? value * sigma(p, k + from, col) : value;
    }
    if (__all_sync(kAll, is_nan(sum))) {
      break;
    }
  }
  if (col < p.cols) {
    store(p, row, col, sum * p.scale);
  }
}

// --- product ---

// A block of WARPS_M × WARPS_N warps, each BLOCKS blocks of digits × 64 columns.
template <int BLOCKS, int WARPS_M, int WARPS_N>
struct Tile {
  static constexpr int kThreads = 32 * WARPS_M * WARPS_N;
  static constexpr int kBlocks = BLOCKS * WARPS_M;
  static constexpr int kColumns = kWarpColumns * WARPS_N;
  static constexpr int kPanels = kColumns / kSignsPerCall;
  static constexpr int kDigitBytes = kBlocks * 16 * kDepth;
  static constexpr int kSignBytes = kDepth * kColumns / 8;
  static constexpr int kStageBytes = kDigitBytes + 2 * kSignBytes;
  static constexpr int kSharedBytes = kStages * (kStageBytes + kPanels * static_cast<int>(sizeof(int32_t)));
  // Rows of dX by all four digits, and by the upper two alone.
  static constexpr int kWide = kBlocks * 4;
  static constexpr int kNarrow = kBlocks * 8;
  static_assert(kDepth * kPanels <= kThreads, "a thread fills at most one piece of signs");
};

// Chunks of 16 bytes, so placed that the 8 rows an ldmatrix reads lie in different banks.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * kDepth + (chunk ^ (row >> 1 & 3)) * 16; }

// Rows of signs, so placed that the rows 4q of a fragment lie in different banks.
__device__ __forceinline__ int sign_row(int k) { return (k & ~15) | (k & 3) << 2 | (k >> 2 & 3); }

// Byte j of four words → word j.
__device__ __forceinline__ void transpose(const uint32_t (&w)[4], uint32_t (&t)[4]) {
  const uint32_t a = __byte_perm(w[0], w[1], 0x5140);
  const uint32_t b = __byte_perm(w[2], w[3], 0x5140);
  const uint32_t c = __byte_perm(w[0], w[1], 0x7362);
  const uint32_t d = __byte_perm(w[2], w[3], 0x7362);
  t[0] = __byte_perm(a, b, 0x5410);
  t[1] = __byte_perm(a, b, 0x7632);
  t[2] = __byte_perm(c, d, 0x5410);
  t[3] = __byte_perm(c, d, 0x7632);
}

// The bits of entries 4q … 4q + 3 and 16 further on, of the warp's columns 8j + g at j.
__device__ __forceinline__ void sign_bits(const char* words, int row_bytes, int lane, uint32_t (&bits)[8][2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t w[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint2 two = *reinterpret_cast<const uint2*>(words + (16 * half + 4 * i + lane % 4) * row_bytes);
      w[0][i] = two.x;
      w[1][i] = two.y;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      uint32_t t[4];
      transpose(w[j / 4], t);
      bits[j][half] = t[j % 4] >> lane / 4 & 0x01010101u;
    }
  }
}

// A block's tile: rows from `first` on, `step` blocks of digits apart.
template <typename TILE>
class Fill {
 public:
  __device__ Fill(const SignProduct& p, int64_t first, int step, int64_t panel, int64_t tile, char* shared)
      : p_(p), shared_(shared), length_(padded(p.depth)), step_(step), tile_(tile) {
    const int row = threadIdx.x / kChunks;
    chunk_ = threadIdx.x % kChunks;
    digits_ = p.digits + (first / 8 * 32 + row / 16 * 16 * step + row % 16) * length_ + 16 * chunk_;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t block = (row + i * kRowsAtOnce) / 16 * step;
      const int64_t of = first + block / 2 * 8 + row % 8;
      if (of < p.rows && (block % 2 == 0 || p.row[of].bytes == 4)) {
        valid_ |= 1u << i;
      }
    }
    if (threadIdx.x < kDepth * TILE::kPanels) {
      k_ = threadIdx.x / TILE::kPanels;
      panel_ = panel + threadIdx.x % TILE::kPanels;
      if (p.key) {
        key_ = read_key(p.key);
      }
      zeros_ = flag();
    }
  }

  // The next tile along K, into a stage.
  __device__ void operator()(int stage) {
    char* to = shared_ + stage * TILE::kStageBytes;
    const int row = threadIdx.x / kChunks;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool valid = valid_ >> i & 1u;
      const int8_t* from = digits_ + i * (kRowsAtOnce * step_) * length_ + tile_ * kDepth;
      cp_async_16(to + swizzled(row + i * kRowsAtOnce, chunk_), valid ? from : p_.digits, valid);
    }
    if (threadIdx.x < kDepth * TILE::kPanels) {
      signs(to + TILE::kDigitBytes, stage);
    }
    ++tile_;
    zeros_ = flag();
  }

 private:
  static constexpr int kChunks = kDepth / 16;
  static constexpr int kRowsAtOnce = TILE::kThreads / kChunks;
  static constexpr int kCopies = TILE::kBlocks * 16 / kRowsAtOnce;
  static_assert(kRowsAtOnce % 16 == 0 && TILE::kBlocks * 16 % kRowsAtOnce == 0, "");

  __device__ void signs(char* to, int stage) {
    const int piece = threadIdx.x % TILE::kPanels;
    to += sign_row(k_) * (TILE::kColumns / 8) + piece * 16;
    const int64_t k = tile_ * kDepth + k_;
    if (p_.key) {
      const Philox4 x = draw(key_, k, panel_);
      *reinterpret_cast<uint4*>(to) = make_uint4(x.w[0], x.w[1], x.w[2], x.w[3]);
    } else {
      const int64_t width = sign_words(p_.cols);
      const bool valid = k < p_.depth && 4 * panel_ < width;
      const int32_t* from = valid ? p_.signs + k * width + 4 * panel_ : p_.signs;
      cp_async_16(to, from, valid);
      if (zeros_) {
        cp_async_16(to + TILE::kSignBytes, valid ? from + p_.depth * width : from, valid);
      }
    }
    if (k_ == 0) {
      int32_t* zeros = reinterpret_cast<int32_t*>(shared_ + kStages * TILE::kStageBytes);
      zeros[stage * TILE::kPanels + piece] = zeros_;
    }
  }

  // Read a tile ahead of the copies that need it.
  __device__ bool flag() const {
    const int64_t width = sign_words(p_.cols);
    if (p_.key || threadIdx.x >= kDepth * TILE::kPanels || 4 * panel_ >= width || tile_ * kDepth >= p_.depth) {
      return false;
    }
    const int4 x = *reinterpret_cast<const int4*>(p_.signs + (2 * p_.depth + tile_) * width + 4 * panel_);
    return (x.x | x.y | x.z | x.w) != 0;
  }

  const SignProduct& p_;
  char* shared_;
  const int8_t* digits_;
  int64_t length_;
  int step_, chunk_;
  uint32_t valid_ = 0;
  int64_t tile_;
  int k_ = 0;
  int64_t panel_ = 0;
  Key key_{};
  bool zeros_ = false;
};

// sums += a stage's digits · σ.
template <typename TILE, int BLOCKS>
__device__ __forceinline__ void multiply_stage(const char* shared, int stage, int warp_m, int warp_n,
                                               int32_t (&sums)[BLOCKS][8][4]) {
  constexpr int kRowBytes = TILE::kColumns / 8;
  const int lane = threadIdx.x % 32;
  const char* digits = shared + stage * TILE::kStageBytes;
  const char* words = digits + TILE::kDigitBytes + warp_n * (kWarpColumns / 8);
  const int32_t* zeros = reinterpret_cast<const int32_t*>(shared + kStages * TILE::kStageBytes);
  const bool some_zero = zeros[stage * TILE::kPanels + warp_n * kWarpColumns / kSignsPerCall];
  // One step's fragments at a time: sm_100 spills half as many registers.
#pragma unroll 1
  for (int k = 0; k < kDepth; k += 32) {
    uint32_t b[8][2];
    sign_bits(words + k * kRowBytes, kRowBytes, lane, b);
    // Bytes 1 → −1, 0 → 1; none carries.
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      b[j][0] = b[j][0] * 0xFEu + 0x01010101u;
      b[j][1] = b[j][1] * 0xFEu + 0x01010101u;
    }
    if (some_zero) {
      uint32_t nonzero[8][2];
      sign_bits(words + TILE::kSignBytes + k * kRowBytes, kRowBytes, lane, nonzero);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        b[j][0] &= nonzero[j][0] * 0xFFu;
        b[j][1] &= nonzero[j][1] * 0xFFu;
      }
    }
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) {
      uint32_t a[4];
      ldmatrix_x4(a, digits + swizzled((warp_m * BLOCKS + i) * 16 + lane % 16, k / 16 + lane / 16));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        mma_m16n8k32_s8(sums[i][j], a, b[j]);
      }
    }
  }
}

// Two digits' sums of the lane's columns c = 0, 1.
__device__ __forceinline__ int64_t two_digits(const int32_t (&sums)[4], int c) {
  return static_cast<int64_t>(sums[2 + c]) * 256 + sums[c];
}

// One row's results of a lane. `lower`: sums of the lower digits, or null.
__device__ __forceinline__ void finish(const SignProduct& p, int64_t row, int64_t first, int64_t split,
                                       const int32_t (&upper)[8][4], const int32_t (*lower)[4]) {
  if (row >= p.rows) {
    return;
  }
  const double unit = p.row[row].unit * p.scale;
  if (p.splits == 1 && is_nan(unit)) {
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int64_t col = first + 8 * j;
    if (col >= p.cols) {
      continue;
    }
    int64_t sum[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      sum[c] = two_digits(upper[j], c) * 65536 + (lower ? two_digits(lower[j], c) : 0);
    }
    if (p.splits == 1) {
      const double x[2] = {static_cast<double>(sum[0]) * unit, static_cast<double>(sum[1]) * unit};
      store_two(p, row, col, x);
    } else {
      int64_t* to = p.partial + (split * p.rows + row) * p.cols + col;
      to[0] = sum[0];
      if (col + 1 < p.cols) {
        to[1] = sum[1];
      }
    }
  }
}

// 2 blocks of threads a multiprocessor where a warp has 4 blocks of digits, whose sums take 128 registers; else 3.
template <int BLOCKS, int WARPS_M, int WARPS_N>
__global__ void __launch_bounds__(Tile<BLOCKS, WARPS_M, WARPS_N>::kThreads, BLOCKS == 4 ? 2 : 3)
    multiply_kernel(const __grid_constant__ SignProduct p) {
  using TILE = Tile<BLOCKS, WARPS_M, WARPS_N>;
  BK_DYNAMIC_SHARED(char, shared);
  const int lane = threadIdx.x % 32;
  const int warp_m = threadIdx.x / 32 / WARPS_N;
  const int warp_n = threadIdx.x / 32 % WARPS_N;
  const int64_t column_tiles = divide_up(p.cols, TILE::kColumns);
  const int64_t column_tile = blockIdx.x % column_tiles;
  const int64_t rows = p.dtype == DType::Float32 ? TILE::kWide : TILE::kNarrow;
  const int64_t first = blockIdx.x / column_tiles * rows;
  const int64_t split = blockIdx.y;
  const int64_t tiles = padded(p.depth) / kDepth;
  const int64_t tile = tiles * split / p.splits;
  const int64_t end = tiles * (split + 1) / p.splits;

  // Half types' rows are all done at once where none needs its lower digits, else in two halves.
  bool narrow = p.dtype != DType::Float32;
  for (int64_t row = first + lane; narrow && row < first + rows; row += 32) {
    narrow = row >= p.rows || p.row[row].bytes == 2;
  }
  narrow = __all_sync(kAll, narrow);
  const int64_t pass_rows = narrow ? TILE::kNarrow : TILE::kWide;
  for (int64_t row = first; row < first + rows && row < p.rows; row += pass_rows) {
    Fill<TILE> fill(p, row, narrow ? 2 : 1, column_tile * TILE::kPanels, tile, shared);
    int32_t sums[BLOCKS][8][4] = {};
    for (int s = 0; s < kStages - 1; ++s) {
      if (tile + s < end) {
        fill(s);
      }
      cp_async_commit();
    }
    int stage = 0;
    for (int64_t t = tile; t < end; ++t) {
      cp_async_wait<kStages - 2>();
      __syncthreads();
      if (t + kStages - 1 < end) {
        fill((stage + kStages - 1) % kStages);
      }
      cp_async_commit();
      multiply_stage<TILE>(shared, stage, warp_m, warp_n, sums);
      stage = (stage + 1) % kStages;
    }
    // The next pass fills what slower warps may still read.
    __syncthreads();

    const int64_t col = column_tile * TILE::kColumns + warp_n * kWarpColumns + lane % 4 * 2;
    if (narrow) {
#pragma unroll
      for (int i = 0; i < BLOCKS; ++i) {
        finish(p, row + (warp_m * BLOCKS + i) * 8 + lane / 4, col, split, sums[i], nullptr);
      }
    } else {
#pragma unroll
      for (int i = 0; i < BLOCKS; i += 2) {
        finish(p, row + (warp_m * BLOCKS + i) * 4 + lane / 4, col, split, sums[i], sums[i + 1]);
      }
    }
    for (int64_t r = row; p.splits == 1 && r < row + pass_rows; r += 32) {
      const bool mine = r + lane < row + pass_rows && r + lane < p.rows && is_nan(p.row[r + lane].unit);
      for (uint32_t left = __ballot_sync(kAll, mine); left; left &= left - 1) {
        for (int c = threadIdx.x; c < TILE::kColumns; c += TILE::kThreads) {
          nonfinite_row(p, r + __ffs(left) - 1, column_tile * TILE::kColumns + c);
        }
      }
    }
  }
}

constexpr int kReduceThreads = 256;

// The integers of all parts of K → results.
__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(const __grid_constant__ SignProduct p) {
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const double unit = p.row[row].unit * p.scale;
    if (is_nan(unit)) {
      nonfinite_row(p, row, col);
    } else if (col < p.cols) {
      int64_t sum = 0;
      for (int64_t s = 0; s < p.splits; ++s) {
        sum += p.partial[(s * p.rows + row) * p.cols + col];
      }
      store(p, row, col, static_cast<double>(sum) * unit);
    }
  }
}

// --- launch ---

using Small = Tile<2, 1, 4>;
using Middle = Tile<4, 1, 4>;
using Large = Tile<4, 2, 2>;

// Blocks of digits that all rows need, of half types if 16 bits do.
int64_t digit_blocks(int64_t rows, bool half) { return divide_up(rows, 8) * (half ? 1 : 2); }

template <typename TILE>
int64_t tiles_of(int64_t rows, int64_t cols, bool half) {
  return divide_up(rows, half ? TILE::kNarrow : TILE::kWide) * divide_up(cols, TILE::kColumns);
}

template <int BLOCKS, int WARPS_M, int WARPS_N>
void multiply(const SignProduct& p, cudaStream_t stream) {
  using TILE = Tile<BLOCKS, WARPS_M, WARPS_N>;
  const int64_t tiles = tiles_of<TILE>(p.rows, p.cols, p.dtype != DType::Float32);
  BK_LAUNCH((multiply_kernel<BLOCKS, WARPS_M, WARPS_N>),
            dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(p.splits)), dim3(TILE::kThreads),
            TILE::kSharedBytes, stream, p);
}

}  // namespace

int64_t sign_splits(int64_t rows, int64_t depth, int64_t cols, DType dtype) {
  const bool half = dtype != DType::Float32;
  const int64_t blocks = digit_blocks(rows, half);
  const int64_t tiles = blocks <= Small::kBlocks    ? tiles_of<Small>(rows, cols, half)
                        : blocks <= Middle::kBlocks ? tiles_of<Middle>(rows, cols, half)
                                                    : tiles_of<Large>(rows, cols, half);
  // About two blocks a multiprocessor, each with twice the stages at least.
  constexpr int64_t kBlocksWanted = 256;
  const int64_t most = padded(depth) / kDepth / (2 * kStages);
  const int64_t wanted = kBlocksWanted / tiles;
  return most <= 1 || wanted <= 1 ? 1 : wanted < most ? wanted : most;
}

cudaError_t launch_sign_product(const SignProduct& p, cudaStream_t stream) {
  quantise(p, stream);
  const int64_t blocks = digit_blocks(p.rows, p.dtype != DType::Float32);
  if (blocks <= Small::kBlocks) {
    multiply<2, 1, 4>(p, stream);
  } else if (blocks <= Middle::kBlocks) {
    multiply<4, 1, 4>(p, stream);
  } else {
    multiply<4, 2, 2>(p, stream);
  }
  if (p.splits > 1) {
    const unsigned across = static_cast<unsigned>(divide_up(p.cols, kReduceThreads));
    const unsigned down = static_cast<unsigned>(p.rows < 65535 ? p.rows : 65535);
    BK_LAUNCH(reduce_kernel, dim3(across, down), dim3(kReduceThreads), 0, stream, p);
  }
  return cudaGetLastError();
}

}  // namespace bioplaus
