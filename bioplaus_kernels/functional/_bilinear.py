"""The bilinear map."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.reference import checks
from ..feedback import Operands, bilinear_fans
from ._common import CUT, Feedback, Grads, autocasts, is_backprop, joined, no_key, once, parted, resolve

# Of aten's product of three, (N, out, in1, in2) and which of them each operand lacks.
_INPUT1, _WEIGHT, _INPUT2, _OUTPUT = [1, 3], [0], [1, 2], [2, 3]


class _Bilinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input1: Tensor, weight: Tensor, input2: Tensor, bias: Tensor | None, *feedback: Any
    ) -> Tensor:
        needs = ctx.needs_input_grad
        ctx.op, of_weight = parted(Operands(*feedback), weight)
        ctx.size = weight.shape
        ctx.save_for_backward(
            input1 if needs[1] or needs[2] else None,
            input2 if needs[1] or needs[0] else None,
            *(of_weight if needs[0] or needs[2] else (None,) * 5),
        )
        return F.bilinear(input1, input2, weight, bias)

    @staticmethod
    @once
    def backward(ctx: Any, g: Tensor, saved: Grads) -> Grads:
        needs, product = ctx.needs_input_grad, torch.ops.aten._trilinear
        # Under autocast a GPU's bilinear promotes.
        x1, x2 = (None if x is None else x.to(g.dtype) for x in saved[:2])
        grads: list[Tensor | None] = [None] * len(needs)
        if needs[0] or needs[2]:
            b = joined(ctx.op, saved[2:], ctx.size, g.dtype)
            if needs[0]:
                grads[0] = product(g, b, x2, _OUTPUT, _WEIGHT, _INPUT2, _INPUT1)
            if needs[2]:
                grads[2] = product(x1, b, g, _INPUT1, _WEIGHT, _OUTPUT, _INPUT2)
        if needs[1]:
            grads[1] = product(x1, g, x2, _INPUT1, _OUTPUT, _INPUT2, _WEIGHT)
        if needs[3]:
            grads[3] = g.sum(0)
        return tuple(grads)


def bilinear_with(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None, op: Operands) -> Tensor:
    """`bilinear` with the operands of B at hand."""
    try:
        if op is CUT:
            return F.bilinear(input1, input2, weight, bias).detach()
        if input1.shape[:-1] != input2.shape[:-1]:
            checks.fail("input2", f"leading dimensions {tuple(input1.shape[:-1])}, as input1", tuple(input2.shape[:-1]))
        # torch.compile takes no tensor twice.
        other = input2.view_as(input2) if input2 is input1 else input2
        y: Tensor = _Bilinear.apply(_rows(input1), weight, _rows(other), bias, *op)
    except Exception:
        _explain(input1, input2, weight, bias)
        raise
    return y.reshape(*input1.shape[:-1], weight.shape[0])


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)


def _explain(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, given, size in (("input1", input1, weight.shape[1]), ("input2", input2, weight.shape[2])):
        checks.tensor(name, given)
        checks.floating(name, given)
        if given.dim() == 0 or given.shape[-1] != size:
            checks.fail(name, f"{size} features in the last dimension", f"shape {tuple(given.shape)}")
        if given.device != weight.device:
            checks.fail(name, f"a tensor on {weight.device}, as weight", f"one on {given.device}")
        if given.dtype != weight.dtype and not autocasts(given):
            checks.fail(name, f"{weight.dtype}, as weight", given.dtype, TypeError)
    if bias is not None:
        checks.shape("bias", bias, (weight.shape[0],))


def bilinear(
    input1: Tensor,
    input2: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    feedback: Feedback = None,
    key: Tensor | None = None,
) -> Tensor:
    """y = x1ᵀ W x2 + b, with B in the place of W in the gradients of x1 and x2.

    Shapes: input1 (*, in1), input2 (*, in2), weight and B (out, in1, in2), bias (out). feedback=None is
    torch.nn.functional.bilinear.
    """
    checks.rank("weight", weight, 3)
    if is_backprop(feedback):
        no_key(key)
        try:
            return F.bilinear(input1, input2, weight, bias)
        except Exception:
            _explain(input1, input2, weight, bias)
            raise
    return bilinear_with(input1, input2, weight, bias, resolve(feedback, weight, bilinear_fans(weight), key))
