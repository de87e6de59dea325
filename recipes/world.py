"""The processes that train one run together: one alone, or the ranks that torchrun starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map_only

import bioplaus_kernels as bk

KINDS = ("ddp", "fsdp2")


@dataclass(frozen=True)
class World:
    """kind: "ddp", DistributedDataParallel, "fsdp2", `bioplaus_kernels.distributed.fully_shard`, or "", alone.

    Without a rule in any layer "fsdp2" is torch's fully_shard, of each entry of a list that is more than a layer.
    """

    kind: str = ""
    rank: int = 0
    size: int = 1

    @contextmanager
    def first(self) -> Iterator[None]:
        """Rank 0 before the others: what it downloads they find."""
        if self.rank:
            distributed.barrier()
        yield
        if self.size > 1 and not self.rank:
            distributed.barrier()

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """What is called to train `model`."""
        if self.kind == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        if self.kind == "fsdp2":
            mesh = distributed.init_device_mesh(device.type, (self.size,))
            if any(isinstance(m, bk.nn.FeedbackLayer) and m.uses_feedback for m in model.modules()):
                bk.distributed.fully_shard(model, mesh=mesh)
                return model
            lists = [m for m in model.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]
            entries = [entry for m in lists for entry in m if entry not in lists]
            blocks = [entry for entry in entries if sum(p.dim() > 1 for p in entry.parameters()) > 1]
            for block in (*reversed(blocks), model):
                distributed.fsdp.fully_shard(block, mesh=mesh)
        return model

    def apart(self, wrapped: nn.Module, apart: bool) -> AbstractContextManager[None]:
        """Where a backward adds to this rank's gradients alone, if there is to be another before the step.

        fsdp2 sums the ranks' at each: gradients that are whole on every rank are what it spares.
        """
        return wrapped.no_sync() if apart and self.kind == "ddp" else nullcontext()

    def sum(self, t: Tensor) -> Tensor:
        """Over the ranks, in place."""
        if self.size > 1:
            distributed.all_reduce(t)
        return t

    def gather(self, what: Any) -> list[Any]:
        """What each rank has."""
        found = [what] * self.size
        if self.size > 1:
            distributed.all_gather_object(found, what)
        return found

    def agree(self, model: nn.Module) -> None:
        """Buffers of all ranks as rank 0 has them; DistributedDataParallel sees to it itself."""
        if self.kind == "fsdp2":
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    def whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state dict without shards, of use on rank 0; every rank has to call it."""
        if self.kind != "fsdp2":
            return state
        from torch.distributed.tensor import DTensor

        def full(t: DTensor) -> Tensor | None:
            t = t.full_tensor()
            return t.cpu() if self.rank == 0 else None

        return tree_map_only(DTensor, full, state)

    def load(self, holder: Any, saved: dict[str, Any]) -> None:
        """`holder.load_state_dict` of what `whole` gave, in any other world."""
        if isinstance(holder, nn.Module):
            ours = holder.state_dict()
            saved = {name: self._cut(value, ours.get(name)) for name, value in saved.items()}
        elif isinstance(holder, torch.optim.Optimizer):
            params = [p for group in holder.param_groups for p in group["params"]]
            state = {n: {k: self._cut(v, params[n]) for k, v in of.items()} for n, of in saved["state"].items()}
            # How this world steps, not that of the checkpoint.
            how = [{"fused": group["fused"]} if "fused" in group else {} for group in holder.param_groups]
            groups = [group | own for group, own in zip(saved["param_groups"], how, strict=True)]
            saved = {"state": state, "param_groups": groups}
        holder.load_state_dict(saved)

    def _cut(self, saved: Any, like: Any) -> Any:
        # This rank's shard of what belongs to `like`, where that is sharded.
        if self.kind != "fsdp2" or not isinstance(saved, Tensor):
            return saved
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(like, DTensor) or saved.shape != like.shape:
            return saved
        return distribute_tensor(saved.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


ALONE = World()


def check(kind: str) -> None:
    """Raises ValueError where there is torchrun without a `kind`, or the other way round."""
    if kind and "RANK" not in os.environ:
        raise ValueError(f"--parallel: got {kind}, want it after torchrun --nproc-per-node N -m recipes run ...")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and not kind:
        raise ValueError(
            f"--parallel: got none, want run --parallel {' or '.join(KINDS)} under torchrun, "
            f"whose {launched} processes would each do all of it into one folder"
        )


@contextmanager
def join(kind: str, device: str) -> Iterator[World]:
    """The world that torchrun's environment describes, where "cuda" is each rank's own GPU, or a process alone."""
    if not kind:
        yield ALONE
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if cuda else "gloo")
    yield World(kind, distributed.get_rank(), distributed.get_world_size())
    distributed.destroy_process_group()
