"""Locally-connected products and their transposes."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from .. import ops
from ..backends import reference
from ..backends.reference import checks
from ..backends.reference.lc import lc_transpose
from ..feedback import BACKPROP, Operands, lc_fans
from . import _thin
from ._common import (
    CUT,
    Feedback,
    Grads,
    Ints,
    autocast,
    autocasts,
    begin,
    captured,
    explain,
    explain_dimensions,
    finish,
    ints,
    lowered,
    once,
    resolve,
    saved_feedback,
    without_factors,
)

Padding = int | str | Sequence[int] | Sequence[Sequence[int]]


def _bias_grad(ctx: Any, grad_output: Tensor) -> Tensor:
    if ctx.bias_per_position:
        return grad_output.sum(0).movedim(0, -1)
    return grad_output.transpose(0, 1).flatten(1).sum(1)


class _LocallyConnected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        x, w, b = begin(ctx, input, weight, bias, rest[:7])
        ctx.bias_per_position = bias is not None and bias.dim() > 1
        ctx.input_size, ctx.geometry = input.shape[2:], rest[7:]
        return _thin.lc_forward(x, w, b, *ctx.geometry)

    @staticmethod
    @partial(once, twice=True)
    def backward(ctx: Any, grad_output: Tensor, saved: Grads) -> Grads:
        input, feedback, shape = saved_feedback(ctx, saved)
        kernel_size = shape[len(ctx.input_size) + 1 : -1]
        grad_input = grad_weight = grad_bias = None
        # Then to be differentiated, with W for B.
        again = torch.is_grad_enabled()
        if ctx.needs_input_grad[0]:
            if again:
                grad_input = lc_transpose(grad_output, _like(grad_output, saved[1]), ctx.input_size, *ctx.geometry)
            else:
                feedback = without_factors(feedback, shape)
                grad_input = _thin.lc_backward_input(grad_output, feedback, shape, ctx.input_size, *ctx.geometry)
        if input is not None:
            product = reference.lc_backward_weight if again else _thin.lc_backward_weight
            grad_weight = product(grad_output, input, kernel_size, *ctx.geometry)
        if ctx.needs_input_grad[2]:
            grad_bias = _bias_grad(ctx, grad_output)
        return finish(ctx, saved, grad_input, grad_weight, grad_bias)


class _LocallyConnectedTranspose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        x, w, b = begin(ctx, input, weight, bias, rest[:7])
        ctx.bias_per_position = bias is not None and bias.dim() > 1
        output_size, ctx.geometry = rest[7], rest[8:]
        y = ops.lc_backward_input(x, None, None, w, None, "stored", 1.0, w.shape, output_size, *ctx.geometry)
        return _plus(y, b)

    @staticmethod
    @partial(once, twice=True)
    def backward(ctx: Any, grad_output: Tensor, saved: Grads) -> Grads:
        input, feedback, shape = saved_feedback(ctx, saved)
        kernel_size = shape[grad_output.dim() - 1 : -1]
        grad_input = grad_weight = grad_bias = None
        again = torch.is_grad_enabled()
        if ctx.needs_input_grad[0]:
            if again:
                grad_input = reference.lc_forward(grad_output, _like(grad_output, saved[1]), None, *ctx.geometry)
            else:
                b = ops.feedback_weight(*without_factors(feedback, shape), shape, dtype=grad_output.dtype)
                grad_input = ops.lc_forward(grad_output, b, None, *ctx.geometry)
        if input is not None:
            product = reference.lc_backward_weight if again else ops.lc_backward_weight
            grad_weight = product(input, grad_output, kernel_size, *ctx.geometry)
        if ctx.needs_input_grad[2]:
            grad_bias = _bias_grad(ctx, grad_output)
        return finish(ctx, saved, grad_input, grad_weight, grad_bias)


def _like(grad_output: Tensor, weight: Tensor | None) -> Tensor:
    return cast(Tensor, weight).to(grad_output.dtype)


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return y
    return y + (bias.movedim(-1, 0) if bias.dim() > 1 else bias.reshape(-1, *[1] * (y.dim() - 2)))


def _in_standard_operators(op: Operands) -> bool:
    # In a capture, where other machines have none of our ops. It keeps back-propagation's gradient where B = W. And
    # within torch.func, whose transforms know them.
    return op is CUT or (op is BACKPROP and (captured() or torch._C._are_functorch_transforms_active()))


def _within_graph(input: Tensor, op: Operands) -> Tensor:
    # Autocast's copy is what is saved: where the gradient may be differentiated, the graph has to know whose it is.
    if op.role != BACKPROP.role or not autocasts(input):
        return input
    return cast(Tensor, lowered(torch.get_autocast_dtype(input.device.type), input)[0])


def pad_pairs(
    padding: Padding, input_size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """(before, after) of each dimension, flat, from one integer a dimension, nested pairs, "same" or "valid"."""
    d = len(kernel)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            checks.fail("padding", "integers, pairs, 'same' or 'valid'", repr(padding))
        pairs = []
        for size, k, s, dil in zip(input_size, kernel, stride, dilation, strict=True):
            total = max((-(-size // s) - 1) * s + dil * (k - 1) + 1 - size, 0) if padding == "same" else 0
            pairs += [total // 2, total - total // 2]
        return pairs
    if not isinstance(padding, Sequence) or not any(isinstance(p, Sequence) for p in padding):
        return [p for p in ints("padding", cast(Ints, padding), d) for _ in range(2)]
    if len(padding) != d or not all(isinstance(p, Sequence) and len(p) == 2 for p in padding):
        checks.fail("padding", f"{d} pairs (before, after)", repr(padding))
    return [p for pair in cast(Sequence[Sequence[int]], padding) for p in ints("padding", pair, 2)]


def locally_connected_with(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    op: Operands,
) -> Tensor:
    """A locally-connected product with the operands of B at hand; `padding` is flat (before, after) pairs."""
    batched = _batched(len(stride), input, weight, bias)
    x = input if batched else input.unsqueeze(0)
    if _in_standard_operators(op):
        y = reference.lc_forward(*autocast(x, weight, bias), stride, padding, dilation, groups)
        y = y.detach() if op is CUT else y
    else:
        x = _within_graph(x, op)
        y = _LocallyConnected.apply(x, weight, bias, *op, stride, padding, dilation, groups)
    return y if batched else y.squeeze(0)


def _batched(d: int, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    explain(input, weight, bias)
    explain_dimensions(d, input)
    return input.dim() == d + 2


def locally_connected_transpose_with(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    op: Operands,
) -> Tensor:
    """The input gradient of a locally-connected product used forward, y = lc_backward_input(x; V) + c."""
    batched = _batched(len(stride), input, weight, bias)
    x = input if batched else input.unsqueeze(0)
    if _in_standard_operators(op):
        x, weight, bias = autocast(x, weight, bias)
        y = _plus(lc_transpose(x, weight, output_size, stride, padding, dilation, groups), bias)
        y = y.detach() if op is CUT else y
    else:
        x = _within_graph(x, op)
        y = _LocallyConnectedTranspose.apply(x, weight, bias, *op, output_size, stride, padding, dilation, groups)
    return y if batched else y.squeeze(0)


def _locally_connected(
    d: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    groups: int,
    feedback: Feedback,
    key: Tensor | None,
) -> Tensor:
    checks.tensor("input", input)
    explain_dimensions(d, input)
    checks.rank("weight", weight, 2 * d + 2)
    if 0 in weight.shape[d + 1 : -1]:
        checks.fail("weight", "a kernel of at least 1 in every dimension", f"shape {tuple(weight.shape)}")
    groups = checks.integer("groups", groups, 1)
    stride, dilation = ints("stride", stride, d, 1), ints("dilation", dilation, d, 1)
    pairs = pad_pairs(padding, input.shape[-d:], weight.shape[d + 1 : -1], stride, dilation)
    op = resolve(feedback, weight, lc_fans(weight, weight.shape[d]), key)
    return locally_connected_with(input, weight, bias, stride, pairs, dilation, groups, op)


def locally_connected1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    feedback: Feedback = None,
    key: Tensor | None = None,
) -> Tensor:
    """Untied convolution: input (N, C, L), weight (*out, O, k, C/groups), bias (*out, O) or (O), output (N, O, *out).

    `padding`: one integer, a nested pair [(before, after)], "same" (out = ⌈in/stride⌉, odd pad at the end), "valid".
    """
    return _locally_connected(1, input, weight, bias, stride, padding, dilation, groups, feedback, key)


def locally_connected2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    feedback: Feedback = None,
    key: Tensor | None = None,
) -> Tensor:
    """Untied convolution: input (N, C, H, W), weight (*out, O, kh, kw, C/groups), output (N, O, *out); bias as in 1-D.

    `padding`: one integer a dimension, nested (before, after) pairs, "same" (out = ⌈in/stride⌉), "valid".
    """
    return _locally_connected(2, input, weight, bias, stride, padding, dilation, groups, feedback, key)


def locally_connected3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    feedback: Feedback = None,
    key: Tensor | None = None,
) -> Tensor:
    """Untied convolution: input (N, C, D, H, W), weight (*out, O, *kernel, C/groups), output (N, O, *out).

    `padding`: one integer a dimension, nested (before, after) pairs, "same" (out = ⌈in/stride⌉), "valid".
    """
    return _locally_connected(3, input, weight, bias, stride, padding, dilation, groups, feedback, key)
