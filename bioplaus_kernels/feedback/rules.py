"""The rules of the literature: where the sign and where the magnitude of B come from."""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from .. import ops
from ..backends.reference import checks
from ..backends.reference.pack_signs import packed_shape
from .record import Frozen, Key
from .rule import BACKPROP, Operands, Rule, State, check_rule
from .scale import SCALES, UNIT_RMS, Entries, Fans, Scale, root_mean_square, weight_rms


@dataclass(frozen=True)
class Backprop(Rule):
    """B = W: ordinary back-propagation, the control that other libraries call "sham"."""

    name: ClassVar[str] = "backprop"
    transports_weight: ClassVar[bool] = True

    def operands(self, weight: Tensor, state: State) -> Operands:
        return BACKPROP


class Scaled(Rule):
    """A rule with `scale`, B's root mean square. Raises ValueError or TypeError for an argument that does not fit."""

    scale: Scale
    allowed_entries: ClassVar[tuple[str, ...]] = ("uniform", "normal")

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "scale":
                object.__setattr__(self, "scale", checks.scale(value, SCALES))
            elif field.name == "stored":
                checks.boolean("stored", value)
            elif field.name == "entries":
                checks.one_of("entries", value, self.allowed_entries, f"one of {self.allowed_entries}")

    @property
    def keyed(self) -> bool:
        return False

    @property
    def initial(self) -> bool:
        return self.scale == "initial"

    def rms(self, fans: Fans) -> float:
        return root_mean_square(self.scale, fans)

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"scale": weight_rms(weight)} if self.scale == "initial" else {}

    def draw(self, state: State, weight: Tensor, key: Tensor) -> None:
        if self.scale == "initial":
            state["scale"].copy_(weight_rms(weight))

    def rescale(self, weight: Tensor, state: State) -> Tensor | None:
        """What dX is multiplied by: ‖W‖_F/√numel now, or as it was at first."""
        return weight_rms(weight) if self.scale == "match" else state.get("scale")


@dataclass(frozen=True)
class SignSymmetry(Scaled):
    """uSF: B = s · sign(W), s constant (Liao et al. 2016; Xiao et al. 2018, eq. 2). Keeps no tensor."""

    name: ClassVar[str] = "usf"
    sign_of_weight: ClassVar[bool] = True
    scale: Scale = "xiao"

    def operands(self, weight: Tensor, state: State) -> Operands:
        signs = state.get("frozen")
        role: Literal["", "sign"] = "sign" if signs is None else ""
        return Operands(role, signs, None, None, "constant", state["rms"], self.rescale(weight, state))

    def adopt_biotorch(self, b: Tensor, rms: float) -> tuple[Rule, dict[str, Tensor]]:
        found = float(b.abs().max()) if b.numel() else 0.0
        if self.initial or (self.scale != "match" and abs(found - rms) > 1e-5 * rms):
            own = "that of a W which is not in the file" if self.initial else f"{rms:.9g}"
            raise ValueError(
                f"its magnitude is {found:.9g}, this layer's scale={self.scale!r} is {own}; "
                f"convert with SignSymmetry(scale={found:.9g}) to train on as BioTorch did"
            )
        return self, {}


class _Drawn(Scaled):
    # Magnitudes, or B itself, are drawn: at each call from the key, or once.
    entries: str
    stored: bool = False

    @property
    def seeded(self) -> bool:
        return not self.stored

    @property
    def keyed(self) -> bool:
        return True

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        kept = super().state(weight)
        return kept | {"weight": Frozen(torch.empty_like(weight.detach()))} if self.stored else kept

    def draw(self, state: State, weight: Tensor, key: Tensor) -> None:
        super().draw(state, weight, key)
        if not self.stored or weight.is_meta:
            return
        scale, size = state["rms"] / UNIT_RMS[self.entries], weight.shape
        b = ops.feedback_weight(None, None, None, key, self.entries, scale, size, dtype=weight.dtype)
        fill(state["weight"], b.abs() if self.sign_of_weight else b)

    def operands(self, weight: Tensor, state: State) -> Operands:
        signs = state.get("frozen") if self.sign_of_weight else None
        role: Literal["", "sign"] = "sign" if self.sign_of_weight and signs is None else ""
        rescale = self.rescale(weight, state)
        if self.stored:
            return Operands(role, signs, state["weight"], None, "stored", 1.0, rescale)
        scale = state["rms"] / UNIT_RMS[self.entries]
        return Operands(role, signs, None, self.stream(weight, state["key"]), self.entries, scale, rescale)

    def stream(self, weight: Tensor, key: Tensor) -> Tensor:
        """The key of this call's draw."""
        return key

    def adopt_biotorch(self, b: Tensor, rms: float) -> tuple[Rule, dict[str, Tensor]]:
        if self.scale in ("match", "initial"):
            raise ValueError(f"expected a rule with a scale that does not follow W, got scale={self.scale!r}")
        return (self if self.stored else replace(self, stored=True)), {"weight": b}  # type: ignore[call-arg]


@dataclass(frozen=True)
class FixedMagnitude(_Drawn):
    """frSF: B = sign(W) ∘ |M|, M drawn once (Liao et al. 2016). Seeded: a key; `stored`: |M| is a Parameter."""

    name: ClassVar[str] = "frsf"
    sign_of_weight: ClassVar[bool] = True
    scale: Scale = "xavier"
    entries: Literal["uniform", "normal"] = "uniform"
    stored: bool = False


@dataclass(frozen=True)
class BatchMagnitude(_Drawn):
    """brSF: B = sign(W) ∘ |M|, M redrawn exactly when W changes (Liao et al. 2016), its stream a hash of W."""

    name: ClassVar[str] = "brsf"
    sign_of_weight: ClassVar[bool] = True
    scale: Scale = "xavier"
    entries: Literal["uniform", "normal"] = "uniform"

    def stream(self, weight: Tensor, key: Tensor) -> Tensor:
        return ops.redraw_key(key, weight.detach())

    def outdated(self, key: Key) -> str:
        if key.version > 1:
            return ""
        return (
            "brsf: a key of layout version 1 takes its stream from 64 elements of W, and misses updates of others "
            "alone; reset_feedback() or convert_ gives one of this version, with another draw"
        )

    def adopt_biotorch(self, b: Tensor, rms: float) -> tuple[Rule, dict[str, Tensor]]:
        # BioTorch draws this one without a seed.
        return self, {}


@dataclass(frozen=True)
class FeedbackAlignment(_Drawn):
    """FA: B fixed and random (Lillicrap et al. 2016). `entries`: "uniform", "normal" or "constant" (random ±s).

    Seeded: a key and no tensor. `stored`: B is the Parameter `feedback_weight`, with the values the key draws.
    """

    name: ClassVar[str] = "fa"
    allowed_entries: ClassVar[tuple[str, ...]] = tuple(UNIT_RMS)
    scale: Scale = "xavier"
    entries: Entries = "uniform"
    stored: bool = False


@dataclass(frozen=True)
class SignedInit(Scaled):
    """FA with B = s · sign(W₀), the signs at initialisation or conversion, two bits each (Xiao et al. 2018, code)."""

    name: ClassVar[str] = "fa_signed_init"
    scale: Scale = "xiao"

    @property
    def keyed(self) -> bool:
        return False

    @property
    def initial(self) -> bool:
        return True

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        return super().state(weight) | _signs(weight)

    def draw(self, state: State, weight: Tensor, key: Tensor) -> None:
        super().draw(state, weight, key)
        state["signs"].copy_(ops.pack_signs(weight))

    def operands(self, weight: Tensor, state: State) -> Operands:
        return Operands("", state["signs"], None, None, "constant", state["rms"], self.rescale(weight, state))


@dataclass(frozen=True)
class SignConcordance(Scaled):
    """B = s · sign(W) ∘ c: of c's fixed random entries a fraction `p` is 1, the others −1, packed, two bits a weight.

    The control of Liao et al. 2016: p = 1 is uSF, p = ½ has no sign in common with W but by chance.
    """

    name: ClassVar[str] = "concordance"
    sign_of_weight: ClassVar[bool] = True
    p: float = 0.9
    scale: Scale = "xiao"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "p", checks.fraction("p", self.p, ValueError))

    @property
    def keyed(self) -> bool:
        return True

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        return super().state(weight) | _signs(weight)

    def draw(self, state: State, weight: Tensor, key: Tensor) -> None:
        super().draw(state, weight, key)
        u = ops.feedback_weight(None, None, None, key, "uniform", 1.0, weight.shape, dtype=torch.float32)
        state["signs"].copy_(ops.pack_signs(torch.where(u < 2 * self.p - 1, 1.0, -1.0)))

    def operands(self, weight: Tensor, state: State) -> Operands:
        own = state.get("frozen")
        own, rows = ops.pack_signs(weight.detach()) if own is None else own, weight.shape[0]
        # The planes and flags of exact zeros stay W's.
        signs = torch.cat((own[:rows] ^ state["signs"][:rows], own[rows:]))
        return Operands("", signs, None, None, "constant", state["rms"], self.rescale(weight, state))


@dataclass(frozen=True)
class _Learned(FeedbackAlignment):
    fixed: ClassVar[bool] = False
    stored: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stored:
            raise ValueError(f"stored: expected True with {self.name!r}, which learns B, got False")


@dataclass(frozen=True)
class KolenPollack(_Learned):
    """B a Parameter that takes W's own gradient (Kolen and Pollack 1994; Akrout et al. 2019).

    ΔW = −η δ hᵀ − η λ W and ΔB = −η δ hᵀ − η λ B, so W − B shrinks as (1 − η λ)ᵗ under AdamW, and under SGD without
    momentum, with learning rate η and weight decay λ. `feedback_weight` belongs in W's parameter group. The first B is
    drawn as for `fa`.
    """

    name: ClassVar[str] = "kp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale in ("match", "initial"):
            raise ValueError(f"scale: expected one that does not follow W, as B learns its own, got {self.scale!r}")

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": torch.nn.Parameter(torch.empty_like(weight.detach()))}


class _Product(torch.autograd.Function):
    # W, whose gradient G becomes Pᵀ G of the factor Q.
    @staticmethod
    def forward(ctx: Any, weight: Tensor, q: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(p)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor) -> tuple[Tensor, Tensor, None]:
        (p,) = ctx.saved_tensors
        # As in `factors`.
        return grad_weight, p.t().to(grad_weight.dtype).mm(grad_weight.flatten(1)), None


@dataclass(frozen=True)
class LowRank(Scaled):
    """B = P Q of rank at most `rank`, P (rows, rank) and Q (rank, columns) for W as a matrix of weight.shape[0] rows.

    A linear layer's input gradient is two thin products, (dY P) Q, and B is never formed; other layers form B in their
    backward. Both factors are drawn from the key, P's entries with root mean square 1/√rank, Q's with that which
    `scale` states, and kept. With `learned` Q is a Parameter that takes the gradient Pᵀ ΔW, for a linear layer
    (dY P)ᵀ x, and P stays: product feedback alignment (Li and Benna 2024, there R and B, with a rank of several times
    the rows). Q belongs in W's parameter group: with weight decay Q → Pᵀ W, so B → P Pᵀ W, which is about W for a large
    rank. Without, a fixed B of controlled rank.
    """

    name: ClassVar[str] = "low_rank"
    _factored: ClassVar[bool] = True
    rank: int = 8
    learned: bool = False
    scale: Scale = "xavier"
    entries: Literal["uniform", "normal"] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rank", checks.integer("rank", self.rank, 1))
        checks.boolean("learned", self.learned)
        if self.learned and self.scale in ("match", "initial"):
            raise ValueError(f"scale: expected one that does not follow W, as Q learns, got {self.scale!r}")

    @property
    def keyed(self) -> bool:
        return True

    @property
    def fixed(self) -> bool:  # type: ignore[override]
        return not self.learned

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        like = weight.detach()
        p, q = like.new_empty(weight.shape[0], self.rank), like.new_empty(self.rank, weight[:1].numel())
        kept = torch.nn.Parameter(q) if self.learned else Frozen(q)
        return super().state(weight) | {"p": Frozen(p), "q": kept}

    def draw(self, state: State, weight: Tensor, key: Tensor) -> None:
        super().draw(state, weight, key)
        if weight.is_meta:
            return
        for stream, (name, rms) in enumerate((("p", self.rank**-0.5), ("q", state["rms"])), 1):
            own = torch.stack((key[0], key[1], key[2] + stream))
            scale, size = rms / UNIT_RMS[self.entries], state[name].shape
            drawn = ops.feedback_weight(None, None, None, own, self.entries, scale, size, dtype=weight.dtype)
            fill(state[name], drawn)

    def factors(self, weight: Tensor, state: State) -> tuple[Tensor, Tensor]:
        # FSDP's mixed precision casts W, and not what it was told to leave whole.
        return state["p"].to(weight.dtype), state["q"].to(weight.dtype)

    def operands(self, weight: Tensor, state: State) -> Operands:
        return Rule.operands(self, weight, state)._replace(rescale=self.rescale(weight, state))

    def learning(self, weight: Tensor, trained: Tensor, state: State) -> Tensor:
        return cast(Tensor, _Product.apply(weight, trained, state["p"]))


@dataclass(frozen=True)
class WeightMirror(_Learned):
    """B follows W through noise (Akrout et al. 2019): `bk.mirror_` is the mirror phase, training leaves B alone.

    `scale` is the root mean square that `mirror_` normalises B to. The first B is drawn as for `fa`.
    """

    name: ClassVar[str] = "wm"
    mirrors: ClassVar[bool] = True


RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        *(Backprop, SignSymmetry, FixedMagnitude, BatchMagnitude, FeedbackAlignment, SignedInit),
        *(SignConcordance, KolenPollack, LowRank, WeightMirror),
    )
}


@dataclass(frozen=True)
class InputHidden(Rule):
    """Of recurrent layers one rule for the input-to-hidden weights and another for the hidden-to-hidden ones.

    Each is a rule, the name of one, or None for back-propagation; the projection of an LSTM is hidden-to-hidden. Layers
    that are not recurrent have the first.
    """

    name: ClassVar[str] = "input_hidden"
    input: Rule
    hidden: Rule

    def __init__(self, input: Rule | str | None, hidden: Rule | str | None) -> None:
        for part, rule in (("input", input), ("hidden", hidden)):
            object.__setattr__(self, part, as_rule(rule, part))

    def of(self, name: str) -> Rule:
        return self.hidden if name.startswith(("weight_hh", "weight_hr")) else self.input

    @property
    def transports_weight(self) -> bool:  # type: ignore[override]
        return self.input.transports_weight and self.hidden.transports_weight

    @property
    def sign_of_weight(self) -> bool:  # type: ignore[override]
        return self.input.sign_of_weight or self.hidden.sign_of_weight

    @property
    def mirrors(self) -> bool:  # type: ignore[override]
        return self.input.mirrors or self.hidden.mirrors

    @property
    def initial(self) -> bool:
        return self.input.initial or self.hidden.initial

    def operands(self, weight: Tensor, state: State) -> Operands:
        raise NotImplementedError("a layer takes the operands of each weight's own rule")


def as_rule(feedback: "str | Rule | None", argument: str = "feedback") -> Rule:
    """The rule a user's `feedback=` means: a name, a rule, or None for back-propagation."""
    if feedback is None:
        return Backprop()
    if isinstance(feedback, Rule):
        return check_rule(feedback, argument)
    checks.instance(argument, feedback, str, "a rule, its name or None")
    if feedback not in RULES:
        raise ValueError(f"{argument}: expected one of {', '.join(RULES)}, got {feedback!r}")
    return RULES[feedback]()


def fill(target: Tensor, values: Tensor) -> None:
    """Copy `values`, of the whole shape, into `target`, which may be sharded."""
    if torch.distributed.is_available():
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(target, DTensor) and not isinstance(values, DTensor):
            # Every rank has drawn the same.
            values = distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(values)


def whole(tensor: Tensor) -> Tensor:
    """`tensor`, or all of one that is sharded, which every rank has to ask for."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _signs(weight: Tensor) -> dict[str, Tensor]:
    return {"signs": torch.zeros(packed_shape(weight.shape), dtype=torch.int32, device=weight.device)}
