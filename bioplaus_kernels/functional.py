"""Functional layers: torch.nn.functional's, with `feedback=` for the input gradient.

`feedback` is a rule, its name, or a tensor that is B itself (the weight's shape). Forward and weight gradient are the
namesake's. Rules that draw (`fa`, `frsf`, `brsf`) need `key=`, from `bk.feedback.feedback_key(seed, name)`.
Arguments that do not fit raise ValueError or TypeError; double backward and torch.func transforms raise too.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .backends.reference import checks
from .feedback import (
    BACKPROP,
    Backprop,
    Fans,
    Operands,
    Rule,
    SignConcordance,
    SignedInit,
    as_rule,
    conv_fans,
    is_seeded,
    lc_fans,
    linear_fans,
    operands,
    plan,
    root_mean_square,
)

# weight, signs, magnitude, key, entries, scale: what every op takes for B.
Arguments = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, str, float]
Feedback = Rule | str | Tensor | None
Ints = int | Sequence[int]
Padding = int | str | Sequence[int] | Sequence[Sequence[int]]


def _autocasts(input: Tensor) -> bool:
    # The meta device has no autocast.
    return torch._C._is_any_autocast_enabled() and not input.is_meta and torch.is_autocast_enabled(input.device.type)


Grads = tuple[Tensor | None, ...]


class _Refuse(torch.autograd.Function):
    # The gradients of a backward, tied to the tensors they came from: differentiating them raises, wherever it starts.
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "double backward: the input gradient of a layer with feedback is not the derivative of its output, so it "
            "cannot be differentiated again; use feedback=None where create_graph=True is needed"
        )


def _once(backward: Callable[..., Grads]) -> Callable[..., Grads]:
    # torch's once_differentiable raises where .backward() reaches its outputs; autograd.grad goes round it in silence.
    @functools.wraps(backward)
    def wrapper(ctx: Any, grad_output: Tensor) -> Grads:
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return backward(ctx, grad_output, saved)
        with torch.no_grad():
            grads = backward(ctx, grad_output, saved)
        given = [grad for grad in grads if grad is not None]
        sources = (grad_output, *(t for t in saved if t is not None and t.is_floating_point()))
        tied = iter(_Refuse.apply(len(given), *given, *sources))
        return tuple(None if grad is None else next(tied) for grad in grads)

    return wrapper


# The Functions below take (input, weight, bias, *Operands, *geometry) and save what their backward reads, nothing else.


def _begin(
    ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, feedback: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    # The operands of the forward product: under autocast in its dtype, by torch's own rule, which leaves float64 alone.
    x, w, b, ctx.dtypes = input, weight, bias, None
    if _autocasts(input):
        dtype = torch.get_autocast_dtype(input.device.type)

        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

        x, w, b = cast(input), cast(weight), None if bias is None else cast(bias)
        ctx.dtypes = input.dtype, weight.dtype, None if bias is None else bias.dtype
    role, signs, magnitude, key, entries, scale, rescale = feedback
    ctx.feedback = role, entries, scale, weight.shape
    needs_input, needs_weight = ctx.needs_input_grad[:2]
    if needs_input:
        ctx.save_for_backward(x if needs_weight else None, weight if role else None, signs, magnitude, key, rescale)
    else:
        ctx.save_for_backward(x if needs_weight else None, None, None, None, None, None)
    return x, w, b


def _saved(ctx: Any, saved: Grads) -> tuple[Tensor | None, Arguments, torch.Size]:
    # The input (None where no weight gradient is wanted), the ops' feedback arguments, and the weight's shape.
    input, weight, signs, magnitude, key, _ = saved
    role, entries, scale, shape = ctx.feedback
    if role == "magnitude":
        weight, magnitude = None, weight
    return input, (weight, signs, magnitude, key, entries, scale), shape


def _bias_grad(ctx: Any, grad_output: Tensor) -> Tensor:
    if ctx.bias_per_position:
        return grad_output.sum(0).movedim(0, -1)
    return grad_output.transpose(0, 1).flatten(1).sum(1)


def _grads(
    ctx: Any, saved: Grads, grad_input: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None
) -> Grads:
    rescale = saved[-1]
    if grad_input is not None and rescale is not None:
        grad_input = grad_input * rescale
    grads = [grad_input, grad_weight, grad_bias]
    if ctx.dtypes is not None:
        grads = [g if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
    return *grads, *(None,) * (len(ctx.needs_input_grad) - 3)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *feedback: Any) -> Tensor:
        x, w, b = _begin(ctx, input, weight, bias, feedback)
        return F.linear(x, w, b)

    @staticmethod
    @_once
    def backward(ctx: Any, grad_output: Tensor, saved: Grads) -> Grads:
        input, feedback, shape = _saved(ctx, saved)
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = ops.feedback_mm(grad_output, *feedback, shape[1])
        if input is not None:
            grad_weight = grad_output.t().mm(input)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum(0)
        return _grads(ctx, saved, grad_input, grad_weight, grad_bias)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        x, w, b = _begin(ctx, input, weight, bias, rest[:7])
        ctx.input_shape, ctx.geometry = input.shape, rest[7:]
        return torch.convolution(x, w, b, *ctx.geometry)

    @staticmethod
    @_once
    def backward(ctx: Any, grad_output: Tensor, saved: Grads) -> Grads:
        input, feedback, shape = _saved(ctx, saved)
        mask = ctx.needs_input_grad[:3]
        # The vendor's backward reads only the shape of an operand that no wanted gradient depends on.
        if input is None:
            input = grad_output.new_empty(1).expand(ctx.input_shape)
        if mask[0]:
            b = ops.feedback_weight(*feedback, shape, dtype=grad_output.dtype)
        else:
            b = grad_output.new_empty(1).expand(shape)
        bias_sizes = [grad_output.shape[1]] if mask[2] else None
        x, w, c = torch.ops.aten.convolution_backward(grad_output, input, b, bias_sizes, *ctx.geometry, mask)
        return _grads(ctx, saved, x, w, c)


class _LocallyConnected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        x, w, b = _begin(ctx, input, weight, bias, rest[:7])
        ctx.bias_per_position = bias is not None and bias.dim() > 1
        ctx.input_size, ctx.geometry = input.shape[2:], rest[7:]
        return ops.lc_forward(x, w, b, *ctx.geometry)

    @staticmethod
    @_once
    def backward(ctx: Any, grad_output: Tensor, saved: Grads) -> Grads:
        input, feedback, shape = _saved(ctx, saved)
        kernel_size = shape[len(ctx.input_size) + 1 : -1]
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = ops.lc_backward_input(grad_output, *feedback, shape, ctx.input_size, *ctx.geometry)
        if input is not None:
            grad_weight = ops.lc_backward_weight(grad_output, input, kernel_size, *ctx.geometry)
        if ctx.needs_input_grad[2]:
            grad_bias = _bias_grad(ctx, grad_output)
        return _grads(ctx, saved, grad_input, grad_weight, grad_bias)


class _LocallyConnectedTranspose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        x, w, b = _begin(ctx, input, weight, bias, rest[:7])
        ctx.bias_per_position = bias is not None and bias.dim() > 1
        output_size, ctx.geometry = rest[7], rest[8:]
        y = ops.lc_backward_input(x, None, None, w, None, "stored", 1.0, w.shape, output_size, *ctx.geometry)
        if b is None:
            return y
        return y + (b.movedim(-1, 0) if b.dim() > 1 else b.reshape(-1, *[1] * len(output_size)))

    @staticmethod
    @_once
    def backward(ctx: Any, grad_output: Tensor, saved: Grads) -> Grads:
        input, feedback, shape = _saved(ctx, saved)
        kernel_size = shape[grad_output.dim() - 1 : -1]
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            b = ops.feedback_weight(*feedback, shape, dtype=grad_output.dtype)
            grad_input = ops.lc_forward(grad_output, b, None, *ctx.geometry)
        if input is not None:
            grad_weight = ops.lc_backward_weight(input, grad_output, kernel_size, *ctx.geometry)
        if ctx.needs_input_grad[2]:
            grad_bias = _bias_grad(ctx, grad_output)
        return _grads(ctx, saved, grad_input, grad_weight, grad_bias)


def needs_feedback(input: Tensor) -> bool:
    """Whether a backward through `input` can follow; if not, a layer is its torch.nn namesake and forms no B."""
    _refuse_transforms()
    return torch.is_grad_enabled() and input.requires_grad


def _refuse_transforms() -> None:
    # Inside vmap or jvp a tensor that needs a gradient does not say so, and the feedback would be bypassed in silence.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "torch.func: its transforms (grad, vmap, jvp) do not know feedback; call the layer under torch.no_grad(), "
            "or with feedback=None"
        )


def resolve(feedback: Feedback, weight: Tensor, fans: Fans, key: Tensor | None = None) -> Operands:
    """The operands of what a caller of a function here passed as `feedback`."""
    _refuse_transforms()
    checks.floating("weight", weight)
    if isinstance(feedback, Tensor):
        checks.floating("feedback", feedback)
        checks.shape("feedback", feedback, weight.shape)
        if feedback.device != weight.device:
            checks.fail("feedback", f"a tensor on {weight.device}", feedback.device)
        no_key(key)
        return Operands("", None, feedback.detach(), None, "stored", 1.0, None)
    rule = as_rule(feedback)
    if isinstance(rule, Backprop):
        no_key(key)
        return BACKPROP
    stateful = getattr(rule, "stored", False) or getattr(rule, "scale", None) == "initial"
    if stateful or isinstance(rule, SignedInit | SignConcordance):
        raise ValueError(f"feedback: {rule} keeps state: use its layer in bioplaus_kernels.nn, or pass B as a tensor")
    if is_seeded(rule) != (key is not None):
        wanted = "a tensor from feedback.feedback_key(seed, name)" if is_seeded(rule) else "None"
        checks.fail("key", f"{wanted} with feedback={rule.name!r}", "None" if key is None else "a tensor")
    if key is not None:
        if not isinstance(key, Tensor):
            checks.fail("key", "a tensor from feedback.feedback_key(seed, name)", type(key).__name__, TypeError)
        checks.key(key)
        if key.device != weight.device:
            checks.fail("key", f"a tensor on {weight.device}", f"one on {key.device}")
    return operands(plan(rule, root_mean_square(getattr(rule, "scale", 1.0), fans)), weight, key=key)


def no_key(key: Tensor | None) -> None:
    """A feedback that draws nothing takes no key."""
    if key is not None:
        checks.fail("key", "None where feedback draws nothing", "a tensor")


def is_backprop(feedback: Feedback) -> bool:
    """Whether `feedback` means B = W."""
    return not isinstance(feedback, Tensor) and isinstance(as_rule(feedback), Backprop)


# The layers' hot path checks only what torch lets pass: where torch or an op raises, `_explain*` raises instead if it
# finds an argument to name.


def _check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if input.device != weight.device or input.dtype not in checks.DTYPES:
        _explain(input, weight, bias)


def _explain(input: Tensor, weight: Tensor, bias: Tensor | None, out: int | None = None) -> None:
    checks.floating("input", input)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        checks.floating(name, tensor)
        if tensor.device != input.device:
            checks.fail("input", f"a tensor on {tensor.device}, as {name}", f"one on {input.device}")
        if tensor.dtype != input.dtype and not _autocasts(input):
            checks.fail("input", f"{tensor.dtype}, as {name}", input.dtype, TypeError)
    if bias is not None and out is not None:
        checks.shape("bias", bias, (out,))


def linear_with(input: Tensor, weight: Tensor, bias: Tensor | None, op: Operands) -> Tensor:
    """`linear` with the operands of B at hand."""
    _check(input, weight, bias)
    dims = input.dim()
    try:
        x = input if dims == 2 else input.flatten(0, -2) if dims > 2 else input.unsqueeze(0)
        y: Tensor = _Linear.apply(x, weight, bias, *op)
    except Exception:
        _explain(input, weight, bias, weight.shape[0])
        if dims == 0 or input.shape[-1] != weight.shape[1]:
            checks.fail("input", f"{weight.shape[1]} features in the last dimension", f"shape {tuple(input.shape)}")
        raise
    return y if dims == 2 else y.reshape(*input.shape[:-1], weight.shape[0])


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, feedback: Feedback = None, key: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ + b, with dX = dY B.

    Shapes: input (*, in), weight and B (out, in), bias (out). feedback=None is torch.nn.functional.linear.
    """
    if is_backprop(feedback):
        no_key(key)
        return F.linear(input, weight, bias)
    checks.rank("weight", weight, 2)
    return linear_with(input, weight, bias, resolve(feedback, weight, linear_fans(weight), key))


def ints(name: str, value: Ints, d: int, least: int = 0) -> list[int]:
    """`value` as one integer for each of `d` dimensions."""
    values = list(value) if isinstance(value, Sequence) else [value] * d
    if len(values) != d or not all(isinstance(v, int) and v >= least for v in values):
        checks.fail(name, f"an integer of at least {least} or {d} of them", value)
    return values


def _explain_channels(d: int, input: Tensor, channels: int, divided: int, which: str, groups: int) -> None:
    if input.dim() not in (d + 1, d + 2):
        checks.fail("input", f"{d + 2} dimensions, or {d + 1} without a batch", f"shape {tuple(input.shape)}")
    if groups < 1 or divided % groups:
        checks.fail("groups", f"a divisor of the weight's {divided} {which}put channels", groups)
    if input.shape[-d - 1] != channels:
        checks.fail("input", f"{channels} channels", f"shape {tuple(input.shape)}")


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
    _check(input, weight, bias)
    dims = input.dim()
    x = input if dims == d + 2 else input.unsqueeze(0)
    if isinstance(padding, str):
        x, padding = _same(x, weight, padding, dilation)
    try:
        y: Tensor = _Conv.apply(x, weight, bias, *op, stride, padding, dilation, False, (0,) * d, groups)
    except Exception:
        _explain(input, weight, bias, weight.shape[0])
        _explain_channels(d, input, weight.shape[1] * groups, weight.shape[0], "out", groups)
        spans = [dil * (k - 1) + 1 for k, dil in zip(weight.shape[2:], dilation, strict=True)]
        if any(size + 2 * p < span for size, p, span in zip(x.shape[2:], padding, spans, strict=True)):
            wanted = f"a padded spatial size of at least the dilated kernel {tuple(spans)}"
            checks.fail("input", wanted, f"spatial size {tuple(x.shape[2:])} and padding {tuple(padding)}")
        raise
    return y if dims == d + 2 else y.squeeze(0)


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
        plain: Any = (F.conv1d, F.conv2d, F.conv3d)[d - 1]
        return plain(input, weight, bias, stride, padding, dilation, groups)
    checks.rank("weight", weight, d + 2)
    op = resolve(feedback, weight, conv_fans(weight, weight.shape[0]), key)
    stride, dilation = ints("stride", stride, d, 1), ints("dilation", dilation, d, 1)
    if not isinstance(padding, str):
        padding = ints("padding", padding, d)
    elif padding not in ("same", "valid"):
        checks.fail("padding", "integers, 'same' or 'valid'", repr(padding))
    elif padding == "same" and any(s != 1 for s in stride):
        checks.fail("padding", "integers where stride is not 1", "'same'")
    return conv_with(d, input, weight, bias, stride, padding, dilation, groups, op)


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
    _check(input, weight, bias)
    dims = input.dim()
    x = input if dims == d + 2 else input.unsqueeze(0)
    try:
        y: Tensor = _Conv.apply(x, weight, bias, *op, stride, padding, dilation, True, output_padding, groups)
    except Exception:
        _explain(input, weight, bias, weight.shape[1] * groups)
        _explain_channels(d, input, weight.shape[0], weight.shape[0], "in", groups)
        if any(p >= max(s, dil) for p, s, dil in zip(output_padding, stride, dilation, strict=True)):
            wanted = f"less than stride {tuple(stride)} or dilation {tuple(dilation)}"
            checks.fail("output_padding", wanted, tuple(output_padding))
        raise
    return y if dims == d + 2 else y.squeeze(0)


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
    if is_backprop(feedback):
        no_key(key)
        plain: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[d - 1]
        return plain(input, weight, bias, stride, padding, output_padding, groups, dilation)
    checks.rank("weight", weight, d + 2)
    op = resolve(feedback, weight, conv_fans(weight, weight.shape[1] * groups), key)
    stride, dilation = ints("stride", stride, d, 1), ints("dilation", dilation, d, 1)
    padding, output_padding = ints("padding", padding, d), ints("output_padding", output_padding, d)
    return conv_transpose_with(d, input, weight, bias, stride, padding, output_padding, groups, dilation, op)


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


def pad_pairs(
    padding: Padding, input_size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """(before, after) of each dimension, flat, from one integer a dimension, nested pairs, "same" or "valid"."""
    d = len(kernel)
    if padding == "valid":
        return [0] * (2 * d)
    if padding == "same":
        pairs = []
        for size, k, s, dil in zip(input_size, kernel, stride, dilation, strict=True):
            total = max((-(-size // s) - 1) * s + dil * (k - 1) + 1 - size, 0)
            pairs += [total // 2, total - total // 2]
        return pairs
    if isinstance(padding, str):
        checks.fail("padding", "integers, pairs, 'same' or 'valid'", repr(padding))
    if isinstance(padding, int):
        return [p for p in ints("padding", padding, d) for _ in range(2)]
    if all(isinstance(p, int) for p in padding):
        return [p for p in ints("padding", cast(Sequence[int], padding), d) for _ in range(2)]
    if len(padding) != d or any(isinstance(p, int) or len(p) != 2 for p in padding):
        checks.fail("padding", f"{d} pairs (before, after)", padding)
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
    y: Tensor = _LocallyConnected.apply(x, weight, bias, *op, stride, padding, dilation, groups)
    return y if batched else y.squeeze(0)


def _batched(d: int, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    _explain(input, weight, bias)
    if input.dim() not in (d + 1, d + 2):
        checks.fail("input", f"{d + 2} dimensions, or {d + 1} without a batch", f"shape {tuple(input.shape)}")
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
    y: Tensor = _LocallyConnectedTranspose.apply(x, weight, bias, *op, output_size, stride, padding, dilation, groups)
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
    checks.rank("weight", weight, 2 * d + 2)
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
