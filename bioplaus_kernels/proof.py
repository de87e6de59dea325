"""Whether a rule acts: one forward, and a walk of its autograd graph from the outputs to the weights."""

import re
import sys
import threading
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.compiler import is_compiling
from torch.utils._pytree import tree_map_only

from ._restore import buffers
from .backends.reference import checks
from .functional._bilinear import _Bilinear
from .functional._conv import _Conv
from .functional._linear import _Linear
from .functional._locally_connected import _LocallyConnected, _LocallyConnectedTranspose
from .functional._recurrent import _Recurrent
from .nn.base import FeedbackLayer
from .register import ALLOWS, Registered, name_of, ours_of

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
# torch.compile's and DataParallel's: they have W among their inputs whether the layer is called or not.
_OPAQUE = ("CompiledFunctionBackward", "BroadcastBackward")


@dataclass(frozen=True)
class Row:
    """What became of one module. `outcome` is, of a layer that has a rule,

    "proven": called, and the gradient of the outputs passes through its B;
    "called and read": called, and its weight is read by something else too, which B does not reach;
    "read": its weight is read, and the layer never called: back-propagation;
    "unused": no gradient of the outputs comes to it;
    "converted": it has the rule, and `reason` says why that is not proven;

    else "left", "restored", or, from `check`, "called", or, from `distributed.fully_shard`, "gathered once" or
    "gathered twice".
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


Finding = tuple[str, str]


def unwrapped(name: str) -> str:
    """`name` without what wrappers put into it."""
    return _WRAPPERS.sub("", name)


class Watch:
    """Notes each call of a layer of `model` that has a rule, until `close`.

    Meanwhile a layer whose input needs no gradient goes through its Function too, so that its call is told from a read.
    """

    def __init__(self, model: torch.nn.Module, eager: bool = False) -> None:
        # The number of autograd's next node at each call: a layer's Function is the first one of ours after it.
        self.starts: list[int] = []
        self.called: list[FeedbackLayer] = []
        self.without_gradient: set[torch.nn.Module] = set()
        self.checkpointed: set[torch.nn.Module] = set()
        self.first: torch.nn.Module | None = None
        self.thread = threading.get_ident()
        # What the calls took for W: of FSDP, functional_call or a parametrization no Parameter of the layer.
        self.taken: dict[torch.nn.Module, list[Node]] = {}
        # What torch.compile runs, unless it is told not to.
        self.compiled = set() if eager else {m for c in model.modules() if _is_compiled(c) for m in c.modules()}
        self._before: list[tuple[torch.nn.Module, dict[str, Any]]] = []
        for layer in model.modules():
            if isinstance(layer, FeedbackLayer) and layer not in self.compiled:
                own = vars(layer)
                self._before.append((layer, {n: own[n] for n in ("used", "is_plain") if n in own}))
                own["used"] = partial(self._used, layer, layer.used)
                own["is_plain"] = partial(self._is_plain, layer, layer.is_plain)

    def close(self) -> None:
        for layer, before in self._before:
            for name in ("used", "is_plain"):
                vars(layer).pop(name, None)
            vars(layer).update(before)
        self._before = []

    def _used(self, layer: FeedbackLayer, used: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if is_compiling() or self.thread != threading.get_ident():
            return used(*args, **kwargs)
        if not torch.is_grad_enabled():
            self.without_gradient.add(layer)
            return used(*args, **kwargs)
        self.starts.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self.called.append(layer)
        if self.first is layer:
            # No B for nothing.
            self.first, kwargs = None, {**kwargs, "feedback": False}
        weight, op = used(*args, **kwargs)
        if weight.requires_grad:
            self.taken.setdefault(layer, []).append(get_gradient_edge(weight).node)
        return weight, op

    def _is_plain(self, layer: FeedbackLayer, is_plain: Callable[[Tensor], bool], input: Tensor) -> bool:
        if not is_plain(input):
            return False
        if not layer.uses_feedback or is_compiling() or self.thread != threading.get_ident():
            return True
        if torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters()):
            # Checkpointing computes again what is saved now, and then there is no Watch.
            hooks: object = torch._C._autograd._top_saved_tensors_default_hooks(True)
            if hooks is None:
                self.first = layer
                return False
            self.checkpointed.add(layer)
        self.without_gradient.add(layer)
        return True


def _is_compiled(module: torch.nn.Module) -> bool:
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


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
    def __init__(self, tensors: list[Tensor]) -> None:
        # And whether a gradient goes through B.
        self.functions: list[tuple[Node, bool]] = []
        # Node: the name of a node that reads it.
        self.read: dict[Node, str] = {}
        self.opaque: set[Node] = set()
        stack: list[tuple[Node, str]] = [(get_gradient_edge(t).node, "the model's output") for t in tensors]
        while stack:
            node, reader = stack.pop()
            if node in self.read:
                continue
            self.read[node] = reader
            name, edges = node.name(), [next_node for next_node, _ in node.next_functions]
            if (function := getattr(type(node), "_forward_cls", None)) in _FUNCTIONS:
                inputs, weights = _FUNCTIONS[function]
                acts = getattr(node, "carries", False) or any(edges[i] is not None for i in inputs)
                self.functions.append((node, acts))
                edges = [None if i in weights else e for i, e in enumerate(edges)]
            elif name in _OPAQUE:
                self.opaque.update(e for e in edges if e is not None and not e.next_functions)
                edges = [e for e in edges if e not in self.opaque]
            stack += [(e, name) for e in edges if e is not None]


def _own(layer: FeedbackLayer) -> list[Tensor]:
    # The Parameters that W is or is computed from.
    starts = tuple(start for w in layer.weights() for start in (f"{w}_", f"parametrizations.{w}."))
    return [p for n, p in layer.named_parameters() if n in layer.weights() or n.startswith(starts)]


def evidence(model: torch.nn.Module, watch: Watch, outputs: Any) -> dict[str, Finding]:
    """The outcome and the reason of each layer of `model` that has a rule; nothing where no output has a gradient."""
    tensors = [t for t in _tensors(outputs) if t.requires_grad]
    if not tensors:
        return {}
    walk = _Walk(tensors)
    acting: set[torch.nn.Module] = set()
    idle: set[torch.nn.Module] = set()
    for node, acts in walk.functions:
        if i := bisect_right(watch.starts, node._sequence_nr()):
            (acting if acts else idle).add(watch.called[i - 1])
    owners: dict[int, dict[str, None]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), {})[name] = None

    def finding(name: str, layer: FeedbackLayer) -> Finding:
        own = _own(layer)
        nodes = [*watch.taken.get(layer, ()), *(get_gradient_edge(p).node for p in own if p.requires_grad)]
        reader = next((walk.read[n] for n in nodes if n in walk.read), "")
        parametrizations = f"{name}.parametrizations.".removeprefix(".")
        others = [o for p in own for o in owners[id(p)] if o != name and not o.startswith(parametrizations)]
        called = layer in watch.called or layer in watch.without_gradient
        if layer in watch.checkpointed and layer not in watch.called:
            return "converted", _IDLE
        if reader and not others and layer not in watch.compiled:
            place = name if isinstance(layer, Registered) else name.rpartition(".")[0]
            kind = type(model.get_submodule(place))
            where = f"{place or '(root)'} ({kind.__name__})"
            allows = "" if ours_of(kind) else f"; {ALLOWS}({name_of(kind)})"
            why = f"its weight goes into {reader} without a call of the layer; see {where}{allows}"
            return "called and read" if called else "read", why
        if layer in acting:
            return "proven", f"its weight is {others[0]}'s too" if others else ""
        if layer in watch.compiled or any(n in walk.opaque for n in nodes):
            return "converted", "not proven: compiled or replicated, cannot be seen"
        if layer in idle:
            return "converted", _IDLE
        if layer in watch.called:
            return "unused", "called, but no gradient of the outputs comes to it"
        if called:
            return "converted", "not proven: called without gradients, as in reentrant checkpointing"
        if reader:
            return "unused", f"its weight is {others[0]}'s too, and only that was called"
        if hidden := [word for word, hides in _HIDING.items() if any(map(hides, own))]:
            return "converted", f"not proven: not called, and its weight is {hidden[0]}, so a read cannot be seen"
        return "unused", "no gradient of the outputs comes to it"

    found = {}
    parts: set[torch.nn.Module] = set()
    for name, layer in model.named_modules():
        if isinstance(layer, FeedbackLayer) and layer.uses_feedback and layer not in parts:
            results = [finding(name, layer)]
            for part, child in layer.named_children():
                if isinstance(child, FeedbackLayer):
                    parts.add(child)
                    results.append(finding(f"{name}.{part}".removeprefix("."), child))
            found[name] = next((f for f in results if f[0] != "proven"), results[0])
    return found


_HIDING: dict[str, Callable[[Tensor], bool]] = {
    "sharded": lambda p: hasattr(p, "full_tensor"),
    "frozen": lambda p: not p.requires_grad,
}


def note(report: Report, model: torch.nn.Module, found: dict[str, Finding]) -> None:
    """Write what was found into the rows of `report`, and warn of weights that are called and read."""
    modules = {unwrapped(name): module for name, module in model.named_modules()}
    results = {unwrapped(name): finding for name, finding in found.items()}
    warned = [f"{name or '(root)'}: {why}" for name, (outcome, why) in found.items() if outcome == "called and read"]
    for i, row in enumerate(report.rows):
        if row.outcome in ("left", "restored"):
            continue
        name = unwrapped(row.name)
        # A wrapper of one layer, as an adapter, holds it under a name of its own.
        inner = [finding for n, finding in results.items() if f"{n}.".startswith(f"{name}.")]
        outcome, why = results.get(name) or (inner[0] if len(inner) == 1 else ("converted", UNSEEN))
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

    def __init__(self, report: Report) -> None:
        self.report = report
        self.watch: Watch | None = None

    def __call__(self, root: torch.nn.Module, args: Any, *outputs: Any) -> None:
        if is_compiling() or torch._C._get_tracing_state() is not None or getattr(root, "_is_replica", False):
            return
        if self.watch is not None and self.watch.thread != threading.get_ident():
            return
        if not outputs:
            self._close()
            if torch.is_grad_enabled():
                self.watch = Watch(root)
        elif (watch := self._close()) is not None and (found := evidence(root, watch, outputs)):
            forget(root)
            note(self.report, root, found)
            if read := [f"{name or '(root)'}: {why}" for name, (outcome, why) in found.items() if outcome == "read"]:
                raise RuntimeError(
                    "; ".join(read) + ". No rule acts there: convert_(model, …, example=x) leaves such layers to "
                    "back-propagation, filter_fn= any. This is said once"
                )

    def _close(self) -> Watch | None:
        watch, self.watch = self.watch, None
        if watch is not None:
            watch.close()
        return watch

    def __getstate__(self) -> dict[str, Any]:
        return {"report": self.report, "watch": None}


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


def prove(
    model: torch.nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[dict[str, Finding], set[torch.nn.Module], set[int]]:
    """`evidence` of one call that leaves no trace; the modules that were called, and the Parameters that were reached.

    Raises ValueError for a model with a lazy layer, and what the call raises.
    """
    called: set[torch.nn.Module] = set()
    with _unchanged(model), torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
        for layer in model.modules():
            forget(layer)
            layer.register_forward_pre_hook(lambda module, _: called.add(module))
            # A frozen weight's reads have no edge.
            for parameter in _own(layer) if isinstance(layer, FeedbackLayer) else ():
                parameter.requires_grad_()
        watch = Watch(model, eager=True)
        try:
            inputs, keywords = tree_map_only(Tensor, _trainable, (inputs, keywords))
            outputs = model(*inputs, **keywords)
        finally:
            watch.close()
        found = evidence(model, watch, outputs)
        walk = _Walk([t for t in _tensors(outputs) if t.requires_grad])
        parameters = [p for p in model.parameters() if p.requires_grad]
        return found, called, {id(p) for p in parameters if get_gradient_edge(p).node in walk.read}


def _trainable(given: Tensor) -> Tensor:
    # What was made in inference mode cannot be saved for a backward.
    return given.clone() if given.is_inference() else given


@contextmanager
def _unchanged(model: torch.nn.Module) -> Iterator[None]:
    # Attributes, what lists and dicts of them hold, buffers, and who requires a gradient.
    for name, module in model.named_modules():
        if any(map(torch.nn.parameter.is_lazy, [*module._parameters.values(), *module._buffers.values()])):
            checks.fail("model", "one that was called, so that all shapes are known", f"a lazy {name or 'root'}")
    modules = [(m, dict(vars(m))) for m in model.modules()]
    held = [(v, v.copy()) for _, own in modules for v in own.values() if isinstance(v, dict | list | set)]
    contents = [(b, b.clone()) for b in model.buffers()]
    gradients = [(p, p.requires_grad) for p in model.parameters()]
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(buffers(model))
        try:
            yield
        finally:
            for module, own in modules:
                vars(module).clear()
                vars(module).update(own)
            for value, content in held:
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(content)
            with torch.no_grad():
                # By another name than the buffer's, which is that of a copy meanwhile.
                for buffer, before in contents:
                    if buffer.shape != before.shape:
                        buffer.data = before
                    elif not torch.equal(buffer, before):
                        buffer.copy_(before)
            for parameter, requires in gradients:
                parameter.requires_grad_(requires)
