#include "feedback_mm.h"

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/form.h"
#include "buffer.h"
#include "feedback_mm_gemm.h"
#include "feedback_mm_tables.h"
#include "feedback_weight.h"
#include "gemm.h"
#include "slab_signs.h"

namespace bioplaus {
namespace {

// Rows whose digits are held at once: as stay in the L2 cache, and so many at least that unfolding the signs again
// costs little. More rows would be memory fresh from the system, too.
constexpr int64_t kDigitBytes = int64_t{1} << 20;
constexpr int64_t kRows = 512;
// An operand of so many bytes is formed whole and stays in the L2 cache, beside the digits that a thread makes at once.
constexpr int64_t kOperandBytes = int64_t{1} << 20;
constexpr int64_t kGroupBytes = int64_t{1} << 18;
// Rows at once whose digits take more bytes than the rows themselves.
constexpr size_t kLossyRows = 256;
// A block of B that is never too large to hold.
constexpr int64_t kSlabBytes = int64_t{1} << 20;
// Columns of B too few for what forming tables costs, beside tiles of float32 and of pairs.
constexpr int64_t kFewSums = 16;
constexpr int64_t kFewPairs = 64;
// Entries of B too few for what digits of a half type cost, where tile units take it as it is, too.
constexpr int64_t kFewOfHalf = int64_t{1} << 20;
// Fewer entries of B than this are not worth a second thread.
constexpr int64_t kFormGrain = 8192;

void quantise_rows(const SignProduct& p) {
  const auto kernel = BK_PICK_PRODUCT(quantise);
  const int64_t tiles = divide_up(p.rows, BK_PICK_PRODUCT(tile_rows)(p.bytes));
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> scratch(p.depth);
    kernel(p, begin, end, scratch.get());
  });
}

void multiply_slabs(const SignProduct& p, const FeedbackParams& b, const WeightSigns& whole) {
  const auto kernel = BK_PICK_PRODUCT(multiply);
  const int64_t tiles = divide_up(p.rows, BK_PICK_PRODUCT(tile_rows)(p.bytes));
  // Parts of the rows where there are too few slabs.
  const int64_t threads = at::get_num_threads();
  const int64_t width = slab_width(p.cols, threads);
  const int64_t slabs = divide_up(p.cols, width);
  const int64_t parts = std::clamp<int64_t>(threads / slabs, 1, tiles);
  at::parallel_for(0, slabs * parts, 1, [&](int64_t begin, int64_t end) {
    const Buffer<char> scratch(BK_PICK_PRODUCT(multiply_scratch)(p, width));
    const SlabSigns signs(b, width, &whole);
    SignColumns columns{};
    int64_t formed = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit / parts * width;
      const int64_t cols = std::min(width, p.cols - first);
      if (formed != first) {
        columns = signs.form(first, cols);
        formed = first;
      }
      const int64_t part = unit % parts;
      kernel(p, columns, tiles * part / parts, tiles * (part + 1) / parts, first, cols, scratch.get());
    }
  });
}

SignProduct describe(const at::Tensor& grad, const FeedbackParams& b, int bytes, const at::Tensor& out) {
  SignProduct p{};
  p.rows = grad.size(0);
  p.depth = b.rows;
  p.cols = b.cols;
  p.grad = grad.const_data_ptr();
  p.dtype = to_dtype("grad_output", grad.scalar_type());
  p.row_stride = grad.stride(0);
  p.column_stride = grad.stride(1);
  p.out = out.mutable_data_ptr();
  p.out_stride = p.cols;
  p.scale = entry_scale(b.scale, p.dtype);
  p.bytes = bytes;
  return p;
}

// out = s · (grad · σ) in digits of `bytes`. The rows for which two bytes lose too much come back, not yet computed.
std::vector<int64_t> digit_product(const at::Tensor& grad, const FeedbackParams& b, const WeightSigns& whole, int bytes,
                                   const at::Tensor& out) {
  SignProduct p = describe(grad, b, bytes, out);
  const int64_t digits = BK_PICK_PRODUCT(digit_bytes)(p.rows, p.depth, bytes);
  const Buffer<int8_t> memory(digits + p.rows * static_cast<int64_t>(sizeof(FixedPoint)));
  p.digits = memory.get();
  p.fixed = reinterpret_cast<FixedPoint*>(memory.get() + digits);
  quantise_rows(p);
  std::vector<int64_t> lossy;
  for (int64_t row = 0; row < p.rows; ++row) {
    if (p.fixed[row].lossy) {
      lossy.push_back(row);
    }
  }
  if (static_cast<int64_t>(lossy.size()) < p.rows) {
    multiply_slabs(p, b, whole);
  }
  return lossy;
}

// The same by an operand that is formed whole, once: each thread multiplies the digits of some rows as soon as it has
// made them. Rows that hold an infinity or a NaN come back as well.
std::vector<int64_t> row_product(const at::Tensor& grad, const FeedbackParams& b, const WeightSigns& whole, int bytes,
                                 const at::Tensor& out) {
  const SignProduct p = describe(grad, b, bytes, out);
  const int64_t panel = BK_PICK_PRODUCT(panel_bytes)(p.depth);
  const Buffer<int8_t> operand(divide_up(p.cols, 32) * panel);
  at::parallel_for(0, divide_up(p.cols, kPanel), 1, [&](int64_t begin, int64_t end) {
    const SlabSigns signs(b, kPanel, &whole);
    for (int64_t first = begin * kPanel; first < std::min(end * kPanel, p.cols); first += kPanel) {
      const int64_t cols = std::min(kPanel, p.cols - first);
      BK_PICK_PRODUCT(form_panels)
      (signs.form(first, cols), first / 32, divide_up(first + cols, 32), p.depth, operand.get());
    }
  });
  const int64_t in_tile = BK_PICK_PRODUCT(tile_rows)(bytes);
  const int64_t tile = BK_PICK_PRODUCT(digit_bytes)(1, p.depth, bytes);
  const int64_t tiles = divide_up(p.rows, in_tile);
  // As many for every thread, in pairs, which the tile product takes at once.
  const int64_t pairs = divide_up(tiles, 2), threads = at::get_num_threads();
  const int64_t fewest = divide_up(divide_up(pairs, std::max<int64_t>(kGroupBytes / (2 * tile), 1)), threads) * threads;
  const int64_t groups = std::min(pairs, fewest);
  const std::vector<int64_t> digit_steps = steps(tile / kTileBytes, kTileBytes);
  const std::vector<int64_t> operand_steps = steps(tile / kTileBytes, panel / (tile / kTileBytes));
  const Run run{digit_steps.data(), operand_steps.data(), tile / kTileBytes};
  const Buffer<FixedPoint> fixed(p.rows);
  const auto left = [&](int64_t row) { return fixed.get()[row].lossy || std::isnan(fixed.get()[row].unit); };
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> row(p.depth);
    const Buffer<int8_t> digits(2 * divide_up(pairs, groups) * tile);
    const Buffer<char> scratch(BK_PICK_PRODUCT(panels_scratch)(p, run.blocks));
    std::vector<DigitTile> some;
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = pairs * group / groups * 2 * in_tile;
      SignProduct part = p;
      part.rows = std::min(pairs * (group + 1) / groups * 2 * in_tile, p.rows) - first;
      part.grad = static_cast<const char*>(p.grad) + first * p.row_stride * size_of(p.dtype);
      part.out = static_cast<char*>(p.out) + first * p.out_stride * size_of(p.dtype);
      part.digits = digits.get();
      part.fixed = fixed.get() + first;
      BK_PICK_PRODUCT(quantise)(part, 0, divide_up(part.rows, in_tile), row.get());
      some.clear();
      for (int64_t i = 0; i < part.rows; i += in_tile) {
        const int64_t n = std::min(in_tile, part.rows - i);
        int64_t done = 0;
        while (done < n && left(first + i + done)) {
          ++done;
        }
        if (done < n) {
          some.push_back({digits.get() + i / in_tile * tile, i, n});
        }
      }
      BK_PICK_PRODUCT(multiply_panels)
      (part, some.data(), static_cast<int64_t>(some.size()), 1, run, operand.get(), scratch.get());
    }
  });
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < p.rows; ++row) {
    if (left(row)) {
      rows.push_back(row);
    }
  }
  return rows;
}

// dX = s · (dY · σ).
at::Tensor sign_product(const at::Tensor& grad, const FeedbackParams& b, const WeightSigns& whole) {
  const at::Tensor out = at::empty({grad.size(0), b.cols}, grad.options());
  const int bytes = static_cast<int>(grad.element_size());
  const int64_t rows = grad.size(0);
  const bool by_rows = divide_up(b.cols, 32) * BK_PICK_PRODUCT(panel_bytes)(b.rows) <= kOperandBytes &&
                       rows >= 2 * at::get_num_threads() * BK_PICK_PRODUCT(tile_rows)(bytes);
  const int64_t step = by_rows ? rows : std::max(kRows, kDigitBytes / (b.rows * bytes));
  for (int64_t first = 0; first < rows; first += step) {
    const int64_t n = std::min(step, rows - first);
    const bool all = n == rows;
    const at::Tensor some = all ? grad : grad.narrow(0, first, n);
    at::Tensor to = all ? out : out.narrow(0, first, n);
    std::vector<int64_t> left = (by_rows ? row_product : digit_product)(some, b, whole, bytes, to);
    for (size_t i = 0; i < left.size(); i += kLossyRows) {
      const int64_t count = static_cast<int64_t>(std::min(kLossyRows, left.size() - i));
      const at::Tensor index = at::from_blob(left.data() + i, {count}, at::kLong);
      const at::Tensor part = at::empty({count, b.cols}, grad.options());
      digit_product(some.index_select(0, index), b, whole, 4, part);
      to.index_copy_(0, index, part);
    }
  }
  return out;
}

// Whether a B of ±s takes less in tiles than by tables or digits, whatever the number of rows.
bool tiles_are_fastest(const FeedbackParams& b, at::ScalarType dtype) {
  if (!has_tables() || !gemm_in_order()) {
    return false;
  }
  if (lanes_are_rows()) {
    return dtype == at::kFloat && std::min(b.rows, b.cols) <= kFewSums;
  }
  const bool half = half_gemm_available(dtype);
  return b.cols <= (half ? kFewPairs : kFewSums) ||
         (half && product_level() == ProductLevel::AMX && b.rows * b.cols <= kFewOfHalf);
}

// Whether sums of table entries take less than digits: on tile units of short rows alone.
bool tables_beat_digits(const FeedbackParams& b, at::ScalarType dtype) {
  return tables_are_faster() || (has_tables() && dtype == at::kFloat && b.rows <= kShortRows);
}

// Whether a stored B takes less in tiles too.
bool tiles_are_faster(at::ScalarType dtype, int64_t rows, int64_t cols) {
  return dtype == at::kFloat && rows >= 16 && cols >= 64 && blas_is_narrow();
}

// dX = dY · B of a stored B.
at::Tensor plain_product(const at::Tensor& grad, const at::Tensor& b) {
  const at::Tensor paired = in_pairs(grad, torch_takes_pairs(grad.scalar_type()));
  const int64_t zeros = paired.size(1) - b.size(0);
  return at::mm(paired, zeros ? at::constant_pad_nd(b, {0, 0, 0, zeros}) : b);
}

// Whether slab_product is the faster way to another dX = dY · B, by measurements on a processor without AMX; with it,
// of 512 rows of a half type.
bool torch_is_faster(at::ScalarType dtype, int64_t rows, int64_t depth, int64_t cols) {
  if (dtype == at::kDouble) {
    return true;
  }
  if (dtype == at::kFloat) {
    // A matrix-vector product, or a large one, where both take about as long.
    return cols == 1 ? rows >= 64 : rows >= 2048 && cols >= 512 && !blas_is_narrow();
  }
  if (!half_units(dtype)) {
    return false;
  }
  // Its call costs as much as so many multiply-adds, by 16 columns at least.
  constexpr int64_t kCall = int64_t{1} << 22;
  return product_level() == ProductLevel::AMX || dtype == at::kHalf
             ? rows >= 512
             : rows >= 64 && rows * depth * std::max<int64_t>(cols, 16) >= kCall;
}

// The same by torch's own product: B whole where it is small, else a slab of columns at a time, in a buffer that takes
// no more memory than dY and one bit for each weight, or kSlabBytes.
at::Tensor slab_product(const at::Tensor& grad, const FeedbackParams& b) {
  const at::Tensor out = at::empty({grad.size(0), b.cols}, grad.options());
  const auto run = BK_PICK(feedback_run);
  const int64_t bytes = std::max(kSlabBytes, grad.numel() * grad.element_size() + b.rows * b.cols / 8);
  const int64_t most = std::clamp<int64_t>(bytes / (b.rows * grad.element_size()), 16, kSlab);
  // Of nearly the same width, as a last one of few columns would take as long as one of many.
  const int64_t width = divide_up(divide_up(b.cols, divide_up(b.cols, most)), 16) * 16;
  const at::Tensor paired = in_pairs(grad, torch_takes_pairs(grad.scalar_type()));
  const int64_t depth = paired.size(1);
  const at::Tensor slab = at::empty({depth * std::min(width, b.cols)}, grad.options());
  for (int64_t first = 0; first < b.cols; first += width) {
    const int64_t cols = std::min(width, b.cols - first);
    const at::Tensor block = slab.narrow(0, 0, depth * cols).view({depth, cols});
    char* to = static_cast<char*>(block.mutable_data_ptr());
    at::parallel_for(0, b.rows, divide_up(kFormGrain, cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        run(b, row, first, cols, to + row * cols * grad.element_size());
      }
    });
    block.narrow(0, b.rows, depth - b.rows).zero_();
    at::Tensor part = out.narrow(1, first, cols);
    at::mm_out(part, paired, block);
  }
  return out;
}

// An empty `way`: the fastest.
at::Tensor product(const at::Tensor& grad_output, const std::optional<at::Tensor>& weight,
                   const std::optional<at::Tensor>& signs, const std::optional<at::Tensor>& magnitude,
                   const std::optional<at::Tensor>& key, c10::string_view entries, double scale, int64_t in_features,
                   c10::string_view way) {
  check_floating("grad_output", grad_output);
  TORCH_CHECK_VALUE(grad_output.dim() == 2, "grad_output: expected 2 dimensions, got shape ",
                    tuple(grad_output.sizes()));
  TORCH_CHECK_VALUE(in_features >= 0, "in_features: expected at least 0, got ", in_features);
  const int64_t size[] = {grad_output.size(1), in_features};
  const FeedbackArgs args{weight, signs, magnitude, key, entries, scale, size};
  args.check(at::kCPU);
  if (grad_output.size(0) == 0 || size[0] == 0 || size[1] == 0) {
    return at::zeros({grad_output.size(0), in_features}, grad_output.options());
  }
  const at::ScalarType dtype = grad_output.scalar_type();
  if (args.plain(dtype) && !tiles_are_faster(dtype, grad_output.size(0), in_features)) {
    return plain_product(grad_output, *magnitude);
  }
  Formula formula(args);
  FeedbackParams& b = formula.p;
  b.out.dtype = to_dtype("grad_output", dtype);
  if (b.entries == Entries::Constant && dtype != at::kDouble && size[0] <= kMaxDepth) {
    if (way.empty() && tiles_are_fastest(b, dtype)) {
      return tile_product(grad_output, b);
    }
    const bool tables = way.empty() ? tables_beat_digits(b, dtype) : way == "tables";
    const WeightSigns whole(b);
    const at::Tensor out = tables ? table_product(grad_output, b, whole) : at::Tensor();
    return out.defined() ? out : sign_product(grad_output, b, whole);
  }
  return torch_is_faster(dtype, grad_output.size(0), b.rows, b.cols) ? slab_product(grad_output, b)
                                                                     : tile_product(grad_output, b);
}

at::Tensor feedback_mm_cpu(const at::Tensor& grad_output, const std::optional<at::Tensor>& weight,
                           const std::optional<at::Tensor>& signs, const std::optional<at::Tensor>& magnitude,
                           const std::optional<at::Tensor>& key, c10::string_view entries, double scale,
                           int64_t in_features) {
  return product(grad_output, weight, signs, magnitude, key, entries, scale, in_features, "");
}

at::Tensor feedback_mm_by_cpu(const at::Tensor& grad_output, const std::optional<at::Tensor>& weight,
                              const std::optional<at::Tensor>& signs, const std::optional<at::Tensor>& magnitude,
                              const std::optional<at::Tensor>& key, c10::string_view entries, double scale,
                              int64_t in_features, c10::string_view way) {
  check_way(way, entries, grad_output.scalar_type());
  return product(grad_output, weight, signs, magnitude, key, entries, scale, in_features, way);
}

}  // namespace

TORCH_LIBRARY_IMPL(bioplaus, CPU, m) {
  m.impl("feedback_mm", feedback_mm_cpu);
  m.impl("feedback_mm_by", feedback_mm_by_cpu);
}

}  // namespace bioplaus
