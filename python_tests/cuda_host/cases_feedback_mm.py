"""feedback_mm by each way: the integer ways have the CPU's bits, a formed B keeps the error bound."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import test_feedback_mm as contract
import torch
from bitwise import KEY, assert_same_bits
from torch import Tensor

from bioplaus_kernels import ops as native_ops
from bioplaus_kernels.backends import native, reference
from cuda_host.host import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGER_WAYS = ("digits", "int_mm")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
integer_ways = pytest.mark.parametrize("way", INTEGER_WAYS)
needs_cpu = pytest.mark.skipif(native.library is None, reason=f"no native library: {native.reason}")


def mixed(m: int, k: int) -> Tensor:
    """Rows of every kind side by side: what 32 bits can hold, what they cannot, and what no digits can."""
    x = torch.randn(m, k, dtype=torch.float64)
    x[1::9] *= torch.exp(8 * torch.randn(x[1::9].shape, dtype=torch.float64))
    x[2::9] *= 1e-40  # subnormal
    x[3::9] *= torch.rand(x[3::9].shape) < 0.05
    x[4::9, k // 3] = 1e6  # an outlier
    x[4::18, k // 4] = math.inf  # the largest there is, whose leading digit has no room left
    x[6::9] = 0
    x[7::9] *= 1e-36
    largest = torch.finfo(torch.float32).max
    x = x.clamp(-largest, largest).float()
    x[5::9, k // 2] = -math.inf
    x[5::18, -1] = math.inf
    x[8::9, 0] = math.nan
    return x


def weight(k: int, n: int) -> Tensor:
    """A zero here and there, so that some tiles of 64 × 32 hold one and others none; and beside an infinity of dY."""
    w = torch.randn(k, n)
    w.view(-1)[:: max(1, k * n // 5)] = 0
    w[k // 2, ::3] = 0
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


def same_as_cpu(grad: Tensor, source: tuple, n: int, way: str) -> None:
    args = (grad, *source, "constant", 0.37, n)
    assert_same_bits(ops.feedback_mm_by(*args, way), torch.ops.bioplaus.feedback_mm_by(*args, "digits"))


# Tiles of 8 × 256, 16 × 256 and 32 × 128, of 64 along K, 4 stages; parts of 8 such at least.
SHAPES = {
    "one entry": (1, 1, 1),
    "one row, whole tiles": (1, 64, 256),
    "primes": (7, 131, 71),
    "two tiles and a row": (17, 66, 40),
    "large tiles, two and one column": (35, 65, 257),
    "the pipeline wraps": (3, 64 * 6 + 5, 34),
    "the large pipeline wraps": (33, 64 * 6 + 5, 34),
    "one row, parts of K": (1, 64 * 16, 70),
    "ragged parts of K": (9, 64 * 26 + 1, 33),
    "large tiles, parts of K": (67, 64 * 17 + 3, 129),
}


@needs_cpu
@integer_ways
@pytest.mark.parametrize("shape", SHAPES)
def test_bits(shape: str, way: str) -> None:
    m, k, n = SHAPES[shape]
    every = sources(k, n)
    few = ("key", "packed with zeros") if m * k * n > 500_000 else tuple(every)
    for name in few:
        same_as_cpu(mixed(m, k), every[name], n, way)


@needs_cpu
@integer_ways
def test_bits_of_strided_rows(way: str) -> None:
    m, k, n = 11, 150, 70
    source = sources(k, n)["packed with zeros"]
    dense = mixed(m, k)
    spread = torch.empty(2 * m, 3 * k + 1)[::2, 1::3]
    for grad in (dense.t().contiguous().t(), spread.copy_(dense), dense[:1].expand(m, k), dense[:, :1].expand(m, k)):
        same_as_cpu(grad, source, n, way)


@needs_cpu
def test_the_op_itself_takes_digits_where_it_can() -> None:
    grad, source = mixed(20, 70), sources(70, 45)["weight"]
    for dtype, way in ((torch.float32, "digits"), (torch.bfloat16, "formed"), (torch.float64, "formed")):
        args = (grad[:1].to(dtype), *source, "constant", 0.37, 45)
        assert_same_bits(ops.feedback_mm(*args), ops.feedback_mm_by(*args, way))


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


@integer_ways
def test_offsets_beyond_32_bits(way: str) -> None:
    k, n = 64, 40
    near, feedback = torch.randn(3, k), (None, None, None, KEY, "constant", 0.37)
    near[2, 5] = math.inf
    expected = ops.feedback_mm_by(near, *feedback, n, way)
    assert_same_bits(ops.feedback_mm_by(apart(near), *feedback, n, way), expected)


@dtypes
def test_rows_of_operands_beyond_32_bits(dtype: torch.dtype) -> None:
    n, near = 40, torch.randn(4, 3).to(dtype)
    for cell in ("weight constant", "weight stored"):
        weight, _, magnitude, *rest = contract.operands(cell, 3, n, dtype)
        far = (apart(weight), None, None if magnitude is None else apart(magnitude), *rest)
        assert_same_bits(ops.feedback_mm(near, *far, n), ops.feedback_mm(near, weight, None, magnitude, *rest, n))


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The contract's own check of the error, of one of the ways."""

    def check(way: str, *args: Any) -> None:
        by = SimpleNamespace(feedback_mm=lambda *args: ops.feedback_mm_by(*args, way), pack_signs=native_ops.pack_signs)
        monkeypatch.setattr(contract, "ops", by)
        contract.check(*args)

    return check


@integer_ways
@pytest.mark.parametrize("data", contract.DATA, ids=lambda data: data.__name__)
def test_error(data: Any, way: str, bound: Callable[..., None]) -> None:
    for cell in ("weight constant", "none constant"):
        bound(way, contract.grad(data, 37, 203, torch.float32), contract.operands(cell, 203, 70, torch.float32), 70)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("cell", contract.CELLS)
def test_every_cell_formed(cell: str, dtype: torch.dtype, bound: Callable[..., None]) -> None:
    bound("formed", contract.normal(9, 70).to(dtype), contract.operands(cell, 70, 300, dtype), 300)
    if dtype != torch.float64:
        # As under autocast: float32 parameters.
        bound("formed", contract.normal(9, 70).to(dtype), contract.operands(cell, 70, 300, torch.float32), 300)


@dtypes
def test_a_stored_matrix_is_itself(dtype: torch.dtype) -> None:
    """Also through autocast, which would give the product another dtype, and with a gradient asked for."""
    grad, b = torch.randn(9, 70).to(dtype), torch.randn(70, 45).to(dtype)
    expected = ops.feedback_mm_by(grad, None, None, b, None, "stored", 1.0, 45, "formed")
    torch.testing.assert_close(expected, grad @ b)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(ops.feedback_mm(grad, None, None, b, None, "stored", 1.0, 45), expected)
    assert_same_bits(ops.feedback_mm(grad.requires_grad_(), None, None, b, None, "stored", 1.0, 45), expected)


@dtypes
@pytest.mark.parametrize("cell", ["weight uniform", "none stored", "signs constant"])
def test_strides(cell: str, dtype: torch.dtype) -> None:
    rows, columns = 40, 34
    feedback = contract.operands(cell, rows, columns, dtype)
    dense = contract.normal(12, rows).to(dtype)
    expected = ops.feedback_mm(dense, *feedback, columns)
    spread = torch.full((2 * rows, 12, 2), math.nan, dtype=dtype)[::2, :, 1].t()
    torch.testing.assert_close(ops.feedback_mm(spread.copy_(dense), *feedback, columns), expected)
    moved = tuple(t.t().contiguous().t() if isinstance(t, Tensor) and t.is_floating_point() else t for t in feedback)
    torch.testing.assert_close(ops.feedback_mm(dense, *moved, columns), expected)


@pytest.mark.parametrize("way", [*INTEGER_WAYS, "formed"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_non_finite_row_stays_alone(value: float, way: str) -> None:
    rows, columns = 66, 40
    feedback = contract.operands("signs constant", rows, columns, torch.float32)
    clean = contract.normal(11, rows).float()
    clean[4] = 0
    dirty = clean.clone()
    dirty[4, 17] = value
    expected, actual = (ops.feedback_mm_by(g, *feedback, columns, way) for g in (clean, dirty))
    others = torch.arange(11) != 4
    assert_same_bits(actual[others], expected[others])
    torchs = dirty @ contract.matrix(feedback, rows, columns, torch.float32)
    assert torch.equal(actual[4].nan_to_num(0.5), torchs[4].nan_to_num(0.5))


def test_float64() -> None:
    for cell in contract.CELLS:
        feedback = contract.operands(cell, 20, 9, torch.float64)
        grad = contract.normal(6, 20)
        expected = grad @ reference.feedback_weight(*feedback, (20, 9), dtype=torch.float64)
        torch.testing.assert_close(ops.feedback_mm(grad, *feedback, 9), expected, rtol=1e-6, atol=1e-7)


def test_errors() -> None:
    grad, w = torch.ones(2, 3), torch.ones(3, 4)
    constant = (w, None, None, None, "constant", 1.0, 4)
    with pytest.raises(ValueError, match="grad_output: expected 2 dimensions"):
        ops.feedback_mm(grad[0], *constant)
    with pytest.raises(ValueError, match="weight: expected shape"):
        ops.feedback_mm(grad, w, None, None, None, "constant", 1.0, 5)
    with pytest.raises(TypeError, match="grad_output: expected float32"):
        ops.feedback_mm(grad.int(), *constant)
    with pytest.raises(ValueError, match=r"way: expected one of \('digits', 'int_mm', 'formed'\), got 'fast'"):
        ops.feedback_mm_by(grad, *constant, "fast")
    deep, planes = torch.ones(1, 2**20 + 1), torch.zeros(2 * (2**20 + 1) + 2**14 + 1, 4, dtype=torch.int32)
    for way in INTEGER_WAYS:
        for cell in ("none uniform", "none normal", "weight stored", "none stored"):
            feedback = contract.operands(cell, 3, 4, torch.float32)
            with pytest.raises(ValueError, match=f"way: expected 'formed' with entries='{feedback[4]}', got '{way}'"):
                ops.feedback_mm_by(grad, *feedback, 4, way)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            with pytest.raises(ValueError, match=f"way: expected 'formed' for {dtype}, got '{way}'"):
                ops.feedback_mm_by(grad.to(dtype), *constant, way)
        with pytest.raises(ValueError, match=f"way: expected 'formed' for more than 1048576 rows of B, got '{way}'"):
            ops.feedback_mm_by(deep, None, planes, None, None, "constant", 1.0, 1, way)
    # Of itself the op takes the way that there is; no sign is set in these planes.
    result = ops.feedback_mm(deep, None, planes, None, None, "constant", 1.0, 1)
    assert result.shape == (1, 1)
