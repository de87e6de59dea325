"""The All-TNN of Lu et al., locally connected throughout: the geometry of KietzmannLab/All-TNN, for images of 150²."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

import bioplaus_kernels as bk

from .bartunov import glorot

# Kernel, out channels, stride; max pooling of 2 after the first, third and fifth.
LAYERS = ((7, 64, 3), (3, 81, 1), (3, 81, 1), (3, 256, 1), (3, 256, 1), (3, 2500, 1))
POOLED = (1, 3, 5)


def all_tnn(channels: int, size: int, classes: int, *, tied: bool = False) -> nn.Sequential:
    """Six locally-connected layers with ReLU and no padding, a linear readout; `tied` is its convolutional control.

    Glorot's initialisation has the fans of one position's block; Keras's counts positions too. The loss on the weights'
    spatial smoothness is no part of the net.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (kernel, out, stride) in enumerate(LAYERS, 1):
        if tied:
            layers[f"conv{number}"] = nn.Conv2d(channels, out, kernel, stride)
        else:
            layers[f"lc{number}"] = bk.nn.LocallyConnected2d(channels, out, kernel, stride, input_size=size)
        layers[f"relu{number}"] = nn.ReLU()
        channels, size = out, (size - kernel) // stride + 1
        if number in POOLED:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
            size //= 2
    layers |= {"flatten": nn.Flatten(), "readout": nn.Linear(channels * size**2, classes)}
    return glorot(nn.Sequential(layers))
