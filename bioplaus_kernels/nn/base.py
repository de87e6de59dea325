"""What every layer with a feedback rule has: the rule, and B in a call."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import ops
from .._restore import sharded
from ..backends.reference import checks
from ..feedback import BACKPROP, Fans, Operands, Record, Rule, State, as_rule, encode, fill, weight_rms, whole
from ..functional import CUT, captured, formed, needs_feedback
from .agree import mean_over_ranks
from .held import FrozenSigns, version_of
from .in_forward import in_forward
from .state import StatefulLayer


class FeedbackLayer(StatefulLayer):
    """Mixin before a torch.nn class: `feedback=`, a rule, and what it keeps for each weight (`StatefulLayer`)."""

    _feedback: Rule
    # Whether no backward may read W: distributed.fully_shard frees it after the forward. What gathers it again.
    reads_no_weight: bool = False
    gather_again: Callable[[], None] | None = None
    # Whether a proof has seen W read without a call of the layer.
    read_besides: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # torch.nn's arguments and ours, where the constructor is the one below: for help() and skip_init.
        theirs = [c for c in cls.__mro__ if not issubclass(c, StatefulLayer)]
        plain = next(c for c in theirs if c.__module__.startswith("torch.nn.modules."))
        if cls.__init__ is FeedbackLayer.__init__ and plain is not torch.nn.Module:
            own = [p for p in inspect.signature(plain).parameters.values() if p.kind is not p.VAR_KEYWORD]
            ours = inspect.Parameter("feedback", inspect.Parameter.KEYWORD_ONLY, default=None)
            cls.__signature__ = inspect.Signature([*own, ours])  # type: ignore[attr-defined]

    def __init__(self, *args: Any, feedback: Rule | str | None = None, **kwargs: Any) -> None:
        rule = as_rule(feedback)
        super().__init__(*args, **kwargs)
        self.install_feedback(rule.among(self.weights()))

    @property
    def feedback(self) -> Rule:
        """The rule."""
        return self._feedback

    def fans(self, name: str = "weight") -> Fans:
        """Fans of weight `name`."""
        raise NotImplementedError

    def _constants(self, rule: Rule, name: str) -> State:
        return {"rms": rule.rms(self.fans(name))}

    def reset_parameters(self) -> None:
        """torch.nn's initialisation, then fresh feedback."""
        super().reset_parameters()  # type: ignore[misc]
        if "_feedback" in self.__dict__:
            self.reset_feedback()

    def rms(self, name: str = "weight") -> float:
        """The root mean square of B's entries; 1 for scale="match" and "initial"."""
        return self._feedback.of(name).rms(self.fans(name))

    def used(
        self, name: str = "weight", weight: Tensor | None = None, *, feedback: bool = True
    ) -> tuple[Tensor, Operands]:
        """`weight`, else W fetched once, for this call's forward product, and what stands for B; W if not `feedback`.

        A gradient that W takes goes to a trained B too.
        """
        if weight is None:
            weight = self.weight_of(name)
        if not self.uses_feedback or name not in self._held:
            return weight, BACKPROP
        if weight.shape != self._held[name].shape:
            self._resized(name, weight)
        if captured():
            return weight, CUT
        trained = self._held[name].trained
        learns = trained and weight.requires_grad and torch.is_grad_enabled()
        if not feedback and not learns:
            return weight, BACKPROP
        state = self._call_state(name, weight)
        op = self._rule(name).operands(weight, state) if feedback else BACKPROP
        if self.reads_no_weight and is_compiling():
            op = in_forward(op)
        if learns:
            weight = self._rule(name).learning(weight, cast(Tensor, self._parameters[trained]), state)
        return weight, op

    def _rule(self, name: str) -> Rule:
        return cast(Rule, self._held[name].rule)

    def _call_state(self, name: str, weight: Tensor) -> State:
        state = self._state(name, weight)
        if self.reads_no_weight and self._rule(name).sign_of_weight and "frozen" not in state:
            return {**state, "frozen": ops.pack_signs(weight.detach())}
        return state

    def _resized(self, name: str, weight: Tensor) -> None:
        # By structured pruning, or transformers' resize_token_embeddings.
        held = self._held[name]
        if held.shape is not None and held.kept:
            raise ValueError(
                f"{self.called(name)}: its weight has shape {tuple(weight.shape)}, and its feedback that of "
                f"{tuple(held.shape)} before: convert_ the model again after pruning or resizing"
            )
        held.constants, held.shape = held.constants | self._constants(self._rule(name), name), weight.shape

    def _replicate_for_data_parallel(self) -> Any:
        # What a proof puts in their place is the original's.
        replica = super()._replicate_for_data_parallel()
        for name in ("used", "is_plain"):
            vars(replica).pop(name, None)
        return replica

    def is_plain(self, input: Tensor) -> bool:
        """Whether this call is torch.nn's own: no gradient can go back through `input` and none to B."""
        if not self.uses_feedback:
            return True
        if needs_feedback(input) or captured():
            return False
        if self.reads_no_weight and torch.is_grad_enabled():
            # torch's convolution keeps W for a gradient that nobody wants.
            return False
        return not (torch.is_grad_enabled() and any(h.trained for h in self._held.values()))

    @torch.no_grad()
    def feedback_matrix(self, name: str = "weight") -> Tensor:
        """B of weight `name`, as the next backward would use it, in the weight's shape and dtype.

        Of a sharded weight (FSDP2) all of B, for which every rank has to call. Raises ValueError for a name that is not
        among `weights()`.
        """
        checks.one_of("name", name, self.weights())
        weight = whole(self.weight_of(name))
        if not self.uses_feedback or name not in self._held:
            return weight.detach().clone()
        state = {n: whole(value) for n, value in self._state(name, weight).items()}
        return formed(self._rule(name).operands(weight, state), weight)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        if self.uses_feedback and prefix + "weight_backward" in state_dict:
            self._adopt_biotorch(state_dict, prefix, lists[2])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def _adopt_biotorch(self, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> None:
        # BioTorch saves B (fa), |M| (frsf) or s · sign(W) (usf) as weight_backward, and a bias_backward it never uses.
        # The dictionary is load_state_dict's own copy.
        b = state_dict.pop(prefix + "weight_backward")
        state_dict.pop(prefix + "bias_backward", None)
        try:
            rule, kept = self._feedback.adopt_biotorch(b, self._held["weight"].constants["rms"])
        except ValueError as error:
            error_msgs.append(f"{prefix}weight_backward: {error}")
            return
        if rule != self._feedback:
            self.install_feedback(rule)
        held = self._held["weight"]
        if kept:
            state_dict.update({prefix + held.kept[n]: tensor for n, tensor in kept.items()})
        else:
            own = Record(*self._identity(rule), held.key, held.sums)
            state_dict.setdefault(prefix + held.record, encode(own))

    def extra_repr(self) -> str:
        """torch.nn's, and the rule."""
        return ", ".join(filter(None, (super().extra_repr(), f"feedback={self._feedback}")))


@contextmanager
def frozen_signs(model: torch.nn.Module) -> Iterator[None]:
    """Pack the signs of every weight of `model` once, for all forward and backward calls in the block.

    For gradient accumulation: no optimizer step inside, since the block keeps the signs it began with. Layers whose
    rule does not take its signs from W are unaffected. Raises RuntimeError for a block within a block, and at the end
    of one in which the signs of a Parameter changed, by writes that torch counts (`.data`'s are not) or another one in
    its place; TypeError for a model that is no torch.nn.Module.
    """
    checks.module("model", model)
    layers = [m for m in model.modules() if isinstance(m, FeedbackLayer) and m.feedback.sign_of_weight]
    if nested := next((m for m in layers if m._frozen is not None), None):
        raise RuntimeError(f"frozen_signs: the signs of {nested} are frozen already")
    versions = []
    try:
        for layer in layers:
            named = [name for name in layer._held if layer._rule(name).sign_of_weight]
            parameters = [(name, layer._parameters.get(name)) for name in named]
            versions += [(layer, name, w, version_of(w)) for name, w in parameters if w is not None]
            signs = {name: ops.pack_signs(whole(layer.weight_of(name)).detach()) for name in named}
            layer._frozen = FrozenSigns(signs)
        yield
        for layer, name, weight, version in versions:
            now, frozen = layer._parameters.get(name), vars(layer).get("_frozen")
            if now is None or frozen is None or (now is weight and version_of(now) == version):
                continue
            if not torch.equal(ops.pack_signs(whole(now).detach()), frozen.signs[name]):
                wanted = "step the optimizer, or load a state, after the block, which kept the signs that it began with"
                raise RuntimeError(f"frozen_signs: signs of the {name} of {layer} changed in the block: {wanted}")
    finally:
        for layer in layers:
            vars(layer).pop("_frozen", None)


@torch.no_grad()
def mirror_(
    model: torch.nn.Module,
    *,
    lr: float = 0.1,
    decay: float = 0.0,
    batch_size: int = 64,
    normalise: bool = True,
    generator: torch.Generator | None = None,
) -> None:
    """One mirror phase of every `wm` layer of `model`: B ← (1 − decay) B + lr · mean over the batch of y ξᵀ.

    ξ ~ N(0, 1) enters the layer alone, one receptive field wide, and y = W ξ is its response without bias and
    nonlinearity, so E[y ξᵀ] = W (Akrout et al. 2019). With `normalise` B is then scaled to the root mean square
    that the rule's `scale` states; without it decay = lr has the fixed point B = W.

    Draws from `generator`, else from torch's. Where `fully_shard` (FSDP2) has sharded W, or `model` is a
    DistributedDataParallel, the phase is the mean over the ranks; the ranks of any other data parallelism need the same
    state of the generator. Raises ValueError where no layer has the rule `wm`.
    """
    checks.module("model", model)
    lr, decay = checks.fraction("lr", lr), checks.fraction("decay", decay)
    batch_size = checks.integer("batch_size", batch_size, 1)
    checks.boolean("normalise", normalise)
    if generator is not None:
        checks.instance("generator", generator, torch.Generator, "a torch.Generator or None")
    sharded(model)
    layers = [m for m in model.modules() if isinstance(m, FeedbackLayer) and m.feedback.mirrors]
    if not layers:
        raise ValueError("model: expected a layer with the rule 'wm', got none")
    for layer in layers:
        for name in (n for n in layer._held if layer._rule(n).mirrors):
            weight, kept = whole(layer.weight_of(name)), getattr(layer, layer._held[name].kept["weight"])
            b = whole(kept)
            if generator is not None and generator.device.type != weight.device.type:
                checks.fail("generator", f"one on {weight.device}, as the weights are", f"one on {generator.device}")
            # (positions, rows, columns): only locally-connected weights, of d dimensions, have more than one position.
            d = getattr(layer, "d", 0)
            w = (weight.flatten(0, d - 1) if d else weight.unsqueeze(0)).flatten(2)
            # A transposed layer's input is on the rows.
            w = w.transpose(1, 2) if getattr(layer, "transposed", False) else w
            noise = torch.empty(batch_size, w.shape[2], dtype=w.dtype, device=w.device).normal_(generator=generator)
            response = noise @ w.transpose(1, 2)
            seen = response.transpose(1, 2) @ noise / batch_size
            seen = seen.transpose(1, 2) if getattr(layer, "transposed", False) else seen
            seen = whole(mean_over_ranks(model, layer.weight_of(name), seen.reshape(b.shape)))
            b.mul_(1 - decay).add_(seen, alpha=lr)
            if normalise:
                b.mul_(layer.rms(name) / weight_rms(b))
            if b is not kept:
                fill(kept, b)
