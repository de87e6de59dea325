"""The hidden-to-hidden part of recurrent layers: what comes after the input's product."""

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..feedback import Operands
from ._common import Grads, autocasts, joined, lowered, once, parted


class _Recurrent(torch.autograd.Function):
    # Back-propagation through time, B in the place of the hidden-to-hidden weight and of the projection.
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        projection: Tensor | None,
        bias: Tensor | None,
        hidden: Tensor,
        cell: Tensor | None,
        batch_sizes: Tensor | None,
        mode: str,
        reverse: bool,
        *feedback: Any,
    ) -> tuple[Tensor, ...]:
        given = (input, weight, projection, bias, hidden, cell)
        x, w, p, b, h, c = lowered(input.dtype, *given) if autocasts(input) else given
        assert x is not None and w is not None and h is not None
        output, last, last_cell, gates, cells = ops.recurrent_forward(x, h, c, w, b, p, batch_sizes, mode, reverse)
        ctx.given = mode, reverse, tuple(None if t is None else (t.dtype, t.shape) for t in given)
        ctx.carries = carries(input, batch_sizes, ctx.needs_input_grad[4])
        ctx.op, of_weight = parted(Operands(*feedback[:7]), weight)
        ctx.projection_op, of_projection = parted(Operands(*feedback[7:]), projection)
        # The weight's gradient reads the states before each step; GRU's and RNN's own nonlinearities read theirs.
        learns = ctx.needs_input_grad[1]
        reads = mode.startswith("RNN") or ((learns or mode == "GRU") and _steps(input, batch_sizes) > 1)
        ctx.save_for_backward(
            output if reads else None,
            *(gates, cells, h if learns or mode == "GRU" else None, c, batch_sizes),
            *(of_weight if ctx.carries else (None,) * 5),
            *of_projection,
        )
        return (output, last) if cell is None else (output, last, last_cell)

    @staticmethod
    @once
    def backward(ctx: Any, *given: Any) -> Grads:
        (grad_output, grad_hidden, *grad_cell), saved = given[:-1], given[-1]
        output, gates, cells, hidden, cell, batch_sizes = saved[:6]
        # In the place of what is not read, what has its shape.
        output, hidden = grad_output if output is None else output, grad_hidden if hidden is None else hidden
        mode, reverse, like = ctx.given
        needs = ctx.needs_input_grad
        b: Any = None
        b_projection: Any = None
        if ctx.carries:
            b = joined(ctx.op, saved[6:11], like[1][1], output.dtype)
        if like[2] is not None:
            b_projection = joined(ctx.projection_op, saved[11:16], like[2][1], output.dtype)
        grad_input, grad_h, grad_c, *grads = ops.recurrent_backward(
            *(grad_output, grad_hidden, grad_cell[0] if grad_cell else None),
            *(output, gates, cells, hidden, cell, b, b_projection, batch_sizes, mode, reverse),
            [needs[1], needs[3], needs[2]],
        )
        grad_weight, grad_bias, grad_projection = grads
        found = (grad_input, grad_weight, grad_projection, grad_bias, grad_h, grad_c)
        wanted = [
            grad.to(of[0]) if need and of is not None else None
            for grad, need, of in zip(found, needs, like, strict=False)
        ]
        return *wanted, *(None,) * (len(needs) - len(wanted))


def _steps(input: Tensor, batch_sizes: Tensor | None) -> int:
    return (input if batch_sizes is None else batch_sizes).shape[0]


def carries(input: Tensor, batch_sizes: Tensor | None, hidden: bool) -> bool:
    """Whether a gradient goes through the hidden-to-hidden weights: to a step before, or to a first state."""
    return hidden or _steps(input, batch_sizes) > 1


def recurrent_with(
    input: Tensor,
    weight: Tensor,
    projection: Tensor | None,
    bias: Tensor | None,
    states: tuple[Tensor, ...],
    batch_sizes: Tensor | None,
    mode: str,
    reverse: bool,
    op: Operands,
    projection_op: Operands,
) -> tuple[Tensor, ...]:
    """Output, and the last of each of `states`, hidden and of LSTM cell, with the operands of B at hand.

    input is what the input-to-hidden weights made of all steps; shapes as in `ops.recurrent_forward`.
    """
    hidden, cell = states if len(states) == 2 else (*states, None)
    if cell is hidden and cell is not None:
        # torch.compile takes no tensor twice.
        cell = cell.view_as(cell)
    found: tuple[Tensor, ...] = _Recurrent.apply(
        input, weight, projection, bias, hidden, cell, batch_sizes, mode, reverse, *op, *projection_op
    )
    return found
