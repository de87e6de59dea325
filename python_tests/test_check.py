"""check, and what it leaves of a model: all of it."""

import random
import sys
from typing import Any

import pytest
import torch
from proving import Reads, mlp, outcomes, pending, x
from torch import Tensor, nn

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")


class Moving(nn.Module):
    """Buffers that a call replaces, registers, grows and writes, and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("cache", torch.zeros(0))
        self.register_buffer("count", torch.tensor(0))
        self.alias, self.seen = self.count, [1]

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + x.detach().mean(0)
        self.cache.resize_(3).fill_(1)
        self.alias += 1
        self.steps = 1
        self.seen.append(2)
        self.register_buffer("born", torch.ones(2))
        self.register_forward_hook(lambda *_: None)
        return self.layer(x)


def test_check_leaves_everything_as_it_was() -> None:
    model = Moving()
    bk.convert_(model, "fa")
    model.layer.weight.grad = torch.ones(4, 4)
    given, before, contents = x(), dict(vars(model)), {n: b.clone() for n, b in model.named_buffers()}
    objects, hooks = dict(model.named_buffers()), dict(model._forward_hooks)
    state, versions = torch.get_rng_state(), {n: b._version for n, b in model.layer.named_buffers()}
    assert bk.check(model, given).proven == ["layer"]
    assert vars(model) == before and model.seen == [1] and dict(model._forward_hooks) == hooks
    assert list(dict(model.named_buffers())) == list(contents)
    for name, buffer in model.named_buffers():
        assert buffer is objects[name] and torch.equal(buffer, contents[name])
    assert {n: b._version for n, b in model.layer.named_buffers()} == versions
    assert torch.equal(model.layer.weight.grad, torch.ones(4, 4)) and torch.equal(torch.get_rng_state(), state)
    assert pending(model)


def test_check_between_a_forward_and_its_backward() -> None:
    """Batch norm has saved its running statistics."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).train()
    bk.convert_(model, "fa", example=x())
    loss = model.eval()(x()).sum()
    bk.check(model.train(), x())
    loss.backward()


def test_check_restores_when_the_model_raises() -> None:
    bk.convert_(model := nn.Sequential(nn.BatchNorm1d(5), nn.Linear(4, 4)), "fa")
    with pytest.raises(ValueError, match="input"):
        bk.check(model, x(3, 5))
    assert not model[1]._forward_pre_hooks and "used" not in vars(model[1])
    assert model[0].num_batches_tracked == 0


def test_check_of_a_model_without_rules() -> None:
    model = Reads()
    report = bk.check(model, x=x())
    assert outcomes(report) == {"read": "read", "called": "called", "spare": "unused"}


@pytest.mark.parametrize("rule", [None, "usf"])
def test_reads_of_frozen_weights_are_seen(rule: str | None) -> None:
    model = Reads()
    model.read.requires_grad_(False)
    bk.convert_(model, rule)
    assert outcomes(bk.check(model, x()))["read"] == "read"
    assert not model.read.weight.requires_grad


@pytest.mark.parametrize("frozen", [["0"], ["0", "2"], ["0", "2", "4"]])
def test_what_is_frozen_below_a_layer_does_not_make_it_act(frozen: list[str]) -> None:
    def net() -> nn.Sequential:
        model = nn.Sequential(*mlp(), nn.Tanh(), nn.Linear(4, 4))
        for name in frozen:
            model.get_submodule(name).requires_grad_(False)
        return model

    report = bk.convert_(model := net(), "usf")
    given = torch.randn(3, 4)
    if frozen != ["0", "2", "4"]:
        model(given)
    idle = {n for n, outcome in outcomes(bk.check(model, given)).items() if outcome != "proven"}
    assert idle == {"0", "2", "4"} - ({"4"} if frozen == ["0"] else set())
    assert set(report.proven) == {"0", "2", "4"} - idle
    assert set(bk.convert_(net(), "usf", example=given).proven) == {"0", "2", "4"} - idle
    assert bk.check(model, given.requires_grad_()).proven == ["0", "2", "4"]


def test_a_scalar_of_a_weight_that_never_converted_is_no_read() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + 0.0 * sum(p.sum() for p in self.idle.parameters())

    assert outcomes(bk.check(Idle(), x())) == {"layer": "called", "idle": "unused"}


def test_check_refuses_unknown_shapes() -> None:
    with pytest.raises(ValueError, match=r"model: expected one that was called, .*got a lazy 0"):
        bk.check(nn.Sequential(nn.LazyLinear(4)), x())


def test_wrapped_models() -> None:
    accelerate = pytest.importorskip("accelerate")
    bk.convert_(model := mlp(), "usf")
    accelerate.hooks.add_hook_to_module(model[0], accelerate.hooks.ModelHook())
    assert bk.check(nn.DataParallel(model), x()).proven == ["module.0", "module.2"]
    assert bk.convert_(model, None).restored == ["0", "2"]
    assert type(model[0]) is bk.nn.Linear and type(model[2]) is nn.Linear


class Writing(nn.Module):
    """Writes into tensors that are attributes, or in one, and into its input; draws from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.bank, self.seen = nn.Linear(4, 4), torch.zeros(4), {"count": [torch.zeros(1)]}

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        numpy: Any = sys.modules["numpy"]
        assert y is None or y is x
        self.bank += 1
        self.seen["count"][0] += 1
        x.mul_(1 + numpy.random.rand() + random.random() + torch.rand(()).item())
        return self.layer(x)


@pytest.mark.parametrize("run", [bk.check, lambda m, x: bk.convert_(m, "fa", example=x)])
def test_what_a_forward_writes_and_draws_is_as_before(run: Any) -> None:
    numpy = pytest.importorskip("numpy")
    model, given = Writing(), torch.ones(3, 4)
    states = random.getstate(), numpy.random.get_state()[1:3], torch.get_rng_state()
    run(model, given)
    assert not model.bank.any() and not model.seen["count"][0].any()
    assert torch.equal(given, torch.ones(3, 4))
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[2])
    assert all(map(numpy.array_equal, numpy.random.get_state()[1:3], states[1]))


def test_one_tensor_given_twice_stays_one() -> None:
    pytest.importorskip("numpy")
    given = torch.ones(3, 4)
    assert bk.check(Writing(), given, y=given).names("called") == ["layer"]


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("given_gradient", [False, True])
def test_without_contents(fake: bool, given_gradient: bool) -> None:
    """On the meta device, and of fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() if fake else torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        given = torch.randn(3, 4, requires_grad=given_gradient)
        bk.convert_(model, "usf", example=given)
        assert bk.check(model, given).proven == (["0", "2"] if given_gradient else ["2"])


def test_sparse_buffers() -> None:
    model = mlp()
    model.register_buffer("edges", torch.eye(4).to_sparse())
    bk.convert_(model, "usf", example=x())
    assert bk.check(model, x()).proven == ["0", "2"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_scripted_part_is_left_alone() -> None:
    scripted = torch.jit.script(nn.Linear(4, 4))
    model = nn.Sequential(scripted, nn.Linear(4, 4))
    assert bk.convert_(model, "usf", example=x()).proven == ["1"]
    model[1].weight = scripted.weight
    bk.convert_(model, "usf")
    model(x()).sum().backward()
    assert bk.check(model, x()).proven == ["1"]
