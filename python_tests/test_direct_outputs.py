"""Where direct feedback takes the error: at the logits, whatever is made of them and whatever they are returned in."""

import contextlib
import copy
import dataclasses
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from direct_models import RULES, Ends, Output, Returning, call, delta, every_rule
from direct_net import assert_same, grads
from torch import Tensor, nn

from bioplaus_kernels import direct

pytestmark = pytest.mark.usefixtures("one_thread")

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
        lambda z: 100 * (z - z.mean(1, True)) + 1 / 5,
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


# DKP has a function of its own behind that of the others.
by_function = pytest.mark.parametrize("rule", ["dfa", "dkp"])


@by_function
@pytest.mark.parametrize(
    ("change", "compiled"),
    [(change, False) for change in IN_PLACE]
    + [(IN_PLACE[0], True), *(pytest.param(change, True, marks=pytest.mark.slow) for change in IN_PLACE[1:])],
)
def test_logits_may_be_changed_in_place(change: Any, compiled: bool, rule: str) -> None:
    x, y = torch.randn(7, 3), torch.arange(7) % 5
    net = direct.DirectFeedback(Ends(lambda z: z), ["act"], rule, example=x)

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


@by_function
@pytest.mark.parametrize("compiled", [False, True])
def test_what_saved_the_logits_is_not_overwritten_in_silence(compiled: bool, rule: str) -> None:
    # tanh's backward reads its output, which is the memory of the logits.
    x = torch.randn(7, 3)
    net = direct.DirectFeedback(Ends(torch.tanh), ["act"], rule, example=x)
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


@by_function
def test_logits_are_not_copied(rule: str) -> None:
    x = torch.randn(7, 3)
    seen: list[Tensor] = []
    net = direct.DirectFeedback(Ends(lambda z: seen.append(z) or z), ["act"], rule, example=x)
    assert net(x).data_ptr() == seen[-1].data_ptr()


# Models that return more.


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
