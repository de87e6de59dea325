// Argument checks, shared by the CPU's and CUDA's host code. Every error names the argument, what is wanted and what it
// got, in the words of the reference.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

#include <cmath>
#include <optional>
#include <string>

#include "feedback.h"
#include "packed_signs.h"

namespace bioplaus {

// Sizes and dtypes as Python writes them, which is how the reference's errors do.
inline std::string tuple(at::IntArrayRef values) {
  std::string text = "(";
  for (size_t i = 0; i < values.size(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(values[i]);
  }
  return text + (values.size() == 1 ? ",)" : ")");
}

inline std::string dtype_name(at::ScalarType dtype) { return "torch." + std::string(c10::getDtypeNames(dtype).first); }

inline DType to_dtype(const char* name, at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return DType::Float32;
    case at::kDouble:
      return DType::Float64;
    case at::kBFloat16:
      return DType::BFloat16;
    case at::kHalf:
      return DType::Float16;
    default:
      TORCH_CHECK_TYPE(false, name, ": expected float32, bfloat16, float16 or float64, got ", dtype_name(dtype));
  }
}

inline int64_t rows_of(at::IntArrayRef size) { return size.empty() ? 1 : size[0]; }

inline int64_t columns_of(at::IntArrayRef size) {
  int64_t cols = 1;
  for (size_t d = 1; d < size.size(); ++d) {
    cols *= size[d];
  }
  return cols;
}

// So that products of sizes, and bytes of them, stay within 64 bits; a dimension of 0 counts as 1.
inline void check_entries(const char* name, at::IntArrayRef size) {
  int64_t entries = 1;
  bool fits = true;
  for (const int64_t n : size) {
    fits = fits && !__builtin_mul_overflow(entries, n > 0 ? n : 1, &entries);
  }
  TORCH_CHECK_VALUE(fits && entries <= int64_t{1} << 48, name, ": expected at most 2**48 entries, got size ",
                    tuple(size));
}

inline void check_size(at::IntArrayRef size) {
  for (const int64_t n : size) {
    TORCH_CHECK_VALUE(n >= 0, "size: expected no negative dimension, got ", tuple(size));
  }
  check_entries("size", size);
}

// Sums of products of two such stay within 64 bits.
constexpr int64_t kLargest = (int64_t{1} << 31) - 1;

inline void check_integers(const char* name, at::IntArrayRef values, size_t count, int64_t least) {
  bool good = values.size() == count;
  for (const int64_t v : values) {
    good = good && v >= least && v <= kLargest;
  }
  TORCH_CHECK_VALUE(good, name, ": expected ", count, " integers from ", least, " to ", kLargest, ", got ",
                    tuple(values));
}

// A freed storage has fewer bytes than the tensor's elements take: FSDP2 frees a parameter's while autograd still has
// it.
inline void check_memory(const char* name, const at::Tensor& x) {
  if (x.numel() == 0) {
    return;
  }
  int64_t end = x.storage_offset() + 1;
  for (int64_t d = 0; d < x.dim(); ++d) {
    end += (x.size(d) - 1) * x.stride(d);
  }
  TORCH_CHECK_VALUE(
      static_cast<size_t>(end) * x.element_size() <= x.storage().nbytes(), name,
      ": expected a tensor with memory, got one whose storage has been freed (FSDP2's reshard_after_forward with "
      "set_unshard_in_backward(False)?)");
}

// Of an op's first tensor, which says the device.
inline DType check_floating(const char* name, const at::Tensor& x) {
  const DType dtype = to_dtype(name, x.scalar_type());
  check_memory(name, x);
  return dtype;
}

inline void check_device(const char* name, const at::Tensor& x, at::Device device) {
  TORCH_CHECK_VALUE(x.device() == device, name, ": expected a tensor on ", device, ", got one on ", x.device());
  check_memory(name, x);
}

inline void check_key(const at::Tensor& key, at::Device device) {
  TORCH_CHECK_TYPE(key.scalar_type() == at::kLong, "key: expected int64, got ", dtype_name(key.scalar_type()));
  TORCH_CHECK_VALUE(key.dim() == 1 && key.numel() == 3, "key: expected shape (3,), got ", tuple(key.sizes()));
  check_device("key", key, device);
  // A version in device memory is not worth a synchronisation.
  if (key.is_cpu()) {
    const int64_t version = *key.const_data_ptr<int64_t>();
    TORCH_CHECK_VALUE(version >= 1 && version <= kLayoutVersion, "key: expected layout version 1 or ", kLayoutVersion,
                      ", got ", version);
  }
}

inline void check_signs(const at::Tensor& signs, at::IntArrayRef size, at::Device device) {
  TORCH_CHECK_TYPE(signs.scalar_type() == at::kInt, "signs: expected int32, got ", dtype_name(signs.scalar_type()));
  const int64_t rows = rows_of(size);
  const int64_t shape[] = {2 * rows + sign_tiles(rows), sign_words(columns_of(size))};
  TORCH_CHECK_VALUE(signs.sizes().equals(shape), "signs: expected shape ", tuple(shape), " for size ", tuple(size),
                    ", got ", tuple(signs.sizes()));
  check_device("signs", signs, device);
}

inline Entries to_entries(c10::string_view entries) {
  if (entries == "constant") {
    return Entries::Constant;
  }
  if (entries == "stored") {
    return Entries::Stored;
  }
  if (entries == "uniform") {
    return Entries::Uniform;
  }
  TORCH_CHECK_VALUE(entries == "normal", "entries: expected one of ('constant', 'stored', 'uniform', 'normal'), got '",
                    entries, "'");
  return Entries::Normal;
}

// The feedback arguments of an op, checked to be one cell of the table in feedback.h.
struct FeedbackArgs {
  const std::optional<at::Tensor>& weight;
  const std::optional<at::Tensor>& signs;
  const std::optional<at::Tensor>& magnitude;
  const std::optional<at::Tensor>& key;
  c10::string_view entries;
  double scale;
  at::IntArrayRef size;

  void check(at::Device device) const {
    TORCH_CHECK_VALUE(!(weight && signs), "signs: expected None where weight is given, got both");
    const Entries e = to_entries(entries);
    TORCH_CHECK_VALUE(std::isfinite(scale), "scale: expected a finite number, got ", scale);
    const bool stored = e == Entries::Stored;
    TORCH_CHECK_VALUE(magnitude.has_value() == stored, "magnitude: expected ", stored ? "a tensor" : "None",
                      " with entries='", entries, "', got ", stored ? "None" : "a tensor");
    TORCH_CHECK_VALUE(!(stored && key), "key: expected None with entries='stored', got a tensor");
    TORCH_CHECK_VALUE(key || stored || e == Entries::Constant, "key: expected a tensor with entries='", entries,
                      "', got None");
    if (e == Entries::Constant) {
      const int given = weight.has_value() + signs.has_value() + key.has_value();
      TORCH_CHECK_VALUE(given == 1,
                        "entries: expected exactly one of weight, signs and key with entries='constant', got ", given,
                        " of them");
    }
    check_size(size);
    check_operand("weight", weight, device);
    check_operand("magnitude", magnitude, device);
    if (signs) {
      check_signs(*signs, size, device);
    }
    if (key) {
      check_key(*key, device);
    }
  }

  // Whether B, in `dtype`, is the stored tensor as it lies there.
  bool plain(at::ScalarType dtype) const {
    return magnitude && !weight && !signs && scale == 1 && magnitude->scalar_type() == dtype;
  }

 private:
  void check_operand(const char* name, const std::optional<at::Tensor>& x, at::Device device) const {
    if (x) {
      to_dtype(name, x->scalar_type());
      TORCH_CHECK_VALUE(x->sizes().equals(size), name, ": expected shape ", tuple(size), ", got ", tuple(x->sizes()));
      check_device(name, *x, device);
    }
  }
};

}  // namespace bioplaus
