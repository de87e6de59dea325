"""bench/scale.py: its arithmetic against the bytes that FSDP2 moves and keeps, and the page that has its tables."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bioplaus_kernels as bk

pytest.importorskip("pycocotools")
from bench import scale, sharding

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's own stand-in for a group of many ranks, of which this process is the first and the others do nothing."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    torch.distributed.destroy_process_group()


# Six ranks divide few of the first dimensions, and 1,000 none.
@pytest.mark.parametrize("ranks", [2, 6, 1000], indirect=True)
@pytest.mark.parametrize(("way", "counted"), [*zip(["True", "False", "ours"], sharding.WAYS, strict=True)])
def test_bytes_are_those_that_torch_moves(way: str, counted: str, ranks: int) -> None:
    model = sharding.Net()
    bk.convert_(model, "usf")
    step = scale.step(model, ranks, way)
    mesh = torch.distributed.init_device_mesh("cpu", (ranks,))
    found = sharding.measure("usf", counted, mesh, sharding.POLICIES["bfloat16, reduced in float32"])
    assert found["gathered"] == scale.GATHERED * (step.forward + step.backward)
    assert found["reduced"] == scale.REDUCED * step.reduced
    assert found["waiting"] == step.resident


@pytest.mark.parametrize("net", scale.NETS, ids=lambda net: net.name)
def test_the_page_has_the_tables(net: scale.Net) -> None:
    assert scale.table(net) in PAGE.read_text()
