"""The ops, as the layers call them.

With the native library loaded, each name is the dispatcher's op `torch.ops.bioplaus.<name>`: the processor's kernel
where there is one, the reference otherwise, and opaque to torch.compile. Without it, each name is the reference itself.
On a machine with a GPU the products are functions that take the fastest way by `backends.rule`. `backends.use` binds
all names anew, so that a choice costs nothing at a call: look them up here at each call, and keep none. Signatures,
meanings and docstrings are the reference's.
"""

import importlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, cast

import torch
from torch import Tensor

from . import backends
from .backends import native, reference, rule
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


def _only(name: str, backend: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # `call` for tensors on the device of `backend`; everything else raises.
    reason = backends.lacks(name, backend)
    device = "cpu" if backend == "cpu" or (backend == "triton" and not torch.cuda.is_available()) else "cuda"

    def op(*args: Any, **kwargs: Any) -> Tensor:
        if reason:
            raise RuntimeError(f"backend {backend!r} cannot be used: {reason}")
        tensor = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if tensor.device.type != device:
            raise RuntimeError(f"backend {backend!r} cannot be used: expected tensors on {device}, got {tensor.device}")
        return call(*args, **kwargs)

    op.__name__ = name
    return op


def _ways(name: str) -> list[str]:
    # Kernels of this process for CUDA tensors, beside the reference and the vendor's product.
    return [way for way in ("cuda", "triton") if not (backends.unavailable(way) or backends.lacks(name, way))]


def _triton(name: str) -> Callable[..., Tensor]:
    importlib.import_module(".backends.triton", __package__)  # defines them
    return cast(Callable[..., Tensor], getattr(torch.ops.bioplaus_triton, name).default)


def _automatic_feedback_mm() -> Callable[..., Tensor]:
    from .backends.triton import configs

    ways, native_op, triton_op = ["cublas", *_ways("feedback_mm")], _bind(reference.feedback_mm), _triton("feedback_mm")

    def feedback_mm(
        grad_output: Tensor,
        weight: Tensor | None,
        signs: Tensor | None,
        magnitude: Tensor | None,
        key: Tensor | None,
        entries: str,
        scale: float,
        in_features: int,
    ) -> Tensor:
        arguments = (weight, signs, magnitude, key, entries, scale)
        if not grad_output.is_cuda or grad_output.dtype == torch.float64 or grad_output.dim() != 2:
            return native_op(grad_output, *arguments, in_features)
        m, k = grad_output.shape
        if m == 0 or k == 0 or in_features == 0:
            return native_op(grad_output, *arguments, in_features)
        if magnitude is not None and weight is None and signs is None and scale == 1:
            # B lies there: torch's own product, after the arguments are checked.
            return triton_op(grad_output, *arguments, in_features)
        source = 0.0 if signs is None else 0.125
        source += sum(x.element_size() for x in (weight, magnitude) if x is not None)
        p = rule.Product(m, in_features, k, grad_output.element_size(), source, entries)
        way = rule.least(rule.times(p, configs.architecture(grad_output.device)), ways)
        if way == "cuda":
            return native_op(grad_output, *arguments, in_features)
        if way == "triton":
            return triton_op(grad_output, *arguments, in_features)
        b = globals()["feedback_weight"](*arguments, (k, in_features), dtype=grad_output.dtype)
        return torch.mm(grad_output, b)

    return feedback_mm


def _automatic_lc(name: str) -> Callable[..., Tensor]:
    from .backends.triton import configs

    ways, native_op, triton_op = ["reference", *_ways(name)], _bind(reference.OPS[name]), _triton(name)

    def op(first: Tensor, *rest: Any) -> Tensor:
        if not first.is_cuda or first.dtype == torch.float64 or first.numel() == 0:
            return native_op(first, *rest)
        # The weight's size: (*out, O, *kernel, C / groups).
        if name == "lc_forward":
            size = rest[0].shape
        elif name == "lc_backward_input":
            size = rest[6]
        else:
            size = (*first.shape[2:], first.shape[1], *rest[1], rest[0].shape[1] // rest[-1])
        d = first.dim() - 2
        patches = math.prod(size[:d]) * math.prod(size[d + 1 : -1]) * size[-1] * rest[-1]
        p = rule.LocalProduct(first.shape[0], math.prod(size), patches, first.element_size())
        way = rule.least(rule.local_times(p, configs.architecture(first.device)), ways)
        return triton_op(first, *rest) if way == "triton" else native_op(first, *rest)

    return op


def _automatic(name: str) -> Callable[..., Tensor]:
    # Where there is no GPU nothing is left to choose at a call.
    if name not in backends.TRITON_OPS or backends.unavailable("triton") or not torch.cuda.is_available():
        return _bind(reference.OPS[name])
    return _automatic_feedback_mm() if name == "feedback_mm" else _automatic_lc(name)


def bind(backend: str | None) -> None:
    """Bind every name of this module to `backend`, or to the automatic choice."""
    for name, function in reference.OPS.items():
        if backend == "reference":
            op: Callable[..., Tensor] = function
        elif backend == "triton" and name in backends.TRITON_OPS:
            op = _only(name, backend, _triton(name))
        elif backend in ("cpu", "cuda"):
            op = _only(name, backend, _bind(function))
        else:
            op = _automatic(name)
        globals()[name] = op


if os.environ.get(backends.VARIABLE):
    backends.choose(os.environ[backends.VARIABLE])
elif torch.cuda.is_available():
    bind(None)
