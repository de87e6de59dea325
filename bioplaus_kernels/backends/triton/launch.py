"""How Triton's kernels are launched: on the device of their tensors, with a tile that fits it, at little cost.

Triton's own launch binds, specialises and looks up its arguments anew each time, which takes several times as long as
these kernels do. In eager mode the compiled kernel is kept by what decides its code, and called directly; torch.compile
sees the launch itself.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import triton_op
from triton.runtime.jit import JITFunction

from ..._flops import count


class Tile(NamedTuple):
    """`rows` of dY (or samples), `columns` of B (or outputs), `depth` of the sum, and how they are run."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        """As a launch takes them."""
        return {
            "BM": self.rows, "BN": self.columns, "BK": self.depth, "num_warps": self.warps, "num_stages": self.stages
        }  # fmt: skip


@functools.cache
def device_limits(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability of `device` (AMD's have no wgmma: 8.0), and bytes of shared memory that a block may have."""
    if device.type != "cuda":
        return (8, 6), 101_376  # in the interpreter: the least that these kernels run on
    of: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return (8, 0), of.shared_memory_per_block
    return (of.major, of.minor), of.shared_memory_per_block_optin


def fitting(tiles: Sequence[Tile], rows: int, left: int, right: int, shared: int) -> Tile:
    """The first of `tiles` that holds `rows`, or the largest, with as many stages as fit; a smaller one if none does.

    A stage holds the operands' tiles, of `left` bytes an entry (rows x depth) and `right` (depth x columns).
    """
    at = next((i for i, tile in enumerate(tiles) if rows <= tile.rows), len(tiles) - 1)
    for tile in reversed(tiles[: at + 1]):
        stages = min(tile.stages, shared // (tile.depth * (tile.rows * left + tile.columns * right)))
        if stages >= 2 or tile is tiles[0]:
            return tile._replace(stages=max(stages, 1))
    raise AssertionError("no tiles")


def traced(x: Tensor) -> bool:
    """Whether launches on `x` are to be recorded rather than made: it holds no data, or a dispatch mode is on."""
    plain = type(x) is Tensor or type(x) is torch.nn.Parameter
    return not plain or torch._C._len_torch_dispatch_stack() > 0


def product(reference: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator: an op of the namespace `bioplaus_triton` with the arguments of `reference`.

    The function itself is called in eager mode, the op, which costs more than it, where something is traced.
    """

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        function.__signature__ = inspect.signature(reference)  # type: ignore[attr-defined]
        op = triton_op(f"bioplaus_triton::{reference.__name__}", function, mutates_args={})
        count("bioplaus_triton", reference.__name__)

        @functools.wraps(reference)
        def call(*args: Any) -> Tensor:
            if torch.compiler.is_compiling() or traced(args[0]):
                return op(*args)
            return function(*args)

        return call

    return decorate


_runners: dict[Any, Callable[..., None]] = {}
_MOST = 4096  # that are kept


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[float | None, ...],
    constants: dict[str, Any],
) -> None:
    """kernel[grid](*tensors, *numbers, **constants), on the device of the first tensor, whichever is the current one.

    `constants`: those of the code, in order, and then the compiler's options.
    """
    if not isinstance(kernel, JITFunction):  # the interpreter, or a tracer
        kernel[grid](*tensors, *numbers, **constants)
        return
    assert tensors[0] is not None
    index = tensors[0].device.index
    if index != torch.cuda.current_device():
        if index is None:
            raise RuntimeError(f"Triton: expected tensors on a GPU, got one on {tensors[0].device}")
        with torch.cuda.device(index):
            launch(kernel, grid, tensors, numbers, constants)
        return
    # What Triton specialises on (alignment; numbers that are 1, multiples of 16, or 32 bits wide) follows from these.
    marks = [None if x is None else (x.dtype, x.data_ptr() & 15) for x in tensors]
    values = tuple(constants.values())
    key = (kernel, index, grid, numbers, values, *marks)
    runner = _runners.get(key)
    if runner is None:
        if len(_runners) >= _MOST:
            _runners.clear()
        _runners[key] = kernel[grid](*tensors, *numbers, **constants)[grid]
    else:
        runner(*tensors, *numbers, *values[: len(kernel.arg_names) - len(tensors) - len(numbers)])
