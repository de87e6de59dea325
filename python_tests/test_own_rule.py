"""A rule of a user's own, one class in this file: wherever ours are taken, and in every way they are used."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
import processes
import pytest
import torch
from oracle import with_feedback
from small import LAYERS, ONE_WEIGHT, assert_equal, build, call, gradients
from torch import Tensor, nn

import bioplaus_kernels as bk
from bioplaus_kernels.feedback import Frozen

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Ternary(bk.Rule):
    name = "ternary"
    threshold: float = 0.01

    def matrix(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        return torch.sign(weight) * (weight.abs() > self.threshold)


@dataclass(frozen=True)
class LowRank(bk.Rule):
    """B = P Q, both drawn once; P stays a buffer, Q a Parameter."""

    name = "low rank"
    rank: int = 2

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape[0], weight[:1].numel()
        return {"p": weight.new_empty(rows, self.rank), "q": Frozen(weight.new_empty(self.rank, columns))}

    def draw(self, state: dict[str, Any], weight: Tensor, key: Tensor) -> None:
        if weight.is_meta:
            return
        generator = torch.Generator(weight.device).manual_seed(int(key[1]) % 2**31)
        for name in ("p", "q"):
            drawn = torch.randn(state[name].shape, generator=generator, device=weight.device)
            bk.feedback.fill(state[name], drawn.to(weight.dtype))

    def factors(self, weight: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return state["p"], state["q"]


@dataclass(frozen=True)
class Rotated(bk.Rule):
    """B = W times a fixed sign an input, kept as integers; a call reads them."""

    name = "rotated"

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"flips": torch.zeros(weight.shape[-1], dtype=torch.int8, device=weight.device)}

    def draw(self, state: dict[str, Any], weight: Tensor, key: Tensor) -> None:
        if not weight.is_meta:
            generator = torch.Generator().manual_seed(int(key[1]) % 2**31)
            state["flips"].copy_(torch.randint(2, state["flips"].shape, generator=generator) * 2 - 1)

    def matrix(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        return weight * state["flips"]


OWN: dict[str, bk.Rule] = {rule.name: rule for rule in (Ternary(0.05), LowRank(), Rotated())}
# Of ours, those that keep what a wrapper shards.
STORED: dict[str, bk.Rule] = {"fa": bk.FeedbackAlignment(stored=True), "wm": bk.WeightMirror(), "kp": bk.KolenPollack()}
STORED |= {"low_rank": bk.LowRank(2), "low_rank learned": bk.LowRank(2, learned=True)}
own_rules = pytest.mark.parametrize("rule", OWN.values(), ids=list(OWN))
layers = pytest.mark.parametrize("layer", LAYERS)


@own_rules
@pytest.mark.parametrize("layer", ONE_WEIGHT)
def test_gradients(layer: str, rule: bk.Rule) -> None:
    module, x = build(layer, rule)
    b = module.feedback_matrix()
    expected = {
        "ternary": lambda: module.weight.sign() * (module.weight.abs() > 0.05),
        "low rank": lambda: (module.feedback_p @ module.feedback_q).reshape(module.weight.shape),
        "rotated": lambda: module.weight * module.feedback_flips,
    }[rule.name]()
    assert torch.equal(b, expected.detach())
    plain = copy.deepcopy(module)
    bk.convert_(plain, None)
    ours = module(x)
    theirs = with_feedback(
        lambda x, w, c: torch.func.functional_call(plain, {"weight": w, "bias": c}, (x,)),
        x,
        module.weight,
        b,
        module.bias,
    )
    direction = torch.randn_like(ours)
    for a, e in zip(
        torch.autograd.grad(ours, (x, module.weight, module.bias), direction),
        torch.autograd.grad(theirs, (x, module.weight, module.bias), direction),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@own_rules
@layers
def test_copies_files_and_the_way_back(layer: str, rule: bk.Rule) -> None:
    module, x = build(layer, rule)
    expected = gradients(module, x)
    assert_equal(gradients(copy.deepcopy(module), x), expected)
    assert_equal(gradients(pickle.loads(pickle.dumps(module)), x), expected)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other, _ = build(layer, rule)
    other.load_state_dict(torch.load(file))
    assert_equal(gradients(other, x), expected)
    # From the meta device: with the state, and with plain weights.
    with torch.device("meta"):
        empty, _ = build(layer, rule)
    empty.load_state_dict(module.state_dict(), assign=True)
    assert_equal(gradients(empty, x), expected)
    with torch.device("meta"):
        empty, _ = build(layer, rule)
    plain = {name: t for name, t in module.state_dict().items() if "feedback" not in name}
    empty.load_state_dict(plain, assign=True, strict=False)
    assert all(grad.isfinite().all() and grad.abs().max() < 1e3 for grad in gradients(empty, x))
    bk.convert_(module, None)
    assert not [name for name in module.state_dict() if "feedback" in name]
    module.load_state_dict(plain)


@own_rules
@layers
def test_autocast(layer: str, rule: bk.Rule) -> None:
    module, x = build(layer, rule)
    exact = gradients(module, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(module, x)
    # torch's bilinear map is not among those that autocast casts.
    assert y.dtype == (torch.float32 if layer == "Bilinear" else torch.bfloat16)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    parameters = [p for p in module.parameters() if p.requires_grad]
    for a, e in zip(torch.autograd.grad(y, (x, *parameters), direction), exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, e, rtol=0.1, atol=0.05 * float(e.abs().max()))


@pytest.mark.slow
@own_rules
@pytest.mark.parametrize(
    "layer",
    ["Linear", "Conv2d", "ConvTranspose1d", "LocallyConnected1d", "MultiheadAttention", "Bilinear", "LSTM", "GRUCell"],
)
def test_compiles_to_one_graph(layer: str, rule: bk.Rule) -> None:
    module, x = build(layer, rule)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call(module, x), fullgraph=True, backend="aot_eager")
    parameters = [p for p in module.parameters() if p.requires_grad]
    direction = torch.randn(call(module, x).shape)
    # torch's own switch for what is a torch.nn.LSTM, RNN or GRU.
    with torch._dynamo.config.patch(allow_rnn=True):
        ours, eager = (
            torch.autograd.grad(f(x), (x, *parameters), direction) for f in (compiled, lambda x: call(module, x))
        )
    for a, e in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, e)


def test_convert_and_report() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    report = bk.convert_(model, Ternary(), last_layer=None)
    assert report.converted == ["0", "2"] and "Ternary(threshold=0.01)" in str(report)
    assert str(bk.describe(model)).splitlines()[1].split() == ["0.weight", "Ternary(threshold=0.01)", "-"]
    state = model.state_dict()
    bk.convert_(model, Ternary(0.5))
    with pytest.raises(
        RuntimeError, match=r"expected the state of Ternary\(threshold=0.5\), got that of Ternary\(thres"
    ):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"got that of Ternary"):
        other = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        bk.convert_(other, "usf")
        other.load_state_dict(state)


def test_functional_forms_take_it() -> None:
    x, w = torch.randn(3, 6, requires_grad=True), torch.randn(5, 6)
    bk.functional.linear(x, w, feedback=Ternary(0.5)).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 5) @ (w.sign() * (w.abs() > 0.5)))
    with pytest.raises(ValueError, match="keeps state"):
        bk.functional.linear(x, w, feedback=LowRank())


def test_matrix_is_called_once_a_call_in_the_weights_own_dtype() -> None:
    calls: list[tuple[torch.dtype, bool, bool]] = []

    class Counting(bk.Rule):
        name = "counting"

        def matrix(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
            calls.append((weight.dtype, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            return -weight

    layer = bk.nn.Linear(6, 5, feedback=Counting())
    x = torch.randn(3, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert calls == [(torch.float32, False, False)]
    torch.testing.assert_close(x.grad, -torch.ones(3, 5) @ layer.weight, rtol=0.02, atol=0.02)
    # No gradient goes on below: nothing is formed.
    layer(torch.randn(3, 6)).sum().backward()
    assert len(calls) == 1


class Nothing(bk.Rule):
    name = "nothing"


class Nameless(bk.Rule):
    def matrix(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        return weight


class Wrong(bk.Rule):
    name = "wrong"

    def matrix(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        return weight.t()


class Taken(bk.Rule):
    name = "taken"

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"key": weight.clone()}

    def matrix(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        return weight


def test_errors() -> None:
    with pytest.raises(
        TypeError, match=r"feedback: expected a rule with one of matrix, factors and operands, got Nothing"
    ):
        bk.nn.Linear(6, 5, feedback=Nothing())
    with pytest.raises(TypeError, match=r"feedback: expected a rule with a name, a string, got Nameless"):
        bk.nn.Linear(6, 5, feedback=Nameless())
    with pytest.raises(ValueError, match=r"Wrong.matrix: expected shape \(5, 6\), torch.float32 on cpu, got \(6, 5\)"):
        bk.nn.Linear(6, 5, feedback=Wrong())(torch.randn(2, 6, requires_grad=True))
    with pytest.raises(ValueError, match=r"Taken.state: expected names other than .*, got 'key'"):
        bk.nn.Linear(6, 5, feedback=Taken())


# Two processes.


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(36, 12, proj_size=8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


MODEL: Callable[[], nn.Module] = lambda: nn.Sequential(  # noqa: E731
    nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(2), Last(), nn.Tanh(), nn.Linear(8, 3)
)


def _train(rule: bk.Rule, wrap: str, rank: int, world: int) -> list[Tensor]:
    torch.manual_seed(3)
    model = MODEL()
    bk.convert_(model, rule)
    forward: nn.Module = model
    if wrap == "ddp":
        forward = nn.parallel.DistributedDataParallel(model)
    elif wrap == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in (model[0], model[3], model[5]):
            fully_shard(layer)
        fully_shard(model)
    # What is kept is trained by neither, however it is wrapped.
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    for x in torch.randn(3, 4, 1, 8, 8, generator=torch.Generator().manual_seed(5)):
        optimizer.zero_grad()
        forward(x[rank::world]).square().mean().backward()
        optimizer.step()
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [p.detach().clone() for p in full]


def _freed(rank: int, world: int) -> str:
    """What the backward says where FSDP2 was told not to gather W for it."""
    from torch.distributed.fsdp import fully_shard

    model = MODEL()
    bk.convert_(model, "usf")
    for layer in (model[0], model[3], model[5], model):
        fully_shard(layer, reshard_after_forward=True)
        layer.set_unshard_in_backward(False)
    try:
        model(torch.randn(4, 1, 8, 8)).square().mean().backward()
    except ValueError as error:
        return str(error)
    return ""


def _every_case(rank: int, world: int) -> tuple[dict[Any, list[Tensor]], str]:
    cases = [(name, wrap) for name in OWN | STORED for wrap in ("ddp", "fsdp2")]
    found = {(name, wrap): _train((OWN | STORED)[name], wrap, rank, world) for name, wrap in cases}
    return found, _freed(rank, world)


@pytest.mark.slow
def test_two_ranks_train_as_one_process() -> None:
    (ours, said), (theirs, _) = processes.run(_every_case)
    assert said.startswith("weight: expected a tensor with memory, got one whose storage has been freed")
    for (name, wrap), found in ours.items():
        assert_equal(found, theirs[name, wrap])
        for a, e in zip(found, _train((OWN | STORED)[name], "", 0, 1), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)


# What a subclass of a rule of ours says.


@dataclass(frozen=True)
class Clipped(bk.SignSymmetry):
    def matrix(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        return torch.sign(weight) * (weight.abs() > 0.1)


@dataclass(frozen=True)
class Sham(bk.Backprop):
    def matrix(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        return -weight


@dataclass(frozen=True)
class Noisy(bk.SignSymmetry):
    def state(self, weight: Tensor) -> dict[str, Tensor]:
        return super().state(weight) | {"noise": torch.empty_like(weight.detach())}

    def draw(self, state: dict[str, Any], weight: Tensor, key: Tensor) -> None:
        super().draw(state, weight, key)
        size, dtype = weight.shape, weight.dtype
        state["noise"].copy_(bk.ops.feedback_weight(None, None, None, key, "normal", 1.0, size, dtype=dtype))

    def operands(self, weight: Tensor, state: dict[str, Any]) -> bk.feedback.Operands:
        return bk.feedback.stored(torch.sign(weight) * state["noise"].abs())


@dataclass(frozen=True)
class Keyed(bk.SignSymmetry):
    seeded = True

    def matrix(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        size, key = weight.shape, state["key"]
        return bk.ops.feedback_weight(None, None, None, key, "uniform", state["rms"], size, dtype=weight.dtype)


def test_what_a_subclass_overrides_acts() -> None:
    layer = bk.nn.Linear(64, 64, feedback=Clipped())
    assert torch.equal(layer.feedback_matrix(), layer.weight.sign() * (layer.weight.abs() > 0.1))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert bk.convert_(model, Sham()).converted == ["0", "1"]
    assert torch.equal(model[0].feedback_matrix(), -model[0].weight)
    for rule in (Noisy(), Keyed()):
        bk.convert_(model, rule, seed=1)
        first = [model[i].feedback_matrix().abs() for i in (0, 1)]
        bk.convert_(model, rule, seed=2)
        assert not torch.equal(*first) and not torch.equal(first[0], model[0].feedback_matrix().abs())


# What identifies it in a file.


class Mode(Enum):
    A, B = 1, 2


@dataclass(frozen=True, slots=True)
class Slots(bk.Rule):
    name = "slots"
    t: float = 0.01

    def matrix(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        return torch.sign(weight) * (weight.abs() > self.t)


@dataclass(frozen=True)
class Odd(bk.Rule):
    name = "odd"
    size: Any = 8
    mode: Mode = Mode.A
    table: Any = None
    label: Any = field(default=None, compare=False)

    @cached_property
    def once(self) -> int:
        return 3

    def matrix(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        return weight * self.once


def unannotated(value: float) -> bk.Rule:
    class Mine(bk.Rule):
        name = "mine"
        t = value

        def matrix(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
            return weight * self.t

    return Mine()


def loads(saved: bk.Rule, built: bk.Rule) -> bool:
    a, b = (bk.nn.Linear(6, 5, feedback=rule) for rule in (saved, built))
    a.feedback_matrix()
    try:
        b.load_state_dict(a.state_dict())
    except RuntimeError as error:
        assert "expected the state of" in str(error)
        return False
    a.load_state_dict(a.state_dict())
    return True


def test_what_identifies_a_rule() -> None:
    for one, other in (
        (Slots(0.01), Slots(0.1)),
        (unannotated(0.01), unannotated(0.1)),
        (Odd(), Odd(mode=Mode.B)),
        (Odd(), Odd(size=9)),
        (Odd(table={(1, 2): 3}), Odd(table={(1, 2): 4})),
    ):
        assert loads(one, one) and not loads(one, other) and one != other
    assert loads(Odd(np.int64(8)), Odd(8)) and loads(Odd(label=print), Odd(label="a"))
    assert repr(unannotated(0.5)) == "Mine(t=0.5)"
    with pytest.raises(
        TypeError, match=r"feedback: Odd.table: expected numbers, strings, .* got Tensor; tensors are for st"
    ):
        bk.nn.Linear(6, 5, feedback=Odd(table=torch.ones(2)))


# What it returns.


def returning(**methods: Any) -> bk.Rule:
    kind = type("Returning", (bk.Rule,), {"name": "returning"} | {n: lambda *_, v=v: v for n, v in methods.items()})
    return kind()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"matrix": None}, r"Returning.matrix: expected a tensor, got NoneType"),
        ({"factors": None}, r"Returning.factors: expected two tensors, got NoneType"),
        ({"factors": torch.ones(5, 6)}, r"Returning.factors: expected two tensors, got Tensor"),
        ({"factors": (torch.ones(()), torch.ones(()))}, r"Returning.factors: expected shape \(5, 1\)"),
        ({"matrix": None, "state": None}, r"Returning.state: expected a dictionary of tensors, got NoneType"),
        ({"matrix": None, "state": {1: torch.ones(1)}}, r"Returning.state: expected names other than .*, got 1"),
        ({"matrix": None, "state": {"a": 1.0}}, r"Returning.state: expected a tensor as 'a', got float"),
        (
            {"matrix": None, "state": {n: nn.Parameter(torch.ones(5, 6)) for n in "pq"}},
            r"Returning.state: expected one trained Parameter, got more",
        ),
    ],
)
def test_wrong_returns(methods: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        bk.nn.Linear(6, 5, feedback=returning(**methods))(torch.randn(2, 6, requires_grad=True))


def test_state_that_is_the_weights_memory_is_copied() -> None:
    class First(bk.Rule):
        name = "first"
        initial = True

        def state(self, weight: Tensor) -> dict[str, Tensor]:
            return {"w": weight.detach(), "p": Frozen(weight.detach())}

        def matrix(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
            return state["w"] + state["p"]

    layer = bk.nn.Linear(4, 4, feedback=First())
    before = layer.feedback_matrix()
    nn.init.normal_(layer.weight)
    assert torch.equal(layer.feedback_matrix(), before) and isinstance(layer.feedback_p, Frozen)
    with torch.device("meta"):
        layer = bk.nn.Linear(4, 4, feedback=Ternary())
        layer(torch.empty(2, 4, requires_grad=True)).sum().backward()
