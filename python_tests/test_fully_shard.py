"""bk.distributed.fully_shard: gradients of the whole model, weights gathered once, on two ranks."""

import os
from typing import Any

import fresh
import pytest
import torch
from torch import Tensor, nn

import bioplaus_kernels as bk

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed"),
]

RULES: dict[str, Any] = {
    "usf": "usf",
    "fa": "fa",
    "frsf": "frsf",
    "brsf": "brsf",
    "fa_signed_init": "fa_signed_init",
    "fa stored": bk.FeedbackAlignment(stored=True),
    "frsf stored": bk.FixedMagnitude(stored=True),
    "kp": "kp",
}
# What the ranks keep whole stays float32.
MIXED = {
    **{name: RULES[name] for name in ("usf", "fa stored", "kp")},
    **{"low_rank": bk.LowRank(4), "low_rank learned": bk.LowRank(4, learned=True)},
}
ONCE = [name for name in RULES if name != "kp"]


class Block(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.act = nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 16, 3, padding=1)
        self.blocks = nn.ModuleList(Block(inplace) for _ in range(3))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.lstm(self.attention(x, x, x)[0])[0])


def converted(rule: Any, inplace: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = Net(inplace)
    bk.convert_(model, rule, seed=1)
    return model


def batches() -> Tensor:
    return torch.randn(3, 4, 4, 8, generator=torch.Generator().manual_seed(5))


class Gathers(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of what the ranks gather."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allgather" in func.name():
            self.calls += 1
            self.elements += args[0].numel()
        return func(*args, **(kwargs or {}))


def _step(model: nn.Module, x: Tensor, rank: int, world: int) -> Tensor:
    loss = model(x.chunk(world)[rank]).square().mean()
    loss.backward()
    return loss


def _full(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def _case(rank: int, world: int, mesh: Any, rule: Any, inplace: bool) -> dict[str, Any]:
    model = converted(rule, inplace)
    report = bk.distributed.fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen: dict[str, Any] = {"rows": [row.outcome for row in report.rows]}
    x, y, z = batches()
    with Gathers() as gathers:
        _step(model, x, rank, world)
    seen["calls"], seen["elements"] = gathers.calls, gathers.elements
    # Two batches summed, then a step, then another.
    _step(model, y, rank, world)
    seen["first"] = _full(model)
    optimizer.step()
    optimizer.zero_grad()
    _step(model, z, rank, world)
    seen["second"] = _full(model)
    return seen


def _others(rank: int, world: int, mesh: Any) -> dict[str, Any]:
    from torch.distributed import fsdp
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    found: dict[str, Any] = {}
    policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name, rule in MIXED.items():
        model = converted(rule)
        bk.distributed.fully_shard(model, mesh=mesh, mp_policy=policy)
        _step(model, batches()[0].bfloat16(), rank, world)
        found["bf16", name] = _full(model)

    model = converted("usf")
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    report = bk.distributed.fully_shard(model, mesh=mesh)
    _step(model, batches()[0], rank, world)
    found["checkpoint"] = _full(model), {row.name: row.reason for row in report.rows if row.reason}

    model = converted("usf")
    model.blocks[2].up.install_feedback(bk.Backprop())
    report = bk.distributed.fully_shard(model, mesh=mesh, blocks=list(model.blocks[:2]))
    _step(model, batches()[0], rank, world)
    found["some"] = _full(model), [row.name for row in report.rows if row.outcome != "gathered once"]
    try:
        bk.distributed.fully_shard(model, mesh=mesh)
    except ValueError as error:
        found["again"] = str(error)

    model = Net()
    for block in model.blocks:
        fsdp.fully_shard(block, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    with Gathers() as gathers:
        _step(model, batches()[0], rank, world)
    found["torch"] = gathers.calls, gathers.elements
    return found


def _worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    try:
        results: dict[Any, Any] = {name: _case(rank, world, mesh, rule, False) for name, rule in RULES.items()}
        results["in place"] = _case(rank, world, mesh, "usf", True)
        results |= _others(rank, world, mesh)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(_worker, (2, str(folder)), nprocs=2, start_method=fresh.START_METHOD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _wanted(rule: Any, inplace: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = converted(rule, inplace)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y, z = batches()
    _step(model, x, 0, 1)
    _step(model, y, 0, 1)
    first = {name: grad.clone() for name, grad in _full(model).items()}
    optimizer.step()
    optimizer.zero_grad()
    _step(model, z, 0, 1)
    return first, _full(model)


@pytest.mark.parametrize("case", [*RULES, "in place"])
def test_gradients_are_the_whole_models(case: str, ranks: list[dict[Any, Any]]) -> None:
    # brsf draws anew at each step, so that a rounding of W is another B.
    wanted = _wanted(RULES.get(case, "usf"), case == "in place")
    for grads, exact in zip((ranks[0][case]["first"], ranks[0][case]["second"]), wanted, strict=True):
        assert grads.keys() == exact.keys()
        for name, grad in grads.items():
            if case != "brsf" or grads is ranks[0][case]["first"]:
                torch.testing.assert_close(grad, exact[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ONCE)
def test_weights_are_gathered_once(case: str, ranks: list[dict[Any, Any]]) -> None:
    seen = ranks[0][case]
    assert set(seen["rows"]) == {"gathered once"}
    calls, elements = ranks[0]["torch"]
    model = Net()
    blocks = sum(p.numel() for block in model.blocks for p in block.parameters())
    whole = sum(p.numel() for p in model.parameters())
    # torch's way: blocks twice, what is the root's once. Ours: everything once, norms with the root.
    assert (calls, elements) == (7, whole + blocks)
    assert (seen["calls"], seen["elements"]) == (5, whole)


def test_learned_feedback_is_torchs_way(ranks: list[dict[Any, Any]]) -> None:
    # What is the root's is kept.
    assert set(ranks[0]["kp"]["rows"]) == {"gathered twice", "gathered and kept"}


@pytest.mark.parametrize("rule", MIXED)
def test_mixed_precision(rule: str, ranks: list[dict[Any, Any]]) -> None:
    model = converted(MIXED[rule])
    _step(model, batches()[0], 0, 1)
    for name, grad in _full(model).items():
        found = ranks[0]["bf16", rule][name]
        assert found.dtype == torch.float32
        assert (found - grad).norm() < 0.2 * grad.norm(), name


def test_what_needs_its_weight_keeps_the_gather(ranks: list[dict[Any, Any]]) -> None:
    model = converted("usf")
    _step(model, batches()[0], 0, 1)
    exact = _full(model)
    grads, reasons = ranks[0]["checkpoint"]
    assert {name.replace("_checkpoint_wrapped_module.", "") for name in reasons} == {"blocks.1.up", "blocks.1.down"}
    assert set(reasons.values()) == {"activation checkpointing computes its forward anew"}
    for name, grad in grads.items():
        torch.testing.assert_close(grad, exact[name.replace("_checkpoint_wrapped_module.", "")], rtol=1e-4, atol=1e-6)
    grads, twice = ranks[0]["some"]
    assert twice == ["blocks.2.up"]
    model = converted("usf")
    model.blocks[2].up.install_feedback(bk.Backprop())
    _step(model, batches()[0], 0, 1)
    for name, grad in _full(model).items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6)


def test_errors(ranks: list[dict[Any, Any]]) -> None:
    assert "module: expected one that is not sharded yet" in ranks[0]["again"]
    with pytest.raises(ValueError, match=r"blocks\[0\]: expected a module of `module`"):
        bk.distributed.fully_shard(converted("usf"), blocks=[nn.Linear(2, 2)])
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module"):
        bk.distributed.fully_shard(3)  # type: ignore[arg-type]
