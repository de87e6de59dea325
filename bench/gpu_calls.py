"""A call of every op in every way it is made, with what it is to give: by what is public, not by names of kernels."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bioplaus_kernels import ops
from bioplaus_kernels.backends import lacks, reference
from bioplaus_kernels.feedback import feedback_key

from .gate import mm_gate, relative_gate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows, out and in features: few rows and many, ragged and not, K in one part and in several.
SHAPES = ((1, 192, 320), (9, 1090, 321), (40, 320, 130), (100, 192, 256), (130, 256, 384), (600, 512, 640))


class Call(NamedTuple):
    """error: of a result over its bound, at most 1 where it is right."""

    name: str
    run: Callable[[], Tensor]
    error: Callable[[Tensor], float]


def _cells(w: Tensor, stored: Tensor) -> dict[str, tuple[Any, ...]]:
    key, signs = feedback_key(0).to(w.device), ops.pack_signs(w)
    return {
        "±s of W": (w, None, None, None, "constant", 0.1),
        "±s packed": (None, signs, None, None, "constant", 0.1),
        "±s seeded": (None, None, None, key, "constant", 0.1),
        "uniform": (None, None, None, key, "uniform", 0.1),
        "normal": (None, None, None, key, "normal", 0.1),
        "uniform, signs of W": (w, None, None, key, "uniform", 0.1),
        "stored, signs of W": (w, None, stored, None, "stored", 1.0),
        "stored, packed": (None, signs, stored, None, "stored", 1.0),
        "stored": (None, None, stored, None, "stored", 1.0),
    }


def _cpu(arguments: tuple[Any, ...], dtype: torch.dtype | None = None) -> list[Any]:
    # For the reference; numbers of the ops in another precision.
    moved = [x.cpu() if isinstance(x, Tensor) else x for x in arguments]
    return [x.to(dtype) if dtype and isinstance(x, Tensor) and x.is_floating_point() else x for x in moved]


def _same(expected: Callable[[], Tensor], result: Tensor) -> float:
    return 0.0 if torch.equal(result.cpu(), expected()) else math.inf


def _b(cell: tuple[Any, ...], size: tuple[int, ...]) -> Tensor:
    return reference.feedback_weight(*_cpu(cell), size, dtype=torch.float64)


def products(backend: str, shapes: tuple[tuple[int, int, int], ...] = SHAPES) -> Iterator[Call]:
    """feedback_mm, by `backend` (in whose `use` this is) and by each way that can be named."""
    named = ("digits", "int_mm", "formed") if hasattr(torch.ops.bioplaus, "feedback_mm_by") else ()
    for m, k, n in shapes:
        for dtype in DTYPES:
            g, w = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
            w[0, 0] = 0
            for name, cell in _cells(w, torch.rand(k, n).to(dtype)).items():
                label = f"feedback_mm {m}x{k}x{n} {str(dtype)[6:]} {name}"
                error = partial(_mm_error, g, cell, (k, n))
                yield Call(label, partial(ops.feedback_mm, g, *cell, n), error)
                for way in named if backend == "cuda" else ():
                    if way == "formed" or (cell[4] == "constant" and dtype == torch.float32):
                        run = partial(torch.ops.bioplaus.feedback_mm_by, g, *cell, n, way)
                        yield Call(f"{label}, {way}", run, error)


def _mm_error(g: Tensor, cell: tuple[Any, ...], size: tuple[int, ...], result: Tensor) -> float:
    return mm_gate(result.cpu(), g.cpu(), _b(cell, size))


def elementwise() -> Iterator[Call]:
    """Forming B, signs and keys."""
    for size in ((33, 190), (16, 8, 3, 3)):
        for dtype in DTYPES:
            w = torch.randn(size).to(dtype)
            w.view(-1)[::7] = 0
            for name, cell in _cells(w, torch.rand(size).to(dtype)).items():
                label = f"feedback_weight {'x'.join(map(str, size))} {str(dtype)[6:]} {name}"
                run = partial(ops.feedback_weight, *cell, size, dtype=dtype)
                expected = partial(reference.feedback_weight, *_cpu(cell), size, dtype=dtype)
                yield Call(label, run, _close(expected) if name == "normal" else partial(_same, expected))
            signs = ops.pack_signs(w)
            for name, op, arguments in (
                ("pack_signs", ops.pack_signs, (w,)),
                ("redraw_key", ops.redraw_key, (feedback_key(0).to(w.device), w)),
            ):
                expected = partial(reference.OPS[name], *_cpu(arguments))
                yield Call(f"{name} {str(dtype)[6:]}", partial(op, *arguments), partial(_same, expected))
            expected = partial(reference.unpack_signs, signs.cpu(), size, dtype=dtype)
            run = partial(ops.unpack_signs, signs, size, dtype=dtype)
            yield Call(f"unpack_signs {str(dtype)[6:]}", run, partial(_same, expected))


def _close(expected: Callable[[], Tensor]) -> Callable[[Tensor], float]:
    # Logarithms and cosines are each library's own.
    return lambda result: float((result.cpu() - expected()).abs().max() / (1e-2 * expected().abs().max()))


def locally_connected() -> Iterator[Call]:
    """The three products, of few samples and many."""
    for samples, channels, size in ((3, 5, 7), (40, 32, 8), (130, 8, 4)):
        out, geometry = (size + 1) // 2, ([2, 2], [1, 1, 1, 1], [1, 1], 1)
        for dtype in DTYPES:
            x = torch.randn(samples, channels, size, size).to(dtype)
            w = torch.randn(out, out, 16, 3, 3, channels).to(dtype)
            g = torch.randn(samples, 16, out, out).to(dtype)
            label = f"N={samples} C={channels} {str(dtype)[6:]}"
            calls = {
                "lc_forward": (x, w, None, *geometry),
                "lc_forward bias": (x, w, torch.randn(16).to(dtype), *geometry),
                "lc_forward bias of positions": (x, w, torch.randn(out, out, 16).to(dtype), *geometry),
                "lc_backward_weight": (g, x, [3, 3], *geometry),
            } | {
                f"lc_backward_input {name}": (g, *cell, list(w.shape), [size, size], *geometry)
                for name, cell in _cells(w, torch.rand(w.shape).to(dtype)).items()
            }
            for name, arguments in calls.items():
                op = name.split()[0]
                yield Call(f"{name} {label}", partial(getattr(ops, op), *arguments), partial(_sum_error, op, arguments))


def convolutions() -> Iterator[Call]:
    """Their input gradient with any B, and their weight gradient."""
    for dtype in DTYPES:
        w, g = torch.randn(16, 8, 3, 3).to(dtype), torch.randn(3, 16, 4, 5).to(dtype)
        for name, cell in _cells(w, torch.rand(w.shape).to(dtype)).items():
            arguments = (g, *cell, list(w.shape), [8, 9], [2, 2], [1, 1], [1, 1])
            run = partial(ops.feedback_conv, *arguments)
            yield Call(f"feedback_conv {str(dtype)[6:]} {name}", run, partial(_sum_error, "feedback_conv", arguments))
        rest = (g, torch.randn(3, 8, 8, 9).to(dtype), [3, 3], [2, 2], [1, 1], [1, 1])
        run, error = partial(ops.conv_backward_weight, *rest), partial(_sum_error, "conv_backward_weight", rest)
        yield Call(f"conv_backward_weight {str(dtype)[6:]}", run, error)


def _sum_error(op: str, arguments: tuple[Any, ...], result: Tensor) -> float:
    plain = reference.OPS[op]
    exact, torchs = plain(*_cpu(arguments, torch.float64)), plain(*_cpu(arguments))
    return relative_gate(result.cpu(), exact, torchs)


def recurrent() -> Iterator[Call]:
    """The loop over time, forward and back: each mode, dense and packed."""
    sizes = torch.tensor([4] * 5 + [2, 1], device="cpu")
    for mode, gates in reference.MODES.items():
        for dtype in DTYPES:
            h = 24
            x, w, b = (torch.randn(s).to(dtype) for s in ((int(sizes.sum()), gates * h), (gates * h, h), (gates * h,)))
            first = torch.randn(4, h).to(dtype)
            cell = first + 1 if mode == "LSTM" else None
            for packed in (None, sizes):
                given = x if packed is not None else x[:20].view(5, 4, -1)
                forward = (given, first, cell, w / 8, b, None, packed, mode, True)
                output, _, _, made, cells = ops.recurrent_forward(*forward)
                back = (
                    output,
                    first,
                    cell,
                    output,
                    made,
                    cells,
                    first,
                    cell,
                    w / 8,
                    None,
                    packed,
                    mode,
                    True,
                    [True] * 3,
                )
                for name, arguments in (("recurrent_forward", forward), ("recurrent_backward", back)):
                    # The first of what the op returns.
                    run = partial(lambda op, *a: getattr(ops, op)(*a)[0], name, *arguments)
                    label = f"{name} {mode} {'dense' if packed is None else 'packed'} {str(dtype)[6:]}"
                    yield Call(label, run, partial(_first_error, name, arguments))


def _first_error(op: str, arguments: tuple[Any, ...], result: Tensor) -> float:
    plain = reference.OPS[op]
    exact, torchs = plain(*_cpu(arguments, torch.float64))[0], plain(*_cpu(arguments))[0]
    return relative_gate(result.cpu(), exact, torchs)


def calls(backend: str) -> Iterator[Call]:
    """All that `backend` has kernels for, made on torch's default device; in its `use`. The ops take turns."""
    sources = [products(backend)]
    if not lacks("feedback_weight", backend):
        sources.append(elementwise())
    if not lacks("lc_forward", backend):
        sources.append(locally_connected())
    if not lacks("feedback_conv", backend):
        sources.append(convolutions())
    if not lacks("recurrent_forward", backend):
        sources.append(recurrent())
    return (call for turn in zip_longest(*sources) for call in turn if call is not None)
