"""Locally-connected layers padded other than by zeros, one mode for all dimensions or one for each."""

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from oracle import assert_same, locally_connected, with_feedback
from torch import Tensor

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")


def padded(x: Tensor, pairs: Sequence[tuple[int, int]], modes: Sequence[str]) -> Tensor:
    """The definition, one dimension after the other: which input each coordinate of the padded one is, if any."""
    for dim, ((before, after), mode) in enumerate(zip(pairs, modes, strict=True), x.dim() - len(modes)):
        size = x.shape[dim]
        at = torch.arange(-before, size + after)
        inside = (at >= 0) & (at < size)
        if mode == "circular":
            at, inside = at % size, torch.ones_like(inside)
        elif mode == "reflect":
            at, inside = (size - 1) - ((size - 1) - at.abs()).abs(), torch.ones_like(inside)
        elif mode == "replicate":
            at, inside = at.clamp(0, size - 1), torch.ones_like(inside)
        shape = [-1 if i == dim else 1 for i in range(x.dim())]
        x = x.index_select(dim, at.clamp(0, size - 1)) * inside.reshape(shape)
    return x


# Input size, kernel, stride, padding, modes: what is called wrong, each mode on each side, and on corners.
CASES: list[tuple[tuple[int, ...], Any, Any, Sequence[tuple[int, int]], Any]] = [
    ((5,), 3, 1, [(1, 1)], "circular"),
    ((5,), 4, 2, [(5, 2)], "circular"),  # once around
    ((4,), 3, 1, [(3, 0)], "reflect"),
    ((1,), 3, 1, [(2, 4)], "replicate"),
    ((4, 5), 3, 1, [(1, 1), (1, 1)], "circular"),
    ((4, 5), 3, 1, [(1, 1), (1, 1)], "replicate"),
    ((4, 5), (3, 2), (2, 1), [(2, 1), (0, 3)], "reflect"),
    ((3, 5), 3, 1, [(1, 1), (2, 0)], ("replicate", "circular")),  # latitude, longitude
    ((3, 5), 3, 1, [(1, 1), (2, 1)], ("zeros", "circular")),
    ((3, 5), 3, 1, [(0, 0), (2, 1)], ("circular", "zeros")),
    ((3, 2, 4), 2, 1, [(1, 0), (1, 1), (0, 1)], ("reflect", "circular", "reflect")),
    ((2, 3, 2), (1, 3, 2), 1, [(0, 0), (1, 1), (1, 0)], ["zeros", "replicate", "circular"]),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def build(case: Any, **named: Any) -> tuple[Any, tuple[str, ...], Tensor]:
    size, kernel, stride, pairs, mode = case
    kind = getattr(bk.nn, f"LocallyConnected{len(size)}d")
    named = {"dtype": torch.float64, "groups": 2} | named
    layer = kind(4, 6, kernel, stride, pairs, input_size=size, padding_mode=mode, **named)
    x = torch.randn(2, 4, *size, dtype=layer.weight.dtype, requires_grad=True)
    return layer, (mode,) * len(size) if isinstance(mode, str) else tuple(mode), x


@pytest.mark.parametrize("rule", [None, "usf", "fa"])
@cases
def test_output_and_gradients(case: Any, rule: str | None) -> None:
    layer, modes, x = build(case, feedback=rule)

    def plain(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        d = len(modes)
        return locally_connected(padded(x, case[3], modes), w, b, layer.stride, [(0, 0)] * d, layer.dilation, 2)

    y = layer(x)
    expected = with_feedback(plain, x, layer.weight, layer.feedback_matrix(), layer.bias)
    assert_same(y, expected)
    direction = torch.randn_like(y)
    leaves = (x, layer.weight, layer.bias)
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, direction), torch.autograd.grad(expected, leaves, direction), strict=True
    ):
        assert_same(ours, theirs)
    # Without a batch, in another memory format.
    assert_same(layer(x[0]), y[0])
    last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(len(modes), torch.contiguous_format)
    assert_same(layer(x.detach().contiguous(memory_format=last)), y.detach())


def test_a_mode_is_part_of_the_layer() -> None:
    layer, _, x = build(CASES[7], dtype=torch.float32, feedback="fa")
    assert "padding_mode=('replicate', 'circular')" in repr(layer) and layer.padding_mode == ("replicate", "circular")
    assert "padding_mode" not in repr(bk.nn.LocallyConnected1d(1, 1, 3, padding=1, input_size=4))
    assert bk.nn.LocallyConnected1d(1, 1, 1, padding_mode=["circular"], input_size=4).padding_mode == "circular"
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        *(torch.autograd.grad(f(x).square().sum(), (x, layer.weight)) for f in (compiled, layer)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    # A layer pickled before there were modes has none of their attributes.
    old = bk.nn.LocallyConnected2d(4, 6, 3, padding=1, input_size=(3, 5))
    expected = old(x)
    del old.__dict__["padding_mode"], old.__dict__["_pads"]
    assert torch.equal(old(x), expected) and "padding_mode" not in repr(old)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"padding_mode": "wrap"}, r"padding_mode: expected one of \('zeros', .*\) or 2 of them, got 'wrap'"),
        ({"padding_mode": ("circular",)}, r"padding_mode: expected .* or 2 of them, got \('circular',\)"),
        ({"padding_mode": ("circular", 1)}, r"padding_mode: expected .* got \('circular', 1\)"),
        ({"padding_mode": "circular", "padding": 5}, r"padding: expected at most 4 of 'circular' in a dimension of s"),
        ({"padding_mode": "reflect", "padding": (3, 4)}, r"padding: expected at most 3 of 'reflect' .* got \(4, 4\)"),
    ],
)
def test_errors(named: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bk.nn.LocallyConnected2d(2, 3, 3, input_size=4, **named)


def test_an_inverse_is_for_zeros() -> None:
    layer = bk.nn.LocallyConnected1d(2, 3, 3, padding=1, padding_mode="circular", input_size=4)
    with pytest.raises(ValueError, match="layer: expected a locally-connected layer padded with zeros"):
        bk.targetprop.learned_inverse(layer)
