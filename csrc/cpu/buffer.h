// What the host code of products shares.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "lc.h"

namespace bioplaus {

// rows × cols, `ld_to` and `ld_from` elements apart, from one dtype to the same or between float32 and a half type.
inline void copy_rows(void* to, DType to_dtype, int64_t ld_to, const void* from, DType from_dtype, int64_t ld_from,
                      int64_t rows, int64_t cols) {
  BK_PICK(lc_copy)({to, from, to_dtype, from_dtype, {1, rows, cols}, {0, ld_to, 1}, {0, ld_from, 1}});
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 0, step, 2·step …
inline std::vector<int64_t> steps(int64_t count, int64_t step) {
  std::vector<int64_t> x(count);
  for (int64_t i = 0; i < count; ++i) {
    x[i] = i * step;
  }
  return x;
}

// Memory for one thread's use, aligned as every tensor's is; a small one costs no allocation.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (bytes > static_cast<int64_t>(sizeof small_)) {
      memory_ = at::empty({bytes}, at::kByte);
    }
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return reinterpret_cast<T*>(memory_.defined() ? memory_.mutable_data_ptr<uint8_t>() : small_); }

 private:
  alignas(64) mutable uint8_t small_[8192];
  at::Tensor memory_;
};

}  // namespace bioplaus
