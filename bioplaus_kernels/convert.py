"""Swap the layers of an existing model, in place, and say what became of each."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import nn
from .backends.reference import checks
from .feedback import RULES, Key, Rule, as_rule, derived_key
from .nn.base import FeedbackLayer
from .nn.held import supported
from .proof import UNSEEN, Report, Row, forget, note, prove, prove_later, unwrapped

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

_IGNORED = "_ddp_params_and_buffers_to_ignore"

_AUXILIARY = re.compile(r"^(.*?\.)??aux[^.]*", re.IGNORECASE)
_READ = "its weight is read without a call of the layer"

# Modules known to use the weights of these children without calling them; example= finds all.
_BYPASSING = {
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": ("qkv", "proj"),
}


def convert_(
    model: torch.nn.Module,
    feedback: Rule | str | None,
    *,
    last_layer: Rule | str | None = None,
    filter_fn: Callable[[torch.nn.Module, str], bool] | None = None,
    seed: int = 0,
    example: Any = None,
) -> Report:
    """Give every convertible layer of `model` the rule `feedback`, in place, and report what became of each module.

    A module converts where its type is exactly a torch.nn class that `bioplaus_kernels.nn` has, or that class of ours;
    only its class changes, so hooks, parameters, tied modules, device, dtype and optimizers stay. None (and "backprop")
    restores plain torch.nn, whose B is W; a layer that was wrapped or parametrized since keeps our class.

    last_layer: rule of the model's last layer, which is the last module with a weight matrix in `named_modules()`
    order that is no embedding and in no auxiliary head (aux…), and left where it cannot convert. None means `feedback`.
    filter_fn: called with (module, name); False leaves the module as it is.
    seed: drawn feedback is a function of (seed, parameter name), so a second call draws the same again. What wrappers
    of torch put into a name does not count, but "module." of DistributedDataParallel does.
    example: what to call the model with, a tensor, a tuple of arguments or a dict of keywords. The graph of that call
    proves each row, or its reason says why not; a layer whose weight was read without a call of the layer is left.
    The model is then as `check` leaves it; what the call raises comes after the conversion. Without an example the
    first forward with gradients proves the same rows but those of frozen weights. It raises RuntimeError, once, where a
    weight is read and its layer never called, and warns instead where another module has the weight too.

    Raises TypeError or ValueError for an argument that does not fit and for weights sharded before a rule that keeps
    tensors, RuntimeError in torch.inference_mode, before any module is touched.
    """
    checks.module("model", model)
    seed = checks.integer("seed", seed)
    if filter_fn is not None:
        checks.function("filter_fn", filter_fn, "a function of (module, name) or None")
    rule = as_rule(feedback)
    last_rule = rule if last_layer is None else as_rule(last_layer, "last_layer")
    if example is not None:
        checks.instance(
            "example", example, (Tensor, tuple, Mapping), "a tensor, a tuple of arguments or a dict of keywords"
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError("convert_: what is made in torch.inference_mode cannot be trained; call it outside")

    modules = _modules(model)
    eligible = [m for name, m, why in modules if not why and (filter_fn is None or filter_fn(m, name))]
    plan = dict.fromkeys(eligible, rule)
    last, notes = _last_layer(modules) if last_layer is not None else (None, {})
    if last in plan:
        plan[last] = last_rule
        del notes[last]
    for name, module, _ in modules:
        if module in plan:
            _refuse_sharded(name, module, plan[module])
    report = Report()
    # One B for each Parameter: who shares a weight shares the first name it has, and so the key.
    names = {id(parameter): unwrapped(name) for name, parameter in model.named_parameters()}
    owners: dict[int, tuple[FeedbackLayer, str]] = {}
    for name, module, why in modules:
        if module in plan:
            row = _apply(name, module, plan[module], seed, names, owners)
        else:
            current = module.feedback.name if isinstance(module, FeedbackLayer) else "backprop"
            row = Row(name, _type(module), "left", current, why or "filter_fn")
        report.rows.append(_with(row, notes.get(module, "")))
    _spare_broadcasts(model)
    forget(model)
    if report.converted:
        report.rows = [_with(row, UNSEEN if row.outcome == "converted" else "") for row in report.rows]
        prove_later(model, report)
        if example is not None:
            _prove(model, report, example)
    return report


def _prove(model: torch.nn.Module, report: Report, example: Any) -> None:
    arguments = (example,) if isinstance(example, Tensor) else example if isinstance(example, tuple) else ()
    found = prove(model, arguments, dict(example) if isinstance(example, Mapping) else {}).found
    if not found:
        return
    forget(model)
    note(report, model, found)
    for i, row in enumerate(report.rows):
        if row.outcome == "read":
            module = model.get_submodule(row.name)
            _apply(row.name, module, as_rule(None), 0, {}, {})
            report.rows[i] = replace(row, type=_type(module), outcome="left", rule="backprop")


def _with(row: Row, why: str) -> Row:
    return replace(row, reason="; ".join(filter(None, (row.reason, why))))


def _modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module, str]]:
    # Every module that holds weights itself: its name, and why it cannot convert ("" if it can).
    rows = []
    bypassed: dict[torch.nn.Module, str] = {}
    parts = set()
    for name, module in model.named_modules():
        full = f"{type(module).__module__}.{type(module).__qualname__}"
        for child in _BYPASSING.get(full, ()):
            bypassed[module.get_submodule(child)] = f"{type(module).__name__} uses its weight without calling it"
        if isinstance(module, torch.nn.MultiheadAttention) and (type(module) in _PAIRS or _kind(module) in _PLAIN):
            parts.add(module.out_proj)
        if module in parts or isinstance(module, ParametrizationList):
            continue
        has_rule = isinstance(module, FeedbackLayer)
        if module._parameters or is_parametrized(module) or _is_quantised(module) or has_rule:
            rows.append((name, module, bypassed.get(module) or _obstacle(module)))
    return rows


def _is_quantised(module: torch.nn.Module) -> bool:
    # torch's quantised layers hold no Parameter.
    return callable(getattr(type(module), "weight", None)) or "_all_weight_values" in module._modules


def _kind(module: torch.nn.Module) -> type:
    # Of a layer of ours what it was before torch.nn.utils.parametrize.
    ours = isinstance(module, FeedbackLayer) and is_parametrized(module)
    return type(module).__bases__[0] if ours else type(module)


def _obstacle(module: Any) -> str:
    kind = _kind(module)
    ours = isinstance(module, FeedbackLayer)
    if kind in _PAIRS or kind in _PLAIN or kind in _OWN:
        attention = isinstance(module, torch.nn.MultiheadAttention)
        if attention and type(module.out_proj) not in (NonDynamicallyQuantizableLinear, nn.Linear):
            return f"its out_proj is a {_type(module.out_proj)}: its forward may differ"
        holder, weight = (module.out_proj, "in_proj_weight") if attention else (module, "weight")
        if not ours and (weight not in module._parameters or "weight" not in holder._parameters):
            return "its weight is computed before each call, not a Parameter"
        if not ours and ("forward" in vars(module) or "forward" in vars(holder)):
            return "its forward is the instance's own, as a wrapper's: convert_ first, then wrap"
        return next(filter(None, (_unfit(w) for n, w in module._parameters.items() if n.endswith("weight"))), "")
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        return "its shape is not known before the first call"
    if _is_quantised(module):
        return "quantised: convert_ does not train it"
    if "_flat_param" in module._parameters:
        return "holds the weights of its layers as one Parameter, FSDP's: convert_ first, then wrap"
    for theirs in (*_PAIRS, *_PLAIN, *_OWN):
        if isinstance(module, theirs):
            if hasattr(module, "unshard"):
                return "sharded by itself: convert_ first, then fully_shard"
            return f"subclass of {theirs.__name__}: its forward may differ"
    return "has no feedback rule"


def _unfit(weight: Tensor | None) -> str:
    if weight is None:
        return ""
    if not _is_sharded(weight) and is_traceable_wrapper_subclass(cast(object, weight)):
        return f"its weight is a {type(weight).__name__}, quantised or otherwise not what it seems"
    if weight.is_inference():
        return "its weight was made in torch.inference_mode and cannot be trained"
    return "" if supported(weight) else f"{weight.dtype} weight"


def _is_sharded(weight: object) -> bool:
    return hasattr(weight, "full_tensor")


def _refuse_sharded(name: str, module: Any, rule: Rule) -> None:
    for _, weight in module.named_parameters():
        if _is_sharded(weight) and rule.state(torch.empty(weight.shape, dtype=weight.dtype, device="meta")):
            raise ValueError(
                f"{name or '(root)'}: {rule.name!r} keeps a tensor for each weight, and this one is sharded already: "
                "convert_ first, then fully_shard"
            )


def _last_layer(modules: list[tuple[str, torch.nn.Module, str]]) -> tuple[Any, dict[torch.nn.Module, str]]:
    # The last layer, and what the report says of it if it does not convert, and of auxiliary heads' last layers.
    last, heads = None, {}
    for name, module, _ in modules:
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag | torch.nn.LayerNorm):
            continue
        parameters = module.parameters(recurse=is_parametrized(module))
        if _is_quantised(module) or any(torch.nn.parameter.is_lazy(p) or p.ndim > 1 for p in parameters):
            if head := _AUXILIARY.match(name):
                heads[head[0]] = module
            else:
                last = module
    notes = dict.fromkeys(heads.values(), "last of an auxiliary head, which last_layer does not mean")
    return last, notes if last is None else notes | {last: "the last layer: last_layer means no other"}


def _apply(
    name: str, module: Any, rule: Rule, seed: int, names: dict[int, str], owners: dict[int, tuple[FeedbackLayer, str]]
) -> Row:
    if rule.transports_weight and not isinstance(module, FeedbackLayer):
        return Row(name, _type(module), "left", rule.name, "left to back-propagation")

    def path(weight: str) -> str:
        own = dict(module.named_parameters()).get(weight)
        return unwrapped(f"{name}.{weight}".removeprefix(".")) if own is None else names[id(own)]

    def key(weight: str) -> Key:
        return derived_key(seed, path(weight))

    # Who wrapped the layer, or computes its weight, refers to our class.
    stays = "forward" in vars(module) or _kind(module) is not type(module)

    with _unchanged_by_errors(name, module):
        if not rule.transports_weight:
            module.__class__ = _PAIRS.get(type(module), type(module))
        module.install_feedback(rule, key)
        if rule.transports_weight and type(module) in _PLAIN and not stays:
            for plain in (module, *module.children()):
                for attribute in ("_feedback", "_held"):
                    vars(plain).pop(attribute, None)
            module.__class__ = _PLAIN[type(module)]
    if rule.transports_weight:
        return Row(name, _type(module), "restored", rule.name, "in our class, which its wrapper calls" if stays else "")
    for weight in module.weights():
        module._held[weight].path = path(weight)
    # An attention's output projection is a layer of its own.
    for layer in (m for m in (module, *module.children()) if isinstance(m, FeedbackLayer)):
        for weight in layer.weights():
            if (parameter := layer._parameters.get(weight)) is None:
                continue
            owner, its = owners.setdefault(id(parameter), (layer, weight))
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
    ignored += [n for n in getattr(model, _IGNORED, []) if "feedback_" not in n]
    if ignored:
        setattr(model, _IGNORED, ignored)
    elif hasattr(model, _IGNORED):
        delattr(model, _IGNORED)


def _type(module: torch.nn.Module) -> str:
    return type(module).__name__


def check(model: torch.nn.Module, *inputs: Any, **keywords: Any) -> Report:
    """Run `model(*inputs, **keywords)` and say of each layer that has or can have a rule whether it acts.

    A layer that has none was "called", its weight "read" without a call of the layer, or it is "unused". Afterwards
    attributes, the lists, dictionaries and sets that some are, tensors in them, buffers, gradients, what FSDP2 sharded
    and the random states of torch, Python and numpy are as before; the model is given copies of the tensors among
    `inputs` and `keywords`. What it writes into Parameters or other objects stays. torch.compile is left out meanwhile.

    Raises TypeError for a model that is no torch.nn.Module, ValueError for one with a layer of unknown shape.
    """
    checks.module("model", model)
    modules = _modules(model)
    plain = [m for _, m, _ in modules if isinstance(m, (*_PAIRS, *_PLAIN, *_OWN)) and not _has_rule(m)]
    found, called, read, hiding = prove(model, inputs, keywords, plain)
    report = Report()
    for name, module, _ in modules:
        if name in found:
            rule = _short(cast(FeedbackLayer, module).feedback)
            report.rows.append(Row(name, _type(module), found[name].outcome, rule, found[name].reason))
        elif module in plain:
            unused = "unused", f"{hiding[0]} may hide a read" if hiding else ""
            outcome, why = ("called", "") if module in called else ("read", _READ) if module in read else unused
            report.rows.append(Row(name, _type(module), outcome, "backprop", why))
    return report


def _has_rule(module: torch.nn.Module) -> bool:
    return isinstance(module, FeedbackLayer) and module.uses_feedback
