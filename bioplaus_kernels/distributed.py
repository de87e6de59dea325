"""FSDP2 whose backward gathers no weight where none is needed."""

import warnings
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import disable, is_compiling
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.utils._python_dispatch import _disable_current_modes

from .backends.reference import checks
from .feedback import Frozen
from .nn import FeedbackLayer
from .nn.agree import feedback_records, same_on_ranks
from .nn.in_forward import keep_order
from .proof import Report, Row
from .register import Registered

_is_alias_of: Any = torch._C._is_alias_of  # type: ignore[attr-defined]


def fully_shard(module: nn.Module, *, blocks: Iterable[nn.Module] | None = None, **options: Any) -> Report:
    """torch.distributed.fsdp.fully_shard for a converted model, in place: as ZeRO-3 in memory, as ZeRO-2 in traffic.

    Without weight transport the backward of a layer reads B and no W. A block's layers whose B is drawn from a key,
    stored, or made of W's signs – packed in the forward, 2 bits a weight – are gathered once, before the block's
    forward, and freed after it. Layers whose backward reads W are sharded in torch's usual way; norms, and what several
    blocks share, are the root's. Stored B is whole on every rank.

    blocks: the modules that are a group each, by default the entries of `module`'s nn.ModuleLists and nn.Sequentials
    that hold more than one layer with feedback, the innermost of these. Of the layers in no block those that need no
    gather are one group. options: torch's (mesh, mp_policy, ...); reshard_after_forward is for what is sharded in
    torch's way.

    What activation checkpointing computes anew is gathered again for that: a `checkpoint_wrapper` is known and
    reported; torch.utils.checkpoint within a forward is warned of in the first backward, and its block gathered twice
    from then on. So is the block of a weight that is called and read, once a proof (see `convert_`) has found it.

    Call it after `convert_`. Returns a row for each module that has a matrix: "gathered once"; "gathered twice", and
    why; or "gathered and kept" from forward to backward, as torch keeps what is the root's. Raises ValueError where no
    layer has a rule, where a module is sharded already, and for an entry of `blocks` that is no module of `module`.
    The first forward raises RuntimeError, on every rank, where the ranks' rules or keys differ.
    """
    from torch._dynamo import OptimizedModule
    from torch.distributed import fsdp
    from torch.distributed.tensor import DTensor

    checks.module("module", module)
    names = {m: name for name, m in module.named_modules()}
    for m, name in names.items():
        if isinstance(m, fsdp.FSDPModule):
            raise ValueError(f"module: expected one that is not sharded yet, got one whose {name or 'root'!r} is")
    if not any(map(_has_rule, names)):
        raise ValueError("module: expected a layer with a rule, got none: convert_ first, or use torch's fully_shard")
    chosen = _blocks(module) if blocks is None else checks.entries("blocks", blocks, "an iterable of modules")
    for i, block in enumerate(chosen):
        if block not in names:
            checks.fail(f"blocks[{i}]", "a module of `module`", type(block).__name__)
    whole = {p for p in module.parameters() if isinstance(p, Frozen)} | set(options.pop("ignored_params", None) or ())

    # The innermost block of each module, else the root.
    block_of = dict.fromkeys(names, module)
    for block in sorted(chosen, key=lambda m: names[m].count(".")):
        block_of |= dict.fromkeys(block.modules(), block)
    holders: dict[nn.Parameter, list[nn.Module]] = {}
    for m in names:
        for p in m.parameters(recurse=False):
            if p not in whole:
                holders.setdefault(p, []).append(m)
    reasons = _reasons(module, names, block_of, holders)
    free = {m for m, reason in reasons.items() if not reason}
    keep_order()
    for m in names:
        if isinstance(m, FeedbackLayer):
            m.reads_no_weight = m in free

    freeing = {block_of[m] for m in free}
    groups = _groups(module, block_of, holders, free)
    report = Report(_rows(names, groups[module, False], reasons, whole, options.get("reshard_after_forward")))

    def shard(target: Any, own: Iterable[nn.Parameter], **more: Any) -> None:
        others = set(module.parameters()).difference(own)
        fsdp.fully_shard(target, **{**options, **more, "ignored_params": others})

    # From outside in, as torch looks for no Parameters in what is sharded already.
    if module not in free:
        shard(module, groups.pop((module, False)))
    for (block, once), own in sorted(groups.items(), key=lambda item: (names[item[0][0]].count("."), not item[0][1])):
        if not own:
            continue
        # What is computed from Parameters is so where the layer is called.
        layers = [m for m in names if own.keys() & set(m.parameters(recurse=is_parametrized(m)))]
        # A module has one group, and the root's is there already.
        target: Any = layers if (block is module and block not in free) or (block in freeing and not once) else block
        if not once:
            shard(target, own)
            continue
        shard(target, own, reshard_after_forward=True)
        of_torch = layers if target is layers else [block]
        freed = _Freed(next(m for m in of_torch if isinstance(m, fsdp.FSDPModule)), names)
        for m in layers:
            m.gather_again = freed.gather_again
        compiled = [m for m in names if block_of[m] is block and isinstance(m, OptimizedModule)]
        for m in dict.fromkeys([*of_torch, *compiled, *layers]):
            # A compiled block is left for torch's own hook in any case.
            before = disable(freed.before) if m in of_torch else freed.before
            freed.hooks.append(m.register_forward_pre_hook(before))

    meshes = list(dict.fromkeys(p.device_mesh for p in module.parameters() if isinstance(p, DTensor)))

    def agree(*_: Any) -> None:
        hook.remove()
        # A compiled program may go on calling this.
        if not meshes:
            return
        # Without sums, which are each rank's own of what is sharded.
        said = [(prefix, name, *record[:3]) for prefix, name, record in feedback_records(module)]
        while meshes:
            mesh = meshes.pop()
            if not same_on_ranks(said, mesh.device_type, mesh.get_all_groups()):
                raise RuntimeError(
                    "fully_shard: the ranks have different feedback: give convert_ one rule and one seed, build layers "
                    "under one torch.manual_seed, load a checkpoint on every rank"
                )

    hook = module.register_forward_pre_hook(disable(agree))
    return report


class _Freed:
    # A group that is not gathered for the backward, until a backward is seen to need it.
    def __init__(self, group: Any, names: dict[nn.Module, str]) -> None:
        group.set_unshard_in_backward(False)
        self.group, self.names, self.hooks = group, names, list[Any]()

    def gather_again(self) -> None:
        self.group.set_unshard_in_backward(True)
        for hook in self.hooks:
            hook.remove()

    def before(self, module: nn.Module, _: Any) -> None:
        # A forward within a backward is computed anew.
        if is_compiling() or torch._C._current_graph_task_id() == -1:
            return
        name = self.names[module] or "the root"
        warnings.warn(
            f"{name}: activation checkpointing computes it anew, so its block is gathered twice", stacklevel=2
        )
        self.gather_again()
        # Not an operator of what is computed anew, which selective checkpointing compares with the first forward's.
        with _disable_current_modes():
            self.group.unshard()


def _groups(
    module: nn.Module,
    block_of: dict[nn.Module, nn.Module],
    holders: dict[nn.Parameter, list[nn.Module]],
    free: Container[nn.Module],
) -> dict[tuple[nn.Module, bool], dict[nn.Parameter, None]]:
    # By block, and whether it is gathered once, its Parameters in order; the root's in torch's way are always there.
    groups: dict[tuple[nn.Module, bool], dict[nn.Parameter, None]] = {(module, False): {}}
    freeing = {block_of[m] for m in block_of if m in free}
    for p, own in holders.items():
        block, once = block_of[own[0]], own[0] in free
        # In a block that has a group already what holds no matrix is not worth another, nor has torch one for what is
        # the block's and no layer's.
        parts = [q for m in own for q in m.parameters(recurse=False) if q in holders]
        small = block in freeing and all(q.dim() < 2 for q in parts)
        shared = any(block_of[m] is not block for q in parts for m in holders[q])
        if not once and (small or shared or block in own):
            block = module
        groups.setdefault((block, once), {})[p] = None
    return groups


def _rows(
    names: dict[nn.Module, str],
    of_root: Container[nn.Parameter],
    reasons: dict[nn.Module, str],
    whole: Container[nn.Parameter],
    reshards: Any,
) -> list[Row]:
    rows = []
    for m, name in names.items():
        matrices = [p for p in m.parameters(recurse=is_parametrized(m)) if p.dim() > 1 and p not in whole]
        why = reasons.get(m, "no rule: torch's way")
        rule = str(m.feedback) if isinstance(m, FeedbackLayer) else ""
        if not why:
            stored = any(isinstance(p, Frozen) for p in m.parameters(recurse=False))
            why = "its stored B is whole on every rank" if stored else ""
            rows.append(Row(name, type(m).__name__, "gathered once", rule, why))
        elif matrices and not isinstance(m, ParametrizationList):
            keeps = not reshards if any(p in of_root for p in matrices) else reshards is False
            rows.append(Row(name, type(m).__name__, "gathered and kept" if keeps else "gathered twice", rule, why))
    return rows


def _blocks(module: nn.Module) -> list[nn.Module]:
    found = []
    for child in module.children():
        inner = _blocks(child)
        entry = isinstance(module, nn.ModuleList | nn.Sequential) and sum(map(_has_rule, child.modules())) > 1
        found += inner or [child] * entry
    return found


def _has_rule(module: nn.Module) -> bool:
    return isinstance(module, FeedbackLayer) and module.uses_feedback


def _reasons(
    module: nn.Module,
    names: dict[nn.Module, str],
    block_of: dict[nn.Module, nn.Module],
    holders: dict[nn.Parameter, list[nn.Module]],
) -> dict[nn.Module, str]:
    # Of each layer with feedback why its backward needs W, "" where it does not.
    reasons: dict[nn.Module, str] = {}
    # An attention's output projection is a layer of its own, whose weight the attention reads.
    units: list[list[FeedbackLayer]] = []
    for m in names:
        if isinstance(m, FeedbackLayer) and m not in reasons:
            units.append([part for part in m.modules() if isinstance(part, FeedbackLayer)])
            found = (_reads_weight(part, names[part], block_of[part] is module) for part in units[-1])
            reasons |= dict.fromkeys(units[-1], next(filter(None, found), ""))
    for m in names:
        if issubclass(type(m), Registered) and not isinstance(m, FeedbackLayer):
            read = {layer for layer in m.children() if isinstance(layer, FeedbackLayer) and not reasons[layer]}
            reasons |= dict.fromkeys(read, f"{type(m).__name__} reads its weight")
    while shared := {
        layer: other
        for layer, reason in reasons.items()
        for p in layer.parameters(recurse=False)
        for other in holders.get(p, ())
        if not reason and (reasons.get(other) != "" or block_of[other] is not block_of[layer])
    }:
        for unit in units:
            if other := next((shared[part] for part in unit if part in shared), None):
                reasons |= dict.fromkeys(unit, f"its weight is that of {names[other] or 'the root'}, too")
    return reasons


def _reads_weight(layer: FeedbackLayer, name: str, in_root: bool) -> str:
    if not layer.uses_feedback:
        return "back-propagation reads W"
    if "_checkpoint_wrapped_module" in name.split("."):
        return "activation checkpointing computes its forward anew"
    if any(held.trained for held in layer._held.values()):
        return "its B is trained"
    if isinstance(layer, Registered) and "forward" in vars(type(layer)):
        return "its forward is another library's"
    if layer._parameters.keys().isdisjoint(layer.weights()):
        return "its W is computed from other Parameters"
    if layer.read_besides:
        return "its weight is read without a call of it, too"
    if in_root and isinstance(layer, nn.RNNCellBase):
        return "it is called at every step"
    layer.reads_no_weight = True
    kept: list[Tensor] = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    for weight in layer.weights():
        op = layer.used(weight)[1]
        if op.role:
            return "its rule reads W"
        if op.magnitude is not None and not any(_is_alias_of(op.magnitude, t) for t in kept):
            return "its rule makes B in the forward, which stays as W would"
    return ""
