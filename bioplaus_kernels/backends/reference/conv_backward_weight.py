"""dW of a convolution."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .lc import memory_format


def conv_backward_weight(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """dW (O, C, *kernel) of dY (N, O, *out) and X (N, C, *in), in the memory format of X.

    dW[o, c, k] = sum over n and p of dY[n, o, p] X[n, c, p stride - padding + k dilation]; one group, one integer a
    dimension for each of stride, padding and dilation.
    """
    checks.floating("input", input)
    checks.same("grad_output", grad_output, input)
    d = input.dim() - 2
    if d not in (1, 2, 3):
        checks.fail("input", "3, 4 or 5 dimensions", f"shape {tuple(input.shape)}")
    checks.rank("grad_output", grad_output, d + 2)
    checks.integers("kernel_size", kernel_size, d, 1)
    size = (grad_output.shape[1], input.shape[1], *kernel_size)
    checks.volume("kernel_size", size)
    checks.conv(grad_output, size, input.shape[2:], stride, padding, dilation, "input")
    if input.shape[0] != grad_output.shape[0]:
        checks.fail("input", f"{grad_output.shape[0]} samples, as grad_output has", input.shape[0])
    if grad_output.numel() == 0 or input.numel() == 0:
        return grad_output.new_zeros(size)
    weight = grad_output.new_empty(size)
    gradients = torch.ops.aten.convolution_backward.default(
        grad_output, input, weight, None, stride, padding, dilation, False, [0] * d, 1, [False, True, False]
    )
    return gradients[1].contiguous(memory_format=memory_format(input))
