#include <ATen/core/enum_tag.h>
#include <torch/library.h>

// Every op of the library. Kernels register beside their code, for their dispatch key; the fakes and, for every other
// device, the reference are registered from Python.
TORCH_LIBRARY(bioplaus, m) {
  // Signs of W, one bit each; layout in common/packed_signs.h.
  m.def("pack_signs(Tensor weight) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("unpack_signs(Tensor signs, SymInt[] size, *, ScalarType dtype) -> Tensor", {at::Tag::pt2_compliant_tag});

  // The key of a draw that changes exactly when W changes.
  m.def("redraw_key(Tensor key, Tensor weight) -> Tensor", {at::Tag::pt2_compliant_tag});

  // B itself, and the product grad_output · B, from the feedback arguments: common/feedback.h.
  m.def(
      "feedback_weight(Tensor? weight, Tensor? signs, Tensor? magnitude, Tensor? key, str entries, float scale, "
      "SymInt[] size, *, ScalarType dtype) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "feedback_mm(Tensor grad_output, Tensor? weight, Tensor? signs, Tensor? magnitude, Tensor? key, str entries, "
      "float scale, SymInt in_features) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  // dX of a convolution by B, weight_size (O, C, *kernel), in one group.
  m.def(
      "feedback_conv(Tensor grad_output, Tensor? weight, Tensor? signs, Tensor? magnitude, Tensor? key, str entries, "
      "float scale, SymInt[] weight_size, SymInt[] input_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
  // Both by the way named, of ±s: "digits" or "tables" on a CPU, where a convolution's digits are float32's; a product
  // in float32 on CUDA: "digits", "int_mm", or "formed" of anything.
  m.def(
      "feedback_mm_by(Tensor grad_output, Tensor? weight, Tensor? signs, Tensor? magnitude, Tensor? key, str entries, "
      "float scale, SymInt in_features, str way) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "feedback_conv_by(Tensor grad_output, Tensor? weight, Tensor? signs, Tensor? magnitude, Tensor? key, "
      "str entries, float scale, SymInt[] weight_size, SymInt[] input_size, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, str way) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  // dW of a convolution in one group.
  m.def(
      "conv_backward_weight(Tensor grad_output, Tensor input, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation) -> Tensor",
      {at::Tag::pt2_compliant_tag});

  // Locally-connected layers, weights (*out, O, *kernel, C/groups).
  m.def(
      "lc_forward(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
      "SymInt groups) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lc_backward_input(Tensor grad_output, Tensor? weight, Tensor? signs, Tensor? magnitude, Tensor? key, "
      "str entries, float scale, SymInt[] weight_size, SymInt[] input_size, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, SymInt groups) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lc_backward_weight(Tensor grad_output, Tensor input, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, SymInt groups) -> Tensor",
      {at::Tag::pt2_compliant_tag});

  // The loop over time of a recurrent layer, and back through it: the output, the last states, what the backward reads
  // (gates and cells); the gradients of the input, the first states, the weight, the bias and the projection.
  m.def(
      "recurrent_forward(Tensor input, Tensor hidden, Tensor? cell, Tensor weight, Tensor? bias, Tensor? projection, "
      "Tensor? batch_sizes, str mode, bool reverse) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "recurrent_backward(Tensor grad_output, Tensor grad_hidden, Tensor? grad_cell, Tensor output, Tensor gates, "
      "Tensor cells, Tensor hidden, Tensor? cell, Tensor? feedback, Tensor? projection, Tensor? batch_sizes, str mode, "
      "bool reverse, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}
