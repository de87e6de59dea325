"""The C++ twins of the inline PTX, against the PTX ISA, register by register.

The fragments' layouts are written here as the ISA's text gives them, from groupID = lane >> 2 and threadID_in_group =
lane % 4, not as `host_ptx.h` has them.
"""

import ctypes

import numpy as np
import pytest
import torch

from cuda_host import host

# name: (kind, k, numbers a register holds)
KINDS = {"s8": (0, 32, 4), "bfloat16": (1, 16, 2), "float16": (2, 16, 2)}


def a_element(lane: int, i: int, k: int) -> tuple[int, int]:
    """Row and column of a_i, "Matrix Fragments for mma.m16n8k16 with floating point type" and "... m16n8k32"."""
    group, thread = lane >> 2, lane % 4
    if k == 16:
        row = group if i in (0, 1, 4, 5) else group + 8
        return row, thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8
    row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
    return row, thread * 4 + (i & 3) if i < 8 else thread * 4 + (i & 3) + 16


def b_element(lane: int, i: int, k: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    if k == 16:
        return (thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8), group
    return (thread * 4 + (i & 3) if i < 4 else thread * 4 + (i & 3) + 16), group


def c_element(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)


def pointer(x: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


def multiply(kind: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a (16, k) · b (k, 8) + c by the twin, under every order of lanes."""
    number, k, each = KINDS[kind]
    parts = {1: np.uint8, 2: np.uint16}[a.element_size()]
    raw_a, raw_b = (t.contiguous().view(torch.int8 if each == 4 else torch.int16).numpy().view(parts) for t in (a, b))
    fa, fb = np.zeros((32, 4 * each), parts), np.zeros((32, 2 * each), parts)
    fc = np.zeros((32, 4), np.int32 if kind == "s8" else np.float32)
    for lane in range(32):
        fa[lane] = [raw_a[a_element(lane, i, k)] for i in range(4 * each)]
        fb[lane] = [raw_b[b_element(lane, i, k)] for i in range(2 * each)]
        fc[lane] = [c[c_element(lane, i)] for i in range(4)]
    results = []
    for order in range(host.ORDERS):
        host.configure(order)
        d = fc.copy()
        host.library.twin_mma(pointer(d), pointer(fa), pointer(fb), number)
        out = torch.zeros_like(c)
        for lane in range(32):
            for i in range(4):
                out[c_element(lane, i)] = d[lane, i].item()
        results.append(out)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0, equal_nan=True)
    return results[0]


def test_mma_s8() -> None:
    """Every element of a and of b, one at a time, meets its partner; then full range, exactly."""
    a, b = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((16, 32), (32, 8)))
    c = torch.randint(-(2**20), 2**20, (16, 8), dtype=torch.int32)
    assert torch.equal(multiply("s8", a, b, c), a.int() @ b.int() + c)
    for row in range(16):
        for column in range(32):
            one = torch.zeros_like(a)
            one[row, column] = 1
            assert torch.equal(multiply("s8", one, b, torch.zeros_like(c)), one.int() @ b.int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_mma_float(dtype: torch.dtype) -> None:
    """Small integers, so that sums are exact in either way of rounding."""
    kind = str(dtype)[6:]
    a, b = (torch.randint(-8, 9, s).to(dtype) for s in ((16, 16), (16, 8)))
    c = torch.randint(-100, 100, (16, 8)).float()
    for truncating in (False, True):
        with host.truncating(truncating):
            assert torch.equal(multiply(kind, a, b, c), a.float() @ b.float() + c)
            for row in range(16):
                for column in range(16):
                    one = torch.zeros_like(a)
                    one[row, column] = 1
                    assert torch.equal(multiply(kind, one, b, torch.zeros_like(c)), one.float() @ b.float())


def test_rounding_of_float_sums() -> None:
    """1 and fifteen products of 3·2⁻²⁶: to nearest they count, truncating each is below the last bit of the 1."""
    a, b, c = torch.zeros(16, 16), torch.zeros(16, 8), torch.ones(16, 8)
    a[:, 1:], b[1:] = 3 * 2.0**-13, 2.0**-13
    with host.truncating(False):
        nearest = multiply("bfloat16", a.bfloat16(), b.bfloat16(), c)
    with host.truncating(True):
        cut = multiply("bfloat16", a.bfloat16(), b.bfloat16(), c)
        negative = multiply("bfloat16", -a.bfloat16(), b.bfloat16(), -c)
        spared = multiply("bfloat16", a.bfloat16(), b.bfloat16(), torch.zeros_like(c))
    assert torch.equal(nearest, torch.full_like(c, 1 + 6 * 2.0**-23))
    assert torch.equal(cut, c)
    assert torch.equal(negative, -c)
    assert torch.equal(spared, torch.full_like(c, 45 * 2.0**-26))
    # Cut towards zero, not to nearest: one product of 1.75·2⁻²³ leaves one unit.
    a[:], b[:] = 0, 0
    a[:, 3], b[3] = 1.75, 2.0**-23
    with host.truncating(True):
        assert torch.equal(multiply("bfloat16", a.bfloat16(), b.bfloat16(), c), torch.full_like(c, 1 + 2.0**-23))


def test_non_finite_sums() -> None:
    a, b, c = torch.ones(16, 16), torch.ones(16, 8), torch.zeros(16, 8)
    a[2, 5], a[3, 6] = torch.inf, torch.nan
    for truncating in (False, True):
        with host.truncating(truncating):
            out = multiply("bfloat16", a.bfloat16(), b.bfloat16(), c)
        assert (out[2] == torch.inf).all() and out[3].isnan().all() and (out[4:] == 16).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed: bool) -> None:
    """Lanes 8m … 8m + 7 give the rows of matrix m; lane l gets elements 2(l % 4), + 1 of its row l / 4, or column."""
    matrix = np.arange(256, dtype=np.uint16).reshape(16, 16)
    generator = np.random.default_rng(0)
    row = generator.permutation(np.tile(np.arange(16, dtype=np.int32), 2)).astype(np.int32)
    column = generator.choice(np.array([0, 8], np.int32), 32).astype(np.int32)
    for order in range(host.ORDERS):
        host.configure(order)
        r = np.zeros((32, 4), np.uint32)
        host.library.twin_ldmatrix(*(pointer(x) for x in (r, matrix, row, column)), int(transposed))
        for lane in range(32):
            for m in range(4):
                rows = [matrix[row[8 * m + i], column[8 * m + i] :][:8] for i in range(8)]
                small = np.stack(rows).T if transposed else np.stack(rows)
                low, high = small[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].astype(np.uint32)
                assert r[lane, m] == low | high << 16


@pytest.mark.parametrize("tiles", [1, 2, 3, 8])
def test_pipeline(tiles: int) -> None:
    """Stages that wrap, and a ragged last tile, whose rest is zero."""
    count = 64 * tiles - 5
    data = np.arange(1, 4 * count + 1, dtype=np.int32)
    aligned = torch.from_numpy(data).clone()
    padded = np.zeros((64 * tiles,), np.int64)
    padded[:count] = data[::4]
    expected = np.roll(padded.reshape(tiles, 64).sum(0), -1)
    for order in range(host.ORDERS):
        host.configure(order)
        out = np.zeros(64, np.int32)
        host.library.twin_pipeline(pointer(out), ctypes.c_void_p(aligned.data_ptr()), tiles, count)
        assert (out == expected).all()
