"""Derivatives that a layer with feedback does not have raise: double backward and torch.func's transforms.

Without feedback a layer has them.
"""

from typing import Any

import pytest
import torch
from small import LAYERS, build, call

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")

ONCE = "double backward: the input gradient of a layer with feedback is not the derivative"


@pytest.mark.parametrize("name", LAYERS)
def test_double_backward(name: str) -> None:
    layer, good = build(name, "usf")
    (grad,) = torch.autograd.grad(call(layer, good).square().sum(), good, create_graph=True)
    # Also where only some of the graph is asked for, which torch's own once_differentiable lets pass.
    for attempt in (
        lambda: grad.sum().backward(retain_graph=True),
        lambda: torch.autograd.grad(grad.square().sum(), good, retain_graph=True),
        lambda: torch.autograd.grad(grad.square().sum(), list(layer.parameters())[:1], retain_graph=True),
    ):
        with pytest.raises(RuntimeError, match=ONCE):
            attempt()


def test_a_gradient_penalty_is_not_dropped_in_silence() -> None:
    layer, good = build("Linear", "fa")
    loss = layer(good).square().sum()
    (grad,) = torch.autograd.grad(loss, good, create_graph=True)
    with pytest.raises(RuntimeError, match=ONCE):
        torch.autograd.grad(loss + grad.square().sum(), layer.weight)


def test_create_graph_alone_is_fine() -> None:
    layer, good = build("Linear", "fa")
    (expected,) = torch.autograd.grad(layer(good).square().sum(), good)
    (grad,) = torch.autograd.grad(layer(good).square().sum(), good, create_graph=True)
    assert torch.equal(grad, expected)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack((x, x))),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_torch_func(name: str, transform: str) -> None:
    layer, good = build(name, "fa")
    for given in (good, good.detach()):
        with pytest.raises(RuntimeError, match=r"torch\.func: its transforms .* do not know feedback"):
            TRANSFORMS[transform](lambda x: call(layer, x), given)


def test_torch_func_without_feedback() -> None:
    plain, good = build("Conv2d", None)
    assert TRANSFORMS["grad"](plain, good.detach()).shape == good.shape
    layer, good = build("Linear", "fa")
    with torch.no_grad():
        assert torch.allclose(torch.func.vmap(layer)(good), layer(good))
    names = dict(layer.named_parameters())
    assert torch.equal(torch.func.functional_call(layer, names, good), layer(good))


UNTIED = [name for name in LAYERS if name.startswith("LocallyConnected")]


def function(name: str) -> tuple[Any, Any, list[torch.Tensor]]:
    """A layer without feedback, it as a function of its input and Parameters, and these."""
    layer, x = build(name, None, dtype=torch.float64)
    names = [n for n, _ in layer.named_parameters()]

    def f(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    return layer, f, [x, *(p.detach().requires_grad_() for p in layer.parameters())]


@pytest.mark.parametrize("wanted", ["input weight bias", "input", "weight"])
@pytest.mark.parametrize("name", UNTIED)
def test_without_feedback_an_untied_layer_is_differentiated_again(name: str, wanted: str) -> None:
    _, f, given = function(name)
    for what, t in zip(("input", "weight", "bias"), given, strict=False):
        t.requires_grad_(what in wanted)
    # Squared, so that its second derivatives are not 0.
    assert torch.autograd.gradgradcheck(lambda *t: f(*t).square(), given, fast_mode=True)


@pytest.mark.parametrize("name", UNTIED)
def test_without_feedback_torch_func_knows_an_untied_layer(name: str) -> None:
    layer, f, (x, *values) = function(name)
    xs = torch.randn(3, *x.shape, dtype=torch.float64)
    laid_out = [xs, xs.transpose(0, 1).contiguous().transpose(0, 1), xs.transpose(2, -1).contiguous().transpose(2, -1)]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for stacked in laid_out:
                torch.testing.assert_close(torch.func.vmap(layer)(stacked), torch.stack([layer(x) for x in xs]))
    _, tangent = torch.func.jvp(layer, (x.detach(),), (xs[0],))
    torch.testing.assert_close(tangent, layer(xs[0]) - layer(torch.zeros_like(x)))
    loss = lambda p, x: f(x, *p).square().sum()  # noqa: E731
    samples = torch.func.vmap(torch.func.grad(loss), (None, 0))(tuple(values), xs)
    one_by_one = [torch.autograd.grad(loss(values, x), values) for x in xs]
    torch.testing.assert_close(samples, tuple(map(torch.stack, zip(*one_by_one, strict=True))))


def test_torch_func_of_the_function() -> None:
    weight, xs = torch.randn(4, 3, 2, 2, requires_grad=True), torch.randn(5, 2, 2, 5)
    f = bk.functional.locally_connected1d
    assert torch.allclose(torch.func.vmap(f, (0, None))(xs, weight), torch.stack([f(x, weight) for x in xs]), atol=1e-5)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(lambda x: f(x, weight, feedback="usf"))(xs)


@pytest.mark.parametrize("name", ["LocallyConnected2d", "LocallyConnectedTranspose1d"])
def test_a_gradient_penalty_under_autocast(name: str) -> None:
    layer, x = build(name, None)
    wanted = [x, *layer.parameters()]

    def penalty() -> tuple[torch.Tensor, ...]:
        y = layer(x.sin()).float()
        (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), wanted)

    exact = penalty()
    with torch.autocast("cpu", torch.bfloat16):
        rough = penalty()
    for a, b in zip(rough, exact, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.05 * b.norm()


def test_only_what_is_differentiated_again_takes_torchs_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = build("LocallyConnected2d", None)
    monkeypatch.setattr("bioplaus_kernels.functional._locally_connected.reference", None)
    layer(x).sum().backward()
    with pytest.raises(AttributeError):
        torch.autograd.grad(layer(x).sum(), list(layer.parameters()), create_graph=True)
