"""feedback_mm on the CPU: the same bits at every instruction-set level and for any number of threads, and shapes that
fill its blocks. test_feedback_mm.py has the op's contract; this file has what the kernels could get wrong beside it."""

import itertools
import os

import fresh
import numpy as np
import pytest
import torch
from torch import Tensor

from bioplaus_kernels import ops
from bioplaus_kernels.backends import native, reference

pytestmark = pytest.mark.skipif(native.library is None, reason=f"no native library: {native.reason}")

KEY = torch.tensor([2, 0x8123456789ABCDEF - 2**64, 0xFEDCBA9876543210 - 2**64])
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
# What may be lost of a row's norm: two bytes are used where they lose less than a rounding does.
LEAST = {torch.bfloat16: 2.0**-9.5, torch.float16: 2.0**-11.5}

# What forces a level: torch's capability, oneDNN's, MKL's.
LEVELS = {
    "AMX": ("avx512", "ALL", "AVX512"),
    "AVX512_VNNI": ("avx512", "AVX512_CORE_VNNI", "AVX512"),
    "AVX512": ("avx512", "AVX512_CORE", "AVX512"),
    "AVX2_VNNI": ("avx2", "AVX2_VNNI", "AVX2"),
    "AVX2": ("avx2", "AVX2", "AVX2"),
    "DEFAULT": ("default", "SSE41", "SSE4_2"),
}
# M, K, N around tiles of 4, 8 and 16 rows, 32 and 64 entries, words of 32 columns; then more than one block of rows,
# pass along K, and slab of columns.
SHAPES = [
    *[(m, 67, 37) for m in (1, 3, 4, 5, 8, 15, 16, 17)],
    *[(5, k, 37) for k in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 131)],
    *[(5, 67, n) for n in (1, 15, 16, 17, 31, 33, 63, 65, 127, 129)],
    (131, 200, 70),
    (9, 8200, 130),
    (3, 70, 2100),
]


def draws(seed: int, *size: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size)


def weight(rows: int, columns: int, zeros: bool) -> Tensor:
    w = draws(rows * 7919 + columns, rows, columns)
    if zeros:
        w.reshape(-1)[:: 3 if rows % 2 else 97] = 0
    return torch.from_numpy(w)


def grads(m: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    """Easy rows, which two bytes can hold in a half type, and rows for which they cannot."""
    easy = draws(m + k, m, k)
    hard = easy * np.exp(4 * draws(m + k + 1, m, k))
    hard[::3] *= 1e-38
    hard[m // 2] = 0
    return [torch.from_numpy(g).clamp(-6e4, 6e4).to(dtype) for g in (easy, hard)]


def sources(k: int, n: int, dtype: torch.dtype) -> list[tuple]:
    """Where signs come from: a weight of several dtypes, without and with zeros, packed signs, a key."""
    w = [weight(k, n, zeros).to(d) for zeros, d in ((False, torch.float32), (True, dtype), (True, torch.float64))]
    # One zero is not too many for tables.
    w[0][k // 2, n - 1] = 0
    moved = w[-1].t().contiguous().t()
    return [
        (None, None, None, KEY),
        *((None, ops.pack_signs(x), None, None) for x in w[:2]),
        *((x, None, None, None) for x in (*w, moved) if k * n < 200_000),
    ]


WAYS = ("digits", "tables")


def by(way: str, g: Tensor, *feedback: object) -> Tensor:
    return torch.ops.bioplaus.feedback_mm_by(g, *feedback, way)


def results() -> list[Tensor]:
    """Everything that must come out the same at every level."""
    # A scale that float32 does not hold makes infinities, and of what only fills a block no NaN.
    infinite = by("tables", torch.ones(2, 33), -torch.ones(33, 5), None, None, None, "constant", 1e39, 5)
    assert (infinite == -torch.inf).all()
    return [
        by(way, g, *source, "constant", 0.37, n)
        for m, k, n, dtype in (*((70, 131, 150, dtype) for dtype in DTYPES), (9, 4200, 33, torch.float32))
        for g in grads(m, k, dtype)
        for source in sources(k, n, dtype)
        for way in WAYS
    ]


PROGRAM = """
import hashlib
import torch
from test_feedback_mm_cpu import results
from bioplaus_kernels import _C
digest = hashlib.sha256()
for x in results():
    digest.update(x.view(torch.uint8).numpy().tobytes())
print(_C.active_product_level(), digest.hexdigest())
"""


def test_every_level_gives_the_same_bits() -> None:
    """The levels that this processor lacks fall to a lower one, and then say so."""
    # torch takes a capability by its word, and ends where the processor lacks it.
    lacking = set() if torch.backends.cpu.get_cpu_capability() == "AVX512" else {"avx512"}
    runs = {}
    for level, (capability, isa, mkl) in LEVELS.items():
        if capability in lacking:
            continue
        settings = {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": isa, "MKL_ENABLE_INSTRUCTIONS": mkl}
        runs[level] = fresh.Fresh(PROGRAM, environment=os.environ | settings)
    order = list(LEVELS)
    digests = set()
    for level, run in runs.items():
        done = run.wait()
        assert done.returncode == 0, level + done.stderr
        active, digest = done.stdout.split()
        assert order.index(active) >= order.index(level)
        digests.add(digest)
    assert len(digests) == 1


def test_any_number_of_threads_gives_the_same_bits(one_thread: None) -> None:
    alone = results()
    torch.set_num_threads(3)
    assert all(torch.equal(x, y) for x, y in zip(alone, results(), strict=True))


@pytest.mark.skipif(native.product_level() in ("", "DEFAULT"), reason="no micro-kernel whose order of sums is known")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), [(70, 1), (2304, 16), (70, 17), (71, 64), (10, 700), (16, 64), (601, 700)])
def test_few_rows_or_columns_of_b(k: int, n: int, dtype: torch.dtype, one_thread: None) -> None:
    """A row's bits are the same in any batch and for any number of threads, by whatever way."""
    g, w = grads(600, k, dtype)[0], torch.from_numpy(draws(k + n, k, n)).to(dtype)
    # One row that is a column's transpose, adjacent elements of any stride.
    column = g[0].clone().view(k, 1).t()
    assert column.stride() == (1, 1)
    feedback = (w, None, None, None, "constant", 0.37, n)
    found = ops.feedback_mm(g, *feedback)
    wanted = g.double() @ (torch.tensor(0.37, dtype=dtype).double() * w.sign().double())
    lost = 1e-6 * k**0.5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (found - wanted).abs().max() <= lost * wanted.abs().max()
    for rows in (1, 5, 64):
        assert torch.equal(ops.feedback_mm(g[:rows], *feedback), found[:rows])
    drawn = (None, None, None, KEY, "uniform", 0.37, n)
    for row in (column, g[:1].expand(2, k)[:1]):
        assert torch.equal(ops.feedback_mm(row, *feedback), found[:1])
        assert torch.equal(ops.feedback_mm(row, *drawn), ops.feedback_mm(g[:1], *drawn))
    torch.set_num_threads(3)
    assert torch.equal(ops.feedback_mm(g, *feedback), found)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_signs_of_half_types(dtype: torch.dtype) -> None:
    """Wherever they come from, zeros among them, and of blocks that are not full."""
    for k, n in ((601, 300), (33, 270), (70, 17)):
        g = grads(520, k, dtype)[0]
        norm = torch.linalg.vector_norm(g.double(), dim=1, keepdim=True) * 0.37
        for source in sources(k, n, dtype):
            expected = exact(g, source, k, n)
            for x in (g, g.t().contiguous().t()):
                found = ops.feedback_mm(x, *source, "constant", 0.37, n)
                allowed = torch.finfo(dtype).eps / 2 * expected.abs() + LEAST[dtype] * norm
                assert ((found.double() - expected).abs() <= allowed).all(), (k, n)
            if source[0] is not None:
                packed = None, ops.pack_signs(source[0]), None, None
                assert torch.equal(found, ops.feedback_mm(g, *packed, "constant", 0.37, n))


def exact(g: Tensor, source: tuple, k: int, n: int) -> Tensor:
    b = reference.feedback_weight(*source, "constant", 0.37, (k, n), dtype=g.dtype).double()
    # Rows as numbers near 1, so that float64 is exact enough.
    size = g.double().abs().amax(1, keepdim=True).clamp(min=1e-300)
    return (g.double() / size) @ b * size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(dtype: torch.dtype) -> None:
    # Beside the output's rounding, 4 bytes leave 2^-31 of the largest entry for each.
    unit = torch.finfo(dtype).eps / 2
    for m, k, n in SHAPES:
        least = LEAST.get(dtype, 0)
        for g, source, way in itertools.product(grads(m, k, dtype), sources(k, n, dtype), WAYS):
            # Tables round sums of 128 entries as they grow, and their sums.
            lost = max(2.0**-19 if way == "tables" else 2.0**-29 * k**0.5, least)
            expected = exact(g, source, k, n)
            actual = by(way, g, *source, "constant", 0.37, n)
            norm = torch.linalg.vector_norm(g.double(), dim=1, keepdim=True) * 0.37
            allowed = unit * expected.abs() + lost * norm + torch.finfo(dtype).smallest_normal * unit
            finite = expected.abs() < torch.finfo(dtype).max
            assert ((actual.double() - expected).abs() <= allowed)[finite].all(), (m, k, n)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_large_entries_that_do_not_reach_a_result(dtype: torch.dtype, way: str) -> None:
    """They meet zeros, or cancel: what is left has the rounding of what is left."""
    for k, large in ((257, 12000), (40, 12000), (4096, 60000)):
        g = torch.from_numpy(draws(k, 64, k)).to(dtype)
        w = torch.from_numpy(draws(k + 1, k, 66)).float()
        if way == "digits":  # which many zeros take by either name
            g[:, 0], w[0] = large, 0
        g[:, 1], g[:, 2], w[1:3] = large, -large, 1
        wanted = g.double() @ w.sign().double()
        found = by(way, g, w, None, None, None, "constant", 1.0, 66)
        lost = (found.double() - wanted).norm() / wanted.norm()
        assert lost <= torch.finfo(dtype).eps, (k, lost)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_types_by_tables(dtype: torch.dtype) -> None:
    """float32's sums of the same numbers, rounded once; s is what a B of the half type would hold."""
    scale = torch.tensor(0.37, dtype=dtype).item()
    for m, k, n in SHAPES:
        w = weight(k, n, False).to(dtype)
        w[k // 2, n - 1] = 0
        for g in grads(m, k, dtype):
            for x in (g, g[:1].expand(m, k), g.t().contiguous().t(), g.repeat(1, 2)[:, :k]):
                found = by("tables", x, w, None, None, None, "constant", 0.37, n)
                wide = by("tables", x.float(), w, None, None, None, "constant", scale, n)
                assert torch.equal(found, wide.to(dtype)), (m, k, n)


@pytest.mark.skipif(native.product_level() != "AMX", reason="no tile units")
@pytest.mark.parametrize(
    ("dtype", "k", "n", "way"),
    [
        (torch.float32, 257, 256, "digits"),
        (torch.float32, 256, 256, "tables"),
        (torch.float32, 400, 17, "digits"),
        (torch.float32, 400, 16, ""),
        (torch.bfloat16, 1024, 1024, ""),
        (torch.bfloat16, 1025, 1024, "digits"),
    ],
)
def test_the_way_on_tile_units(dtype: torch.dtype, k: int, n: int, way: str) -> None:
    rest = None, None, None, "constant", 0.37, n
    g, w = torch.randn(40, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
    ways = {name: by(name, g, w, *rest) for name in WAYS}
    found = ops.feedback_mm(g, w, *rest)
    assert [name for name, x in ways.items() if torch.equal(x, found)] == ([way] if way else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_for_tables(dtype: torch.dtype) -> None:
    """Few zeros: their bits are not those of digits, which many zeros take."""
    g = grads(5, 600, dtype)[0]
    w = weight(600, 700, False).to(dtype)
    few = w.numel() // 4096 + 1
    for zeros in (0, few, few + 1, w.numel()):
        w.view(-1)[:: 1 if zeros == w.numel() else 4001][:zeros] = 0
        digits, tables = (by(way, g, w, None, None, None, "constant", 0.37, 700) for way in WAYS)
        assert torch.equal(digits, tables) == (zeros > few), zeros


def test_a_zero_beside_what_is_not_finite_or_large() -> None:
    w = torch.ones(40, 3)
    w[7, 1] = 0
    g = torch.ones(3, 40)
    g[0, 7], g[1, 7], g[2, 7] = torch.inf, torch.nan, 2.0**20
    found = by("tables", g, w, None, None, None, "constant", 2.0, 3)
    assert found[0, 0] == found[0, 2] == torch.inf and found[:2, 1].isnan().all() and found[1].isnan().all()
    # What it gave is taken off: to a rounding of the row's largest entry.
    assert found[2, 0] == found[2, 2] == 2**21 + 78 and abs(found[2, 1] - 78) <= 2**-2


@pytest.mark.parametrize("way", WAYS)
def test_a_zero_that_its_plane_calls_negative(way: str) -> None:
    """As where a rule flips packed signs."""
    w = weight(40, 700, False).float()
    w[7, 650] = 0
    signs = ops.pack_signs(w)
    signs[:40] ^= ops.pack_signs(-torch.ones_like(w))[:40]
    g = grads(5, 40, torch.float32)[0]
    expected = by(way, g, -w, None, None, None, "constant", 0.37, 700)
    assert torch.equal(by(way, g, None, signs, None, None, "constant", 0.37, 700), expected)
    conv = torch.ops.bioplaus.feedback_conv_by
    rest = ("constant", 0.37, [40, 700, 1], [1], [1], [0], [1], way)
    expected = conv(g.unsqueeze(2), -w.unsqueeze(2), None, None, None, *rest)
    assert torch.equal(conv(g.unsqueeze(2), None, signs, None, None, *rest), expected)


def test_sums_are_scaled_before_they_overflow() -> None:
    for way in WAYS:
        found = by(way, torch.full((1, 2), 2e38), torch.ones(2, 1), None, None, None, "constant", 0.5, 1)
        torch.testing.assert_close(found, torch.full((1, 1), 2e38))


@pytest.mark.parametrize("way", WAYS)
def test_more_accurate_than_torch(way: str) -> None:
    g = grads(40, 1500, torch.float32)
    w = weight(1500, 64, False).float()
    for x in g:
        b = reference.feedback_weight(w, None, None, None, "constant", 0.37, w.shape, dtype=torch.float32)
        expected = exact(x, (w, None, None, None), *w.shape)
        ours, torchs = (
            (
                (y.double() - expected).abs().amax(1) / torch.linalg.vector_norm(x.double(), dim=1).clamp(min=1e-300)
            ).max()
            for y in (by(way, x, w, None, None, None, "constant", 0.37, 64), x @ b)
        )
        # By tables half of them, on processors that were tried; digits far less.
        assert ours < (1.25 if way == "tables" else 1.0) * torchs


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_rows(dtype: torch.dtype, way: str) -> None:
    m, k, n = 21, 150, 70
    g = grads(m, k, dtype)[0]
    dirty = g.clone()
    dirty[3, 7], dirty[3, 100] = torch.inf, torch.inf
    dirty[20, 149] = torch.nan
    for source in sources(k, n, dtype):
        clean, actual = (by(way, x, *source, "constant", 0.37, n) for x in (g, dirty))
        b = reference.feedback_weight(*source, "constant", 0.37, (k, n), dtype=dtype)
        for row in range(m):
            if row in (3, 20):
                assert not actual[row].isfinite().any()
                expected = (torch.inf * b[7] + torch.inf * b[100]) if row == 3 else torch.full((n,), torch.nan)
                assert torch.equal(actual[row].nan_to_num(0.5), expected.to(dtype).nan_to_num(0.5))
            else:
                assert torch.equal(actual[row], clean[row])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype, way: str) -> None:
    """More rows than are multiplied at once, of which some need more digits than others."""
    k, n = 70, 37
    easy, hard = grads(1100, k, dtype)
    g = torch.where(torch.arange(1100)[:, None] % 3 == 1, hard, easy)
    for source in sources(k, n, dtype):
        together = by(way, g, *source, "constant", 0.37, n)
        for row in (0, 1, 2, 511, 512, 513, 1024, 1099):
            assert torch.equal(together[row], by(way, g[row : row + 1], *source, "constant", 0.37, n)[0])


def test_temporaries(one_thread: None) -> None:
    """At most the bytes of dY and one bit for each weight, beside blocks of fixed size; by tables two bits instead."""
    n = 2048
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(n, n, dtype=dtype)
        sources = ((w, None, None, None), (None, ops.pack_signs(w), None, None), (None, None, None, KEY))
        cases = [(64, (*source, "constant", 1.0), 2**18) for source in sources]
        cases += [(m, (w, None, None, KEY, "uniform", 1.0), 2**20) for m in (1, 64, 600)]
        for m, feedback, blocks in cases:
            g = torch.randn(m, n, dtype=dtype)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
                result = ops.feedback_mm(g, *feedback, n)
            allocated = sum(e.self_cpu_memory_usage for e in p.events() if e.name == "aten::empty")
            bits = w.numel() // 8
            most = max(g.nbytes, bits) if feedback[4] == "constant" else g.nbytes
            assert result.nbytes < allocated <= result.nbytes + most + bits + blocks


def cells(k: int, n: int, dtype: torch.dtype) -> list[tuple]:
    """Feedback whose entries are no constants, so that B is formed in tiles."""
    w, m = weight(k, n, True).to(dtype), weight(k + 1, n, False)[:k].to(torch.float32)
    return [
        (w, None, m, None, "stored", 1.3),
        (None, ops.pack_signs(w), m, None, "stored", 1.3),
        (None, None, m, None, "stored", 1.3),
        (None, None, m.to(dtype), None, "stored", 1.3),
        (None, None, None, KEY, "uniform", 0.1),
        (w, None, None, KEY, "uniform", 0.1),
        (None, None, None, KEY, "normal", 0.1),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cells_in_tiles(dtype: torch.dtype, one_thread: None) -> None:
    for m, k, n in ((129, 515, 131), (3, 1030, 129), (200, 37, 20), (2050, 40, 5)):
        g = grads(m, k, dtype)[0]
        for x in (g, g[:1].expand(m, k), g.t().contiguous().t()):
            for cell in cells(k, n, dtype):
                b = reference.feedback_weight(*cell, (k, n), dtype=dtype)
                expected = x.double() @ b.double()
                torch.set_num_threads(1)
                actual = ops.feedback_mm(x, *cell, n)
                norm = torch.linalg.vector_norm(x.double(), dim=1, keepdim=True) * b.abs().max().double()
                allowed = torch.finfo(dtype).eps * expected.abs() + 2.0**-18 * norm
                if cell[:2] == (None, None) and cell[4] != "uniform":
                    # torch's own product need not round s into B, and normal draws are close, not equal.
                    allowed += torch.finfo(dtype).eps * norm
                assert ((actual.double() - expected).abs() <= allowed).all(), (m, k, n, cell[4])
                torch.set_num_threads(3)
                assert torch.equal(actual, ops.feedback_mm(x, *cell, n))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_tiles_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    if native.library.active_product_level() == "DEFAULT":
        pytest.skip("oneDNN's micro-kernel needs AVX2")
    m = 2100 if dtype == torch.float32 else 60
    for k, n in ((129, 50), (1030, 3)):
        g = grads(m, k, dtype)[0]
        for cell in cells(k, n, dtype):
            together = ops.feedback_mm(g, *cell, n)
            for row in (0, m // 2, m - 1):
                assert torch.equal(together[row], ops.feedback_mm(g[row : row + 1], *cell, n)[0]), (k, n, cell[4])


def test_threads_without_a_micro_kernel(one_thread: None) -> None:
    """There the BLAS library multiplies: its order of sums depends on a product's shape and on its own threads."""
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=False):
        for (m, k, n), dtype in itertools.product(
            ((1, 129, 1100), (2, 129, 50), (72, 195, 1027), (261, 1003, 447), (300, 515, 16)), DTYPES
        ):
            g, results = grads(m, k, dtype)[0], []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(ops.feedback_mm(g, None, None, None, KEY, "uniform", 0.1, n))
            assert all(torch.equal(results[0], x) for x in results), (m, k, n, dtype)


def shapes_of_products(g: Tensor, *feedback: object) -> list[list[list[int]]]:
    """The operands of torch's products within feedback_mm."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as p:
        ops.feedback_mm(g, *feedback)
    return [e.input_shapes[:2] for e in p.events() if e.name == "aten::mm"]


def test_slabs_of_products_by_torch() -> None:
    """B is whole where it is small, and no product is one of a few of many columns, which would be a slow one."""
    drawn = (None, None, None, KEY, "uniform", 0.1)
    for m, k, n in ((2048, 576, 1), (8, 576, 16), (8, 70, 64), (64, 515, 131), (16, 2000, 300)):
        dtype = torch.float32 if n == 1 else torch.float64
        products = shapes_of_products(torch.ones(m, k, dtype=dtype), *drawn, n)
        if k * n * dtype.itemsize <= 2**20:
            assert products == [[[m, k], [k, n]]]
        else:
            assert min(b[1] for _, b in products) >= 40 and sum(b[1] for _, b in products) == n


def test_half_types_that_torch_multiplies_in_loops() -> None:
    """Its product of them takes many times as long as one of float32 where the processor has no instruction."""
    drawn = (None, None, None, KEY, "uniform", 0.1)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=False):
        for dtype, n in itertools.product(HALVES, (16, 130)):
            assert shapes_of_products(torch.ones(600, 200, dtype=dtype), *drawn, n) == []


def test_rows_far_apart(one_thread: None) -> None:
    # Offsets beyond 32 bits; no page between the rows is touched.
    g = torch.empty(40, 2**24)[:, :16].normal_()
    magnitude = torch.randn(16, 48)
    result = ops.feedback_mm(g, None, None, magnitude, None, "stored", 0.5, 48)
    torch.testing.assert_close(result, 0.5 * g.contiguous() @ magnitude)
