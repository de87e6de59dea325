"""Which kernel serves a product on a GPU where nobody says: the table of the automatic choice, and its arithmetic.

Three ways to make dX = dY B, M rows, K = out, N = in, entries of `e` bytes:

    cuda, triton   B formed on chip, a tile of R rows x C columns of dX at a time. Constant entries: quantising reads e
                   M K bytes and writes D M K, or 4 M K in Triton (D = 4 digits for float32, 2 for half types), the
                   product makes 2 D M N K integer operations; CUDA C++ packs a weight's signs first, one read of the
                   weight and N K / 4 bytes written. Other entries: 2 M N K operations in the dtype. M and N count as
                   whole tiles, and the last wave of tiles leaves processors idle; where there are few tiles, parts of
                   K are summed apart, and sums written, read and added. B's source (bytes of the weight, 1/8 of a byte
                   of packed signs, nothing of a key) is read once for all tiles that run together, or once where half
                   of the L2 cache holds it. Each row of tiles forms the entries of B anew, some instructions an entry:
                   beside tensor cores, and before FMA on the same units.
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
    """Peaks of one part: bytes/s, bytes, operations/s, and processors that each hold a tile."""

    bandwidth: float
    cache: float
    int8: float
    half: float
    float32: float
    processors: int
    mma: float  # share of the tensor rate that sm_80's instructions, which the CUDA C++ kernels use, can reach


ARCHITECTURES = {
    "sm_80": Architecture(2.0e12, 40e6, 624e12, 312e12, 19.5e12, 108, 1.0),  # A100 80 GB
    "sm_90": Architecture(3.35e12, 50e6, 1979e12, 989e12, 67e12, 132, 0.6),  # H100 SXM
    "sm_100": Architecture(8.0e12, 126e6, 4500e12, 2250e12, 80e12, 148, 0.25),  # B200
    "gfx942": Architecture(5.3e12, 256e6, 2615e12, 1307e12, 163e12, 304, 0.0),  # MI300X: no CUDA C++
}
# Share of the peak: vendor's product, ours in CUDA C++, ours in Triton.
REACHED = {"cublas": 0.8, "cuda": 0.6, "triton": 0.5}
LAUNCH = 4e-6

# Rows and columns of the tiles, by the kind of product. The first that holds all rows of dY serves, else the last.
Tiles = dict[str, tuple[tuple[int, int], ...]]
_CUDA: Tiles = {
    "digits4": ((8, 256), (16, 256), (32, 128)),
    "digits2": ((16, 256), (32, 256), (64, 128)),
    "half": ((128, 64),),
    "float32": ((16, 256), (128, 32)),
}
_TRITON: Tiles = {
    "digits4": ((16, 128), (32, 128)),
    "digits2": ((16, 128), (64, 128)),
    "half": ((16, 128), (64, 128), (128, 128)),
    "float32": ((16, 128), (64, 128)),
}
_SMALL: Tiles = _TRITON | {"digits4": ((16, 128),), "half": ((16, 128), (64, 128))}
TILES = {"cuda": dict.fromkeys(ARCHITECTURES, _CUDA), "triton": dict.fromkeys(ARCHITECTURES, _TRITON)}
TILES["triton"]["gfx942"] = _SMALL
# Rows of tiles that take turns at one column of them; 0: all columns of a row of tiles come first.
_GROUP = {"cuda": 0, "triton": 8}
# Tiles that are wanted by cutting K: of CUDA C++, and of Triton for each processor. And the shortest part.
_BLOCKS, _PROGRAMS = 256, 2
_PART = {"cuda": {"digits4": 512, "digits2": 512, "half": 256, "float32": 256}}
_PART["triton"] = dict.fromkeys(_PART["cuda"], 256)
# Instructions to form an entry, from csrc/cuda/feedback_mm*.cu.
_FORMING = {"constant": 1.4, "stored": 5.0, "uniform": 25.0, "normal": 60.0}
_LONGEST = 2**20  # of the sums that are made of digits
# Samples of a locally-connected product's tiles, of half types and of float32.
_SAMPLES = {"cuda": {2: (8, 64), 4: (8, 64)}, "triton": {2: (16, 64), 4: (16, 32)}}


@dataclass(frozen=True)
class Product:
    """dX (m, n) = dY (m, k) B: `element` bytes of dY, `source` bytes read for an entry of B, and what entries are."""

    m: int
    n: int
    k: int
    element: int
    source: float
    entries: str


def _waves(tiles: float, processors: int) -> float:
    # 1 / the share of the processors that the last wave keeps busy, over all waves; tiles may be a symbolic number.
    waves = -(-tiles // processors)
    return waves * processors / tiles


def kind(p: Product) -> str:
    """Which tiles serve."""
    if p.entries == "constant" and p.k <= _LONGEST:
        return "digits4" if p.element == 4 else "digits2"
    return "float32" if p.element == 4 else "half"


def tile(name: str, p: Product, architecture: str) -> tuple[int, int]:
    """Rows and columns of the tiles of a product."""
    tiles = TILES[name][architecture][kind(p)]
    for rows, columns in tiles[:-1]:
        if p.m <= rows:
            return rows, columns
    return tiles[-1]


def parts(name: str, of: str, depth: int, architecture: str, tiles: int) -> int:
    """Parts of a sum over `depth` that are made apart: more than one where `tiles` are too few for the architecture."""
    # Digits come in stages of 64 in CUDA C++.
    depth = -(-depth // 64) * 64 if name == "cuda" and of.startswith("digits") else depth
    programs = _BLOCKS if name == "cuda" else _PROGRAMS * ARCHITECTURES[architecture].processors
    most, wanted = depth // _PART[name][of], programs // tiles
    return 1 if most <= 1 or wanted <= 1 else min(most, wanted)


def _ours(name: str, p: Product, architecture: str, share: float) -> float:
    a, of = ARCHITECTURES[architecture], kind(p)
    digits = {"digits4": 4, "digits2": 2}.get(of, 0)
    rows, columns = tile(name, p, architecture)
    row_tiles, column_tiles = -(-p.m // rows), -(-p.n // columns)
    tiles = row_tiles * column_tiles
    apart = parts(name, of, p.k, architecture, tiles)
    b, dy, dx, source = 1.0 * p.n * p.k, 1.0 * p.m * p.k, 1.0 * p.m * p.n * p.element, p.source
    seconds = LAUNCH
    if digits:
        seconds += LAUNCH + (p.element + (digits if name == "cuda" else 4)) * dy / a.bandwidth
        if name == "cuda" and source > 0.125:
            seconds += LAUNCH + (source + 0.25) * b / a.bandwidth
            source = 0.125
        dy *= digits
    else:
        dy *= p.element
    if apart > 1:
        seconds += LAUNCH + 2.0 * apart * (8 if digits else 4) * p.m * p.n / a.bandwidth
    together = _GROUP[name] or max(1, 2 * a.processors // (column_tiles * apart))
    passes = 1 if source * b <= a.cache / 2 else -(-row_tiles // together)
    waves = _waves(tiles * apart, a.processors)
    operations = 2.0 * row_tiles * rows * column_tiles * columns * p.k * waves
    # An FMA is two operations.
    forming = 2.0 * _FORMING[p.entries] * row_tiles * column_tiles * columns * p.k * waves / a.float32
    if digits:
        work = max(digits * operations / (a.int8 * share), forming)
    elif p.element == 2:
        work = max(operations / (a.half * share), forming)
    else:
        # Not through tensor cores, which the vendor's product does not do either.
        work = operations / (a.float32 * REACHED[name]) + forming
    return seconds + max(work, (source * b * passes + dy + dx) / a.bandwidth)


def times(p: Product, architecture: str) -> dict[str, float]:
    """Estimated seconds of each way."""
    a = ARCHITECTURES[architecture]
    rate = a.float32 if p.element == 4 else a.half
    b, moved = 1.0 * p.n * p.k, 1.0 * p.element * (p.m * p.k + p.m * p.n + p.n * p.k)
    forming = max((p.source + p.element) * b / a.bandwidth, 2.0 * _FORMING[p.entries] * b / a.float32)
    torchs = max(2.0 * p.m * p.n * p.k / (rate * REACHED["cublas"]), moved / a.bandwidth)
    result = {"cublas": 2 * LAUNCH + forming + torchs}
    for name in ("cuda", "triton"):
        share = REACHED[name] * (a.mma if name == "cuda" else 1.0)
        if share > 0:
            result[name] = _ours(name, p, architecture, share)
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
            few, many = _SAMPLES[name][p.element]
            samples = few if p.n <= few else many
            waste = -(-p.n // samples) * samples / p.n
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
