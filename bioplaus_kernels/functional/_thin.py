"""Locally-connected products of thin blocks that do not overlap, on the CPU: one input channel, stride = kernel.

With few outputs a position, as in genomics, they are elementwise, where the general kernel pays for each of up to
millions of positions. `python -m bench run --op locally_connected --match "genomic|kernel 1"` compares.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import backends, ops
from ..backends.reference import checks
from ..backends.reference.lc import output_size
from ._common import Arguments

# Where the elementwise products were faster: outputs of a position; positions times taps from which the calls do not
# count; samples, whose sums are one sequence; outputs times samples of the forward product, which sums short rows.
_OUTPUTS, _INPUTS, _SAMPLES, _FORWARD = 4, 4096, 256, 16


def _is_thin(x: Tensor, shape: torch.Size, geometry: Sequence[Any]) -> bool:
    (stride, padding, dilation, groups), d = geometry, len(geometry[0])
    kernel = shape[d + 1 : -1]
    return (
        shape[-1] == groups == 1
        and 0 < shape[d] <= _OUTPUTS
        and shape.numel() >= _INPUTS * shape[d]
        and (list(stride) == list(kernel) and not any(padding))
        and (kernel.numel() == 1 or (d == 1 and dilation[0] == 1))
        and 0 < x.shape[0] <= _SAMPLES
        and (x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64))
        and backends.chosen() is None
        and not is_compiling()
    )


def _patches(x: Tensor, positions: int, taps: int) -> Tensor:
    # (N, P, k) without what the stride leaves unread at the end.
    return x.flatten(1)[:, : positions * taps].unflatten(1, (positions, taps))


def _blocks(weight: Tensor, d: int) -> Tensor:
    # A view (O, P, k).
    return weight.flatten(d + 1).flatten(0, d - 1).transpose(0, 1)


def lc_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """`ops.lc_forward`."""
    d = len(geometry[0])
    if not (_is_thin(x, weight.shape, geometry) and x.shape[0] * weight.shape[d] <= _FORWARD):
        return ops.lc_forward(x, weight, bias, *geometry)
    out, kernel = weight.shape[:d], weight.shape[d + 1 : -1]
    checks.lc_shapes(weight.shape, x.shape[2:], output_size(x.shape[2:], kernel, *geometry[:3]), 1, x.shape[1])
    if bias is not None:
        checks.shape("bias", bias, weight.shape[: d + 1] if bias.dim() > 1 else (weight.shape[d],))
    blocks = _blocks(weight, d)
    patches = _patches(x, *blocks.shape[1:])
    y = torch.stack([(patches * block).sum(2) for block in blocks], 1).unflatten(2, out)
    if bias is not None:
        y += bias.movedim(-1, 0) if bias.dim() > 1 else bias.reshape(-1, *[1] * d)
    return y


def lc_backward_input(
    grad_output: Tensor, feedback: Arguments, shape: torch.Size, input_size: torch.Size, *geometry: Any
) -> Tensor:
    """`ops.lc_backward_input`, B by the ops' feedback arguments."""
    d = len(geometry[0])
    if not _is_thin(grad_output, shape, geometry):
        return ops.lc_backward_input(grad_output, *feedback, shape, input_size, *geometry)
    b = ops.feedback_weight(*feedback, shape, dtype=grad_output.dtype)
    first, *others = zip(grad_output.flatten(2).unsqueeze(3).unbind(1), _blocks(b, d), strict=True)
    x = torch.mul(*first)
    for y, block in others:
        x.addcmul_(y, block)
    x = x.flatten(1)
    left = torch.Size(input_size).numel() - x.shape[1]
    return (torch.nn.functional.pad(x, (0, left)) if left else x).reshape(x.shape[0], 1, *input_size)


def lc_backward_weight(grad_output: Tensor, input: Tensor, kernel: Sequence[int], *geometry: Any) -> Tensor:
    """`ops.lc_backward_weight`."""
    d, out = len(geometry[0]), grad_output.shape[2:]
    shape = torch.Size((*out, grad_output.shape[1], *kernel, input.shape[1]))
    if not _is_thin(input, shape, geometry):
        return ops.lc_backward_weight(grad_output, input, kernel, *geometry)
    weight = input.new_zeros(shape)
    blocks = _blocks(weight, d)
    for x, sample in zip(_patches(input, *blocks.shape[1:]), grad_output.flatten(2).unsqueeze(3), strict=True):
        for block, y in zip(blocks, sample, strict=True):
            block.addcmul_(x, y)
    return weight
