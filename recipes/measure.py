"""How far each layer's feedback is from its weights, and its gradient from back-propagation's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bioplaus_kernels import metrics

Loss = Callable[[nn.Module, Any, Any], torch.Tensor]


def cross_entropy(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(images), targets)


def angles(model: nn.Module, images: Any, targets: Any, loss: Loss = cross_entropy) -> dict[str, float]:
    """``angle_weight/<layer>`` (W to B) and ``angle_grad/<layer>`` (W's gradient to back-propagation's) in degrees.

    On one batch, in training mode; the model and torch's random state stay as they are. A layer of
    plain torch.nn has 0 in the first, and the last layer always has 0 in the second: its error is exact. The first
    layer's B is reported although nothing uses it.
    """
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        # The gradients do not depend on what came before, and neither do dropout masks.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            grads = metrics.updates(model, lambda: loss(model, images, targets))
    finally:
        for module, mode in modes.items():
            module.training = mode
    weights = metrics.weights(model)
    found = {f"angle_weight/{_layer(name)}": weights[name].angle if name in weights else 0.0 for name in grads}
    return found | {f"angle_grad/{_layer(name)}": comparison.angle for name, comparison in grads.items()}


def _layer(weight: str) -> str:
    return weight.removesuffix(".weight")
