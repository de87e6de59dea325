"""Which samples of the error belong to which output of a block: the dimension of the classes, and repeated calls."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from direct_models import RULES, Alternating, Conv, Ends, Siamese, Steps, call, delta, every_rule
from direct_net import assert_same, grads
from torch import Tensor, nn

from bioplaus_kernels import direct

pytestmark = pytest.mark.usefixtures("one_thread")

# Which dimension the classes have.


@every_rule
@pytest.mark.parametrize("d", [1, 2, 3])
def test_channels_first(rule: str, d: int) -> None:
    shape = (2, 3, 7, 4, 3)[: d + 2]
    x, y = torch.randn(shape).double(), torch.randint(5, shape[:1] + shape[2:])
    model = Conv(d).double()
    net = direct.DirectFeedback(model, ["1", "3"], RULES[rule], example=x, class_dim=1)
    assert net.feedback.name == "shallow" or net.feedback_matrix("1").shape == (5, 6)
    F.cross_entropy(call(net, x, y=y), y).backward()

    first = torch.tanh(model[0](x))
    second = torch.tanh(model[2](first.detach()))
    logits = model[4](second.detach())
    e = (logits.softmax(1) - F.one_hot(y, 5).movedim(-1, 1)) / y.numel()
    samples = e.movedim(1, -1).reshape(-1, 5)
    expected = {}
    for i, h, block in ((0, first, "1"), (2, second, "3"), (4, logits, "")):
        g = samples if not block else delta(net, samples, block, y.flatten())
        if g is None:
            found: Any = (None, None)
        else:
            g = g.reshape(*y.shape, -1).movedim(-1, 1)
            found = torch.autograd.grad(h, list(model[i].parameters()), g)
        expected |= {f"model.{i}.weight": found[0], f"model.{i}.bias": found[1]}
    assert_same(grads(net), expected)


def test_the_formula_of_the_docstring() -> None:
    x = torch.randn(2, 3, 4, 5)
    for class_dim in (1, -3):
        net = direct.DirectFeedback(Conv(), ["1", "3"], example=x, class_dim=class_dim)
        out = net(x)
        e = torch.randn(out.shape)
        out.backward(e)
        h = torch.tanh(net.model[0](x))
        g = torch.einsum("nkyx,kc->ncyx", e, net.feedback_matrix("1"))
        torch.testing.assert_close(net.model[0].bias.grad, torch.autograd.grad(h, net.model[0].bias, g)[0])


def test_a_sample_may_have_several_dimensions_of_its_own() -> None:
    # (N, 2, 3, L) for logits (N, 5, L).
    model = nn.Sequential(nn.Conv1d(3, 6, 1), nn.Unflatten(1, (2, 3)), nn.Flatten(1, 2), nn.Conv1d(6, 5, 1))
    x = torch.randn(2, 3, 7)
    net = direct.DirectFeedback(model, ["1"], example=x, class_dim=1)
    e = torch.randn(2, 5, 7)
    net(x).backward(e)
    g = torch.einsum("nkl,kc->ncl", e, net.feedback_matrix("1"))
    torch.testing.assert_close(model[0].bias.grad, g.sum((0, 2)))


@pytest.mark.parametrize(
    ("model", "x", "match"),
    [
        # (N, 8, L) and (N, 8, L): B of L rows for 8 classes, or of 8.
        (
            nn.Sequential(nn.Conv1d(3, 8, 1), nn.Tanh(), nn.Conv1d(8, 8, 1)),
            (2, 3, 7),
            "fit class_dim=1 and class_dim=-1",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh(), nn.Conv2d(8, 8, 1)),
            (2, 3, 7, 7),
            "fit class_dim=1 and class_dim",
        ),
        (Conv(2), (2, 3, 4, 4), "fit class_dim=1; pass it"),
        # Tokens of as many features as classes.
        (nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5)), (2, 7, 3), "fit class_dim=1 and class_dim=-1"),
    ],
)
def test_a_doubt_about_the_classes_is_refused(model: nn.Module, x: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        direct.DirectFeedback(model, ["1"], example=torch.zeros(x))
    assert type(model[1]) is nn.Tanh
    direct.DirectFeedback(model, ["1"], example=torch.zeros(x), class_dim=-1 if isinstance(model[0], nn.Linear) else 1)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(2, 3, 4, 4)
    strided = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Tanh(), nn.Upsample(4), nn.Conv2d(4, 5, 1))
    for arguments, match in (
        ({"class_dim": 4}, r"class_dim: expected a dimension of logits of shape \(2, 5, 4, 4\), got 4"),
        ({"class_dim": -5}, "class_dim: expected a dimension"),
        (
            {"class_dim": -1},
            r"blocks: expected '1' to return the samples that logits of shape \(2, 5, 4, 4\) have with ",
        ),
        ({"logits": "1"}, "logits: expected different modules, the logits' not among the blocks, got '1'"),
        ({"logits": "9"}, "logits: expected names of submodules of the model, got '9'"),
        ({"class_dim": 1, "logits": "0"}, "blocks: '1' was not called before the logits"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=match):
            direct.DirectFeedback(Conv(), ["1"], example=x, **arguments)
    with pytest.raises(ValueError, match=r"have with class_dim=1, got shape \(2, 4, 1, 1\)"):
        direct.DirectFeedback(strided, ["1"], example=x, class_dim=1)
    net = direct.DirectFeedback(Conv(), ["1"], example=x, class_dim=1)
    net.model[4] = nn.Conv2d(4, 6, 1)
    with pytest.raises(
        ValueError, match=r"model: expected logits of 5 classes in dimension 1, got shape \(2, 6, 4, 4\)"
    ):
        net(x)


# Blocks that are called several times.


@every_rule
def test_siamese_calls_get_the_same_error(rule: str) -> None:
    x, other, y = torch.randn(2, 3).double(), torch.randn(2, 3).double(), torch.tensor([1, 4])
    model = Siamese().double()
    net = direct.DirectFeedback(model, ["branch"], RULES[rule], example=(x, other))
    F.cross_entropy(call(net, x, other, y=y), y).backward()

    branches = [model.branch(t) for t in (x, other)]
    logits = model.head((branches[0] - branches[1]).detach().square())
    e = (logits.softmax(1) - F.one_hot(y, 5)) / 2
    g = delta(net, e, "branch", y)
    parameters = list(model.branch.parameters())
    expected = [None, None] if g is None else torch.autograd.grad(branches, parameters, [g, g])
    for p, wanted in zip(parameters, expected, strict=True):
        assert (p.grad is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(p.grad, wanted)


@pytest.mark.parametrize("steps", [1, 2, 5])
@every_rule
@pytest.mark.parametrize("how", ["last", "time first", "batch first", "each", "class_dim=1", "alternating"])
def test_time_steps(how: str, rule: str, steps: int) -> None:
    options: dict[str, Any] = {"class_dim=1": {"class_dim": 1}, "alternating": {"logits": "head"}}.get(how, {})
    model = (Alternating("") if how == "alternating" else Steps(how)).double()
    x = torch.randn(4, steps, 3).double()
    net = direct.DirectFeedback(model, ["act"], RULES[rule], example=torch.randn(2, 3, 3).double(), **options)
    taps = steps if how == "alternating" else 1
    shape = {"last": (4,), "time first": (steps, 4), "alternating": (4,)}.get(how, (4, steps))
    y = torch.randint(5, shape)
    out = call(net, x, y=y)
    upstream = torch.randn(out.shape).double()
    out.backward(upstream)

    # e of each step, (T, N, classes).
    order = {"last": None, "time first": (0, 1, 2), "class_dim=1": (2, 0, 1)}.get(how, (1, 0, 2))
    e = upstream.expand(steps, -1, -1) if order is None else upstream.permute(order)
    y = y.expand(steps, -1) if how in ("last", "alternating") else y if how == "time first" else y.T
    h, outputs, given = x.new_zeros(4, 6), [], []
    for t in range(steps):
        h = torch.tanh(model.below(x[:, t]) + model.cell(h.detach()))
        outputs.append(h)
        if taps > 1 or how == "last" or steps == 1:
            given.append(delta(net, e[t], "act", y[t]))
    if not given:
        every = delta(net, e.reshape(-1, 5), "act", y.reshape(-1))
        given = [None] if every is None else list(every.reshape(steps, 4, 6))
    parameters = [*model.below.parameters(), *model.cell.parameters()]
    expected = [None] * 4 if given[0] is None else torch.autograd.grad(outputs, parameters, given)
    for p, wanted in zip(parameters, expected, strict=True):
        assert (p.grad is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(p.grad, wanted)


class Shapes(nn.Module):
    """Logits of one shape, and a block called `calls` times that returns another; the gradients are theirs."""

    def __init__(self, logits: tuple[int, ...], hidden: tuple[int, ...], calls: int) -> None:
        super().__init__()
        self.block, self.logits = nn.Identity(), nn.Parameter(torch.randn(logits))
        self.hidden = nn.ParameterList(torch.randn(hidden) for _ in range(calls))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits + 0 * sum(self.block(h * 1).sum() for h in self.hidden)


@pytest.mark.parametrize(
    ("logits", "class_dim", "hidden", "calls", "formula"),
    [
        ((5, 3), 0, (6, 3), 2, "kn,kh->hn"),
        ((3, 4, 5), -1, (3, 4, 2, 3), 1, "ntk,kh->nth"),
        ((3, 5, 4), 1, (3, 6, 4), 2, "nkt,kh->nht"),
        ((3, 4, 5, 2), 2, (3, 4, 6, 2), 1, "ntkl,kh->nthl"),
        # A dimension of calls, i, before and after the classes.
        ((2, 3, 4, 5), -1, (3, 4, 6), 2, "intk,kh->inth"),
        ((3, 2, 4, 5), -1, (3, 4, 6), 2, "nitk,kh->inth"),
        ((2, 3, 5, 4), 2, (3, 6, 4), 2, "inkt,kh->inht"),
        ((3, 5, 2, 4), 1, (3, 6, 4), 2, "nkit,kh->inht"),
        ((3, 5, 4, 2), -3, (3, 6, 4), 2, "nkti,kh->inht"),
    ],
)
def test_layouts(logits: Any, class_dim: int, hidden: Any, calls: int, formula: str) -> None:
    model, x = Shapes(logits, hidden, calls), torch.zeros(1)
    net = direct.DirectFeedback(model, ["block"], direct.SDFA(), example=x, class_dim=class_dim)
    e = torch.randn(logits)
    net(x).backward(e)
    assert torch.equal(model.logits.grad, e)
    expected = torch.einsum(formula, e.sign() * e.abs().mean(), net.feedback_matrix("block"))
    for i, h in enumerate(model.hidden):
        torch.testing.assert_close(h.grad, (expected[i] if "i" in formula else expected).reshape(h.shape))


def test_calls_that_leave_a_doubt_are_refused() -> None:
    x = torch.randn(4, 3, 3)
    with pytest.raises(ValueError, match=r"at each call, or a slice of them \(logits= may name a submodule called as"):
        direct.DirectFeedback(Steps("flat"), ["act"], example=x)
    # Four steps of four samples.
    with pytest.raises(ValueError, match=r"example: expected one whose sizes tell .* \(4, 4, 5\) are those of a call"):
        direct.DirectFeedback(Steps("batch first"), ["act"], example=torch.randn(4, 4, 3))
    net = direct.DirectFeedback(Steps("batch first"), ["act"], example=x)
    net(torch.randn(4, 4, 3)).sum().backward()
    # All heads after all cells.
    with pytest.raises(RuntimeError, match="blocks: 'act' was not called before the logits"):
        direct.DirectFeedback(Steps("each"), ["act"], example=x, logits="head")
    act = nn.Tanh()
    again = nn.Sequential(nn.Linear(3, 6), act, nn.Linear(6, 6), act, nn.Linear(6, 5))
    with pytest.raises(RuntimeError, match="logits: '2' was not called after '1' was"):
        direct.DirectFeedback(again, ["1"], example=torch.randn(2, 3), logits="2")
    again[2], again[4] = nn.Linear(6, 4), nn.Linear(4, 5)
    with pytest.raises(
        ValueError, match=r"blocks: expected '1' to return the samples .*, got shape \(2, 6\), \(2, 4\)"
    ):
        direct.DirectFeedback(again, ["1"], example=torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="logits: 'how' was not called in this forward"):
        model = Ends(nn.Identity())
        model.forward = lambda x: x  # type: ignore[method-assign]
        direct.DirectFeedback(model, ["act"], example=torch.randn(2, 3), logits="how")
