"""feedback_mm, dX = dY B, whichever backend serves it, against the explicit product in a wider type.

The error of a product is max over rows i of |err_i|_inf / (|dY_i|_2 max|B|): at most twice what torch.mm makes in the
same dtype of the same operands, plus one rounding of the output.
"""

import itertools
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bioplaus_kernels import backends, ops
from bioplaus_kernels.backends import native, reference
from bioplaus_kernels.feedback import feedback_key

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KEY = feedback_key(5, "test_feedback_mm")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def operands(cell: str, rows: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> tuple:
    """The feedback arguments of a cell of the table of signs and magnitudes: "sign source, entries"."""
    source, entries = cell.split()
    weight = torch.randn(rows, columns, dtype=torch.float64).to(device, dtype)
    weight.flatten()[::5] = 0
    magnitude = torch.rand(rows, columns, dtype=torch.float64).to(device, dtype) if entries == "stored" else None
    if magnitude is not None and source == "none":
        magnitude = magnitude - 0.5
    seeded = entries in ("uniform", "normal") or (source, entries) == ("none", "constant")
    return (
        weight if source == "weight" else None,
        ops.pack_signs(weight) if source == "signs" else None,
        magnitude,
        KEY.to(device) if seeded else None,
        entries,
        1.0 if entries == "stored" else 0.0371,
    )


CELLS = [
    f"{s} {e}" for s, e in itertools.product(("weight", "signs", "none"), ("constant", "stored", "uniform", "normal"))
]
# One for each way a kernel may load its operand: bits, sign times magnitude, plain.
LOADERS = ["weight constant", "signs constant", "none constant", "weight uniform", "none stored"]


def matrix(feedback: tuple, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """B itself, by the reference."""
    return reference.feedback_weight(*feedback, (rows, columns), dtype=dtype)


def product(grad_output: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """dY B to more than float64: the nearest float64, and what is left."""
    wide = [t.cpu().double().numpy().astype(np.longdouble) for t in (grad_output, b)]
    exact = wide[0] @ wide[1]
    nearest = exact.astype(np.float64)
    left = (exact - nearest).astype(np.float64)
    return torch.from_numpy(nearest).to(b.device), torch.from_numpy(left).to(b.device)


def row_errors(actual: Tensor, exact: tuple[Tensor, Tensor], grad_output: Tensor, b: Tensor) -> Tensor:
    """|err_i|_inf / (|dY_i|_2 max|B|); a row of zeros must come out as zeros."""
    error = (actual.double() - exact[0] - exact[1]).abs().amax(1)
    size = torch.linalg.vector_norm(grad_output.double(), dim=1) * b.double().abs().max()
    return torch.where(error == 0, 0.0, error / size)


def check(grad_output: Tensor, feedback: tuple, columns: int) -> None:
    dtype, rows = grad_output.dtype, grad_output.shape[1]
    b = matrix(feedback, rows, columns, dtype)
    actual = ops.feedback_mm(grad_output, *feedback, columns)
    assert actual.shape == (grad_output.shape[0], columns) and actual.dtype == dtype
    exact, torchs = product(grad_output, b), grad_output @ b
    assert exact[0].isfinite().all() and torchs.isfinite().all()
    # Half the distance between neighbours at the exact result: the last rounding of anything in this dtype.
    info = torch.finfo(dtype)
    rounding = torch.clamp(exact[0].abs(), min=info.smallest_normal) * (info.eps / 2)
    zero = torch.zeros_like(rounding)
    own, torch_own, one_rounding = (
        row_errors(result, reference_result, grad_output, b)
        for result, reference_result in ((actual, exact), (torchs, exact), (rounding, (zero, zero)))
    )
    # Where rows differ in size the small ones are the even ones: they must not excuse the others.
    for rows_of_a_kind in (slice(0, None, 2), slice(1, None, 2)):
        if own[rows_of_a_kind].numel():
            worst, torch_worst, unit = (e[rows_of_a_kind].max().item() for e in (own, torch_own, one_rounding))
            assert worst <= 2 * torch_worst + unit, f"{worst:.3g} against torch's {torch_worst:.3g}"


def normal(m: int, k: int) -> Tensor:
    return torch.randn(m, k, dtype=torch.float64)


def sparse(m: int, k: int) -> Tensor:
    return normal(m, k) * (torch.rand(m, k) < 0.05)


def log_normal(m: int, k: int) -> Tensor:
    return normal(m, k).sign() * torch.exp(8 * normal(m, k))


def softmax_minus_one_hot(m: int, k: int) -> Tensor:
    return torch.softmax(3 * normal(m, k), dim=1) - torch.nn.functional.one_hot(torch.randint(k, (m,)), k)


def outlier(m: int, k: int) -> Tensor:
    data = normal(m, k)
    data[m // 2, k // 3] = 1e6
    return data


def tiny_rows(m: int, k: int) -> Tensor:
    data = normal(m, k)
    data[::2] *= 1e-36
    return data


def subnormal_rows(m: int, k: int) -> Tensor:
    data = normal(m, k)
    data[::2] *= 1e-40
    return data


DATA = [normal, sparse, log_normal, softmax_minus_one_hot, outlier, tiny_rows, subnormal_rows]


def grad(data: Callable[[int, int], Tensor], m: int, k: int, dtype: torch.dtype) -> Tensor:
    """`data` in `dtype`; where float16 cannot hold its largest entries, scaled down as a whole."""
    values = data(m, k)
    if dtype == torch.float16:
        values = values * min(1.0, 1024 / values.abs().max().item())
    return values.to(dtype)


@dtypes
@pytest.mark.parametrize("cell", LOADERS)
@pytest.mark.parametrize("data", DATA, ids=lambda data: data.__name__)
def test_error(data: Callable[[int, int], Tensor], cell: str, dtype: torch.dtype) -> None:
    check(grad(data, 37, 203, dtype), operands(cell, 203, 131, dtype), 131)


@pytest.mark.gpu
@pytest.mark.parametrize("data", DATA, ids=lambda data: data.__name__)
def test_error_on_cuda(data: Callable[[int, int], Tensor]) -> None:
    for cell, dtype in itertools.product(LOADERS, DTYPES):
        check(grad(data, 37, 203, dtype).cuda(), operands(cell, 203, 131, dtype, "cuda"), 131)


@dtypes
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell(cell: str, dtype: torch.dtype) -> None:
    check(normal(9, 70).to(dtype), operands(cell, 70, 45, dtype), 45)


# Around the edges of words, calls of the generator, tiles, and vectors; and no rows, inner or outer columns at all.
SHAPES = [(1, 1, 1), (1, 64, 128), (2, 65, 129), (3, 127, 4), (5, 1, 33), (64, 32, 127), (65, 33, 1), (7, 300, 31)]


@dtypes
@pytest.mark.parametrize("cell", LOADERS)
def test_shapes(cell: str, dtype: torch.dtype) -> None:
    for m, k, n in SHAPES:
        check(normal(m, k).to(dtype), operands(cell, k, n, dtype), n)


@pytest.mark.parametrize("cell", ["none uniform", "weight stored"])
def test_error_of_narrow_products(cell: str) -> None:
    """A single sum along K is not enough where torch's product has one for each lane of a vector."""
    generator = random.Random(2)
    shapes = [(2, 129, 1), (8, 129, 1), (2, 128, 63), (8, 160, 1), (600, 128, 1), (3, 4096, 1), (8, 4096, 63)]
    shapes += [(generator.randint(1, 8), int(4096 ** generator.random()), generator.randint(1, 63)) for _ in range(20)]
    for m, k, n in shapes:
        own, torchs = [], []
        for _ in range(20 + 400 // m):
            grad_output, feedback = normal(m, k).float(), operands(cell, k, n, torch.float32)
            b = matrix(feedback, k, n, torch.float32)
            exact = grad_output.double() @ b.double(), torch.zeros(())
            for errors, result in ((own, ops.feedback_mm(grad_output, *feedback, n)), (torchs, grad_output @ b)):
                errors.append(row_errors(result, exact, grad_output, b).max().item())
        assert sum(own) <= 2 * sum(torchs), (m, k, n)


@dtypes
@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell: str, dtype: torch.dtype) -> None:
    for m, k, n in ((0, 5, 3), (4, 5, 0), (4, 0, 3), (0, 0, 0)):
        result = ops.feedback_mm(torch.ones(m, k, dtype=dtype), *operands(cell, k, n, dtype), n)
        assert torch.equal(result, torch.zeros(m, n, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("cell", CELLS)
def test_parameters_of_another_dtype(cell: str, dtype: torch.dtype) -> None:
    # As under autocast: float32 parameters, and an output gradient in a half type.
    check(normal(9, 70).to(dtype), operands(cell, 70, 45, torch.float32), 45)


@pytest.mark.parametrize("cell", LOADERS)
def test_strides(cell: str) -> None:
    rows, columns = 40, 34
    feedback = operands(cell, rows, columns, torch.float32)
    dense = normal(12, rows).float()
    expected = ops.feedback_mm(dense, *feedback, columns)
    spread = torch.full((rows, 12, 2), math.nan)
    spread[..., 1] = dense.t()
    check(spread[..., 1].t(), feedback, columns)
    torch.testing.assert_close(ops.feedback_mm(spread[..., 1].t(), *feedback, columns), expected)
    check(torch.tensor(0.7).expand(12, rows), feedback, columns)
    check(normal(1, rows).float().expand(12, rows), feedback, columns)
    # A weight, or a stored magnitude, seen through other strides is the same matrix.
    moved = tuple(t.t().contiguous().t() if isinstance(t, Tensor) and t.is_floating_point() else t for t in feedback)
    torch.testing.assert_close(ops.feedback_mm(dense, *moved, columns), expected)


@dtypes
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("m", [11, 2050])  # of half types by torch's product, too
@pytest.mark.parametrize("rows", [66, 31])  # whole pairs along K, and a pair that could end in the next row
def test_non_finite_row_stays_alone(rows: int, m: int, cell: str, dtype: torch.dtype) -> None:
    columns = 70
    feedback = operands(cell, rows, columns, dtype)
    b = matrix(feedback, rows, columns, dtype)
    clean = normal(m, rows).to(dtype)
    clean[4] = 0
    others = torch.arange(m) != 4
    for backend in (None, "reference"):
        with backends.use(backend):
            expected = ops.feedback_mm(clean, *feedback, columns)
            for value, column in itertools.product((math.inf, -math.inf, math.nan), (0, 17, rows - 1)):
                dirty = clean.clone()
                dirty[4, column] = value
                actual = ops.feedback_mm(dirty, *feedback, columns)
                assert not actual[4].isfinite().any()
                assert torch.equal(actual[others], expected[others])
                # Which kind of non-finite is torch's: infinity times B keeps B's sign, and times zero is NaN.
                assert torch.equal(actual[4].nan_to_num(0.5), (dirty[3:6] @ b)[1].nan_to_num(0.5))


@dtypes
@pytest.mark.parametrize("cell", LOADERS)
def test_same_bits_again(cell: str, dtype: torch.dtype) -> None:
    feedback, grad_output = operands(cell, 70, 45, dtype), normal(9, 70).to(dtype)
    assert torch.equal(ops.feedback_mm(grad_output, *feedback, 45), ops.feedback_mm(grad_output, *feedback, 45))


def test_zero_weight_gives_zero_feedback() -> None:
    weight = torch.randn(6, 4, dtype=torch.float64)
    weight[:, 2] = 0
    weight[3] = -0.0
    for signs in ((weight, None), (None, ops.pack_signs(weight))):
        result = ops.feedback_mm(torch.eye(6, dtype=torch.float64), *signs, None, None, "constant", 0.25, 4)
        assert torch.equal(result, 0.25 * weight.sign())


@pytest.mark.skipif(native.library is None, reason="the ops are plain functions without the native library")
@dtypes
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell: str, dtype: torch.dtype) -> None:
    args = (normal(6, 20).to(dtype), *operands(cell, 20, 9, dtype), 9)
    torch.library.opcheck(torch.ops.bioplaus.feedback_mm.default, args)


@pytest.mark.slow
@pytest.mark.skipif(native.library is None, reason=f"no native library: {native.reason}")
@pytest.mark.parametrize("backend", ["cpu", *(pytest.param(b, marks=pytest.mark.gpu) for b in ("cuda", "triton"))])
@pytest.mark.parametrize("entries", ["constant", "uniform"])
def test_results_beyond_32_bits(entries: str, backend: str) -> None:
    """The last row lies behind 2³¹ results. Of sums of one term each row is a multiple of another."""
    if backend == "cpu" and int(re.findall(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[0]) < 12e6:
        pytest.skip("takes 9 GB of memory")
    columns, device = 2**30, "cpu" if backend == "cpu" else "cuda"
    key, grad_output = KEY.to(device), torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.bfloat16, device=device)
    with backends.use(backend):
        dx = ops.feedback_mm(grad_output, None, None, None, key, entries, 0.5, columns)
    b = ops.feedback_weight(None, None, None, key, entries, 0.5, (1, columns), dtype=torch.bfloat16)
    assert torch.equal(dx[0], b[0])
    for part in (slice(0, 4096), slice(-4096, None)):
        assert torch.equal(dx[2, part], 4 * dx[0, part])
