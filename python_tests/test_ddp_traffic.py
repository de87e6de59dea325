"""What DistributedDataParallel sends for a model with rules, and its ways of running one, on two ranks."""

import copy
import warnings
from typing import Any

import processes
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import bioplaus_kernels as bk

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

RULES: dict[str, Any] = {
    "usf": "usf",
    "brsf": "brsf",
    "fa": "fa",
    "fa, stored": bk.FeedbackAlignment(stored=True),
    "fa_signed_init": "fa_signed_init",
    "concordance": "concordance",
    "low_rank": "low_rank",
    "wm": "wm",
    "kp": "kp",
}
WAYS: dict[str, dict[str, Any]] = {
    "static_graph": {"static_graph": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "broadcast_buffers=False": {"broadcast_buffers": False},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.down = nn.Conv1d(2, 4, 3), nn.Linear(24, 16), nn.Linear(16, 3)
        self.unused = nn.Linear(3, 3)
        self.skips = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(torch.tanh(self.up(torch.relu(self.conv(x)).flatten(1))))
        return x if self.skips else self.unused(x)


def _model(rule: Any, skips: bool = False) -> Net:
    torch.manual_seed(0)
    model = Net()
    model.skips = skips
    bk.convert_(model, rule, seed=1)
    return model


def _batches() -> Tensor:
    return torch.randn(3, 4, 2, 8, generator=torch.Generator().manual_seed(3))


class Sent(TorchDispatchMode):
    """Bytes of the tensors given to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func not in (torch.ops.c10d.barrier.default, torch.ops.c10d.send.default):
            self.bytes += sum(t.nbytes for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


def _train(model: nn.Module, rank: int = 0, world: int = 1) -> dict[str, Any]:
    sent: list[int] = []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = []
    for x in _batches():
        with Sent() as counted:
            model(x.chunk(world)[rank]).square().mean().backward()
        sent.append(counted.bytes)
        grads = {n.replace("module.", "").replace("_orig_mod.", ""): p.grad for n, p in model.named_parameters()}
        found.append({name: grad.clone() for name, grad in grads.items() if grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return {"sent": sent, "grads": found}


def _work(rank: int, world: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    with Sent() as start:
        DistributedDataParallel(Net())
    found: dict[str, Any] = {"plain": start.bytes}
    for name, rule in RULES.items():
        with Sent() as start:
            ranks = DistributedDataParallel(_model(rule))
        found[name] = {**_train(ranks, rank, world), "start": start.bytes}
    for name, options in WAYS.items():
        model = _model("fa", skips="unused" in name)
        found[name] = _train(DistributedDataParallel(model, **options), rank, world)
    for name in (None, "fa_signed_init"):
        torch.manual_seed(0)
        model = nn.Sequential(bk.nn.Linear(8, 8, feedback=name), nn.BatchNorm1d(2), bk.nn.Linear(8, 3, feedback=name))
        ranks = DistributedDataParallel(model)
        found[f"beside batch norm, {name}"] = _train(ranks, rank, world)["sent"]
        found[f"copied, {name}"] = _train(copy.deepcopy(ranks), rank, world)["sent"]
    model = _model("usf")
    compiled = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    compiled(_batches()[0].chunk(world)[rank]).square().mean().backward()
    found["compiled"] = {name: p.grad for name, p in model.named_parameters()}
    ranks = DistributedDataParallel(_model("aa"))
    ranks(_batches()[0].chunk(world)[rank]).square().mean().backward()
    bk.align_(ranks, _batches()[0].chunk(world)[rank])
    found["aligned"] = [layer.feedback_weight.grad for layer in _layers(ranks)]
    ranks = DistributedDataParallel(_model("wm"))
    bk.mirror_(ranks, generator=torch.Generator().manual_seed(rank))
    found["mirrored"] = [layer.feedback_weight.data for layer in _layers(ranks)]
    return found


def _layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, bk.nn.FeedbackLayer)]


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return processes.run(_work)


def _close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_step_sends_gradients_alone(rule: str, ranks: list[dict[str, Any]]) -> None:
    model, found = _model(RULES[rule]), ranks[0][rule]
    weights = sum(p.nbytes for p in Net().parameters())
    trained = weights + sum(layer.weight.nbytes for layer in _layers(model) if rule == "kp")
    # The first forward compares what identifies the feedback, 16 bytes; the second says how buckets are made anew.
    assert found["sent"][2] == trained
    buffers = sum(b.nbytes for b in model.buffers()) if rule == "fa_signed_init" else 0
    assert found["sent"][0] - trained in (0, 16 + buffers)
    # What is the same by its key on every rank is not sent at all.
    kept = sum(t.nbytes for name, t in model.state_dict().items() if not name.endswith("feedback_state"))
    sent = found["start"] - ranks[0]["plain"]
    if rule == "fa_signed_init":
        assert sent == sum(t.nbytes for t in model.state_dict().values()) - weights
    elif rule == "concordance":
        assert sent == 0
    else:
        # DistributedDataParallel compares the sizes of Parameters, and their strides, 8 bytes a number.
        assert kept - weights <= sent <= kept - weights + 160 * len(_layers(model)) * (kept > weights)
    for one, other in zip(
        found["grads"], _train(_model(RULES[rule]))["grads"][: 1 if rule == "brsf" else 3], strict=False
    ):
        _close(one, other)


@pytest.mark.parametrize("case", ["beside batch norm", "copied"])
def test_other_buffers_are_sent_alone(case: str, ranks: list[dict[str, Any]]) -> None:
    assert ranks[0][f"{case}, fa_signed_init"][2] == ranks[0][f"{case}, None"][2]


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_running(way: str, ranks: list[dict[str, Any]]) -> None:
    wanted = _train(_model("fa", skips="unused" in way))["grads"]
    for one, other in zip(ranks[0][way]["grads"], wanted, strict=True):
        _close(one, other)


def test_compiled(ranks: list[dict[str, Any]]) -> None:
    _close(ranks[0]["compiled"], _train(_model("usf"))["grads"][0])


def test_alignment_and_mirror_are_means_over_ranks(ranks: list[dict[str, Any]]) -> None:
    model = _model("aa")
    bk.align_(model, _batches()[0])
    for grad, layer in zip(ranks[0]["aligned"], _layers(model), strict=True):
        torch.testing.assert_close(grad, layer.feedback_weight.grad, rtol=1e-4, atol=1e-6)
    # Each rank's noise was another.
    for one, other in zip(ranks[0]["mirrored"], ranks[1]["mirrored"], strict=True):
        assert torch.equal(one, other)


def test_sync_batch_norm_keeps_the_rules() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    bk.convert_(model, "usf")
    before = [id(layer) for layer in _layers(model)]
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(model[1], nn.SyncBatchNorm)
    assert [id(layer) for layer in _layers(model)] == before
    assert bk.convert_(model, "usf").names("left") == ["1"]
