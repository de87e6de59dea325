"""feedback_mm: ±s feedback has the CPU's bits, other entries keep the error bound, also where tensor cores truncate."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import test_feedback_mm as contract
import torch
from bitwise import KEY, assert_same_bits
from torch import Tensor

from bioplaus_kernels import ops as native_ops
from bioplaus_kernels.backends import native, reference
from cuda_host.host import ops, truncating

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
needs_cpu = pytest.mark.skipif(native.library is None, reason=f"no native library: {native.reason}")


def mixed(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows of every kind side by side: what 16 bits can hold, what they cannot, and what no digits can."""
    x = torch.randn(m, k, dtype=torch.float64)
    x[1::8] *= torch.exp(4 * torch.randn(x[1::8].shape, dtype=torch.float64))
    x[2::8] *= 1e-40 if dtype != torch.float16 else 1e-7  # subnormal
    x[3::8] *= torch.rand(x[3::8].shape) < 0.05
    x[4::8, k // 3] = 65500  # an outlier, whose leading digit has no room left
    x[5::8, k // 2] = -math.inf
    x[5::16, -1] = math.inf
    x[6::8] = 0
    x[7::8, 0] = math.nan
    return x.clamp(-65500, 65500).where(x.isfinite(), x).to(dtype)


def weight(k: int, n: int) -> Tensor:
    """A zero here and there, so that some tiles of 64 × 32 hold one and others none."""
    w = torch.randn(k, n)
    w.view(-1)[:: max(1, k * n // 5)] = 0
    return w


def sources(k: int, n: int) -> dict[str, tuple]:
    """Where signs come from."""
    w = weight(k, n)
    dense = torch.where(w == 0, 1.0, w)
    shifted = torch.empty(native_ops.pack_signs(w).numel() + 1, dtype=torch.int32)[1:].view_as(native_ops.pack_signs(w))
    return {
        "key": (None, None, None, KEY),
        "packed": (None, native_ops.pack_signs(dense), None, None),
        "packed with zeros": (None, native_ops.pack_signs(w), None, None),
        "packed, unaligned": (None, shifted.copy_(native_ops.pack_signs(w)), None, None),
        "weight": (w, None, None, None),
        "weight transposed": (w.t().contiguous().t().bfloat16(), None, None, None),
        "weight sliced": (weight(2 * k, 3 * n)[::2, ::3], None, None, None),
    }


def same_as_cpu(grad: Tensor, source: tuple, n: int) -> None:
    args = (*source, "constant", 0.37, n)
    assert_same_bits(ops.feedback_mm(grad, *args), native_ops.feedback_mm(grad, *args))


# A tile has 8, 16 or 32 rows (half types 16, 32, 64), 256, 256 or 128 columns; 4 stages of 64 entries along K.
SHAPES = {
    "one entry": (1, 1, 1),
    "primes": (7, 67, 131),
    "one stage and a whole tile": (8, 64, 256),
    "small tiles, two and one column": (5, 70, 513),
    "middle tiles, two and one column": (16, 130, 513),
    "middle tile of half types": (31, 67, 130),
    "two large tiles and a row": (65, 70, 130),
    "two large tiles of half types and a row": (129, 66, 33),
    "large tiles, two and one column": (35, 65, 257),
    "the pipeline wraps": (3, 64 * 6 + 5, 34),
    "the large pipeline wraps": (33, 64 * 6 + 5, 34),
    "one row, parts of K": (1, 64 * 16, 70),
    "ragged parts of K": (9, 64 * 26 + 1, 33),
    "large tiles, parts of K": (67, 64 * 17 + 3, 129),
}


@needs_cpu
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_bits(shape: str, dtype: torch.dtype) -> None:
    m, k, n = SHAPES[shape]
    every = sources(k, n)
    few = ("key", "packed with zeros") if m * k * n > 500_000 else tuple(every)
    for name in few:
        same_as_cpu(mixed(m, k, dtype), every[name], n)


@needs_cpu
@dtypes
def test_bits_of_strided_rows(dtype: torch.dtype) -> None:
    m, k, n = 11, 150, 70
    source = sources(k, n)["packed with zeros"]
    dense = mixed(m, k, dtype)
    spread = torch.empty(2 * m, 3 * k + 1, dtype=dtype)[::2, 1::3]
    for grad in (dense.t().contiguous().t(), spread.copy_(dense), dense[:1].expand(m, k), dense[:, :1].expand(m, k)):
        same_as_cpu(grad, source, n)


@needs_cpu
@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype)[6:])
def test_width_is_each_rows_own(dtype: torch.dtype) -> None:
    """A tile whose rows are all 16 bits wide, then one of them not: the others' bits stay."""
    k, n = 3 * 64, 40
    grad = torch.randn(40, k).to(dtype)
    args = (*sources(k, n)["key"], "constant", 0.37, n)
    narrow = ops.feedback_mm(grad, *args)
    assert_same_bits(narrow, native_ops.feedback_mm(grad, *args))
    for row in (1, 34):
        other = grad.clone()
        other[row] = mixed(2, k, dtype)[1]
        actual = ops.feedback_mm(other, *args)
        others = torch.arange(40) != row
        assert_same_bits(actual[others], narrow[others])
        assert_same_bits(actual, native_ops.feedback_mm(other, *args))


@dtypes
def test_empty(dtype: torch.dtype) -> None:
    for m, k, n in ((0, 5, 3), (4, 5, 0), (4, 0, 3), (0, 0, 0)):
        for cell in contract.CELLS:
            result = ops.feedback_mm(torch.ones(m, k, dtype=dtype), *contract.operands(cell, k, n, dtype), n)
            assert torch.equal(result, torch.zeros(m, n, dtype=dtype))


def apart(near: Tensor) -> Tensor:
    """The same values in rows 2³⁰ elements apart. The memory between them is never touched, so it costs nothing."""
    rows, columns = near.shape
    storage = torch.UntypedStorage(near.element_size() * ((rows - 1) * 2**30 + columns))
    return torch.empty(0, dtype=near.dtype).set_(storage, 0, near.shape, (2**30, 1)).copy_(near)


@dtypes
def test_offsets_beyond_32_bits(dtype: torch.dtype) -> None:
    k, n = 64, 40
    near = torch.randn(3, k).to(dtype)
    for cell in ("none constant", "none uniform"):
        feedback = contract.operands(cell, k, n, dtype)
        assert_same_bits(ops.feedback_mm(apart(near), *feedback, n), ops.feedback_mm(near, *feedback, n))
    # Rows of B's operands.
    near = torch.randn(4, 3).to(dtype)
    for cell in ("weight constant", "weight stored"):
        weight, _, magnitude, *rest = contract.operands(cell, 3, n, dtype)
        far = (apart(weight), None, None if magnitude is None else apart(magnitude), *rest)
        assert_same_bits(ops.feedback_mm(near, *far, n), ops.feedback_mm(near, weight, None, magnitude, *rest, n))


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The contract's own check of the error, of these ops."""
    monkeypatch.setattr(contract, "ops", ops)
    return contract.check


either = pytest.mark.parametrize("truncates", [False, True], ids=["nearest", "truncating"])


@either
@dtypes
@pytest.mark.parametrize("data", contract.DATA, ids=lambda data: data.__name__)
def test_error(data: Any, dtype: torch.dtype, truncates: bool, bound: Callable[..., None]) -> None:
    with truncating(truncates):
        for cell in ("weight uniform", "none stored"):
            bound(contract.grad(data, 37, 203, dtype), contract.operands(cell, 203, 70, dtype), 70)


@dtypes
@pytest.mark.parametrize("cell", contract.CELLS)
def test_every_cell(cell: str, dtype: torch.dtype, bound: Callable[..., None]) -> None:
    bound(contract.normal(9, 70).to(dtype), contract.operands(cell, 70, 45, dtype), 45)
    # As under autocast: float32 parameters.
    bound(contract.normal(9, 70).to(dtype), contract.operands(cell, 70, 45, torch.float32), 45)


# Tiles of 128 × 64 (half types), 128 × 32 and 16 × 256 (float), of 32 or 16 along K, 3 stages; parts of 256 along K.
TILES = {
    "one entry": (1, 1, 1),
    "whole tiles": (128, 32, 64),
    "a low tile, two and one column": (16, 33, 513),
    "two tiles and a row, two and one column": (257, 33, 129),
    "the pipeline wraps": (5, 32 * 5 + 3, 17),
    "ragged parts of K": (3, 700, 20),
    "parts of K, high tiles": (17, 1050, 9),
}


@either
@dtypes
@pytest.mark.parametrize("shape", TILES)
def test_tiles(shape: str, dtype: torch.dtype, truncates: bool, bound: Callable[..., None]) -> None:
    m, k, n = TILES[shape]
    with truncating(truncates):
        bound(contract.normal(m, k).to(dtype), contract.operands("signs uniform", k, n, dtype), n)


@either
@dtypes
def test_sums_that_grow_and_return(dtype: torch.dtype, truncates: bool, bound: Callable[..., None]) -> None:
    """Partial sums are hundreds of times as large as results: what tensor cores cut off there would show."""
    k = 4096
    hill = contract.normal(4, k).abs()
    hill[:, k // 2 :] = -hill[:, : k // 2].flip(1)
    magnitude = torch.rand(k, 8, dtype=torch.float64)
    magnitude[k // 2 :] = magnitude[: k // 2].flip(0) + torch.randn(k // 2, 8) / 64
    with truncating(truncates):
        bound(hill.to(dtype), (None, None, magnitude.to(dtype), None, "stored", 1.25), 8)


@either
@dtypes
def test_small_terms_beside_a_large_sum(dtype: torch.dtype, truncates: bool) -> None:
    """2048 is the first term and goes with the last: a sum that it stays in drops half a bit of each of 4094 others."""
    k = 4096
    grad = ((0.5 + 1.5 * torch.rand(2, k)) * 2**-12).to(dtype)
    grad[:, 0] = grad[:, -1] = 1024
    magnitude = torch.ones(k, 8, dtype=dtype)
    magnitude[-1] = -1
    with truncating(truncates):
        actual = ops.feedback_mm(grad, None, None, magnitude, None, "stored", 2.0, 8)
    exact = 2 * grad.double() @ magnitude.double()
    # Of the last bit of a float of 2048: 126 terms are in a sum of 64 with it, 64 such sums are rounded to nearest.
    unit = 2.0**-12
    allowed = (126 + 64 / 2) * unit + torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((actual.double() - exact).abs() <= allowed).all()


@dtypes
@pytest.mark.parametrize("cell", ["weight uniform", "none stored"])
def test_strides(cell: str, dtype: torch.dtype) -> None:
    rows, columns = 40, 34
    feedback = contract.operands(cell, rows, columns, dtype)
    dense = contract.normal(12, rows).to(dtype)
    expected = ops.feedback_mm(dense, *feedback, columns)
    spread = torch.full((2 * rows, 12, 2), math.nan, dtype=dtype)[::2, :, 1].t()
    assert_same_bits(ops.feedback_mm(spread.copy_(dense), *feedback, columns), expected)
    moved = tuple(t.t().contiguous().t() if isinstance(t, Tensor) and t.is_floating_point() else t for t in feedback)
    assert_same_bits(ops.feedback_mm(dense, *moved, columns), expected)


@dtypes
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_non_finite_row_stays_alone(value: float, dtype: torch.dtype) -> None:
    rows, columns = 66, 40
    for cell in ("weight uniform", "none stored"):
        feedback = contract.operands(cell, rows, columns, dtype)
        clean = contract.normal(11, rows).to(dtype)
        clean[4] = 0
        dirty = clean.clone()
        dirty[4, 17] = value
        expected, actual = (ops.feedback_mm(g, *feedback, columns) for g in (clean, dirty))
        others = torch.arange(11) != 4
        assert_same_bits(actual[others], expected[others])
        torchs = dirty @ contract.matrix(feedback, rows, columns, dtype)
        assert torch.equal(actual[4].nan_to_num(0.5), torchs[4].nan_to_num(0.5))


def test_float64() -> None:
    for cell in contract.CELLS:
        feedback = contract.operands(cell, 20, 9, torch.float64)
        grad = contract.normal(6, 20)
        expected = grad @ reference.feedback_weight(*feedback, (20, 9), dtype=torch.float64)
        torch.testing.assert_close(ops.feedback_mm(grad, *feedback, 9), expected, rtol=1e-6, atol=1e-7)


def test_errors() -> None:
    grad, w = torch.ones(2, 3), torch.ones(3, 4)
    with pytest.raises(ValueError, match="grad_output: expected 2 dimensions"):
        ops.feedback_mm(grad[0], w, None, None, None, "constant", 1.0, 4)
    with pytest.raises(ValueError, match="weight: expected shape"):
        ops.feedback_mm(grad, w, None, None, None, "constant", 1.0, 5)
    with pytest.raises(TypeError, match="grad_output: expected float32"):
        ops.feedback_mm(grad.int(), w, None, None, None, "constant", 1.0, 4)
