"""dX = dY B, the input gradient of a linear map whose backward weight is a feedback matrix."""

import torch
from torch import Tensor

from . import checks
from .feedback_weight import feedback_weight


def feedback_mm(
    grad_output: Tensor,
    weight: Tensor | None,
    signs: Tensor | None,
    magnitude: Tensor | None,
    key: Tensor | None,
    entries: str,
    scale: float,
    in_features: int,
) -> Tensor:
    """dX (M, in) = dY (M, out) B (out, in), B as in `feedback_weight`; half types accumulate in float32."""
    checks.mm(grad_output, in_features)
    size = (grad_output.shape[1], in_features)
    b = feedback_weight(weight, signs, magnitude, key, entries, scale, size, dtype=grad_output.dtype)
    return torch.mm(grad_output, b)
