"""One bit a sign: a sign plane, a non-zero plane, and a flag for each tile that holds an exact zero.

Layout of the int32 tensor of a (rows, columns) matrix, with words = 4 * ceil(columns / 128):

    rows 0 .. rows-1          sign plane, bit j % 32 of word j // 32 is set where the entry is negative
    rows rows .. 2*rows-1     non-zero plane, the same bit is set where the entry is not zero
    the last ceil(rows / 64)  flags: word w of flag row t is 1 where tile (64 rows t, 32 columns w) holds a zero
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks

TILE_ROWS = 64


def matrix_shape(size: Sequence[int]) -> tuple[int, int]:
    """Rows (dim 0) and columns (all other dims, in logical order) of a weight's size."""
    return (size[0] if size else 1), math.prod(size[1:])


def packed_shape(size: Sequence[int]) -> tuple[int, int]:
    """Shape of the packed signs of a weight of `size`."""
    rows, columns = matrix_shape(size)
    return 2 * rows + -(-rows // TILE_ROWS), 4 * -(-columns // 128)


def _to_words(bits: Tensor, words: int) -> Tensor:
    rows, columns = bits.shape
    padded = torch.zeros(rows, 32 * words, dtype=torch.int64, device=bits.device)
    padded[:, :columns] = bits
    packed = (padded.view(rows, words, 32) << torch.arange(32, device=bits.device)).sum(-1)
    return packed.to(torch.int32)


def pack_signs(weight: Tensor) -> Tensor:
    """Packed signs of `weight`, int32 of shape `packed_shape(weight.shape)`."""
    checks.floating("weight", weight)
    rows, columns = matrix_shape(weight.shape)
    words = packed_shape(weight.shape)[1]
    sign = torch.sign(weight.detach()).reshape(rows, columns)
    zero = sign == 0
    tiles = -(-rows // TILE_ROWS)
    padded = torch.zeros(tiles * TILE_ROWS, 32 * words, dtype=torch.bool, device=weight.device)
    padded[:rows, :columns] = zero
    flags = padded.view(tiles, TILE_ROWS, words, 32).any(3).any(1)
    return torch.cat((_to_words(sign < 0, words), _to_words(~zero, words), flags.to(torch.int32)))


def unpack_signs(signs: Tensor, size: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    """-1, 0 or 1 in `dtype` and `size`, from packed signs."""
    checks.dtype("dtype", dtype)
    checks.packed("signs", signs, packed_shape(size))
    rows, columns = matrix_shape(size)
    planes = signs[: 2 * rows, :, None] >> torch.arange(32, device=signs.device, dtype=torch.int32) & 1
    negative, nonzero = planes.unflatten(0, (2, rows)).flatten(2)[:, :, :columns].to(dtype)
    return ((1 - 2 * negative) * nonzero).reshape(size)
