"""Linear with a feedback rule."""

from typing import Any

import torch
from torch import Tensor

from ..feedback import Fans, linear_fans
from ..functional import linear_with, needs_feedback
from .base import FeedbackLayer


class Linear(FeedbackLayer, torch.nn.Linear):
    """torch.nn.Linear with dX = dY B: torch.nn.Linear's arguments, and `feedback=` a rule, its name, or None (B = W)."""

    def fans(self, name: str = "weight") -> Fans:
        return linear_fans(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        if not (self.uses_feedback and needs_feedback(input)):
            return super().forward(input)
        return linear_with(input, self.weight, self.bias, self.operands())
