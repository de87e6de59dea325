"""What a layer keeps is used as it is: W is fetched once, a stored B never trained, tied weights have one B."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mlp import EVERY, mlp, x
from small import ONE_WEIGHT, assert_equal, build, gradients
from torch import Tensor, nn
from torch.nn.utils import parametrize

import bioplaus_kernels as bk
from bioplaus_kernels.feedback import Frozen

pytestmark = pytest.mark.usefixtures("one_thread")


# Stored B.


@pytest.mark.parametrize("unfreeze", ["requires_grad_", "requires_grad"])
@pytest.mark.parametrize("rule", ["fa-stored", "frsf-stored", "wm"])
def test_a_stored_b_is_never_trained(rule: str, unfreeze: str) -> None:
    def steps(model: nn.Sequential) -> None:
        if unfreeze == "requires_grad_":
            model.requires_grad_(True)
        else:
            for p in model.parameters():
                p.requires_grad = True
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(x()).square().sum().backward()
            optimizer.step()

    model = mlp(rule)
    expected = [layer.feedback_weight.clone() for layer in model[::2]]
    with torch.device("meta"):
        assigned = mlp(rule)
    assigned.load_state_dict(model.state_dict(), assign=True)
    for other in (
        model,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model).double().float(),
        copy.deepcopy(model).to_empty(device="cpu"),
        copy.deepcopy(assigned),
    ):
        with torch.no_grad():
            for ours, theirs in zip(other[::2], model[::2], strict=True):
                ours.weight.copy_(theirs.weight), ours.bias.copy_(theirs.bias)
        before = other[0].weight.clone()
        steps(other)
        assert not torch.equal(other[0].weight, before)
        for layer, b in zip(other[::2], expected, strict=True):
            assert isinstance(layer.feedback_weight, Frozen) and not layer.feedback_weight.requires_grad
            assert torch.equal(layer.feedback_weight, b)


# W is fetched once.


class _Noise(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return weight + torch.randn_like(weight)


@pytest.mark.parametrize("layer", ONE_WEIGHT)
@pytest.mark.parametrize("rule", [bk.SignConcordance(1.0), bk.SignSymmetry(scale="match"), "usf", "brsf"])
def test_one_weight_a_call(rule: Any, layer: str) -> None:
    module, x = build(layer, rule)
    noise = _Noise()
    parametrize.register_parametrization(module, "weight", noise)
    # The product alone: the bias's share would hide what W was.
    del module.bias
    module.register_parameter("bias", None)
    noise.calls = 0
    seen: list[Tensor] = []
    handle = noise.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    y = module(x)
    assert noise.calls == 1
    handle.remove()
    direction = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, x, direction)
    parametrize.remove_parametrizations(module, "weight")
    with torch.no_grad():
        module.weight.copy_(seen[0])
    (expected,) = torch.autograd.grad(module(x), x, direction)
    torch.testing.assert_close(ours, expected)


def test_attention_fetches_each_weight_once() -> None:
    module, _ = build("MultiheadAttention", bk.SignConcordance(1.0))
    noise = _Noise()
    parametrize.register_parametrization(module, "in_proj_weight", noise)
    for inputs in (1, 2, 3):
        noise.calls = 0
        q, k, v = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(3))
        module(q, (q, k, k)[inputs - 1], (q, k, v)[inputs - 1])[0].sum().backward()
        assert noise.calls == 1


# frozen_signs and convert_.


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_within_frozen_signs_is_not_frozen(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = mlp("usf")
    with bk.frozen_signs(model):
        other = duplicate(model)
        bk.convert_(model, EVERY["fa_signed_init"])
        model(x())
    with torch.no_grad():
        other[0].weight.neg_()
    assert torch.equal(other[0].feedback_matrix().sign(), other[0].weight.sign())


def test_convert_within_frozen_signs() -> None:
    model = mlp("usf")
    with bk.frozen_signs(model):
        bk.convert_(model, "fa")
        assert_equal(gradients(model, x()), gradients(mlp("fa"), x()))
        bk.convert_(model, None)
    assert "_frozen" not in vars(model[0])


class Broken(bk.Rule):
    name = "broken"

    def matrix(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        return weight

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        if weight.shape[0] == 40:
            raise ValueError("no")
        return {}


@pytest.mark.parametrize("rule", [None, "fa-stored", "usf"])
def test_convert_changes_a_layer_wholly_or_not(rule: str | None) -> None:
    model = mlp(rule)
    before, expected = dict(vars(model[2])), gradients(model, x())
    kind, state = type(model[2]), set(model[2].state_dict())
    with pytest.raises(ValueError, match=r"^2: no$"):
        bk.convert_(model, Broken())
    assert type(model[2]) is kind and set(model[2].state_dict()) == state and vars(model[2]).keys() == before.keys()
    assert isinstance(model[0].feedback, Broken)
    bk.convert_(model[0], EVERY[rule] if rule else None)
    if rule != "fa-stored":  # drawn by its own name
        assert_equal(gradients(model, x()), expected)


def test_a_copy_of_a_parametrized_layer_within_frozen_signs_is_not_frozen() -> None:
    layer = nn.utils.parametrizations.weight_norm(bk.nn.Linear(8, 8, feedback="usf"))
    with bk.frozen_signs(layer):
        other = copy.deepcopy(layer)
    with torch.no_grad():
        other.parametrizations.weight.original1.neg_()
    assert torch.equal(other.feedback_matrix().sign(), other.weight.sign())


# Ties.


@pytest.mark.parametrize("rule", ["kp", "fa", "fa-stored", "concordance"])
def test_attention_and_a_linear_layer_that_share_a_weight_share_one_b(rule: str) -> None:
    model = nn.Module()
    model.a = nn.MultiheadAttention(8, 2, batch_first=True)
    model.l, model.o = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
    model.l.weight, model.o.weight = model.a.in_proj_weight, model.a.out_proj.weight
    bk.convert_(model, EVERY[rule])
    assert torch.equal(model.a.feedback_matrix(), model.l.feedback_matrix())
    assert torch.equal(model.a.out_proj.feedback_matrix(), model.o.feedback_matrix())
    below = torch.randn(2, 4, 8, requires_grad=True)
    (model.a(below, below, below)[0].sum() + model.l(below).sum() + model.o(below).sum()).backward()
    if rule == "kp":
        for linear in (model.l, model.o):
            torch.testing.assert_close(linear.feedback_weight.grad, linear.weight.grad)
        assert model.a.in_proj_feedback_weight is model.l.feedback_weight
