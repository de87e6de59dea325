"""The networks of Xiao et al. 2018. ResNet-18 … 152 are torchvision's, whose convolutions start as theirs do."""

from __future__ import annotations

import torchvision
from torch import nn


def resnet(depth: int, classes: int = 1000) -> nn.Module:
    """torchvision's ResNet of 18, 34, 50, 101 or 152 layers: N(0, 2/(k² · out)) convolutions, batch norm at 1 and 0."""
    if depth not in (18, 34, 50, 101, 152):
        raise ValueError(f"depth: expected 18, 34, 50, 101 or 152, got {depth}")
    return torchvision.models.get_model(f"resnet{depth}", weights=None, num_classes=classes)


def alexnet_bn(channels: int = 3, size: int = 224, classes: int = 1000) -> nn.Sequential:
    """AlexNet of the authors' code: batch norm before every ReLU and no bias before it, no dropout.

    Convolutions 64 (11, stride 4), 192 (5), 384, 256, 256 (3), max pooling 3/2 after the first, second and fifth, then
    4096, 4096, `classes`. Images of 63 or more; for 224 the first linear layer has 9216 inputs.
    """
    parts: list[nn.Module] = []
    side = size
    geometries = ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
    for number, (out, kernel, stride, padding) in enumerate(geometries, 1):
        convolution = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        parts += [convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        side = (side + 2 * padding - kernel) // stride + 1
        if number in (1, 2, 5):
            parts.append(nn.MaxPool2d(3, 2))
            side = (side - 3) // 2 + 1
        channels = out
    if side < 1:
        raise ValueError(f"size: expected images of 63 x 63 or more, got {size} x {size}")
    parts.append(nn.Flatten())
    features = channels * side**2
    for _ in range(2):
        parts += [nn.Linear(features, 4096, bias=False), nn.BatchNorm1d(4096), nn.ReLU(inplace=True)]
        features = 4096
    return nn.Sequential(*parts, nn.Linear(features, classes))
