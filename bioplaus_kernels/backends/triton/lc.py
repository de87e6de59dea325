"""The locally-connected products in Triton: a small product for each position, its patch gathered as it is read.

Activations are channels-last inside (one conversion at most), so that a tap's channels are adjacent, as they are in the
weights. The input gradient runs over input pixels: each takes the taps of the positions that see it, every weight is
read once for each tile of samples, and nothing is added atomically, so that the bits are the same each time.

Roofline, for P positions, blocks of O rows and J = taps * C / groups columns, N samples: 2 N P O J operations, and
P O J weights once for every tile of samples (the input gradient reads B's source in their place, the weight gradient
writes them); patches are read from the L2 cache, N P J each. Below about N = rate / bandwidth samples (150 in bf16 on
an A100, 10 in float32) the weights' bytes decide.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ..reference import checks
from ..reference.lc import memory_format, output_size
from ..reference.pack_signs import packed_shape
from . import configs
from .loaders import feedback_entries


@triton.jit
def _coordinates(index, D1, D2):
    """(slowest, middle, fastest) of a flat index over three dims."""
    return index // (D1 * D2), index // D2 % D1, index % D2


@triton.jit
def _tap(start, tap, dilation, size):
    """Input coordinate of a tap, and whether it lies in the input."""
    at = start + tap * dilation
    return at, (at >= 0) & (at < size)


@triton.jit
def _patch(
    j, CI, position, I0, I1, I2, O1, O2, K1, K2, S0, S1, S2, B0, B1, B2, D0, D1, D2
):  # fmt: skip
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
    x, weight, bias, y, N, G, CI, CO, J, P, I0, I1, I2, O1, O2, K1, K2, S0, S1, S2, B0, B1, B2, D0, D1, D2,
    BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """y (N, P, G CO) = x (N, I, G CI) gathered . weight (P, G CO, J); BIAS is "", "channel" or "position"."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(N, BM), tl.cdiv(CO, BN)
    n = pid % tiles_m * BM + tl.arange(0, BM)  # programs that share weights are neighbours
    pid //= tiles_m
    o = pid % tiles_n * BN + tl.arange(0, BN)
    pid //= tiles_n
    g = pid % G
    position = pid // G
    row = (tl.cast(position, tl.int64) * G + g) * CO + o
    total = tl.zeros((BM, BN), tl.float32)
    for j0 in range(0, J, BK):
        j = j0 + tl.arange(0, BK)
        pixel, c, inside = _patch(j, CI, position, I0, I1, I2, O1, O2, K1, K2, S0, S1, S2, B0, B1, B2, D0, D1, D2)
        at = pixel * (G * CI) + g * CI + c
        sample = n.to(tl.int64) * I0 * I1 * I2 * (G * CI)
        a = tl.load(x + sample[:, None] + at[None, :], mask=(n < N)[:, None] & (inside & (j < J))[None, :], other=0.0)
        b = tl.load(weight + row[None, :] * J + j[:, None], mask=(o < CO)[None, :] & (j < J)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    if BIAS != "":
        where = row if BIAS == "position" else g * CO + o
        total += tl.load(bias + where, mask=o < CO, other=0.0).to(tl.float32)[None, :]
    to = (n.to(tl.int64) * P + position)[:, None] * (G * CO) + (g * CO + o)[None, :]
    tl.store(y + to, total.to(y.dtype.element_ty), mask=(n < N)[:, None] & (o < CO)[None, :])


@triton.jit
def _position(pixel, tap, stride, before, dilation, out):
    """The position that reads `pixel` with `tap`, and whether there is one."""
    start = pixel + before - tap * dilation
    position = start // stride
    return position, (start >= 0) & (position * stride == start) & (position < out)


@triton.jit
def backward_input_kernel(
    grad, weight, planes, magnitude, key, scale, dx, N, G, CI, CO, J, P, ROWS, COLUMNS,
    I0, I1, I2, O0, O1, O2, K0, K1, K2, S0, S1, S2, B0, B1, B2, D0, D1, D2,
    ENTRIES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """dx (N, I, G CI) = sum over taps of grad (N, P, G CO) at the position that reads the pixel, times its block."""
    scale = tl.cast(scale, tl.float32)
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(N, BM), tl.cdiv(CI, BN)
    n = pid % tiles_m * BM + tl.arange(0, BM)
    pid //= tiles_m
    c = pid % tiles_n * BN + tl.arange(0, BN)
    pid //= tiles_n
    g = pid % G
    pixel = pid // G
    x0, x1, x2 = _coordinates(pixel, I1, I2)
    total = tl.zeros((BM, BN), tl.float32)
    for t0 in range(0, K0):
        p0, in0 = _position(x0, t0, S0, B0, D0, O0)
        for t1 in range(0, K1):
            p1, in1 = _position(x1, t1, S1, B1, D1, O1)
            for t2 in range(0, K2):
                p2, in2 = _position(x2, t2, S2, B2, D2, O2)
                if in0 & in1 & in2:
                    position = (p0.to(tl.int64) * O1 + p1) * O2 + p2
                    tap = (t0 * K1 + t1) * K2 + t2
                    for o0 in range(0, CO, BK):
                        o = o0 + tl.arange(0, BK)
                        at = (n.to(tl.int64) * P + position)[:, None] * (G * CO) + (g * CO + o)[None, :]
                        a = tl.load(grad + at, mask=(n < N)[:, None] & (o < CO)[None, :], other=0.0)
                        # An entry's place in the tile is 32 bits wide: two numbers a lane less, and no long division.
                        first = (position * (G * CO) + (g * CO + o0)) * J + tap * CI
                        offset = tl.arange(0, BK)[:, None] * J + c[None, :]
                        inside = (o < CO)[:, None] & (c < CI)[None, :]
                        b = feedback_entries(
                            weight, planes, magnitude, key, scale, first, offset, inside, ROWS, COLUMNS, ENTRIES
                        )
                        total = tl.dot(a, b.to(a.dtype), total, input_precision="ieee")
    to = (n.to(tl.int64) * (I0 * I1 * I2) + pixel)[:, None] * (G * CI) + (g * CI + c)[None, :]
    tl.store(dx + to, total.to(dx.dtype.element_ty), mask=(n < N)[:, None] & (c < CI)[None, :])


@triton.jit
def backward_weight_kernel(
    grad, x, dw, N, G, CI, CO, J, P, I0, I1, I2, O1, O2, K1, K2, S0, S1, S2, B0, B1, B2, D0, D1, D2,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """dw (P, G CO, J) = grad (N, P, G CO), transposed, . x (N, I, G CI) gathered."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(CO, BM), tl.cdiv(J, BN)
    o = pid % tiles_m * BM + tl.arange(0, BM)
    pid //= tiles_m
    j = pid % tiles_n * BN + tl.arange(0, BN)
    pid //= tiles_n
    g = pid % G
    position = pid // G
    pixel, c, inside = _patch(j, CI, position, I0, I1, I2, O1, O2, K1, K2, S0, S1, S2, B0, B1, B2, D0, D1, D2)
    at = pixel * (G * CI) + g * CI + c
    inside &= j < J
    total = tl.zeros((BM, BN), tl.float32)
    for n0 in range(0, N, BK):
        n = n0 + tl.arange(0, BK)
        of = (n.to(tl.int64) * P + position)[None, :] * (G * CO) + (g * CO + o)[:, None]
        a = tl.load(grad + of, mask=(n < N)[None, :] & (o < CO)[:, None], other=0.0)
        sample = n.to(tl.int64) * I0 * I1 * I2 * (G * CI)
        b = tl.load(x + sample[:, None] + at[None, :], mask=(n < N)[:, None] & inside[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    to = ((tl.cast(position, tl.int64) * G + g) * CO + o)[:, None] * J + j[None, :]
    tl.store(dw + to, total.to(dw.dtype.element_ty), mask=(o < CO)[:, None] & (j < J)[None, :])


def _three(values: Sequence[int], fill: int) -> tuple[int, ...]:
    return (*(fill,) * (3 - len(values)), *values)


def _geometry(
    size: Sequence[int],
    out: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> dict[str, int]:
    """The kernels' arguments, in three dims."""
    named = (
        ("I", size, 1), ("O", out, 1), ("K", kernel, 1), ("S", stride, 1), ("B", padding[::2], 0), ("D", dilation, 1)
    )  # fmt: skip
    return {f"{name}{i}": v for name, values, fill in named for i, v in enumerate(_three(values, fill))}


def _supported(name: str, x: Tensor) -> None:
    checks.floating(name, x)
    if x.dtype == torch.float64:
        checks.fail(name, "float32, bfloat16 or float16 (Triton has no float64 product)", x.dtype, TypeError)


_TUNED_BY = ("N", "CI", "CO", "J")


def _kind(x: Tensor) -> str:
    return "lc_float32" if x.dtype == torch.float32 else "lc_half"


def _taken(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name in kernel.arg_names}


def _last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous()


def _result(size: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """A result in the format of `like`, and what a kernel writes, channels-last: the same memory where that fits."""
    result = torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format(like))
    last = result.movedim(1, -1)
    return result, last if last.is_contiguous() else torch.empty_like(last, memory_format=torch.contiguous_format)


def _finished(result: Tensor, written: Tensor) -> Tensor:
    last = result.movedim(1, -1)
    if not last.is_contiguous():
        last.copy_(written)
    return result


@triton_op("bioplaus_triton::lc_forward", mutates_args={})
def lc_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """y[n, o, p] = bias[p, o] + sum over t, c of weight[p, o, t, c] * x[n, c, p * stride + t * dilation - before]."""
    d = len(stride)
    _supported("input", input)
    checks.rank("input", input, d + 2)
    checks.rank("weight", weight, 2 * d + 2)
    out, o, kernel = weight.shape[:d], weight.shape[d], weight.shape[d + 1 : -1]
    checks.geometry(stride, padding, dilation, groups, kernel)
    expected = output_size(input.shape[2:], kernel, stride, padding, dilation)
    checks.lc_shapes(weight.shape, input.shape[2:], expected, groups, input.shape[1])
    checks.same("weight", weight, input)
    if bias is not None:
        checks.same("bias", bias, input)
        checks.shape("bias", bias, (*out, o) if bias.dim() > 1 else (o,))
    n, c = input.shape[0], input.shape[1] // groups
    x, (result, y) = _last(input), _result((n, o, *out), input)
    positions = math.prod(out)
    if y.numel() > 0:
        arguments = _geometry(input.shape[2:], out, kernel, stride, padding, dilation) | {
            "x": x, "weight": weight.contiguous(), "bias": None if bias is None else bias.contiguous(), "y": y, "N": n,
            "G": groups, "CI": c, "CO": o // groups, "J": math.prod(kernel) * c, "P": positions,
            "BIAS": "" if bias is None else "channel" if bias.dim() == 1 else "position",
        }  # fmt: skip

        def grid(meta: dict[str, int]) -> tuple[int]:
            return (triton.cdiv(n, meta["BM"]) * triton.cdiv(o // groups, meta["BN"]) * groups * positions,)

        product = configs.tunable(forward_kernel, _kind(input), input, n, _TUNED_BY)
        tile = configs.tile_for(_kind(input), input, n)
        wrap_triton(product)[grid](**_taken(forward_kernel, arguments), **tile)
    return _finished(result, y)


@triton_op("bioplaus_triton::lc_backward_input", mutates_args={})
def lc_backward_input(
    grad_output: Tensor,
    weight: Tensor | None,
    signs: Tensor | None,
    magnitude: Tensor | None,
    key: Tensor | None,
    entries: str,
    scale: float,
    weight_size: Sequence[int],
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """dx: each position's block of B, transposed, times its output gradient, summed where patches overlap."""
    d = len(stride)
    _supported("grad_output", grad_output)
    checks.rank("grad_output", grad_output, d + 2)
    out, kernel = weight_size[:d], weight_size[d + 1 : -1]
    checks.geometry(stride, padding, dilation, groups, kernel)
    checks.lc_shapes(weight_size, input_size, output_size(input_size, kernel, stride, padding, dilation), groups)
    checks.shape("grad_output", grad_output, (grad_output.shape[0], weight_size[d], *out))
    checks.feedback(weight, signs, magnitude, key, entries, scale, weight_size, packed_shape(weight_size))
    n, o, c = grad_output.shape[0], weight_size[d] // groups, weight_size[-1]
    result, dx = _result((n, c * groups, *input_size), grad_output)
    if grad_output.numel() == 0 or dx.numel() == 0:
        dx.zero_()
    else:
        arguments = _geometry(input_size, out, kernel, stride, padding, dilation) | {
            "grad": _last(grad_output), "weight": None if weight is None else weight.contiguous(),
            "planes": None if signs is None else signs.contiguous(),
            "magnitude": None if magnitude is None else magnitude.contiguous(),
            "key": None if key is None else key.contiguous(), "scale": scale, "dx": dx, "N": n, "G": groups, "CI": c,
            "CO": o, "J": math.prod(kernel) * c, "P": math.prod(out), "ROWS": weight_size[0],
            "COLUMNS": math.prod(weight_size[1:]), "ENTRIES": entries,
        }  # fmt: skip
        pixels = math.prod(input_size)

        def grid(meta: dict[str, int]) -> tuple[int]:
            return (triton.cdiv(n, meta["BM"]) * triton.cdiv(c, meta["BN"]) * groups * pixels,)

        product = configs.tunable(backward_input_kernel, _kind(grad_output), grad_output, n, _TUNED_BY)
        tile = configs.tile_for(_kind(grad_output), grad_output, n)
        wrap_triton(product)[grid](**_taken(backward_input_kernel, arguments), **tile)
    return _finished(result, dx)


@triton_op("bioplaus_triton::lc_backward_weight", mutates_args={})
def lc_backward_weight(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """dW[p, o, t, c] = sum over n of grad_output[n, o, p] * input[n, c, p * stride + t * dilation - before]."""
    d = len(stride)
    _supported("input", input)
    checks.same("grad_output", grad_output, input)
    checks.rank("input", input, d + 2)
    checks.geometry(stride, padding, dilation, groups, kernel_size)
    if input.shape[1] % groups:
        checks.fail("groups", f"a divisor of the {input.shape[1]} input channels", groups)
    n, o, out, c = input.shape[0], grad_output.shape[1], grad_output.shape[2:], input.shape[1] // groups
    expected = output_size(input.shape[2:], kernel_size, stride, padding, dilation)
    checks.lc_shapes((*expected, o, *kernel_size, c), input.shape[2:], expected, groups)
    checks.shape("grad_output", grad_output, (n, o, *expected))
    dw = grad_output.new_empty(*out, o, *kernel_size, c)
    columns, positions = math.prod(kernel_size) * c, math.prod(out)
    if n == 0:
        return dw.zero_()
    if dw.numel() > 0:
        arguments = _geometry(input.shape[2:], out, kernel_size, stride, padding, dilation) | {
            "grad": _last(grad_output), "x": _last(input), "dw": dw, "N": n, "G": groups, "CI": c, "CO": o // groups,
            "J": columns, "P": positions,
        }  # fmt: skip

        def grid(meta: dict[str, int]) -> tuple[int]:
            return (triton.cdiv(o // groups, meta["BM"]) * triton.cdiv(columns, meta["BN"]) * groups * positions,)

        product = configs.tunable(backward_weight_kernel, _kind(input), input, o // groups, _TUNED_BY)
        tile = configs.tile_for(_kind(input), input, o // groups)
        wrap_triton(product)[grid](**_taken(backward_weight_kernel, arguments), **tile)
    return dw
