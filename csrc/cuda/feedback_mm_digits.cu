// dX = s · (dY · σ) in fp32 from digits of dY and σ, exactly in integers, by mma.sync of int8.
//
// A block of digits is 16 of their rows, so that a lane's sums of an mma are two digits of its results, and those of
// two blocks all four: they meet in one integer without passing between threads. That, the row's unit and s make the
// result, rounded once. No step before that rounding is inexact, so any tiling, split and order of threads gives the
// same bits. Sums of parts of K, and rows that hold infinities or NaNs, are feedback_mm_passes.cu's.
//
// σ stays bits until it is a fragment: 4 rows of sign words, byte-transposed, give one register a shift. 5.5
// instructions a lane are the price of 4 entries, and all that moves is 1/32 of fp32's operand. Exact zeros have a
// second plane of bits, read where the planes' flags say so.
//
// Roofline, on paper and not yet on hardware. Operations: 8·M·N·K int8; at sm_80's 624 Tops as fast as TF32. Bytes:
// 4·M·K of digits, read N/128 times (from L2), signs N·K/8, or nothing if seeded, dX written. At M ≤ 8 the signs are
// most of it, and 256 entries (11 instructions and 2 mma a warp) are formed and multiplied at 1.5 TB/s of signs on 108
// multiprocessors. mma.sync reaches about half of sm_90's int8 rate and a quarter of sm_100's, where int_mm is ahead at
// large M.
#include "feedback_mm.h"
#include "launch_kernel.h"
#include "ptx.cuh"

namespace bioplaus {
namespace {

constexpr int kStages = 4;
constexpr int kWarpColumns = 64;

// A block of WARPS_M × WARPS_N warps, each BLOCKS blocks of digits × 64 columns.
template <int BLOCKS, int WARPS_M, int WARPS_N>
struct Tile {
  static constexpr int kWarpBlocks = BLOCKS, kWarpsN = WARPS_N;
  static constexpr int kThreads = 32 * WARPS_M * WARPS_N;
  static constexpr int kBlocks = BLOCKS * WARPS_M;
  static constexpr int kColumns = kWarpColumns * WARPS_N;
  static constexpr int kPanels = kColumns / kSignsPerCall;
  static constexpr int kDigitBytes = kBlocks * 16 * kDepth;
  static constexpr int kSignBytes = kDepth * kColumns / 8;
  static constexpr int kStageBytes = kDigitBytes + 2 * kSignBytes;
  static constexpr int kSharedBytes = kStages * (kStageBytes + kPanels * static_cast<int>(sizeof(int32_t)));
  static constexpr int kRows = kBlocks * 4;
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

// What a block reads: rows of digits from `first` on, and signs of its panels of 128 columns.
template <typename TILE>
class Fill {
 public:
  __device__ Fill(const SignProduct& p, int64_t first, int64_t panel, int64_t tile, char* shared)
      : p_(p), shared_(shared), length_(padded(p.depth)), width_(sign_words(p.cols)), tile_(tile) {
    first += threadIdx.x / kChunks;
    digits_ = p.digits + first * length_ + threadIdx.x % kChunks * 16;
    left_ = digit_rows(p.rows) - first;
    word_ = 4 * (panel + piece_);
    if (p.key) {
      key_ = read_key(p.key);
    }
    zeros_ = flag();
  }

  // The next tile along K, into a stage.
  __device__ void operator()(int stage) {
    char* to = shared_ + stage * TILE::kStageBytes;
#pragma unroll
    for (int row = 0; row < TILE::kBlocks * 16; row += kRowsAtOnce) {
      const bool valid = row < left_;
      cp_async_16(to + swizzled(threadIdx.x / kChunks + row, threadIdx.x % kChunks),
                  valid ? digits_ + row * length_ + tile_ * kDepth : p_.digits, valid);
    }
    if (k_ < kDepth) {
      to += TILE::kDigitBytes + sign_row(k_) * (TILE::kColumns / 8) + piece_ * 16;
      const int64_t k = tile_ * kDepth + k_;
      if (p_.key) {
        const Philox4 x = draw(key_, k, word_ / 4);
        *reinterpret_cast<uint4*>(to) = make_uint4(x.w[0], x.w[1], x.w[2], x.w[3]);
      } else {
        const bool valid = k < p_.depth && word_ < width_;
        const int32_t* from = valid ? p_.signs + k * width_ + word_ : p_.signs;
        cp_async_16(to, from, valid);
        if (zeros_) {
          cp_async_16(to + TILE::kSignBytes, valid ? from + p_.depth * width_ : from, valid);
        }
      }
      if (k_ == 0) {
        reinterpret_cast<int32_t*>(shared_ + kStages * TILE::kStageBytes)[stage * TILE::kPanels + piece_] = zeros_;
      }
    }
    ++tile_;
    zeros_ = flag();
  }

 private:
  static constexpr int kChunks = kDepth / 16;
  static constexpr int kRowsAtOnce = TILE::kThreads / kChunks;
  static_assert(TILE::kBlocks * 16 % kRowsAtOnce == 0, "");

  // Read a tile ahead of the copies that need it.
  __device__ bool flag() const {
    if (p_.key || k_ >= kDepth || word_ >= width_ || tile_ * kDepth >= p_.depth) {
      return false;
    }
    const int4 x = *reinterpret_cast<const int4*>(p_.signs + (2 * p_.depth + tile_) * width_ + word_);
    return (x.x | x.y | x.z | x.w) != 0;
  }

  const SignProduct& p_;
  char* shared_;
  const int8_t* digits_;
  int64_t length_, width_, left_, tile_, word_;
  // This thread's row of signs in a tile, where it has one, and its 16 bytes of that.
  int k_ = threadIdx.x / TILE::kPanels, piece_ = threadIdx.x % TILE::kPanels;
  Key key_{};
  bool zeros_ = false;
};

// sums += a stage's digits · σ.
template <typename TILE>
__device__ __forceinline__ void multiply_stage(const char* shared, int stage, int warp_m, int warp_n,
                                               int32_t (&sums)[TILE::kWarpBlocks][8][4]) {
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
    for (int i = 0; i < TILE::kWarpBlocks; ++i) {
      uint32_t a[4];
      ldmatrix_x4(a, digits + swizzled((warp_m * TILE::kWarpBlocks + i) * 16 + lane % 16, k / 16 + lane / 16));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        mma_m16n8k32_s8(sums[i][j], a, b[j]);
      }
    }
  }
}

// A lane's results of one row: columns col and col + 1, col + 8 and col + 9, …
__device__ __forceinline__ void store(const SignProduct& p, int64_t row, int64_t col, int64_t split,
                                      const int32_t (&upper)[8][4], const int32_t (&lower)[8][4]) {
  if (row >= p.rows) {
    return;
  }
  const double unit = p.unit[row] * p.scale;
  const bool pairs = !p.partial && p.cols % 2 == 0;
#pragma unroll
  for (int j = 0; j < 8; ++j, col += 8) {
    float x[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int64_t sum = whole_sum(upper[j][2 + c], upper[j][c], lower[j][2 + c], lower[j][c]);
      x[c] = static_cast<float>(static_cast<double>(sum) * unit);
      if (col + c < p.cols) {
        if (p.partial) {
          p.partial[(split * p.rows + row) * p.cols + col + c] = sum;
        } else if (!pairs) {
          p.out[row * p.cols + col + c] = x[c];
        }
      }
    }
    if (pairs && col < p.cols) {
      *reinterpret_cast<float2*>(p.out + row * p.cols + col) = make_float2(x[0], x[1]);
    }
  }
}

// 2 blocks of threads a multiprocessor where a warp has 4 blocks of digits, whose sums take 128 registers; else 3.
template <typename TILE>
__global__ void __launch_bounds__(TILE::kThreads, TILE::kWarpBlocks == 4 ? 2 : 3)
    multiply_kernel(const __grid_constant__ SignProduct p) {
  BK_DYNAMIC_SHARED(char, shared);
  const int lane = threadIdx.x % 32;
  const int warp_m = threadIdx.x / 32 / TILE::kWarpsN;
  const int warp_n = threadIdx.x / 32 % TILE::kWarpsN;
  const int64_t column_tiles = divide_up(p.cols, TILE::kColumns);
  const int64_t row = blockIdx.x / column_tiles * TILE::kRows;
  const int64_t column_tile = blockIdx.x % column_tiles;
  const int64_t split = blockIdx.y;
  const int64_t tiles = padded(p.depth) / kDepth;
  const int64_t begin = tiles * split / p.splits;
  const int64_t end = tiles * (split + 1) / p.splits;

  Fill<TILE> fill(p, 4 * row, column_tile * TILE::kPanels, begin, shared);
  int32_t sums[TILE::kWarpBlocks][8][4] = {};
  for (int s = 0; s < kStages - 1; ++s) {
    if (begin + s < end) {
      fill(s);
    }
    cp_async_commit();
  }
  int stage = 0;
  for (int64_t t = begin; t < end; ++t) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (t + kStages - 1 < end) {
      fill((stage + kStages - 1) % kStages);
    }
    cp_async_commit();
    multiply_stage<TILE>(shared, stage, warp_m, warp_n, sums);
    stage = (stage + 1) % kStages;
  }
#pragma unroll
  for (int i = 0; i < TILE::kWarpBlocks; i += 2) {
    store(p, row + (warp_m * TILE::kWarpBlocks + i) * 4 + lane / 4,
          column_tile * TILE::kColumns + warp_n * kWarpColumns + lane % 4 * 2, split, sums[i], sums[i + 1]);
  }
}

using Small = Tile<2, 1, 4>;
using Middle = Tile<4, 1, 4>;
using Large = Tile<4, 2, 2>;

// f(tile, number of tiles).
template <typename F>
auto of_tile(int64_t rows, int64_t cols, const F& f) {
  const auto call = [&](auto tile) {
    return f(tile, divide_up(rows, decltype(tile)::kRows) * divide_up(cols, decltype(tile)::kColumns));
  };
  return rows <= Small::kRows ? call(Small()) : rows <= Middle::kRows ? call(Middle()) : call(Large());
}

}  // namespace

int64_t sign_splits(int64_t rows, int64_t depth, int64_t cols) {
  const int64_t tiles = of_tile(rows, cols, [](auto, int64_t count) { return count; });
  // About two blocks a multiprocessor, each with twice the stages at least.
  constexpr int64_t kBlocksWanted = 256;
  const int64_t most = padded(depth) / kDepth / (2 * kStages);
  const int64_t wanted = kBlocksWanted / tiles;
  return most <= 1 || wanted <= 1 ? 1 : wanted < most ? wanted : most;
}

cudaError_t launch_sign_product(const SignProduct& p, cudaStream_t stream) {
  return of_tile(p.rows, p.cols, [&](auto tile, int64_t tiles) {
    using TILE = decltype(tile);
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(p.splits));
    BK_LAUNCH(multiply_kernel<TILE>, grid, dim3(TILE::kThreads), TILE::kSharedBytes, stream, p);
    return cudaGetLastError();
  });
}

}  // namespace bioplaus
