"""Swap the layers of an existing model, in place, and say what became of each."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._pytree import tree_leaves

from . import nn
from .backends.reference import checks
from .feedback import RULES, Key, Rule, as_rule, derived_key
from .nn.base import FeedbackLayer
from .nn.held import supported

_PAIRS: dict[type[torch.nn.Module], type[FeedbackLayer]] = {
    getattr(torch.nn, name): getattr(nn, name)
    for name in (
        "Linear",
        "Conv1d",
        "Conv2d",
        "Conv3d",
        "ConvTranspose1d",
        "ConvTranspose2d",
        "ConvTranspose3d",
        "MultiheadAttention",
    )
}
_PLAIN = {ours: theirs for theirs, ours in _PAIRS.items()}
_OWN = tuple(getattr(nn, name) for name in nn.__all__ if name.startswith("LocallyConnected"))

# What torch.compile, activation checkpointing and FSDP put into names; draws do not depend on who wraps a model when.
_WRAPPERS = re.compile(r"_(orig_mod|checkpoint_wrapped_module|fsdp_wrapped_module)\.")

_IGNORED = "_ddp_params_and_buffers_to_ignore"

# Modules that use the weights of these children without calling them.
_BYPASSING = {
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": ("qkv", "proj"),
}


@dataclass(frozen=True)
class Row:
    """What became of one module: `outcome` is "converted", "left" or "restored"."""

    name: str
    type: str
    outcome: Literal["converted", "left", "restored"]
    rule: str
    reason: str


@dataclass
class Report:
    """What `convert_` did, a row for each module that holds weights; str() is a table."""

    rows: list[Row] = field(default_factory=list)

    def _names(self, outcome: str) -> list[str]:
        return [row.name for row in self.rows if row.outcome == outcome]

    @property
    def converted(self) -> list[str]:
        """Names of the modules that now have a feedback rule."""
        return self._names("converted")

    @property
    def left(self) -> list[str]:
        """Names of the modules with weights that were left alone."""
        return self._names("left")

    @property
    def restored(self) -> list[str]:
        """Names of the modules that are plain torch.nn again."""
        return self._names("restored")

    def __str__(self) -> str:
        header = ("module", "type", "outcome", "rule", "why")
        cells = [(row.name or "(root)", row.type, row.outcome, row.rule, row.reason) for row in self.rows]
        widths = [max(len(r[i]) for r in [header, *cells]) for i in range(len(header))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [header, *cells]]
        lines.insert(1, "  ".join("-" * w for w in widths))
        counts = ", ".join(f"{len(self._names(o))} {o}" for o in ("converted", "restored", "left") if self._names(o))
        return "\n".join([*lines, counts or "no module with weights"])


def convert_(
    model: torch.nn.Module,
    feedback: Rule | str | None,
    *,
    last_layer: Rule | str | None = None,
    filter_fn: Callable[[torch.nn.Module, str], bool] | None = None,
    seed: int = 0,
) -> Report:
    """Give every convertible layer of `model` the rule `feedback`, in place, and report what became of each module.

    A module converts where its type is exactly a torch.nn class that `bioplaus_kernels.nn` has, or that class of ours;
    only its class changes, so hooks, parameters, tied modules, device, dtype and optimizers stay. None (and "backprop")
    restores plain torch.nn, whose B is W.

    last_layer: rule of the last convertible module in `named_modules()` order; None means `feedback`.
    filter_fn: called with (module, name); False leaves the module as it is.
    seed: drawn feedback is a function of (seed, parameter name), so a second call draws the same again. What wrappers
    of torch put into a name does not count, but "module." of DistributedDataParallel does.

    Raises TypeError or ValueError for an argument that does not fit, before any module is touched.
    """
    checks.module("model", model)
    seed = checks.integer("seed", seed)
    if filter_fn is not None:
        checks.function("filter_fn", filter_fn, "a function of (module, name) or None")
    rule = as_rule(feedback)
    last_rule = rule if last_layer is None else as_rule(last_layer, "last_layer")

    modules = _modules(model)
    eligible = [m for name, m, why in modules if not why and (filter_fn is None or filter_fn(m, name))]
    plan = dict.fromkeys(eligible, rule)
    if eligible:
        plan[eligible[-1]] = last_rule
    report = Report()
    # One B for each Parameter: who shares a weight shares the first name it has, and so the key.
    names = {id(parameter): _WRAPPERS.sub("", name) for name, parameter in model.named_parameters()}
    owners: dict[int, tuple[FeedbackLayer, str]] = {}
    for name, module, why in modules:
        if module in plan:
            report.rows.append(_apply(name, module, plan[module], seed, names, owners))
        else:
            current = module.feedback.name if isinstance(module, FeedbackLayer) else "backprop"
            report.rows.append(Row(name, _type(module), "left", current, why or "filter_fn"))
    _spare_broadcasts(model)
    return report


def _modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module, str]]:
    # Every module that holds weights itself: its name, and why it cannot convert ("" if it can).
    rows = []
    bypassed: dict[torch.nn.Module, str] = {}
    part_of_attention = set()
    for name, module in model.named_modules():
        full = f"{type(module).__module__}.{type(module).__qualname__}"
        for child in _BYPASSING.get(full, ()):
            bypassed[module.get_submodule(child)] = f"{type(module).__name__} uses its weight without calling it"
        if type(module) in (torch.nn.MultiheadAttention, nn.MultiheadAttention):
            part_of_attention.add(module.out_proj)
        if module in part_of_attention or not module._parameters:
            continue
        rows.append((name, module, bypassed.get(module) or _obstacle(module)))
    return rows


def _obstacle(module: Any) -> str:
    kind = type(module)
    if kind in _PAIRS or kind in _PLAIN or kind in _OWN:
        attention = isinstance(module, torch.nn.MultiheadAttention)
        if attention and type(module.out_proj) not in (NonDynamicallyQuantizableLinear, nn.Linear):
            return f"its out_proj is a {_type(module.out_proj)}: its forward may differ"
        holder, weight = (module.out_proj, "in_proj_weight") if attention else (module, "weight")
        if weight not in module._parameters or "weight" not in holder._parameters:
            return "its weight is computed before each call, not a Parameter"
        weights = [w for n, w in module._parameters.items() if w is not None and n.endswith("weight")]
        unsupported = [w for w in weights if not supported(w)]
        return f"{unsupported[0].dtype} weight" if unsupported else ""
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        return "its shape is not known before the first call"
    for theirs in (*_PAIRS, *_PLAIN, *_OWN):
        if isinstance(module, theirs):
            return f"subclass of {theirs.__name__}: its forward may differ"
    return "has no feedback rule"


def _apply(
    name: str, module: Any, rule: Rule, seed: int, names: dict[int, str], owners: dict[int, tuple[FeedbackLayer, str]]
) -> Row:
    if rule.transports_weight and not isinstance(module, FeedbackLayer):
        return Row(name, _type(module), "left", rule.name, "left to back-propagation")

    def key(weight: str) -> Key:
        return derived_key(seed, names[id(module.get_parameter(weight))])

    with _unchanged_by_errors(name, module):
        if not rule.transports_weight:
            module.__class__ = _PAIRS.get(type(module), type(module))
        module.install_feedback(rule, key)
        if rule.transports_weight and type(module) in _PLAIN:
            for plain in (module, *module.children()):
                for attribute in ("_feedback", "_held"):
                    vars(plain).pop(attribute, None)
            module.__class__ = _PLAIN[type(module)]
    if rule.transports_weight:
        return Row(name, _type(module), "restored", rule.name, "")
    # An attention's output projection is a layer of its own.
    for layer in (m for m in (module, *module.children()) if isinstance(m, FeedbackLayer)):
        for weight in layer.weights():
            owner, its = owners.setdefault(id(getattr(layer, weight)), (layer, weight))
            if owner is not layer and owner.feedback == rule:
                layer.share_feedback(weight, owner, its)
    reason = ""
    if trained := [held.trained for held in module._held.values() if held.trained]:
        reason = f"its {trained[0]} learns: add it to the optimizer, in the weight's parameter group"
    return Row(name, _type(module), "converted", _short(rule), reason)


def _short(rule: Rule) -> str:
    # The name where it says all.
    return rule.name if RULES.get(rule.name) is type(rule) and rule == type(rule)() else repr(rule)


@contextmanager
def _unchanged_by_errors(name: str, module: torch.nn.Module) -> Iterator[None]:
    before = [
        (m, m.__class__, dict(vars(m)), dict(m._parameters), dict(m._buffers), set(m._non_persistent_buffers_set))
        for m in (module, *module.children())
    ]
    try:
        yield
    except Exception as error:
        for m, kind, attributes, parameters, buffers, others in before:
            m.__class__ = kind
            vars(m).clear()
            vars(m).update(attributes, _parameters=parameters, _buffers=buffers, _non_persistent_buffers_set=others)
        if type(error) in (ValueError, TypeError, RuntimeError):
            raise type(error)(f"{name or '(root)'}: {error}") from error
        raise


def _spare_broadcasts(model: torch.nn.Module) -> None:
    # What is drawn from (seed, name) is the same on every rank. DistributedDataParallel reads the list in its model.
    ignored: list[str] = []
    for prefix, layer in model.named_modules():
        if not isinstance(layer, FeedbackLayer) or not layer._held or layer.feedback.initial:
            continue
        buffers = {a for held in layer._held.values() for a in (held.record, *held.kept.values())} & set(layer._buffers)
        own = [f"{prefix}.{buffer}".removeprefix(".") for buffer in sorted(buffers)]
        if all(held.key is None or held.key.seed is not None for held in layer._held.values()):
            layer._ignored = ignored, own
            ignored += own
    others = [n for n in getattr(model, _IGNORED, []) if "feedback_" not in n]
    ignored += others
    if ignored or others:
        setattr(model, _IGNORED, ignored)
    elif hasattr(model, _IGNORED):
        delattr(model, _IGNORED)


def _type(module: torch.nn.Module) -> str:
    return type(module).__name__


@dataclass(frozen=True)
class Check:
    """Which convertible layers a call of the model really called."""

    called: list[str]
    bypassed: list[str]
    unused: list[str]

    def __str__(self) -> str:
        lines = [f"{len(self.called)} layers called"]
        for names, meaning in (
            (
                self.bypassed,
                "bypassed: the output depends on its weight, but it was not called, so no rule acts",
            ),
            (self.unused, "unused: neither called nor reached by a gradient in this call"),
        ):
            lines += [f"{name or '(root)'}  {meaning}" for name in names]
        return "\n".join(lines)


def check(model: torch.nn.Module, *inputs: Any, **keywords: Any) -> Check:
    """Run `model(*inputs, **keywords)` and list the convertible layers whose weights act without a call of the layer.

    Some models read a layer's weight directly (torchvision's Swin attention); no rule can act there. Buffers, gradients
    and the random state are as before afterwards. Raises TypeError for a model that is no torch.nn.Module.
    """
    checks.module("model", model)
    layers = {name: m for name, m in model.named_modules() if type(m) in (*_PAIRS, *_PLAIN, *_OWN)}
    called: set[torch.nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda module, _: called.add(module)) for m in layers.values()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.enable_grad(), torch.random.fork_rng():
            outputs = tree_leaves(model(*inputs, **keywords))
        roots = [t.float().sum() for t in outputs if isinstance(t, Tensor) and t.requires_grad]
        weights = [p for m in layers.values() for p in m.parameters(recurse=False) if p.requires_grad]
        grads = torch.autograd.grad(torch.stack(roots).sum(), weights, allow_unused=True) if roots and weights else ()
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
    reached = {id(w) for w, grad in zip(weights, grads, strict=False) if grad is not None}

    def acts(module: torch.nn.Module) -> bool:
        return any(id(p) in reached for p in module.parameters(recurse=False))

    attention = {m.out_proj for m in layers.values() if isinstance(m, torch.nn.MultiheadAttention) and m in called}
    called |= attention
    return Check(
        called=[name for name, m in layers.items() if m in called],
        bypassed=[name for name, m in layers.items() if m not in called and acts(m)],
        unused=[name for name, m in layers.items() if m not in called and not acts(m)],
    )
