"""Untie the convolutions of an existing model, in place."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import nn
from ._restore import kept
from .backends.reference import checks

_UNTIED: dict[type[torch.nn.Module], Any] = {
    kind: getattr(nn, f"LocallyConnected{d}d")
    for d in (1, 2, 3)
    for kind in (getattr(torch.nn, f"Conv{d}d"), getattr(nn, f"Conv{d}d"))
}

# Where a module has what the user registered on it beside its own.
_REGISTERED = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")


@torch.no_grad()
def untie_(
    model: torch.nn.Module, example: Any, *, filter_fn: Callable[[torch.nn.Module, str], bool] | None = None
) -> dict[str, tuple[int, ...]]:
    """Make convolutions of `model` locally connected, in place: the same function, a copy of the weights a position.

    The sizes are those that one call with `example` shows: a tensor, a tuple of arguments or a dict of keywords. The
    call leaves no trace. A module converts where its type is exactly a Conv1d/2d/3d of torch.nn or of
    `bioplaus_kernels.nn`; it stays the same object, with its hooks, geometry, padding mode, training mode, what else
    was registered on it, and its rule, whose state is drawn anew. Weight and bias are new Parameters: optimizers,
    `convert_` and wrappers come afterwards.

    filter_fn: called with (module, name); False leaves the convolution as it is.

    Returns the input size found for each by name. Raises ValueError, before any module is touched, for a convolution
    that the call did not reach or reached with several sizes, and for one whose weight or bias is computed (pruned, or
    by torch's old weight_norm and spectral_norm) or whose `forward` was replaced on the instance.
    """
    checks.module("model", model)
    checks.instance(
        "example", example, (Tensor, tuple, Mapping), "a tensor, a tuple of arguments or a dict of keywords"
    )
    if filter_fn is not None:
        checks.function("filter_fn", filter_fn, "a function of (module, name) or None")
    chosen = {n: m for n, m in model.named_modules() if type(m) in _UNTIED and (filter_fn is None or filter_fn(m, n))}
    for name, module in chosen.items():
        if "forward" in vars(module) or not module._parameters.keys() >= {"weight", "bias"}:
            checks.fail(
                "model",
                "convolutions with their own weight, bias and forward (torch.nn.utils.prune.remove, remove_weight_norm "
                "and remove_spectral_norm give them back, and filter_fn leaves one out)",
                f"{name or '(root)'}, with one that is computed or replaced",
            )
    found: dict[str, set[tuple[int, ...]]] = {name: set() for name in chosen}

    def note(name: str, conv: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input = args[0] if args else kwargs["input"]
        found[name].add(tuple(input.shape[-len(conv.kernel_size) :]))

    hooks = [m.register_forward_pre_hook(partial(note, n), with_kwargs=True) for n, m in chosen.items()]
    try:
        with kept(model):
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*((example,) if isinstance(example, Tensor) else example))
    finally:
        for hook in hooks:
            hook.remove()
    for name, sizes in found.items():
        if len(sizes) != 1:
            checks.fail("example", f"a call that {name or '(root)'} sees with one size", sorted(sizes) or "none")
    layers = {name: _UNTIED[type(conv)].from_conv(conv, *found[name]) for name, conv in chosen.items()}
    for name, layer in layers.items():
        conv = chosen[name]
        if isinstance(conv, nn.FeedbackLayer):
            conv.remove_feedback()
        for n, value in vars(layer).items():
            if n in _REGISTERED:
                getattr(conv, n).update(value)
            elif n != "training" and "hook" not in n:
                setattr(conv, n, value)
        conv.__class__ = type(layer)
    return {name: sizes.pop() for name, sizes in found.items()}
