// Locally-connected ops on the CPU: three products per position p and group, W_p (O × K) being the position's block of
// weights, K = taps · channels, X_p (K × N) the patch it sees, dY_p its output gradient:
//
//     forward          Y_pᵀ (O × N) = W_p X_p       X_p gathered with the batch innermost, W_p read in place
//     input gradient   (N × K) = dY_p B_p           B_p in place, formed block by block, or its signs alone (tables.h);
//                                                   added to the input's rows
//     weight gradient  dW_p (O × K) = dY_pᵀ X_pᵀ    X_pᵀ gathered with the channel innermost, dW_p written in place
//
// so that each weight is read, or written, once, as long contiguous runs, and never copied or transposed in float32.
// Rows of the activations are brought into the product's layout in a small cache of rows; there is no im2col tensor.
//
// Every output element is formed by one thread in an order that the geometry alone decides: the same bits for any
// number of threads, with oneDNN's micro-kernel. In the input gradient a thread owns rows of the input, and visits the
// positions that reach them.
//
// Roofline, float32: max(2·N operations per weight at the tile product's speed, 4 bytes per weight at memory
// bandwidth); the weight gradient writes its 4 bytes into a fresh tensor, is bound by page faults there and asks for
// huge pages. With few channels the activations are as large as the weights, and changing their layout takes its time.
// The share reached: `python -m bench run --op locally_connected`.
// Half types are multiplied as they are where half_gemm does it: X or B is brought into pairs along the sum.
// Else, for batches of at most 4 and for odd channels, they are widened block by block and multiplied in float32.
#include "lc.h"

#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "lc_backward_input.h"
#include "lc_backward_weight.h"
#include "lc_forward.h"

namespace bioplaus {

namespace {

using namespace lc;

// Calls f with the kind of product for `dtype`; `pairs`: whether it may be one of pairs, of which the operand's size is
// a multiple.
template <typename F>
void with_product(at::ScalarType dtype, int64_t batch, bool pairs, const F& f) {
  if (dtype == at::kDouble) {
    f(Plain<double>());
  } else if (batch > kFewSamples && pairs && half_gemm_available(dtype)) {
    f(Paired());
  } else {
    f(Plain<float>());
  }
}

// Asks for huge pages in a large new tensor: writing one is bound by page faults.
at::Tensor with_huge_pages(at::Tensor x) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr()) / kPage * kPage + kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(x.mutable_data_ptr()) + x.nbytes()) / kPage * kPage;
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return x;
}

at::Tensor empty_activation(const at::Tensor& like, int64_t channels, at::IntArrayRef spatial) {
  LcSize size{like.size(0), channels};
  size.append(spatial.begin(), spatial.end());
  return with_huge_pages(at::empty(size, like.options(), lc_memory_format(like)));
}

at::Tensor lc_forward_cpu(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                          at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const LcArgs args{stride, padding, dilation, groups};
  LcGeometry g = args.forward(input, weight, bias);
  const bool per_position = bias && bias->dim() > 1;
  const at::Tensor b = bias ? bias->contiguous() : at::Tensor();
  const at::Tensor output = empty_activation(input, groups * g.o, weight.sizes().slice(0, args.dims()));
  if (output.numel() == 0) {
    return output;
  }
  const at::Tensor w = weight.contiguous();
  Activation x = view(input), y = view(output);
  if (one_row(g)) {
    swap_dims(g);
    swap_dims(x);
    swap_dims(y);
  }
  with_product(input.scalar_type(), g.n, g.c % 2 == 0, [&]<typename P>(P) {
    const Forward<P> op(g, x, y, w, b, per_position);
    run_tasks<ForwardTask<P>>(op, op.units());
  });
  return output;
}

at::Tensor lc_backward_input_cpu(const at::Tensor& grad_output, const std::optional<at::Tensor>& weight,
                                 const std::optional<at::Tensor>& signs, const std::optional<at::Tensor>& magnitude,
                                 const std::optional<at::Tensor>& key, c10::string_view entries, double scale,
                                 at::IntArrayRef weight_size, at::IntArrayRef input_size, at::IntArrayRef stride,
                                 at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const LcArgs args{stride, padding, dilation, groups};
  const DType dtype = to_dtype("grad_output", grad_output.scalar_type());
  LcGeometry g = args.backward_input(grad_output, weight_size, input_size);
  const FeedbackArgs feedback{weight, signs, magnitude, key, entries, scale, weight_size};
  feedback.check(grad_output.device());

  const at::Tensor grad_input = empty_activation(grad_output, groups * g.c, input_size);
  if (grad_input.numel() == 0 || g.o == 0) {
    return grad_input.zero_();
  }
  const bool plain = feedback.plain(grad_output.scalar_type()) && magnitude->is_contiguous();
  Formula formula(feedback);
  formula.p.out.dtype = dtype;
  Activation dy = view(grad_output), dx = view(grad_input);
  const int64_t k = lc_columns(g);
  if (one_row(g)) {
    swap_dims(g);
    swap_dims(dy);
    swap_dims(dx);
  }
  with_product(grad_output.scalar_type(), g.n, g.o % 2 == 0 && !takes_tables(g, formula.p), [&]<typename P>(P) {
    const BackwardInput<P> op(
        g, dy, dx,
        {plain ? static_cast<const char*>(magnitude->const_data_ptr()) : nullptr, dtype, &formula.p, groups * g.o, k});
    run_tasks<BackwardInputTask<P>>(op, op.units());
  });
  return grad_input;
}

at::Tensor lc_backward_weight_cpu(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef kernel_size,
                                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                  int64_t groups) {
  const LcArgs args{stride, padding, dilation, groups};
  LcSize size;
  LcGeometry g = args.backward_weight(grad_output, input, kernel_size, size);
  const at::Tensor grad_weight = with_huge_pages(at::empty(size, grad_output.options()));
  if (grad_weight.numel() == 0 || g.n == 0) {
    return grad_weight.zero_();
  }
  Activation dy = view(grad_output), x = view(input);
  if (one_row(g)) {
    swap_dims(g);
    swap_dims(dy);
    swap_dims(x);
  }
  with_product(grad_output.scalar_type(), g.n, true, [&]<typename P>(P) {
    const BackwardWeight<P> op(g, dy, x, static_cast<char*>(grad_weight.mutable_data_ptr()));
    run_tasks<BackwardWeightTask<P>>(op, op.units());
  });
  return grad_weight;
}

}  // namespace

TORCH_LIBRARY_IMPL(bioplaus, CPU, m) {
  m.impl("lc_forward", lc_forward_cpu);
  m.impl("lc_backward_input", lc_backward_input_cpu);
  m.impl("lc_backward_weight", lc_backward_weight_cpu);
}

}  // namespace bioplaus
