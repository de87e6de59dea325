"""The locally-connected products in Triton: a small product for each position, its patch gathered as it is read.

Activations are channels-last inside (one conversion at most), so that a tap's channels are adjacent, as they are in the
weights. The input gradient runs over input pixels: each takes the taps of the positions that see it, every weight is
read once for each tile of samples, and nothing is added atomically, so that the bits are the same each time.

Roofline, for P positions, blocks of O rows and J = taps * C / groups columns, N samples: 2 N P O J operations, and
P O J weights once for every tile of samples (the input gradient reads B's source in their place, the weight gradient
writes them); patches are read from the L2 cache, N P J each. Below about N = rate / bandwidth samples (150 in bf16 on
an A100, 10 in float32) the weights' bytes decide.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .. import reference
from ..reference import checks
from ..reference.lc import memory_format, output_size
from ..reference.pack_signs import packed_shape
from .launch import Tile, device_limits, fitting, launch, product, traced
from .loaders import add_product, signs_of

Ints = tuple[int, ...]


@triton.jit
def _coordinates(index, D1, D2):
    """(slowest, middle, fastest) of a flat index over three dims."""
    return index // (D1 * D2), index // D2 % D1, index % D2


@triton.jit
def _block(rows, columns, G, BM: tl.constexpr, BN: tl.constexpr):
    """Rows and columns of this program's tile, its group, and its position or pixel; neighbours share weights."""
    tiles_m, tiles_n = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    tile = tl.program_id(0)
    m = tile % tiles_m * BM + tl.arange(0, BM)
    tile //= tiles_m
    n = tile % tiles_n * BN + tl.arange(0, BN)
    tile //= tiles_n
    return m, n, tile % G, tile // G


@triton.jit
def _tap(start, tap, dilation, size):
    """Input coordinate of a tap, and whether it lies in the input."""
    at = start + tap * dilation
    return at, (at >= 0) & (at < size)


@triton.jit
def _patch(j, CI, position, I0, I1, I2, O1, O2, K1, K2, S0, S1, S2, B0, B1, B2, D0, D1, D2):
    """Pixel and channel of the group that columns j of the block of `position` read, and whether they are inside."""
    p0, p1, p2 = _coordinates(position, O1, O2)
    tap = j // CI
    t0, t1, t2 = _coordinates(tap, K1, K2)
    x0, in0 = _tap(p0 * S0 - B0, t0, D0, I0)
    x1, in1 = _tap(p1 * S1 - B1, t1, D1, I1)
    x2, in2 = _tap(p2 * S2 - B2, t2, D2, I2)
    return (x0.to(tl.int64) * I1 + x1) * I2 + x2, j - tap * CI, in0 & in1 & in2


@triton.jit
def forward_kernel(
    x, weight, bias, y, N, G, CI, CO, J, P,
    I0, I1, I2, O0, O1, O2, K0, K1, K2, S0, S1, S2, B0, B1, B2, D0, D1, D2,
    BIAS: tl.constexpr, WGMMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """y (N, P, G CO) = x (N, I, G CI) gathered . weight (P, G CO, J); BIAS is "", "channel" or "position"."""
    n, o, g, position = _block(N, CO, G, BM, BN)
    row = (tl.cast(position, tl.int64) * G + g) * CO + o
    sample = n.to(tl.int64) * I0 * I1 * I2 * (G * CI)
    total = tl.zeros((BN, BM), tl.float32)
    for j0 in range(0, J, BK):
        j = j0 + tl.arange(0, BK)
        pixel, c, inside = _patch(j, CI, position, I0, I1, I2, O1, O2, K1, K2, S0, S1, S2, B0, B1, B2, D0, D1, D2)
        at = pixel * (G * CI) + g * CI + c
        a = tl.load(x + sample[:, None] + at[None, :], mask=(n < N)[:, None] & (inside & (j < J))[None, :], other=0.0)
        b = tl.load(weight + row[:, None] * J + j[None, :], mask=(o < CO)[:, None] & (j < J)[None, :], other=0.0)
        total = add_product(total, b, tl.trans(a), WGMMA)
    if BIAS != "":
        where = row if BIAS == "position" else g * CO + o
        total += tl.load(bias + where, mask=o < CO, other=0.0).to(tl.float32)[:, None]
    to = (n.to(tl.int64) * P + position)[None, :] * (G * CO) + (g * CO + o)[:, None]
    tl.store(y + to, total.to(y.dtype.element_ty), mask=(o < CO)[:, None] & (n < N)[None, :])


@triton.jit
def _readers(pixel, positions, K, S, B, D):
    """In one dim, the positions that read `pixel`: how many, their taps (first, step) and they (last, step)."""
    start = pixel + B
    step = 1
    while (step < K) & (step * D % S != 0):
        step += 1
    tap = tl.maximum(0, tl.cdiv(start - (positions - 1) * S, D))
    while (tap < K) & ((start - tap * D) % S != 0):
        tap += 1
    count = tl.maximum(0, tl.cdiv(tl.minimum(K, start // D + 1) - tap, step))
    return count, tap, step, (start - tap * D) // S, step * D // S


@triton.jit
def backward_input_kernel(
    grad, weight, magnitude, dx, scale, N, G, CI, CO, J, P,
    I0, I1, I2, O0, O1, O2, K0, K1, K2, S0, S1, S2, B0, B1, B2, D0, D1, D2,
    WGMMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """dx (N, I, G CI) = sum over taps of grad (N, P, G CO) at the position that reads the pixel, times its block."""
    TYPE: tl.constexpr = grad.dtype.element_ty
    SIGN: tl.constexpr = TYPE if TYPE.primitive_bitwidth == 16 else tl.bfloat16
    n, c, g, pixel = _block(N, CI, G, BM, BN)
    x0, x1, x2 = _coordinates(pixel, I1, I2)
    count0, tap0, step0, first0, apart0 = _readers(x0, O0, K0, S0, B0, D0)
    count1, tap1, step1, first1, apart1 = _readers(x1, O1, K1, S1, B1, D1)
    count2, tap2, step2, first2, apart2 = _readers(x2, O2, K2, S2, B2, D2)
    i0, i1, i2, o0 = 0, 0, 0, 0
    total = tl.zeros((BN, BM), tl.float32)
    for _ in range(0, count0 * count1 * count2 * tl.cdiv(CO, BK)):
        tap = ((tap0 + i0 * step0) * K1 + tap1 + i1 * step1) * K2 + tap2 + i2 * step2
        position = tl.cast(first0 - i0 * apart0, tl.int64) * O1 + first1 - i1 * apart1
        position = position * O2 + first2 - i2 * apart2
        o = o0 + tl.arange(0, BK)
        at = (n.to(tl.int64) * P + position)[:, None] * (G * CO) + (g * CO + o)[None, :]
        a = tl.load(grad + at, mask=(n < N)[:, None] & (o < CO)[None, :], other=0.0)
        # An entry's place in the tile is 32 bits wide: two numbers a lane less, and no long division.
        first = (position * (G * CO) + (g * CO + o0)) * J + tap * CI
        offset = tl.arange(0, BK)[None, :] * J + c[:, None]
        inside = (c < CI)[:, None] & (o < CO)[None, :]
        if weight is not None:
            b = signs_of(tl.load(weight + first + offset, mask=inside, other=0.0), SIGN)
            if not WGMMA and magnitude is None:
                # A mask, although nothing is to be masked: without it every warp that needs a sign makes it anew.
                b = tl.where(inside, b, 0.0)
        if magnitude is not None:
            size = tl.load(magnitude + first + offset, mask=inside, other=0.0)
            if scale is not None:
                size = size.to(tl.float32) * scale
            if weight is not None:
                size = b.to(tl.float32) * tl.abs(size.to(tl.float32))
            b = size.to(TYPE)
        total = add_product(total, b, tl.trans(a), WGMMA)
        o0 += BK
        i2 = tl.where(o0 < CO, i2, i2 + 1)
        o0 = tl.where(o0 < CO, o0, 0)
        i1 = tl.where(i2 < count2, i1, i1 + 1)
        i2 = tl.where(i2 < count2, i2, 0)
        i0 = tl.where(i1 < count1, i0, i0 + 1)
        i1 = tl.where(i1 < count1, i1, 0)
    if magnitude is None:
        total *= tl.cast(scale, tl.float32).to(TYPE).to(tl.float32)
    to = (n.to(tl.int64) * (I0 * I1 * I2) + pixel)[None, :] * (G * CI) + (g * CI + c)[:, None]
    tl.store(dx + to, total.to(TYPE), mask=(c < CI)[:, None] & (n < N)[None, :])


@triton.jit
def backward_weight_kernel(
    grad, x, dw, N, G, CI, CO, J, P,
    I0, I1, I2, O0, O1, O2, K0, K1, K2, S0, S1, S2, B0, B1, B2, D0, D1, D2,
    WGMMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """dw (P, G CO, J) = grad (N, P, G CO), transposed, . x (N, I, G CI) gathered."""
    o, j, g, position = _block(CO, J, G, BM, BN)
    pixel, c, inside = _patch(j, CI, position, I0, I1, I2, O1, O2, K1, K2, S0, S1, S2, B0, B1, B2, D0, D1, D2)
    at = pixel * (G * CI) + g * CI + c
    inside &= j < J
    total = tl.zeros((BN, BM), tl.float32)
    for n0 in range(0, N, BK):
        n = n0 + tl.arange(0, BK)
        of = (n.to(tl.int64) * P + position)[:, None] * (G * CO) + (g * CO + o)[None, :]
        a = tl.load(grad + of, mask=(n < N)[:, None] & (o < CO)[None, :], other=0.0)
        sample = n.to(tl.int64) * I0 * I1 * I2 * (G * CI)
        b = tl.load(x + at[:, None] + sample[None, :], mask=inside[:, None] & (n < N)[None, :], other=0.0)
        total = add_product(total, b, a, WGMMA)
    to = ((tl.cast(position, tl.int64) * G + g) * CO + o)[None, :] * J + j[:, None]
    tl.store(dw + to, total.to(dw.dtype.element_ty), mask=(j < J)[:, None] & (o < CO)[None, :])


# In order of rows, chosen by what keeps sums and operands in registers; not yet timed on hardware.
_HALF = Tile(16, 64, 32, 4, 3), Tile(64, 64, 32, 8, 4), Tile(128, 64, 32, 8, 4)
_FLOAT32 = Tile(16, 64, 32, 8, 2), Tile(64, 64, 16, 4, 3), Tile(128, 64, 32, 8, 3)


@functools.lru_cache(4096)
def tile_for(width: int, rows: int, capability: tuple[int, int], shared: int) -> tuple[Tile, bool]:
    """The tile of a product of `rows` rows of numbers of `width` bytes, and whether float32 is multiplied in parts."""
    wgmma = capability[0] in (9, 10)
    # The largest leaves no registers for sums that are not the tensor cores'.
    tiles = _HALF if width == 2 else _FLOAT32 if wgmma else _FLOAT32[:2]
    rows = next((tile.rows for tile in tiles if rows <= tile.rows), tiles[-1].rows)  # a number, of a symbol too
    return fitting(tiles, rows, width, width, shared), wgmma


def _kept(function: Any, recorded: bool) -> Any:
    """A cached `function`, without its cache where sizes may be symbols, which have no hash."""
    return function.__wrapped__ if recorded else function


@functools.lru_cache(4096)
def _geometry(
    weight_size: Any, input_size: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int, channels: Any = None
) -> tuple[Ints, Ints, Ints]:
    """Size of the output, checked, and of kernels: (G, CI, CO, J, P), (I0, I1, ... D2)."""
    d = len(stride)
    kernel, c = weight_size[d + 1 : -1], weight_size[-1]
    checks.geometry(stride, padding, dilation, groups, kernel)
    out = tuple(output_size(input_size, kernel, stride, padding, dilation))
    weight_size = out + weight_size[d:] if weight_size[0] is None else weight_size  # a weight that is to be
    checks.lc_shapes(weight_size, input_size, out, groups, channels)
    sizes = groups, c, weight_size[d] // groups, math.prod(kernel) * c, math.prod(out)
    named = (input_size, 1), (out, 1), (kernel, 1), (stride, 1), (padding[::2], 0), (dilation, 1)
    places = tuple(itertools.chain.from_iterable((fill,) * (3 - d) + values for values, fill in named))
    return out, sizes, places


def _begin(name: str, x: Tensor, geometry: Sequence[Any]) -> tuple[int, bool, tuple[Any, ...]]:
    """Dimensions, whether the launch is recorded, and stride, padding, dilation, groups with a hash; `x` is checked."""
    checks.floating(name, x)
    if x.dtype == torch.float64:
        checks.fail(name, "float32, bfloat16 or float16 (Triton has no float64 product)", x.dtype, TypeError)
    d = len(geometry[0])
    checks.rank(name, x, d + 2)
    return d, traced(x), (*map(tuple, geometry[:3]), geometry[3])


def _last(x: Tensor) -> Tensor:
    """`x` with its channels innermost in dense memory."""
    return x.movedim(1, -1).contiguous()


def _result(size: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """A result in the format of `like`, and what a kernel writes, channels-last: the same memory where that fits."""
    result = torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format(like))
    last = result.movedim(1, -1)
    return result, result if last.is_contiguous() else result.new_empty(last.shape).movedim(-1, 1)


def _multiply(
    kernel: Any, recorded: bool, rows: int, columns: int, blocks: int, tensors: Any, numbers: Any, **constants: Any
) -> None:
    """`blocks` products of `rows` x `columns`, in tiles."""
    tile, wgmma = _kept(tile_for, recorded)(tensors[0].element_size(), rows, *device_limits(tensors[0].device))
    grid = -(-rows // tile.rows) * -(-columns // tile.columns) * blocks, 1, 1
    launch(kernel, grid, tensors, numbers, {**constants, "WGMMA": wgmma, **tile.constants()})


@product(reference.lc_forward)
def lc_forward(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    d, recorded, geometry = _begin("input", input, geometry)
    checks.rank("weight", weight, 2 * d + 2)
    checks.same("weight", weight, input)
    n, o = input.shape[0], weight.shape[d]
    out, sizes, places = _kept(_geometry, recorded)(weight.shape, input.shape[2:], *geometry, input.shape[1])
    if bias is not None:
        checks.same("bias", bias, input)
        checks.shape("bias", bias, (*out, o) if bias.dim() > 1 else (o,))
        bias = bias.contiguous()
    result, y = _result((n, o, *out), input)
    if n > 0:
        g, _, co, _, positions = sizes
        # Named here: torch keys compiled graphs by the kernels that it finds in an op's own source.
        kernel = wrap_triton(forward_kernel) if recorded else forward_kernel
        tensors, numbers = (_last(input), weight.contiguous(), bias, y), (n, *sizes, *places)
        kind = "" if bias is None else "channel" if bias.dim() == 1 else "position"
        _multiply(kernel, recorded, n, co, g * positions, tensors, numbers, BIAS=kind)
    return result if y is result else result.copy_(y)


@product(reference.lc_backward_input)
def lc_backward_input(grad_output: Tensor, *rest: Any) -> Tensor:
    weight, signs, magnitude, key, entries, scale, weight_size, input_size, *layer = rest
    d, recorded, geometry = _begin("grad_output", grad_output, layer)
    size = tuple(weight_size)
    out, sizes, places = _kept(_geometry, recorded)(size, tuple(input_size), *geometry)
    n = grad_output.shape[0]
    checks.shape("grad_output", grad_output, (n, size[d], *out))
    checks.feedback(weight, signs, magnitude, key, entries, scale, size, packed_shape(size), grad_output.device)
    if signs is not None or key is not None:
        # A word looked up or drawn for each entry: 539 and 767 instructions a step (bf16, sm_90), with a stored B 144.
        checks.fail("feedback", "weight or magnitude (Triton has no kernel for packed signs and keys)", "signs or key")
    g, c, *_ = sizes
    result, dx = _result((n, c * g, *input_size), grad_output)
    if n > 0:
        sources = [None if x is None else x.contiguous() for x in (weight, magnitude)]
        plain = magnitude is not None and weight is None and scale == 1
        numbers = (None if plain else float(scale), n, *sizes, *places)
        kernel = wrap_triton(backward_input_kernel) if recorded else backward_input_kernel
        _multiply(kernel, recorded, n, c, g * math.prod(places[:3]), (_last(grad_output), *sources, dx), numbers)
    return result if dx is result else result.copy_(dx)


@product(reference.lc_backward_weight)
def lc_backward_weight(grad_output: Tensor, input: Tensor, kernel_size: Sequence[int], *geometry: Any) -> Tensor:
    d, recorded, geometry = _begin("input", input, geometry)
    checks.same("grad_output", grad_output, input)
    n, channels = input.shape[:2]
    if geometry[3] < 1 or channels % geometry[3]:
        checks.fail("groups", f"a divisor of the {channels} input channels", geometry[3])
    block = grad_output.shape[1], *kernel_size, channels // geometry[3]
    out, sizes, places = _kept(_geometry, recorded)(((None,) * d) + block, input.shape[2:], *geometry, channels)
    checks.shape("grad_output", grad_output, (n, block[0], *out))
    dw = grad_output.new_empty(*out, *block)
    g, _, co, columns, positions = sizes
    kernel = wrap_triton(backward_weight_kernel) if recorded else backward_weight_kernel
    tensors = _last(grad_output), _last(input), dw
    _multiply(kernel, recorded, co, columns, g * positions, tensors, (n, *sizes, *places))
    return dw
