"""The rules: where the sign and where the magnitude of a layer's feedback matrix B come from.

A linear map y = x Wᵀ + b keeps its forward product and its weight gradient; only the input gradient changes, dX = dY B.
`scale` is the root mean square of B's entries for every rule:

* a number;
* "xiao": 1/√in for a linear map, √(2/(∏kernel · out_channels)) for a convolution, groups not divided out
  (Xiao et al. 2018, official code);
* "xavier": √(2/(fan_in + fan_out)) (Glorot and Bengio 2010);
* "torch": 1/√(3 · fan_in), that of torch.nn's default initialisation;
* "match": ‖W‖_F/√numel at each call (Moskovitz et al. 2018, strict normalisation);
* "initial": ‖W₀‖_F/√numel, W₀ the weight when the rule is given to the layer (the same, initial normalisation).

Fans are torch.nn.init's; those of a locally-connected layer are the fans of one position's block.
"""

import hashlib
import math
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from . import ops
from .backends.reference.philox import LAYOUT_VERSION

Scale = float | Literal["xiao", "xavier", "torch", "match", "initial"]
Entries = Literal["uniform", "normal", "constant"]
_SCALES = ("xiao", "xavier", "torch", "match", "initial")
# The seeded draws have these root mean squares at scale 1.
_UNIT_RMS = {"uniform": 1.0 / math.sqrt(3.0), "normal": 1.0, "constant": 1.0}


@dataclass(frozen=True)
class Rule:
    """Base of the rules, each of which states the B, of W's shape, in dX = dY B.

    `name` is the string that stands for the rule with its defaults; `scale`, B's root mean square, and `entries`, how
    its magnitudes are drawn, mean the same in all rules. Raises ValueError or TypeError for an argument that does not
    fit.
    """

    name: ClassVar[str]
    sign_of_weight: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "scale":
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if not (math.isfinite(value) and value > 0 if number else value in _SCALES):
                    raise ValueError(f"scale: expected a positive finite number or one of {_SCALES}, got {value!r}")
            elif field.name == "stored" and not isinstance(value, bool):
                raise TypeError(f"stored: expected True or False, got {value!r}")
            elif field.name == "entries":
                allowed = tuple(_UNIT_RMS) if isinstance(self, FeedbackAlignment) else ("uniform", "normal")
                if value not in allowed:
                    raise ValueError(f"entries: expected one of {allowed}, got {value!r}")


@dataclass(frozen=True)
class Backprop(Rule):
    """B = W: ordinary back-propagation, the control that other libraries call "sham"."""

    name: ClassVar[str] = "backprop"


@dataclass(frozen=True)
class SignSymmetry(Rule):
    """uSF: B = s · sign(W), s constant (Liao et al. 2016; Xiao et al. 2018, eq. 2). No state."""

    name: ClassVar[str] = "usf"
    sign_of_weight: ClassVar[bool] = True
    scale: Scale = "xiao"


@dataclass(frozen=True)
class FixedMagnitude(Rule):
    """frSF: B = sign(W) ∘ |M|, M drawn once (Liao et al. 2016). Seeded: a key; `stored`: |M| is a Parameter."""

    name: ClassVar[str] = "frsf"
    sign_of_weight: ClassVar[bool] = True
    scale: Scale = "xavier"
    entries: Literal["uniform", "normal"] = "uniform"
    stored: bool = False


@dataclass(frozen=True)
class BatchMagnitude(Rule):
    """brSF: B = sign(W) ∘ |M|, M redrawn exactly when W changes (Liao et al. 2016), its stream a hash of all of W."""

    name: ClassVar[str] = "brsf"
    sign_of_weight: ClassVar[bool] = True
    scale: Scale = "xavier"
    entries: Literal["uniform", "normal"] = "uniform"


@dataclass(frozen=True)
class FeedbackAlignment(Rule):
    """FA: B fixed and random (Lillicrap et al. 2016). `entries`: "uniform", "normal" or "constant" (random ±s).

    Seeded: a key and no tensor. `stored`: B is the Parameter `feedback_weight`, with the values the key draws.
    """

    name: ClassVar[str] = "fa"
    scale: Scale = "xavier"
    entries: Entries = "uniform"
    stored: bool = False


@dataclass(frozen=True)
class SignedInit(Rule):
    """FA with B = s · sign(W₀), the signs at initialisation or conversion, one bit each (Xiao et al. 2018, code)."""

    name: ClassVar[str] = "fa_signed_init"
    scale: Scale = "xiao"


@dataclass(frozen=True)
class SignConcordance(Rule):
    """B = s · sign(W) ∘ c: of c's fixed random entries a fraction `p` is 1, the others −1, one bit a weight.

    The control of Liao et al. 2016: p = 1 is uSF, p = ½ has no sign in common with W but by chance.
    """

    name: ClassVar[str] = "concordance"
    sign_of_weight: ClassVar[bool] = True
    p: float = 0.9
    scale: Scale = "xiao"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.p, bool) or not isinstance(self.p, int | float) or not 0 <= self.p <= 1:
            raise ValueError(f"p: expected a number from 0 to 1, got {self.p!r}")


@dataclass(frozen=True)
class _Learned(FeedbackAlignment):
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


@dataclass(frozen=True)
class WeightMirror(_Learned):
    """B follows W through noise (Akrout et al. 2019): `bk.mirror_` is the mirror phase, training leaves B alone.

    `scale` is the root mean square that `mirror_` normalises B to. The first B is drawn as for `fa`.
    """

    name: ClassVar[str] = "wm"


RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        *(Backprop, SignSymmetry, FixedMagnitude, BatchMagnitude, FeedbackAlignment, SignedInit),
        *(SignConcordance, KolenPollack, WeightMirror),
    )
}


def as_rule(feedback: "str | Rule | None", argument: str = "feedback") -> Rule:
    """The rule a user's `feedback=` means: a name, a rule, or None for back-propagation."""
    if feedback is None:
        return Backprop()
    if isinstance(feedback, Rule):
        return feedback
    if not isinstance(feedback, str):
        raise TypeError(f"{argument}: expected a rule, its name or None, got {type(feedback).__name__}")
    if feedback not in RULES:
        raise ValueError(f"{argument}: expected one of {', '.join(RULES)}, got {feedback!r}")
    return RULES[feedback]()


class Fans(NamedTuple):
    """What a layer's shape says about scales: torch.nn.init's fans, and Xiao et al.'s constant."""

    fan_in: int
    fan_out: int
    xiao: float


def linear_fans(weight: Tensor) -> Fans:
    """Fans of a linear weight (out, in)."""
    return Fans(weight.shape[1], weight.shape[0], 1.0 / math.sqrt(max(weight.shape[1], 1)))


def conv_fans(weight: Tensor, out_channels: int) -> Fans:
    """Fans of a convolution weight (c0, c1, *kernel), transposed or not."""
    kernel = math.prod(weight.shape[2:])
    return Fans(weight.shape[1] * kernel, weight.shape[0] * kernel, math.sqrt(2.0 / max(kernel * out_channels, 1)))


def lc_fans(weight: Tensor, out_channels: int) -> Fans:
    """Fans of one position's block (O, *kernel, C/groups) of a locally-connected weight, transposed or not."""
    d = (weight.dim() - 2) // 2
    o, kernel = weight.shape[d], math.prod(weight.shape[d + 1 : -1])
    return Fans(weight.shape[-1] * kernel, o * kernel, math.sqrt(2.0 / max(kernel * out_channels, 1)))


def root_mean_square(scale: Scale, fans: Fans) -> float:
    """The root mean square of B's entries that `scale` asks for; 1 for "match" and "initial", which act on dX."""
    if scale == "xiao":
        return fans.xiao
    if scale == "xavier":
        return math.sqrt(2.0 / max(fans.fan_in + fans.fan_out, 1))
    if scale == "torch":
        return 1.0 / math.sqrt(3.0 * max(fans.fan_in, 1))
    return 1.0 if scale in ("match", "initial") else float(scale)


class Operands(NamedTuple):
    """What the ops take in B's place: see `ops.feedback_weight`. `role` says what W itself serves as."""

    role: Literal["", "sign", "magnitude"]
    signs: Tensor | None
    magnitude: Tensor | None
    key: Tensor | None
    entries: str
    scale: float
    rescale: Tensor | None


BACKPROP = Operands("magnitude", None, None, None, "stored", 1.0, None)


class Plan(NamedTuple):
    """What of a rule's operands is known before a call."""

    role: Literal["", "sign"]
    entries: str
    scale: float
    match: bool
    initial: bool
    redraw: bool


def plan(rule: Rule, rms: float) -> Plan:
    """The plan of a rule other than back-propagation, for a layer whose B has root mean square `rms`."""
    entries, scale = getattr(rule, "entries", "constant"), rms
    if getattr(rule, "stored", False):
        entries, scale = "stored", 1.0
    return Plan(
        "sign" if rule.sign_of_weight else "",
        entries,
        scale / _UNIT_RMS.get(entries, 1.0),
        getattr(rule, "scale", None) == "match",
        getattr(rule, "scale", None) == "initial",
        isinstance(rule, BatchMagnitude),
    )


def operands(
    plan: Plan,
    weight: Tensor,
    signs: Tensor | None = None,
    magnitude: Tensor | None = None,
    key: Tensor | None = None,
) -> Operands:
    """The operands of one call; `signs` are packed signs of W (frozen) or W₀, `magnitude` a stored B or |M|."""
    rescale = weight_rms(weight) if plan.match else None
    if plan.redraw:
        assert key is not None
        key = ops.redraw_key(key, weight.detach())
    return Operands(plan.role if signs is None else "", signs, magnitude, key, plan.entries, plan.scale, rescale)


def weight_rms(weight: Tensor) -> Tensor:
    """‖W‖_F/√numel, 0-dim and at least float32."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # torch adds all squares one after the other, which costs a float32 sum over 4096² of them two digits or more: rows
    # of a few thousand at a time, and the rows in float64.
    first = 1
    while first < weight.dim() - 1 and math.prod(weight.shape[first:]) > 2**13:
        first += 1
    rows = torch.linalg.vector_norm(weight.detach(), dim=tuple(range(first, weight.dim())), dtype=dtype)
    norm = torch.linalg.vector_norm(rows, dtype=torch.float64) / math.sqrt(max(weight.numel(), 1))
    return norm.to(dtype)


def is_seeded(rule: Rule) -> bool:
    """Whether the rule's state is a key."""
    return isinstance(rule, BatchMagnitude) or (
        isinstance(rule, FixedMagnitude | FeedbackAlignment) and not rule.stored
    )


def feedback_key(seed: int, name: str = "") -> Tensor:
    """The key (layout version, key, stream 0) of the layer called `name` under `seed`, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.tensor([LAYOUT_VERSION, int.from_bytes(digest, "little", signed=True), 0], device="cpu")


def random_key() -> Tensor:
    """A key drawn from torch's default generator, as torch.nn's initialisers draw."""
    key = torch.randint(2**63 - 1, (), device="cpu")
    return torch.stack((torch.full_like(key, LAYOUT_VERSION), key, torch.zeros_like(key)))


def draw(rule: Rule, key: Tensor, weight: Tensor, rms: float) -> Tensor:
    """The stored B (`fa`) or |M| (`frsf`) that `key` draws, like `weight`."""
    assert isinstance(rule, FixedMagnitude | FeedbackAlignment)
    scale = rms / _UNIT_RMS[rule.entries]
    b = ops.feedback_weight(
        None, None, None, key.to(weight.device), rule.entries, scale, weight.shape, dtype=weight.dtype
    )
    if rule.sign_of_weight:
        b = b.abs()
    return torch.empty_like(weight.detach()).copy_(b)


def draw_concordance(p: float, key: Tensor, weight: Tensor) -> Tensor:
    """Packed signs of c, shaped as `weight`: 1 with probability `p`, else −1, as `key` draws."""
    u = ops.feedback_weight(None, None, None, key.to(weight.device), "uniform", 1.0, weight.shape, dtype=torch.float32)
    return ops.pack_signs(torch.where(u < 2 * p - 1, 1.0, -1.0))


def flip_signs(signs: Tensor, concordance: Tensor, rows: int) -> Tensor:
    """The packed signs of sign(W) ∘ c; the planes and flags of exact zeros stay W's."""
    return torch.cat((signs[:rows] ^ concordance[:rows], signs[rows:]))
