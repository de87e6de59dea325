"""Models and questions for the tests of what proves that a rule acts."""

import torch
from torch import Tensor, nn

import bioplaus_kernels as bk
from bioplaus_kernels.proof import Once


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 4)), requires_grad=True)


def outcomes(report: bk.Report) -> dict[str, str]:
    return {row.name: row.outcome for row in report.rows}


def reason(report: bk.Report, name: str) -> str:
    return next(row.reason for row in report.rows if row.name == name)


def pending(model: nn.Module) -> bool:
    hooks = [*model._forward_hooks.values(), *model._forward_pre_hooks.values()]
    return any(isinstance(hook, Once) for hook in hooks)


class Reads(nn.Module):
    """A layer that is called, one whose weight is read, one that is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.spare = (nn.Linear(4, 4) for _ in range(3))
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(self.called(x @ self.read.weight.t())))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
