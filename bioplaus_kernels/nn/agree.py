"""Data-parallel ranks have one B for each weight, or every one of them raises."""

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..feedback.record import Record
from .held import Held


def agree(held: Held | None = None) -> None:
    """In a forward of a DistributedDataParallel, compare what identifies each layer's feedback over its ranks, once.

    What DDP does not send can differ: with broadcast_buffers=False, where a checkpoint was loaded on rank 0 alone, or
    where a rule was given, or drawn again, after DDP was made. Raises RuntimeError then, on every rank. `held` is that
    of the layer that asks.
    """
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is None:
        return
    agreed: set[Held] = vars(ddp).setdefault("_feedback_agreed", set())
    if held in agreed:
        return
    every, own, reduced = set(), set(), {id(p) for p in ddp._module_parameters}
    records = feedback_records(ddp.module)
    for prefix, layer in ddp.module.named_modules():
        for h in vars(layer).get("_held", {}).values():
            every.add(h)
            own |= {f"{prefix}.{a}".lstrip(".") for a in (h.record, *h.kept.values()) if a in layer._buffers}
            if h.trained and id(getattr(layer, h.trained)) not in reduced:
                raise RuntimeError(
                    f"{prefix}.{h.trained}: DistributedDataParallel does not reduce its gradient: convert_ the "
                    "model before it is wrapped"
                )
    if not every <= agreed and not same_on_ranks(records, next(ddp.module.parameters()).device, [ddp.process_group]):
        raise RuntimeError(
            "DistributedDataParallel: the ranks have different feedback. It sends nothing of what convert_ drew, and "
            "no buffers where broadcast_buffers=False: load a checkpoint on every rank, give convert_ one seed, build "
            "layers under one torch.manual_seed, all of it before the model is wrapped"
        )
    # One that asks may be of a model that the wrapper does not have.
    agreed.update(every, () if held is None else (held,))
    # They have been sent when the wrapper was made, and nothing changes them.
    ddp.parameters_to_ignore |= own
    ddp._assign_modules_buffers()


# For torch.compile, which runs it while it traces: with nothing to guard.
agree._dynamo_marked_constant = True  # type: ignore[attr-defined]


def feedback_records(model: torch.nn.Module) -> list[tuple[str, str, Record]]:
    """What identifies the feedback of each weight."""
    found = []
    for prefix, layer in model.named_modules():
        for name in vars(layer).get("_held", {}):
            layer.look_again(name)
            found.append((prefix, name, layer.feedback_record(name)))
    return found


def same_on_ranks(what: Any, device: Any, groups: list[Any]) -> bool:
    """Whether all ranks of `groups`, one a dimension of a mesh, give a `what` of the same repr; 16 bytes are sent."""
    digest = int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=7).digest())
    found = torch.tensor([digest, -digest], device=device)
    for group in groups:
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group)
    return bool(found[0] == -found[1])


def mean_over_ranks(model: torch.nn.Module, like: Any, tensor: Tensor) -> Tensor:
    """The mean of each rank's `tensor`, sharded as `like` is; `tensor` where `model` says nothing of ranks."""
    if hasattr(like, "full_tensor"):
        from torch.distributed.tensor import DTensor, Partial

        mesh = like.device_mesh
        mean = DTensor.from_local(tensor.to(like.dtype).reshape(like.shape), mesh, [Partial("avg")] * mesh.ndim)
        return mean.redistribute(placements=like.placements)
    if isinstance(model, DistributedDataParallel):
        torch.distributed.all_reduce(tensor, group=model.process_group)
        return tensor / model.process_group.size()
    return tensor
