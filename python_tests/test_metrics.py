"""Measures against closed forms: known angles of distributions, exact gradients, and files as they are written."""

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

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
    for size in (1e-100, 1e-150, 1e100, 1e150):
        # The product of their squares is no number.
        assert metrics.compare(*2 * [size * torch.randn(99).double()]) == (0, 1, 1)
        c = metrics.compare(size * a.double(), size * torch.tensor([2.0, 2.0]).double())
        assert c == (pytest.approx(45), pytest.approx(8**0.5 / 3), 0.5)
    assert metrics.compare(1e-100 * a.double(), 1e100 * a.double()).norm_ratio == pytest.approx(1e200)
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


@pytest.mark.parametrize("shape", [(512, 4096), (1, 2**21)])
def test_no_copy_of_the_operands(shape: tuple[int, ...]) -> None:
    a, b = torch.randn(shape), torch.randn(shape)
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


class Net(NamedTuple):
    """A network of target propagation, its weights and nonlinearity, and a batch in float64."""

    tp: bk.TargetProp
    weights: list[Tensor]
    tanh: bool
    x: Tensor
    y: Tensor

    def jacobians(self, h: list[Tensor]) -> list[Tensor]:
        """∂h_3/∂h_1 and ∂h_3/∂h_2 of every sample by the chain rule, written out."""
        w2, w3 = self.weights[1:]
        slope = 1 - h[2].detach() ** 2 if self.tanh else torch.ones_like(h[2])
        return [w3 @ (slope[:, :, None] * w2), w3.expand(len(h[0]), -1, -1)]


def three_layers(tanh: bool = False, variant: str = "l_drl", **kwargs: Any) -> Net:
    """4 → 6 → 5 → 3, linear or with tanh in the hidden layers."""
    linear = [nn.Linear(a, b) for a, b in ((4, 6), (6, 5), (5, 3))]
    layers = [*(nn.Sequential(m, nn.Tanh() if tanh else nn.Identity()) for m in linear[:2]), linear[2]]
    inverses = [None] * 3 if kwargs.get("mix") == 1 else [None, nn.Linear(5, 6), nn.Linear(3, 5)]
    tp = bk.TargetProp(layers, inverses, variant, **kwargs).double()
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.arange(7) % 3
    return Net(tp, [m.weight.detach() for m in linear], tanh, x, y)


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.3, math.inf])
def test_gauss_newton_targets_are_the_closed_form(tanh: bool, damping: float) -> None:
    net = three_layers(tanh, alpha=0.2)
    h = net.tp.activations(net.x)
    error = 0.2 * (h[3].softmax(1) - F.one_hot(net.y, 3)).detach() / 7
    found = metrics.gauss_newton_targets(net.tp, h, net.y, damping)
    for target, activation, jacobian in zip(found, h[1:3], net.jacobians(h), strict=True):
        for i, j in enumerate(jacobian):
            # (JᵀJ + λI)⁻¹ Jᵀ e, the other form of the same.
            if damping == 0:
                step = torch.linalg.lstsq(j, error[i]).solution if not tanh else torch.linalg.pinv(j) @ error[i]
            elif damping == math.inf:
                step = j.T @ error[i]
            else:
                step = torch.linalg.inv(j.T @ j + damping * torch.eye(j.shape[1]).to(j)) @ j.T @ error[i]
            torch.testing.assert_close(target[i], activation[i] - step, rtol=1e-8, atol=1e-12)
    with pytest.raises(ValueError, match="damping: expected a number of at least 0, got -1"):
        metrics.gauss_newton_targets(net.tp, h, net.y, -1)
    with pytest.raises(ValueError, match="h: expected 4 activations, got 3"):
        metrics.gauss_newton_targets(net.tp, h[:3], net.y)


def test_a_step_to_gauss_newton_targets_is_that_of_the_output() -> None:
    # J J⁺ = I: the hidden layer that reaches its target takes the logits to h_3 − α ∂L/∂h_3.
    net = three_layers(alpha=0.7, reduction="sum")
    h = net.tp.activations(net.x)
    wanted = h[3] - 0.7 * (h[3].softmax(1) - F.one_hot(net.y, 3))
    first, second = metrics.gauss_newton_targets(net.tp, h, net.y)
    torch.testing.assert_close(net.tp.layers[2](net.tp.layers[1](first)), wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(net.tp.layers[2](second), wanted, rtol=1e-9, atol=1e-12)


def test_angles_to_gauss_newton_targets() -> None:
    # Back-propagation as target propagation is the limit of infinite damping, and of none only by chance.
    net = three_layers(True, "dtp", mix=1.0, alpha=0.2)
    found = metrics.gauss_newton(net.tp, net.x, net.y, math.inf)
    assert list(found) == ["layers.0.0.weight", "layers.1.0.weight"]
    for c in found.values():
        assert c.angle < 1e-5 and c.norm_ratio == pytest.approx(1) and c.sign_agreement == 1
    assert all(c.angle > 1 for c in metrics.gauss_newton(net.tp, net.x, net.y).values())
    near, far = (metrics.gauss_newton(net.tp, net.x, net.y, d)["layers.0.0.weight"].angle for d in (1.0, 1e4))
    assert near > 1000 * far > 0
    assert all(p.grad is None for p in net.tp.parameters())
    # Inverses that are those of the whole linear network give Gauss–Newton targets: 0 degrees.
    net = three_layers(False, alpha=0.2)
    w2, w3 = net.weights[1:]
    with torch.no_grad():
        net.tp.inverses[2].weight.copy_(torch.linalg.pinv(w3))
        net.tp.inverses[1].weight.copy_(torch.linalg.pinv(torch.linalg.pinv(w3) @ w3 @ w2))
    for c in metrics.gauss_newton(net.tp, net.x, net.y).values():
        assert c.angle < 1e-4 and c.norm_ratio == pytest.approx(1)
    # The gradient, written out: 2 (h − ĥ)ᵀ h_{l-1} / N with J ĥ's change = α ∂L/∂h_L, against the layer's own inverse.
    with torch.no_grad():
        net.tp.inverses[1].weight.copy_(w2.T)
    h = [t.detach() for t in net.tp.activations(net.x)]
    steps = [t - g for t, g in zip(net.tp.targets(h, net.y), h[1:3], strict=True)]
    exact = -0.2 * (h[3].softmax(1) - F.one_hot(net.y, 3)) / 7 @ torch.linalg.pinv(w3 @ w2).T
    cosine = F.cosine_similarity((steps[0].T @ h[0]).flatten(), (exact.T @ h[0]).flatten(), 0)
    angle = metrics.gauss_newton(net.tp, net.x, net.y)["layers.0.0.weight"].angle
    assert angle == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-6) and angle > 1


@pytest.mark.slow
def test_each_inverse_loss_learns_what_its_paper_says() -> None:
    # Meulemans et al. 2020: DRL learns Gauss–Newton targets, the plain loss none. Ernoult et al. 2022: L-DRL gradients.
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in ((20, 16), (16, 12))] + [nn.Linear(12, 5)]
    x, y = torch.randn(256, 20), torch.arange(256) % 5
    found = {}
    for objective in ("preserving", "drl", "l_drl"):
        inverses = [None, nn.Linear(12, 16), nn.Linear(5, 12)]
        tp = bk.TargetProp(layers, inverses, "dtpdrl", inverse_objective=objective, alpha=0.01, reduction="sum")
        optimizer = torch.optim.Adam(tp.inverses.parameters(), 1e-2)
        h = [t.detach() for t in tp.activations(x)]
        for _ in range(500):
            optimizer.zero_grad()
            tp.inverse_loss(h).backward()
            optimizer.step()
        angles = [metrics.gauss_newton(tp, x, y, damping)["layers.0.0.weight"].angle for damping in (0, math.inf)]
        found[objective] = angles
    assert found["drl"][0] < 20 and found["l_drl"][0] > 30 and found["preserving"][0] > 30
    assert found["l_drl"][1] < 20 and found["drl"][1] > 30 and found["preserving"][1] > 30


def test_gauss_newton_of_layers_with_a_rule_and_batch_norm() -> None:
    # The rule and the running statistics stay, and the Jacobians are those of the weights.
    layers = [nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()), nn.Linear(6, 3)]
    plain = bk.TargetProp(layers, [None, nn.Linear(3, 6)], "l_drl").double().eval()
    converted = copy.deepcopy(plain)
    bk.convert_(converted.layers, "usf")
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.arange(7) % 3
    h = plain.activations(x)
    for ours, theirs in zip(
        metrics.gauss_newton_targets(converted, h, y), metrics.gauss_newton_targets(plain, h, y), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert converted.layers[1].feedback.name == "usf"
    before = {n: t.clone() for n, t in converted.state_dict().items()}
    found = metrics.gauss_newton(converted.train(), x, y)
    assert converted.training and converted.layers[0][1].training
    assert found == metrics.gauss_newton(converted.eval(), x, y)
    assert all(torch.equal(t, before[n]) for n, t in converted.state_dict().items())
    converted.layers.requires_grad_(False)
    with pytest.raises(ValueError, match="tp: expected hidden layers with weights that require a gradient, got none"):
        metrics.gauss_newton(converted, x, y)


def diagonal(*numbers: float) -> nn.Module:
    """A linear map without bias."""
    layer = nn.Linear(len(numbers), len(numbers), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor(numbers)))
    return layer


class Square(nn.Module):
    """y ↦ y²."""

    def forward(self, y: Tensor) -> Tensor:
        return y * y


def test_the_spectrum_of_an_inverse() -> None:
    h = torch.randn(4, 3)
    assert metrics.jacobian_spectrum(diagonal(1, 2, 3), diagonal(1, -2, 4), h) == (pytest.approx(2 / 3), 9)
    for degrees, share in ((89.0, 1), (91.0, 0)):
        # Eigenvalues e^{±iθ}.
        turn = diagonal(0, 0)
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        with torch.no_grad():
            turn.weight.copy_(torch.tensor([[c, -s], [s, c]]))
        assert metrics.jacobian_spectrum(turn, nn.Identity(), h[:, :2]) == (share, pytest.approx(2 * c, abs=1e-6))
    # W Wᵀ has as many positive eigenvalues as W has rank, and the trace ‖W‖².
    for n, share in ((2, 1.0), (5, 0.6)):
        f, g = nn.Sequential(nn.Linear(3, n)), nn.Linear(n, 3)
        with torch.no_grad():
            g.weight.copy_(f[0].weight.T)
        found = metrics.jacobian_spectrum(f, g, h)
        assert found == (pytest.approx(share), pytest.approx(f[0].weight.square().sum().item()))
        with torch.no_grad():
            g.weight.neg_()
        assert metrics.jacobian_spectrum(f, g, h) == (0, pytest.approx(-found.trace))
    # Sample by sample, at its own activations: d(y²)/dy = 2y at y = 3h.
    h = torch.tensor([[1.0], [2.0], [-4.0], [5.0]])
    assert metrics.jacobian_spectrum(diagonal(3), Square(), h) == (0.75, pytest.approx(3 * 2 * 3 * 1.0))
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    f, g = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh()).double(), nn.ConvTranspose2d(2, 1, 3).double()
    both = [
        torch.autograd.functional.jacobian(f, s).reshape(8, 16)
        @ torch.autograd.functional.jacobian(g, f(s)).reshape(16, 8)
        for s in x.unsqueeze(1)
    ]
    found = metrics.jacobian_spectrum(f, g, x)
    assert found.trace == pytest.approx(sum(b.trace().item() for b in both) / 2)
    assert found.positive == pytest.approx(sum((torch.linalg.eigvals(b).real > 0).sum().item() for b in both) / 16)
    with pytest.raises(ValueError, match="inverse: expected shape"):
        metrics.jacobian_spectrum(nn.Linear(3, 4), nn.Linear(4, 5), torch.randn(2, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_rounding_leaves_of_a_zero_eigenvalue_is_not_positive(dtype: torch.dtype) -> None:
    n, rank = 24, 6
    f = nn.Linear(n, n, bias=False)
    down, up = nn.Linear(n, rank, bias=False), nn.Linear(rank, n, bias=False)
    with torch.no_grad():
        # J_f J_g = Q diag(1, …, 1, 0, …, 0) Qᵀ S, similar to a matrix whose eigenvalues beside the zeros are positive.
        q = torch.linalg.qr(torch.randn(n, n)).Q
        f.weight.copy_(torch.eye(n) + 0.1 * q)
        up.weight.copy_(q[:, :rank])
        down.weight.copy_(q[:, :rank].T)
    g = nn.Sequential(down, up)
    h = torch.randn(2, n).to(dtype)
    for scale in (1.0, 1e-6, 1e6):
        scaled = copy.deepcopy(f)
        scaled.weight.data *= scale
        assert metrics.jacobian_spectrum(scaled.to(dtype), g.to(dtype), h).positive == rank / n
    # All of them, where none is zero.
    assert metrics.jacobian_spectrum(f.to(dtype), nn.Identity(), h).positive == 1


def test_backprop_within_backprop_leaves_the_outer_one_on() -> None:
    net = direct.DirectFeedback(model(), ["2"], "shallow", example=batch()[0])
    with metrics.backprop(net):
        with metrics.backprop(net):
            pass
        net(batch()[0]).sum().backward()
    assert net.model[0].weight.grad is not None


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
