"""Target propagation's passes through layers and inverses that keep statistics."""

import copy
from typing import Any

import pytest
import torch
from test_targetprop import CLASSES, batch, gradients, losses
from torch import Tensor, nn

from bioplaus_kernels.targetprop import VARIANTS, TargetProp

pytestmark = pytest.mark.usefixtures("one_thread")


class Counts(nn.Module):
    """User buffers: one written, one replaced, one born in the first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "first"):
            self.register_buffer("first", x.detach().clone())
        self.calls += 1
        self.mean = 0.9 * self.mean + x.detach().mean()
        return x


def make(variant: str, spatial: bool = False, **kwargs: Any) -> TargetProp:
    """Four layers, three of them with batch norm and buffers of a user's, and inverses with batch norm."""

    def block(a: int, b: int) -> nn.Module:
        linear = nn.Conv2d(a, b, 1) if spatial else nn.Linear(a, b)
        return nn.Sequential(linear, (nn.BatchNorm2d if spatial else nn.BatchNorm1d)(b), Counts(), nn.Tanh())

    extra = 3 if variant == "ao_sdtp" else 0
    ends = [(7, 6), (6, 6), (6, CLASSES + extra)]
    flat = nn.Sequential(nn.Flatten(), nn.Linear(24, CLASSES)) if spatial else nn.Linear(6, CLASSES)
    layers = [block(5, 7), block(7, 6), block(6, 6), flat]
    inverses: list[Any] = [None, *(block(CLASSES if variant == "ddtp" else b, a) for a, b in ends)]
    if VARIANTS[variant].first == "hidden":
        inverses[-1] = None
    if extra:
        kwargs["auxiliary"] = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    if kwargs.get("mix") == 1:
        inverses = [None] * 4
    return TargetProp(layers, inverses, variant, **kwargs).double()


def contents(module: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in module.named_buffers()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_statistics_are_those_of_clean_activations(variant: str) -> None:
    tp = make(variant, sigma=1.0)
    x, y = batch(8)
    plain = copy.deepcopy(tp.layers)
    for _ in range(20):
        h = x
        for layer in plain:
            h = layer(h)
        losses(tp, x, y).backward()
    want, found = contents(plain), contents(tp.layers)
    assert found.keys() == want.keys() and any(name.endswith("first") for name in want)
    for name, b in found.items():
        torch.testing.assert_close(b, want[name], rtol=1e-12, atol=1e-12)
    # An inverse has seen what its own loss showed it, once a step.
    for inverse in tp.inverses[1:]:
        if inverse is not None:
            assert int(inverse[1].num_batches_tracked) == int(inverse[2].calls) == (20 if tp.inverse_objective else 0)


@pytest.mark.parametrize("variant", ["dtp", "sdtp"])
def test_two_dimensions_and_mixed_in_back_propagation(variant: str) -> None:
    tp = make("dtp", spatial=True, sigma=1.0, mix=1.0) if variant == "dtp" else make("sdtp", mix=0.5)
    x, y = batch(8)
    x = x[:, :, None, None].expand(8, 5, 2, 2) if variant == "dtp" else x
    h = tp.activations(x)
    before = contents(tp)
    tp.targets(h, y)
    if tp.inverse_objective:
        tp.inverse_loss(h)
        before |= {n: b for n, b in contents(tp).items() if n.startswith("inverses")}
    after = contents(tp)
    assert after.keys() == before.keys() and all(torch.equal(b, before[n]) for n, b in after.items())


def test_noisy_passes_normalise_by_their_batch() -> None:
    # The numbers are what they were: those of modules in training mode.
    tp = make("sdtp", sigma=1.0)
    h = [t.detach() for t in tp.activations(batch(8)[0])]
    state = torch.get_rng_state()
    first = tp.inverse_losses(h)[0]
    torch.set_rng_state(state)
    noisy = h[1] + torch.randn_like(h[1])
    f = tp.layers[1][0](noisy)
    f = ((f - f.mean(0)) / (f.var(0, correction=0) + 1e-5).sqrt()).tanh()
    torch.testing.assert_close(first, (tp.inverses[1](f) - h[1]).square().sum() / 8, rtol=1e-9, atol=1e-12)


def test_statistics_after_an_error() -> None:
    tp = make("dtp")
    h = tp.activations(batch(8)[0])
    before = dict(tp.layers.named_buffers())
    tp.layers[2][3] = nn.Linear(1, 1)
    with pytest.raises(RuntimeError):
        tp.inverse_loss(h)
    after = dict(tp.layers.named_buffers())
    assert all(after[n] is b for n, b in before.items())


@pytest.mark.slow
def test_a_compiled_step_moves_the_same() -> None:
    x, y = batch(8)
    tp = make("sdtp", sigma=0.0)
    losses(tp, x, y)  # what is born is born
    twin = copy.deepcopy(tp)
    losses(tp, x, y).backward()
    torch.compile(lambda: losses(twin, x, y), backend="aot_eager", fullgraph=True)().backward()
    want, found = contents(tp), contents(twin)
    assert found.keys() == want.keys()
    for name, b in found.items():
        torch.testing.assert_close(b, want[name], rtol=1e-9, atol=1e-12)
    for name, grad in gradients(twin).items():
        torch.testing.assert_close(grad, gradients(tp)[name], rtol=1e-9, atol=1e-12)
