"""What a proof notes in a forward: the calls of the layers that have a rule, and of what else owns their weights."""

import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.compiler import is_compiling

from .nn.base import FeedbackLayer

_OPEN = 2**64


def own(layer: FeedbackLayer) -> list[Tensor]:
    """The Parameters that W is or is computed from."""
    starts = tuple(start for w in layer.weights() for start in (f"{w}_", f"parametrizations.{w}."))
    found: list[Tensor] = [p for n, p in layer.named_parameters() if n in layer.weights() or n.startswith(starts)]
    # A registered class may name it otherwise.
    return found or [p for n, p in layer.named_parameters(recurse=False) if n != "bias" and "feedback_" not in n]


def owners(model: torch.nn.Module) -> dict[int, dict[str, torch.nn.Module]]:
    """By the id of each Parameter the modules that hold it, by their names."""
    found: dict[int, dict[str, torch.nn.Module]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            found.setdefault(id(parameter), {})[name] = module
    return found


def _number() -> int:
    # Of the node that autograd makes next.
    return torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]


class Watch:
    """Notes each call of a layer of `model` that has a rule, and of what shares a weight with it or with `plain`.

    Until `close` a layer whose input needs no gradient goes through its Function too, so that its call is told from a
    read.
    """

    def __init__(self, model: torch.nn.Module, plain: Iterable[torch.nn.Module] = (), eager: bool = False) -> None:
        # The number of autograd's next node at each call: a layer's Function is the first one of ours after it.
        self.starts: list[int] = []
        self.called: list[FeedbackLayer] = []
        self.without_gradient: set[torch.nn.Module] = set()
        # Called as torch.nn's own, since their inputs needed no gradient.
        self.plain: set[torch.nn.Module] = set()
        self.first: torch.nn.Module | None = None
        self.thread = threading.get_ident()
        # What the calls took for W: of FSDP, functional_call or a parametrization no Parameter of the layer.
        self.taken: dict[FeedbackLayer, list[Node]] = {}
        # The numbers, from and to, of the nodes that each call made of another module which owns a layer's W.
        self.spans: dict[torch.nn.Module, list[list[int]]] = {}
        # What torch.compile runs, unless it is told not to.
        self.compiled = set() if eager else {m for c in model.modules() if _is_compiled(c) for m in c.modules()}
        self._before: list[tuple[torch.nn.Module, dict[str, Any]]] = []
        self._hooks: list[Any] = []
        of = owners(model)
        tied = {m for layer in plain for p in layer.parameters(False) for m in of[id(p)].values() if m is not layer}
        for layer in model.modules():
            if isinstance(layer, FeedbackLayer) and layer not in self.compiled:
                before = vars(layer)
                self._before.append((layer, {n: before[n] for n in ("used", "is_plain") if n in before}))
                before["used"] = partial(self._used, layer, layer.used)
                before["is_plain"] = partial(self._is_plain, layer, layer.is_plain)
                tied |= {m for p in own(layer) for m in of[id(p)].values()} - {*layer.modules()}
        for module in tied - self.compiled:
            if not isinstance(module, FeedbackLayer):
                self._follow(module, module is model)

    def _follow(self, module: torch.nn.Module, is_root: bool) -> None:
        spans = self.spans[module] = []
        if is_root or isinstance(module, torch.jit.ScriptModule):
            # Is called already, or takes no hooks.
            spans.append([0, _OPEN])
            return
        self._hooks += [
            module.register_forward_pre_hook(partial(self._begins, spans)),
            module.register_forward_hook(partial(self._ends, spans), always_call=True),
        ]

    def _begins(self, spans: list[list[int]], *_: Any) -> None:
        if self.thread == threading.get_ident():
            spans.append([_number(), _OPEN])

    def _ends(self, spans: list[list[int]], *_: Any) -> None:
        if self.thread == threading.get_ident() and (last := [s for s in spans if s[1] == _OPEN]):
            last[-1][1] = _number()

    def within(self, node: Node | None, modules: Iterable[torch.nn.Module]) -> bool:
        """Whether a call of one of `modules` made `node`."""
        if node is None:
            return False
        number = node._sequence_nr()
        return any(start <= number < end for m in modules for start, end in self.spans.get(m, ()))

    def close(self) -> None:
        for layer, before in self._before:
            for name in ("used", "is_plain"):
                vars(layer).pop(name, None)
            vars(layer).update(before)
        for hook in self._hooks:
            hook.remove()
        self._before, self._hooks = [], []

    def _used(self, layer: FeedbackLayer, used: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if is_compiling() or self.thread != threading.get_ident():
            return used(*args, **kwargs)
        if layer.uses_feedback and any(hasattr(p, "full_tensor") for p in own(layer)):
            raise RuntimeError(
                f"{layer.called(layer.weights()[0])}: it is called with a sharded weight: under FSDP2 by a method "
                "that is not its block's forward, for which torch has register_fsdp_forward_method; or as tensor "
                "parallelism makes it, which takes no rule but back-propagation: leave the layer by filter_fn="
            )
        if not torch.is_grad_enabled():
            self.without_gradient.add(layer)
            return used(*args, **kwargs)
        self.starts.append(_number())
        self.called.append(layer)
        if self.first is layer:
            # No B for nothing.
            self.first, kwargs = None, {**kwargs, "feedback": False}
        weight, op = used(*args, **kwargs)
        if weight.requires_grad and weight.is_inference():
            raise RuntimeError(
                f"{layer.called(layer.weights()[0])}: what is made in torch.inference_mode cannot be trained; copy or "
                "load the model outside"
            )
        if weight.requires_grad:
            self.taken.setdefault(layer, []).append(get_gradient_edge(weight).node)
        return weight, op

    def _is_plain(self, layer: FeedbackLayer, is_plain: Callable[[Tensor], bool], input: Tensor) -> bool:
        if not is_plain(input):
            return False
        if not layer.uses_feedback or is_compiling() or self.thread != threading.get_ident():
            return True
        if not torch.is_grad_enabled():
            self.without_gradient.add(layer)
            return True
        # Checkpointing computes again what is saved now, and then there is no Watch.
        hooks: object = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is None and any(p.requires_grad for p in layer.parameters()):
            self.first = layer
            return False
        self.plain.add(layer)
        return True


def _is_compiled(module: torch.nn.Module) -> bool:
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
