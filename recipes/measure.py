"""How far each layer's feedback is from its weights, and its gradient from back-propagation's."""

from __future__ import annotations

import copy

import torch
from torch import nn

import bioplaus_kernels as bk


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """The angle between two tensors taken as vectors, in degrees; NaN where one of them is zero.

    2 atan2(‖a' − b'‖, ‖a' + b'‖) of the unit vectors: unlike an arc cosine it is exact near 0, and 0 where a = b.
    """
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    a, b = a / a.norm(), b / b.norm()
    return torch.rad2deg(2 * torch.atan2((a - b).norm(), (a + b).norm())).item()


def angles(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """``angle_weight/<layer>`` (W to B) and ``angle_grad/<layer>`` (W's gradient to back-propagation's) in degrees.

    On one batch with cross-entropy, in training mode; the model and torch's random state stay as they are. A layer of
    plain torch.nn has 0 in the first, and the last layer always has 0 in the second: its error is exact. The first
    layer's B is reported although nothing uses it.
    """
    model = copy.deepcopy(model).train()
    found = {}
    for name, weight in _weights(model).items():
        path, _, attribute = name.rpartition(".")
        layer = model.get_submodule(path)
        feedback = layer.feedback_matrix(attribute) if isinstance(layer, bk.nn.FeedbackLayer) else weight
        found[f"angle_weight/{name.removesuffix('.weight')}"] = angle(weight, feedback)
    ours = _gradients(model, images, targets)
    bk.convert_(model, None)
    exact = _gradients(model, images, targets)
    return found | {f"angle_grad/{name.removesuffix('.weight')}": angle(ours[name], exact[name]) for name in exact}


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices and kernels of weights that are trained, in the model's order."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith("weight") and parameter.ndim > 1 and parameter.requires_grad
    }


def _gradients(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = _weights(model)
    # Both calls see the same dropout masks.
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        torch.manual_seed(0)
        loss = nn.functional.cross_entropy(model(images), targets)
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
