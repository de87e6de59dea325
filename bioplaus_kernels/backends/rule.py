"""Which kernel serves a product on a GPU where nobody says: the table of the automatic choice, and its arithmetic.

Three ways to make dX = dY B, M rows, K = out, N = in, entries of `e` bytes:

    cuda, triton   B formed in registers. Constant entries: quantising moves (2 e + 4) M K bytes, the product makes
                   2 D M N K integer operations (D = 4 digits for float32, 2 for half types). Other entries: 2 M N K
                   operations in the dtype. Both read B's source (bytes of the weight, 1/8 of a byte of packed signs,
                   nothing of a key) once for every group of row tiles that shares the L2 cache, write e M N bytes, and
                   waste what tiles stick out beyond M and N and what the last wave of tiles leaves idle.
    cublas         B formed by feedback_weight (source read, e K N bytes written), then torch's product, which
                   reads them: 2 M N K operations at the vendor's rate.

A time is launches + max(bytes / bandwidth, operations / rate) summed over the kernels; the least wins. Rates are the
vendors' dense peaks times the share that a kernel of its kind is expected to reach, figures from paper: not measured.
Locally-connected products have the same two kinds; theirs without a kernel is the reference, which writes and reads
every patch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Peaks of one part: bytes/s, operations/s, and processors that each hold a tile."""

    bandwidth: float
    int8: float
    half: float
    float32: float
    processors: int
    mma: float  # share of the tensor rate that sm_80's instructions, which the CUDA C++ kernels use, can reach


ARCHITECTURES = {
    "sm_80": Architecture(2.0e12, 624e12, 312e12, 19.5e12, 108, 1.0),  # A100 80 GB
    "sm_90": Architecture(3.35e12, 1979e12, 989e12, 67e12, 132, 0.6),  # H100 SXM
    "sm_100": Architecture(8.0e12, 4500e12, 2250e12, 80e12, 148, 0.25),  # B200
    "gfx942": Architecture(5.3e12, 2615e12, 1307e12, 163e12, 304, 0.0),  # MI300X: no CUDA C++
}
# Share of the peak: vendor's product, ours in CUDA C++, ours in Triton.
REACHED = {"cublas": 0.8, "cuda": 0.6, "triton": 0.5}
LAUNCH = 4e-6
_GROUP = 8  # row tiles that share one pass over B's source
_TILE = {"cuda": (64, 128), "triton": (64, 128)}  # rows and columns of the widest tile
_LEAST = 16  # rows of the narrowest


@dataclass(frozen=True)
class Product:
    """dX (m, n) = dY (m, k) B: `element` bytes of dY, `source` bytes read for an entry of B."""

    m: int
    n: int
    k: int
    element: int
    source: float
    constant: bool


def _waves(tiles: float, processors: int) -> float:
    # 1 / the share of the processors that the last wave keeps busy, over all waves; tiles may be a symbolic number.
    waves = -(-tiles // processors)
    return waves * processors / tiles


def times(p: Product, architecture: str) -> dict[str, float]:
    """Estimated seconds of each way."""
    a = ARCHITECTURES[architecture]
    rate = a.float32 if p.element == 4 else a.half
    flops = 2.0 * p.m * p.n * p.k
    b, dy, dx = 1.0 * p.n * p.k, 1.0 * p.m * p.k * p.element, 1.0 * p.m * p.n * p.element
    form = LAUNCH + (p.source + p.element) * b / a.bandwidth
    torchs = LAUNCH + max(flops / (rate * REACHED["cublas"]), (dy + dx + p.element * b) / a.bandwidth)
    result = {"cublas": form + torchs}
    for name in ("cuda", "triton"):
        share = REACHED[name] * (a.mma if name == "cuda" else 1.0)
        if share == 0:
            continue
        rows, columns = _TILE[name]
        tile = _LEAST if p.m <= _LEAST else rows
        row_tiles, column_tiles = -(-p.m // tile), -(-p.n // columns)
        waste = row_tiles * tile / p.m * (column_tiles * columns / p.n) * _waves(row_tiles * column_tiles, a.processors)
        read = p.source * b * (-(-row_tiles // _GROUP))
        if p.constant:
            digits = 4 if p.element == 4 else 2
            quantise = LAUNCH + (2.0 * p.element + 4) * p.m * p.k / a.bandwidth
            work, moved = digits * flops / (a.int8 * share), read + digits * p.m * p.k + dx
            result[name] = quantise + LAUNCH + max(waste * work, moved / a.bandwidth)
        else:
            # float32 does not go through tensor cores, which the vendor's product does not do either.
            work = flops / (rate * (REACHED[name] if p.element == 4 else share))
            result[name] = LAUNCH + max(waste * work, (read + dy + dx) / a.bandwidth)
    return result


@dataclass(frozen=True)
class LocalProduct:
    """Position products of a locally-connected op: n samples, `weights` of `element` bytes, `patches` of input."""

    n: int
    weights: int
    patches: int
    element: int


def local_times(p: LocalProduct, architecture: str) -> dict[str, float]:
    """Estimated seconds of each way."""
    a = ARCHITECTURES[architecture]
    rate = a.float32 if p.element == 4 else a.half
    flops = 2.0 * p.n * p.weights
    # The reference widens half types, writes and reads each sample's patches, and its weights once more.
    moved = 4.0 * (3.0 * p.weights + 3.0 * p.n * p.patches)
    result = {"reference": 8 * LAUNCH + max(flops / (a.float32 * REACHED["cublas"]), moved / a.bandwidth)}
    for name in ("cuda", "triton"):
        share = REACHED[name] * (a.mma if name == "cuda" and p.element == 2 else float(name == "triton" or a.mma > 0))
        if share > 0:
            waste = -(-p.n // _LEAST) * _LEAST / p.n
            read = p.element * (1.0 * p.weights + 1.0 * p.n * p.patches)
            result[name] = LAUNCH + max(waste * flops / (rate * share), read / a.bandwidth)
    return result


def least(estimates: dict[str, float], available: Sequence[str]) -> str:
    """The way among `available` with the least time; on a tie the first of cublas, reference, cuda, triton."""
    best, seconds = "", math.inf
    for name in ("cublas", "reference", "cuda", "triton"):
        if name in available and name in estimates and estimates[name] < seconds:
            best, seconds = name, estimates[name]
    return best
