"""Operands whose storage holds less than their elements, as FSDP2 leaves a parameter's, are refused by name."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bitwise import KEY, each_device, needs_native
from torch import Tensor

from bioplaus_kernels import ops
from bioplaus_kernels.backends import TRITON_OPS, reference

G, W, X = torch.randn(3, 4), torch.randn(4, 5), torch.randn(2, 1, 4)
SIGNS = reference.pack_signs(W)
BLOCK, SPATIAL = torch.randn(4, 2, 1, 1), torch.randn(2, 2, 4)
GEOMETRY = ([1], [0, 0], [1], 1)
# An LSTM of two units, projected to three, over a packed sequence.
SIZES, Y, W2 = torch.tensor([3, 2]), torch.randn(5, 8), torch.randn(8, 3)
STATES = torch.randn(3, 3), torch.randn(3, 2)
FLOAT = {"dtype": torch.float32}
# op, arguments: every tensor that it can take
CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("pack_signs", (W,), {}),
    ("unpack_signs", (SIGNS, [4, 5]), FLOAT),
    ("redraw_key", (KEY, W), {}),
    ("feedback_weight", (W, None, None, KEY, "uniform", 1.0, [4, 5]), FLOAT),
    ("feedback_weight", (None, SIGNS, W, None, "stored", 1.0, [4, 5]), FLOAT),
    ("feedback_mm", (G, W, None, None, None, "constant", 1.0, 5), {}),
    ("feedback_mm", (G, None, SIGNS, None, None, "constant", 1.0, 5), {}),
    ("feedback_mm", (G, None, None, None, KEY, "constant", 1.0, 5), {}),
    ("feedback_mm", (G, None, None, W, None, "stored", 1.0, 5), {}),
    ("lc_forward", (X, BLOCK, torch.randn(4, 2), *GEOMETRY), {}),
    ("lc_backward_input", (SPATIAL, BLOCK, None, None, KEY, "uniform", 1.0, [4, 2, 1, 1], [4], *GEOMETRY), {}),
    (
        "lc_backward_input",
        (SPATIAL, None, reference.pack_signs(BLOCK), BLOCK, None, "stored", 1.0, [4, 2, 1, 1], [4], *GEOMETRY),
        {},
    ),
    ("conv_backward_weight", (SPATIAL, X, [1], [1], [0], [1]), {}),
    ("lc_backward_weight", (SPATIAL, X, [1], *GEOMETRY), {}),
    ("recurrent_forward", (Y, *STATES, W2, torch.randn(8), torch.randn(3, 2), SIZES, "LSTM", False), {}),
    (
        "recurrent_backward",
        (
            *(torch.randn(5, 3), *STATES, torch.randn(5, 3), torch.randn(5, 4, 2), torch.randn(5, 2), *STATES, W2),
            *(torch.randn(3, 2), SIZES, "LSTM", False, [True] * 3),
        ),
        {},
    ),
]


def without_memory(x: Tensor) -> Iterator[Tensor]:
    """`x` of a freed storage; of one that ends a byte before it does, at an offset, and in another memory order."""
    freed = x.clone()
    freed.untyped_storage().resize_(0)
    yield freed
    short = torch.cat((x.new_zeros(7), x.flatten()))[7:].view(x.shape)
    transposed = x.transpose(0, -1).clone().transpose(0, -1)
    for y in (short, transposed):
        y.untyped_storage().resize_(y.untyped_storage().nbytes() - 1)
        yield y


def refuses(function: Callable[..., Tensor], name: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Every tensor among `args` in turn, by its name."""
    for i, parameter in enumerate(list(inspect.signature(reference.OPS[name]).parameters)[: len(args)]):
        if isinstance(args[i], Tensor):
            for bad in without_memory(args[i]):
                with pytest.raises(
                    ValueError, match=f"^{parameter}: expected a tensor with memory, got one whose stor"
                ):
                    function(*args[:i], bad, *args[i + 1 :], **named)


calls = pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])


@needs_native
@each_device
@calls
def test_native(call: tuple[str, tuple[Any, ...], dict[str, Any]], device: torch.device) -> None:
    name, args, named = call
    args = tuple(x.to(device) if isinstance(x, Tensor) else x for x in args)
    refuses(getattr(torch.ops.bioplaus, name), name, args, named)


@calls
def test_reference(call: tuple[str, tuple[Any, ...], dict[str, Any]]) -> None:
    refuses(reference.OPS[call[0]], *call)


@pytest.mark.parametrize(
    "call", [c for c in CALLS if c[0] in TRITON_OPS and "stored" not in c[1][:6]], ids=lambda call: call[0]
)
def test_triton(call: tuple[str, tuple[Any, ...], dict[str, Any]]) -> None:
    """Before anything is launched."""
    pytest.importorskip("triton")
    from bioplaus_kernels.backends.triton import feedback_mm, lc

    refuses(getattr(feedback_mm if call[0] == "feedback_mm" else lc, call[0]), *call)


def test_no_elements_need_no_memory() -> None:
    """And a broadcast operand needs its own alone."""
    empty = torch.zeros(4, 5)[:, 5:]
    empty.untyped_storage().resize_(0)
    expanded = torch.ones(1, 1).expand(4, 5)
    for pack_signs in (ops.pack_signs, reference.pack_signs):
        assert pack_signs(empty).numel() == 0
        assert torch.equal(pack_signs(expanded), pack_signs(torch.ones(4, 5)))
