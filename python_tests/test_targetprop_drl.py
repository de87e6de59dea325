"""The losses that learn Jacobians, L-DRL and the difference reconstruction loss, and the inverses of DDTP-RHL."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_targetprop import CLASSES, batch, make

from bioplaus_kernels.targetprop import TargetProp, rhl_inverses


def test_the_minimiser_of_l_drl_is_the_transpose() -> None:
    # Both terms are quadratic in G, so their expectation's gradient at G = Fᵀ is zero and elsewhere it is not.
    f = torch.nn.Linear(4, 3).double()
    tp = TargetProp(
        [torch.nn.Linear(2, 4).double(), f],
        [None, torch.nn.Linear(3, 4).double()],
        "l_drl",
        sigma=0.5,
    )
    g = tp.inverses[1]
    optimizer = torch.optim.SGD(g.parameters(), lr=0.5)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.5 / (1 + step / 20)
        h = tp.activations(torch.zeros(4096, 2, dtype=torch.float64))
        optimizer.zero_grad()
        tp.inverse_loss(h).backward()
        optimizer.step()
    torch.testing.assert_close(g.weight, f.weight.T, rtol=0, atol=0.01)


@pytest.mark.parametrize("objective", ["drl", "preserving"])
def test_ddtp_reconstructs_what_went_through_all_layers(objective: Any) -> None:
    x, _ = batch()
    tp = make("ddtp", sigma=0.1, inverse_objective=objective)
    h = [t.detach() for t in tp.activations(x)]
    state = torch.get_rng_state()
    got = tp.inverse_losses(h)
    torch.set_rng_state(state)
    for k, loss in zip((1, 2, 3), got, strict=True):
        noisy = h[k] + 0.1 * torch.randn_like(h[k])
        f = noisy
        for layer in tp.layers[k:]:
            f = layer(f)
        back = tp.inverses[k](f)
        if objective == "drl":
            back = back + h[k] - tp.inverses[k](h[4])
        scale = 0.01 if objective == "drl" else 1
        torch.testing.assert_close(loss, ((back - noisy) ** 2).sum() / scale / len(x), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("variant", ["dtpdrl", "sdtp", "dtp"])
def test_dtpdrl_reconstructs_layer_by_layer(variant: str) -> None:
    x, _ = batch()
    tp = make(variant, sigma=0.1, inverse_objective="drl")
    h = [t.detach() for t in tp.activations(x)]
    state = torch.get_rng_state()
    got = tp.inverse_losses(h)
    torch.set_rng_state(state)
    if variant == "sdtp":
        h[4] = h[4].softmax(1)
    last = 3 if variant == "dtp" else 4
    for k, loss in zip(range(1, last), got, strict=True):
        noisy = h[k] + 0.1 * torch.randn_like(h[k])
        f = noisy
        for layer in tp.layers[k:last]:
            f = layer(f)
        if variant == "sdtp":
            f = f.softmax(1)
        for j in range(last, k, -1):
            f = tp.inverses[j - 1](f) + h[j - 1] - tp.inverses[j - 1](h[j])
        want = ((f - noisy) ** 2).sum() / 0.01 / len(x)
        torch.testing.assert_close(loss, want, rtol=1e-7, atol=1e-12)
        # Only g_k learns from it.
        own = list(tp.inverses[k].parameters())
        grads = torch.autograd.grad(loss, list(tp.inverses.parameters()), allow_unused=True, retain_graph=True)
        assert sum(g is not None for g in grads) == len(own)
        for ours, theirs in zip(
            torch.autograd.grad(loss, own, retain_graph=True), torch.autograd.grad(want, own), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)


def linear_network(variant: str) -> TargetProp:
    """4 → 6 → 6 → 3, linear: wider than its output, so that no layer has an inverse. Inverses without bias."""
    layers = [torch.nn.Linear(a, b) for a, b in ((4, 6), (6, 6), (6, 3))]
    ends = ((3, 6), (3, 6)) if variant == "ddtp" else ((6, 6), (3, 6))
    inverses = [None, *(torch.nn.Linear(a, b, bias=False) for a, b in ends)]
    return TargetProp(layers, inverses, variant, sigma=0.5, alpha=0.3, reduction="sum").double()


@pytest.mark.parametrize("variant", ["dtpdrl", "ddtp"])
def test_the_minimiser_of_drl_gives_gauss_newton_targets(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Noise whose sample covariance is exactly σ² I makes the batch's loss its expectation.
    tp = linear_network(variant)
    noise = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0] * 6**0.5
    monkeypatch.setattr(torch, "randn_like", lambda t: noise)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    w = [layer.weight.detach() for layer in tp.layers]
    jacobians = [w[2] @ w[1], w[2]]
    with torch.no_grad():
        tp.inverses[2].weight.copy_(torch.linalg.pinv(w[2]))
        # Of what comes back to h_2 only the rows that reach the output are left: g_2 inverts those.
        reached = torch.linalg.pinv(w[2]) @ w[2] @ w[1]
        tp.inverses[1].weight.copy_(torch.linalg.pinv(jacobians[0] if variant == "ddtp" else reached))
    h = tp.activations(x)
    before = tp.inverse_loss(h)
    for gradient in torch.autograd.grad(before, [*tp.inverses.parameters()]):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    error = h[-1].detach().softmax(1) - F.one_hot(y, 3)
    for target, activation, jacobian in zip(tp.targets(h, y), h[1:], jacobians, strict=False):
        step = -0.3 * error @ torch.linalg.pinv(jacobian).T
        torch.testing.assert_close(target - activation, step, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        tp.inverses[1].weight.copy_(torch.linalg.pinv(w[1] if variant == "dtpdrl" else w[2]))
    assert tp.inverse_loss(h) > before + 0.01


def test_rhl_inverses_share_one_random_layer() -> None:
    sizes = [(2, 3, 3), 7, 6]
    inverses = rhl_inverses(sizes, CLASSES, 50, activation=torch.nn.Tanh(), dtype=torch.float64)
    layers = [
        torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Tanh()),
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(18, 7), torch.nn.Tanh()),
        torch.nn.Sequential(torch.nn.Linear(7, 6), torch.nn.Tanh()),
        torch.nn.Linear(6, CLASSES),
    ]
    tp = TargetProp(layers, inverses, "ddtp", alpha=0.3).double()
    x, y = torch.randn(5, 1, 5, 5, dtype=torch.float64), torch.randint(CLASSES, (5,))
    h = [t.detach() for t in tp.activations(x)]
    targets = tp.targets(h, y)
    assert [t.shape[1:] for t in targets] == [(2, 3, 3), (7,), (6,)]
    top = h[4] - 0.3 * (h[4].softmax(1) - F.one_hot(y, CLASSES)) / 5
    random = inverses[1][0][0]
    assert random.weight.shape == (50, CLASSES) and inverses[2][0][0] is random
    for k, target in ((1, targets[0]), (2, targets[1])):
        v = inverses[k][1]
        q = [torch.tanh(F.linear(torch.tanh(random(t)), v.weight, v.bias)).view_as(h[k]) for t in (top, h[4])]
        torch.testing.assert_close(target, h[k] + q[0] - q[1], rtol=1e-9, atol=1e-12)
    v = inverses[3][0]
    assert v.weight.shape == (6, CLASSES)
    torch.testing.assert_close(targets[2], h[3] + torch.tanh(v(top)) - torch.tanh(v(h[4])), rtol=1e-9, atol=1e-12)
    fixed = random.weight.clone()
    optimizer = torch.optim.Adam(tp.inverses.parameters(), 1e-2, weight_decay=0.1)
    before = tp.inverse_loss(h)
    for _ in range(50):
        optimizer.zero_grad()
        tp.inverse_loss(h).backward()
        optimizer.step()
    assert torch.equal(random.weight, fixed) and tp.inverse_loss(h) < before
    glorot = rhl_inverses([200, 6], 9, 300)[1][1].weight
    assert glorot.std().item() == pytest.approx((2 / 500) ** 0.5, rel=0.02)
