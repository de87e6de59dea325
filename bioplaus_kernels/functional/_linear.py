"""The linear map."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..backends.reference import checks
from ..feedback import Operands, linear_fans
from ._common import (
    CUT,
    Feedback,
    Grads,
    begin,
    check,
    explain,
    finish,
    is_backprop,
    no_key,
    once,
    resolve,
    saved_feedback,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *feedback: Any) -> Tensor:
        x, w, b = begin(ctx, input, weight, bias, feedback)
        ctx.transposed = weight.stride(0) == 1 < weight.stride(1)
        return F.linear(x, w, b)

    @staticmethod
    @once
    def backward(ctx: Any, grad_output: Tensor, saved: Grads) -> Grads:
        input, feedback, shape = saved_feedback(ctx, saved)
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            _, p, q, _, entries, _ = feedback
            if entries == "factors" and p is not None and q is not None:
                grad_input = grad_output.mm(p.to(grad_output.dtype)).mm(q.to(grad_output.dtype))
            else:
                grad_input = ops.feedback_mm(grad_output, *feedback, shape[1])
        if input is not None:
            # As the weight is laid out, or autograd would copy it.
            grad_weight = input.t().mm(grad_output).t() if ctx.transposed else grad_output.t().mm(input)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum(0)
        return finish(ctx, saved, grad_input, grad_weight, grad_bias)


def linear_with(input: Tensor, weight: Tensor, bias: Tensor | None, op: Operands) -> Tensor:
    """`linear` with the operands of B at hand."""
    check(input, weight, bias)
    dims = input.dim()
    try:
        if op is CUT:
            return F.linear(input, weight, bias).detach()
        x = input if dims == 2 else input.flatten(0, -2) if dims > 2 else input.unsqueeze(0)
        y: Tensor = _Linear.apply(x, weight, bias, *op)
    except Exception:
        _explain(input, weight, bias)
        raise
    return y if dims == 2 else y.reshape(*input.shape[:-1], weight.shape[0])


def _explain(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    explain(input, weight, bias, weight.shape[0])
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        checks.fail("input", f"{weight.shape[1]} features in the last dimension", f"shape {tuple(input.shape)}")


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, feedback: Feedback = None, key: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ + b, with dX = dY B.

    Shapes: input (*, in), weight and B (out, in), bias (out). feedback=None is torch.nn.functional.linear.
    """
    if is_backprop(feedback):
        no_key(key)
        try:
            return F.linear(input, weight, bias)
        except Exception:
            checks.rank("weight", weight, 2)
            _explain(input, weight, bias)
            raise
    checks.rank("weight", weight, 2)
    return linear_with(input, weight, bias, resolve(feedback, weight, linear_fans(weight), key))
