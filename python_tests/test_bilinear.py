"""Bilinear layers against autograd through B in the weight's place."""

import pytest
import torch
from oracle import RULES, assert_same
from torch import Tensor, nn

import bioplaus_kernels as bk


@pytest.mark.parametrize("rule", [*RULES, "kp"])
def test_bilinear(rule: str) -> None:
    layer = bk.nn.Bilinear(3, 4, 6, dtype=torch.float64, feedback=RULES.get(rule, rule))
    w, b = layer.weight, layer.feedback_matrix()
    for size in ((), (5,), (2, 3)):
        x1, x2 = (torch.randn(*size, n, dtype=torch.float64, requires_grad=True) for n in (3, 4))

        def plain(x1: Tensor, x2: Tensor, w: Tensor) -> Tensor:
            return torch.einsum("...i,oij,...j->...o", x1, w, x2)

        z = plain(x1, x2, b.detach())
        expected = plain(x1.detach(), x2.detach(), w) + layer.bias + (z - z.detach())
        y = layer(x1, x2)
        assert_same(y, expected)
        direction = torch.randn_like(y)
        wanted = (x1, x2, w, layer.bias)
        for a, e in zip(*(torch.autograd.grad(out, wanted, direction) for out in (y, expected)), strict=True):
            assert_same(a, e)
    # With one input that wants a gradient, and none.
    (one,) = torch.autograd.grad(layer(x1.detach(), x2).sum(), x2)
    (both, _) = torch.autograd.grad(layer(x1, x2).sum(), (x2, x1))
    assert torch.equal(one, both)
    if rule == "fa":
        assert torch.equal(layer(x1.detach(), x2.detach()), nn.Bilinear.forward(layer, x1, x2))
        with pytest.raises(ValueError, match="input2: expected leading dimensions"):
            layer(x1, x2[:1])
        with pytest.raises(ValueError, match="input1: expected 3 features in the last dimension"):
            layer(x2, x2)
        with pytest.raises(TypeError, match="input2: expected a tensor, got list"):
            layer(x1, [1.0])
        y = bk.functional.bilinear(x1, x2, w, layer.bias, feedback=b)
        assert_same(torch.autograd.grad(y.sum(), x2)[0], one)
