"""Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and the draws made from it.

A counter-based generator: word w of counter (c0, c1, c2, c3) under key (k0, k1) is a pure function, so element (i, j)
of a random matrix needs no storage and comes out the same in any order on any device.
"""

import math

import torch
from torch import Tensor

# Of the keys that are made; versions 1 and 2 draw the same and differ in `redraw_key` alone.
LAYOUT_VERSION = 2
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    # int64 multiplication wraps modulo 2^64, so the arithmetic shift and the mask give both exact 32-bit halves.
    product = b * a
    return (product >> 32) & _MASK, product & _MASK


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Four 32-bit words (int64, last dim) of each counter; counter and key words are int64 in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(_MULTIPLIERS[0], c0)
        hi1, lo1 = _mul_hi_lo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def words(key: Tensor, rows: int, columns: int, per_call: int) -> Tensor:
    """Words of a rows x columns matrix, `per_call` columns a call: (rows, 4 * ceil(columns / per_call))."""
    low, high = key & _MASK, (key >> 32) & _MASK
    call = torch.arange(-(-columns // per_call), device=key.device)
    row = torch.arange(rows, device=key.device)[:, None]
    return philox4x32((call, row, low[2], high[2]), (low[1], high[1])).flatten(1)


def negative_bits(key: Tensor, rows: int, columns: int) -> Tensor:
    """One random bit an element, 128 a call; True means a negative sign."""
    bits = (words(key, rows, columns, 128)[..., None] >> torch.arange(32, device=key.device)) & 1
    return bits.flatten(1)[:, :columns].bool()


def uniform(key: Tensor, rows: int, columns: int, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * U[-1, 1): a 24-bit integer times scale * 2^-23, one rounding in `dtype`."""
    integer = (words(key, rows, columns, 4)[:, :columns] >> 8) - 2**23
    return integer.to(dtype) * (torch.tensor(scale, dtype=dtype, device=key.device) * 2.0**-23)


def normal(key: Tensor, rows: int, columns: int, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * N(0, 1) by Box and Muller's transform of word pairs."""
    pairs = (words(key, rows, columns, 4) >> 8).to(dtype).unflatten(1, (-1, 2))
    radius = torch.sqrt(-2.0 * torch.log((pairs[..., 0] + 1.0) * 2.0**-24))
    angle = pairs[..., 1] * (2.0**-24 * 2.0 * math.pi)
    draws = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return draws.flatten(1)[:, :columns] * torch.tensor(scale, dtype=dtype, device=key.device)
