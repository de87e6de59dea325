"""dX = dY B, the input gradient of a linear map whose backward weight is a feedback matrix."""

import torch
from torch import Tensor
from torch.nn.functional import pad

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
    if grad_output.element_size() == 2 and size[0] % 2:
        # On tile units torch.mm multiplies in pairs, the last of an odd number beside the next row's first entry, times
        # zero: an infinity there would spoil the row.
        grad_output, b = pad(grad_output, (0, 1)), pad(b, (0, 0, 0, 1))
    return torch.mm(grad_output, b)
