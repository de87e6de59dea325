"""feedback_mm in Triton: dX = s (dY signs), transposed, so that the signs, made in registers, are the A side of each
product.

±1 is exact in every dtype: half types are multiplied as they are, products are exact and sums in float32, and s comes
last. float32 is three bf16 parts, for GPUs whose int8 units are slow; tensor cores cut the low bits of their sums, so
each tile's sum starts from zero and is added outside of them. Where rows are few, parts of K are summed by programs of
their own, as many as the shape says, and a second pass adds them in order: the same bits each time.

Roofline: 2 M N K operations at the half types' rate (three times that for float32). At few rows the sign source is
what is read: N K of a weight's bytes, 1/8 byte (packed signs; 1/4 where there are zeros) or nothing (seeded, 80 integer
instructions for 128 signs). Every tile of rows reads it anew, from the L2 cache where it fits there, and makes the
signs anew: two instructions a pair of entries from a weight.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .. import reference
from ..reference import checks
from ..reference.pack_signs import packed_shape
from .launch import Tile, device_limits, fitting, launch, product, traced
from .loaders import add_product, matrix_tile, sign_tile

# By rows of dY, which are columns here, where tensor cores read an operand from registers and one from shared memory
# (wgmma) and where they read both from registers; float32 holds three parts. 128 columns of B are a call of the
# generator and a row of packed words. A tile has no part in the order of a half type's sums.
WGMMA = (Tile(16, 128, 64, 8, 4), Tile(64, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3), Tile(256, 128, 64, 8, 3))
MMA = (Tile(16, 128, 32, 8, 4), Tile(64, 128, 32, 4, 4), Tile(128, 128, 32, 8, 4))
FLOAT32 = (Tile(16, 128, 16, 4, 4), Tile(32, 128, 32, 8, 3))
# Tiles that are wanted by cutting K, and the least of K that is worth a part.
_PROGRAMS, _PART = 256, 256  # estimated: about two for a processor
_CUT = tl.constexpr(64)  # where K may be cut: a whole number of any tile's steps
_GROUP = tl.constexpr(8)  # tiles of rows that take turns at one tile of columns, so that B's bytes stay in the L2 cache
BLOCK = 1024  # results that a program of the second pass adds


@triton.jit
def _place(tiles_m, tiles_n):
    """Tile of rows and of columns of this program."""
    pid = tl.program_id(0)
    group = pid // (_GROUP * tiles_n)
    size = tl.minimum(tiles_m - group * _GROUP, _GROUP)
    within = pid - group * _GROUP * tiles_n
    return group * _GROUP + within % size, within // size


@triton.jit
def _scale(scale, dtype: tl.constexpr):
    """s as the entries of B hold it."""
    return tl.cast(scale, tl.float32).to(dtype).to(tl.float32)


@triton.jit
def sign_kernel(
    grad, out, sums, weight, planes, key, scale, M, N, K, grad_row, grad_column, weight_row, weight_column,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """out (M, N) = s * dY signs; with `sums` (parts of K, M, N) dY signs of each part goes there, in float32."""
    pid_m, pid_n = _place(tl.cdiv(M, BM), tl.cdiv(N, BN))
    m0 = pid_m * BM
    n0 = pid_n * BN
    cuts = tl.cdiv(K, _CUT)
    part, parts = tl.program_id(1), tl.num_programs(1)
    # Products of two numbers of 32 bits, which their quotients have again.
    first = (cuts * part.to(tl.int64) // parts).to(tl.int32) * _CUT
    end = (cuts * (part + 1).to(tl.int64) // parts).to(tl.int32) * _CUT
    total = tl.zeros((BN, BM), tl.float32)
    for k0 in range(first, tl.minimum(end, K), BK):
        x = matrix_tile(grad, grad_row, grad_column, m0, k0, M, K, BK, BM, WIDE)
        half: tl.constexpr = tl.bfloat16 if x.dtype == tl.float32 else x.dtype
        signs = sign_tile(weight, weight_row, weight_column, planes, key, k0, n0, K, N, half, BN, BK, WIDE)
        total = add_product(total, signs, x, True)
    m = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    if sums is None:
        total *= _scale(scale, out.dtype.element_ty)
    else:
        out = sums + part.to(tl.int64) * M * N
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def add_kernel(sums, out, scale, count, parts, BLOCK: tl.constexpr):
    """out (count) = s * the sums (parts, count), in float32 and always in the same order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(sums + tl.cast(part, tl.int64) * count + i, mask=inside, other=0.0)
    tl.store(out + i, (total * _scale(scale, out.dtype.element_ty)).to(out.dtype.element_ty), mask=inside)


def tile_for(dtype: torch.dtype, rows: int, source: int, capability: tuple[int, int], shared: int) -> Tile:
    """The tile for `rows` of dY in `dtype` and signs read from `source` bytes an entry (0: from bits)."""
    if dtype == torch.float32:
        # 4 bytes as it is read, three parts of 2 as they are multiplied.
        return fitting(FLOAT32, rows, 10, source, shared)
    return fitting(WGMMA if capability[0] in (9, 10) else MMA, rows, 2, source, shared)


def parts_of(m: int, n: int, k: int) -> int:
    """Parts of K that are summed apart: more than one where tiles are too few; the same for every device."""
    rows = next((tile.rows for tile in WGMMA if m <= tile.rows), WGMMA[-1].rows)
    tiles = -(-m // rows) * -(-n // WGMMA[0].columns)
    return max(1, min(k // _PART, _PROGRAMS // tiles))


@functools.lru_cache(4096)
def _plan(
    dtype: torch.dtype, m: int, n: int, k: int, strides: tuple[int, ...], source: int, device: torch.device
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid (its second size: parts of K) and constants of a product."""
    tile = tile_for(dtype, m, source, *device_limits(device))
    grid = -(-m // tile.rows) * -(-n // tile.columns), parts_of(m, n, k), 1
    return grid, {"WIDE": 256 * sum(strides) >= 2**31, **tile.constants()}


@product(reference.feedback_mm)
def feedback_mm(grad_output: Tensor, *feedback: Any) -> Tensor:
    """Of signs (entries "constant") and dY of float32 or a half type."""
    weight, signs, magnitude, key, entries, scale, n = feedback
    checks.mm(grad_output, n)
    (m, k), dtype = grad_output.shape, grad_output.dtype
    if dtype == torch.float64:
        checks.fail("grad_output", "float32, bfloat16 or float16 (Triton has no float64 product)", dtype, TypeError)
    if entries != "constant":
        checks.fail("entries", "'constant' (Triton has a kernel for signs alone)", repr(entries))
    checks.feedback(weight, signs, magnitude, key, entries, scale, (k, n), packed_shape((k, n)), grad_output.device)
    if m == 0 or n == 0 or k == 0:
        return grad_output.new_zeros(m, n)
    out = grad_output.new_empty(m, n)
    planes, words = None if signs is None else signs.contiguous(), None if key is None else key.contiguous()
    strides = (*grad_output.stride(), *((0, 0) if weight is None else weight.stride()))
    source = 0 if weight is None else weight.element_size()
    trace = traced(grad_output)
    # A traced size may be a symbol, which no cache takes.
    plan = _plan.__wrapped__ if trace else _plan
    grid, constants = plan(dtype, m, n, k, strides, source, grad_output.device)
    parts = grid[1]
    sums = out.new_empty(parts, m, n, dtype=torch.float32) if parts > 1 else None
    tensors = (grad_output, out, sums, weight, planes, words)
    launch(
        wrap_triton(sign_kernel) if trace else sign_kernel, grid, tensors, (float(scale), m, n, k, *strides), constants
    )
    if sums is not None:
        kernel, grid = wrap_triton(add_kernel) if trace else add_kernel, (-(-m * n // BLOCK), 1, 1)
        launch(kernel, grid, (sums, out), (float(scale), m * n, parts), {"BLOCK": BLOCK})
    return out
