// From tensors to the parameter struct: what the CPU's and CUDA's host code share.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/SmallVector.h>

#include "checks.h"
#include "redraw.h"

namespace bioplaus {

// Describes strided tensors of one size as (rows, columns) operands.
class Operands {
 public:
  // `flat` says that a memory order other than the logical one is as good: nothing is drawn or read by index.
  Operands(FeedbackParams& p, at::IntArrayRef size, bool flat) : p_(p), size_(size), flat_(flat) {}

  void add(Operand& operand, const at::Tensor& x, void* data) {
    TORCH_INTERNAL_ASSERT(count_ < kMaxOperands);
    operand.data = data;
    operand.dtype = to_dtype("dtype", x.scalar_type());
    operand_[count_] = &operand;
    tensor_[count_++] = &x;
  }

  // One that is only read, where there is one.
  void add(Operand& operand, const std::optional<at::Tensor>& x) {
    if (x) {
      add(operand, *x, const_cast<void*>(x->const_data_ptr()));
    }
  }

  void finish() {
    if (flat_ && one_dense_order()) {
      p_.rows = 1;
      p_.cols = tensor_[0]->numel();
      p_.column_dims = 1;
      p_.column_size[0] = p_.cols;
      for (int k = 0; k < count_; ++k) {
        *operand_[k] = {operand_[k]->data, operand_[k]->dtype, true, 0, {1}};
      }
      return;
    }
    p_.rows = rows_of(size_);
    p_.cols = columns_of(size_);
    p_.column_dims = 0;
    for (int64_t d = 1; d < static_cast<int64_t>(size_.size()); ++d) {
      if (size_[d] == 1) {
        continue;
      }
      if (p_.column_dims > 0 && continues(d)) {
        p_.column_size[p_.column_dims - 1] *= size_[d];
      } else {
        TORCH_CHECK_VALUE(p_.column_dims < kMaxColumnDims, "size: expected at most ", kMaxColumnDims,
                          " dimensions after the first that do not merge in memory, got ", tuple(size_));
        p_.column_size[p_.column_dims++] = size_[d];
      }
      for (int k = 0; k < count_; ++k) {
        operand_[k]->stride[p_.column_dims - 1] = tensor_[k]->stride(d);
      }
    }
    if (p_.column_dims == 0) {
      p_.column_dims = 1;
      p_.column_size[0] = 1;
      for (int k = 0; k < count_; ++k) {
        operand_[k]->stride[0] = 1;
      }
    }
    for (int k = 0; k < count_; ++k) {
      operand_[k]->dense = p_.column_dims == 1 && operand_[k]->stride[0] == 1;
      operand_[k]->row_stride = size_.empty() ? 0 : tensor_[k]->stride(0);
    }
  }

 private:
  static constexpr int kMaxOperands = 3;

  bool one_dense_order() const {
    for (int k = 0; k < count_; ++k) {
      if (!tensor_[k]->is_non_overlapping_and_dense()) {
        return false;
      }
      for (size_t d = 0; d < size_.size(); ++d) {
        if (size_[d] > 1 && tensor_[k]->stride(d) != tensor_[0]->stride(d)) {
          return false;
        }
      }
    }
    return true;
  }

  // Whether dim d merges with the column dim before it, in every tensor.
  bool continues(int64_t d) const {
    for (int k = 0; k < count_; ++k) {
      if (operand_[k]->stride[p_.column_dims - 1] != size_[d] * tensor_[k]->stride(d)) {
        return false;
      }
    }
    return true;
  }

  FeedbackParams& p_;
  at::IntArrayRef size_;
  bool flat_;
  int count_ = 0;
  Operand* operand_[kMaxOperands];
  const at::Tensor* tensor_[kMaxOperands];
};

// What kernels are told of B, from checked arguments, and the tensors that this points into.
struct Formula {
  // `out`: B itself, where it is written whole.
  explicit Formula(const FeedbackArgs& args, const at::Tensor* out = nullptr)
      // Only what comes from outside the library can be non-contiguous here.
      : signs(args.signs ? args.signs->contiguous() : at::Tensor()),
        key(args.key ? args.key->contiguous() : at::Tensor()) {
    p.entries = to_entries(args.entries);
    p.scale = args.scale;
    p.signs = args.signs ? signs.const_data_ptr<int32_t>() : nullptr;
    p.key = args.key ? key.const_data_ptr<int64_t>() : nullptr;
    Operands operands(p, args.size, out && !args.signs && !args.key);
    if (out) {
      operands.add(p.out, *out, out->mutable_data_ptr());
    }
    operands.add(p.weight, args.weight);
    operands.add(p.magnitude, args.magnitude);
    operands.finish();
  }

  at::Tensor signs, key;
  FeedbackParams p{};
};

// A tensor with B's size and memory order, formed by launch(params).
template <typename Launch>
at::Tensor form(const FeedbackArgs& args, at::Device device, at::ScalarType dtype, const Launch& launch) {
  args.check(device);
  to_dtype("dtype", dtype);
  const auto options = at::TensorOptions().device(device).dtype(dtype);
  const auto& like = args.weight ? args.weight : args.magnitude;
  const at::Tensor out = like ? at::empty_like(*like, options) : at::empty(args.size, options);
  if (out.numel() == 0) {
    return out;
  }
  launch(Formula(args, &out).p);
  return out;
}

// A tensor of packed signs, formed by launch(params, planes).
template <typename Launch>
at::Tensor form_packed(const at::Tensor& weight, const Launch& launch) {
  check_floating("weight", weight);
  const int64_t rows = rows_of(weight.sizes());
  const int64_t words = sign_words(columns_of(weight.sizes()));
  const at::Tensor planes = at::empty({2 * rows + sign_tiles(rows), words}, weight.options().dtype(at::kInt));
  if (planes.numel() == 0) {
    return planes;
  }
  FeedbackParams p{};
  Operands operands(p, weight.sizes(), false);
  operands.add(p.weight, weight, const_cast<void*>(weight.const_data_ptr()));
  operands.finish();
  launch(p, planes.mutable_data_ptr<int32_t>());
  return planes;
}

// W as 32-bit words, in the order that they have in memory.
inline RedrawParams words_of(const at::Tensor& weight) {
  RedrawParams p{};
  p.data = weight.const_data_ptr();
  p.bytes = weight.element_size() == 2 ? 2 : 4;
  p.parts = static_cast<int32_t>(weight.element_size()) / p.bytes;
  p.words = weight.numel() * p.parts;
  struct Dim {
    int64_t size, stride, step;
  };
  c10::SmallVector<Dim, 8> dims;
  int64_t step = p.parts;
  for (int64_t d = weight.dim() - 1; d >= 0; step *= weight.size(d--)) {
    if (weight.size(d) != 1) {
      const Dim x{weight.size(d), weight.stride(d) * p.parts, step};
      // A stable insertion, which costs nothing where the order is the logical one.
      auto at = dims.end();
      while (at != dims.begin() && (at - 1)->stride > x.stride) {
        --at;
      }
      dims.insert(at, x);
    }
  }
  Dim run{p.parts, 1, 1};
  const auto add = [&p](const Dim& x) {
    TORCH_CHECK_VALUE(p.dims < kWordDims, "weight: expected at most ", kWordDims,
                      " dimensions that do not merge in memory");
    p.size[p.dims] = x.size;
    p.stride[p.dims] = x.stride;
    p.step[p.dims++] = x.step;
  };
  for (const Dim& x : dims) {
    if (run.size == 1) {
      run = x;
    } else if (x.stride == run.size * run.stride && x.step == run.size * run.step) {
      run.size *= x.size;
    } else {
      add(run);
      run = x;
    }
  }
  add(run);
  return p;
}

// The key that redraws with `weight`, written by launch(params, new key).
template <typename Launch>
at::Tensor form_key(const at::Tensor& key, const at::Tensor& weight, const Launch& launch) {
  check_floating("weight", weight);
  check_key(key, weight.device());
  if (weight.numel() == 0) {
    return key.clone();
  }
  const at::Tensor from = key.contiguous();
  const at::Tensor out = at::empty_like(from);
  RedrawParams p = words_of(weight);
  p.key = from.const_data_ptr<int64_t>();
  launch(p, out.mutable_data_ptr<int64_t>());
  return out;
}

}  // namespace bioplaus
