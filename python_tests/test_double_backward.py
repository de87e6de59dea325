"""Derivatives that a layer with feedback does not have raise: double backward and torch.func's transforms."""

import pytest
import torch
from small import LAYERS, build, call

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
