"""Convolutions and transposed convolutions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..backends import native
from ..backends.reference import checks
from ..feedback import Operands, conv_fans
from ._common import (
    CUT,
    Arguments,
    Feedback,
    Grads,
    Ints,
    begin,
    check,
    explain,
    explain_channels,
    finish,
    ints,
    is_backprop,
    no_key,
    once,
    resolve,
    saved_feedback,
    without_factors,
)


class _Channels(NamedTuple):
    """The least (out, in) of ±s that beat the vendor's convolution, by `python -m bench run --op convolution`."""

    pointwise: tuple[int, int]
    window: tuple[int, int]


_ALONE = _Channels((64, 64), (32, 32))
# Beside a half type's own instructions.
_BESIDE = _Channels((128, 256), (64, 64))

_CONV: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSE: tuple[Any, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def _has_kernels() -> bool:
    return native.product_level() not in ("", "DEFAULT")


def _least(dtype: torch.dtype) -> _Channels | None:
    # On tile units torch multiplies half types by them.
    on_tiles = native.product_level() == "AMX" and dtype != torch.float32
    if not _has_kernels() or dtype == torch.float64 or on_tiles:
        return None
    return _BESIDE if dtype != torch.float32 and native.half_instructions(dtype) else _ALONE


def _way(ctx: Any, grad_output: Tensor, entries: str, shape: torch.Size) -> str:
    # Of these by a matrix product of the pixels, "product", or as a convolution, "taps", if any.
    least = _least(grad_output.dtype)
    stride, padding, _, transposed, _, groups = ctx.geometry
    if least is None or entries != "constant" or transposed or groups > 1 or grad_output.device.type != "cpu":
        return ""
    pointwise = shape[2:].numel() == 1
    least_out, least_in = least.pointwise if pointwise else least.window
    if shape[0] < least_out or shape[1] < least_in:
        return ""
    moves = any(s > 1 for s in stride) or any(padding)
    return "product" if pointwise and not moves and grad_output.movedim(1, -1).is_contiguous() else "taps"


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        x, w, b = begin(ctx, input, weight, bias, rest[:7])
        ctx.input_shape, ctx.geometry = input.shape, rest[7:]
        return torch.convolution(x, w, b, *ctx.geometry)

    @staticmethod
    @once
    def backward(ctx: Any, grad_output: Tensor, saved: Grads) -> Grads:
        input, feedback, shape = saved_feedback(ctx, saved)
        mask = ctx.needs_input_grad[:3]
        x = w = c = None
        way = _way(ctx, grad_output, feedback[4], shape) if mask[0] else ""
        if way == "product":
            rows = grad_output.movedim(1, -1)
            weight = None if feedback[0] is None else feedback[0].flatten(1)
            product = ops.feedback_mm(rows.flatten(0, -2), weight, *feedback[1:], shape[1])
            x = product.unflatten(0, rows.shape[:-1]).movedim(-1, 1)
        elif way:
            x = ops.feedback_conv(grad_output, *feedback, shape, ctx.input_shape[2:], *ctx.geometry[:3])
        if way:
            mask = (False, *mask[1:])
        if mask[1] and _is_small(ctx, grad_output, shape):
            assert input is not None
            w = ops.conv_backward_weight(grad_output, input, shape[2:], *ctx.geometry[:3])
            c = grad_output.sum((0, *range(2, grad_output.dim()))) if mask[2] else None
            mask = (mask[0], False, False)
        if any(mask):
            # The vendor's backward reads only the shape and the layout of an operand that no wanted gradient needs.
            if input is None:
                input = _unread(grad_output, ctx.input_shape)
            b = (
                _formed(without_factors(feedback, shape), shape, grad_output.dtype)
                if mask[0]
                else _unread(grad_output, shape)
            )
            bias_sizes = [grad_output.shape[1]] if mask[2] else None
            grads = torch.ops.aten.convolution_backward.default(grad_output, input, b, bias_sizes, *ctx.geometry, mask)
            x, w, c = (mine if theirs is None else theirs for mine, theirs in zip((x, w, c), grads, strict=True))
        return finish(ctx, saved, x, w, c)


def _is_small(ctx: Any, grad_output: Tensor, shape: torch.Size) -> bool:
    # Whether a weight gradient sums fewer pixels than there are channels of them. There the vendor's convolution by a
    # kernel of several taps takes up to several times as long as a product of the input's patches, which are fewer than
    # weights. A compiled graph is for any batch.
    *_, transposed, _, groups = ctx.geometry
    return (
        (not transposed and groups == 1 and grad_output.device.type == "cpu")
        and type(grad_output) is Tensor
        and (grad_output.dtype == torch.float32 or (grad_output.dtype != torch.float64 and _has_kernels()))
        and not torch.compiler.is_compiling()
        and shape[2:].numel() > 1
        and grad_output.numel() < shape[0] ** 2
    )


def _formed(feedback: Arguments, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    weight, signs, stored, _, entries, scale = feedback
    whole = weight is None and signs is None and entries == "stored" and scale == 1
    if whole and stored is not None and stored.dtype == dtype:
        return stored
    return ops.feedback_weight(*feedback, shape, dtype=dtype)


def _unread(grad_output: Tensor, shape: torch.Size) -> Tensor:
    # Laid out as grad_output is: the vendor's product brings its operands to one layout.
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(grad_output.dim(), torch.contiguous_format)
    if grad_output.is_contiguous() or not grad_output.is_contiguous(memory_format=form):
        form = torch.contiguous_format
    return torch.empty(shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=form)


def conv_with(
    d: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
    op: Operands,
) -> Tensor:
    """A d-dimensional convolution with the operands of B at hand."""
    check(input, weight, bias)
    dims = input.dim()
    try:
        if op is CUT:
            y: Tensor = _CONV[d - 1](input, weight, bias, stride, padding, dilation, groups)
            return y.detach()
        x = input if dims == d + 2 else input.unsqueeze(0)
        pad = padding
        if isinstance(padding, str):
            x, pad = _same(x, weight, padding, dilation)
        y = _Conv.apply(x, weight, bias, *op, stride, pad, dilation, False, (0,) * d, groups)
    except Exception:
        explain_conv(d, input, weight, bias, padding, dilation, groups)
        raise
    return y if dims == d + 2 else y.squeeze(0)


def explain_conv(
    d: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Raise what is wrong with the tensors of a convolution, if it is found."""
    explain(input, weight, bias, weight.shape[0])
    explain_channels(d, input, weight, weight.shape[1] * groups, weight.shape[0], "out", groups)
    size, spans = input.shape[-d:], [dil * (k - 1) + 1 for k, dil in zip(weight.shape[2:], dilation, strict=True)]
    pads = [2 * p for p in padding] if not isinstance(padding, str) else [(padding == "same") * (s - 1) for s in spans]
    if any(n + p < span for n, p, span in zip(size, pads, spans, strict=True)):
        wanted = f"a padded spatial size of at least the dilated kernel {tuple(spans)}"
        got = padding if isinstance(padding, str) else tuple(padding)
        checks.fail("input", wanted, f"spatial size {tuple(size)} and padding {got}")


def _same(x: Tensor, weight: Tensor, padding: str, dilation: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
    # "same" or "valid" as integers, and the input they apply to: an odd total pads one more at the end, as torch does.
    total = [dil * (k - 1) * (padding == "same") for k, dil in zip(weight.shape[2:], dilation, strict=True)]
    if any(t % 2 for t in total):
        x = F.pad(x, [p for t in reversed(total) for p in (0, t % 2)])
    return x, [t // 2 for t in total]


def _conv(
    d: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints | str,
    dilation: Ints,
    groups: int,
    feedback: Feedback,
    key: Tensor | None,
) -> Tensor:
    if is_backprop(feedback):
        no_key(key)
        try:
            return _CONV[d - 1](input, weight, bias, stride, padding, dilation, groups)
        except Exception:
            _, padding, dilation, groups = geometry(d, weight, stride, padding, dilation, groups)
            explain_conv(d, input, weight, bias, padding, dilation, groups)
            raise
    stride, padding, dilation, groups = geometry(d, weight, stride, padding, dilation, groups)
    op = resolve(feedback, weight, conv_fans(weight, weight.shape[0]), key)
    return conv_with(d, input, weight, bias, stride, padding, dilation, groups, op)


def geometry(
    d: int, weight: Tensor, stride: Ints, padding: Ints | str, dilation: Ints, groups: int
) -> tuple[list[int], list[int] | str, list[int], int]:
    checks.rank("weight", weight, d + 2)
    groups = checks.integer("groups", groups, 1)
    stride, dilation = ints("stride", stride, d, 1), ints("dilation", dilation, d, 1)
    if not isinstance(padding, str):
        padding = ints("padding", padding, d)
    elif padding not in ("same", "valid"):
        checks.fail("padding", "integers, 'same' or 'valid'", repr(padding))
    elif padding == "same" and any(s != 1 for s in stride):
        checks.fail("padding", "integers where stride is not 1", "'same'")
    return stride, padding, dilation, groups


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    feedback: Feedback = None,
    key: Tensor | None = None,
) -> Tensor:
    """F.conv1d whose input gradient uses B, shaped as the weight (out, in/groups, k)."""
    return _conv(1, input, weight, bias, stride, padding, dilation, groups, feedback, key)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    feedback: Feedback = None,
    key: Tensor | None = None,
) -> Tensor:
    """F.conv2d whose input gradient uses B, shaped as the weight (out, in/groups, kh, kw)."""
    return _conv(2, input, weight, bias, stride, padding, dilation, groups, feedback, key)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    feedback: Feedback = None,
    key: Tensor | None = None,
) -> Tensor:
    """F.conv3d whose input gradient uses B, shaped as the weight (out, in/groups, kd, kh, kw)."""
    return _conv(3, input, weight, bias, stride, padding, dilation, groups, feedback, key)


def conv_transpose_with(
    d: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
    op: Operands,
) -> Tensor:
    """A d-dimensional transposed convolution with the operands of B at hand."""
    check(input, weight, bias)
    dims = input.dim()
    try:
        if op is CUT:
            y: Tensor = _TRANSPOSE[d - 1](input, weight, bias, stride, padding, output_padding, groups, dilation)
            return y.detach()
        x = input if dims == d + 2 else input.unsqueeze(0)
        y = _Conv.apply(x, weight, bias, *op, stride, padding, dilation, True, output_padding, groups)
    except Exception:
        _explain_transpose(d, input, weight, bias, stride, padding, output_padding, groups, dilation)
        raise
    return y if dims == d + 2 else y.squeeze(0)


def _explain_transpose(
    d: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> None:
    explain(input, weight, bias, weight.shape[1] * groups)
    explain_channels(d, input, weight, weight.shape[0], weight.shape[0], "in", groups)
    if any(p >= max(s, dil) for p, s, dil in zip(output_padding, stride, dilation, strict=True)):
        wanted = f"less than stride {tuple(stride)} or dilation {tuple(dilation)}"
        checks.fail("output_padding", wanted, tuple(output_padding))
    ends = zip(input.shape[-d:], weight.shape[2:], stride, padding, output_padding, dilation, strict=True)
    out = tuple((n - 1) * s - 2 * p + dil * (k - 1) + extra + 1 for n, k, s, p, extra, dil in ends)
    if min(out) < 1:
        wanted = "a spatial size whose output is at least 1 in every dimension"
        checks.fail("input", wanted, f"spatial size {tuple(input.shape[-d:])}, whose output is {out}")


def _conv_transpose(
    d: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    output_padding: Ints,
    groups: int,
    dilation: Ints,
    feedback: Feedback,
    key: Tensor | None,
) -> Tensor:
    given = stride, padding, output_padding, groups, dilation
    if is_backprop(feedback):
        no_key(key)
        try:
            return _TRANSPOSE[d - 1](input, weight, bias, *given)
        except Exception:
            _explain_transpose(d, input, weight, bias, *transpose_geometry(d, weight, *given))
            raise
    stride, padding, output_padding, groups, dilation = transpose_geometry(d, weight, *given)
    op = resolve(feedback, weight, conv_fans(weight, weight.shape[1] * groups), key)
    return conv_transpose_with(d, input, weight, bias, stride, padding, output_padding, groups, dilation, op)


def transpose_geometry(
    d: int, weight: Tensor, stride: Ints, padding: Ints, output_padding: Ints, groups: int, dilation: Ints
) -> tuple[list[int], list[int], list[int], int, list[int]]:
    checks.rank("weight", weight, d + 2)
    return (
        ints("stride", stride, d, 1),
        ints("padding", padding, d),
        ints("output_padding", output_padding, d),
        checks.integer("groups", groups, 1),
        ints("dilation", dilation, d, 1),
    )


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    feedback: Feedback = None,
    key: Tensor | None = None,
) -> Tensor:
    """F.conv_transpose1d whose input gradient uses B, shaped as the weight (in, out/groups, k)."""
    return _conv_transpose(1, input, weight, bias, stride, padding, output_padding, groups, dilation, feedback, key)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    feedback: Feedback = None,
    key: Tensor | None = None,
) -> Tensor:
    """F.conv_transpose2d whose input gradient uses B, shaped as the weight (in, out/groups, *kernel)."""
    return _conv_transpose(2, input, weight, bias, stride, padding, output_padding, groups, dilation, feedback, key)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    feedback: Feedback = None,
    key: Tensor | None = None,
) -> Tensor:
    """F.conv_transpose3d whose input gradient uses B, shaped as the weight (in, out/groups, *kernel)."""
    return _conv_transpose(3, input, weight, bias, stride, padding, output_padding, groups, dilation, feedback, key)
