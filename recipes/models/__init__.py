"""The networks a recipe trains, as plain models that ``bioplaus_kernels.convert_`` then converts.

`bartunov`, `xiao`, `all_tnn`, `lenet`, `recurrent` and `retinanet` hold them by source; classifiers are built here by
name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torchvision
from torch import nn

from recipes.models import bartunov, lenet, recurrent, xiao
from recipes.models.all_tnn import all_tnn
from recipes.models.retinanet import retinanet, small_retinanet

__all__ = [
    *("DETECTORS", "MODELS", "build", "check_name", "input_for"),
    *("all_tnn", "bartunov", "lenet", "recurrent", "retinanet", "small_retinanet", "xiao"),
]


class Model(NamedTuple):
    """A classifier of this package: its builder, and the smallest images that it takes."""

    build: Callable[[int, int, int], nn.Module]  # (channels, size, classes)
    smallest: int


MODELS = {
    "mlp": Model(lambda channels, size, classes: bartunov.fc(channels * size**2, [256] * 5, classes), 1),
    "cifar-fc": Model(lambda channels, size, classes: bartunov.fc(channels * size**2, [1024] * 3, classes), 1),
    "autoencoder": Model(lambda c, s, n: bartunov.autoencoder((c * s**2, 512, 64, 512, c * s**2)), 1),
    "lenet": Model(lenet.lenet5, 28),
    "lenet-mnist": Model(lenet.biotorch_mnist, 32),
    "lenet-cifar": Model(lenet.biotorch_cifar, 32),
    "lstm-rows": Model(recurrent.Rows, 1),
    "alexnet-bn": Model(xiao.alexnet_bn, 63),
    "all-tnn": Model(all_tnn, 148),
    "all-tnn-conv": Model(lambda c, s, n: all_tnn(c, s, n, tied=True), 148),
}
for _net, _spec in bartunov.SPECS.items():
    MODELS[f"lc-{_net}"] = Model(lambda c, s, n, spec=_spec: bartunov.lc(spec, c, s, n), 28)
    MODELS[f"conv-{_net}"] = Model(lambda c, s, n, spec=_spec: bartunov.lc(spec, c, s, n, tied=True), 28)

# By (classes with the background, size to which the images' shorter side is scaled).
DETECTORS: dict[str, Callable[[int, int], nn.Module]] = {"retinanet": retinanet, "retinanet-small": small_retinanet}


def check_name(name: str) -> str:
    """``name`` if there is such a model, else ValueError."""
    if name not in MODELS:
        try:
            module = torchvision.models.get_model_builder(name).__module__
        except ValueError:
            module = ""
        # Builders of detection, segmentation, video and optical flow models live in packages below torchvision.models.
        if module.rpartition(".")[0] != "torchvision.models":
            raise ValueError(f"got {name!r}, want {', '.join(MODELS)} or a torchvision classifier such as resnet18")
    return name


def input_for(name: str, channels: int, size: int) -> tuple[int, int]:
    """Channels and size of the images to give to model ``name`` when the data's own are ``channels`` and ``size``."""
    if name in MODELS:
        return channels, max(size, MODELS[name].smallest)
    return 3, max(size, 32)


def build(
    name: str, shape: tuple[int, int, int], classes: int, hidden: Sequence[int] = (), activation: str = "tanh"
) -> nn.Module:
    """Model ``name``, newly initialised, for images of ``shape`` (channels, height, width).

    hidden, activation: of "mlp", the units of its hidden layers in place of 5 x 256, and what follows them.
    """
    channels, size, width = shape
    if name == "mlp":
        return bartunov.fc(math.prod(shape), hidden or [256] * 5, classes, activation)
    if name in MODELS:
        if size != width:
            raise ValueError(f"shape: expected square images, got {shape}")
        return MODELS[name].build(channels, size, classes)
    # Two of torchvision's have further classifiers inside, for training alone, which change what they return.
    extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=classes, **extra)
