// Included before every .cpp of csrc/cuda, for tests: its ops register on the CPU, in a namespace of their own.
#include <ATen/core/Tensor.h>
#include <ATen/core/enum_tag.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/ScalarType.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#undef TORCH_LIBRARY
#define TORCH_LIBRARY(ns, m)                                                                                   \
  static void define_ops(torch::Library&);                                                                     \
  static const torch::detail::TorchLibraryInit host_library(torch::Library::DEF, &define_ops, "bioplaus_host", \
                                                            std::nullopt, __FILE__, __LINE__);                 \
  void define_ops(torch::Library& m)
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(ns, key, m) _TORCH_LIBRARY_IMPL(bioplaus_host, CPU, m, C10_UID)

#define is_cuda is_cpu
#define kCUDA kCPU
