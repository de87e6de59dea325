"""FSDP2 whose backward gathers no weight where none is needed."""

from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from .backends.reference import checks
from .feedback import Frozen
from .nn import FeedbackLayer
from .proof import Report, Row


def fully_shard(module: nn.Module, *, blocks: Iterable[nn.Module] | None = None, **options: Any) -> Report:
    """torch.distributed.fsdp.fully_shard for a converted model, in place: as ZeRO-3 in memory, as ZeRO-2 in traffic.

    Without weight transport the backward of a layer reads B and no W. Each block's layers whose B is drawn from a key,
    stored, or made of W's signs – packed in the forward, 2 bits a weight – are one group that is gathered once, before
    the forward, and freed after it. Layers whose backward reads W are torch's usual way, a group a block, and norms are
    the root's. Stored B is whole on every rank.

    blocks: the modules that are a group each, by default the entries of `module`'s outermost nn.ModuleLists and
    nn.Sequentials that hold more than one layer with feedback. options: torch's (mesh, mp_policy, ...).
    reshard_after_forward is for what is sharded in torch's way.

    Call it after `convert_`. Returns a row for each layer with feedback: "gathered once", or "gathered twice" and why.
    Raises ValueError where a layer is sharded already.
    """
    from torch.distributed import fsdp

    checks.module("module", module)
    for name, m in module.named_modules():
        if isinstance(m, fsdp.FSDPModule):
            raise ValueError(f"module: expected one that is not sharded yet, got one whose {name or 'root'!r} is")
    names = {m: name for name, m in module.named_modules()}
    chosen = _blocks(module) if blocks is None else checks.entries("blocks", blocks, "an iterable of modules")
    for i, block in enumerate(chosen):
        if block not in names:
            checks.fail(f"blocks[{i}]", "a module of `module`", type(block).__name__)
    kept = {p for p in module.parameters() if isinstance(p, Frozen)}
    options["ignored_params"] = kept | set(options.get("ignored_params") or ())
    report, seen = Report(), set[FeedbackLayer]()
    for block in (*chosen, module):
        free: list[nn.Module] = []
        for layer in block.modules():
            if not isinstance(layer, FeedbackLayer) or layer in seen:
                continue
            # An attention's output projection is a layer of its own, whose weight the attention reads.
            parts = [m for m in layer.modules() if isinstance(m, FeedbackLayer)]
            seen.update(parts)
            reason = next(filter(None, (_reads_weight(part, names[part]) for part in parts)), "")
            outcome = "gathered twice" if reason else "gathered once"
            for part in parts:
                part.reads_no_weight = not reason
                report.rows.append(Row(names[part], type(part).__name__, outcome, str(part.feedback), reason))
            if not reason:
                free.append(layer)
        if free:
            fsdp.fully_shard(free, **{**options, "reshard_after_forward": True})
            for each in free:
                cast(fsdp.FSDPModule, each).set_unshard_in_backward(False)
        # Norms and biases alone are not worth two gathers of their own: the root's group has them.
        others = set(block.parameters()).difference(*(layer.parameters() for layer in seen if layer.reads_no_weight))
        if block is module or (block not in free and any(p.dim() > 1 for p in others)):
            fsdp.fully_shard(block, **options)
    return report


def _blocks(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.ModuleList | nn.Sequential):
        return [entry for entry in module.children() if sum(map(_has_rule, entry.modules())) > 1]
    return [block for child in module.children() for block in _blocks(child)]


def _has_rule(module: nn.Module) -> bool:
    return isinstance(module, FeedbackLayer) and module.uses_feedback


def _reads_weight(layer: FeedbackLayer, name: str) -> str:
    # Why the backward of a layer needs W, if it does.
    if not layer.uses_feedback:
        return "back-propagation reads W"
    if "_checkpoint_wrapped_module" in name.split("."):
        return "activation checkpointing computes its forward anew"
    if any(held.trained for held in layer._held.values()):
        return "its B is trained"
    layer.reads_no_weight = True
    return "its rule reads W" if any(layer.used(weight)[1].role for weight in layer.weights()) else ""
