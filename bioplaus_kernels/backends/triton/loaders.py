"""Tiles of signs, made in registers as they are needed, and what a product makes of them: csrc/common/feedback.h in
Triton. Where signs come from follows from which pointers are None, so that a tile's code holds nothing of the others.
"""

import triton
import triton.language as tl

SIGNS_PER_CALL = tl.constexpr(128)
TILE_ROWS = tl.constexpr(64)  # of a flag of packed signs


@triton.jit
def widen(x):
    return x.to(tl.float32) if x.dtype.primitive_bitwidth < 32 else x


@triton.jit
def draw(key, call, row):
    """The four words of call number `call` of row `row`: csrc/common/philox.h."""
    stream = tl.load(key + 2)
    low = stream.to(tl.uint32)
    high = (stream >> 32).to(tl.uint32)
    call, row = tl.broadcast(call.to(tl.uint32), row.to(tl.uint32))
    return tl.philox(tl.load(key + 1), call, row, low, high)


@triton.jit
def one(dtype: tl.constexpr):
    """The bits of 1 in a half type."""
    return 0x3F80 if dtype == tl.bfloat16 else 0x3C00


@triton.jit
def signs_of(w, dtype: tl.constexpr):
    """Signs of weights of any dtype as numbers of a half type, from their bits: a 0 may be -0, a NaN has none."""
    width: tl.constexpr = w.dtype.primitive_bitwidth
    integer: tl.constexpr = tl.int64 if width == 64 else tl.int32 if width == 32 else tl.int16
    sign = (w.to(integer, bitcast=True) >> (width - 16)).to(tl.int16) & -32768
    return (sign | tl.where(tl.abs(widen(w)) > 0, one(dtype), 0).to(tl.int16)).to(dtype, bitcast=True)


@triton.jit
def interleave(a, b, c, d):
    """Four (R, C) tiles as one (4 R, C) tile, rows in turn."""
    x = tl.join(tl.join(a, c), tl.join(b, d))  # (R, C, 2, 2), the last two dims in the order of the words
    x = tl.permute(x, (0, 2, 3, 1))
    return tl.reshape(x, (4 * a.shape[0], a.shape[1]))


@triton.jit
def unfold(words):
    """Bits of an (R, C) tile of words, each as the highest of 16: (32 R, C) of int16, the other bits anything."""
    bits = (words.to(tl.int32, bitcast=True)[:, None, :] >> tl.arange(0, 32)[None, :, None]) << 15
    return tl.reshape(bits.to(tl.int16), (32 * words.shape[0], words.shape[1]))


@triton.jit
def matrix_tile(x, row, column, k0, n0, rows, columns, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr):
    """Elements of rows k0 ... and columns n0 ... of a strided matrix, transposed: (BN, BK), 0 outside.

    Where the tile lies is one 64-bit number; the places in it are 32 bits wide unless strides are huge (WIDE).
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    k = tl.arange(0, BK)
    n = tl.arange(0, BN)
    x += tl.cast(k0, tl.int64) * row + tl.cast(n0, tl.int64) * column
    at = n.to(INDEX)[:, None] * column + k.to(INDEX)[None, :] * row
    return tl.load(x + at, mask=(n0 + n < columns)[:, None] & (k0 + k < rows)[None, :], other=0.0)


@triton.jit
def sign_tile(
    weight, weight_row, weight_column, planes, key, k0, n0, rows, columns,
    dtype: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Signs of rows k0 ... and of columns n0 ..., a multiple of 128, transposed: (BN, BK) of a half type.

    Entries outside the matrix are anything from -1 to 1.
    """
    if weight is not None:
        signs = signs_of(matrix_tile(weight, weight_row, weight_column, k0, n0, rows, columns, BN, BK, WIDE), dtype)
    else:
        units = tl.full((BN, BK), one(dtype), tl.int16)
        if planes is not None:
            words = tl.cdiv(columns, SIGNS_PER_CALL) * 4
            word = tl.arange(0, BN // 32)
            k = tl.arange(0, BK)
            inside = (k0 + k < rows)[None, :] & (n0 // 32 + word < words)[:, None]
            at = k[None, :] * words + word[:, None]
            planes += n0 // 32
            tile = tl.cast(k0, tl.int32) // TILE_ROWS
            flags = planes + (tl.cast(rows, tl.int64) * 2 + tile) * words
            flag = tl.load(
                flags + ((k0 + k) // TILE_ROWS - tile)[None, :] * words + word[:, None], mask=inside, other=0
            )
            planes += tl.cast(k0, tl.int64) * words
            negative = tl.load(planes + at, mask=inside, other=0)
            # The second plane is read only where the flag says that a tile holds a zero.
            planes += tl.cast(rows, tl.int64) * words
            nonzero = unfold(tl.load(planes + at, mask=inside & (flag != 0), other=-1))
            units = tl.where(nonzero < 0, units, 0)
        else:
            call = n0 // SIGNS_PER_CALL + tl.arange(0, BN // SIGNS_PER_CALL)
            a, b, c, d = draw(key, call[:, None], (k0 + tl.arange(0, BK))[None, :])
            negative = interleave(a, b, c, d)
        signs = ((unfold(negative) & -32768) | units).to(dtype, bitcast=True)
    return signs


@triton.jit
def saturated(x):
    """float32 numbers in bfloat16, of which none is infinite."""
    largest: tl.constexpr = 3.3895313892515355e38
    return tl.clamp(x, -largest, largest, propagate_nan=tl.PropagateNan.ALL).to(tl.bfloat16)


@triton.jit
def parts(x):
    """float32 numbers as high + (middle + low / 256) / 256 in bfloat16: lower parts keep their bits at 1e-40 too.

    An infinity is its low part, beside ±1: finite numbers have finite parts, and no sum has an infinity of its own.
    """
    infinity: tl.constexpr = float("inf")
    high = saturated(tl.where(tl.abs(x) == infinity, tl.where(x > 0, 1.0, -1.0), x))
    rest = (x - high.to(tl.float32)) * 256.0
    middle = saturated(tl.where(tl.abs(rest) == infinity, 0.0, rest))
    return high, middle, ((rest - middle.to(tl.float32)) * 256.0).to(tl.bfloat16)


@triton.jit
def add_product(total, b, a, PARTS: tl.constexpr):
    """total + b . a. Of float32 by PARTS, the least products first: what is left out is below 2^-24 of one."""
    if not PARTS or a.dtype != tl.float32:
        return tl.dot(b.to(a.dtype), a, total, input_precision="ieee")
    else:
        high, middle, low = parts(a)
        if b.dtype == tl.float32:
            b0, b1, b2 = parts(b)
            least = tl.dot(b0, low, tl.dot(b2, high, tl.dot(b1, middle)))
            less = tl.dot(b1, high, least * (1.0 / 256))
        else:  # signs, which are bfloat16's own
            b0 = b
            less = tl.dot(b, low) * (1.0 / 256)
        # Tensor cores cut what they add: each step starts from zero, and is rounded into the sum.
        return total + tl.dot(b0, high, tl.dot(b0, middle, less) * (1.0 / 256))
