"""Models whose logits, or whose blocks' outputs, are told from the rest in some way of their own."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioplaus_kernels import direct

RULES = {
    "dfa": direct.DFA(),
    "stored": direct.DFA(stored=True),
    "shared": direct.DFA(shared=True),
    "sdfa": direct.SDFA(),
    "drtp": direct.DRTP(),
    "shallow": direct.Shallow(),
}
every_rule = pytest.mark.parametrize("rule", RULES)


class Conv(nn.Sequential):
    """A segmentation net: logits (N, 5, *spatial)."""

    def __init__(self, d: int = 2, **options: Any) -> None:
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1]
        super().__init__(conv(3, 6, 3, padding=1), nn.Tanh(), conv(6, 4, 3, padding=1), nn.Tanh(), conv(4, 5, 1))


class Steps(nn.Module):
    """A cell called at each time step; `how` its outputs become logits."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.below, self.cell, self.act = nn.Linear(3, 6), nn.Linear(6, 6), nn.Tanh()
        self.head, self.how = nn.Linear(6, 5), how

    def forward(self, x: Tensor) -> Tensor:
        h, states = x.new_zeros(len(x), 6), []
        for t in range(x.shape[1]):
            h = self.act(self.below(x[:, t]) + self.cell(h))
            states.append(h)
        if self.how == "last":
            return self.head(h)
        if self.how == "each":
            return torch.stack([self.head(h) for h in states], 1)
        if self.how == "flat":
            return self.head(torch.cat(states))
        dim = 0 if self.how == "time first" else 1
        logits = self.head(torch.stack(states, dim))
        return logits.transpose(1, 2) if self.how == "class_dim=1" else logits


class Alternating(Steps):
    """The head is called in the step, so that its calls alternate with the cell's."""

    def forward(self, x: Tensor) -> Tensor:
        h, found = x.new_zeros(len(x), 6), []
        for t in range(x.shape[1]):
            h = self.act(self.below(x[:, t]) + self.cell(h))
            found.append(self.head(h))
        return torch.stack(found, 1)


class Siamese(nn.Module):
    """Two inputs through one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.head = nn.Sequential(nn.Linear(3, 6), nn.Tanh()), nn.Linear(6, 5)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.head((self.branch(x) - self.branch(other)).square())


class Ends(nn.Module):
    """A model that ends as `how` says."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.a, self.act, self.fc, self.how = nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), how

    def forward(self, x: Tensor) -> Any:
        return self.how(self.fc(self.act(self.a(x))))


@dataclasses.dataclass
class Output:
    """As transformers'."""

    logits: Any
    features: Any = None


class Returning(nn.Module):
    """A model that returns what `how` makes of its logits and features."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.a, self.act, self.fc, self.how = nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), how

    def forward(self, x: Tensor) -> Any:
        h = self.act(self.a(x))
        return self.how(self.fc(h), h)


def delta(net: direct.DirectFeedback, e: Tensor, block: str, y: Tensor | None = None) -> Tensor | None:
    """What the rule makes of e (samples, classes), as its docstring says."""
    kind = net.feedback.name
    if kind == "shallow":
        return None
    b = net.feedback_matrix(block).to(e.dtype)
    if kind == "drtp":
        assert y is not None
        return F.one_hot(y, len(b)).to(e.dtype) @ b / len(y)
    return e @ b if kind == "dfa" else e.sign() @ b * e.abs().mean()


def call(net: direct.DirectFeedback, *x: Any, y: Tensor | None = None) -> Any:
    """`net` of x, with the targets where it takes them."""
    return net(*x, targets=y) if net.feedback.name == "drtp" else net(*x)
