"""feedback_mm in Triton: dX = dY B, transposed, so that B, formed in registers, is the A side of each product.

Constant entries are multiplied in integers, as csrc/cpu/feedback_mm_product_kernel.cpp does it and to the same bits:
rows of dY become fixed point of 4 bytes (2 where that loses less than a rounding of a half type), cut into balanced
int8 digits, times signs, in int32; one rounding at the end. Whether 2 bytes serve is each row's own question, answered
on the device. A row that holds infinities or NaNs carries the infinities' signs as digits: that all of them have come
together, with one sign, is what an infinite result means.

Roofline, for D digits: quantising reads dY two or three times and writes 4 M K bytes; the product makes 2 D M N K
integer operations (four digits: 8 against the 2 of a TF32 product at half the rate), reads D M K bytes of digits for
every tile of columns and, for every tile of rows, N K of: a weight's bytes, 1/8 byte (packed signs; 1/4 where there are
zeros) or nothing (seeded, 80 integer instructions for 128 signs); it writes M N results. At few rows the sign source is
what is read. Other entries: 2 M N K operations in the dtype of dY, and the bytes or draws of B for every tile of rows.
Where tiles are too few for the architecture, parts of K are summed by programs of their own, and a second pass adds
them, always in the same order: 8 or 4 bytes a part and result written and read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ..reference import checks
from ..reference.pack_signs import packed_shape
from . import configs
from .loaders import feedback_tile, matrix_tile, sign_tile

# A tile along K never needs a mask on digits, which are padded with zeros.
_PAD = 128
# Sums of digits are exact in int32 up to 2^23 and the CPU's to 2^20: longer sums go in floating point on both.
_MAX_DEPTH = 1 << 20
# Rows and columns of dY that a program quantises at a time: long rows, middle ones, short ones.
QUANTISE_TILES = ((1, 2048), (4, 1024), (16, 256))
_GROUP = tl.constexpr(8)  # tiles of rows that take turns at one tile of columns, so that B's bytes stay in the L2 cache
# What a row of digits is, in one number: the exponent of its last place, plus _WIDE where the upper two digits are
# needed; or _SPECIAL plus the number of its infinities (with NaNs, _NAN of them, which no sum of signs reaches).
_EXPONENT = tl.constexpr(1 << 10)
_WIDE = tl.constexpr(1 << 11)
_SPECIAL = tl.constexpr(1 << 12)
_NAN = tl.constexpr(1 << 24)
REDUCE = 1024  # results that a program of a second pass adds


@triton.jit
def _place(tiles_m, tiles_n):
    """Tile of rows and of columns of this program."""
    pid = tl.program_id(0)
    group = pid // (_GROUP * tiles_n)
    size = tl.minimum(tiles_m - group * _GROUP, _GROUP)
    within = pid - group * _GROUP * tiles_n
    return group * _GROUP + within % size, within // size


@triton.jit
def _power_of_two(e):
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _round(y):
    # To the nearest integer, ties to even: above 2^23 there is nothing to round.
    size = tl.abs(y)
    rounded = (size + 8388608.0) - 8388608.0
    return tl.where(size < 8388608.0, tl.where(y < 0, -rounded, rounded), y)


@triton.jit
def _shift(top, BYTES: tl.constexpr):
    """The largest power of two that keeps `top`, the bits of a row's largest entry, within the balanced digits."""
    subnormal = top < (1 << 23)
    bits = tl.where(subnormal, top.to(tl.float32).to(tl.int32, bitcast=True), top)
    e = tl.where(subnormal, (bits >> 23) - 127 - 148, (bits >> 23) - 126)
    e = tl.where(top == 0, -126, e)
    # Digits reach 0x7F7F..., and not 0x7FFF...
    limit: tl.constexpr = 0xFEFE00 if BYTES == 2 else 0xFEFEFE
    exceeds = ((bits & 0x7FFFFF) | 0x800000) > limit
    return 8 * BYTES - 1 - e - exceeds.to(tl.int32)


@triton.jit
def _scale_up(x, shift):
    # 2^shift can exceed a float's range, as rows can be subnormal; both steps are exact for what stays above 1/2.
    first = tl.minimum(shift, 127)
    return x * _power_of_two(first)[:, None] * _power_of_two(shift - first)[:, None]


@triton.jit
def quantise_kernel(grad, digits, kind, M, K, KP, grad_row, grad_column, BM: tl.constexpr, BK: tl.constexpr):
    """Rows of dY (M, K) to `digits` (4, M, KP), the lowest first, and `kind` (M)."""
    half: tl.constexpr = grad.dtype.element_ty != tl.float32
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    rows = m < M
    row = grad + m.to(tl.int64)[:, None] * grad_row

    top = tl.zeros((BM,), tl.int32)
    infinities = tl.zeros((BM,), tl.int32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(row + k.to(tl.int64)[None, :] * grad_column, mask=rows[:, None] & (k < K)[None, :], other=0.0)
        bits = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        top = tl.maximum(top, tl.max(bits, 1))
        infinities += tl.sum((bits == 0x7F800000).to(tl.int32), 1)
    finite = top < 0x7F800000
    special = tl.where(top > 0x7F800000, _NAN, infinities)
    top = tl.where(finite, top, 0)

    shift = _shift(top, 4)
    wide = tl.full((BM,), half, tl.int1)
    if half:
        # A row's errors add up to the root of the sum of their squares, and a rounding of the result is on average 2^-9
        # (bf16) or 2^-12 (fp16) of the root of its own: an eighth or a quarter of that may be lost. The CPU adds in 16
        # lanes, two at a time, and so must this to come to the same answer (the squares themselves are exact).
        short = _shift(top, 2)
        lost = tl.zeros((BM, 16), tl.float32)
        square = tl.zeros((BM, 16), tl.float32)
        for k0 in range(0, K, 128):
            for step in tl.static_range(4):
                pair = (tl.zeros((BM, 16), tl.float32), tl.zeros((BM, 16), tl.float32))
                for side in tl.static_range(2):
                    k = k0 + 32 * step + 16 * side + tl.arange(0, 16)
                    inside = rows[:, None] & (k < K)[None, :]
                    x = tl.load(row + k.to(tl.int64)[None, :] * grad_column, mask=inside, other=0.0)
                    y = _scale_up(tl.where(finite[:, None], x.to(tl.float32), 0.0), short)
                    r = y - _round(y)
                    pair = (pair[0] + y * y, pair[1] + r * r)
                square += pair[0]
                lost += pair[1]
        allowed: tl.constexpr = 0.5**24 if grad.dtype.element_ty == tl.bfloat16 else 0.5**28
        wide = tl.sum(lost.to(tl.float64), 1) > tl.sum(square.to(tl.float64), 1) * allowed
        shift = tl.where(wide, shift, short)

    for k0 in range(0, KP, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(row + k.to(tl.int64)[None, :] * grad_column, mask=rows[:, None] & (k < K)[None, :], other=0.0)
        x = x.to(tl.float32)
        q = _round(_scale_up(tl.where(finite[:, None], x, 0.0), shift)).to(tl.int32)
        infinite = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) == 0x7F800000
        q = tl.where(infinite, tl.where(x > 0, 1, -1), q)
        to = digits + m.to(tl.int64)[:, None] * KP + k[None, :]
        inside = rows[:, None] & (k < KP)[None, :]
        for _ in tl.static_range(4):
            tl.store(to, q.to(tl.int8), mask=inside)
            q = (q + 128) >> 8
            to += tl.cast(M, tl.int64) * KP

    regular = _EXPONENT // 2 - shift + tl.where(wide, _WIDE, 0)
    tl.store(kind + m, tl.where(finite, regular, _SPECIAL + special), mask=rows)


@triton.jit
def _digit_tile(digits, m0, k0, M, KP, digit, BM: tl.constexpr, BK: tl.constexpr):
    # Digits run along K in memory, as int8 units want both sides.
    m = tl.arange(0, BM)
    digits += (tl.cast(digit, tl.int64) * M + m0) * KP + k0
    at = m.to(tl.int64)[:, None] * KP + tl.arange(0, BK)[None, :]
    return tl.trans(tl.load(digits + at, mask=(m0 + m < M)[:, None], other=0))


@triton.jit
def _part(K, BK: tl.constexpr):
    """Where this program's part of the sum begins and ends along K: as many parts as the grid's second size."""
    tiles = tl.cdiv(K, BK)
    part, parts = tl.program_id(1), tl.num_programs(1)
    begin = tiles // parts * part + tl.minimum(part, tiles % parts)
    end = begin + tiles // parts + (part < tiles % parts).to(tl.int32)
    return begin * BK, tl.minimum(end * BK, K)


@triton.jit
def _value(total, lowest, what, scale, dtype: tl.constexpr):
    """What sums of digits stand for in rows of kind `what`, in float32; `lowest`: the sums of the lowest digits."""
    # s as the entries of B hold it; the last place, a power of two, is put together from its exponent.
    s = tl.cast(scale, tl.float32).to(dtype).to(tl.float32).to(tl.float64)
    exponent = (what & (_EXPONENT - 1)) + (1023 - _EXPONENT // 2)
    last_place = (exponent.to(tl.int64) << 52).to(tl.float64, bitcast=True)
    value = (total.to(tl.float64) * (last_place * s)[None, :]).to(tl.float32)
    if tl.max(what, 0) >= _SPECIAL:
        # A row of infinities: all of them together, with one sign, or nothing.
        count = (what - _SPECIAL)[None, :]
        infinite = tl.where(lowest == count, float("inf"), tl.where(lowest == -count, float("-inf"), float("nan")))
        value = tl.where(count >= 0, infinite * s.to(tl.float32), value)
    return value


@triton.jit
def digit_product_kernel(
    digits,
    kind,
    out,
    sums,
    weight,
    planes,
    key,
    scale,
    M,
    N,
    K,
    KP,
    weight_row,
    weight_column,
    DIGITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INDEX: tl.constexpr,
):
    """out (M, N) = digits . signs * scale * the value of a last place; of half types, rows of 2 digits or rows of 4.

    With `sums` (parts of K, M, N), the sums of digits go there, and `add_digits_kernel` makes `out` of them.
    """
    pid_m, pid_n = _place(tl.cdiv(M, BM), tl.cdiv(N, BN))
    m0 = pid_m * BM
    n0 = pid_n * BN
    m = m0 + tl.arange(0, BM)
    what = tl.load(kind + m, mask=m < M, other=0)
    mine = m < M
    if out.dtype.element_ty != tl.float32:
        wide = (what & (_SPECIAL | _WIDE)) == _WIDE
        mine &= wide == (DIGITS == 4)
        if tl.max(mine.to(tl.int32), 0) == 0:
            return
    begin, end = (0, K) if sums is None else _part(K, BK)
    a = tl.zeros((BN, BM), tl.int32)
    b = tl.zeros((BN, BM), tl.int32)
    c = tl.zeros((BN, BM), tl.int32)
    d = tl.zeros((BN, BM), tl.int32)
    for k0 in range(begin, end, BK):
        sign = sign_tile(weight, weight_row, weight_column, planes, key, k0, n0, K, N, BN, BK, INDEX)
        a = tl.dot(sign, _digit_tile(digits, m0, k0, M, KP, 0, BM, BK), a)
        b = tl.dot(sign, _digit_tile(digits, m0, k0, M, KP, 1, BM, BK), b)
        if DIGITS == 4:
            c = tl.dot(sign, _digit_tile(digits, m0, k0, M, KP, 2, BM, BK), c)
            d = tl.dot(sign, _digit_tile(digits, m0, k0, M, KP, 3, BM, BK), d)
    total = (b.to(tl.int64) << 8) + a
    if DIGITS == 4:
        total += ((d.to(tl.int64) << 8) + c) << 16
    if sums is None:
        total = _value(total, a, what, scale, out.dtype.element_ty)
    else:
        out = sums + tl.program_id(1).to(tl.int64) * M * N
    n = n0 + tl.arange(0, BN)
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mine[None, :] & (n < N)[:, None])


@triton.jit
def add_digits_kernel(sums, kind, out, scale, M, N, parts, BLOCK: tl.constexpr):
    """out (M, N) of the sums of digits (parts, M, N)."""
    count = tl.cast(M, tl.int64) * N
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    total = tl.zeros((1, BLOCK), tl.int64)
    for part in range(parts):
        total += tl.load(sums + part * count + i, mask=inside, other=0)[None, :]
    what = tl.load(kind + i // N, mask=inside, other=0)
    # Digits of infinities are the lowest ones and nothing else.
    value = _value(total, total, what, scale, out.dtype.element_ty)
    tl.store((out + i)[None, :], value.to(out.dtype.element_ty), mask=inside[None, :])


@triton.jit
def product_kernel(
    grad,
    out,
    sums,
    weight,
    planes,
    magnitude,
    key,
    scale,
    M,
    N,
    K,
    grad_row,
    grad_column,
    weight_row,
    weight_column,
    magnitude_row,
    magnitude_column,
    ENTRIES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INDEX: tl.constexpr,
):
    """out (M, N) = dY B in the dtype of dY, sums in float32; with `sums` (parts of K, M, N), into those, to be added.

    Tensor cores cut the low bits of their sums; a half type's own rounding is 2^10 times what that loses in a sum of
    2^12 products. float32 is multiplied outside of them ("ieee").
    """
    pid_m, pid_n = _place(tl.cdiv(M, BM), tl.cdiv(N, BN))
    m0 = pid_m * BM
    n0 = pid_n * BN
    total = tl.zeros((BN, BM), tl.float32)
    scale = tl.cast(scale, tl.float32)
    begin, end = (0, K) if sums is None else _part(K, BK)
    for k0 in range(begin, end, BK):
        g = matrix_tile(grad, grad_row, grad_column, m0, k0, M, K, BK, BM, INDEX)
        b = feedback_tile(
            weight,
            weight_row,
            weight_column,
            planes,
            magnitude,
            magnitude_row,
            magnitude_column,
            key,
            scale,
            k0,
            n0,
            K,
            N,
            ENTRIES,
            BN,
            BK,
            INDEX,
        )
        total = tl.dot(b.to(g.dtype), g, total, input_precision="ieee")
    m = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    if sums is not None:
        out = sums + tl.program_id(1).to(tl.int64) * M * N
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def add_parts_kernel(sums, out, count, parts, BLOCK: tl.constexpr):
    """out (count) of the sums (parts, count), in float32 and always in the same order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(sums + tl.cast(part, tl.int64) * count + i, mask=inside, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=inside)


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _index(*tensors: Tensor | None) -> tl.dtype:
    # Of places in a tile of at most 128 by 128.
    return tl.int64 if any(128 * sum(_strides(x)) >= 2**31 for x in tensors) else tl.int32


@triton_op("bioplaus_triton::feedback_mm", mutates_args={})
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
    dtype, (m, k), n = grad_output.dtype, grad_output.shape, in_features
    if dtype == torch.float64:
        checks.fail("grad_output", "float32, bfloat16 or float16 (Triton has no float64 product)", dtype, TypeError)
    checks.feedback(weight, signs, magnitude, key, entries, scale, (k, n), packed_shape((k, n)))
    out = grad_output.new_empty(m, n)
    if m == 0 or n == 0 or k == 0:
        return out.zero_()
    if magnitude is not None and weight is None and signs is None and scale == 1 and magnitude.dtype == dtype:
        return torch.mm(grad_output, magnitude)
    planes, words = None if signs is None else signs.contiguous(), None if key is None else key.contiguous()

    constant = entries == "constant" and k <= _MAX_DEPTH
    if constant:
        of = "digits4" if dtype == torch.float32 else "digits2"
    else:
        of = "float32" if dtype == torch.float32 else "half"
    parts = configs.parts(of, configs.architecture(grad_output.device), m, n, k)
    form = torch.int64 if constant else torch.float32
    sums = out.new_empty(parts, m, n, dtype=form) if parts > 1 else None

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(m, meta["BM"]) * triton.cdiv(n, meta["BN"]), parts

    if constant:
        depth = -(-k // _PAD) * _PAD
        digits = grad_output.new_empty(4, m, depth, dtype=torch.int8)
        kind = grad_output.new_empty(m, dtype=torch.int32)
        rows, columns = QUANTISE_TILES[0 if k > 1024 else 1 if k > 256 else 2]
        wrap_triton(quantise_kernel)[(triton.cdiv(m, rows),)](
            grad_output, digits, kind, m, k, depth, *grad_output.stride(), BM=rows, BK=columns
        )
        # Half types in two launches, so that each has the registers of its own; the second mostly finds no row.
        for count in (4,) if dtype == torch.float32 else (2, 4):
            of, tuned_by = f"digits{count}", ("M", "N", "K", "DIGITS")
            kernel = configs.tunable(digit_product_kernel, of, grad_output, m, tuned_by)
            wrap_triton(kernel)[grid](
                digits,
                kind,
                out,
                sums,
                weight,
                planes,
                words,
                scale,
                m,
                n,
                k,
                depth,
                *_strides(weight),
                DIGITS=count,
                INDEX=_index(weight),
                **configs.tile_for(f"digits{count}", grad_output, m),
            )
        if sums is not None:
            wrap_triton(add_digits_kernel)[(triton.cdiv(m * n, REDUCE),)](
                sums, kind, out, scale, m, n, parts, BLOCK=REDUCE
            )
        return out

    kernel = configs.tunable(product_kernel, of, grad_output, m, ("M", "N", "K", "ENTRIES"))
    wrap_triton(kernel)[grid](
        grad_output,
        out,
        sums,
        weight,
        planes,
        magnitude,
        words,
        scale,
        m,
        n,
        k,
        *grad_output.stride(),
        *_strides(weight),
        *_strides(magnitude),
        ENTRIES=entries,
        INDEX=_index(grad_output, weight, magnitude),
        **configs.tile_for(of, grad_output, m),
    )
    if sums is not None:
        wrap_triton(add_parts_kernel)[(triton.cdiv(m * n, REDUCE),)](sums, out, m * n, parts, BLOCK=REDUCE)
    return out
