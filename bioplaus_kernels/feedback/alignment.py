"""The alignments of Kunin et al. 2020: B learns W by a regularisation R of each layer, of its input and both products.

R is made of the primitives of the authors' code, means over samples, with y = W x:

    decay ‖W‖² + ‖B‖²    self −tr(Bᵀ W)    sparse ‖W x‖² + ‖B x‖²    amp −(B x)ᵀ (W x)    null ‖Bᵀ W x‖²

B x is the layer's own product with B in W's place, Bᵀ y its input gradient. Only B learns by R.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from ..backends.reference import checks
from .rule import State
from .rules import RULES, _Learned


class Products(Protocol):
    """The bilinear map of a layer, without bias, for its input x of this call."""

    samples: int

    def forward(self, weight: Tensor) -> Tensor:
        """W x."""

    def back(self, y: Tensor, weight: Tensor) -> Tensor:
        """Wᵀ y, of the input's shape."""

    def outer(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        """The weight gradient y xᵀ, summed over samples; of the call's x where none is given."""


class _Apart(torch.autograd.Function):
    # W, and B in its graph without a gradient: DistributedDataParallel waits for every Parameter that learns.
    @staticmethod
    def forward(ctx: Any, weight: Tensor, b: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor) -> tuple[Tensor, None]:
        return grad_weight, None


@dataclass(frozen=True)
class _Aligned(_Learned):
    aligns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in fields(self):
            if field.name in ("alpha", "beta", "gamma"):
                object.__setattr__(self, field.name, checks.not_negative(field.name, getattr(self, field.name)))
        if self.scale in ("match", "initial"):
            raise ValueError(f"scale: expected one that does not follow W, as B learns its own, got {self.scale!r}")

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": torch.nn.Parameter(torch.empty_like(weight.detach()))}

    def learning(self, weight: Tensor, trained: Tensor, state: State) -> Tensor:
        return cast(Tensor, _Apart.apply(weight, trained))

    def gradient(self, weight: Tensor, b: Tensor, products: Products) -> Tensor:
        """∂R/∂B."""
        raise NotImplementedError


@dataclass(frozen=True)
class SymmetricAlignment(_Aligned):
    """B learns by R = α decay + β self, ∂R/∂B = 2 α B − β W (Kunin et al. 2020): B goes to β / 2α · W.

    `bk.align_` adds it to the `.grad` of `feedback_weight`, which belongs in the optimizer. It reads W: no rule without
    weight transport but what the paper calls weight estimation. The first B is drawn as for `fa`.
    """

    name: ClassVar[str] = "sa"
    alpha: float = 0.5
    beta: float = 1.0

    def gradient(self, weight: Tensor, b: Tensor, products: Products) -> Tensor:
        return 2 * self.alpha * b - self.beta * weight


@dataclass(frozen=True)
class ActivationAlignment(_Aligned):
    """B learns by R = α sparse + β amp, ∂R/∂B = mean of (2 α B x − β W x) xᵀ (Kunin et al. 2020).

    It reads the two products, not the weights: B goes to β / 2α · W on the span of the inputs. `bk.align_` adds it to
    the `.grad` of `feedback_weight`, which belongs in the optimizer. The first B is drawn as for `fa`.
    """

    name: ClassVar[str] = "aa"
    alpha: float = 0.5
    beta: float = 1.0

    def gradient(self, weight: Tensor, b: Tensor, products: Products) -> Tensor:
        y = products.forward(2 * self.alpha * b - self.beta * weight)
        return products.outer(y) / products.samples


@dataclass(frozen=True)
class InformationAlignment(_Aligned):
    """B learns by R = α amp + β null + γ decay, ∂R/∂B = mean of y (2 β Bᵀ y − α x)ᵀ + 2 γ B with y = W x.

    The local one of Kunin et al. 2020: B goes to a regularised pseudo-inverse of W. `bk.align_` adds it to the `.grad`
    of `feedback_weight`, which belongs in the optimizer. The first B is drawn as for `fa`.
    """

    name: ClassVar[str] = "ia"
    alpha: float = 1.0
    beta: float = 0.5
    gamma: float = 0.5

    def gradient(self, weight: Tensor, b: Tensor, products: Products) -> Tensor:
        y = products.forward(weight)
        null = products.outer(y, products.back(y, b))
        return (2 * self.beta * null - self.alpha * products.outer(y)) / products.samples + 2 * self.gamma * b


RULES |= {rule.name: rule for rule in (SymmetricAlignment, ActivationAlignment, InformationAlignment)}
