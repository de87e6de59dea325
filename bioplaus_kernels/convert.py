"""Swap the layers of an existing model, in place, and say what became of each."""

import re
import sys
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
from .nn.state import StatefulLayer
from .proof import UNSEEN, Report, Row, forget, note, prove, prove_later, unwrapped
from .register import ALLOWS, OWN, PAIRS, PLAIN, layer_of, name_of, ours_of, plain_of

Given = Rule | str | None

_IGNORED = "_ddp_params_and_buffers_to_ignore"

_AUXILIARY = re.compile(r"^(.*?\.)??aux[^.]*", re.IGNORECASE)
_READ = "its weight is read without a call of the layer"


def convert_(
    model: torch.nn.Module,
    feedback: Given | Mapping[type, Given] | Callable[[torch.nn.Module, str], Given],
    *,
    last_layer: Given = None,
    filter_fn: Callable[[torch.nn.Module, str], bool] | None = None,
    seed: int = 0,
    example: Any = None,
) -> Report:
    """Give every convertible layer of `model` the rule `feedback`, in place, and report what became of each module.

    A module converts where its forward is that of a torch.nn class that `bioplaus_kernels.nn` has, or where its class
    is known or was given to `register`; only its class changes, so hooks, parameters, tied modules, device, dtype and
    optimizers stay. None (and "backprop") restores the class it had, whose B is W; a layer that was wrapped since keeps
    ours.

    feedback: one rule for all; a dictionary of rules by class, of which the nearest of a module's classes counts, and
    one that has none is left; or a function of (module, name) that returns a rule.
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
    rule_for = _rules(feedback)
    last_rule = None if last_layer is None else as_rule(last_layer, "last_layer")
    if example is not None:
        checks.instance(
            "example", example, (Tensor, tuple, Mapping), "a tensor, a tuple of arguments or a dict of keywords"
        )
    opacus: Any = sys.modules.get("opacus.grad_sample")
    if opacus is not None and any(isinstance(m, opacus.AbstractGradSampleModule) for m in model.modules()):
        checks.fail(
            "model", "one without Opacus's GradSampleModule, which knows torch.nn's own layers", _type(model), TypeError
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError("convert_: what is made in torch.inference_mode cannot be trained; call it outside")

    modules = _modules(model)
    eligible = [(name, m) for name, m, why in modules if not why and (filter_fn is None or filter_fn(m, name))]
    given = {m: rule_for(m, name) for name, m in eligible}
    last, notes = _last_layer(modules) if last_rule is not None else (None, {})
    if last in given:
        given[last] = last_rule
        notes[last] = "last_layer: the last of named_modules()"
    plan = {m: rule.among(_weights(m)) for m, rule in given.items() if rule is not None}
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
            other = "no rule for its class" if module in given else "filter_fn"
            row = Row(name, _type(module), "left", current, why or other)
        report.rows.append(_with(row, notes.get(module, "")))
    _mark_parents(model)
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
    _mark_parents(model)


def _rules(feedback: Any) -> Callable[[torch.nn.Module, str], Rule | None]:
    if isinstance(feedback, Mapping):
        rules = {kind: as_rule(rule) for kind, rule in feedback.items()}
        for kind in rules:
            checks.instance("feedback", kind, type, "classes of modules as the keys of a dictionary")
        return lambda module, _: next((rules[kind] for kind in type(module).__mro__ if kind in rules), None)
    if callable(feedback) and not isinstance(feedback, type | Rule):
        return lambda module, name: as_rule(feedback(module, name))
    rule = as_rule(feedback)
    return lambda *_: rule


def _with(row: Row, why: str) -> Row:
    return replace(row, reason="; ".join(filter(None, (row.reason, why))))


def _modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module, str]]:
    # Every module that holds weights itself: its name, and why it cannot convert ("" if it can).
    rows = []
    parts: dict[torch.nn.Module | None, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.MultiheadAttention):
            reads = layer_of(_kind(module)) is None
            projection = getattr(module, "out_proj", None)
            parts[projection] = f"{_type(module)} uses its weight without calling it" if reads else ""
        if parts.get(module) == "" or isinstance(module, ParametrizationList):
            continue
        has_rule = isinstance(module, FeedbackLayer)
        if module._parameters or is_parametrized(module) or _is_quantised(module) or has_rule:
            rows.append((name, module, parts.get(module) or _obstacle(module)))
    return rows


def _is_quantised(module: torch.nn.Module) -> bool:
    # torch's quantised layers hold no Parameter.
    return callable(getattr(type(module), "weight", None)) or "_all_weight_values" in module._modules


def _kind(module: torch.nn.Module) -> type[torch.nn.Module]:
    # What it was before torch.nn.utils.parametrize.
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _become(module: torch.nn.Module, kind: type[torch.nn.Module]) -> None:
    # `kind`, and on it again what torch.nn.utils.parametrize has put into the class.
    if is_parametrized(module):
        own = {n: v for n, v in vars(type(module)).items() if n not in ("__dict__", "__weakref__", "__signature__")}
        meta: Any = type(kind)
        kind = meta(type(module).__name__, (kind,), own)
    module.__class__ = kind


def _mark_parents(model: torch.nn.Module) -> None:
    # Who reads the weights of layers within runs in our class while one of them has a rule.
    for module in model.modules():
        kind = type(module)
        if isinstance(module, FeedbackLayer) or "forward" in vars(module):
            continue
        fed = any(isinstance(child, FeedbackLayer) and child.uses_feedback for child in module.modules())
        ours = ours_of(kind) if fed else plain_of(kind)
        if ours is not None and not issubclass(ours, FeedbackLayer):
            module.__class__ = ours


def _obstacle(module: Any) -> str:
    kind = _kind(module)
    ours = layer_of(kind)
    layer = next((k for k in (*PAIRS, *PLAIN, *OWN) if isinstance(module, k)), None)
    if any(map(torch.nn.parameter.is_lazy, module._parameters.values())):
        return "its shape is not known before the first call"
    if _is_quantised(module):
        return "quantised: convert_ does not train it"
    if "_flat_param" in module._parameters:
        return "holds the weights of its layers as one Parameter, FSDP's: convert_ first, then wrap"
    if layer is not None and (hasattr(module, "unshard") or getattr(module, "reads_no_weight", False)):
        return "sharded by itself: convert_ first, then fully_shard"
    if ours is None:
        if layer is not None:
            return f"subclass of {layer.__name__}: its forward may differ; {ALLOWS}({name_of(kind)})"
        # A ScriptModule's dictionary has no get.
        weight = dict(module._parameters.items()).get("weight")
        is_matrix = weight is not None and weight.dim() == 2 and not isinstance(module, torch.nn.Embedding)
        theirs = is_matrix and not kind.__module__.startswith("torch.")
        linear = f"; if it is a linear map, {ALLOWS}({name_of(kind)}, torch.nn.Linear)" if theirs else ""
        return f"has no feedback rule{linear}"
    attention = isinstance(module, torch.nn.MultiheadAttention)
    if attention and type(module.out_proj) not in (NonDynamicallyQuantizableLinear, nn.Linear):
        return f"its out_proj is a {_type(module.out_proj)}: its forward may differ"
    names = _weights(module)
    if not isinstance(module, FeedbackLayer):
        parts = [module.out_proj] if attention else []
        there = all(_is_there(module, names, n) for n in names) or ours.weight_of is not StatefulLayer.weight_of
        if not (there and all(_is_there(part, ["weight"], "weight") for part in parts)):
            return "its weight is no Parameter, and who computes it is not known"
        if any("forward" in vars(m) for m in (module, *parts)):
            return "its forward is the instance's own, as a wrapper's: convert_ first, then wrap"
    own = (w for n, w in module._parameters.items() if n in names or n.endswith("weight"))
    return next(filter(None, map(_unfit, own)), "")


def _is_there(module: Any, names: list[str], name: str) -> bool:
    # A Parameter, or computed: by parametrize, or before each call from Parameters named after it, by torch.nn.utils.
    parameters = module._parameters
    made = (n for n in parameters if n.startswith(f"{name}_") and n not in names)
    return name in parameters or is_parametrized(module, name) or any(made)


def _weights(module: Any) -> list[str]:
    return cast(Any, layer_of(_kind(module))).weights(module)


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
    for weight_name, weight in module.named_parameters():
        if _is_sharded(weight) and rule.of(weight_name).state(
            torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        ):
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

    # Who wrapped the layer refers to our class.
    stays = "forward" in vars(module)

    with _unchanged_by_errors(name, module):
        if not isinstance(module, FeedbackLayer):
            _become(module, cast(type[torch.nn.Module], layer_of(_kind(module))))
        module.install_feedback(rule, key)
        theirs = plain_of(_kind(module))
        if rule.transports_weight and theirs is not None and not stays:
            for plain in (module, *module.children()):
                for attribute in ("_feedback", "_held"):
                    vars(plain).pop(attribute, None)
            _become(module, theirs)
    if rule.transports_weight:
        return Row(name, _type(module), "restored", rule.name, "in our class, which its wrapper calls" if stays else "")
    for weight, held in module._held.items():
        held.path = path(weight)
    # An attention's output projection is a layer of its own.
    for layer in (m for m in (module, *module.children()) if isinstance(m, FeedbackLayer)):
        for weight, held in layer._held.items():
            if (parameter := layer._parameters.get(weight)) is None:
                continue
            owner, its = owners.setdefault(id(parameter), (layer, weight))
            if owner is not layer and owner._held[its].rule == held.rule:
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
    plain = [m for _, m, _ in modules if _can_have_rule(m)]
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


def _can_have_rule(module: torch.nn.Module) -> bool:
    if isinstance(module, FeedbackLayer) and module.uses_feedback:
        return False
    return isinstance(module, (*PAIRS, *PLAIN, *OWN)) or layer_of(_kind(module)) is not None
