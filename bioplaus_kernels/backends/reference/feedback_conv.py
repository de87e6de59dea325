"""dX of a convolution whose backward weight is a feedback matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .feedback_weight import feedback_weight


def feedback_conv(
    grad_output: Tensor,
    weight: Tensor | None,
    signs: Tensor | None,
    magnitude: Tensor | None,
    key: Tensor | None,
    entries: str,
    scale: float,
    weight_size: Sequence[int],
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """dX (N, C, *in) of dY (N, O, *out) and B (O, C, *kernel): B in W's place in the input gradient of a convolution.

    dX[n, c, x] = sum over o and k of dY[n, o, (x + padding - k dilation) / stride] B[o, c, k], where that is whole; one
    group, one integer a dimension for each of stride, padding and dilation. B as in `feedback_weight`.
    """
    d = checks.conv(grad_output, weight_size, input_size, stride, padding, dilation)
    b = feedback_weight(weight, signs, magnitude, key, entries, scale, weight_size, dtype=grad_output.dtype)
    input = grad_output.new_empty(1).expand(grad_output.shape[0], weight_size[1], *input_size)
    gradients = torch.ops.aten.convolution_backward.default(
        grad_output, input, b, None, stride, padding, dilation, False, [0] * d, 1, [True, False, False]
    )
    return gradients[0]
