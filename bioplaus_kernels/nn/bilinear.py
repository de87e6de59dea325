"""Bilinear with a feedback rule."""

import torch
from torch import Tensor

from ..backends.reference import checks
from ..feedback import Fans, bilinear_fans
from ..functional import bilinear_with, needs_feedback
from .base import FeedbackLayer


class Bilinear(FeedbackLayer, torch.nn.Bilinear):
    """torch.nn.Bilinear with B in the place of W in the gradients of both inputs: its arguments, and `feedback=`."""

    def fans(self, name: str = "weight") -> Fans:
        return bilinear_fans(self.weight)

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        checks.tensor("input1", input1)
        checks.tensor("input2", input2)
        needs = [needs_feedback(x) for x in (input1, input2)] if self.uses_feedback else [False]
        if self.is_plain(input2 if needs[-1] else input1):
            return super().forward(input1, input2)
        weight, op = self.used()
        return bilinear_with(input1, input2, weight, self.bias, op)
