"""Where direct feedback takes the error, and which samples of it belong to which output of a block."""

import contextlib
import copy
import dataclasses
import gzip
import pickle
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
from direct_net import assert_same, grads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bioplaus_kernels import direct, metrics

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = {
    "dfa": direct.DFA(),
    "stored": direct.DFA(stored=True),
    "shared": direct.DFA(shared=True),
    "sdfa": direct.SDFA(),
    "drtp": direct.DRTP(),
    "shallow": direct.Shallow(),
}
every_rule = pytest.mark.parametrize("rule", RULES)


class Conv(nn.Sequential):
    """A segmentation net: logits (N, 5, *spatial)."""

    def __init__(self, d: int = 2, **options: Any) -> None:
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1]
        super().__init__(conv(3, 6, 3, padding=1), nn.Tanh(), conv(6, 4, 3, padding=1), nn.Tanh(), conv(4, 5, 1))


class Steps(nn.Module):
    """A cell called at each time step; `how` its outputs become logits."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.below, self.cell, self.act = nn.Linear(3, 6), nn.Linear(6, 6), nn.Tanh()
        self.head, self.how = nn.Linear(6, 5), how

    def forward(self, x: Tensor) -> Tensor:
        h, states = x.new_zeros(len(x), 6), []
        for t in range(x.shape[1]):
            h = self.act(self.below(x[:, t]) + self.cell(h))
            states.append(h)
        if self.how == "last":
            return self.head(h)
        if self.how == "each":
            return torch.stack([self.head(h) for h in states], 1)
        if self.how == "flat":
            return self.head(torch.cat(states))
        dim = 0 if self.how == "time first" else 1
        logits = self.head(torch.stack(states, dim))
        return logits.transpose(1, 2) if self.how == "class_dim=1" else logits


class Alternating(Steps):
    """The head is called in the step, so that its calls alternate with the cell's."""

    def forward(self, x: Tensor) -> Tensor:
        h, found = x.new_zeros(len(x), 6), []
        for t in range(x.shape[1]):
            h = self.act(self.below(x[:, t]) + self.cell(h))
            found.append(self.head(h))
        return torch.stack(found, 1)


class Siamese(nn.Module):
    """Two inputs through one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.head = nn.Sequential(nn.Linear(3, 6), nn.Tanh()), nn.Linear(6, 5)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.head((self.branch(x) - self.branch(other)).square())


def delta(net: direct.DirectFeedback, e: Tensor, block: str, y: Tensor | None = None) -> Tensor | None:
    """What the rule makes of e (samples, classes), as its docstring says."""
    kind = net.feedback.name
    if kind == "shallow":
        return None
    b = net.feedback_matrix(block).to(e.dtype)
    if kind == "drtp":
        assert y is not None
        return F.one_hot(y, len(b)).to(e.dtype) @ b / len(y)
    return e @ b if kind == "dfa" else e.sign() @ b * e.abs().mean()


def call(net: direct.DirectFeedback, *x: Any, y: Tensor | None = None) -> Any:
    """`net` of x, with the targets where it takes them."""
    return net(*x, targets=y) if net.feedback.name == "drtp" else net(*x)


# Where e is taken.


@every_rule
@pytest.mark.parametrize("end", ["log_softmax", "softmax", "sigmoid"])
def test_the_error_is_that_of_the_named_logits(rule: str, end: str) -> None:
    last: nn.Module = {"log_softmax": nn.LogSoftmax(1), "softmax": nn.Softmax(1), "sigmoid": nn.Sigmoid()}[end]
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5), last).double()
    x, y = torch.randn(7, 3).double(), torch.arange(7) % 5
    net = direct.DirectFeedback(model, ["1", "3"], RULES[rule], example=x[:2], logits="4")
    out = call(net, x, y=y)
    one_hot = F.one_hot(y, 5).double()
    if end == "sigmoid":
        F.binary_cross_entropy(out, one_hot).backward()
    else:
        F.nll_loss(out if end == "log_softmax" else out.log(), y).backward()

    first = torch.tanh(model[0](x))
    second = torch.tanh(model[2](first.detach()))
    logits = model[4](second.detach())
    torch.testing.assert_close(out, last(logits))
    e = (logits.sigmoid() - one_hot) / 35 if end == "sigmoid" else (logits.softmax(1) - one_hot) / 7
    expected = {}
    for i, h, d in ((0, first, delta(net, e, "1", y)), (2, second, delta(net, e, "3", y)), (4, logits, e)):
        found = (None, None) if d is None else torch.autograd.grad(h, list(model[i].parameters()), d)
        expected |= {f"model.{i}.weight": found[0], f"model.{i}.bias": found[1]}
    assert_same(grads(net), expected)
    # Nothing is left of it.
    assert [type(m) for m in net.restore()] == [type(m) for m in model] and not any("Block" in repr(m) for m in model)
    assert type(model[4]) is nn.Linear


class Ends(nn.Module):
    """A model that ends as `how` says."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.a, self.act, self.fc, self.how = nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), how

    def forward(self, x: Tensor) -> Any:
        return self.how(self.fc(self.act(self.a(x))))


@pytest.mark.parametrize(
    ("end", "name"),
    [
        (nn.LogSoftmax(1), "log_softmax"),
        (nn.Softmax(1), "softmax"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.LogSigmoid(), "logsigmoid"),
        (lambda z: F.log_softmax(z, 1), "log_softmax"),
        (lambda z: torch.softmax(z, 1), "softmax"),
        (lambda z: z.sigmoid().squeeze(), "sigmoid"),
        (lambda z: torch.log(torch.softmax(z, 1).clamp(1e-6)).double(), "softmax"),
        (lambda z: torch.stack([z.log_softmax(1).float(), z]).transpose(0, 1)[0], "log_softmax"),
        # Constants and bounds change nothing.
        (lambda z: 1e-8 + z.softmax(1), "softmax"),
        (lambda z: (z.softmax(1) + 1e-3).log2(), "softmax"),
        (lambda z: 0.9 * z.softmax(1) - torch.full((5,), 0.1) / 5, "softmax"),
        (lambda z: 1 - z.sigmoid() / 2, "sigmoid"),
        (lambda z: z.softmax(1).masked_fill(torch.arange(5) > 3, 0).clamp_min(1e-3).nan_to_num(), "softmax"),
        (lambda z: torch.where(torch.arange(5) > 3, 0.0, z.softmax(1)).maximum(torch.tensor(1e-3)), "softmax"),
    ],
)
def test_probabilities_are_refused(end: Any, name: str) -> None:
    model = Ends(end)
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match=rf"model: expected one that returns logits; .*by logits=.*, got what {name} "):
        direct.DirectFeedback(model, ["act"], example=x)
    assert type(model.act) is nn.Tanh
    call(direct.DirectFeedback(model, ["act"], example=x, logits="fc"), x).sum().backward()
    assert model.a.weight.grad is not None
    if isinstance(end, nn.Module):
        direct.DirectFeedback(copy.deepcopy(model).apply(plain), ["act"], example=x, logits="how")


def plain(module: nn.Module) -> None:
    """Undo DirectFeedback's class."""
    if isinstance(module, direct._Block):
        module.__class__ = type(module).__bases__[1]


@pytest.mark.parametrize("samples", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("end", "what"),
    [
        (lambda z: F.normalize(z.exp(), 1, dim=1), "probabilities"),
        (lambda z: (z.softmax(1) + (2 * z).softmax(1)) / 2, "probabilities"),
        (lambda z: z.log_softmax(1).exp(), "probabilities"),
        (lambda z: z - z.logsumexp(1, True), "logarithms of probabilities"),
        (lambda z: (1e3 * z) - (1e3 * z).logsumexp(1, True), "logarithms of probabilities"),
    ],
)
def test_probabilities_are_told_by_their_sums(end: Any, what: str, dtype: torch.dtype, samples: int) -> None:
    model, x = Ends(end).to(dtype), torch.randn(samples, 3, dtype=dtype)
    with pytest.raises(ValueError, match=f"got numbers that are {what}, by their sums over the classes"):
        direct.DirectFeedback(model, ["act"], example=x)
    direct.DirectFeedback(model, ["act"], example=x, logits="fc")


def test_the_sums_are_over_the_classes() -> None:
    head, x = nn.Conv2d(4, 5, 1), torch.randn(2, 3, 6, 6)
    for dim, refused in ((1, True), (3, False)):
        ends = Ends(lambda z, dim=dim: F.normalize(z.exp(), 1, dim=dim))
        ends.a, ends.fc = nn.Conv2d(3, 4, 1), head
        with pytest.raises(ValueError, match="that are probabilities") if refused else contextlib.nullcontext():
            direct.DirectFeedback(ends, ["act"], example=x, class_dim=1)


@pytest.mark.parametrize(
    "end",
    [
        nn.Identity(),
        nn.Tanh(),
        nn.ReLU(),
        lambda z: z * 2,
        lambda z: 30 * torch.tanh(z / 30),
        lambda z: z - z.mean(1, True),
        lambda z: z * z.sigmoid(),
        # Logits again.
        lambda z: z.sigmoid().logit(),
        lambda z: (z.sigmoid() / (1 - z.sigmoid())).log(),
        lambda z: z.sigmoid().log() - (1 - z.sigmoid()).log(),
        # One class has no other to be told from; log 1 = 0.
        lambda z: z[:, :1] * 0,
        lambda z: z[:, :1] * 0 + 1,
        # A head that begins at zero.
        lambda z: z * 0,
        lambda z: (z * 0).bfloat16(),
    ],
)
def test_other_ends_are_logits(end: Any) -> None:
    direct.DirectFeedback(Ends(end), ["act"], example=torch.randn(2, 3))


IN_PLACE: list[Any] = [
    lambda z: z.div_(2.0),
    lambda z: z.masked_fill_(z > 0.5, -1.0),
    lambda z: z.clamp_(-0.5, 0.5),
    lambda z: z.mul_(3).add_(1).relu_(),
    lambda z: z.transpose(0, 1).div_(2.0).transpose(0, 1),
    lambda z: z.__setitem__((slice(None), 0), -1.0) or z,
]


@pytest.mark.parametrize(
    ("change", "compiled"),
    [(change, False) for change in IN_PLACE]
    + [(IN_PLACE[0], True), *(pytest.param(change, True, marks=pytest.mark.slow) for change in IN_PLACE[1:])],
)
def test_logits_may_be_changed_in_place(change: Any, compiled: bool) -> None:
    x, y = torch.randn(7, 3), torch.arange(7) % 5
    net = direct.DirectFeedback(Ends(lambda z: z), ["act"], example=x)

    def run(prepare: Any) -> Tensor:
        return F.cross_entropy(change(prepare(net(x))), y)

    run(Tensor.clone).backward()
    expected = copy.deepcopy(grads(net))
    net.zero_grad()
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    run(lambda z: z).backward()
    assert_same(grads(net), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_saved_the_logits_is_not_overwritten_in_silence(compiled: bool) -> None:
    # tanh's backward reads its output, which is the memory of the logits.
    x = torch.randn(7, 3)
    net = direct.DirectFeedback(Ends(torch.tanh), ["act"], example=x)
    net(x).div(2).sum().backward()
    expected = copy.deepcopy(grads(net))
    net.zero_grad()
    torch._dynamo.reset()
    run: Any = lambda: net(x).div_(2).sum()  # noqa: E731
    if compiled:
        torch.compile(run, fullgraph=True, backend="aot_eager")().backward()
        assert_same(grads(net), expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run().backward()


def test_logits_are_not_copied() -> None:
    x = torch.randn(7, 3)
    seen: list[Tensor] = []
    net = direct.DirectFeedback(Ends(lambda z: seen.append(z) or z), ["act"], example=x)
    assert net(x).data_ptr() == seen[-1].data_ptr()


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


# Models that return more.


@dataclasses.dataclass
class Output:
    """As transformers'."""

    logits: Any
    features: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    """Nothing can be set."""

    logits: Any


Pair = namedtuple("Pair", "logits features")

RETURNS: dict[str, tuple[Any, Any]] = {
    "dict": (lambda z, h: {"out": z, "aux": h}, lambda o: o["out"]),
    "ordered": (lambda z, h: OrderedDict(out=z, aux=h), lambda o: o["out"]),
    "tuple": (lambda z, h: (h, z, 3, None), lambda o: o[1]),
    "list": (lambda z, h: [z, h], lambda o: o[0]),
    "named": (Pair, lambda o: o.logits),
    "dataclass": (Output, lambda o: o.logits),
    "slots": (lambda z, h: Slots(z), lambda o: o.logits),
    "nested": (lambda z, h: {"a": [Output((z, h))], "b": z}, lambda o: o["b"]),
    "nested pick": (lambda z, h: {"a": [Output((z, h))], "b": z}, lambda o: o["a"][0].logits[0]),
    "tensor": (lambda z, h: z, lambda o: o),
}


class Returning(nn.Module):
    """A model that returns what `how` makes of its logits and features."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.a, self.act, self.fc, self.how = nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), how

    def forward(self, x: Tensor) -> Any:
        h = self.act(self.a(x))
        return self.how(self.fc(h), h)


@pytest.mark.parametrize(
    ("kind", "compiled"),
    [(kind, False) for kind in RETURNS]
    + [pytest.param(kind, True, marks=() if kind in ("ordered", "nested") else pytest.mark.slow) for kind in RETURNS],
)
def test_the_logits_are_picked_from_what_is_returned(kind: str, compiled: bool) -> None:
    make, pick = RETURNS[kind]
    x, y = torch.randn(7, 3), torch.arange(7) % 5
    model = Returning(make)
    bare = direct.DirectFeedback(Returning(lambda z, h: z), ["act"], example=x)
    bare.model.load_state_dict(model.state_dict())
    F.cross_entropy(bare(x), y).backward()
    net = direct.DirectFeedback(model, ["act"], example=x, output=pick)
    torch._dynamo.reset()
    run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
    out = run(x)
    assert type(out) is type(make(x, x))
    F.cross_entropy(pick(out), y).backward()
    assert_same(grads(net), grads(bare))
    # All places hold the same.
    if kind.startswith("nested"):
        assert out["b"] is out["a"][0].logits[0]
    with torch.no_grad():
        torch.testing.assert_close(pick(net(x)), bare(x))


class Tuple(nn.Module):
    """Two tensors."""

    def forward(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return z, h


def test_what_cannot_be_picked_is_refused() -> None:
    x = torch.randn(2, 3)
    for make, options, error, match in (
        (lambda z, h: (z, h), {}, TypeError, "model: expected one that returns one tensor, the logits; output= takes"),
        (lambda z, h: (z, h), {"output": lambda o: o}, TypeError, "model: expected one that returns one tensor"),
        (Tuple(), {"logits": "how"}, TypeError, "logits: expected a module of one tensor, the logits; .* got tuple"),
        (lambda z, h: [z], {"output": lambda o: o[0][:, :3]}, ValueError, "output: expected a function that picks"),
        (lambda z, h: {z}, {"output": lambda o: next(iter(o))}, ValueError, "output: expected a function that picks"),
        (lambda z, h: (z.log_softmax(1),), {"output": lambda o: o[0]}, ValueError, "got what log_softmax returns"),
        # A loss that the model computes itself would reach no block.
        (lambda z, h: {"z": z, "loss": z.sum()}, {"output": lambda o: o["z"]}, ValueError, "would reach no block"),
        (lambda z, h: (z, z.softmax(1)), {"output": lambda o: o[0]}, ValueError, "name the submodule .* by logits="),
    ):
        model = Returning(make)
        with pytest.raises(error, match=match):
            direct.DirectFeedback(model, ["act"], example=x, **options)
        assert type(model.act) is nn.Tanh


def test_a_loss_of_the_models_own_and_an_output_of_the_named_submodule() -> None:
    class Head(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"z": super().forward(x)}

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.fc = nn.Linear(3, 6), nn.Tanh(), Head(6, 5)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
            z = self.fc(self.act(self.a(x)))["z"]
            return {"loss": None if y is None else F.cross_entropy(z, y), "z": z}

    x, y = torch.randn(7, 3), torch.arange(7) % 5
    net = direct.DirectFeedback(Own(), ["act"], example=x, logits="fc", output=lambda o: o["z"])
    net(x, y)["loss"].backward()
    h = torch.tanh(net.model.a(x))
    z = net.model.fc(h)["z"]
    e = (z.softmax(1) - F.one_hot(y, 5)) / 7
    (g,) = torch.autograd.grad(h, net.model.a.weight, e @ net.feedback_matrix("act"))
    torch.testing.assert_close(net.model.a.weight.grad, g)
    # At the model's end that loss has gone round the blocks, which the example, without labels, could not tell.
    net = direct.DirectFeedback(net.restore(), ["act"], example=x, output=lambda o: o["z"])
    assert net(x)["z"].requires_grad
    for _ in range(2):
        with pytest.raises(ValueError, match=r"output: a loss or something else .* name the submodule"):
            net(x, y)
    with torch.no_grad():
        net(x, y)


# However a model is run.


def cases() -> dict[str, Any]:
    """Of each kind of wrapper, the wrapper, an input and a loss."""
    torch.manual_seed(0)
    tokens, y = torch.randn(4, 3, 3), torch.arange(4) % 5
    ends = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.LogSoftmax(1))
    steps = torch.arange(12).reshape(4, 3) % 5
    first = tokens[:, 0]
    pixels = torch.randn(4, 3, 6)
    return {
        "logits": (direct.DirectFeedback(ends, ["1"], example=first, logits="2"), (first,), F.nll_loss, y),
        "class_dim": (
            direct.DirectFeedback(Conv(1), ["1", "3"], example=pixels, class_dim=1),
            (pixels,),
            F.cross_entropy,
            torch.arange(24).reshape(4, 6) % 5,
        ),
        "steps": (
            direct.DirectFeedback(Steps("batch first"), ["act"], example=tokens),
            (tokens,),
            lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
            steps,
        ),
        "taps": (
            direct.DirectFeedback(Alternating(""), ["act"], example=tokens, logits="head"),
            (tokens,),
            lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
            steps,
        ),
        "siamese": (
            direct.DirectFeedback(Siamese(), ["branch"], example=(first, first)),
            (first, tokens[:, 1]),
            F.cross_entropy,
            y,
        ),
        "output": (
            direct.DirectFeedback(Returning(Output), ["act"], example=first, output=_pick),
            (first,),
            lambda o, y: F.cross_entropy(o.logits, y),
            y,
        ),
    }


def _pick(output: Any) -> Tensor:
    return output.logits


every_case = pytest.mark.parametrize("case", ["logits", "class_dim", "steps", "taps", "siamese", "output"])


def wanted(case: str) -> tuple[Any, tuple[Tensor, ...], Any, Tensor, dict[str, Tensor | None]]:
    """The case, with its gradients."""
    net, x, loss, y = cases()[case]
    loss(net(*x), y).backward()
    expected = copy.deepcopy(grads(net))
    assert all(g is not None for g in expected.values())
    net.zero_grad()
    return net, x, loss, y, expected


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@every_case
def test_compiles_to_one_graph(case: str, backend: str) -> None:
    net, x, loss, y, expected = wanted(case)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: loss(net(*x), y), fullgraph=True, backend=backend)
    for _ in range(2):
        net.zero_grad()
        compiled(*x).backward()
        assert_same(grads(net), expected)
    assert net._tape.outputs is None and net._tape.tie is None


@every_case
def test_autocast(case: str) -> None:
    net, x, loss, y, expected = wanted(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(net(*x), y)
    value.backward()
    for name, g in grads(net).items():
        assert g.dtype == torch.float32
        assert (g - expected[name]).norm() < 0.1 * expected[name].norm(), name


@pytest.mark.parametrize("use_reentrant", [False, True])
@every_case
def test_checkpointing_of_it_all(case: str, use_reentrant: bool) -> None:
    net, x, loss, y, expected = wanted(case)
    x = tuple(t.clone().requires_grad_() for t in x)
    checkpoint(lambda *x: loss(net(*x), y), *x, use_reentrant=use_reentrant).backward()
    assert_same(grads(net), expected)


def test_checkpointing_inside() -> None:
    class Inside(Steps):
        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), 6)
            for t in range(x.shape[1]):
                h = checkpoint(lambda x, h: self.act(self.below(x) + self.cell(h)), x[:, t], h, use_reentrant=False)
            return self.head(h)

    x = torch.randn(4, 3, 3)
    nets = [direct.DirectFeedback(kind("last"), ["act"], example=x) for kind in (Steps, Inside)]
    nets[1].model.load_state_dict(nets[0].model.state_dict())
    for net in nets:
        net(x).square().sum().backward()
    assert_same(grads(nets[1]), grads(nets[0]))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_logits_that_are_recomputed_inside_raise(use_reentrant: bool) -> None:
    class Inside(Ends):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.fc, self.act(self.a(x)) * x.mean(), use_reentrant=use_reentrant)

    with pytest.raises(RuntimeError, match=r"logits: 'fc' ran without recording|different number of tensors was saved"):
        net = direct.DirectFeedback(Inside(None), ["act"], example=torch.ones(2, 3).requires_grad_(), logits="fc")
        net(torch.ones(2, 3)).sum().backward()


@every_case
def test_within_metrics_backprop_it_is_the_model(case: str) -> None:
    net, x, loss, y, _ = wanted(case)
    with metrics.backprop(net):
        loss(net(*x), y).backward()
    found = copy.deepcopy(grads(net))
    net.zero_grad()
    model = net.restore()
    loss(model(*x), y).backward()
    assert_same({n.removeprefix("model."): g for n, g in found.items()}, grads(model))


@every_case
def test_copies_and_pickles(case: str) -> None:
    net, x, loss, y, expected = wanted(case)
    if case == "output":
        net.model.how = Output
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        loss(twin(*x), y).backward()
        assert_same(grads(twin), expected)
        assert twin._tape is not net._tape
    assert all(g is None for g in grads(net).values())
    net.restore()
    assert not any(isinstance(m, direct._Block) for m in net.modules())


def _every_case(rank: int, world: int) -> dict[str, Any]:
    found = {}
    for case, (net, x, loss, y) in cases().items():
        ranks = nn.parallel.DistributedDataParallel(net)
        loss(ranks(*(t[rank::world] for t in x)), y[rank::world]).backward()
        found[case] = grads(net)
    return found


@pytest.mark.slow
def test_two_ranks() -> None:
    for found in processes.run(_every_case):
        for case, g in found.items():
            assert_same(g, wanted(case)[-1])


# State.


def test_the_state_is_that_of_the_same_b() -> None:
    x = torch.randn(2, 3)
    plain, named = (
        direct.DirectFeedback(Ends(nn.Identity()), ["act"], example=x, **options) for options in ({}, {"logits": "fc"})
    )
    named.load_state_dict(plain.state_dict())
    assert torch.equal(named.state_dict()["feedback_state"], plain.state_dict()["feedback_state"])
    # Classes read off the wrong dimension are another B.
    pixels = torch.randn(2, 3, 5)
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.Tanh(), nn.Conv1d(8, 8, 1))
    wrong = direct.DirectFeedback(copy.deepcopy(model), ["1"], example=pixels, class_dim=-1)
    right = direct.DirectFeedback(model, ["1"], example=pixels, class_dim=1)
    with pytest.raises(RuntimeError, match="feedback_state: expected the state of"):
        right.load_state_dict(wrong.state_dict())
    # Version 0.1 saved the key alone.
    old = right.state_dict()
    del old["feedback_state"]
    old["feedback_key"] = torch.tensor([1, 3, 0])
    right.load_state_dict(old)
    assert right.feedback_key.tolist() == [1, 3, 0]


def test_pickled_wrappers_that_version_0_1_wrote() -> None:
    """Made by 0.1.0: for each rule a wrapper, its state_dict, an input, the arguments, and the gradients."""
    file = Path(__file__).parent / "data/version_0_1_0_direct.pickle.gz"
    for net, state, x, arguments, expected in pickle.loads(gzip.decompress(file.read_bytes())):
        for own in (net, pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
            own.load_state_dict(state)
            own.load_state_dict(own.state_dict())
            own.zero_grad()
            F.cross_entropy(own(x, **arguments), torch.tensor([0, 1, 2, 0, 1])).backward()
            # DRTP was that of a sum.
            n = 5 if own.feedback.name == "drtp" else 1
            for (name, p), g in zip(own.named_parameters(), expected, strict=True):
                assert (p.grad is None) == (g is None)
                if g is not None:
                    torch.testing.assert_close(p.grad * (1 if "4" in name else n), g)
