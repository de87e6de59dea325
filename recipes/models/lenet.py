"""LeNet-5, and the two that BioTorch trains under that name."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from recipes.models.bartunov import glorot


def lenet5(channels: int, size: int, classes: int) -> nn.Sequential:
    """LeNet-5 (LeCun et al. 1998, section II.B), with max pooling and a linear last layer; images of 28 or more."""
    last = (size // 2 - 4) // 2
    return glorot(
        nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(channels, 6, 5, padding=2),
                tanh1=nn.Tanh(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(6, 16, 5),
                tanh2=nn.Tanh(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(16 * last * last, 120),
                tanh3=nn.Tanh(),
                fc2=nn.Linear(120, 84),
                tanh4=nn.Tanh(),
                fc3=nn.Linear(84, classes),
            )
        )
    )


def biotorch_mnist(channels: int, size: int, classes: int) -> nn.Sequential:
    """BioTorch's `le_net_mnist`, for images of 32 x 32; torch.nn's initialisation."""
    _square(size)
    return nn.Sequential(
        *_convolutions(((channels, 6, 5), (6, 16, 5), (16, 120, 5))),
        *(nn.Flatten(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes)),
    )


def biotorch_cifar(channels: int, size: int, classes: int) -> nn.Sequential:
    """BioTorch's `le_net_cifar`, for images of 32 x 32; torch.nn's initialisation."""
    _square(size)
    return nn.Sequential(
        *_convolutions(((channels, 32, 3), (32, 64, 3), (64, 128, 3))),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, classes)),
    )


def _convolutions(layers: tuple[tuple[int, int, int], ...]) -> list[nn.Module]:
    # Max pooling after all but the last.
    parts: list[nn.Module] = []
    for geometry in layers:
        parts += [nn.Conv2d(*geometry), nn.ReLU(), nn.MaxPool2d(2)]
    return parts[:-1]


def _square(size: int) -> None:
    if size != 32:
        raise ValueError(f"size: expected images of 32 x 32, got {size} x {size}")
