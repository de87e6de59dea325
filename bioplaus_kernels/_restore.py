"""Run a model, and leave it as it was."""

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer
from torch.utils._pytree import tree_leaves


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
        own |= {n for n, b in module._buffers.items() if isinstance(b, UninitializedBuffer)}
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


@contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """After the block attributes, buffers, `requires_grad` and random states are as they were before.

    So are the lists, dicts and sets that attributes are, and the content of tensors in them; random states are those of
    torch, Python and numpy. torch.compile is left out in the block. What a forward writes elsewhere stays written.
    """
    modules = [(m, dict(vars(m))) for m in model.modules()]
    shards = [m for m in model.modules() if hasattr(m, "unshard") and hasattr(m, "reshard")]
    values = [(name, value) for _, own in modules for name, value in own.items() if name != "_modules"]
    # FSDP's own, whichever they are at a time.
    values = [(name, value) for name, value in values if not (shards and name == "_parameters")]
    held: list[tuple[Any, Any]] = [(v, v.copy()) for _, v in values if isinstance(v, dict | list | set)]
    tensors = {t for _, v in values for t in tree_leaves(v) if type(t) is Tensor}
    contents = [(t, t.detach().clone()) for t in tensors if t.layout == torch.strided and not t.is_meta]
    gradients = [(p, p.requires_grad) for p in model.parameters()]
    numpy: Any = sys.modules.get("numpy")
    states = random.getstate(), numpy and numpy.random.get_state()
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_sharding(shards))
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(buffers(model))
        try:
            yield
        finally:
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])
            for module, own in modules:
                vars(module).clear()
                vars(module).update(own)
            for value, content in held:
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(content)
            with torch.no_grad():
                # By another name than the buffer's, which is that of a copy meanwhile.
                for tensor, before in contents:
                    if tensor.shape != before.shape:
                        tensor.data = before
                    elif not torch.equal(tensor, before):
                        tensor.copy_(before)
            for parameter, requires in gradients:
                parameter.requires_grad_(requires)


@contextmanager
def _sharding(shards: list[Any]) -> Iterator[None]:
    # FSDP2's root stays unsharded after its forward.
    before = [dict(m.named_parameters()) for m in shards]
    try:
        yield
    finally:
        # A child's Parameters are its parents' too.
        for module, parameters in reversed([*zip(shards, before, strict=True)]):
            now = dict(module.named_parameters())
            if moved := [p for name, p in parameters.items() if now.get(name) is not p]:
                (module.reshard if hasattr(moved[0], "full_tensor") else module.unshard)()
