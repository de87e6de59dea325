"""Fine-tuning: the weights that a run begins with, and its error under attack."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import bioplaus_kernels as bk
from recipes import checkpoint, data
from recipes.experiment import Experiment, Train


def start(experiment: Experiment, seed: int, folder: Path) -> tuple[dict[str, Tensor], bool]:
    """The weights that `model.init_from` names, for the run in `folder`, and whether they are of the same data.

    "torchvision" is the best that torchvision has for the model, of ImageNet; a name that ends in .pt is a checkpoint
    of recipes; any other is a row of the same table, whose run of the same seed it is.
    Raises ValueError or OSError where there are none.
    """
    source = experiment.model.init_from
    if source == "torchvision":
        weights = torchvision.models.get_model_weights(experiment.model.name)
        return weights.DEFAULT.get_state_dict(progress=False), experiment.data.name == "imagefolder"
    row = not source.endswith(".pt")
    path = folder.parent.parent / source / f"seed-{seed}" / "checkpoint.pt" if row else Path(source)
    if row and not path.exists():
        raise FileNotFoundError(f"model.init_from: got {source!r}, there is no {path}; run that row first")
    if not path.exists():
        raise FileNotFoundError(f"model.init_from: got {source!r}, there is no such file")
    advice = checkpoint.HOW if row else "model.init_from wants a checkpoint.pt that recipes has written"
    content = checkpoint.load(path, advice)
    made = json.loads(content["experiment"])
    had, planned = len(content["rows"]) - 1, made.get("train", {}).get("epochs", Train().epochs)
    if row and had < planned:
        raise ValueError(
            f"model.init_from: got {source!r}, {path} has had {had} of {planned} epochs; run that row first"
        )
    of, ours = made.get("data", {}), experiment.data
    return content["model"], (of.get("name"), of.get("path", "")) == (ours.name, ours.path)


@torch.no_grad()
def load(model: nn.Module, weights: dict[str, Tensor], same: bool) -> None:
    """Copy `weights` into a plain model; its last layer stays as it is, unless they are of the `same` data and fit it.

    Raises ValueError for a tensor that is missing or of another shape.
    """
    head = [name for name, module in model.named_modules() if module._parameters][-1]
    for name, tensor in model.state_dict().items():
        found = weights.get(name)
        fits = found is not None and found.shape == tensor.shape
        if name.startswith(f"{head}.") and not (same and fits):
            continue
        if not fits:
            got = "none" if found is None else f"shape {tuple(found.shape)}"
            raise ValueError(f"model.init_from: {name}: got {got}, want shape {tuple(tensor.shape)}")
        tensor.copy_(found)


def fgsm(model: nn.Module, batches: data.Batches, size: float, pixels: data.Pixels) -> dict[str, float]:
    """Errors on the images x + size · sign(∂m/∂x), pixels from 0 to 1 (Goodfellow et al. 2015), in eval mode.

    m is the largest other logit less that of the class: the gradient of cross-entropy is zero where the logits are
    large, as feedback alignment makes them, and what it does not reach looks robust (Carlini and Wagner 2017).

    fgsm: the gradient is the function's own, as one who knows the weights has it. fgsm_feedback: it is the one that the
    feedback sends to the image, an attack that is weak where feedback is not the weights, and no measure of robustness.
    """
    model.eval()
    mean, std = (torch.tensor(part, device=batches.device).view(-1, 1, 1) for part in pixels)
    wrong = dict.fromkeys(("fgsm", "fgsm_feedback"), 0)
    for x, y in batches:
        for name in wrong:
            image = x.clone().requires_grad_()
            with bk.metrics.backprop(model) if name == "fgsm" else contextlib.nullcontext():
                logits = model(image).float()
                others = logits.scatter(1, y[:, None], -math.inf).amax(1)
                (gradient,) = torch.autograd.grad((others - logits.gather(1, y[:, None])[:, 0]).sum(), image)
            with torch.no_grad():
                moved = ((x * std + mean + size * gradient.sign()).clamp(0, 1) - mean) / std
                wrong[name] += int((model(moved).argmax(1) != y).sum())
    return {name: count / batches.count for name, count in wrong.items()}
