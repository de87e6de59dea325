"""Whether a rule acts: one forward, and a walk of its autograd graph from the outputs to the weights."""

import re
import sys
import threading
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.compiler import is_compiling
from torch.utils._pytree import tree_map_only

from ._direct import Broadcast, block_outputs
from ._restore import unchanged
from ._watch import Watch, own, owners
from .backends.reference import checks
from .functional._bilinear import _Bilinear
from .functional._conv import _Conv
from .functional._linear import _Linear
from .functional._locally_connected import _LocallyConnected, _LocallyConnectedTranspose
from .functional._recurrent import _Recurrent
from .nn.base import FeedbackLayer
from .register import ALLOWS, Registered, name_of, ours_of, runs_ours

# Among the edges of a node of theirs, those to the inputs whose gradient B makes, and those to the weights.
_FUNCTIONS: dict[type, tuple[tuple[int, ...], tuple[int, ...]]] = {
    **dict.fromkeys((_Linear, _Conv, _LocallyConnected, _LocallyConnectedTranspose), ((0,), (1,))),
    _Bilinear: ((0, 2), (1,)),
    # The gradient of its input, what the input-to-hidden weights made, goes through B from later steps.
    _Recurrent: ((), (1, 2)),
}
# What torch.compile, activation checkpointing and FSDP put into names; draws do not depend on who wraps a model when.
_WRAPPERS = re.compile(r"_(orig_mod|checkpoint_wrapped_module|fsdp_wrapped_module)\.")
UNSEEN = "not proven yet"
_IDLE = "not proven: its input needs no gradient, so none goes through B"
_FROZEN = "not proven: B acts, but its weight is frozen, and only check sees whether it is read besides"
_CHECKPOINTED = "not proven: B acts, but a checkpoint hides whether its weight is read besides"
_OTHER = "the forward of its class gives other values, and is not run"
# torch.compile's and DataParallel's: they have W among their inputs whether the layer is called or not.
_OPAQUE = ("CompiledFunctionBackward", "BroadcastBackward")
# Whose Functions hide nothing.
_SEEN_THROUGH = ("bioplaus_kernels.", "torch.distributed.", "torch.nn.parallel.", "torch._library.")


@dataclass(frozen=True)
class Row:
    """What became of one module. `outcome` is, of a layer that has a rule,

    "proven": called, the gradient of the outputs passes through its B, and nothing else reads its weight
    (a read under no_grad, by detach() or .data leaves no trace);
    "called and read": called, and its weight is read by something else too, which B does not reach;
    "read": its weight is read, and the layer never called: back-propagation;
    "unused": no gradient of the outputs comes to it;
    "converted": it has the rule, and `reason` says why that is not proven;

    else "left", "restored", or, from `check`, "called", or, from `distributed.fully_shard`, "gathered once",
    "gathered twice" or "gathered and kept".
    """

    name: str
    type: str
    outcome: str
    rule: str
    reason: str


@dataclass
class Report:
    """A row for each module that holds weights; str() is a table."""

    rows: list[Row] = field(default_factory=list)

    def names(self, *outcomes: str) -> list[str]:
        """Names of the modules with one of these outcomes."""
        return [row.name for row in self.rows if row.outcome in outcomes]

    @property
    def converted(self) -> list[str]:
        """Names of the modules that now have a feedback rule, proven or not."""
        return self.names("converted", "proven", "called and read", "read", "unused")

    @property
    def proven(self) -> list[str]:
        """Names of the modules whose B was seen to act."""
        return self.names("proven")

    @property
    def left(self) -> list[str]:
        """Names of the modules with weights that were left alone."""
        return self.names("left")

    @property
    def restored(self) -> list[str]:
        """Names of the modules that are plain torch.nn again."""
        return self.names("restored")

    def __str__(self) -> str:
        header = ("module", "type", "outcome", "rule", "why")
        cells = [(row.name or "(root)", row.type, row.outcome, row.rule, row.reason) for row in self.rows]
        widths = [max(len(r[i]) for r in [header, *cells]) for i in range(len(header))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [header, *cells]]
        lines.insert(1, "  ".join("-" * w for w in widths))
        found = dict.fromkeys(row.outcome for row in self.rows)
        order = sorted(found, key=lambda o: (o in ("restored", "left"), o == "left"))
        counts = ", ".join(f"{len(self.names(o))} {o}" for o in order)
        return "\n".join([*lines, counts or "no module with weights"])


class Finding(NamedTuple):
    """What a proof says of a layer, or of a part of one; `shared`: another module has its weight too."""

    outcome: str
    reason: str = ""
    shared: bool = False


def unwrapped(name: str) -> str:
    """`name` without what wrappers put into it."""
    return _WRAPPERS.sub("", name)


def _tensors(outputs: Any) -> list[Tensor]:
    # Of whatever a model returns: trees, and the attributes of objects.
    found, stack, seen = [], [outputs], {}
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, type | torch.nn.Module):
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            stack += value
        elif hasattr(value, "__dict__"):
            stack += vars(value).values()
        stack += [getattr(value, n) for n in getattr(type(value), "__slots__", ()) if hasattr(value, n)]
    return found


class _Walk:
    # From the outputs, without our Functions' edges to W.
    def __init__(self, outputs: Any) -> None:
        self.functions: list[Node] = []
        # By node those that have an edge to it; None is who called the model.
        self.readers: dict[Node, list[Node | None]] = {}
        # The same of what goes into our Functions as W.
        self.fed: dict[Node, list[Node]] = {}
        self.opaque: set[Node] = set()
        # Functions of others, which may run and read layers where nothing is recorded, as checkpoints do.
        self.hiding: list[str] = []
        stack: list[tuple[Node, Node | None]] = [
            (get_gradient_edge(t).node, None) for t in _tensors(outputs) if t.requires_grad
        ]
        fed: list[tuple[Node | None, Node]] = []
        while stack:
            node, reader = stack.pop()
            if node in self.readers:
                self.readers[node].append(reader)
                continue
            self.readers[node] = [reader]
            edges = _edges(node)
            function = getattr(type(node), "_forward_cls", None)
            if function in _FUNCTIONS:
                self.functions.append(node)
                _, weights = _FUNCTIONS[function]
                fed += [(edges[i], node) for i in weights]
                edges = [None if i in weights else e for i, e in enumerate(edges)]
            elif function is Broadcast and node.plan.kind == "shallow":  # type: ignore[attr-defined]
                edges = edges[: -len(node.hidden)]  # type: ignore[attr-defined]
            elif node.name() in _OPAQUE:
                self.opaque.update(e for e in edges if e is not None and not e.next_functions)
                edges = [e for e in edges if e not in self.opaque]
            elif function is not None and not function.__module__.startswith(_SEEN_THROUGH):
                self.hiding.append(node.name())
            stack += [(e, node) for e in edges if e is not None]
        while fed:
            weight, into = fed.pop()
            if weight is not None:
                if weight not in self.fed:
                    fed += [(e, weight) for e in _edges(weight)]
                self.fed.setdefault(weight, []).append(into)

    def above(self, leaves: set[Node]) -> set[Node]:
        """The nodes that would not be there without these leaves."""
        others: set[Node] = set()
        stack = [n for n in (*self.readers, *self.fed) if not n.next_functions and n not in leaves]
        while stack:
            if (node := stack.pop()) not in others:
                others.add(node)
                stack += [n for n in (*self.readers.get(node, ()), *self.fed.get(node, ())) if n is not None]
        return {*self.readers, *self.fed} - others if leaves else set()

    def carries(self, readers: list[Node | None], weights: list[Node]) -> bool:
        """Whether `readers` make of the weight more than scalars that nothing else enters, as penalties are."""
        made, stack = set(weights), [*readers]
        while stack:
            node = stack.pop()
            if node is None:
                return True
            if node not in made:
                made.add(node)
                if any(output.shape for output in node._input_metadata):
                    stack += self.readers[node]
        return any(e is not None and e not in made for n in made.difference(weights) for e in _edges(n))


def _edges(node: Node) -> list[Node | None]:
    return [next_node for next_node, _ in node.next_functions]


def _leads(node: Node | None, weights: list[Node]) -> bool:
    # Past slices and casts.
    while node is not None and node not in weights:
        node = next(iter(_edges(node)), None)
    return node is not None


def evidence(model: torch.nn.Module, watch: Watch, walk: _Walk, frozen: Iterable[Tensor] = ()) -> dict[str, Finding]:
    """The outcome and the reason of each layer of `model` that has a rule; nothing where no output has a gradient.

    frozen: Parameters that require a gradient for this forward alone, so that their reads are seen.
    """
    if not walk.readers:
        return {}
    lent = {get_gradient_edge(p).node for p in frozen}
    for layer in watch.taken:
        # Of FSDP's Parameters the calls have others.
        if not {*map(id, own(layer))}.isdisjoint(map(id, frozen)):
            lent.update(watch.taken[layer])
    unreal = walk.above(lent)
    acting: set[torch.nn.Module] = set()
    idle: set[torch.nn.Module] = set()
    for node in walk.functions:
        if i := bisect_right(watch.starts, node._sequence_nr()):
            layer, edges = watch.called[i - 1], _edges(node)
            inputs, weights = _FUNCTIONS[type(node)._forward_cls]  # type: ignore[attr-defined]
            # Else somebody called the Function with another weight.
            if layer not in watch.taken or any(_leads(edges[w], watch.taken[layer]) for w in weights):
                below = [edges[k] for k in inputs if edges[k] is not None and edges[k] not in unreal]
                (acting if below or getattr(node, "carries", False) else idle).add(layer)
    of = owners(model)

    def finding(name: str, layer: FeedbackLayer) -> Finding:
        parameters = own(layer)
        parametrizations = f"{name}.parametrizations.".removeprefix(".")
        others = {o: m for p in parameters for o, m in of[id(p)].items() if m is not layer}
        others = {o: m for o, m in others.items() if not o.startswith(parametrizations)}
        nodes = [*watch.taken.get(layer, ()), *(get_gradient_edge(p).node for p in parameters if p.requires_grad)]
        readers = [r for n in dict.fromkeys(nodes) for r in walk.readers.get(n, ())]
        reads = [r for r in readers if not watch.within(r, others.values())]
        reads = [r for r in reads if walk.carries([r], nodes)] if walk.carries(reads, nodes) else []
        called = layer in watch.called or layer in watch.without_gradient or layer in watch.plain
        frozen = not any(p.requires_grad for p in parameters)
        checkpointed = not watch.plain.isdisjoint([layer, *others.values()])
        if reads and layer not in watch.compiled and not checkpointed:
            place = name if isinstance(layer, Registered) else name.rpartition(".")[0]
            # Lists and dictionaries have no forward that reads.
            while place and type(model.get_submodule(place)).forward is torch.nn.Module.forward:
                place = place.rpartition(".")[0]
            kind = type(model.get_submodule(place))
            where = f"{place or '(root)'} ({kind.__name__})"
            allows = "" if ours_of(kind) else f"; {ALLOWS}({name_of(kind)})"
            into = "the model's output" if reads[0] is None else reads[0].name()
            why = f"its weight goes into {into} without a call of the layer; see {where}{allows}"
            return Finding("called and read" if called else "read", why, bool(others))
        if layer in acting:
            if frozen or checkpointed:
                return Finding("converted", _FROZEN if frozen else _CHECKPOINTED)
            return Finding("proven", f"its weight is {next(iter(others)) or '(root)'}'s too" if others else "")
        if layer in watch.compiled or any(n in walk.opaque for n in nodes):
            return Finding("converted", "not proven: compiled or replicated, cannot be seen")
        if layer in idle or (layer in watch.plain and layer not in watch.called):
            return Finding("converted", _IDLE)
        if layer in watch.called:
            return Finding("unused", "called, but no gradient of the outputs comes to it")
        if called:
            return Finding("converted", "not proven: called without gradients, as in reentrant checkpointing")
        if callers := [o for o, m in others.items() if m in watch.called or watch.spans.get(m)]:
            return Finding("unused", f"its weight is {callers[0] or '(root)'}'s too, and only that was called")
        if any(n in walk.fed for n in nodes):
            return Finding(
                "converted", "not proven: not called, and its weight goes into a function that has a B of its own"
            )
        if readers:
            return Finding("unused", "not called, and nothing but a scalar is made of its weight, as a penalty is")
        for hidden, why in (
            (any(hasattr(p, "full_tensor") for p in parameters), "its weight is sharded, so a read cannot be seen"),
            (frozen, "its weight is frozen, so only check sees a read"),
            (walk.hiding, f"{next(iter(walk.hiding), '')} may hide a read"),
        ):
            if hidden:
                return Finding("converted", f"not proven: not called, and {why}")
        return Finding("unused", "no gradient of the outputs comes to it")

    found = {}
    parts: set[torch.nn.Module] = set()
    for name, layer in model.named_modules():
        if isinstance(layer, FeedbackLayer) and layer.uses_feedback and layer not in parts:
            results = {", ".join(layer.weights()): finding(name, layer)}
            for part, child in layer.named_children():
                if isinstance(child, FeedbackLayer):
                    parts.add(child)
                    results[f"{part}.weight"] = finding(f"{name}.{part}".removeprefix("."), child)
            found[name] = _together(results)
    return found


def _together(results: dict[str, Finding]) -> Finding:
    # Of the weights of one layer.
    first, *others = results.values()
    if all(f.outcome == first.outcome for f in others):
        return first
    if read := [f for f in results.values() if f.outcome in ("read", "called and read")]:
        return read[0]
    each = (f"{weight} {f.reason if f.outcome == 'converted' else f.outcome}" for weight, f in results.items())
    return Finding("converted", "; ".join(each))


def note(report: Report, model: torch.nn.Module, found: dict[str, Finding]) -> None:
    """Write what was found into the rows of `report`, and warn of weights that are called and read."""
    for name in (n for n, f in found.items() if f.outcome == "called and read"):
        layer = cast(FeedbackLayer, model.get_submodule(name))
        layer.read_besides = True
        if layer.gather_again is not None:
            layer.gather_again()
    modules = {unwrapped(name): module for name, module in model.named_modules()}
    results = {unwrapped(name): finding for name, finding in found.items()}
    warned = [
        f"{name or '(root)'}: {f.reason}"
        for name, f in found.items()
        if f.outcome == "called and read" or (f.outcome == "read" and f.shared)
    ]
    for i, row in enumerate(report.rows):
        if row.outcome in ("left", "restored"):
            continue
        name = unwrapped(row.name)
        # A wrapper of one layer, as an adapter, holds it under a name of its own.
        inner = [finding for n, finding in results.items() if f"{n}.".startswith(f"{name}.")]
        outcome, why, _ = results.get(name) or (inner[0] if len(inner) == 1 else Finding("converted", UNSEEN))
        kind = type(modules.get(name))
        if not inner and not issubclass(kind, FeedbackLayer) and kind.__module__.startswith("torch.nn."):
            outcome, why = "left", f"was replaced by a {kind.__name__}: convert_ the model again"
            warned.append(f"{row.name} {why}")
        kept = row.reason.removesuffix(UNSEEN).removesuffix("; ")
        rule = "backprop" if outcome == "left" else row.rule
        report.rows[i] = replace(row, outcome=outcome, rule=rule, reason="; ".join(filter(None, (kept, why))))
    if warned:
        warnings.warn("a rule does not act everywhere: " + "; ".join(warned), stacklevel=2)


class Once:
    """Forward hooks on the root: the first forward with gradients is the proof, and the hooks are gone."""

    watch: Watch | None = None
    # Who made the call that is watched, and how many calls of the root are under way within it.
    caller: FrameType | None = None
    depth: int = 0

    def __init__(self, report: Report) -> None:
        self.report = report

    def __call__(self, root: torch.nn.Module, args: Any, *outputs: Any) -> None:
        if is_compiling() or torch._C._get_tracing_state() is not None or getattr(root, "_is_replica", False):
            return
        if self.watch is not None and self.watch.thread != threading.get_ident():
            return
        if not outputs:
            self._begin(root, sys._getframe(1))
        elif self.depth:
            self.depth -= 1
        else:
            hidden = block_outputs(root)
            watch = self._close()
            if watch is None or not (found := evidence(root, watch, _Walk((outputs, hidden)))):
                return
            forget(root)
            note(self.report, root, found)
            read = [f"{n or '(root)'}: {f.reason}" for n, f in found.items() if f.outcome == "read" and not f.shared]
            if read:
                raise RuntimeError(
                    "; ".join(read) + ". No rule acts there: convert_(model, …, example=x) leaves such layers to "
                    "back-propagation, filter_fn= any. This is said once"
                )

    def _begin(self, root: torch.nn.Module, caller: FrameType) -> None:
        frame: FrameType | None = caller
        while frame is not None and frame is not self.caller:
            frame = frame.f_back
        if frame is not None:
            self.depth += 1
            return
        # Also after a call that never came to an end, as by an interrupt.
        self._close()
        if torch.is_grad_enabled() and block_outputs(root) is not None:
            self.watch, self.caller = Watch(root), caller

    def _close(self) -> Watch | None:
        watch = self.watch
        self.watch, self.caller, self.depth = None, None, 0
        if watch is not None:
            watch.close()
        return watch

    def __getstate__(self) -> dict[str, Any]:
        return {"report": self.report}


def prove_later(model: torch.nn.Module, report: Report) -> None:
    """Put the hooks on `model`, in the place of those of before."""
    once = Once(report)
    model.register_forward_pre_hook(once)
    model.register_forward_hook(once, always_call=True)


def forget(model: torch.nn.Module) -> None:
    """Take the hooks off `model`."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, Once)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)


class Proof(NamedTuple):
    """`evidence` of a call; the modules that were called, those whose weights are read, and what may hide a read."""

    found: dict[str, Finding]
    called: set[torch.nn.Module]
    read: set[torch.nn.Module]
    hiding: list[str]


def prove(
    model: torch.nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], plain: Iterable[torch.nn.Module] = ()
) -> Proof:
    """What one call shows that leaves no trace, of the layers that have a rule and of `plain`.

    Raises ValueError for a model with a lazy layer, and what the call raises.
    """
    for name, module in model.named_modules():
        if any(map(torch.nn.parameter.is_lazy, [*module._parameters.values(), *module._buffers.values()])):
            checks.fail("model", "one that was called, so that all shapes are known", f"a lazy {name or 'root'}")
    weights: list[Tensor] = [p for layer in plain for p in layer.parameters(recurse=False)]
    weights += [p for layer in model.modules() if isinstance(layer, FeedbackLayer) for p in own(layer)]
    # Their reads have no edge.
    frozen = [p for p in weights if p.is_floating_point() and not p.requires_grad]
    called: set[torch.nn.Module] = set()
    other: set[torch.nn.Module] = set()
    copies: dict[int, Tensor] = {}
    with unchanged(model), torch.inference_mode(False), torch.enable_grad():
        for layer in model.modules():
            forget(layer)
            if not isinstance(layer, torch.jit.ScriptModule):
                layer.register_forward_pre_hook(lambda module, _: called.add(module))
            if isinstance(layer, FeedbackLayer) and runs_ours(type(layer)):
                layer.register_forward_hook(partial(_compare, other), with_kwargs=True)
        for parameter in frozen:
            parameter.requires_grad_()
        watch = Watch(model, plain, eager=True)
        try:
            inputs, keywords = tree_map_only(Tensor, partial(_copy, copies), (inputs, keywords))
            outputs = model(*inputs, **keywords)
        finally:
            watch.close()
        walk = _Walk(outputs)
        read, of = set(), owners(model)
        for layer in plain:
            others = {m for p in layer.parameters(recurse=False) for m in of[id(p)].values()} - {layer}
            nodes = [get_gradient_edge(p).node for p in layer.parameters(recurse=False) if p.requires_grad]
            readers = [r for n in nodes for r in walk.readers.get(n, ()) if not watch.within(r, others)]
            if walk.carries(readers, nodes):
                read.add(layer)
        found = evidence(model, watch, walk, frozen)
        for name, layer in model.named_modules():
            if layer in other and name in found:
                found[name] = found[name]._replace(reason="; ".join(filter(None, (found[name].reason, _OTHER))))
        return Proof(found, called, read, walk.hiding)


def _compare(other: set[torch.nn.Module], layer: Any, args: Any, kwargs: dict[str, Any], ours: Any) -> None:
    with torch.no_grad():
        theirs = layer._theirs.forward(layer, *args, **kwargs)
    if theirs.shape != ours.shape or (theirs - ours).norm() > 0.05 * ours.norm():
        other.add(layer)


def _copy(copies: dict[int, Tensor], given: Tensor) -> Tensor:
    # One of each, for what is written in place; and what was made in inference mode cannot be saved for a backward.
    if id(given) not in copies:
        copy = given.clone()
        copies[id(given)] = copy.detach().requires_grad_(given.requires_grad) if given.is_leaf else copy
    return copies[id(given)]
