"""The ops, as the layers call them.

With the native library loaded, each name is the dispatcher's op `torch.ops.bioplaus.<name>`: the processor's kernel
where there is one, the reference otherwise, and opaque to torch.compile. Without it, each name is the reference itself.
Signatures, meanings and docstrings are the reference's.
"""

from collections.abc import Callable, Sequence
from typing import ParamSpec, cast

import torch
from torch import Tensor

from .backends import native, reference
from .backends.reference.lc import memory_format, output_size
from .backends.reference.pack_signs import packed_shape

P = ParamSpec("P")


def _bind(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    if native.library is None:
        return function
    return cast(Callable[P, Tensor], getattr(torch.ops.bioplaus, function.__name__).default)


pack_signs = _bind(reference.pack_signs)
unpack_signs = _bind(reference.unpack_signs)
redraw_key = _bind(reference.redraw_key)
feedback_weight = _bind(reference.feedback_weight)
feedback_mm = _bind(reference.feedback_mm)
lc_forward = _bind(reference.lc_forward)
lc_backward_input = _bind(reference.lc_backward_input)
lc_backward_weight = _bind(reference.lc_backward_weight)


def _fake_pack_signs(weight: Tensor) -> Tensor:
    return weight.new_empty(packed_shape(weight.shape), dtype=torch.int32)


def _fake_unpack_signs(signs: Tensor, size: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    return signs.new_empty(size, dtype=dtype)


def _fake_redraw_key(key: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(key)


def _fake_feedback_weight(
    weight: Tensor | None,
    signs: Tensor | None,
    magnitude: Tensor | None,
    key: Tensor | None,
    entries: str,
    scale: float,
    size: Sequence[int],
    *,
    dtype: torch.dtype,
) -> Tensor:
    like = weight if weight is not None else magnitude
    if like is not None:
        return torch.empty_like(like, dtype=dtype)
    source = signs if signs is not None else key
    assert source is not None
    return source.new_empty(size, dtype=dtype)


def _fake_feedback_mm(
    grad_output: Tensor,
    weight: Tensor | None,
    signs: Tensor | None,
    magnitude: Tensor | None,
    key: Tensor | None,
    entries: str,
    scale: float,
    in_features: int,
) -> Tensor:
    return grad_output.new_empty(grad_output.shape[0], in_features)


def _fake_lc_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    d = len(stride)
    out = output_size(input.shape[2:], weight.shape[d + 1 : -1], stride, padding, dilation)
    size = (input.shape[0], weight.shape[d], *out)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


def _fake_lc_backward_input(
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
    size = (grad_output.shape[0], weight_size[-1] * groups, *input_size)
    return torch.empty(
        size, dtype=grad_output.dtype, device=grad_output.device, memory_format=memory_format(grad_output)
    )


def _fake_lc_backward_weight(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    out, o = grad_output.shape[2:], grad_output.shape[1]
    return grad_output.new_empty(*out, o, *kernel_size, input.shape[1] // groups)


if native.library is not None:
    _library = torch.library.Library("bioplaus", "IMPL")
    for _name, _reference in reference.OPS.items():
        _library.impl(_name, _reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"bioplaus::{_name}", globals()[f"_fake_{_name}"])
