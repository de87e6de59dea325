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


@torch.no_grad()
def untie_(
    model: torch.nn.Module, example: Any, *, filter_fn: Callable[[torch.nn.Module, str], bool] | None = None
) -> dict[str, tuple[int, ...]]:
    """Make convolutions of `model` locally connected, in place: the same function, a copy of the weights a position.

    The sizes are those that one call with `example` shows: a tensor, a tuple of arguments or a dict of keywords. The
    call leaves no trace. A module converts where its type is exactly a Conv1d/2d/3d of torch.nn or of
    `bioplaus_kernels.nn`; it stays the same object, with its hooks, geometry, padding mode, training mode and rule,
    whose state is drawn anew. Its Parameters are new ones: optimizers, `convert_` and wrappers come afterwards.

    filter_fn: called with (module, name); False leaves the convolution as it is.

    Returns the input size found for each by name. Raises ValueError, before any module is touched, for a convolution
    that the call did not reach or reached with several sizes.
    """
    checks.module("model", model)
    checks.instance(
        "example", example, (Tensor, tuple, Mapping), "a tensor, a tuple of arguments or a dict of keywords"
    )
    if filter_fn is not None:
        checks.function("filter_fn", filter_fn, "a function of (module, name) or None")
    chosen = {n: m for n, m in model.named_modules() if type(m) in _UNTIED and (filter_fn is None or filter_fn(m, n))}
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
        conv, theirs = chosen[name], vars(layer)
        vars(conv).update({n: v for n, v in theirs.items() if n != "training" and not n.endswith("hooks")})
        conv.__class__ = type(layer)
    return {name: sizes.pop() for name, sizes in found.items()}
