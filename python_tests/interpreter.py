"""Triton's interpreter as the tests need it: every access checked against the arguments' memory, and bf16 right.

`checked()` replaces, while it lasts, the interpreter's masked load and store by ones that raise OutOfBounds where an
active lane lies in no tensor handed to a kernel (the interpreter itself reads what is there), its conversions from and
to bf16 by torch's (it cuts where hardware rounds), and its products by ones that read bf16 (it multiplies the bits).
Other arithmetic on bf16 raises.
"""

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


class OutOfBounds(Exception):
    """A kernel touched memory outside of its arguments."""


def _to_float(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(data: np.ndarray) -> np.ndarray:
    values = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).to(torch.bfloat16)
    return values.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


class _Memory:
    """The storages of the tensors that a running kernel was given."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []

    def hold(self, tensors: list[torch.Tensor]) -> None:
        spans = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in (t.untyped_storage() for t in tensors)})
        self.starts, self.ends = [s for s, _ in spans], [e for _, e in spans]

    def check(self, what: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        pointers, mask = np.broadcast_arrays(pointers, mask)
        active = pointers[mask].astype(np.int64).ravel()
        if active.size == 0:
            return
        low, high = int(active.min()), int(active.max()) + size
        span = bisect.bisect_right(self.starts, low) - 1
        if span >= 0 and high <= self.ends[span]:
            return
        for pointer in np.unique(active).tolist():
            span = bisect.bisect_right(self.starts, pointer) - 1
            if span < 0 or pointer + size > self.ends[span]:
                end = self.ends[span] if span >= 0 else 0
                raise OutOfBounds(f"{what} of {size} bytes, {pointer - end} bytes past the end of the nearest argument")


@contextmanager
def checked() -> Iterator[None]:
    """Kernels that run inside are checked."""
    memory, builder = _Memory(), interpreter.InterpreterBuilder
    patch = pytest.MonkeyPatch()
    launch, load, store = interpreter.GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store
    cast, dot, binary = builder.cast_impl, builder.create_dot, builder.binary_op
    unary = builder.unary_op

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        memory.hold([x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)])
        return launch(self, *args, **kwargs)

    def size_of(pointers: Any) -> int:
        return max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        memory.check("load", pointers.data, mask.data, size_of(pointers))
        return load(self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        memory.check("store", pointers.data, mask.data, size_of(pointers))
        return store(self, pointers, value, mask, *rest)

    def cast_impl(self: Any, source: Any, to: Any, *_: Any) -> Any:
        a, b = source.dtype.scalar, to.scalar
        if tl.bfloat16 not in (a, b):
            return cast(self, source, to)
        if a == b:
            return source
        if {a, b} != {tl.bfloat16, tl.float32}:
            raise NotImplementedError(f"{a} to {b}: go by way of float32")
        convert = _to_float if a == tl.bfloat16 else _to_bf16
        return interpreter.TensorHandle(convert(source.data), b)

    def create_fp_to_fp(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        return cast_impl(self, source, to)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(_to_float(x.data), tl.float32) for x in (a, b))
        elif a.dtype.scalar == tl.float16:
            a, b = (interpreter.TensorHandle(x.data.astype(np.float32), tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    def refuse(*operands: Any) -> None:
        if any(x.dtype.scalar == tl.bfloat16 for x in operands):
            raise NotImplementedError("arithmetic in bf16, which this interpreter gets wrong")

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        refuse(a, b)
        return binary(self, a, b, op)

    def unary_op(self: Any, a: Any, op: Any) -> Any:
        refuse(a)
        return unary(self, a, op)

    def lang_tensor(tensor: Any, scope: Any) -> None:
        lang(tensor, scope)
        # Older ones ask an array of one element for an integer, which newer numpy refuses.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    lang = interpreter._patch_lang_tensor
    patch.setattr(interpreter, "_patch_lang_tensor", lang_tensor)
    patch.setattr(interpreter.GridExecutor, "__call__", call)
    for name, function in (
        ("create_masked_load", masked_load),
        ("create_masked_store", masked_store),
        ("cast_impl", cast_impl),
        ("create_fp_to_fp", create_fp_to_fp),
        ("create_dot", create_dot),
        ("binary_op", binary_op),
        ("unary_op", unary_op),
    ):
        patch.setattr(builder, name, function)
    try:
        yield
    finally:
        patch.undo()
