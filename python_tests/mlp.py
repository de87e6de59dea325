"""A small network by each rule that keeps something, and what its state is compared by."""

import pytest
import torch
from small import RULES
from torch import Tensor, nn

import bioplaus_kernels as bk

EVERY = RULES | {"kp": bk.KolenPollack(), "usf-initial": bk.SignSymmetry(scale="initial")}
EVERY.pop("backprop")
# What W was when the rule was given, which no key draws again.
INITIAL = ("fa_signed_init", "usf-initial")
every_rule = pytest.mark.parametrize("rule", EVERY)


def mlp(rule: str | None, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(40, 33), nn.Tanh(), nn.Linear(33, 40))
    if rule is not None:
        bk.convert_(model, EVERY[rule], seed=seed)
    return model


def plain(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if "feedback" not in name}


def x() -> Tensor:
    return torch.randn(3, 40, generator=torch.Generator().manual_seed(2)).requires_grad_()


def matrices(model: nn.Sequential) -> list[Tensor]:
    return [model[0].feedback_matrix(), model[2].feedback_matrix()]
