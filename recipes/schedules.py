"""How the two optimizers of target propagation take turns (Bartunov et al. 2018, section 3 and algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

import bioplaus_kernels as bk

SCHEDULES = ("parallel", "sequential", "alternating")
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
    inverse_steps: Sequence[int] = (1,),
) -> float:
    """One epoch; the mean task loss before each update of the layers.

    parallel: targets, inverses' steps, layers' step on every batch. sequential: the same with targets by the inverses
    that have stepped (Ernoult et al. 2022, Shibuya et al. 2023). alternating: the inverses on all batches, then the
    layers on all batches, so `batches` is gone through twice. inverse=None leaves the inverses as they are;
    inverse_steps: as `train_inverses` takes them. Raises ValueError for another schedule or number of steps, and where
    `batches` has none (a used-up iterator).
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if inverse is not None and schedule == "alternating":
        train_inverses(tp, batches, inverse, inverse_steps)
    losses = []
    for x, y in batches:
        h = tp.activations(x)
        if inverse is not None and schedule == "sequential":
            _fit(tp, h, inverse, inverse_steps)
        targets = tp.targets(h, y)
        if inverse is not None and schedule == "parallel":
            _fit(tp, h, inverse, inverse_steps)
        losses.append(tp.loss(h[-1].detach(), y))
        _step(forward, tp.forward_loss(h, targets, y))
    if not losses:
        raise ValueError("batches: expected at least one each time they are gone through, got none")
    return float(torch.stack(losses).mean())


def train_inverses(
    tp: bk.TargetProp, batches: Batches, inverse: torch.optim.Optimizer, inverse_steps: Sequence[int] = (1,)
) -> None:
    """One epoch of the inverses alone: `inverse_steps` steps on every batch, each with noise of its own.

    One number, or one for each learned inverse from the lowest up, as Ernoult et al. 2022 have them. Raises ValueError
    for another number of numbers.
    """
    for x, _ in batches:
        with torch.no_grad():
            h = tp.activations(x)
        _fit(tp, h, inverse, inverse_steps)


def _fit(tp: bk.TargetProp, h: list[Tensor], inverse: torch.optim.Optimizer, inverse_steps: Sequence[int]) -> None:
    for step in range(max(inverse_steps)):
        losses = tp.inverse_losses(h)
        each = [*inverse_steps] * (len(losses) if len(inverse_steps) == 1 else 1)
        if len(each) != len(losses):
            raise ValueError(f"inverse_steps: expected one number or {len(losses)}, got {[*inverse_steps]}")
        _step(inverse, torch.stack([loss for loss, wanted in zip(losses, each, strict=True) if step < wanted]).sum())


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
