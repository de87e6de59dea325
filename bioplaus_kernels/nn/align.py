"""The gradient of what learns B from a layer's own inputs (Kunin et al. 2020)."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._restore import kept, sharded
from ..backends.reference import checks
from ..feedback import as_rule
from .agree import mean_over_ranks
from .base import FeedbackLayer


class _Products:
    # `feedback.alignment.Products` of one call of a layer.
    def __init__(self, layer: Any, x: Tensor, samples: int) -> None:
        self.layer, self.x, self.samples = layer, x.detach(), samples

    @contextmanager
    def _with(self, weight: Tensor) -> Iterator[Any]:
        # The layer by back-propagation, with `weight` and without bias.
        own, rule = dict(self.layer._parameters), self.layer._feedback
        self.layer._parameters.update(weight=weight, bias=None)
        self.layer._feedback = as_rule(None)
        try:
            yield self.layer.forward
        finally:
            self.layer._parameters.update(own)
            self.layer._feedback = rule

    def forward(self, weight: Tensor) -> Tensor:
        with self._with(weight) as product:
            return product(self.x).detach()

    def _pulled(self, y: Tensor, x: Tensor, weight: Tensor, wanted: int) -> Tensor:
        leaves = x.detach().requires_grad_(wanted == 0), weight.detach().requires_grad_(wanted == 1)
        with torch.enable_grad(), self._with(leaves[1]) as product:
            return torch.autograd.grad(product(leaves[0]), leaves[wanted], y)[0]

    def back(self, y: Tensor, weight: Tensor) -> Tensor:
        return self._pulled(y, self.x, weight, 0)

    def outer(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        return self._pulled(y, self.x if x is None else x, self.layer._parameters["weight"], 1)


@torch.no_grad()
def align_(model: torch.nn.Module, example: Any) -> None:
    """Add ∂R/∂B to the `.grad` of B of every layer of `model` with the rule `sa`, `aa` or `ia` (Kunin et al. 2020).

    R is the rule's, of the layer's inputs in one call of the model with `example`, the minibatch: a tensor, a tuple of
    arguments or a dict of keywords. The call leaves no trace but in B's `.grad`. Between the backward and the step of
    an optimizer that has each `feedback_weight`: R is a mean over samples and a sum over positions and steps, so that
    an optimizer without a scale of its own (SGD) needs a small lr for convolutions.

    Where `fully_shard` (FSDP2) has sharded B, or `model` is a DistributedDataParallel, the gradient is the mean over
    the ranks; the ranks of any other data parallelism need the same example. Raises ValueError where no layer has such
    a rule, before a gradient is touched, and for a layer that the call does not reach, one of an attention and one
    whose weight is computed.
    """
    checks.module("model", model)
    wanted = "a tensor, a tuple of arguments or a dict of keywords"
    checks.instance("example", example, (Tensor, tuple, Mapping), wanted)
    layers = {
        n: m for n, m in model.named_modules() if isinstance(m, FeedbackLayer) and getattr(m.feedback, "aligns", False)
    }
    if not layers:
        raise ValueError("model: expected a layer with the rule 'sa', 'aa' or 'ia', got none")
    for name, layer in layers.items():
        if layer.weights() != ["weight"] or "weight" not in layer._parameters:
            checks.fail("model", "layers with one weight, a Parameter, and this rule", f"{name or '(root)'}: {layer}")
    changes: dict[str, Tensor] = {}

    def note(name: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        batched = x.dim() > 1 if isinstance(layer, torch.nn.Linear) else x.dim() == len(layer.kernel_size) + 2
        products = _Products(layer, x, max(x.shape[0], 1) if batched else 1)
        b = layer._parameters[layer._held["weight"].kept["weight"]]
        found = layer.feedback.gradient(layer.weight.detach(), b.detach(), products)
        changes[name] = changes[name] + found if name in changes else found

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(partial(note, name), with_kwargs=True).remove)
        # In there B's `.grad` is another.
        with kept(model):
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*((example,) if isinstance(example, Tensor) else example))
    if missed := sorted(layers.keys() - changes.keys()):
        checks.fail("example", "a call that reaches every layer with this rule", f"none of {', '.join(missed)}")
    sharded(model)
    for name, change in changes.items():
        b = getattr(layers[name], layers[name]._held["weight"].kept["weight"])
        if b.requires_grad:
            change = mean_over_ranks(model, b, change)
            b.grad = change if b.grad is None else b.grad.add_(change)
