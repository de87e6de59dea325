"""Functions run by the ranks of a gloo process group, each rank in a process of its own."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch


def _rank(rank: int, function: Callable[..., Any], world: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        torch.save(function(rank, world), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def run(function: Callable[[int, int], Any], world: int = 2) -> list[Any]:
    """What `function(rank, world)` returns on each rank: tensors and what holds them."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    with tempfile.TemporaryDirectory() as folder:
        arguments = function, world, folder
        torch.multiprocessing.start_processes(_rank, arguments, nprocs=world, start_method=fresh.START_METHOD)
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(world)]
