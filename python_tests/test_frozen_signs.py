"""frozen_signs: the same gradients, the signs that the block began with, and its end."""

import pytest
import torch
from small import RULES, assert_equal, gradients
from torch import nn

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("rule", RULES)
def test_frozen_signs_gives_the_same_gradients(rule: str) -> None:
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Unflatten(1, (2, 20)), nn.Conv1d(2, 3, 3), nn.Flatten())
    model.attention = nn.Identity()
    bk.convert_(model, RULES[rule])
    with torch.no_grad():
        model[0].weight[::3] = 0
    x = torch.randn(3, 6, requires_grad=True)
    expected = gradients(model, x)
    with bk.frozen_signs(model):
        assert_equal(gradients(model, x), expected)
        assert_equal(gradients(model, x), expected)
    assert_equal(gradients(model, x), expected)


def test_frozen_signs_holds_the_signs_it_began_with() -> None:
    layer = bk.nn.Linear(6, 5, feedback=bk.SignSymmetry(scale=1.0))
    signs = layer.weight.detach().sign()
    changed = r"signs of the weight of Linear\(.*\) changed in the block: step the optimizer"
    with pytest.raises(RuntimeError, match=changed), bk.frozen_signs(layer):
        with torch.no_grad():
            layer.weight.neg_()
        assert torch.equal(layer.feedback_matrix(), signs)
    assert torch.equal(layer.feedback_matrix(), -signs)


@pytest.mark.parametrize("change", ["step", "load", "assign"])
def test_frozen_signs_says_that_signs_changed(change: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    bk.convert_(model, "usf")
    optimizer, state = torch.optim.SGD(model.parameters(), lr=100), {k: -v for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="frozen_signs: signs of the weight of"), bk.frozen_signs(model):
        model(torch.randn(3, 6)).sum().backward()
        if change == "step":
            optimizer.step()
        else:
            model.load_state_dict(
                {k: v for k, v in state.items() if "weight" in k}, strict=False, assign=change == "assign"
            )
    with bk.frozen_signs(model):
        optimizer.zero_grad()


def test_frozen_signs_lets_a_weight_be_scaled() -> None:
    """As an embedding with max_norm, whose weight the last layer shares, does in its forward."""
    embedding, last = nn.Embedding(7, 5, max_norm=0.1), bk.nn.Linear(5, 7, bias=False, feedback="usf")
    last.weight = embedding.weight
    with bk.frozen_signs(last):
        last(embedding(torch.arange(7)).detach().requires_grad_()).sum().backward()


def test_frozen_signs_nested_raises_and_the_outer_block_goes_on() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    bk.convert_(model, "usf")
    with bk.frozen_signs(model):
        with pytest.raises(RuntimeError, match=r"frozen_signs.*frozen already"), bk.frozen_signs(model[2]):
            pass
        assert model[0]._frozen is not None
    assert all(m._frozen is None for m in model if isinstance(m, bk.nn.Linear))


def test_frozen_signs_ends_with_an_exception() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    bk.convert_(model, "frsf")
    with pytest.raises(ZeroDivisionError), bk.frozen_signs(model):
        raise ZeroDivisionError
    with bk.frozen_signs(model):
        pass
