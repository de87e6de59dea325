"""Argument checks of the reference and of the package: an error names the argument, what it got and what is wanted."""

import math
import operator
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

_ENTRIES = ("constant", "stored", "uniform", "normal")
# Kernels and dilations, paddings and sizes up to here: products and sums of two of them stay within 64 bits.
LARGEST = 2**31 - 1

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)
_is_compiling = torch.compiler.is_compiling


def fail(name: str, wanted: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raise `error` about argument `name`."""
    raise error(f"{name}: expected {wanted}, got {got}")


def instance(name: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """`value` must be of the class `kind`, `wanted` in words."""
    if not isinstance(value, kind):
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        fail(name, wanted, got, TypeError)


def tensor(name: str, value: object) -> None:
    """`value` must be a tensor."""
    if not isinstance(value, Tensor):
        fail(name, "a tensor", type(value).__name__, TypeError)


def module(name: str, value: object) -> None:
    """`value` must be a module."""
    instance(name, value, torch.nn.Module, "a torch.nn.Module")


def boolean(name: str, value: object) -> None:
    """`value` must be True or False itself."""
    if not isinstance(value, bool):
        fail(name, "True or False", repr(value), TypeError)


def function(name: str, value: object, wanted: str) -> None:
    """`value` must be callable, `wanted` in words."""
    if not callable(value):
        fail(name, wanted, repr(value), TypeError)


def one_of(name: str, value: object, options: Collection[str], wanted: str = "") -> None:
    """`value` must be one of the strings `options`, `wanted` in words."""
    if not isinstance(value, str) or value not in options:
        fail(name, wanted or f"one of {', '.join(options)}", repr(value))


def entries(name: str, value: Any, wanted: str) -> list[Any]:
    """What the iterable `value` holds, `wanted` in words."""
    try:
        return list(value)
    except TypeError:
        fail(name, wanted, type(value).__name__, TypeError)


def tensors(name: str, value: Any, count: int, what: str) -> list[Tensor]:
    """`value` as a list of `count` tensors, which are `what`."""
    if isinstance(value, Tensor):
        fail(name, f"{count} {what}", "a tensor", TypeError)
    found = entries(name, value, f"{count} {what}")
    if len(found) != count:
        fail(name, f"{count} {what}", len(found))
    for k, entry in enumerate(found):
        tensor(f"{name}[{k}]", entry)
    return found


def index(value: Any) -> int | None:
    """`value` as an int where it is an integer, numpy's too; a bool is none, and a tensor, which may lie on a GPU."""
    if type(value) is int:
        return value
    if isinstance(value, bool | Tensor):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def integer(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int of at least `least`."""
    number = index(value)
    if number is None:
        fail(name, "an integer", repr(value), TypeError)
    if least is not None and number < least:
        fail(name, f"at least {least}", number)
    return number


def number(
    name: str, value: Any, wanted: str, fits: Callable[[float], bool], error: type[Exception] = TypeError
) -> float:
    """`value` as a float that `fits`, `wanted` in words, from any real number; `error` where it is none."""
    if type(value) is bool or not isinstance(value, int | float | Real):
        fail(name, wanted, repr(value), error)
    real = float("inf")
    with suppress(OverflowError):
        real = float(value)
    if not fits(real):
        fail(name, wanted, value)
    return real


def not_negative(name: str, value: Any) -> float:
    """`value` as a finite number of at least 0."""
    return number(name, value, "a finite number of at least 0", lambda v: math.isfinite(v) and v >= 0)


def fraction(name: str, value: Any, error: type[Exception] = TypeError) -> float:
    """`value` as a number from 0 to 1."""
    return number(name, value, "a number from 0 to 1", lambda v: 0 <= v <= 1, error)


def scale(value: Any, names: Collection[str]) -> float | str:
    """A rule's scale: one of `names`, or `value` as a number."""
    if isinstance(value, str) and value in names:
        return value
    wanted = f"a positive finite number or one of {names}"
    return number("scale", value, wanted, lambda v: math.isfinite(v) and v > 0, ValueError)


def dtype(name: str, value: torch.dtype) -> None:
    """`value` must be a dtype the ops know."""
    if not isinstance(value, torch.dtype) or value not in DTYPES:
        fail(name, "float32, bfloat16, float16 or float64", value, TypeError)


def memory(name: str, tensor: Tensor) -> None:
    """The storage must hold all elements: FSDP2 frees a parameter's while autograd still has it."""
    # What is traced, a subclass and vmap's tensors have their memory elsewhere, if any.
    if type(tensor) not in _PLAIN or _is_compiling():
        return
    try:
        held = tensor.untyped_storage().nbytes()
    except NotImplementedError:
        return
    # This is asked of every operand at every call.
    if held >= tensor.nbytes and tensor.is_contiguous() and not tensor.storage_offset():
        return
    last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    if held < (last + 1) * tensor.element_size() and tensor.numel() > 0 and not tensor._is_zerotensor():
        freed = "one whose storage has been freed (FSDP2's reshard_after_forward with set_unshard_in_backward(False)?)"
        fail(name, "a tensor with memory", freed)


def factory(device: Any, dtype_: Any) -> dict[str, Any]:
    """Where and in what dtype a module makes its Parameters: `device=` and `dtype=`, each of which may be None."""
    try:
        device = None if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        fail("device", "a torch.device, its name or None", repr(device))
    if dtype_ is not None:
        dtype("dtype", dtype_)
    return {"device": device, "dtype": dtype_}


def floating(name: str, value: Tensor) -> None:
    """`value` must be a tensor of a dtype the ops know, and have memory."""
    tensor(name, value)
    dtype(name, value.dtype)
    memory(name, value)


def same(name: str, value: Tensor, other: Tensor) -> None:
    """`value` must have the dtype and device of `other`, and memory."""
    if value.dtype != other.dtype:
        fail(name, f"{other.dtype}", value.dtype, TypeError)
    if value.device != other.device:
        fail(name, f"a tensor on {other.device}", value.device)
    memory(name, value)


def shape(name: str, value: Tensor, wanted: Sequence[int]) -> None:
    """`value` must be a tensor of the shape `wanted`."""
    tensor(name, value)
    if tuple(value.shape) != tuple(wanted):
        fail(name, f"shape {tuple(wanted)}", tuple(value.shape))


def rank(name: str, value: Tensor, wanted: int) -> None:
    """`value` must be a tensor of `wanted` dimensions."""
    tensor(name, value)
    if value.dim() != wanted:
        fail(name, f"{wanted} dimensions", f"shape {tuple(value.shape)}")


def packed(name: str, value: Tensor, wanted: Sequence[int]) -> None:
    """Packed signs are int32 of shape `wanted`."""
    if value.dtype != torch.int32:
        fail(name, "int32", value.dtype, TypeError)
    shape(name, value, wanted)
    memory(name, value)


def key(value: Tensor) -> None:
    """A key is three int64: layout version, key, stream."""
    if value.dtype != torch.int64:
        fail("key", "int64", value.dtype, TypeError)
    shape("key", value, (3,))
    memory("key", value)


def feedback(
    weight: Tensor | None,
    signs: Tensor | None,
    magnitude: Tensor | None,
    key_: Tensor | None,
    entries: str,
    scale: float,
    size: Sequence[int],
    packed_size: Sequence[int],
    device: torch.device | None = None,
) -> None:
    """The feedback arguments of an op must name one cell of the table of signs and magnitudes, on one `device`."""
    given = [name for name, t in (("weight", weight), ("signs", signs)) if t is not None]
    if len(given) == 2:
        fail("signs", "None where weight is given", "both")
    if entries not in _ENTRIES:
        fail("entries", f"one of {_ENTRIES}", repr(entries))
    if not math.isfinite(scale):
        fail("scale", "a finite number", scale)
    if (magnitude is not None) != (entries == "stored"):
        fail(
            "magnitude",
            f"{'a tensor' if entries == 'stored' else 'None'} with entries={entries!r}",
            magnitude is not None,
        )
    if entries == "stored" and key_ is not None:
        fail("key", "None with entries='stored'", "a tensor")
    if entries in ("uniform", "normal") and key_ is None:
        fail("key", f"a tensor with entries={entries!r}", "None")
    if entries == "constant" and len(given) + (key_ is not None) != 1:
        got = [*given, *(["key"] if key_ is not None else [])]
        fail("entries", "exactly one of weight, signs and key with entries='constant'", got or "none of them")
    if any(n < 0 for n in size):
        fail("size", "no negative dimension", tuple(size))
    if not given and magnitude is None:
        volume("size", size)
    for name, tensor in (("weight", weight), ("magnitude", magnitude)):
        if tensor is not None:
            floating(name, tensor)
            shape(name, tensor, size)
    if signs is not None:
        packed("signs", signs, packed_size)
    if key_ is not None:
        key(key_)
    for name, tensor in (("weight", weight), ("signs", signs), ("magnitude", magnitude), ("key", key_)):
        if tensor is not None:
            device = tensor.device if device is None else device
            if tensor.device != device:
                fail(name, f"a tensor on {device}", f"one on {tensor.device}")


def mm(grad_output: Tensor, in_features: int) -> None:
    """`feedback_mm` takes a matrix."""
    floating("grad_output", grad_output)
    rank("grad_output", grad_output, 2)
    if in_features < 0:
        fail("in_features", "at least 0", in_features)


def conv(
    grad_output: Tensor,
    weight_size: Sequence[int],
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    input: str = "input_size",
) -> int:
    """The arguments of `feedback_conv` must fit each other; returns the dimensions. `input` has `input_size`."""
    floating("grad_output", grad_output)
    d = len(input_size)
    if d not in (1, 2, 3):
        fail(input, "1, 2 or 3 integers", tuple(input_size))
    for name, values, count, least in (
        (input, input_size, d, 0),
        ("weight_size", weight_size, d + 2, 0),
        ("stride", stride, d, 1),
        ("padding", padding, d, 0),
        ("dilation", dilation, d, 1),
    ):
        integers(name, values, count, least)
    rank("grad_output", grad_output, d + 2)
    kernel = tuple(weight_size[2:])
    room = [
        size + 2 * p - step * (k - 1) - 1
        for size, p, step, k in zip(input_size, padding, dilation, kernel, strict=True)
    ]
    if min(room) < 0 or min(kernel) < 1:
        fail(input, f"a padded size of at least the dilated kernel {kernel}", tuple(input_size))
    out = [r // s + 1 for r, s in zip(room, stride, strict=True)]
    shape("grad_output", grad_output, (grad_output.shape[0], weight_size[0], *out))
    volume(input, (grad_output.shape[0], *input_size, weight_size[1]))
    return d


def integers(name: str, values: Sequence[int], count: int, least: int) -> None:
    """`values` must be `count` integers, of which sums of products of two stay within 64 bits."""
    if len(values) != count or not all(least <= v <= LARGEST for v in values):
        fail(name, f"{count} integers from {least} to {LARGEST}", tuple(values))


def volume(name: str, size: Sequence[int]) -> None:
    """What is of `size` must have few enough entries for 64 bits; a dimension of 0, or a symbol, counts as 1."""
    if not _is_compiling() and math.prod(max(n, 1) for n in size if isinstance(n, int)) > 2**48:
        fail(name, "at most 2**48 entries", f"size {tuple(size)}")


def geometry(
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, kernel: Sequence[int]
) -> int:
    """Stride, padding, dilation and kernel of a locally-connected op must fit each other; returns the dimensions."""
    d = len(stride)
    if d not in (1, 2, 3):
        fail("stride", "1, 2 or 3 integers", tuple(stride))
    for name, values, count, least in (
        ("stride", stride, d, 1),
        ("padding", padding, 2 * d, 0),
        ("dilation", dilation, d, 1),
        ("kernel_size", kernel, d, 1),
    ):
        integers(name, values, count, least)
    if not 1 <= groups <= LARGEST:
        fail("groups", f"1 to {LARGEST}", groups)
    return d


def lc_shapes(
    weight_size: Sequence[int],
    input_size: Sequence[int],
    expected_output: Sequence[int],
    groups: int,
    in_channels: int | None = None,
) -> None:
    """A locally-connected weight must fit the spatial input, the channels and the groups."""
    d = len(input_size)
    if len(weight_size) != 2 * d + 2:
        fail("weight", f"{2 * d + 2} dimensions (*out, O, *kernel, C/groups)", f"shape {tuple(weight_size)}")
    volume("weight", weight_size)
    volume("input", (groups, weight_size[-1], *input_size))
    if any(size < 1 for size in expected_output):
        fail(
            "input",
            f"a padded spatial size of at least the dilated kernel {tuple(weight_size[d + 1 : -1])}",
            f"spatial size {tuple(input_size)}",
        )
    if tuple(weight_size[:d]) != tuple(expected_output):
        fail(
            "weight",
            f"positions {tuple(expected_output)} for spatial input {tuple(input_size)}",
            tuple(weight_size[:d]),
        )
    if weight_size[d] % groups:
        fail("groups", f"a divisor of the {weight_size[d]} output channels", groups)
    if in_channels is not None and weight_size[-1] * groups != in_channels:
        fail(
            "input", f"{weight_size[-1] * groups} channels (weight's {weight_size[-1]} x {groups} groups)", in_channels
        )
