"""The networks of Bartunov et al. 2018, table 3: tanh, Glorot's initialisation, zero "same" padding, no pooling."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

import bioplaus_kernels as bk
from bioplaus_kernels.functional import pad_pairs


class Spec(NamedTuple):
    """Locally-connected layers as (kernel, out channels, stride), then fully connected ones."""

    local: tuple[tuple[int, int, int], ...]
    hidden: tuple[int, ...]


# Table 3 leaves out the stride of CIFAR-10's third layer; "unchanged shape with stride 1" is its rule.
SPECS = {
    "mnist": Spec(((3, 32, 2), (3, 64, 2)), (1024,)),
    "cifar10": Spec(((5, 64, 2), (5, 128, 2), (3, 256, 1)), (1024,)),
    "imagenet": Spec(
        ((9, 48, 4), (3, 48, 2), (5, 96, 1), (3, 96, 2), (3, 192, 1), (3, 192, 2), (3, 384, 1)),
        (),
    ),
}


def fc(features: int, hidden: Sequence[int], classes: int) -> nn.Sequential:
    """Fully connected: MNIST has hidden = 5 × 256, CIFAR-10 3 × 1024."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    _dense(layers, features, hidden, classes)
    return glorot(nn.Sequential(layers))


def lc(spec: Spec, channels: int, size: int, classes: int, *, tied: bool = False) -> nn.Sequential:
    """Locally connected; `tied` is the "BP ConvNet", the same with weights shared between positions."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (kernel, out, stride) in enumerate(spec.local, 1):
        if tied:
            # torch's own "same" is for stride 1 only.
            pairs = pad_pairs("same", (size, size), (kernel, kernel), (stride, stride), (1, 1))
            layers[f"pad{number}"] = nn.ZeroPad2d((*pairs[2:], *pairs[:2]))
            layers[f"conv{number}"] = nn.Conv2d(channels, out, kernel, stride)
        else:
            layers[f"lc{number}"] = bk.nn.LocallyConnected2d(channels, out, kernel, stride, "same", input_size=size)
        layers[f"tanh{number}"] = nn.Tanh()
        channels, size = out, math.ceil(size / stride)
    layers["flatten"] = nn.Flatten()
    _dense(layers, channels * size**2, spec.hidden, classes, len(spec.local))
    return glorot(nn.Sequential(layers))


def autoencoder(sizes: Sequence[int] = (784, 512, 64, 512, 784)) -> nn.Sequential:
    """The autoencoder of section 5.5, tanh between its layers and a linear output."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    _dense(layers, sizes[0], sizes[1:-1], sizes[-1])
    return glorot(nn.Sequential(layers))


def blocks(model: nn.Sequential) -> list[nn.Sequential]:
    """The layers f_1 … f_L of target propagation: one weight each, with what precedes it and its nonlinearity."""
    found: list[nn.Sequential] = []
    before: list[nn.Module] = []
    for part in model:
        if any(True for _ in part.parameters()):
            found.append(nn.Sequential(*before, part))
            before = []
        elif isinstance(part, nn.Tanh):
            found[-1].append(part)
        else:
            before.append(part)
    return found


def target_prop(
    model: nn.Sequential, shape: Sequence[int], variant: str, *, auxiliary: int = 512, hidden: int = 0, **options: Any
) -> bk.targetprop.TargetProp:
    """`model`, one of this file, with learned tanh inverses of its layers' kind, for images of `shape` (C, H, W).

    variant: one of `TargetProp`'s, whose `options` follow; `auxiliary` is the number of units z of "ao_sdtp". The
    direct inverses of "ddtp" are linear, or with `hidden` units those of DDTP-RHL, and mix=1 has none.
    """
    layers = blocks(model)
    x = torch.zeros(1, *shape, device="meta")
    sizes = []
    for layer in layers:
        sizes.append(tuple(x.shape[1:]))
        x = _meta(layer, x)
    last = layers[-1][-1]
    extra = auxiliary if variant == "ao_sdtp" else 0
    if extra:
        options["auxiliary"] = nn.Sequential(nn.Flatten(), nn.Linear(last.in_features, extra)).to(last.weight)
        nn.init.xavier_uniform_(options["auxiliary"][1].weight)
    inverses: list[nn.Module | None] = [None] * len(layers)
    plan = bk.targetprop.VARIANTS[variant]
    if hidden:
        inverses = bk.targetprop.rhl_inverses(sizes[1:], x.shape[1], hidden, activation=nn.Tanh())
        return bk.targetprop.TargetProp(layers, inverses, variant, **options)
    for k in () if options.get("mix") == 1 else range(1, len(layers) - (plan.first == "hidden")):
        if plan.direct:
            inverses[k] = nn.Sequential(nn.Linear(x.shape[1], math.prod(sizes[k])), nn.Unflatten(1, sizes[k]))
        elif k < len(layers) - 1:
            inverses[k] = bk.targetprop.learned_inverse(layers[k], sizes[k])
        else:
            inverses[k] = bk.targetprop.learned_inverse(layers[k], sizes[k], activation=nn.Tanh(), extra=extra)
    for inverse in inverses[1:]:
        if inverse is not None:
            glorot(inverse)
    return bk.targetprop.TargetProp(layers, inverses, variant, **options)


def _meta(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    state = {name: t.to("meta") for name, t in (*layer.named_parameters(), *layer.named_buffers())}
    return torch.func.functional_call(layer, state, (x,))


def _dense(
    layers: OrderedDict[str, nn.Module], features: int, hidden: Sequence[int], classes: int, tanhs: int = 0
) -> None:
    for number, width in enumerate(hidden, 1):
        layers[f"fc{number}"] = nn.Linear(features, width)
        layers[f"tanh{tanhs + number}"] = nn.Tanh()
        features = width
    layers[f"fc{len(hidden) + 1}"] = nn.Linear(features, classes)


def glorot(model: nn.Module) -> Any:
    """Glorot and Bengio's uniform weights, as Bartunov et al. 2018 have them in every layer, and zero biases."""
    for layer in model.modules():
        if isinstance(layer, bk.nn.LocallyConnected2d | bk.nn.LocallyConnectedTranspose2d):
            # The fans are those of one position's block.
            fans = math.prod(layer.kernel_size) * (layer.in_channels + layer.out_channels)
            nn.init.uniform_(layer.weight, -math.sqrt(6 / fans), math.sqrt(6 / fans))
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model
