"""The elementwise products of thin blocks that do not overlap: the same function, where and only where they serve."""

from typing import Any

import pytest
import torch
from oracle import assert_same, with_feedback
from torch import Tensor

import bioplaus_kernels as bk
from bioplaus_kernels import ops

pytestmark = pytest.mark.usefixtures("one_thread")

PRODUCTS = ("lc_forward", "lc_backward_input", "lc_backward_weight")


def general(monkeypatch: Any) -> list[str]:
    """The names of the general products, as they are called from now on."""
    called: list[str] = []
    for name in PRODUCTS:
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, name=name, op=op: called.append(name) or op(*a))
    return called


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition, positions in one dimension and patches side by side."""
    d = x.dim() - 2
    blocks = weight.reshape(-1, weight.shape[d], weight.shape[d + 1 : -1].numel())
    patches = x.flatten(1)[:, : len(blocks) * blocks.shape[2]].reshape(len(x), len(blocks), -1)
    y = torch.einsum("npk,pok->nop", patches, blocks).unflatten(2, weight.shape[:d])
    return y if bias is None else y + (bias.movedim(-1, 0) if bias.dim() > 1 else bias.reshape(-1, *[1] * d))


# Samples, out channels, input size, kernel, bias; the forward product where samples × channels are few.
CASES: list[tuple[int, int, tuple[int, ...], int, Any]] = [
    (2, 1, (5120,), 5, "position"),
    (4, 4, (1400 * 3 + 2,), 3, "channel"),
    (17, 1, (4096,), 1, "position"),
    (3, 2, (64, 65), 1, None),
    (2, 3, (16, 16, 17), 1, "channel"),
]


@pytest.mark.parametrize("rule", [None, "usf", "fa", bk.SignSymmetry(scale="match")], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(case: Any, rule: Any, monkeypatch: Any) -> None:
    n, o, size, kernel, bias = case
    kind = getattr(bk.nn, f"LocallyConnected{len(size)}d")
    options = {"bias": False} if bias is None else {"bias_per": bias}
    layer = kind(1, o, kernel, kernel, input_size=size, dtype=torch.float64, feedback=rule, **options)
    x = torch.randn(n, 1, *size, dtype=torch.float64)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    for input in (x, x.contiguous(memory_format=last), x.transpose(0, 1).contiguous().transpose(0, 1)):
        input.requires_grad_()
        with monkeypatch.context() as patch:
            called = general(patch)
            y = layer(input)
            direction = torch.randn_like(y)
            leaves = (input, *layer.parameters())
            found = torch.autograd.grad(y, leaves, direction)
        assert called == ([] if n * o <= 16 else ["lc_forward"])
        expected = with_feedback(plain, input, layer.weight, layer.feedback_matrix(), layer.bias)
        assert_same(y, expected)
        for ours, theirs in zip(found, torch.autograd.grad(expected, leaves, direction), strict=True):
            assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("channels", "size", "named"),
    [
        ((2, 1), 4096, {}),
        ((1, 5), 4096, {}),
        ((1, 1), 4092, {}),
        ((1, 1), 4096, {"padding": 4}),
        ((1, 1), 8000, {"stride": 3}),
        ((1, 1), 16384, {"dilation": 2}),
        ((1, 1), 4096, {"dtype": torch.bfloat16}),
    ],
    ids=str,
)
def test_the_general_products_serve_everything_else(channels: Any, size: int, named: Any, monkeypatch: Any) -> None:
    layer = bk.nn.LocallyConnected1d(*channels, 4, **({"stride": 4} | named), input_size=size)
    x = torch.randn(2, channels[0], size, dtype=layer.weight.dtype, requires_grad=True)
    called = general(monkeypatch)
    layer(x).sum().backward()
    assert called == list(PRODUCTS)


def test_a_chosen_backend_serves(monkeypatch: Any) -> None:
    layer = bk.nn.LocallyConnected1d(1, 1, 4, 4, input_size=4096, feedback="fa")
    x = torch.randn(2, 1, 4096, requires_grad=True)
    grads = [torch.autograd.grad(layer(x).square().sum(), (x, layer.weight))]
    # What `use` bound is put back before it ends.
    with bk.backends.use("reference"), monkeypatch.context() as patch:
        called = general(patch)
        grads.append(torch.autograd.grad(layer(x).square().sum(), (x, layer.weight)))
    assert called == list(PRODUCTS)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads.append(torch.autograd.grad(compiled(x).square().sum(), (x, layer.weight)))
    for other in grads[1:]:
        for ours, theirs in zip(grads[0], other, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_errors_are_those_of_the_general_products() -> None:
    layer = bk.nn.LocallyConnected1d(1, 1, 4, 4, input_size=4096)
    with pytest.raises(TypeError, match=r"input: expected torch.float32, as weight, got torch.float64"):
        layer(torch.randn(2, 1, 4096, dtype=torch.float64))
    with pytest.raises(ValueError, match="bias: expected"):
        bk.functional.locally_connected1d(torch.randn(2, 1, 4096), layer.weight, torch.randn(2), 4)
    with pytest.raises(ValueError, match=r"weight: expected"):
        bk.functional.locally_connected1d(torch.randn(2, 1, 4096), layer.weight[1:], None, 4)
