"""Layers with a weight that is computed before each call, converted: as torch.nn's where B is W."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Same(bk.Rule):
    """B = W, by the way that every rule goes."""

    name = "same"

    def matrix(self, weight: Tensor, state: Any) -> Tensor:
        return weight.clone()


COMPUTE: dict[str, Callable[[nn.Module, str], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm by hooks": weight_norm,
    "spectral_norm by hooks": spectral_norm,
    "pruning": lambda m, name: prune.l1_unstructured(m, name, 0.5),
}
WEIGHTS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "weight_hh_l0": (lambda: nn.LSTM(6, 6, 2, proj_size=3), lambda m, x: m(x)[0]),
    "weight_hr_l1": (lambda: nn.LSTM(6, 6, 2, proj_size=3), lambda m, x: m(x)[0]),
    "weight_ih_l0_reverse": (lambda: nn.GRU(6, 4, bidirectional=True), lambda m, x: m(x)[0]),
    "weight_ih_l0": (lambda: nn.RNN(6, 4, bidirectional=True), lambda m, x: m(x)[0]),
    "weight_hh": (lambda: nn.GRUCell(6, 6), lambda m, x: m(x[0], m(x[1]))),
    "weight": (lambda: nn.Bilinear(6, 6, 4), lambda m, x: m(x, x)),
    "in_proj_weight": (lambda: nn.MultiheadAttention(6, 2), lambda m, x: m(x, x, x)[0]),
    "k_proj_weight": (lambda: nn.MultiheadAttention(6, 2, kdim=5, vdim=5), lambda m, x: m(x, *[x[..., 1:]] * 2)[0]),
}


class Around(nn.Module):
    def __init__(self, layer: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("how", COMPUTE)
def test_a_computed_weight_takes_a_rule(how: str, name: str) -> None:
    make, call = WEIGHTS[name]
    models = [Around(make(), call).eval() for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for m in models:
            COMPUTE[how](m.layer, name)
    plain, model = models
    model.load_state_dict(plain.state_dict())
    x = torch.randn(3, 2, 6, requires_grad=True)
    assert bk.convert_(model, Same(), example=x).proven == ["layer"]
    direction = torch.randn_like(plain(x))
    wanted = [n for n, p in plain.named_parameters() if p.requires_grad]
    ours, theirs = (
        torch.autograd.grad(m(x), [x, *(m.get_parameter(n) for n in wanted)], direction) for m in (model, plain)
    )
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e)
    bk.convert_(model, "usf")
    layer: Any = model.layer
    assert torch.equal(layer.feedback_matrix(name).sign(), getattr(layer, name).sign())
    assert bk.convert_(model, None).restored and "bioplaus" not in type(layer).__module__
    assert torch.equal(model(x), plain(x))
