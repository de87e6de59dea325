"""The classifiers a recipe trains, as plain torch.nn models that ``bioplaus_kernels.convert_`` then converts."""

from __future__ import annotations

import math
from collections import OrderedDict

import torchvision
from torch import nn

import bioplaus_kernels as bk

# The smallest images that the models of this file take; torchvision's get 32 x 32 or more.
_SMALLEST = {"mlp": 1, "lenet": 28, "lc-mnist": 28}


def check_name(name: str) -> str:
    """``name`` if there is such a model, else ValueError."""
    if name not in _SMALLEST:
        try:
            module = torchvision.models.get_model_builder(name).__module__
        except ValueError:
            module = ""
        # Builders of detection, segmentation, video and optical flow models live in packages below torchvision.models.
        if module.rpartition(".")[0] != "torchvision.models":
            raise ValueError(f"got {name!r}, want {', '.join(_SMALLEST)} or a torchvision classifier such as resnet18")
    return name


def input_for(name: str, channels: int, size: int) -> tuple[int, int]:
    """Channels and size of the images to give to model ``name`` when the data's own are ``channels`` and ``size``."""
    if name in _SMALLEST:
        return channels, max(size, _SMALLEST[name])
    return 3, max(size, 32)


def build(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Model ``name``, newly initialised, for images of ``shape`` (channels, height, width)."""
    channels, size, _ = shape
    if name == "mlp":
        return mlp(math.prod(shape), classes)
    if name == "lenet":
        return lenet(channels, size, classes)
    if name == "lc-mnist":
        return lc_mnist(channels, size, classes)
    # Two of torchvision's have further classifiers inside, for training alone, which change what they return.
    extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=classes, **extra)


def mlp(features: int, classes: int) -> nn.Module:
    """The fully connected MNIST network of Bartunov et al. 2018, table 3: five layers of 256."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number in range(1, 6):
        layers[f"fc{number}"] = nn.Linear(features, 256)
        layers[f"tanh{number}"] = nn.Tanh()
        features = 256
    layers["fc6"] = nn.Linear(features, classes)
    return _glorot(nn.Sequential(layers))


def lenet(channels: int, size: int, classes: int) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998, section II.B), with max pooling and a linear last layer."""
    last = (size // 2 - 4) // 2
    return _glorot(
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


def lc_mnist(channels: int, size: int, classes: int) -> nn.Module:
    """The locally-connected MNIST network of Bartunov et al. 2018, table 3."""
    half, quarter = math.ceil(size / 2), math.ceil(size / 4)
    return _glorot(
        nn.Sequential(
            OrderedDict(
                lc1=bk.nn.LocallyConnected2d(channels, 32, 3, stride=2, padding="same", input_size=(size, size)),
                tanh1=nn.Tanh(),
                lc2=bk.nn.LocallyConnected2d(32, 64, 3, stride=2, padding="same", input_size=(half, half)),
                tanh2=nn.Tanh(),
                flatten=nn.Flatten(),
                fc1=nn.Linear(64 * quarter * quarter, 1024),
                tanh3=nn.Tanh(),
                fc2=nn.Linear(1024, classes),
            )
        )
    )


def _glorot(model: nn.Sequential) -> nn.Sequential:
    """Glorot and Bengio's uniform weights, as Bartunov et al. 2018 have them in every layer, and zero biases."""
    for layer in model:
        if isinstance(layer, bk.nn.LocallyConnected2d):
            # The fans are those of one position's block.
            fans = math.prod(layer.kernel_size) * (layer.in_channels + layer.out_channels)
            nn.init.uniform_(layer.weight, -math.sqrt(6 / fans), math.sqrt(6 / fans))
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
        else:
            continue
        nn.init.zeros_(layer.bias)
    return model
