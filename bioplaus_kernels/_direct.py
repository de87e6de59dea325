"""Under DirectFeedback: what sends the error at the logits to the blocks, and what a forward learns of the model."""

import dataclasses
import math
import re
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .backends.reference import checks
from .feedback.record import readable
from .feedback.scale import UNIT_RMS
from .functional._common import captured, once


class _Slice(NamedTuple):
    # Columns of the one B that are B_l, and what they are multiplied by.
    start: int
    size: int
    ratio: float


class _Plan(NamedTuple):
    kind: str
    entries: str
    scale: float
    width: int
    slices: tuple[_Slice, ...]


def _plan(rule: Any, sizes: Sequence[int], classes: int) -> _Plan:
    unit = UNIT_RMS[rule.entries]
    if rule.shared:
        width = max(sizes)
        scale = rule.root_mean_square(width, classes)
        slices = [_Slice(0, size, 1.0) for size in sizes]
    else:
        rms = [rule.root_mean_square(size, classes) for size in sizes]
        width, scale = sum(sizes), max(rms)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        slices = [_Slice(start, size, r / scale) for start, size, r in zip(starts, sizes, rms, strict=True)]
    return _Plan(rule.name, rule.entries, scale / unit, width, tuple(slices))


class Call(NamedTuple):
    """Call `number` of a block; its samples: all of the logits', or those at `number` in their dimension `stack`."""

    block: int
    stack: int | None
    number: int


def _same(tensor: Tensor, written: bool = True) -> Tensor:
    # A view could not be changed in place afterwards. What is detached can, and has the tensor's version, so that
    # whoever saved it notices; compiled code would not, and drops the copy where nobody writes.
    detached = tensor.detach()
    return detached.clone() if written and torch.compiler.is_compiling() else detached


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether `b` is `a`, or a view of all of it."""
    return a.numel() == b.numel() and a.untyped_storage()._cdata == b.untyped_storage()._cdata


class Broadcast(torch.autograd.Function):
    """The logits as they are; backward gives e to them and its projection to the output of every call of a block."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        class_dim: int,
        calls: Sequence[Call],
        key: Tensor | None,
        matrix: Tensor | None,
        targets: Tensor | None,
        loss_scale: Tensor | None,
        logits: Tensor,
        *hidden: Tensor,
    ) -> Tensor:
        ctx.plan, ctx.class_dim, ctx.calls = plan, class_dim, calls
        ctx.hidden = [(h.shape, h.dtype) for h in hidden]
        ctx.save_for_backward(key, matrix, targets, loss_scale)
        return _same(logits)

    @staticmethod
    @once
    def backward(ctx: Any, e: Tensor, saved: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[8:]
        grads: list[Tensor | None] = [None] * len(wanted)
        if ctx.plan.kind != "shallow" and any(wanted):
            d = ctx.class_dim
            by_sample = e if d == e.dim() - 1 else e.movedim(d, -1)
            projected = _project(ctx.plan, by_sample.reshape(-1, e.shape[d]), *saved)
            for i, ((block, stack, number), (shape, dtype)) in enumerate(zip(ctx.calls, ctx.hidden, strict=True)):
                if not wanted[i]:
                    continue
                part = ctx.plan.slices[block]
                grad = projected[:, part.start : part.start + part.size]
                if part.ratio != 1.0:
                    grad = grad * part.ratio
                if stack is not None:
                    grad = grad.reshape(*by_sample.shape[:-1], part.size).select(stack - (stack > d), number)
                    grad = grad.movedim(-1, d - (stack < d))
                elif d < e.dim() - 1:
                    grad = grad.reshape(*by_sample.shape[:-1], part.size).movedim(-1, d)
                grads[i] = grad.reshape(shape).to(dtype)
        return *(None,) * 7, e, *grads


class Learn(torch.autograd.Function):
    """The logits as they are; backward gives e to them, and to B what DKP learns, eᵀ h of each call of a block."""

    @staticmethod
    def forward(
        ctx: Any, plan: Any, class_dim: int, calls: Sequence[Call], matrix: Tensor, logits: Tensor, *hidden: Tensor
    ) -> Tensor:
        ctx.plan, ctx.class_dim, ctx.calls, ctx.like = plan, class_dim, calls, (matrix.shape, matrix.dtype)
        ctx.save_for_backward(*hidden)
        return _same(logits)

    @staticmethod
    @once
    def backward(ctx: Any, e: Tensor, saved: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        (shape, dtype), d = ctx.like, ctx.class_dim
        learned, by_sample = e.new_zeros(shape, dtype=dtype), e.movedim(d, -1)
        for h, (block, stack, number) in zip(saved, ctx.calls, strict=True):
            assert h is not None
            part = ctx.plan.slices[block]
            error = by_sample if stack is None else by_sample.select(stack - (stack > d), number)
            own = d - (stack is not None and stack < d)
            samples = error.shape[:-1]
            h = h.reshape(*samples[:own], part.size, *samples[own:]).movedim(own, -1)
            columns = learned[:, part.start : part.start + part.size]
            columns += error.flatten(0, -2).t().to(dtype).mm(h.reshape(-1, part.size).to(dtype))
        return *(None,) * 3, learned, e, *(None,) * len(saved)


def _project(
    plan: Any,
    e: Tensor,
    key: Tensor | None,
    matrix: Tensor | None,
    targets: Tensor | None,
    loss_scale: Tensor | None,
) -> Tensor:
    # All blocks' projections side by side: (samples, width).
    entries, scale = ("stored", 1.0) if matrix is not None else (plan.entries, plan.scale)
    classes = e.shape[1]
    if targets is None:
        if plan.kind == "sdfa":
            e = e.sign() * e.abs().mean()
    else:
        assert loss_scale is not None
        # An ignored sample (cross_entropy's ignore_index) has no class and teaches nothing.
        known = targets.flatten().unsqueeze(1) >= 0
        targets = targets.flatten().clamp(min=0)
        if matrix is not None or classes <= len(targets):
            rows = matrix
            if rows is None:
                size = (classes, plan.width)
                rows = ops.feedback_weight(None, None, None, key, entries, scale, size, dtype=e.dtype)
            return (rows[targets] * known).to(e.dtype) * loss_scale
        e = (F.one_hot(targets, classes) * known).to(e.dtype) * loss_scale
    return ops.feedback_mm(e, None, None, matrix, key, entries, scale, plan.width)


def drtp_scale(
    targets: Tensor | None, loss_scale: Tensor | float, reduction: str, logits: Tensor, class_dim: int
) -> Tensor:
    """What DRTP's projections of checked `targets` are multiplied by; classes lie in `class_dim` of the logits."""
    if targets is None:
        checks.fail("targets", "the classes of the samples, as DRTP projects them", "None")
    checks.tensor("targets", targets)
    if targets.dtype != torch.int64:
        checks.fail("targets", "int64", targets.dtype, TypeError)
    checks.shape("targets", targets, logits.shape[:class_dim] + logits.shape[class_dim + 1 :])
    if targets.device != logits.device:
        checks.fail("targets", f"a tensor on {logits.device}, as the logits", f"one on {targets.device}")
    if isinstance(loss_scale, bool) or not isinstance(loss_scale, int | float | Tensor):
        checks.fail("loss_scale", "a number or a 0-dim tensor", repr(loss_scale), TypeError)
    if isinstance(loss_scale, Tensor) and loss_scale.dim():
        checks.fail("loss_scale", "a number or a 0-dim tensor", f"shape {tuple(loss_scale.shape)}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scale = torch.as_tensor(loss_scale, dtype=dtype, device=logits.device)
    return scale / (targets >= 0).sum().clamp(min=1) if reduction == "mean" else scale


class _Tape:
    # What a wrapper and its blocks share in the forward under way: the outputs of the blocks' calls that no logits were
    # tied to yet, with their versions where B learns, what ties them, and whether it has. None where something else
    # calls a block, such as a checkpoint's recomputation.
    outputs: dict[str, list[tuple[Tensor, int | None]]] | None = None
    tie: Callable[[Any], Any] | None = None
    tied: bool = False
    blocks: tuple[str, ...] = ()
    # Whether the blocks get a gradient, B learns of what they return, and the forward is of the constructor's example.
    taught: bool = True
    learns: bool = False
    example: bool = False


class _Block(torch.nn.Module):
    # Mixed in before the own class of a block, and of the module whose output is the logits.
    _block_name: str
    _tape: _Tape

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        h = super().forward(*args, **kwargs)
        name, tape = self._block_name, self._tape
        outputs, tie = tape.outputs, tape.tie
        if outputs is None or tie is None:
            return h.detach() if captured() and name in tape.blocks else h
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"{'blocks' if name in outputs else 'logits'}: {name!r} ran without recording gradients inside a "
                "forward that records them; name another module, or checkpoint it with use_reentrant=False"
            )
        if name not in outputs:
            return tie(h)
        if not isinstance(h, Tensor):
            checks.fail("blocks", f"blocks that return one tensor; {name!r}", type(h).__name__, TypeError)
        # torch.compile cannot read a version; what follows there has a copy to write into.
        outputs[name].append((h, h._version if tape.learns and not torch.compiler.is_compiling() else None))
        return _same(h, tape.learns)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_block, (type(self).__bases__[1],), self.__dict__


def block_outputs(model: torch.nn.Module) -> list[Tensor] | None:
    """What a DirectFeedback whose forward is under way differentiates in `model` beside the logits.

    That is its blocks' outputs that no logits were tied to yet; None while it is made.
    """
    tapes = {m._tape for m in model.modules() if isinstance(m, _Block)}
    if any(tape.example for tape in tapes):
        return None
    return [h for tape in tapes if tape.taught for calls in (tape.outputs or {}).values() for h, _ in calls]


_BLOCK_CLASSES: dict[type[Any], type[Any]] = {}


def block_class(base: type[Any]) -> type[Any]:
    """The class of a block that was of class `base`."""
    if base not in _BLOCK_CLASSES:
        names = {"__module__": base.__module__, "__doc__": base.__doc__}
        _BLOCK_CLASSES[base] = type(base.__name__, (_Block, base), names)
    return _BLOCK_CLASSES[base]


def _new_block(base: type[Any]) -> Any:
    return object.__new__(block_class(base))


def numbers(logits: Sequence[int], class_dim: int, hidden: Sequence[int], stack: int | None = None) -> int | None:
    """How many numbers a sample has in a block's output of shape `hidden`, or None where it has not the samples.

    Samples are the logits' dimensions but `class_dim` and `stack`; `hidden` has them on the same sides of what is its
    own. Where there are several, it has to have something of its own.
    """
    before, after = list(logits[:class_dim]), list(logits[class_dim + 1 :])
    if stack is not None:
        (before if stack < class_dim else after).pop(stack if stack < class_dim else stack - class_dim - 1)
    start, end = len(before), len(hidden) - len(after)
    if end < start + (len(logits) > 2) or [*hidden[:start], *hidden[end:]] != before + after:
        return None
    return math.prod(hidden[start:end])


def fits(logits: Sequence[int], class_dim: int, calls: Sequence[Sequence[int]]) -> list[tuple[int | None, int]]:
    """The ways in which outputs of these shapes, of one block's calls, belong to logits: (stack, numbers a sample)."""
    found = []
    stacks = [k for k, size in enumerate(logits) if k != class_dim and size == len(calls) and len(logits) > 2]
    for stack in (None, *stacks):
        sizes = {numbers(logits, class_dim, shape, stack) for shape in calls}
        size = sizes.pop()
        if not sizes and size is not None:
            found.append((stack, size))
    # One call that has all samples is not one of a stack of one.
    return found[:1] if len(calls) == 1 and found and found[0][0] is None else found


def ways(
    names: Sequence[str], logits: Sequence[int], hidden: Sequence[Sequence[Sequence[int]]], class_dim: int | None
) -> list[tuple[int | None, int]]:
    """Of each block the only way in which the outputs `hidden` of its calls belong to logits of shape `logits`.

    Raises ValueError where there is none or a doubt, `class_dim` being None where nobody said it.
    """
    logits, hidden = tuple(logits), [[tuple(shape) for shape in calls] for calls in hidden]
    dims, d = len(logits), -1 if class_dim is None else class_dim
    if dims < 2:
        checks.fail("example", "logits of shape (*samples, classes)", f"shape {logits}")
    if not -dims <= d < dims:
        checks.fail("class_dim", f"a dimension of logits of shape {logits}", d)
    found = [fits(logits, d % dims, calls) for calls in hidden]
    if class_dim is None and dims > 2 and all(fits(logits, 1, calls) for calls in hidden):
        several = " and class_dim=-1" if all(found) else ""
        shapes = ", ".join(str(calls[0]) for calls in hidden)
        raise ValueError(f"class_dim: logits of shape {logits}, blocks of {shapes} fit class_dim=1{several}; pass it")
    for name, fit, calls in zip(names, found, hidden, strict=True):
        if not fit:
            wanted = f"{name!r} to return the samples that logits of shape {logits} have with class_dim={d}"
            if len(calls) > 1:
                wanted += " at each call, or a slice of them (logits= may name a submodule called as often)"
            checks.fail("blocks", wanted, f"shape {', '.join(map(str, calls))}")
        if len(fit) > 1:
            wanted = f"one whose sizes tell which samples of logits of shape {logits} are those of a call of {name!r}"
            checks.fail("example", wanted, f"shape {', '.join(map(str, calls))}")
    return [fit[0] for fit in found]


def each_tensor(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` of its tensors in their place; mappings, lists and dataclasses are changed themselves."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        items = [each_tensor(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, MutableMapping | list):
        for key, item in list(value.items() if isinstance(value, MutableMapping) else enumerate(value)):
            value[key] = each_tensor(item, function)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            object.__setattr__(value, field.name, each_tensor(getattr(value, field.name), function))
    return value


_NORMALISING = {"LogSoftmax": "log_softmax", "Softmax": "softmax", "Sigmoid": "sigmoid", "LogSigmoid": "logsigmoid"}
# What changes shapes, dtypes or only the scale on which a probability is written.
_PASSING = (
    "View|UnsafeView|ReshapeAlias|Squeeze|Unsqueeze|Transpose|Permute|T|Alias|Expand|Flip|Slice|Select|Stack|Cat|Clone|"
    "ToCopy|Log|Log2|Log10|Clamp|ClampMin|ClampMax|NanToNum|MaskedFill"
)
# The same, where all but one of their operands are constants: log p − log(1 − p) are logits again.
_AFFINE = "Add|Sub|Rsub|Mul|Div|Lerp|Where|Maximum|Minimum"


def normalised(output: Tensor) -> str:
    """The function that made probabilities, or their logarithms, of what `output` comes from; "" if none did.

    Shapes, dtypes, logarithms, bounds and sums, products and choices with constants may lie between.
    """
    node: Any = output.grad_fn
    while node is not None:
        name = re.sub(r"Backward\d*$", "", type(node).__name__)
        if name in _NORMALISING:
            return _NORMALISING[name]
        operands = [n for n, _ in node.next_functions if n is not None]
        if not re.fullmatch(_PASSING if len(operands) > 1 else f"{_PASSING}|{_AFFINE}", name):
            break
        node = operands[0] if operands else None
    return ""


def probabilities(output: Tensor, class_dim: int) -> str:
    """What the numbers of `output` are, probabilities of the classes or logarithms of such; "" if neither.

    By their sums over several classes, in float32 and float64: in half types those of some logits are as near to one.
    """
    values = output.detach()
    eps = torch.finfo(values.dtype).eps if values.is_floating_point() else 1.0
    if not readable(values) or not values.numel() or values.shape[class_dim] < 2 or eps > 1e-6:
        return ""
    values = values.double()
    for what, p in (("probabilities", values), ("logarithms of probabilities", values.exp())):
        if (p >= 0).all() and ((p.sum(class_dim) - 1).abs() <= 64 * eps).all():
            return what
    return ""


def reaches(output: Tensor, logits: Tensor) -> bool:
    """Whether `output` was computed from `logits`."""
    todo: list[Any] = [output.grad_fn]
    seen: set[Any] = {None}
    while todo:
        node = todo.pop()
        if node is logits.grad_fn:
            return node is not None
        if node not in seen:
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
    return False
