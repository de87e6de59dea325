"""What is proven of sharded models, and that it leaves them usable."""

import itertools
from typing import Any

import fresh
import pytest
import torch
from proving import outcomes, reason, x
from torch import Tensor, nn

import bioplaus_kernels as bk

SHARDED = {
    "usf": bk.SignSymmetry(),
    "usf-match": bk.SignSymmetry(scale="match"),
    "fa": bk.FeedbackAlignment(),
    "fa_signed_init": bk.SignedInit(),
    "kp": bk.KolenPollack(),
}


class Block(nn.Module):
    """Two layers, one of which may be read."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.first, self.second, self.reads = nn.Linear(4, 4), nn.Linear(4, 4), reads

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return y @ self.second.weight.t() if self.reads else self.second(y)


# Which blocks are sharded by themselves, whether the root's weight is frozen, and when the model is looked at.
CASES = list(itertools.product([(), (0,), (0, 2)], [False, True], ["never", "check", "example", "between", "after"]))


def _trained(blocks: tuple[int, ...], frozen: bool, when: str) -> list[Tensor | None]:
    # The gradients of two steps.
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    first, last = (nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    model, given = nn.Sequential(first, nn.Tanh(), last), torch.randn(3, 4)
    last[0].weight.requires_grad_(not frozen)
    if when != "example":
        bk.convert_(model, "usf")
    for part in (*(model[i] for i in blocks), model):
        fully_shard(part)
    if when == "check":
        assert "2.0" in bk.check(model, given).proven
    elif when == "example":
        assert "2.0" in bk.convert_(model, "usf", example=given).proven
    y = model(given)
    if when == "between":
        bk.check(model, given)
    y.sum().backward()
    if when == "after":
        bk.check(model, given)
    model(given).sum().backward()
    return [None if p.grad is None else p.grad.full_tensor() for p in model.parameters()]


def _parallel(rule: str, how: str) -> str:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, given = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(3, 4)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    try:
        if how != "example":
            bk.convert_(model, rule)
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if how == "example":
            bk.convert_(model, rule, example=given)
        model(given) if how == "first" else bk.check(model, given)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def _sharded(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=1)
    try:
        found: dict[Any, Any] = {}
        for rule in SHARDED:
            for first in ("convert", "shard"):
                model = nn.Sequential(Block(False), Block(False))
                torch.manual_seed(0)
                try:
                    if first == "convert":
                        report = bk.convert_(model, SHARDED[rule])
                    fully_shard(model[0]), fully_shard(model)
                    if first == "shard":
                        report = bk.convert_(model, SHARDED[rule])
                    model(x()).sum().backward()
                    found[rule, first] = report.proven
                except ValueError as error:
                    found[rule, first] = str(error)
        report = bk.convert_(model := nn.Sequential(Block(True)), "usf")
        fully_shard(model[0]), fully_shard(model)
        model(x())
        found["read"] = outcomes(report), reason(report, "0.second")
        found["layer"] = bk.convert_(fully_shard(nn.Linear(4, 4)), "usf").rows[0].reason
        for case in CASES:
            found[case] = _trained(*case)
        found["flat"] = bk.convert_(FullyShardedDataParallel(Block(False), device_id=torch.device("cpu")), "usf").rows
        for rule in ("usf", "fa", "kp"):
            for how in ("first", "check", "example"):
                found["parallel", rule, how] = _parallel(rule, how)
        torch.save(found, f"{folder}/found")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.start_processes(_sharded, (str(folder),), nprocs=1, start_method=fresh.START_METHOD)
    return torch.load(folder / "found", weights_only=False)


@pytest.mark.parametrize("rule", SHARDED)
def test_converted_then_sharded_is_proven(rule: str, sharded: dict[Any, Any]) -> None:
    assert sharded[rule, "convert"] == ["0.first", "0.second", "1.first", "1.second"]


@pytest.mark.parametrize("rule", SHARDED)
def test_sharded_then_converted_works_or_says_the_order(rule: str, sharded: dict[Any, Any]) -> None:
    keeps = rule in ("kp", "fa_signed_init")
    expected = "this one is sharded already: convert_ first, then fully_shard"
    assert expected in sharded[rule, "shard"] if keeps else sharded[rule, "shard"] == sharded[rule, "convert"]
    assert sharded["layer"] == "sharded by itself: convert_ first, then fully_shard"


def test_a_sharded_weight_that_is_not_called_is_never_proven(sharded: dict[Any, Any]) -> None:
    found, why = sharded["read"]
    assert found == {"0.first": "proven", "0.second": "converted"}
    assert why == "not proven: not called, and its weight is sharded, so a read cannot be seen"


@pytest.mark.parametrize("case", [case for case in CASES if case[2] != "never"], ids=str)
def test_looking_at_a_sharded_model_leaves_its_training_as_it_was(case: Any, sharded: dict[Any, Any]) -> None:
    assert all(map(_equal, sharded[case], sharded[*case[:2], "never"]))


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def test_fsdp_1s_one_parameter_says_the_order(sharded: dict[Any, Any]) -> None:
    (row,) = sharded["flat"]
    assert row.outcome == "left" and row.reason.endswith("FSDP's: convert_ first, then wrap")


@pytest.mark.parametrize("how", ["first", "check", "example"])
@pytest.mark.parametrize("rule", ["usf", "fa", "kp"])
def test_tensor_parallelism_is_refused_before_training(rule: str, how: str, sharded: dict[Any, Any]) -> None:
    said = sharded["parallel", rule, how]
    assert said.startswith("0") and ("as tensor parallelism makes it" in said or "sharded already" in said)
