"""B, the feedback matrix of a rule, from where its signs and its magnitudes come from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, philox
from .pack_signs import matrix_shape, packed_shape, unpack_signs


def feedback_weight(
    weight: Tensor | None,
    signs: Tensor | None,
    magnitude: Tensor | None,
    key: Tensor | None,
    entries: str,
    scale: float,
    size: Sequence[int],
    *,
    dtype: torch.dtype,
) -> Tensor:
    """B = sign * |scale * magnitude|, or scale * magnitude where nothing gives the sign; see `ops.feedback_weight`."""
    checks.feedback(weight, signs, magnitude, key, entries, scale, size, packed_shape(size))
    checks.dtype("dtype", dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    rows, columns = matrix_shape(size)
    like = weight if weight is not None else magnitude
    device = next(t.device for t in (weight, signs, magnitude, key) if t is not None)
    s = torch.tensor(scale, dtype=acc, device=device)

    sign = None
    if weight is not None:
        sign = torch.sign(weight.detach()).to(acc)
    elif signs is not None:
        sign = unpack_signs(signs, size, dtype=acc)
    elif entries == "constant":
        assert key is not None
        sign = (1 - 2 * philox.negative_bits(key, rows, columns).to(acc)).reshape(size)

    if entries == "constant":
        assert sign is not None
        values = sign * s
    else:
        if entries == "stored":
            assert magnitude is not None
            values = magnitude.detach().to(acc) * s
        else:
            assert key is not None
            draw = philox.uniform if entries == "uniform" else philox.normal
            values = draw(key, rows, columns, scale, acc).reshape(size)
        if sign is not None:
            values = sign * values.abs()

    if like is None:
        return values.to(dtype).contiguous()
    return torch.empty_like(like, dtype=dtype).copy_(values)
