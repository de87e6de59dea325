"""bench/scale.py: its arithmetic against what torch gathers and keeps, and the page that has its tables."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bioplaus_kernels as bk

pytest.importorskip("pycocotools")
from bench import scale

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"


class Net(nn.Module):
    """First dimensions that 4 ranks do not divide, a layer of the root's, norms."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(18), nn.Linear(18, 30), nn.ReLU(), nn.Linear(30, 18)) for _ in range(3)
        )
        self.head = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Moved(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements that come out of gathers and go into reductions."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allgather" in func.name():
            self.gathered += args[0].numel()
        if "reduce_scatter" in func.name():
            self.reduced += args[1].numel()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's own stand-in for a group of many ranks, of which this process is the first and the others do nothing."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 4, 64], indirect=True)
@pytest.mark.parametrize("way", ["True", "False", "ours"])
def test_bytes_are_those_that_torch_moves(way: str, ranks: int) -> None:
    from torch.distributed import fsdp

    model = Net()
    bk.convert_(model, "usf")
    expected = scale.step(model, ranks, way)
    mesh = torch.distributed.init_device_mesh("cpu", (ranks,))
    if way == "ours":
        bk.distributed.fully_shard(model, mesh=mesh)
    else:
        bk.convert_(model, None)
        for block in (*model.blocks, model):
            fsdp.fully_shard(block, mesh=mesh, reshard_after_forward=way == "True")
    x = torch.randn(3, 18)
    signs: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        signs.update({t.data_ptr(): 4 * t.numel()} if t.dtype == torch.int32 else {})
        return t

    with Moved() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    with Moved() as backward:
        y.sum().backward()
    assert (forward.gathered, backward.gathered) == (expected.forward, expected.backward)
    assert (forward.reduced, backward.reduced) == (0, expected.reduced)
    if way == "ours":
        # Norms are gathered with the root, and stay.
        norms = [p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()]
        assert expected.resident == sum(signs.values()) + sum(scale.GATHERED * scale.padded(p, ranks) for p in norms)


LARGE = "ResNet-152", "Transformer"
TABLES = [
    pytest.param(net, id=net.name, marks=[pytest.mark.slow] if net.name.startswith(LARGE) else []) for net in scale.NETS
]


@pytest.mark.parametrize("net", TABLES)
def test_the_page_has_the_tables(net: scale.Net) -> None:
    assert scale.table(net) in PAGE.read_text()
