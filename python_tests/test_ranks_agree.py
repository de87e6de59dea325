"""Data-parallel ranks have one B for each weight, whatever a script did before, or every one of them says so."""

from collections.abc import Callable
from typing import Any

import processes
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bioplaus_kernels as bk

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def converted(rule: str, seed: int = 0) -> nn.Sequential:
    model = plain()
    bk.convert_(model, rule, seed=seed)
    return model


def direct(rule: str = "fa") -> nn.Sequential:
    return nn.Sequential(bk.nn.Linear(8, 8, feedback=rule), nn.Tanh(), bk.nn.Linear(8, 8, feedback=rule))


def loaded_on_rank_0() -> nn.Module:
    model = converted("fa")
    if torch.distributed.get_rank() == 0:
        model.load_state_dict(converted("fa", seed=5).state_dict())
    return DistributedDataParallel(model)


def new_head() -> nn.Module:
    model = converted("fa")
    model[2] = bk.nn.Linear(8, 8, feedback="fa")
    return DistributedDataParallel(model)


def reset_after() -> nn.Module:
    ddp = DistributedDataParallel(converted("fa"))
    ddp.module[0].reset_feedback()
    return ddp


def sent_by_hand() -> nn.Module:
    model = direct()
    for t in model.state_dict().values():
        torch.distributed.broadcast(t, 0)
    return DistributedDataParallel(model, broadcast_buffers=False)


def converted_after() -> nn.Module:
    model = plain()
    ddp = DistributedDataParallel(model)
    bk.convert_(model, "kp")
    return ddp


def after_a_step(change: Callable[[nn.Module], Any], **options: Any) -> nn.Module:
    ddp = DistributedDataParallel(converted("fa"))
    model = torch.compile(ddp, **options) if options else ddp
    model(torch.randn(4, 8)).square().sum().backward()
    change(ddp.module)
    return model


def own_seed(model: nn.Module) -> None:
    bk.convert_(model, "fa", seed=torch.distributed.get_rank())


GOOD: dict[str, Callable[[], nn.Module]] = {
    "built": lambda: DistributedDataParallel(direct()),
    "built brsf": lambda: DistributedDataParallel(direct("brsf")),
    "built concordance": lambda: DistributedDataParallel(direct("concordance")),
    "built, compiled": lambda: torch.compile(DistributedDataParallel(direct()), backend="aot_eager"),
    "compiled within": lambda: DistributedDataParallel(torch.compile(direct(), backend="aot_eager", fullgraph=True)),
    "converted": lambda: DistributedDataParallel(converted("fa")),
    "converted, nothing sent": lambda: DistributedDataParallel(converted("fa"), broadcast_buffers=False),
    "converted after a step": lambda: after_a_step(lambda m: bk.convert_(m, "frsf", seed=3)),
    "signs of W": lambda: DistributedDataParallel(converted("fa_signed_init")),
}
BAD: dict[str, Callable[[], nn.Module]] = {
    "loaded on rank 0": loaded_on_rank_0,
    "loaded on rank 0, compiled": lambda: torch.compile(loaded_on_rank_0(), backend="aot_eager"),
    "a new head": new_head,
    "built, nothing sent": lambda: DistributedDataParallel(direct(), broadcast_buffers=False),
    "signs of W, nothing sent": lambda: DistributedDataParallel(converted("fa_signed_init"), broadcast_buffers=False),
    "sent by hand": sent_by_hand,
    "reset after": reset_after,
    "own seed after a step": lambda: after_a_step(own_seed),
    "reset after a step": lambda: after_a_step(lambda m: m[2].reset_feedback()),
    "kp after": converted_after,
    "kp after a step": lambda: after_a_step(lambda m: bk.convert_(m, "kp")),
    "kp after a step, compiled": lambda: after_a_step(lambda m: bk.convert_(m, "kp"), backend="aot_eager"),
}


def _run(make: Callable[[], nn.Module]) -> str | list[Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(torch.distributed.get_rank())
    model = make()
    try:
        for _ in range(2):
            model(torch.randn(4, 8)).square().sum().backward()
    except Exception as error:  # torch.compile's own
        return str(error)
    inner = getattr(model, "_orig_mod", model).module
    inner = getattr(inner, "_orig_mod", inner)
    return [inner[i].feedback_matrix() for i in (0, 2)] + [inner[i].weight.detach() for i in (0, 2)]


def _every_case(rank: int, world: int) -> dict[str, Any]:
    return {name: _run(make) for name, make in (GOOD | BAD).items()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return processes.run(_every_case)


@pytest.mark.slow
@pytest.mark.parametrize("case", GOOD)
def test_one_b(case: str, ranks: list[dict[str, Any]]) -> None:
    ours, theirs = (rank[case] for rank in ranks)
    assert not isinstance(ours, str) and not isinstance(theirs, str), ours
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_every_rank_says_so(case: str, ranks: list[dict[str, Any]]) -> None:
    wanted = "does not reduce its gradient" if case.startswith("kp after") else "the ranks have different feedback"
    for rank in ranks:
        assert isinstance(rank[case], str) and wanted in rank[case]
