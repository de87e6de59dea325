"""What learning B costs: a training step with its step of alignment or mirroring, against back-propagation's."""

from collections.abc import Callable, Iterator

import torch

import bioplaus_kernels as bk

from .device import Device
from .registry import Bench, Case, Run, register

LEARN: dict[str, Callable[[torch.nn.Module, torch.Tensor], None] | None] = {
    "backprop": None,
    "kp": None,
    "wm": lambda model, x: bk.mirror_(model, batch_size=len(x)),
    "sa": bk.align_,
    "aa": bk.align_,
    "ia": bk.align_,
}


@register("alignment")
def cases() -> Iterator[Case]:
    """A multilayer perceptron and a convolutional net; B is as large as W in every row but the first."""
    for n in (16, 128):
        yield Case("alignment", f"MLP 3x1024 N={n}", lambda device, n=n: build(device, mlp, (n, 1024)), quick=n == 16)
        yield Case("alignment", f"4 convolutions 64 N={n}", lambda device, n=n: build(device, convs, (n, 3, 32, 32)))


def mlp() -> torch.nn.Module:
    """Three layers of 1024 units."""
    layers = [m for _ in range(3) for m in (torch.nn.Linear(1024, 1024), torch.nn.Tanh())]
    return torch.nn.Sequential(*layers, torch.nn.Linear(1024, 10))


def convs() -> torch.nn.Module:
    """Four convolutions of 64 channels, the first two halving the image."""
    layers = [torch.nn.Conv2d(3 if i == 0 else 64, 64, 3, 1 + (i < 2), 1) for i in range(4)]
    parts = [m for layer in layers for m in (layer, torch.nn.ReLU())]
    return torch.nn.Sequential(*parts, torch.nn.Flatten(), torch.nn.Linear(4096, 10))


def build(device: Device, make: Callable[[], torch.nn.Module], shape: tuple[int, ...]) -> Bench:
    """One step by each rule."""
    torch.manual_seed(0)
    x, y = torch.randn(shape), torch.randint(10, shape[:1])
    return Bench({rule: _step(make(), rule, x, y) for rule in LEARN})


def _step(model: torch.nn.Module, rule: str, x: torch.Tensor, y: torch.Tensor) -> Run:
    bk.convert_(model, rule)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    learn = LEARN[rule]

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        if learn is not None:
            learn(model, x)
        optimizer.step()

    return step
