"""The three products of a locally-connected (untied convolution) layer in 1, 2 or 3 dimensions.

Shapes, for d spatial dimensions, G groups and C, O channels:

    input (N, C, *in)   weight (*out, O, *kernel, C/G)   output (N, O, *out)   bias (*out, O) or (O)
    out = floor((in + before + after - dilation * (kernel - 1) - 1) / stride) + 1

`patches` writes the gather once; what is left is a batch of small matrix products, one a position and group.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .feedback_weight import feedback_weight


def output_size(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Spatial size of the output; `padding` is (before, after) of each dimension, in spatial order."""
    return [
        (size + before + after - d * (k - 1) - 1) // s + 1
        for size, k, s, before, after, d in zip(
            input_size, kernel_size, stride, padding[::2], padding[1::2], dilation, strict=True
        )
    ]


def memory_format(x: Tensor) -> torch.memory_format:
    """Format of an op's result: channels-last where the activation it is given is, else contiguous."""
    if torch._C._are_functorch_transforms_active():
        # vmap's tensors have no other.
        return torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _pad(padding: Sequence[int]) -> list[int]:
    # F.pad wants the last dimension first.
    return [p for pair in zip(padding[-2::-2], padding[::-2], strict=True) for p in pair]


def tap_index(
    out: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], device: torch.device
) -> list[Tensor]:
    """For each dimension the padded input coordinate of (position, tap), broadcastable over (*out, *kernel)."""
    d, index = len(out), []
    for dim in range(d):
        taps = torch.arange(out[dim], device=device)[:, None] * stride[dim]
        taps = taps + torch.arange(kernel[dim], device=device) * dilation[dim]
        shape = [1] * (2 * d)
        shape[dim], shape[d + dim] = out[dim], kernel[dim]
        index.append(taps.reshape(shape))
    return index


def patches(
    input: Tensor,
    out: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """What each position sees: (positions, groups, N, taps * C/G), the channel innermost as in the weight."""
    n, c = input.shape[:2]
    x = F.pad(input.movedim(1, -1), [0, 0, *_pad(padding)])
    index: list[Any] = [slice(None), *tap_index(out, kernel, stride, dilation, input.device)]
    x = x[tuple(index)]
    x = x.reshape(n, math.prod(out), math.prod(kernel), groups, c // groups)
    return x.permute(1, 3, 0, 2, 4).reshape(math.prod(out), groups, n, math.prod(kernel) * (c // groups))


def _blocks(weight: Tensor, d: int, groups: int) -> Tensor:
    """Weights as (positions, groups, O/G, taps * C/G)."""
    o = weight.shape[d]
    return weight.reshape(math.prod(weight.shape[:d]), groups, o // groups, math.prod(weight.shape[d + 1 :]))


def _grad_blocks(grad_output: Tensor, groups: int) -> Tensor:
    """Output gradients as (positions, groups, N, O/G)."""
    n, o = grad_output.shape[:2]
    positions = math.prod(grad_output.shape[2:])
    return grad_output.reshape(n, groups, o // groups, positions).permute(3, 1, 0, 2)


def lc_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """y[n, o, p] = bias[p, o] + sum over t, c of weight[p, o, t, c] * x[n, c, p * stride + t * dilation - before]."""
    d, acc = len(stride), _accumulate_dtype(input.dtype)
    checks.floating("input", input)
    checks.rank("input", input, d + 2)
    checks.rank("weight", weight, 2 * d + 2)
    out, o, kernel = weight.shape[:d], weight.shape[d], weight.shape[d + 1 : -1]
    checks.geometry(stride, padding, dilation, groups, kernel)
    expected = output_size(input.shape[2:], kernel, stride, padding, dilation)
    checks.lc_shapes(weight.shape, input.shape[2:], expected, groups, input.shape[1])
    checks.same("weight", weight, input)
    if bias is not None:
        checks.same("bias", bias, input)
        checks.shape("bias", bias, (*out, o) if bias.dim() > 1 else (o,))
    x = patches(input, out, kernel, stride, padding, dilation, groups)
    y = torch.matmul(x.to(acc), _blocks(weight, d, groups).to(acc).transpose(-1, -2))
    y = y.permute(2, 1, 3, 0).reshape(input.shape[0], o, *out)
    if bias is not None:
        y = y + (bias.movedim(-1, 0) if bias.dim() > 1 else bias.reshape(-1, *[1] * d)).to(acc)
    return y.to(input.dtype).contiguous(memory_format=memory_format(input))


def lc_backward_input(
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
    groups: int,
) -> Tensor:
    """dx: each position's block of B, transposed, times its output gradient, summed where patches overlap."""
    d = len(stride)
    checks.floating("grad_output", grad_output)
    checks.rank("grad_output", grad_output, d + 2)
    out, kernel = weight_size[:d], weight_size[d + 1 : -1]
    checks.geometry(stride, padding, dilation, groups, kernel)
    checks.lc_shapes(weight_size, input_size, output_size(input_size, kernel, stride, padding, dilation), groups)
    checks.shape("grad_output", grad_output, (grad_output.shape[0], weight_size[d], *out))
    b = feedback_weight(weight, signs, magnitude, key, entries, scale, weight_size, dtype=grad_output.dtype)
    return lc_transpose(grad_output, b, input_size, stride, padding, dilation, groups)


def lc_transpose(
    input: Tensor,
    weight: Tensor,
    output_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`lc_backward_input` of checked arguments with B at hand, which autograd differentiates."""
    d, acc = len(stride), _accumulate_dtype(input.dtype)
    out, kernel = weight.shape[:d], weight.shape[d + 1 : -1]
    n, c = input.shape[0], weight.shape[-1] * groups
    x = torch.matmul(_grad_blocks(input, groups).to(acc), _blocks(weight, d, groups).to(acc))
    x = x.reshape(math.prod(out), groups, n, math.prod(kernel), c // groups).permute(2, 0, 3, 1, 4)
    x = x.reshape(n, *out, *kernel, c)
    padded = [size + a + b for size, a, b in zip(output_size, padding[::2], padding[1::2], strict=True)]
    strides = [math.prod(padded[dim + 1 :]) for dim in range(d)]
    index = tap_index(out, kernel, stride, dilation, input.device)
    flat = sum((i * s for i, s in zip(index, strides, strict=True)), torch.zeros_like(index[0]))
    total = x.new_zeros(n, math.prod(padded), c)
    # Not index_add, of which the TorchScript exporter to ONNX makes a sum that keeps one of equal indices.
    where = flat.reshape(1, -1, 1).expand(n, -1, c)
    total = total.scatter_add(1, where, x.reshape(n, flat.numel(), c))
    total = total.reshape(n, *padded, c)
    total = F.pad(total, [0, 0, *(-p for p in _pad(padding))])
    return total.permute(0, d + 1, *range(1, d + 1)).to(input.dtype).contiguous(memory_format=memory_format(input))


def lc_backward_weight(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """dW[p, o, t, c] = sum over n of grad_output[n, o, p] * input[n, c, p * stride + t * dilation - before]."""
    d, acc = len(stride), _accumulate_dtype(grad_output.dtype)
    checks.floating("input", input)
    checks.same("grad_output", grad_output, input)
    checks.rank("input", input, d + 2)
    checks.geometry(stride, padding, dilation, groups, kernel_size)
    if input.shape[1] % groups:
        checks.fail("groups", f"a divisor of the {input.shape[1]} input channels", groups)
    o, out, c = grad_output.shape[1], grad_output.shape[2:], input.shape[1]
    expected = output_size(input.shape[2:], kernel_size, stride, padding, dilation)
    checks.lc_shapes((*expected, o, *kernel_size, c // groups), input.shape[2:], expected, groups)
    checks.shape("grad_output", grad_output, (input.shape[0], o, *expected))
    x = patches(input, out, kernel_size, stride, padding, dilation, groups)
    grad = torch.matmul(_grad_blocks(grad_output, groups).to(acc).transpose(-1, -2), x.to(acc))
    return grad.reshape(*out, o, *kernel_size, c // groups).to(grad_output.dtype)
