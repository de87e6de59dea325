"""Argument checks of the reference: each error names the argument, what it got and what is wanted."""

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

_ENTRIES = ("constant", "stored", "uniform", "normal")


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)
_is_compiling = torch.compiler.is_compiling


def fail(name: str, wanted: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raise `error` about argument `name`."""
    raise error(f"{name}: expected {wanted}, got {got}")


def dtype(name: str, value: torch.dtype) -> None:
    """`value` must be a dtype the ops know."""
    if value not in DTYPES:
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


def floating(name: str, tensor: Tensor) -> None:
    """`tensor` must be of a dtype the ops know, and have memory."""
    dtype(name, tensor.dtype)
    memory(name, tensor)


def same(name: str, tensor: Tensor, other: Tensor) -> None:
    """`tensor` must have the dtype and device of `other`, and memory."""
    if tensor.dtype != other.dtype:
        fail(name, f"{other.dtype}", tensor.dtype, TypeError)
    if tensor.device != other.device:
        fail(name, f"a tensor on {other.device}", tensor.device)
    memory(name, tensor)


def shape(name: str, tensor: Tensor, wanted: Sequence[int]) -> None:
    """`tensor` must have the shape `wanted`."""
    if tuple(tensor.shape) != tuple(wanted):
        fail(name, f"shape {tuple(wanted)}", tuple(tensor.shape))


def rank(name: str, tensor: Tensor, wanted: int) -> None:
    """`tensor` must have `wanted` dimensions."""
    if tensor.dim() != wanted:
        fail(name, f"{wanted} dimensions", f"shape {tuple(tensor.shape)}")


def packed(name: str, tensor: Tensor, wanted: Sequence[int]) -> None:
    """Packed signs are int32 of shape `wanted`."""
    if tensor.dtype != torch.int32:
        fail(name, "int32", tensor.dtype, TypeError)
    shape(name, tensor, wanted)
    memory(name, tensor)


def key(tensor: Tensor) -> None:
    """A key is three int64: layout version, key, stream."""
    if tensor.dtype != torch.int64:
        fail("key", "int64", tensor.dtype, TypeError)
    shape("key", tensor, (3,))
    memory("key", tensor)


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
        if len(values) != count or any(v < least for v in values):
            fail(name, f"{count} integers of at least {least}", tuple(values))
    if groups < 1:
        fail("groups", "at least 1", groups)
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
