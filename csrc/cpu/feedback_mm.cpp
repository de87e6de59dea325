#include "feedback_mm.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "../common/form.h"
#include "feedback_weight.h"
#include "pack_signs.h"

namespace bioplaus {
namespace {

// Columns that a thread takes at a time: it forms their signs once for all rows.
constexpr int64_t kSlab = 512;
// Rows whose digits are held at once where they take more bytes than the rows themselves.
constexpr int64_t kFewRows = 256;
// Fewer entries of B than this are not worth a second thread.
constexpr int64_t kFormGrain = 8192;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory for one thread's use, aligned as every tensor's is.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : memory_(at::empty({count * static_cast<int64_t>(sizeof(T))}, at::kByte)) {}
  T* get() const { return static_cast<T*>(memory_.mutable_data_ptr()); }

 private:
  at::Tensor memory_;
};

// s as the entries of B hold it.
double entry_scale(double scale, at::ScalarType dtype) {
  const float s = static_cast<float>(scale);
  return dtype == at::kBFloat16 ? static_cast<float>(at::BFloat16(s))
         : dtype == at::kHalf   ? static_cast<float>(at::Half(s))
                                : s;
}

// Signs of a slab of columns: a view of packed signs, or formed in `planes`.
class SlabSigns {
 public:
  SlabSigns(const FeedbackParams& p, int64_t width)
      : p_(p), planes_(p.signs ? 0 : (2 * p.rows + sign_tiles(p.rows)) * sign_words(width)) {}

  SignPlanes form(int64_t first, int64_t cols) {
    if (p_.signs) {
      const int64_t width = sign_words(p_.cols);
      const int32_t* planes = p_.signs + first / 32;
      return {planes, planes + p_.rows * width, planes + 2 * p_.rows * width, width};
    }
    const int64_t width = sign_words(cols);
    int32_t* planes = planes_.get();
    if (p_.key) {
      BK_PICK_PRODUCT(seeded_signs)(p_.key, p_.rows, first / kSignsPerCall, width / 4, planes);
      return {planes, nullptr, nullptr, width};
    }
    FeedbackParams slab = p_;
    slab.cols = cols;
    slab.column_size[0] = cols;
    slab.weight.data = static_cast<char*>(p_.weight.data) + first * p_.weight.stride[0] * bytes_of(p_.weight.dtype);
    BK_PICK(pack_signs)(slab, planes, 0, sign_tiles(p_.rows) * divide_up(cols, kPackColumns));
    return {planes, planes + p_.rows * width, planes + 2 * p_.rows * width, width};
  }

 private:
  static int64_t bytes_of(DType dtype) { return dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2; }

  const FeedbackParams& p_;
  Buffer<int32_t> planes_;
};

bool quantise_rows(const SignProduct& p) {
  const auto kernel = BK_PICK_PRODUCT(quantise);
  const int64_t tiles = divide_up(p.rows, BK_PICK_PRODUCT(tile_rows)(p.bytes));
  std::atomic<bool> good = true;
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> scratch(p.depth);
    if (!kernel(p, begin, end, scratch.get())) {
      good = false;
    }
  });
  return good;
}

void multiply_slabs(const SignProduct& p, const FeedbackParams& b) {
  const auto kernel = BK_PICK_PRODUCT(multiply);
  const int64_t tiles = divide_up(p.rows, BK_PICK_PRODUCT(tile_rows)(p.bytes));
  // At least two slabs a thread where there are the columns, else parts of the rows.
  const int64_t threads = at::get_num_threads();
  const int64_t panels = divide_up(p.cols, kPanel);
  const int64_t width = std::clamp<int64_t>(panels / (2 * threads), 1, kSlab / kPanel) * kPanel;
  const int64_t slabs = divide_up(p.cols, width);
  const int64_t parts = std::clamp<int64_t>(threads / slabs, 1, tiles);
  at::parallel_for(0, slabs * parts, 1, [&](int64_t begin, int64_t end) {
    const Buffer<char> scratch(BK_PICK_PRODUCT(multiply_scratch)(p, width));
    SlabSigns signs(b, width);
    SignPlanes planes{};
    int64_t formed = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit / parts * width;
      const int64_t cols = std::min(width, p.cols - first);
      if (formed != first) {
        planes = signs.form(first, cols);
        formed = first;
      }
      const int64_t part = unit % parts;
      kernel(p, planes, tiles * part / parts, tiles * (part + 1) / parts, first, cols, scratch.get());
    }
  });
}

// dX = s · (dY · σ).
at::Tensor sign_product(const at::Tensor& grad, const FeedbackParams& b) {
  const at::Tensor out = at::empty({grad.size(0), b.cols}, grad.options());
  const int64_t element = grad.element_size();
  const auto product = [&](int64_t first, int64_t rows, int bytes) {
    SignProduct p{};
    p.rows = rows;
    p.depth = b.rows;
    p.cols = b.cols;
    p.grad = static_cast<const char*>(grad.const_data_ptr()) + first * grad.stride(0) * element;
    p.dtype = to_dtype("grad_output", grad.scalar_type());
    p.row_stride = grad.stride(0);
    p.column_stride = grad.stride(1);
    p.out = static_cast<char*>(out.mutable_data_ptr()) + first * b.cols * element;
    p.scale = entry_scale(b.scale, grad.scalar_type());
    p.bytes = bytes;
    const Buffer<int8_t> digits(BK_PICK_PRODUCT(digit_bytes)(rows, b.rows, bytes));
    const Buffer<FixedPoint> fixed(rows);
    p.digits = digits.get();
    p.fixed = fixed.get();
    const bool good = quantise_rows(p);
    if (good) {
      multiply_slabs(p, b);
    }
    return good;
  };
  const int64_t rows = grad.size(0);
  if (element == 2 && product(0, rows, 2)) {
    return out;
  }
  const int64_t step = element == 4 ? rows : std::max(kFewRows, divide_up(rows, 2));
  for (int64_t first = 0; first < rows; first += step) {
    product(first, std::min(step, rows - first), 4);
  }
  return out;
}

// dX = dY · B where no digits serve: B a slab of columns at a time, in a buffer, times torch's own product. The slab is
// formed at memory bandwidth, or at the generator's rate; the product takes the rest.
at::Tensor slab_product(const at::Tensor& grad, const FeedbackParams& b) {
  const at::Tensor out = at::empty({grad.size(0), b.cols}, grad.options());
  const auto run = BK_PICK(feedback_run);
  const int64_t width = std::min(b.cols, kSlab);
  const at::Tensor slab = at::empty({b.rows * width}, grad.options());
  for (int64_t first = 0; first < b.cols; first += width) {
    const int64_t cols = std::min(width, b.cols - first);
    const at::Tensor block = slab.narrow(0, 0, b.rows * cols).view({b.rows, cols});
    char* to = static_cast<char*>(block.mutable_data_ptr());
    at::parallel_for(0, b.rows, divide_up(kFormGrain, cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        run(b, row, first, cols, to + row * cols * grad.element_size());
      }
    });
    at::Tensor part = out.narrow(1, first, cols);
    at::mm_out(part, grad, block);
  }
  return out;
}

at::Tensor feedback_mm_cpu(const at::Tensor& grad_output, const std::optional<at::Tensor>& weight,
                           const std::optional<at::Tensor>& signs, const std::optional<at::Tensor>& magnitude,
                           const std::optional<at::Tensor>& key, c10::string_view entries, double scale,
                           int64_t in_features) {
  to_dtype("grad_output", grad_output.scalar_type());
  TORCH_CHECK_VALUE(grad_output.dim() == 2, "grad_output: expected 2 dimensions, got shape ", grad_output.sizes());
  TORCH_CHECK_VALUE(in_features >= 0, "in_features: expected at least 0, got ", in_features);
  const int64_t size[] = {grad_output.size(1), in_features};
  const FeedbackArgs args{weight, signs, magnitude, key, entries, scale, size};
  args.check(at::kCPU);
  if (grad_output.size(0) == 0 || size[0] == 0 || size[1] == 0) {
    return at::zeros({grad_output.size(0), in_features}, grad_output.options());
  }
  const Entries e = to_entries(entries);
  const at::ScalarType dtype = grad_output.scalar_type();
  if (e == Entries::Stored && !weight && !signs && scale == 1 && magnitude->scalar_type() == dtype) {
    return at::mm(grad_output, *magnitude);
  }

  const auto planes = signs ? signs->contiguous() : at::Tensor();
  const auto words = key ? key->contiguous() : at::Tensor();
  FeedbackParams b{};
  b.entries = e;
  b.scale = scale;
  b.signs = signs ? planes.const_data_ptr<int32_t>() : nullptr;
  b.key = key ? words.const_data_ptr<int64_t>() : nullptr;
  b.out.dtype = to_dtype("grad_output", dtype);
  Operands operands(b, size, false);
  if (weight) {
    operands.add(b.weight, *weight, const_cast<void*>(weight->const_data_ptr()));
  }
  if (magnitude) {
    operands.add(b.magnitude, *magnitude, const_cast<void*>(magnitude->const_data_ptr()));
  }
  operands.finish();
  const bool digits = e == Entries::Constant && dtype != at::kDouble && size[0] <= kMaxDepth;
  return digits ? sign_product(grad_output, b) : slab_product(grad_output, b);
}

}  // namespace

TORCH_LIBRARY_IMPL(bioplaus, CPU, m) { m.impl("feedback_mm", feedback_mm_cpu); }

}  // namespace bioplaus
