"""Linear with a feedback rule."""

import torch
from torch import Tensor

from ..feedback import Fans, linear_fans
from ..functional import linear_with
from .base import FeedbackLayer


class LinearProduct(FeedbackLayer):
    """What makes a linear map of any class, with a `bias` or none, one with a rule."""

    def fans(self, name: str = "weight") -> Fans:
        return linear_fans(self.weight_of(name))

    def forward(self, input: Tensor) -> Tensor:
        if self.is_plain(input):
            return super().forward(input)
        weight, op = self.used()
        # Another library's may have none.
        return linear_with(input, weight, getattr(self, "bias", None), op)


class Linear(LinearProduct, torch.nn.Linear):
    """torch.nn.Linear with dX = dY B: its arguments, and `feedback=` a rule, the name of one, or None (B = W)."""
