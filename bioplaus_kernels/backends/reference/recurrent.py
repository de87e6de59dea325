"""The loop over time of torch.nn's RNN, LSTM and GRU, one layer in one direction, and back through it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import checks

MODES = {"RNN_TANH": 1, "RNN_RELU": 1, "LSTM": 4, "GRU": 3}


def recurrent_forward(
    input: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    projection: Tensor | None,
    batch_sizes: Tensor | None,
    mode: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, last hidden state, last cell state, and what the backward reads, gates and cells.

    input: what the input-to-hidden weights and their bias made, (T, N, G H), or (rows, G H) of a packed sequence with
    its batch_sizes; G is 4 of LSTM, 3 of GRU, 1 of RNN_TANH and RNN_RELU, in torch.nn's order. hidden (N, R), and of
    LSTM cell (N, H), are the first states; weight (G H, R) is hidden-to-hidden with bias (G H); projection (R, H), of
    LSTM alone, else R = H. reverse goes through the steps from the last one on. Sources: torch.nn's formulas.
    """
    steps = _check("input", input, hidden, cell, projection, batch_sizes, mode, reverse)
    units = hidden.shape[1] if projection is None else projection.shape[1]
    lead, width = input.shape[:-1], MODES[mode] * units
    _given(input, input=(input, (*lead, width)), weight=(weight, (width, hidden.shape[1])), bias=(bias, (width,)))
    x = input.flatten(0, -2)
    outputs, gates, cells = {}, {}, {}
    h, c = hidden.clone(), None if cell is None else cell.clone()
    for step in steps:
        n = step.stop - step.start
        from_h = torch.nn.functional.linear(h[:n], weight, bias)
        if mode == "LSTM":
            assert c is not None
            i, f, g, o = (x[step] + from_h).chunk(4, 1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c[:n] = f * c[:n] + i * g
            out = o * c[:n].tanh()
            out = out if projection is None else out @ projection.t()
            gates[step.start], cells[step.start] = torch.stack((i, f, g, o), 1), c[:n].clone()
        elif mode == "GRU":
            (xr, xz, xn), (hr, hz, hn) = x[step].chunk(3, 1), from_h.chunk(3, 1)
            r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
            new = (xn + r * hn).tanh()
            out = (1 - z) * new + z * h[:n]
            gates[step.start] = torch.stack((r, z, new, hn), 1)
        else:
            out = (x[step] + from_h).tanh() if mode == "RNN_TANH" else (x[step] + from_h).relu()
        h[:n] = out
        outputs[step.start] = out

    def whole(of: dict[int, Tensor], *size: int) -> Tensor:
        rows = [of[start] for start in sorted(of)]
        return torch.cat(rows).view(*lead, *size) if rows else input.new_empty((*lead, *size))

    none = input.new_empty(0)
    return (
        whole(outputs, hidden.shape[1]),
        h,
        none if c is None else c,
        whole(gates, 4, units) if mode in ("LSTM", "GRU") else input.new_empty(0),
        whole(cells, units) if mode == "LSTM" else input.new_empty(0),
    )


def recurrent_backward(
    grad_output: Tensor,
    grad_hidden: Tensor,
    grad_cell: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    feedback: Tensor | None,
    projection: Tensor | None,
    batch_sizes: Tensor | None,
    mode: str,
    reverse: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Back-propagation through time: gradients of input, hidden, cell, and, each if wanted, weight, bias, projection.

    feedback (G H, R) is B in the weight's place, and projection (R, H) B in the projection's; without feedback nothing
    goes through the hidden-to-hidden weights. What there is no gradient of is an empty tensor.
    """
    steps = _check("output", output, hidden, cell, projection, batch_sizes, mode, reverse)
    units, width = _units(hidden, projection), MODES[mode] * _units(hidden, projection)
    lead, batch, size = output.shape[:-1], hidden.shape[0], hidden.shape[1]
    gated = mode in ("LSTM", "GRU")
    if mode == "LSTM" and grad_cell is None:
        checks.fail("grad_cell", "a tensor with mode='LSTM'", "None")
    if len(wanted) != 3:
        checks.fail("wanted", "3 of them", len(wanted))
    _given(
        output,
        output=(output, (*lead, size)),
        grad_output=(grad_output, (*lead, size)),
        grad_hidden=(grad_hidden, (batch, size)),
        grad_cell=(grad_cell, (batch, units)),
        feedback=(feedback, (width, size)),
        gates=(gates if gated else None, (*lead, 4, units)),
        cells=(cells if mode == "LSTM" else None, (*lead, units)),
    )
    y, dy = output.flatten(0, -2), grad_output.flatten(0, -2)
    g = gates.flatten(0, -3) if gated else gates
    all_c = cells.flatten(0, -2) if mode == "LSTM" else cells
    dh, dc = grad_hidden.clone(), None if grad_cell is None else grad_cell.clone()
    dx = y.new_empty(len(y), width)
    sums = [torch.zeros_like(t) for t in (y.new_empty(width, size), y.new_empty(width), y.new_empty(size, units))]
    for k in range(len(steps) - 1, -1, -1):
        step, last = steps[k], steps[k - 1] if k else None
        n = step.stop - step.start
        known = 0 if last is None else min(n, last.stop - last.start)

        def before(
            states: Tensor, initial: Tensor, last: slice | None = last, n: int = n, known: int = known
        ) -> Tensor:
            return initial[:n] if last is None else torch.cat((states[last][:known], initial[known:n]))

        h, d = before(y, hidden), dh[:n] + dy[step]
        carried = torch.zeros_like(d)
        if mode == "LSTM":
            assert cell is not None and dc is not None
            (i, f, new, o), squashed = g[step].unbind(1), all_c[step].tanh()
            sums[2] += d.t() @ (o * squashed) if projection is not None else 0
            d = d if projection is None else d @ projection
            e = dc[:n] + d * o * (1 - squashed**2)
            to_x = to_h = torch.cat(
                (
                    e * new * i * (1 - i),
                    e * before(all_c, cell) * f * (1 - f),
                    e * i * (1 - new**2),
                    d * squashed * o * (1 - o),
                ),
                1,
            )
            dc[:n] = e * f
        elif mode == "GRU":
            r, z, new, hn = g[step].unbind(1)
            dn = d * (1 - z) * (1 - new**2)
            dr, dz = dn * hn * r * (1 - r), d * (h - new) * z * (1 - z)
            to_x, to_h, carried = torch.cat((dr, dz, dn), 1), torch.cat((dr, dz, dn * r), 1), d * z
        else:
            to_x = to_h = d * (1 - y[step] ** 2) if mode == "RNN_TANH" else d * (y[step] > 0)
        dx[step] = to_x
        sums[0] += to_h.t() @ h
        sums[1] += to_h.sum(0)
        dh[:n] = carried if feedback is None else carried + to_h @ feedback
    there = (True, True, projection is not None)
    found = [s if want and is_there else y.new_empty(0) for s, want, is_there in zip(sums, wanted, there, strict=True)]
    return dx.view(*lead, width), dh, y.new_empty(0) if dc is None else dc, found[0], found[1], found[2]


def _units(hidden: Tensor, projection: Tensor | None) -> int:
    return hidden.shape[1] if projection is None else projection.shape[1]


def _check(
    name: str,
    like: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    projection: Tensor | None,
    batch_sizes: Tensor | None,
    mode: str,
    reverse: bool,
) -> list[slice]:
    # The rows of each step, in the order in which the state goes through them.
    checks.one_of("mode", mode, MODES)
    checks.floating(name, like)
    checks.rank("hidden", hidden, 2)
    if projection is not None:
        if mode != "LSTM":
            checks.fail("projection", f"None with mode={mode!r}", "a tensor")
        checks.rank("projection", projection, 2)
    if (cell is not None) != (mode == "LSTM"):
        wanted, got = ("a tensor", "None") if cell is None else ("None", "a tensor")
        checks.fail("cell", f"{wanted} with mode={mode!r}", got)
    batch, units = hidden.shape[0], _units(hidden, projection)
    _given(
        like,
        hidden=(hidden, (batch, hidden.shape[1])),
        cell=(cell, (batch, units)),
        projection=(projection, (hidden.shape[1], units)),
    )
    checks.rank(name, like, 3 if batch_sizes is None else 2)
    if batch_sizes is None:
        if like.shape[1] != batch:
            size = hidden.shape[1]
            checks.fail("hidden", f"shape {(like.shape[1], size)}, the input's batch first", (batch, size))
        sizes = [batch] * len(like)
    else:
        if batch_sizes.dtype != torch.int64:
            checks.fail("batch_sizes", "int64", batch_sizes.dtype, TypeError)
        if batch_sizes.dim() != 1 or batch_sizes.device.type != "cpu":
            got = f"shape {tuple(batch_sizes.shape)} on {batch_sizes.device}"
            checks.fail("batch_sizes", "1 dimension on cpu", got)
        checks.memory("batch_sizes", batch_sizes)
        sizes = batch_sizes.tolist()
        for t, size in enumerate(sizes):
            if size <= 0 or (size > sizes[t - 1] if t else size != batch):
                wanted = f"positive integers that do not grow, from the {batch} of hidden on"
                checks.fail("batch_sizes", wanted, f"{size} at {t}")
        if sum(sizes) != len(like):
            checks.fail("batch_sizes", f"a sum of {len(like)}, the input's rows", sum(sizes))
    steps = list(_slices(sizes))
    return steps[::-1] if reverse else steps


def _slices(sizes: list[int]) -> Iterator[slice]:
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size


def _given(like: Tensor, **tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    # Each that is there has this dtype, device and shape.
    for name, (tensor, size) in tensors.items():
        if tensor is not None:
            if tensor.dtype != like.dtype:
                checks.fail(name, str(like.dtype), tensor.dtype, TypeError)
            checks.shape(name, tensor, size)
            checks.same(name, tensor, like)
