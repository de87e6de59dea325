"""What a rule is: the B, of W's shape, in dX = dY B, and the state that it takes."""

from contextlib import nullcontext
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor

from .record import Key
from .scale import Fans

# What a rule keeps for one weight, by name, and beside it "rms", the float of `Rule.rms`; in a call "key", the tensor
# (layout version, key, 0), if the rule is `seeded`, and within `frozen_signs` "frozen", W's packed signs.
State = dict[str, Any]


class Operands(NamedTuple):
    """What stands for B in a call: a cell of the ops' table (see `ops.feedback_weight`), times `rescale`.

    `role` says what W itself serves as. With entries="factors" B = signs · magnitude, two matrices of the weight's
    dtype, is reshaped as the weight.
    """

    role: Literal["", "sign", "magnitude"]
    signs: Tensor | None
    magnitude: Tensor | None
    key: Tensor | None
    entries: str
    scale: float
    rescale: Tensor | None


class _Both(torch.autograd.Function):
    # W, whose gradient B takes as well.
    @staticmethod
    def forward(ctx: Any, weight: Tensor, b: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor) -> tuple[Tensor, Tensor]:
        return grad_weight, grad_weight


BACKPROP = Operands("magnitude", None, None, None, "stored", 1.0, None)


def stored(b: Tensor, rescale: Tensor | None = None) -> Operands:
    """The operands that are B itself."""
    return Operands("", None, b, None, "stored", 1.0, rescale)


@dataclass(frozen=True, eq=False, repr=False)
class Stateful:
    """What a rule keeps for a weight, and how that is drawn.

    `state` says what: tensors by name, in the form they have there. A plain tensor becomes the buffer
    `feedback_<name>`; a `Frozen` the Parameter `feedback_<name>` that is never trained; another Parameter is trained,
    by the weight's own gradient or what `Rule.learning` makes of it. `draw` fills them, from a key that the layer has
    of convert_'s seed or of torch's generator. A state_dict carries them, and a record of rule, key and content too.

    The name of its class and the fields of the dataclass identify a rule, with what else its class and itself hold:
    numbers, strings, enums, dtypes and tuples, lists and dictionaries of these. What was saved under others does not
    load. A field(compare=False) does not count.
    """

    # The string that stands for the rule with its defaults.
    name: ClassVar[str]
    # Whether B is W itself.
    transports_weight: ClassVar[bool] = False
    # Whether what is kept stays as it was drawn. If not it learns, and its content is no part of the record.
    fixed: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if {"draw", "seeded"} & own.keys() and "keyed" not in own:
            cls.keyed = property(lambda self: True)  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and identity(self) == identity(other)

    def __hash__(self) -> int:
        return hash((type(self), repr(identity(self))))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v in identity(self)[1].items())})"

    def of(self, name: str) -> Any:
        """The rule of the weight that a layer calls `name`: itself, but of a rule made of others."""
        return self

    def among(self, names: list[str]) -> Any:
        """The one rule of the weights `names`, or itself where they have several."""
        rules = [self.of(name) for name in names]
        return rules[0] if all(rule == rules[0] for rule in rules) else self

    @property
    def seeded(self) -> bool:
        """Whether a call reads the key."""
        return False

    @property
    def keyed(self) -> bool:
        """Whether B depends on a key: where a rule has a `draw` of its own, or is seeded, unless it says no."""
        return False

    @property
    def initial(self) -> bool:
        """Whether what is kept is of W when the rule is given, so that no key can draw it again."""
        return False

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        """What is kept for `weight`, on its device, not drawn yet."""
        return {}

    def draw(self, state: State, weight: Tensor, key: Tensor) -> None:
        """Fill what is kept, in place, from `key`; called under no_grad."""

    def outdated(self, key: Key) -> str:
        """What to warn of where a file's key is of an older layout that means something else."""
        return ""


@dataclass(frozen=True, eq=False, repr=False)
class Rule(Stateful):
    """Base of the rules. One of a user's own has `name`, one of `matrix`, `factors` and `operands`, and state if any.

    B has W's shape; dX = dY B. Of a class and those it is made from, the last that has one of the three says what B is.
    """

    _factored: ClassVar[bool] = False

    # Whether W's signs are read, which frozen_signs packs once for many calls.
    sign_of_weight: ClassVar[bool] = False
    # Whether what is kept as "weight" is what `mirror_` teaches.
    mirrors: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if {"matrix", "factors"} & own.keys() and "operands" not in own:
            cls.operands = Rule.operands  # type: ignore[method-assign]
            cls._factored = "factors" in own
            if cls.transports_weight and "transports_weight" not in own:
                cls.transports_weight = False

    def rms(self, fans: Fans) -> float:
        """The root mean square of B's entries, before `rescale`."""
        return 1.0

    def matrix(self, weight: Tensor, state: State) -> Tensor:
        """B, in the weight's shape, dtype and device.

        Called once a call, in the forward, under no_grad and without autocast, on that call's W in its own dtype; the
        result is kept until the backward. It must be traceable by torch.compile.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected one of matrix, factors and operands, got none")

    def factors(self, weight: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """P (weight.shape[0], r) and Q (r, numel/weight.shape[0]) with B = P Q, called as `matrix` is.

        A linear layer's dX is (dY P) Q; other layers form B in their backward.
        """
        raise NotImplementedError

    def operands(self, weight: Tensor, state: State) -> Operands:
        """What stands for B in a call, `matrix` or `factors` unless a rule has a cell of the ops' table."""
        # The meta device has no autocast.
        exact = nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False)
        with torch.no_grad(), exact:
            if self._factored:
                found = self.factors(weight.detach(), state)
                if not isinstance(found, tuple) or len(found) != 2:
                    raise TypeError(f"{type(self).__name__}.factors: expected two tensors, got {type(found).__name__}")
                p, q = found
                rank = p.shape[1] if isinstance(p, Tensor) and p.dim() == 2 else 1
                self._fits("factors", p, weight, (weight.shape[0], rank))
                self._fits("factors", q, weight, (rank, weight[:1].numel()))
                return Operands("", p, q, None, "factors", 1.0, None)
            b = self.matrix(weight.detach(), state)
            self._fits("matrix", b, weight, tuple(weight.shape))
            return stored(b)

    def _fits(self, method: str, found: Any, weight: Tensor, shape: tuple[int, ...]) -> None:
        if not isinstance(found, Tensor):
            raise TypeError(f"{type(self).__name__}.{method}: expected a tensor, got {type(found).__name__}")
        got = tuple(found.shape), found.dtype, found.device
        if got != (shape, weight.dtype, weight.device):
            raise ValueError(
                f"{type(self).__name__}.{method}: expected shape {shape}, {weight.dtype} on {weight.device}, "
                f"got {got[0]}, {got[1]} on {got[2]}"
            )

    def learning(self, weight: Tensor, trained: Tensor, state: State) -> Tensor:
        """W for the forward product, such that what is trained learns from its gradient: by default that very gradient.

        A rule whose trained Parameter is not of W's shape, or learns by another gradient, says so here.
        """
        return cast(Tensor, _Both.apply(weight, trained))

    def adopt_biotorch(self, b: Tensor, rms: float) -> tuple["Rule", dict[str, Tensor]]:
        """The rule, and what it keeps, of a layer that BioTorch saved with `weight_backward` b.

        Raises ValueError, saying what is expected instead, where that is not this rule.
        """
        raise ValueError(f"expected none with feedback={self.name!r}")


def check_rule(rule: Rule, argument: str) -> Rule:
    """`rule`, if it says what B is."""
    kind = type(rule)
    if kind.matrix is Rule.matrix and kind.factors is Rule.factors and kind.operands is Rule.operands:
        raise TypeError(f"{argument}: expected a rule with one of matrix, factors and operands, got {kind.__name__}")
    if not isinstance(getattr(rule, "name", None), str):
        raise TypeError(f"{argument}: expected a rule with a name, a string, got {kind.__name__}")
    try:
        identity(rule)
    except TypeError as error:
        raise TypeError(f"{argument}: {error}") from error
    return rule


def identity(rule: Stateful) -> tuple[str, dict[str, Any]]:
    """What a file says of `rule`: its class, and the names and values of what it holds, as JSON gives them back.

    Raises TypeError for a value that a file cannot hold.
    """
    kind = type(rule)
    values: dict[str, Any] = {}
    own = [c for c in reversed(kind.__mro__) if issubclass(c, Stateful) and not c.__module__.startswith(_PACKAGE)]
    for c in own:
        values |= {n: v for n, v in vars(c).items() if not (n.startswith("_") or callable(v) or hasattr(v, "__get__"))}
    left_out = {f.name for f in fields(rule) if not f.compare}
    values |= {f.name: getattr(rule, f.name) for f in fields(rule)}
    held = getattr(rule, "__dict__", {})
    values |= {n: v for n, v in held.items() if not hasattr(kind, n) or n in values}
    return kind.__name__, {n: _plain(kind, n, v) for n, v in values.items() if n not in left_out and n != "name"}


_PACKAGE = __name__.partition(".")[0] + "."


def _plain(kind: type, name: str, value: Any) -> Any:
    if isinstance(value, Enum | torch.dtype):
        return str(value)
    if isinstance(value, Stateful):
        return list(identity(value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(kind, name, v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(kind, name, v) for k, v in value.items()}
    raise TypeError(
        f"{kind.__name__}.{name}: expected numbers, strings, enums, dtypes, or lists and dictionaries of them, which "
        f"identify a rule in a file, got {type(value).__name__}; tensors are for state(), what does not count for "
        "field(compare=False)"
    )
