"""Measures against closed forms: known angles of distributions, exact gradients, and files as they are written."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioplaus_kernels as bk
from bioplaus_kernels import direct, metrics

pytestmark = pytest.mark.usefixtures("one_thread")


def model() -> nn.Sequential:
    """Three layers, a norm and a dropout."""
    return nn.Sequential(
        nn.Linear(6, 40), nn.BatchNorm1d(40), nn.Tanh(), nn.Dropout(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 4)
    )


def batch() -> tuple[Tensor, Tensor]:
    """Inputs and classes."""
    return torch.randn(16, 6), torch.arange(16) % 4


def test_vectors_of_known_angles() -> None:
    a = torch.tensor([3.0, 0.0])
    assert metrics.compare(a, a) == (0, 1, 1)
    assert metrics.compare(a, 7 * a)[:2] == (0, 7)
    c = metrics.compare(a, torch.tensor([0.0, 2.0]))
    assert c.angle == pytest.approx(90) and c.norm_ratio == pytest.approx(2 / 3) and c.sign_agreement == 0
    assert metrics.compare(a, -a) == (180, 1, 0.5)
    assert metrics.compare(a, torch.tensor([1.0, 1e-3])).angle == pytest.approx(math.degrees(1e-3), rel=1e-6)
    zero = metrics.compare(a, torch.zeros(2))
    assert math.isnan(zero.angle) and zero.norm_ratio == 0
    assert math.isnan(metrics.compare(torch.zeros(2), a).norm_ratio)
    assert metrics.compare(torch.tensor(2.0), torch.tensor(-2.0)).angle == 180
    assert math.isnan(metrics.compare(torch.zeros(0, 3), torch.zeros(0, 3)).angle)
    with pytest.raises(ValueError, match="b: expected shape"):
        metrics.compare(a, torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_chunks_layouts_and_dtypes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_CHUNK", 100)
    a = torch.randn(7, 5, 3, 3).to(dtype).to(memory_format=torch.channels_last)
    b = torch.randn(7, 5, 3, 3).to(dtype)
    x, y = a.double().flatten(), b.double().flatten()
    c = metrics.compare(a, b)
    assert c.angle == pytest.approx(torch.rad2deg(torch.acos(F.cosine_similarity(x, y, 0))).item())
    assert c.norm_ratio == pytest.approx((y.norm() / x.norm()).item())
    assert c.sign_agreement == pytest.approx(((x > 0) == (y > 0)).double().mean().item())


def test_no_copy_of_the_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(512, 4096), torch.randn(512, 4096)
    with torch.profiler.profile(profile_memory=True) as profile:
        metrics.compare(a, b)
    largest = max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    assert largest <= 8 * metrics._CHUNK < a.nbytes


# Closed forms: a normal W to its sign, a uniform W, sign(W) ∘ |M| of two uniform draws, and an independent B.
@pytest.mark.parametrize(
    ("rule", "normal", "angle", "agreement"),
    [
        ("usf", True, math.degrees(math.acos(math.sqrt(2 / math.pi))), 1),
        ("usf", False, 30, 1),
        ("frsf", False, 41.41, 1),
        ("brsf", False, 41.41, 1),
        ("brsf", True, 46.29, 1),
        ("fa", True, 90, 0.5),
        ("fa_signed_init", False, 30, 1),
    ],
)
def test_angles_of_the_rules(rule: str, normal: bool, angle: float, agreement: float) -> None:
    layer = bk.nn.Linear(500, 400)
    (nn.init.normal_ if normal else nn.init.uniform_)(layer.weight, *(() if normal else (-1.0, 1.0)))
    bk.convert_(layer, rule)
    (found,) = metrics.weights(layer).values()
    assert found.angle == pytest.approx(angle, abs=0.5)
    assert found.sign_agreement == pytest.approx(agreement, abs=0.01)
    expected = layer.feedback_matrix().double().norm() / layer.weight.double().norm()
    assert found.norm_ratio == pytest.approx(expected.item())


def test_only_layers_with_a_rule_by_name() -> None:
    net = model()
    assert metrics.weights(net) == {}
    bk.convert_(net, "usf", last_layer="backprop")
    assert list(metrics.weights(net)) == ["0.weight", "4.weight"]
    attention = bk.nn.MultiheadAttention(8, 2, feedback="usf")
    assert list(metrics.weights(attention)) == ["in_proj_weight", "out_proj.weight"]


@pytest.mark.parametrize("rule", [None, "usf", "brsf", "fa"])
def test_updates_against_gradients_of_a_plain_model(rule: str | None) -> None:
    net = model()
    plain = model()
    bk.convert_(net, rule)
    x, y = batch()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    state = torch.get_rng_state()
    found = metrics.updates(net, lambda: F.cross_entropy(net(x), y))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert [m.feedback.name for m in net if isinstance(m, bk.nn.FeedbackLayer)] == ([rule] * 3 if rule else [])
    plain.load_state_dict(before, strict=False)
    grads = []
    for twin in (net, plain):
        torch.set_rng_state(state)
        loss = F.cross_entropy(twin(x), y)
        grads.append(torch.autograd.grad(loss, [twin[i].weight for i in (0, 4, 6)]))
    for c, ours, exact in zip(found.values(), *grads, strict=True):
        cosine = F.cosine_similarity(ours.double().flatten(), exact.double().flatten(), 0)
        assert math.cos(math.radians(c.angle)) == pytest.approx(cosine.item(), abs=1e-6)
    assert found["6.weight"].angle < 1e-3
    assert (found["0.weight"].angle < 1e-3) == (rule is None)


@pytest.mark.parametrize("rule", ["dfa", "sdfa", "shallow"])
def test_updates_of_direct_feedback(rule: str) -> None:
    net = direct.DirectFeedback(model(), ["2", "5"], rule, example=batch()[0])
    x, y = batch()
    found = metrics.updates(net, lambda: F.cross_entropy(net(x), y))
    assert found["model.6.weight"].angle == pytest.approx(0, abs=1e-5)
    if rule == "shallow":
        assert math.isnan(found["model.0.weight"].angle)
    else:
        assert 1 < found["model.0.weight"].angle < 179
    # It is direct feedback again.
    F.cross_entropy(net(x), y).backward()
    assert (net.model[0].weight.grad is None) == (rule == "shallow")


def test_the_rules_come_back_after_an_error() -> None:
    net = bk.nn.Linear(3, 2, feedback="usf")
    with pytest.raises(KeyError), metrics.backprop(net):
        assert net.feedback.name == "backprop"
        raise KeyError
    assert net.feedback.name == "usf"
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="model: expected a model with weights that require a gradient, got none"):
        metrics.updates(net, lambda: torch.zeros(()))


def test_inverse_loss() -> None:
    layer, inverse = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
    h = torch.randn(7, 5)
    expected = ((h @ layer.weight.T @ inverse.weight.T - h) ** 2).sum(1).mean().item()
    assert metrics.inverse_loss(layer, inverse, h) == pytest.approx(expected)
    with torch.no_grad():
        inverse.weight.copy_(torch.linalg.inv(layer.weight))
    assert metrics.inverse_loss(layer, inverse, h) < 1e-6
    with pytest.raises(ValueError, match="inverse: expected shape"):
        metrics.inverse_loss(layer, nn.Linear(5, 4), h)


def test_monitor_writes_every_n_steps(tmp_path: Path) -> None:
    net = model()
    bk.convert_(net, "usf")
    x, y = batch()
    path = tmp_path / "angles.csv"
    monitor = metrics.Monitor(net, 2, path, loss=lambda: F.cross_entropy(net(x), y))
    rows = [monitor.step() for _ in range(5)]
    assert [row and row["step"] for row in rows] == [None, 2, None, 4, None]
    # A second run of the program goes on.
    metrics.Monitor(net, 2, str(path), loss=lambda: F.cross_entropy(net(x), y), steps=5).step()
    lines = path.read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "2", "4", "6"]
    columns = lines[0].split(",")
    for kind in ("angle_weight", "norm_ratio", "sign_agreement", "angle_grad"):
        assert [c for c in columns if c.startswith(kind)] == [f"{kind}/{i}" for i in (0, 4, 6)]
    with pytest.raises(ValueError, match="to: expected a file with the columns step, other"):
        metrics.Monitor(net, 1, path, measure=lambda: {"other": 1.0}).step()


def test_monitor_calls_back() -> None:
    seen: list[Any] = []
    monitor = metrics.Monitor(nn.Identity(), 3, seen.append, measure=lambda: {"loss": 0.5})
    for _ in range(7):
        monitor.step()
    assert seen == [{"step": 3, "loss": 0.5}, {"step": 6, "loss": 0.5}]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"every": 0}, ValueError, "every: expected at least 1, got 0"),
        ({"every": 1.5}, TypeError, r"every: expected an integer, got 1\.5"),
        ({"steps": -1}, ValueError, "steps: expected at least 0, got -1"),
        ({"to": 3}, TypeError, "to: expected a function or a path, got int"),
        ({"loss": float, "measure": dict}, ValueError, "loss: expected None where measure is given, got both"),
    ],
)
def test_errors_of_the_monitor(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    given: Any = {"model": nn.Identity(), "every": 1, "to": print} | arguments
    with pytest.raises(error, match=match):
        metrics.Monitor(**given)
