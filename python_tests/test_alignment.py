"""Symmetric, activation and information alignment against autograd of the authors' regularisations."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import RICH, Case, assert_same
from torch import Tensor, nn

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")

RULES: dict[str, Any] = {
    "sa": bk.SymmetricAlignment(alpha=0.3, beta=0.7),
    "aa": bk.ActivationAlignment(alpha=0.3, beta=0.7),
    "ia": bk.InformationAlignment(alpha=0.3, beta=0.7, gamma=0.2),
}


def mean(t: Tensor) -> Tensor:
    """tf.reduce_sum(tf.reduce_mean(t, 0))"""
    return t.mean(0).sum()


def regularisation(rule: Any, f: Any, x: Tensor, w: Tensor, b: Tensor, zero: Tensor) -> Tensor:
    """Of the primitives as the authors' code has them, by torch's own products of the layer."""
    x = x.detach().requires_grad_()
    wx, bx = f(x, w, zero), f(x, b, zero)
    decay = w.square().sum() + b.square().sum()
    amp = -mean(wx * bx)
    if rule.name == "sa":
        return rule.alpha * decay - rule.beta * (w * b).sum()
    if rule.name == "aa":
        return rule.alpha * (mean(wx.square()) + mean(bx.square())) + rule.beta * amp
    (reconstruction,) = torch.autograd.grad(bx, x, wx.detach(), create_graph=True)
    return rule.alpha * amp + rule.beta * mean(reconstruction.square()) + rule.gamma * decay


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", RICH, ids=lambda case: case.layer)
def test_a_step_is_down_the_gradient(case: Case, rule: str) -> None:
    layer, x = case.build(RULES[rule]), case.input()
    b = layer.feedback_weight.detach().clone().requires_grad_()
    w, bias = layer.weight.detach(), layer.bias.detach().clone()
    (gradient,) = torch.autograd.grad(regularisation(RULES[rule], case.plain(), x, w, b, 0 * bias), b)
    # Training alone teaches it nothing.
    layer(x).sum().backward()
    assert layer.feedback_weight.grad is None and layer.weight.grad.any()
    layer.zero_grad()
    model = nn.Sequential(nn.Identity(), layer)
    for times in (1, 2):
        bk.align_(model, x)
        assert_same(layer.feedback_weight.grad, times * gradient)
    # Nothing else gets one, and there is no trace of the call.
    assert torch.equal(layer.weight, w) and torch.equal(layer.bias, bias) and isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer.feedback_weight, b) and layer.weight.grad is None and layer.bias.grad is None
    assert layer.feedback == RULES[rule] and not layer._forward_pre_hooks
    layer.feedback_weight.requires_grad_(False)
    layer.feedback_weight.grad = None
    bk.align_(model, x)
    assert layer.feedback_weight.grad is None, "a B that is frozen"


class Standardised(nn.Conv1d):
    """Its weight is computed, and so is something beside a bias."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, standardised(self), self.bias) + 1


def standardised(module: Any) -> Tensor:
    return F.layer_norm(module.weight, module.weight.shape[1:])


class Transposed(nn.Module):
    """Its weight is another library's, square so that no shape tells."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight + self.bias


def of_parametrize(name: str) -> nn.Module:
    layer = nn.Linear(6, 5)
    nn.utils.parametrize.register_parametrization(layer, name, nn.Softplus())
    return layer


# Layers whose W is no Parameter as it is, and their input.
COMPUTED: dict[str, tuple[Any, tuple[int, ...], Any]] = {
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), (4, 6), F.linear),
    "weight_norm by hooks": (lambda: nn.utils.weight_norm(nn.Linear(6, 5)), (4, 6), F.linear),
    "a parametrized bias": (lambda: of_parametrize("bias"), (4, 6), F.linear),
    "a transposed weight": (Transposed, (2, 3, 6), F.linear),
    "a forward of its own": (lambda: Standardised(2, 3, 3), (4, 2, 7), F.conv1d),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", COMPUTED)
def test_of_the_weight_that_the_product_has(name: str, rule: str) -> None:
    bk.register(Standardised, weight=standardised)
    bk.register(Transposed, nn.Linear, weight=lambda m: m.weight.t())
    build, shape, f = COMPUTED[name]
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64)
    layer(x)
    assert bk.convert_(layer, RULES[rule]).converted == [""]
    w, b = layer.weight_of().detach().contiguous(), layer.feedback_weight.detach().clone().requires_grad_()
    expected = regularisation(RULES[rule], f, x, w, b, w.new_zeros(w.shape[0]))
    bk.align_(layer, x)
    assert_same(layer.feedback_weight.grad, torch.autograd.grad(expected, b)[0])


def align(layer: nn.Module, x: Tensor, lr: float) -> None:
    """One step of SGD on R alone."""
    layer.zero_grad()
    bk.align_(layer, x)
    torch.optim.SGD(layer.parameters(), lr=lr).step()


def angle(layer: Any) -> float:
    return bk.metrics.weights(layer)["weight"].angle


@pytest.mark.parametrize("rule", ["sa", "aa"])
def test_b_goes_to_w(rule: str) -> None:
    torch.manual_seed(0)
    layer = bk.nn.Conv2d(3, 5, 3, feedback=rule)
    assert angle(layer) > 70
    for _ in range(60):
        align(layer, torch.randn(8, 3, 6, 6), lr=0.02 if rule == "aa" else 0.1)
    torch.testing.assert_close(layer.feedback_weight.data, layer.weight.data, rtol=0.05, atol=0.01)


def test_information_alignment_goes_to_a_regularised_inverse() -> None:
    torch.manual_seed(0)
    rule = bk.InformationAlignment(alpha=1.0, beta=0.5, gamma=0.1)
    layer, x = bk.nn.Linear(6, 4, feedback=rule, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    w, c = layer.weight.detach(), x.T @ x / 50
    inverse = torch.linalg.solve(
        w @ c @ w.T * 2 * rule.beta + 2 * rule.gamma * torch.eye(4).double(), rule.alpha * w @ c
    )
    # R is convex in B.
    layer.feedback_weight.data.copy_(inverse)
    bk.align_(layer, x)
    assert layer.feedback_weight.grad.abs().max() < 1e-12 * inverse.abs().max()


def test_a_model_trains_between_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5))
    bk.convert_(model, "aa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.01)
    x, y = torch.randn(128, 1, 6, 6), torch.randint(5, (128,))
    mean, random = model[1].running_mean.clone(), torch.get_rng_state()
    bk.align_(model, {"input": x})
    assert torch.equal(model[1].running_mean, mean) and torch.equal(torch.get_rng_state(), random) and model.training
    for _ in range(120):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        bk.align_(model, (x,))
        optimizer.step()
    assert F.cross_entropy(model(x), y) < 0.3 and bk.metrics.weights(model)["4.weight"].angle < 45


def test_data_parallel_waits_for_no_gradient_of_b(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        layer = bk.nn.Linear(6, 5, feedback="sa")
        model, x = nn.parallel.DistributedDataParallel(layer), torch.randn(4, 6)
        for _ in range(3):
            model(x).sum().backward()
            model.zero_grad()
            bk.align_(model, x)
        expected = layer.feedback_weight.detach() - layer.weight.detach()
        torch.testing.assert_close(layer.feedback_weight.grad, expected)
    finally:
        torch.distributed.destroy_process_group()


def test_errors() -> None:
    x = torch.randn(2, 6)
    with pytest.raises(ValueError, match="model: expected a layer with the rule 'sa', 'aa' or 'ia', got none"):
        bk.align_(bk.nn.Linear(6, 5, feedback="wm"), x)
    attention = bk.nn.MultiheadAttention(6, 2, feedback="sa")
    for layer in (attention, bk.nn.LSTM(6, 5, feedback="sa"), bk.nn.Bilinear(6, 6, 5, feedback="sa")):
        with pytest.raises(ValueError, match=r"model: expected layers of one weight and one input .* got \(root"):
            bk.align_(layer, (x, x, x))

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (bk.nn.Linear(6, 6, feedback="sa") for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    half = Half()
    with pytest.raises(ValueError, match=r"example: expected a call that reaches every layer .* got none of b"):
        bk.align_(half, x)
    assert half.a.feedback_weight.grad is None
    with pytest.raises(ValueError, match="scale: expected one that does not follow W, as B learns its own"):
        bk.ActivationAlignment(scale="match")
    with pytest.raises(ValueError, match="alpha: expected a finite number of at least 0, got -1"):
        bk.SymmetricAlignment(alpha=-1)
