"""What a layer call costs beyond torch.nn's own, on problems too small to hide it."""

from collections.abc import Iterator

import torch

import bioplaus_kernels as bk

from .registry import Bench, Case, Run, register


@register("overhead")
def cases() -> Iterator[Case]:
    """1 x 8 x 8 problems, forward alone and forward with backward."""
    for backward in (False, True):
        what = "forward + backward" if backward else "forward"
        yield Case("overhead", f"Linear 1x8x8 {what}", lambda device, b=backward: linear(b), quick=True)
        yield Case("overhead", f"Conv2d 1x8x8 {what}", lambda device, b=backward: conv(b), quick=True)


def _variants(make: object, x: torch.Tensor, backward: bool) -> dict[str, Run]:
    variants: dict[str, Run] = {}
    for rule in ("torch.nn", "usf", "fa", "frsf", "brsf", "fa_signed_init"):
        layer = make(None if rule == "torch.nn" else rule)
        inputs = (x.clone().requires_grad_(), *layer.parameters())
        wanted = [t for t in inputs if t.requires_grad]
        if backward:
            grad = torch.ones_like(layer(inputs[0]))
            variants[rule] = lambda f=layer, x=inputs[0], w=wanted, g=grad: torch.autograd.grad(f(x), w, g)
        else:
            variants[rule] = lambda f=layer, x=inputs[0]: f(x)
    return variants


def linear(backward: bool) -> Bench:
    """Batch 1, 8 features."""
    return Bench(
        _variants(
            lambda rule: torch.nn.Linear(8, 8) if rule is None else bk.nn.Linear(8, 8, feedback=rule),
            torch.randn(1, 8),
            backward,
        )
    )


def conv(backward: bool) -> Bench:
    """Batch 1, 8 channels, 8 x 8, kernel 3."""
    return Bench(
        _variants(
            lambda rule: torch.nn.Conv2d(8, 8, 3) if rule is None else bk.nn.Conv2d(8, 8, 3, feedback=rule),
            torch.randn(1, 8, 8, 8),
            backward,
        )
    )
