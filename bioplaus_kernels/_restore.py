"""Run a model, and leave it as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.parameter import is_lazy


@contextmanager
def buffers(*models: torch.nn.Module | None) -> Iterator[None]:
    """In the block the modules work on copies of their buffers; then they have the tensors that they had before.

    So what a forward writes, replaces, registers or deletes leaves no trace, and a graph that saved the tensors finds
    them unwritten. torch.compile traces it. What a rule keeps stays in place: layers know it by identity. What a lazy
    module has not made yet it makes for good.
    """
    before, seen, left = [], set(), list(models)
    # Module.modules() cannot be traced where a module has set an attribute.
    while left:
        module = left.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        left += module._modules.values()
        own = {a for held in vars(module).get("_held", {}).values() for a in (held.record, *held.kept.values())}
        own |= {n for n, b in module._buffers.items() if b is not None and is_lazy(b)}
        theirs = {n: b for n, b in module._buffers.items() if n not in own}
        before.append((module, own, theirs, set(module._non_persistent_buffers_set)))
    # One copy of what modules share.
    copies = {b: b.detach().clone() for _, _, theirs, _ in before for b in theirs.values() if b is not None}
    try:
        for module, _, theirs, _ in before:
            for name, buffer in theirs.items():
                module._buffers[name] = None if buffer is None else copies[buffer]
        yield
    finally:
        for module, own, theirs, others in before:
            # A ScriptModule's dictionary takes no new names, and has these methods alone.
            for name in [n for n in module._buffers.keys() if n not in own and n not in theirs]:  # noqa: SIM118
                del module._buffers[name]
            for name, buffer in theirs.items():
                module._buffers[name] = buffer
            module._non_persistent_buffers_set = others


def sharded(model: torch.nn.Module) -> list[Any]:
    """The modules of `model` that `fully_shard` (FSDP2) has sharded, as between two steps.

    What a forward without a backward has left gathered are other Parameters, which no optimizer has.
    """
    found: list[Any] = [module for module in model.modules() if hasattr(module, "reshard")]
    for module in found:
        module.reshard()
    return found


@contextmanager
def kept(*models: torch.nn.Module) -> Iterator[None]:
    """`buffers`, and after the block training modes, `.grad` and torch's random state are as before too.

    In the block `.grad` is None, and no hook waits for it, which may be an optimizer's step in backward. The random
    state is that of the CPU and of the models' devices.
    """
    for model in models:
        sharded(model)
    modes = {module: module.training for model in models for module in model.modules()}
    parameters = {p: (p.grad, p._post_accumulate_grad_hooks) for model in models for p in model.parameters()}
    devices = {p.device for p in parameters if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=devices), buffers(*models):
            for parameter in parameters:
                parameter.grad = None
                parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]
            yield
    finally:
        for parameter, (grad, hooks) in parameters.items():
            parameter.grad, parameter._post_accumulate_grad_hooks = grad, hooks
        for module, mode in modes.items():
            module.training = mode
