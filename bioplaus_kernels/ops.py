"""The ops, as the layers call them.

With the native library loaded, each name is the dispatcher's op `torch.ops.bioplaus.<name>`: the processor's kernel
where there is one, the reference otherwise, and opaque to torch.compile. Without it, each name is the reference itself.
On a machine with a GPU the products are functions that take the fastest way by `backends.choice`. `backends.use` binds
all names anew, so that a choice costs nothing at a call: look them up here at each call, and keep none. Signatures,
meanings and docstrings are the reference's.
"""

import importlib
import inspect
import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from . import backends
from ._flops import FORMULAS, count
from .backends import choice, native, reference
from .backends.reference.lc import memory_format, output_size
from .backends.reference.pack_signs import packed_shape

P = ParamSpec("P")
R = TypeVar("R")


def _bind(function: Callable[P, R]) -> Callable[P, R]:
    if native.library is None:
        return function
    return cast(Callable[P, R], getattr(torch.ops.bioplaus, function.__name__).default)


pack_signs = _bind(reference.pack_signs)
unpack_signs = _bind(reference.unpack_signs)
redraw_key = _bind(reference.redraw_key)
feedback_weight = _bind(reference.feedback_weight)
feedback_mm = _bind(reference.feedback_mm)
feedback_conv = _bind(reference.feedback_conv)
conv_backward_weight = _bind(reference.conv_backward_weight)
lc_forward = _bind(reference.lc_forward)
lc_backward_input = _bind(reference.lc_backward_input)
lc_backward_weight = _bind(reference.lc_backward_weight)
recurrent_forward = _bind(reference.recurrent_forward)
recurrent_backward = _bind(reference.recurrent_backward)


# What an op's result is like, in the order of the reference's arguments.


def _fake_pack_signs(weight: Tensor) -> Tensor:
    return weight.new_empty(packed_shape(weight.shape), dtype=torch.int32)


def _fake_unpack_signs(signs: Tensor, size: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    return signs.new_empty(size, dtype=dtype)


def _fake_redraw_key(key: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(key)


def _fake_feedback_weight(*feedback: Any, dtype: torch.dtype) -> Tensor:
    weight, signs, magnitude, key, _, _, size = feedback
    like = weight if weight is not None else magnitude
    if like is not None:
        return torch.empty_like(like, dtype=dtype)
    return cast(Tensor, signs if signs is not None else key).new_empty(size, dtype=dtype)


def _fake_feedback_mm(grad_output: Tensor, *feedback: Any) -> Tensor:
    return grad_output.new_empty(grad_output.shape[0], feedback[6])


def _fake_feedback_conv(grad_output: Tensor, *rest: Any) -> Tensor:
    weight_size, input_size = rest[6], rest[7]
    return _like(grad_output, (grad_output.shape[0], weight_size[1], *input_size))


def _fake_conv_backward_weight(grad_output: Tensor, input: Tensor, kernel_size: Sequence[int], *_: Any) -> Tensor:
    return _like(input, (grad_output.shape[1], input.shape[1], *kernel_size))


def _fake_lc_forward(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    d = input.dim() - 2
    out = output_size(input.shape[2:], weight.shape[d + 1 : -1], *geometry[:-1])
    return _like(input, (input.shape[0], weight.shape[d], *out))


def _fake_lc_backward_input(grad_output: Tensor, *rest: Any) -> Tensor:
    weight_size, input_size, groups = rest[6], rest[7], rest[-1]
    return _like(grad_output, (grad_output.shape[0], weight_size[-1] * groups, *input_size))


def _fake_lc_backward_weight(grad_output: Tensor, input: Tensor, kernel_size: Sequence[int], *geometry: Any) -> Tensor:
    out, o = grad_output.shape[2:], grad_output.shape[1]
    return grad_output.new_empty(*out, o, *kernel_size, input.shape[1] // geometry[-1])


def _fake_recurrent_forward(input: Tensor, hidden: Tensor, cell: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    _, _, projection, _, mode, _ = rest
    units, lead = (hidden if projection is None else projection).shape[1], input.shape[:-1]
    none = input.new_empty(0)
    return (
        input.new_empty(*lead, hidden.shape[1]),
        input.new_empty(hidden.shape),
        none if cell is None else input.new_empty(cell.shape),
        input.new_empty(*lead, 4, units) if mode in ("LSTM", "GRU") else input.new_empty(0),
        input.new_empty(0) if cell is None else input.new_empty(*lead, units),
    )


def _fake_recurrent_backward(grad_output: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, output, _, _, hidden, cell, _, projection, _, mode, _, wanted = rest
    size, units = hidden.shape[1], (hidden if projection is None else projection).shape[1]
    width = reference.MODES[mode] * units
    there = (wanted[0], wanted[1], wanted[2] and projection is not None)
    sizes: tuple[Any, ...] = ((width, size), (width,), (size, units))
    weights = [output.new_empty(s if is_there else 0) for s, is_there in zip(sizes, there, strict=True)]
    return (
        output.new_empty(*output.shape[:-1], width),
        output.new_empty(hidden.shape),
        output.new_empty(0 if cell is None else cell.shape),
        *weights,
    )


def _like(x: Tensor, size: Sequence[int]) -> Tensor:
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _on_one_device(name: str) -> Callable[..., Any]:
    # One operand on the meta device is enough for the dispatcher to call a fake; its result would be memory that nobody
    # writes.
    fake, names = globals()[f"_fake_{name}"], tuple(inspect.signature(reference.OPS[name]).parameters)

    def checked(*args: Any, **named: Any) -> Any:
        # Of a packed sequence, which is on the CPU everywhere.
        tensors = [(n, x) for n, x in zip(names, args, strict=False) if isinstance(x, Tensor) and n != "batch_sizes"]
        (first, one), *others = tensors
        for other, x in others:
            if x.device != one.device:
                raise ValueError(f"{other}: expected a tensor on {one.device}, as {first}, got one on {x.device}")
        return fake(*args, **named)

    return checked


if native.library is not None:
    _library = torch.library.Library("bioplaus", "IMPL")
    for _name, _reference in reference.OPS.items():
        _library.impl(_name, _reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"bioplaus::{_name}", _on_one_device(_name))
    for _name in ("feedback_mm", "feedback_conv"):
        if hasattr(torch.ops.bioplaus, f"{_name}_by"):
            torch.library.register_fake(f"bioplaus::{_name}_by", _on_one_device(_name))
    for _name in FORMULAS:
        if hasattr(torch.ops.bioplaus, _name):
            count("bioplaus", _name)


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
        if tensor.is_cuda and not getattr(choice.gpu(tensor.device.index), backend):
            raise RuntimeError(
                f"backend {backend!r} cannot be used: {backends.lacks_kernels(backend, tensor.device.index)}"
            )
        return call(*args, **kwargs)

    op.__name__ = name
    return op


def _triton(name: str) -> Callable[..., Tensor]:
    module = importlib.import_module(f".backends.triton.{'lc' if name.startswith('lc') else name}", __package__)
    function = cast(Callable[..., Tensor], getattr(module, name))
    return partial(_formed_first, function) if name == "lc_backward_input" else function


def _formed_first(lc_backward_input: Callable[..., Tensor], grad_output: Tensor, *rest: Any) -> Tensor:
    _, signs, _, key, *_ = rest
    if signs is not None or key is not None:
        b = feedback_weight(*rest[:7], dtype=grad_output.dtype)
        rest = (None, None, b, None, "stored", 1.0, *rest[6:])
    return lc_backward_input(grad_output, *rest)


def _by(*args: Any) -> Tensor:
    return cast(Tensor, torch.ops.bioplaus.feedback_mm_by.default(*args))


def _by_triton(name: str) -> Callable[..., Tensor]:
    # Where the user says so: all that Triton has kernels for, on the device's own what it has none for.
    own, triton, signature = _bind(reference.OPS[name]), _triton(name), inspect.signature(reference.OPS[name])

    def op(*args: Any, **named: Any) -> Tensor:
        args = signature.bind(*args, **named).args if named else args
        has = args[0].dtype != torch.float64 and (name != "feedback_mm" or args[5] == "constant")
        return triton(*args) if has else own(*args)

    return _only(name, "triton", op)


def _automatic(name: str) -> Callable[..., Tensor]:
    function = reference.OPS[name]
    own = _bind(function)
    # Where there is no GPU nothing is left to choose at a call. An import leaves CUDA alone: what GPUs there are is
    # asked at the first call.
    if not torch.cuda.is_available():
        return own
    product = name in backends.TRITON_OPS
    triton = _triton(name) if product and find_spec("triton") else own
    signature = inspect.signature(function)

    def op(*args: Any, **named: Any) -> Tensor:
        if named:
            bound = signature.bind(*args, **named)
            args, named = bound.args, bound.kwargs
        tensor = next(x for x in args if isinstance(x, Tensor))
        if not tensor.is_cuda:
            return own(*args, **named)
        gpu = choice.gpu(tensor.device.index)
        way = choice.way(name, args, gpu) if product else "cuda" if gpu.cuda else "reference"
        if way == "triton":
            return triton(*args)
        if way == "reference":
            return function(*args, **named)
        return own(*args, **named) if way == "cuda" else _by(*args, way)

    return op


def bind(backend: str | None) -> None:
    """Bind every name of this module to `backend`, or to the automatic choice."""
    for name, function in reference.OPS.items():
        if backend == "reference":
            op: Callable[..., Tensor] = function
        elif backend == "triton" and name in backends.TRITON_OPS:
            op = _by_triton(name)
        elif backend in ("cpu", "cuda"):
            op = _only(name, backend, _bind(function))
        else:
            op = _automatic(name)
        globals()[name] = op


backends.followers.append(bind)
if os.environ.get(backends.VARIABLE):
    backends.choose(os.environ[backends.VARIABLE])
elif torch.cuda.is_available():
    bind(None)
