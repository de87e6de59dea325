"""What every layer with a feedback rule has: the rule, its state, and B."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends.reference import checks
from ..backends.reference.philox import LAYOUT_VERSION
from ..feedback import (
    BACKPROP,
    Backprop,
    BatchMagnitude,
    Fans,
    FeedbackAlignment,
    FixedMagnitude,
    KolenPollack,
    Operands,
    Rule,
    SignConcordance,
    SignedInit,
    SignSymmetry,
    WeightMirror,
    as_rule,
    draw,
    draw_concordance,
    flip_signs,
    is_seeded,
    operands,
    plan,
    random_key,
    root_mean_square,
    weight_rms,
)
from ..functional import needs_feedback

Keys = Callable[[str], Tensor]


def supported(weight: Tensor) -> bool:
    """Whether a rule other than back-propagation can take `weight`."""
    return weight.dtype in checks.DTYPES


_SUFFIXES = ("key", "weight", "signs", "scale")


class _Both(torch.autograd.Function):
    # W, whose gradient B takes as well.
    @staticmethod
    def forward(ctx: Any, weight: Tensor, b: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor) -> tuple[Tensor, Tensor]:
        return grad_weight, grad_weight


class FeedbackLayer(torch.nn.Module):
    """Mixin before a torch.nn class: `feedback=` and the state that its rule needs, one entry for each weight.

    For the weight called `weight` the state is called

    * `feedback_key`, an int64 buffer (layout version, key, 0), for seeded `fa`, `frsf` and `brsf`;
    * `feedback_weight`, a Parameter without gradient, for stored `fa` (B) and `frsf` (|M|), and for `wm` (B);
      with W's gradient for `kp` (B);
    * `feedback_signs`, a buffer, the packed signs of W₀ for `fa_signed_init`, of c for `concordance`;
    * `feedback_scale`, a buffer, for scale="initial";

    and `in_proj_feedback_key` for `in_proj_weight`. `backprop` and `usf` keep nothing.
    """

    _feedback: Rule
    # Set by frozen_signs: packed signs of each weight, until the block ends.
    _frozen: dict[str, Tensor] | None = None
    # True from to_empty() on a meta module until the state is drawn or loaded again.
    _state_lost: bool = False

    def __init__(self, *args: Any, feedback: Rule | str | None = None, **kwargs: Any) -> None:
        rule = as_rule(feedback)
        super().__init__(*args, **kwargs)
        self.install_feedback(rule)

    @property
    def feedback(self) -> Rule:
        """The rule."""
        return self._feedback

    @property
    def uses_feedback(self) -> bool:
        """Whether B is anything but W."""
        return not isinstance(self._feedback, Backprop)

    def weights(self) -> list[str]:
        """Names of the weights that have a B."""
        return ["weight"]

    def fans(self, name: str = "weight") -> Fans:
        """Fans of weight `name`."""
        raise NotImplementedError

    def install_feedback(self, rule: Rule, key: Keys | None = None) -> None:
        """Make `rule` the layer's, with fresh state as in `reset_feedback`."""
        for name in self.weights():
            weight = getattr(self, name)
            if not isinstance(rule, Backprop) and not supported(weight):
                raise TypeError(f"feedback: {rule.name!r} takes a floating weight, got {name} of {weight.dtype}")
            for suffix in _SUFFIXES:
                attribute = _state(name, suffix)
                if attribute in self._buffers or attribute in self._parameters:
                    delattr(self, attribute)
            if is_seeded(rule):
                self.register_buffer(
                    _state(name, "key"), torch.zeros(3, dtype=torch.int64, device=weight.device), persistent=True
                )
            elif isinstance(rule, FixedMagnitude | FeedbackAlignment):
                stored = torch.empty_like(weight, requires_grad=False)
                trained = isinstance(rule, KolenPollack)
                self.register_parameter(_state(name, "weight"), torch.nn.Parameter(stored, requires_grad=trained))
            elif isinstance(rule, SignedInit | SignConcordance):
                self.register_buffer(_state(name, "signs"), ops.pack_signs(weight.detach()))
            if getattr(rule, "scale", None) == "initial":
                self.register_buffer(_state(name, "scale"), weight_rms(weight))
        self._feedback = rule
        self._plans = {} if isinstance(rule, Backprop) else {n: plan(rule, self.rms(n)) for n in self.weights()}
        self.reset_feedback(key)

    def rms(self, name: str = "weight") -> float:
        """The root mean square of B's entries; 1 for scale="match" and "initial"."""
        return root_mean_square(getattr(self._feedback, "scale", 1.0), self.fans(name))

    @torch.no_grad()
    def reset_feedback(self, key: Keys | None = None) -> None:
        """Draw the rule's state again: from `key(weight name)`, or from torch's generator as torch.nn draws."""
        rule = self._feedback
        for name in self.weights():
            weight = getattr(self, name)
            if isinstance(rule, SignedInit):
                getattr(self, _state(name, "signs")).copy_(ops.pack_signs(weight))
            elif isinstance(rule, BatchMagnitude | FixedMagnitude | FeedbackAlignment | SignConcordance):
                own = random_key() if key is None else key(name)
                if isinstance(rule, SignConcordance):
                    getattr(self, _state(name, "signs")).copy_(draw_concordance(rule.p, own, weight))
                elif is_seeded(rule):
                    getattr(self, _state(name, "key")).copy_(own)
                elif not weight.is_meta:
                    getattr(self, _state(name, "weight")).copy_(draw(rule, own, weight, self.rms(name)))
            if getattr(rule, "scale", None) == "initial":
                getattr(self, _state(name, "scale")).copy_(weight_rms(weight))
        self._state_lost = False

    def share_feedback(self, other: "FeedbackLayer") -> None:
        """Take the very state tensors of `other`, a layer that shares this one's weights and has its rule."""
        for name in self.weights():
            for suffix in _SUFFIXES:
                if (state := getattr(other, _state(name, suffix), None)) is not None:
                    setattr(self, _state(name, suffix), state)

    def reset_parameters(self) -> None:
        """torch.nn's initialisation, then fresh feedback."""
        super().reset_parameters()  # type: ignore[misc]
        if "_feedback" in self.__dict__:
            self.reset_feedback()

    def operands(self, name: str = "weight") -> Operands:
        """What stands for B of weight `name` in this call."""
        if self._state_lost:
            raise RuntimeError(
                f"the feedback state of this {type(self).__name__} was lost by to_empty(): "
                "call reset_parameters(), convert_ the model again, or load a state_dict"
            )
        rule, signs, magnitude, key = self._feedback, None, None, None
        if self._frozen is not None:
            signs = self._frozen.get(name)
        if is_seeded(rule):
            key = getattr(self, _state(name, "key"))
        elif isinstance(rule, SignedInit):
            signs = getattr(self, _state(name, "signs"))
        elif isinstance(rule, SignConcordance):
            weight = getattr(self, name)
            own = ops.pack_signs(weight.detach()) if signs is None else signs
            signs = flip_signs(own, getattr(self, _state(name, "signs")), weight.shape[0])
        elif not isinstance(rule, SignSymmetry):
            magnitude = getattr(self, _state(name, "weight"))
        plan = self._plans[name]
        op = operands(plan, getattr(self, name), signs, magnitude, key)
        return op._replace(rescale=getattr(self, _state(name, "scale"))) if plan.initial else op

    def used_weight(self, name: str = "weight") -> Tensor:
        """W for the forward product; for `kp` a gradient that it takes goes to B too, in the first layer as well."""
        weight = getattr(self, name)
        if isinstance(self._feedback, KolenPollack) and weight.requires_grad and torch.is_grad_enabled():
            return _Both.apply(weight, getattr(self, _state(name, "weight")))
        return weight

    def is_plain(self, input: Tensor) -> bool:
        """Whether this call is torch.nn's own: no gradient goes back through `input` and none to B."""
        if self.uses_feedback and needs_feedback(input):
            return False
        return not (isinstance(self._feedback, KolenPollack) and torch.is_grad_enabled())

    def operands_for(self, input: Tensor) -> Operands:
        """`operands()`, or W itself where no gradient goes back through `input` and so nothing of B is wanted."""
        return self.operands() if self.uses_feedback and needs_feedback(input) else BACKPROP

    @torch.no_grad()
    def feedback_matrix(self, name: str = "weight") -> Tensor:
        """B of weight `name`, as the next backward would use it, in the weight's shape and dtype."""
        weight = getattr(self, name)
        if not self.uses_feedback:
            return weight.detach().clone()
        op = self.operands(name)
        sign_source = weight if op.role == "sign" else None
        b = ops.feedback_weight(
            sign_source, op.signs, op.magnitude, op.key, op.entries, op.scale, weight.shape, dtype=weight.dtype
        )
        return b if op.rescale is None else b * op.rescale

    def extra_repr(self) -> str:
        """torch.nn's, and the rule."""
        return ", ".join(filter(None, (super().extra_repr(), f"feedback={self._feedback}")))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        was_meta = any(getattr(self, name).is_meta for name in self.weights())
        super()._apply(fn, recurse)
        if was_meta and not any(getattr(self, name).is_meta for name in self.weights()):
            self._state_lost = any(
                getattr(self, _state(name, suffix), None) is not None for name in self.weights() for suffix in _SUFFIXES
            )
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.uses_feedback and prefix + "weight_backward" in state_dict:
            self._adopt_biotorch(state_dict, prefix, error_msgs)
        for name in self.weights():
            key = state_dict.get(prefix + _state(name, "key"))
            if key is not None and not key.is_meta and (key.shape != (3,) or int(key[0]) not in (1, LAYOUT_VERSION)):
                error_msgs.append(
                    f"{prefix}{_state(name, 'key')}: expected (layout version 1 or {LAYOUT_VERSION}, key, stream), "
                    f"got {key.tolist()}"
                )
        missing = len(missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if len(missing_keys) == missing:
            self._state_lost = False

    def _adopt_biotorch(self, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> None:
        # BioTorch saves B (fa), |M| (frsf) or s · sign(W) (usf) as weight_backward, and a bias_backward it never uses.
        # The dictionary is load_state_dict's own copy.
        rule, b = self._feedback, state_dict.pop(prefix + "weight_backward")
        state_dict.pop(prefix + "bias_backward", None)
        if isinstance(rule, SignSymmetry):
            found = float(b.abs().max()) if b.numel() else 0.0
            own = self.rms()
            if rule.scale != "match" and abs(found - own) > 1e-5 * own:
                error_msgs.append(
                    f"{prefix}weight_backward: its magnitude is {found:.9g}, this layer's scale={rule.scale!r} is "
                    f"{own:.9g}; convert with SignSymmetry(scale={found:.9g}) to train on as BioTorch did"
                )
        elif isinstance(rule, FeedbackAlignment | FixedMagnitude):
            if rule.scale == "match":
                error_msgs.append(f"{prefix}weight_backward: expected a rule with a fixed scale, got scale='match'")
            else:
                if not rule.stored:
                    self.install_feedback(replace(rule, stored=True))
                state_dict[prefix + _state("weight", "weight")] = b
        elif isinstance(rule, BatchMagnitude):
            # BioTorch draws this one without a seed: the layer's own key stays.
            if not self._state_lost:
                state_dict.setdefault(prefix + _state("weight", "key"), self.feedback_key)
        else:
            error_msgs.append(f"{prefix}weight_backward: expected none with feedback={rule.name!r}")


def _state(name: str, suffix: str) -> str:
    # "weight" -> "feedback_key"; "in_proj_weight" -> "in_proj_feedback_key".
    return f"{name.removesuffix('weight')}feedback_{suffix}"


@contextmanager
def frozen_signs(model: torch.nn.Module) -> Iterator[None]:
    """Pack the signs of every weight of `model` once, for all forward and backward calls in the block.

    For gradient accumulation: no optimizer step inside, since the block keeps the signs it began with. Layers whose
    rule does not take its signs from W are unaffected. Raises RuntimeError for a block within a block, TypeError for a
    model that is no torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    layers = [m for m in model.modules() if isinstance(m, FeedbackLayer) and m.feedback.sign_of_weight]
    if nested := next((m for m in layers if m._frozen is not None), None):
        raise RuntimeError(f"frozen_signs: the signs of {nested} are frozen already")
    try:
        for layer in layers:
            layer._frozen = {name: ops.pack_signs(getattr(layer, name).detach()) for name in layer.weights()}
        yield
    finally:
        for layer in layers:
            layer._frozen = None


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

    Draws from `generator`, else from torch's: data-parallel ranks need the same state of it. Raises ValueError where no
    layer has the rule `wm`.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for argument, value in (("lr", lr), ("decay", decay)):
        if not 0 <= value <= 1:
            raise ValueError(f"{argument}: expected a number from 0 to 1, got {value!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size!r}")
    layers = [m for m in model.modules() if isinstance(m, FeedbackLayer) and isinstance(m.feedback, WeightMirror)]
    if not layers:
        raise ValueError("model: expected a layer with the rule 'wm', got none")
    for layer in layers:
        for name in layer.weights():
            weight, b = getattr(layer, name), getattr(layer, _state(name, "weight"))
            # (positions, rows, columns): only locally-connected weights, of d dimensions, have more than one position.
            d = getattr(layer, "d", 0)
            w = (weight.flatten(0, d - 1) if d else weight.unsqueeze(0)).flatten(2)
            # A transposed layer's input is on the rows.
            w = w.transpose(1, 2) if getattr(layer, "transposed", False) else w
            noise = torch.empty(batch_size, w.shape[2], dtype=w.dtype, device=w.device).normal_(generator=generator)
            response = noise @ w.transpose(1, 2)
            seen = response.transpose(1, 2) @ noise / batch_size
            seen = seen.transpose(1, 2) if getattr(layer, "transposed", False) else seen
            b.mul_(1 - decay).add_(seen.reshape(b.shape), alpha=lr)
            if normalise:
                b.mul_(layer.rms(name) / weight_rms(b))
