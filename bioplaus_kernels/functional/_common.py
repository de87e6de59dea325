"""What the layers' functions share: the operands of B, autograd's part, and the checks of arguments."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state

from .. import ops
from ..backends.reference import checks
from ..feedback import BACKPROP, Fans, Operands, Rule, State, as_rule, stored

# weight, signs, magnitude, key, entries, scale: what every op takes for B.
Arguments = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, str, float]
Feedback = Rule | str | Tensor | None
Ints = int | Sequence[int]
Grads = tuple[Tensor | None, ...]

# In the place of B in a capture, by identity: the namesake's function, and no gradient.
CUT = Operands(*BACKPROP)


def captured() -> bool:
    """Whether a program is being made of the call (torch.export, torch.jit.trace, ONNX).

    It keeps the forward's operators and loses our backward, so that training it would be back-propagation.
    """
    # The flag: Dynamo's table has is_exporting() for true in every compilation, which only newer versions look into.
    return torch.compiler._is_exporting_flag or _get_tracing_state() is not None


def autocasts(input: Tensor) -> bool:
    # The meta device has no autocast.
    return torch._C._is_any_autocast_enabled() and not input.is_meta and torch.is_autocast_enabled(input.device.type)


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


def once(backward: Callable[..., Grads], twice: bool = False) -> Callable[..., Grads]:
    # torch's once_differentiable raises where .backward() reaches its outputs; autograd.grad goes round it in silence.
    # `twice`: where B = W the gradients are derivatives, of which `backward` makes others if gradients are enabled.
    @functools.wraps(backward)
    def wrapper(ctx: Any, *grad_outputs: Tensor) -> Grads:
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled() or (twice and _transports_weight(ctx.feedback, saved)):
            return backward(ctx, *grad_outputs, saved)
        with torch.no_grad():
            grads = backward(ctx, *grad_outputs, saved)
        given = [grad for grad in grads if grad is not None]
        sources = (*grad_outputs, *(t for t in saved if t is not None and t.is_floating_point()))
        tied = iter(_Refuse.apply(len(given), *given, *sources))
        return tuple(None if grad is None else next(tied) for grad in grads)

    return wrapper


def _transports_weight(feedback: tuple[Any, ...], saved: Grads) -> bool:
    # Whether what `begin` kept is BACKPROP, or nothing of B where no gradient goes through it.
    wanted = BACKPROP.role, BACKPROP.entries, BACKPROP.scale
    return feedback[:3] == wanted and all(t is None for t in saved[2:])


def autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    # The operands of the forward product: under autocast in its dtype, by torch's own rule, which leaves float64 alone.
    if not autocasts(input):
        return input, weight, bias
    x, w, b = lowered(torch.get_autocast_dtype(input.device.type), input, weight, bias)
    assert x is not None and w is not None
    return x, w, b


def lowered(dtype: torch.dtype, *tensors: Tensor | None) -> Grads:
    # In `dtype`, autocast's, what is floating and no float64.
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


# The Functions below take (input, weight, bias, *Operands, *geometry) and save what their backward reads, nothing else.


def begin(
    ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, feedback: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    x, w, b, ctx.dtypes = input, weight, bias, None
    if autocasts(input):
        x, w, b = autocast(input, weight, bias)
        ctx.dtypes = input.dtype, weight.dtype, None if bias is None else bias.dtype
    role, signs, magnitude, key, entries, scale, rescale = feedback
    ctx.feedback = role, entries, scale, weight.shape
    needs_input, needs_weight = ctx.needs_input_grad[:2]
    if needs_input:
        ctx.save_for_backward(x if needs_weight else None, weight if role else None, signs, magnitude, key, rescale)
    else:
        ctx.save_for_backward(x if needs_weight else None, None, None, None, None, None)
    return x, w, b


def saved_feedback(ctx: Any, saved: Grads) -> tuple[Tensor | None, Arguments, torch.Size]:
    # The input (None where no weight gradient is wanted), the ops' feedback arguments, and the weight's shape.
    input, weight, signs, magnitude, key, _ = saved
    role, entries, scale, shape = ctx.feedback
    if role == "magnitude":
        weight, magnitude = None, weight
    return input, (weight, signs, magnitude, key, entries, scale), shape


def without_factors(feedback: Arguments, shape: torch.Size) -> Arguments:
    # B formed where it is two factors, which only a linear map multiplies by one after the other.
    _, p, q, _, entries, _ = feedback
    if entries != "factors" or p is None or q is None:
        return feedback
    return None, None, (p @ q).reshape(shape), None, "stored", 1.0


def formed(op: Operands, weight: Tensor) -> Tensor:
    """B, like `weight`, of the operands of a call."""
    return matrix(op, weight.detach() if op.role else None, weight.shape, weight.dtype)


def matrix(op: Operands, weight: Tensor | None, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """B in `dtype`; of `weight`, where it has a role, of a weight of this size where not."""
    role, signs, magnitude, key, entries, scale, rescale = op
    if role == "magnitude":
        weight, magnitude = None, weight
    b = ops.feedback_weight(*without_factors((weight, signs, magnitude, key, entries, scale), size), size, dtype=dtype)
    return b if rescale is None else b * rescale


# For a Function with more than one weight, or whose B is formed whole: of a call's operands what is no tensor, the
# tensors to save, and B of both.


def parted(op: Operands, weight: Tensor | None) -> tuple[Operands, Grads]:
    tensors = weight if op.role else None, op.signs, op.magnitude, op.key, op.rescale
    return op._replace(signs=None, magnitude=None, key=None, rescale=None), tensors


def joined(op: Operands, tensors: Grads, size: torch.Size, dtype: torch.dtype) -> Tensor:
    weight, signs, magnitude, key, rescale = tensors
    return matrix(op._replace(signs=signs, magnitude=magnitude, key=key, rescale=rescale), weight, size, dtype)


def finish(
    ctx: Any, saved: Grads, grad_input: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None
) -> Grads:
    rescale = saved[-1]
    if grad_input is not None and rescale is not None:
        grad_input = grad_input * rescale
    grads = [grad_input, grad_weight, grad_bias]
    if ctx.dtypes is not None:
        grads = [g if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
    return *grads, *(None,) * (len(ctx.needs_input_grad) - 3)


def needs_feedback(input: Tensor) -> bool:
    """Whether a backward through `input` can follow; if not, a layer is its torch.nn namesake and forms no B."""
    refuse_transforms()
    try:
        return torch.is_grad_enabled() and input.requires_grad
    except AttributeError:
        checks.tensor("input", input)
        raise


def refuse_transforms() -> None:
    # Inside vmap or jvp a tensor that needs a gradient does not say so, and the feedback would be bypassed in silence.
    if torch.is_grad_enabled() and torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "torch.func: its transforms (grad, vmap, jvp) do not know feedback; call the layer under torch.no_grad(), "
            "or with feedback=None"
        )


def resolve(feedback: Feedback, weight: Tensor, fans: Fans, key: Tensor | None = None) -> Operands:
    """The operands of what a caller of a function here passed as `feedback`."""
    if not is_backprop(feedback):
        refuse_transforms()
    checks.floating("weight", weight)
    if isinstance(feedback, Tensor):
        checks.floating("feedback", feedback)
        checks.shape("feedback", feedback, weight.shape)
        if feedback.device != weight.device:
            checks.fail("feedback", f"a tensor on {weight.device}", feedback.device)
        no_key(key)
        return CUT if captured() else stored(feedback.detach())
    rule = as_rule(feedback).of("weight")
    if rule.transports_weight:
        no_key(key)
        return BACKPROP
    if rule.state(weight):
        raise ValueError(f"feedback: {rule} keeps state: use its layer in bioplaus_kernels.nn, or pass B as a tensor")
    if rule.seeded != (key is not None):
        wanted = "a tensor from feedback.feedback_key(seed, name)" if rule.seeded else "None"
        checks.fail("key", f"{wanted} with feedback={rule.name!r}", "None" if key is None else "a tensor")
    state: State = {"rms": rule.rms(fans)}
    if key is not None:
        if not isinstance(key, Tensor):
            checks.fail("key", "a tensor from feedback.feedback_key(seed, name)", type(key).__name__, TypeError)
        checks.key(key)
        if key.device != weight.device:
            checks.fail("key", f"a tensor on {weight.device}", f"one on {key.device}")
        state["key"] = key
    return CUT if captured() else rule.operands(weight, state)


def no_key(key: Tensor | None) -> None:
    """A feedback that draws nothing takes no key."""
    if key is not None:
        checks.fail("key", "None where feedback draws nothing", "a tensor")


def is_backprop(feedback: Feedback) -> bool:
    """Whether `feedback` means B = W."""
    return not isinstance(feedback, Tensor) and as_rule(feedback).of("weight").transports_weight


# The layers' hot path checks only what torch lets pass: where torch or an op raises, `explain*` raises instead if it
# finds an argument to name.


def check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    try:
        fits = input.device == weight.device and input.dtype in checks.DTYPES
    except AttributeError:
        fits = False
    if not fits:
        explain(input, weight, bias)


def explain(input: Tensor, weight: Tensor, bias: Tensor | None, out: int | None = None) -> None:
    """Raise TypeError or ValueError for what does not fit among the operands of a product that has failed."""
    checks.tensor("input", input)
    if input.is_nested:
        checks.fail("input", "a dense tensor, such as the values() of a nested one", "a nested tensor", TypeError)
    checks.floating("input", input)
    given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for name, tensor in given.items():
        checks.floating(name, tensor)
        if tensor.device != input.device:
            checks.fail("input", f"a tensor on {tensor.device}, as {name}", f"one on {input.device}")
        if tensor.dtype != input.dtype and not autocasts(input):
            checks.fail("input", f"{tensor.dtype}, as {name}", input.dtype, TypeError)
    if bias is not None and out is not None:
        checks.shape("bias", bias, (out,))


def ints(name: str, value: Ints, d: int, least: int = 0) -> list[int]:
    """`value` as one integer for each of `d` dimensions."""
    given = list(value) if isinstance(value, Sequence) else [value] * d
    numbers = [checks.index(v) for v in given]
    values = [n for n in numbers if n is not None and n >= least]
    if len(given) != d or len(values) != d:
        checks.fail(name, f"an integer of at least {least} or {d} of them", repr(value))
    if max(values) > checks.LARGEST:
        checks.fail(name, f"integers of at most {checks.LARGEST}", repr(value))
    return values


def explain_dimensions(d: int, input: Tensor) -> None:
    if input.dim() not in (d + 1, d + 2):
        checks.fail("input", f"{d + 2} dimensions, or {d + 1} without a batch", f"shape {tuple(input.shape)}")


def explain_channels(
    d: int, input: Tensor, weight: Tensor, channels: int, divided: int, which: str, groups: int
) -> None:
    explain_dimensions(d, input)
    if groups < 1 or divided % groups:
        checks.fail("groups", f"a divisor of the weight's {divided} {which}put channels", groups)
    if input.shape[-d - 1] != channels:
        checks.fail("input", f"{channels} channels", f"shape {tuple(input.shape)}")
    for name, tensor, size in (("input", input, input.shape[-d:]), ("weight", weight, weight.shape[2:])):
        if 0 in size:
            checks.fail(name, "spatial sizes of at least 1", f"shape {tuple(tensor.shape)}")
