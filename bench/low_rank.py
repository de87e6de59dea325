"""Low-rank feedback against back-propagation: a linear layer's step, and the memory of its state beside W."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

import bioplaus_kernels as bk

from .device import Device
from .registry import Bench, Case, Run, register

RANKS = (8, 64, 512)


@register("low_rank")
def cases() -> Iterator[Case]:
    """4096 × 4096 by batch, the input gradient alone and the step; --quick has the smaller batch of 1024 × 1024."""
    for size, batches in ((4096, (16, 128, 512)), (1024, (128,))):
        for m in batches:
            for step in (False, True):
                label = f"{size} x {size} M={m} {'forward + backward' if step else 'backward input'}"
                made = functools.partial(build, size=size, m=m, step=step)
                yield Case("low_rank", label, made, quick=size == 1024)


def build(device: Device, size: int, m: int, step: bool) -> Bench:
    """One step, or its input gradient alone (W frozen), by rule and rank; back-propagation is the baseline."""
    torch.manual_seed(0)
    x, g = torch.randn(m, size, requires_grad=True), torch.randn(m, size)
    variants: dict[str, Run] = {}
    gate = {}

    def add(name: str, rule: bk.Rule | None) -> None:
        layer = bk.nn.Linear(size, size, bias=False, feedback=rule)
        layer.weight.requires_grad_(step)
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad and step)]
        if step:
            variants[name] = lambda: torch.autograd.grad(layer(x), wanted, g)
        else:
            y = layer(x)
            variants[name] = lambda: torch.autograd.grad(y, wanted, g, retain_graph=True)
        if isinstance(rule, bk.LowRank):
            gate[name] = lambda: _gate(variants[name]()[0], g, layer)

    add("backprop", None)
    add("fa stored", bk.FeedbackAlignment(stored=True))
    for rank in RANKS:
        kept = 2 * size * rank / size**2
        add(f"low_rank {rank}, state {kept:.3g} of W", bk.LowRank(rank))
        if step:
            add(f"low_rank {rank} learned", bk.LowRank(rank, learned=True))
    return Bench(variants, gate)


def _gate(result: Tensor, g: Tensor, layer: torch.nn.Module) -> float:
    # Two products of any order have the error of both.
    p, q = layer.feedback_p.detach(), layer.feedback_q.detach()
    exact = (g.double() @ p.double()) @ q.double()
    torchs = ((g @ p) @ q - exact).abs().max()
    return float((result - exact).abs().max() / (2 * torchs + torch.finfo(result.dtype).eps * exact.abs().max()))
