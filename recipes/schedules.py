"""How the two optimizers of target propagation take turns (Bartunov et al. 2018, section 3 and algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

import bioplaus_kernels as bk

SCHEDULES = ("parallel", "alternating")
Batches = Iterable[tuple[Tensor, Tensor]]


def adams(
    tp: bk.TargetProp, forward: dict[str, object], inverse: dict[str, object]
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Adam for the layers and Adam for the inverses, with torch.optim.Adam's own arguments (table 5)."""
    return torch.optim.Adam(tp.layers.parameters(), **forward), torch.optim.Adam(tp.inverses.parameters(), **inverse)


def train_epoch(
    tp: bk.TargetProp,
    batches: Batches,
    forward: torch.optim.Optimizer,
    inverse: torch.optim.Optimizer | None,
    schedule: str = "parallel",
) -> float:
    """One epoch; the mean task loss before each update of the layers.

    parallel: targets, inverses' step, layers' step on every batch. alternating: the inverses on all batches, then
    the layers on all batches, so `batches` is gone through twice. inverse=None leaves the inverses as they are.
    Raises ValueError for another schedule, and where `batches` has none (a used-up iterator).
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if inverse is not None and schedule == "alternating":
        for x, _ in batches:
            with torch.no_grad():
                h = tp.activations(x)
            _step(inverse, tp.inverse_loss(h))
    losses = []
    for x, y in batches:
        h = tp.activations(x)
        targets = tp.targets(h, y)
        if inverse is not None and schedule == "parallel":
            _step(inverse, tp.inverse_loss(h))
        losses.append(tp.loss(h[-1].detach(), y))
        _step(forward, tp.forward_loss(h, targets, y))
    if not losses:
        raise ValueError("batches: expected at least one each time they are gone through, got none")
    return float(torch.stack(losses).mean())


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
