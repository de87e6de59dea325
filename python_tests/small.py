"""One small layer of every class and one rule of every kind, for tests that try each with each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import RICH
from torch import Tensor

import bioplaus_kernels as bk

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

RULES: dict[str, bk.Rule] = {
    "backprop": bk.Backprop(),
    "usf": bk.SignSymmetry(),
    "usf-match": bk.SignSymmetry(scale="match"),
    "frsf": bk.FixedMagnitude(),
    "frsf-stored": bk.FixedMagnitude(stored=True),
    "brsf": bk.BatchMagnitude(),
    "fa": bk.FeedbackAlignment(),
    "fa-constant": bk.FeedbackAlignment(entries="constant"),
    "fa-stored": bk.FeedbackAlignment(stored=True),
    "fa_signed_init": bk.SignedInit(),
    "concordance": bk.SignConcordance(0.7),
    "low_rank": bk.LowRank(3),
    "wm": bk.WeightMirror(),
}
# What a rule keeps beside its record, suffixes and dtype in a float32 layer; rules that keep nothing are absent.
STATE = {
    "frsf": ("state", torch.uint8),
    "frsf-stored": ("weight", torch.float32),
    "brsf": ("state", torch.uint8),
    "fa": ("state", torch.uint8),
    "fa-constant": ("state", torch.uint8),
    "fa-stored": ("weight", torch.float32),
    "fa_signed_init": ("signs", torch.int32),
    "concordance": ("signs", torch.int32),
    "low_rank": ("p q", torch.float32),
    "wm": ("weight", torch.float32),
}


def _attention(rule: Any, **kwargs: Any) -> torch.nn.Module:
    return bk.nn.MultiheadAttention(8, 2, batch_first=True, feedback=rule, **kwargs)


LAYERS: dict[str, tuple[Callable[..., torch.nn.Module], tuple[int, ...]]] = {
    case.layer: (
        lambda rule, case=case, **kwargs: getattr(bk.nn, case.layer)(
            *case.args, **case.kwargs, feedback=rule, **kwargs
        ),
        case.shape,
    )
    for case in RICH
}
# Layers with one weight, called "weight", and one input.
ONE_WEIGHT = list(LAYERS)
LAYERS |= {
    "MultiheadAttention": (_attention, (2, 3, 8)),
    "Bilinear": (lambda rule, **kwargs: bk.nn.Bilinear(5, 5, 3, feedback=rule, **kwargs), (2, 4, 5)),
}
NOT_RECURRENT = list(LAYERS)
_SEQUENCES: dict[str, dict[str, Any]] = {
    "RNN": {"nonlinearity": "relu"},
    "LSTM": {"num_layers": 2, "bidirectional": True, "proj_size": 3},
    "GRU": {"num_layers": 2, "bidirectional": True, "bias": False},
}
LAYERS |= {
    name: (
        lambda rule, name=name, given=given, **kwargs: getattr(bk.nn, name)(
            5, 4, feedback=rule, batch_first=True, **given, **kwargs
        ),
        (3, 2, 5),
    )
    for name, given in _SEQUENCES.items()
}
LAYERS |= {
    f"{name}Cell": (
        lambda rule, name=name, **kwargs: getattr(bk.nn, f"{name}Cell")(5, 4, feedback=rule, **kwargs),
        (2, 5),
    )
    for name in _SEQUENCES
}

# One of each family.
FEW = [
    *("Linear", "Conv2d", "ConvTranspose1d", "LocallyConnected2d", "LocallyConnectedTranspose1d"),
    *("MultiheadAttention", "Bilinear", "LSTM", "GRUCell"),
]


def build(name: str, rule: Any, **kwargs: Any) -> tuple[torch.nn.Module, Tensor]:
    """The layer called `name` with `rule`, and an input that wants a gradient."""
    make, shape = LAYERS[name]
    layer = make(rule, **kwargs)
    weight = next(layer.parameters())
    return layer, torch.randn(shape, dtype=weight.dtype, device=weight.device, requires_grad=True)


def call(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """The layer's output, of x for each input, and after a step of a recurrent layer for each state that it takes."""
    if isinstance(layer, torch.nn.MultiheadAttention):
        return layer(x, x, x, need_weights=False)[0]
    if isinstance(layer, torch.nn.modules.rnn.RNNCellBase):
        first = layer(x)
        second = layer(x, first)
        return second if isinstance(second, Tensor) else torch.cat(second, -1)
    if isinstance(layer, torch.nn.RNNBase):
        return layer(x)[0]
    return layer(x, x) if isinstance(layer, torch.nn.Bilinear) else layer(x)


def gradients(layer: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> list[Tensor]:
    """Gradients of a fixed random projection of layer(x) for x and `parameters` (else a module's trainable ones)."""
    if isinstance(layer, torch.nn.Module) and not parameters:
        parameters = tuple(p for p in layer.parameters() if p.requires_grad)
    y = call(layer, x) if isinstance(layer, torch.nn.Module) else layer(x)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(y.shape, generator=generator).to(y)
    return list(torch.autograd.grad(y, (x, *parameters), direction))


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e)
