"""The correctness gate: the error of a product over its bound, against float64."""

import torch
from torch import Tensor


def row_error(result: Tensor, exact: Tensor, rows: Tensor, largest: float) -> float:
    """max over rows i of ‖errᵢ‖∞ / (‖rowsᵢ‖₂ · largest): the measure of a product's error that scales do not move."""
    error = (result.double() - exact).abs().amax(1)
    return float((error / (rows.double().norm(dim=1) * largest).clamp_min(1e-300)).max())


def mm_gate(result: Tensor, grad_output: Tensor, b: Tensor) -> float:
    """Error of dY B over the bound: twice torch's own product in the same dtype, plus one rounding of the output."""
    exact = grad_output.double() @ b.double()
    largest = float(b.double().abs().max())
    torchs = row_error(grad_output @ b.to(grad_output.dtype), exact, grad_output, largest)
    rounding = (
        torch.finfo(grad_output.dtype).eps
        / 2
        * float((exact.abs().amax(1) / (grad_output.double().norm(dim=1) * largest).clamp_min(1e-300)).max())
    )
    return row_error(result, exact, grad_output, largest) / (2 * torchs + rounding)


def relative_gate(result: Tensor, exact: Tensor, torchs: Tensor) -> float:
    """Largest error over twice that of torch's composition in the same dtype, plus one rounding of the output."""
    bound = 2 * float((torchs.double() - exact).abs().max())
    bound += torch.finfo(result.dtype).eps / 2 * float(exact.abs().max())
    return float((result.double() - exact).abs().max()) / bound
