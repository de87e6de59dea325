"""Kolen–Pollack, weight mirror, normalisation and sign concordance against their definitions."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import RICH
from small import FEW, LAYERS, ONE_WEIGHT, build, call
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bioplaus_kernels as bk
from bioplaus_kernels.feedback.record import weight_of


def pairs(layer: torch.nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(W, B) of every weight of a kp or wm layer, of an attention layer's out_proj too."""
    found = []
    for module in layer.modules():
        for name, b in module.named_parameters(recurse=False):
            if name.endswith("feedback_weight"):
                found.append((getattr(module, weight_of(name, "weight")), b))
    return found


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("first", [False, True], ids=["hidden", "first layer"])
def test_kp_gives_b_the_gradient_of_w(name: str, first: bool) -> None:
    layer, x = build(name, bk.KolenPollack())
    call(layer, x.detach() if first else x).square().sum().backward()
    for w, b in pairs(layer):
        assert bool(w.grad.any()) and torch.equal(w.grad, b.grad)
        assert w.grad.data_ptr() != b.grad.data_ptr()


@pytest.mark.parametrize("name", FEW)
def test_kp_leaves_b_alone_where_w_is_frozen(name: str) -> None:
    # B would go its own way, and W − B with it.
    layer, x = build(name, bk.KolenPollack())
    for w, _ in pairs(layer):
        w.requires_grad_(False)
    call(layer, x).square().sum().backward()
    assert x.grad.any() and all(b.grad is None for _, b in pairs(layer))


class Called(torch.nn.Module):
    """`call` of a layer."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return call(self.layer, x)


def test_data_parallel_waits_for_no_b_of_a_frozen_w(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        for rule in ("kp", "sa", bk.LowRank(4, learned=True)):
            for name in FEW:
                layer, x = build(name, rule)
                for parameter, w in layer.named_parameters():
                    w.requires_grad_("weight" not in parameter or "feedback" in parameter)
                model = torch.nn.parallel.DistributedDataParallel(Called(layer))
                for _ in range(2):
                    model(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", FEW)
def test_kp_with_b_equal_to_w_is_backprop(name: str) -> None:
    layer, x = build(name, "kp", dtype=torch.float64)
    plain, _ = build(name, None, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        for w, b in pairs(layer):
            b.copy_(w)
    x = x.detach().double().requires_grad_()
    ours, theirs = (torch.autograd.grad(call(m, x).square().sum(), x) for m in (layer, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_difference_of_w_and_b_decays(optimizer: Any) -> None:
    lr, decay, steps = 0.05, 0.3, 20
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.Linear(5, 3)
    ).double()
    report = bk.convert_(model, "kp")
    assert "add it to the optimizer" in str(report)
    step = optimizer(model.parameters(), lr=lr, weight_decay=decay)
    before = [w.detach() - b.detach() for w, b in pairs(model)]
    assert len(before) == 3
    for _ in range(steps):
        step.zero_grad()
        F.cross_entropy(model(torch.randn(8, 2, 4, 4, dtype=torch.float64)), torch.randint(3, (8,))).backward()
        step.step()
    for (w, b), difference in zip(pairs(model), before, strict=True):
        torch.testing.assert_close(w - b, difference * (1 - lr * decay) ** steps, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    "name", [n if n in ("Linear", "MultiheadAttention") else pytest.param(n, marks=pytest.mark.slow) for n in FEW]
)
def test_kp_compiles_and_checkpoints(name: str) -> None:
    layer, x = build(name, "kp")

    def gradients(run: Any) -> list[Tensor]:
        parameters = [p for p in layer.parameters() if p.requires_grad]
        return list(torch.autograd.grad(run(x).square().sum(), [x, *parameters]))

    want = gradients(lambda x: call(layer, x))
    compiled = torch.compile(lambda x: call(layer, x), backend="aot_eager", fullgraph=True)
    again = gradients(lambda x: checkpoint(call, layer, x, use_reentrant=False))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        first = gradients(compiled)
    for got in (first, again):
        torch.testing.assert_close(got, want)


def test_kp_under_autocast() -> None:
    layer, x = build("Linear", "kp")
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().square().sum().backward()
    assert layer.feedback_weight.grad.dtype == torch.float32
    assert torch.equal(layer.feedback_weight.grad, layer.weight.grad)


def angle(a: Tensor, b: Tensor) -> float:
    return math.degrees(math.acos(F.cosine_similarity(a.flatten(), b.flatten(), 0).item()))


@pytest.mark.parametrize("name", [*ONE_WEIGHT, "MultiheadAttention"])
def test_the_mirror_finds_w(name: str) -> None:
    layer, _ = build(name, bk.WeightMirror(scale=0.3))
    generator = torch.Generator().manual_seed(3)
    # The first B is up to ten times the weight, and forgotten by halves; then the noise is averaged out.
    for lr in (*[0.5] * 20, *[0.1] * 10):
        bk.mirror_(layer, lr=lr, decay=lr, batch_size=4096, generator=generator)
    for w, b in pairs(layer):
        assert angle(w, b) < 6
        assert b.square().mean().sqrt().item() == pytest.approx(0.3, rel=1e-5)


def test_the_mirror_without_normalisation_has_w_as_its_fixed_point() -> None:
    layer, _ = build("Linear", "wm")
    for k in range(1, 400):
        bk.mirror_(layer, lr=1 / k, decay=1 / k, batch_size=256, normalise=False)
    torch.testing.assert_close(layer.feedback_weight, layer.weight.detach(), rtol=0, atol=0.02)


def test_strict_and_initial_normalisation() -> None:
    layer = bk.nn.Linear(64, 48, feedback=bk.FeedbackAlignment(scale="initial", entries="constant"))
    strict = bk.nn.Linear(64, 48, feedback=bk.SignSymmetry(scale="match"))
    with torch.no_grad():
        strict.weight.copy_(layer.weight)
    first = layer.weight.detach().clone()
    x = torch.randn(5, 64, requires_grad=True)
    for _ in range(2):
        for module, norm in ((layer, first.norm()), (strict, strict.weight.norm())):
            assert module.feedback_matrix().norm().item() == pytest.approx(norm.item(), rel=1e-5)
            y = module(x)
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
            torch.testing.assert_close(dx, torch.ones(5, 48) @ module.feedback_matrix(), rtol=1e-5, atol=1e-5)
            with torch.no_grad():
                module.weight.mul_(3)
    other = bk.nn.Linear(64, 48, feedback=layer.feedback)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.feedback_matrix(), layer.feedback_matrix())


@pytest.mark.parametrize("case", RICH, ids=lambda case: case.layer)
def test_concordance_flips_fixed_signs(case: Any) -> None:
    def at(p: float) -> Any:
        return getattr(bk.nn, case.layer)(*case.args, **case.kwargs, feedback=bk.SignConcordance(p))

    for p, factor in ((1.0, 1), (0.0, -1)):
        layer = at(p)
        assert torch.equal(layer.feedback_matrix(), factor * layer.rms() * layer.weight.detach().sign())
    layer = at(0.6)
    c = layer.feedback_matrix().sign() * layer.weight.detach().sign()
    with torch.no_grad():
        layer.weight.normal_()
    assert torch.equal(layer.feedback_matrix().sign(), c * layer.weight.detach().sign())
    with bk.frozen_signs(layer):
        assert torch.equal(layer.feedback_matrix().sign(), c * layer.weight.detach().sign())


def test_the_fraction_of_concordant_signs() -> None:
    layer = bk.nn.Linear(300, 200, feedback=bk.SignConcordance(0.8))
    with torch.no_grad():
        layer.weight[3, 5] = 0
    same = layer.feedback_matrix().sign() == layer.weight.sign()
    assert layer.feedback_matrix()[3, 5] == 0
    # Six standard deviations of 60 000 draws.
    assert same.double().mean().item() == pytest.approx(0.8, abs=6 * math.sqrt(0.16 / 60_000))
    x = torch.randn(7, 300, requires_grad=True)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(dx, torch.ones(7, 200) @ layer.feedback_matrix(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bk.KolenPollack(stored=False), "stored: expected True with 'kp'"),
        (lambda: bk.WeightMirror(stored=False), "stored: expected True with 'wm'"),
        (lambda: bk.KolenPollack(scale="match"), "scale: expected one that does not follow W.*got 'match'"),
        (lambda: bk.SignConcordance(1.5), "p: expected a number from 0 to 1, got 1.5"),
        (lambda: bk.mirror_(torch.nn.Linear(2, 2)), "model: expected a layer with the rule 'wm', got none"),
        (lambda: bk.mirror_(bk.nn.Linear(2, 2, feedback="wm"), lr=-1), "lr: expected a number from 0 to 1, got -1"),
        (
            lambda: bk.functional.linear(torch.ones(1, 2), torch.ones(2, 2), feedback=bk.SignSymmetry(scale="initial")),
            "feedback: .*keeps state",
        ),
        (
            lambda: bk.functional.linear(torch.ones(1, 2), torch.ones(2, 2), feedback="concordance"),
            "feedback: .*keeps state",
        ),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
