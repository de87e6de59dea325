"""bench/GPU.md: what is known of the GPU kernels without a GPU, from bench/gpu_static.csv and arithmetic."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from bioplaus_kernels.backends.triton import configs

from . import gpu_static
from .feedback_mm import BATCHES, SHAPES
from .locally_connected import LAYERS

REPORT = Path(__file__).parent / "GPU.md"
# Bytes an entry of B's signs is read in; none: the weight's own.
SOURCES = {"weight": None, "packed": 0.125, "seeded": 0.0}
DTYPES = {"float32": 4, "bfloat16": 2}
LC_BATCHES = (1, 16, 128)


class Bytes(NamedTuple):
    """Of one call. moved: each operand once a kernel, as if the L2 cache held what tiles share; tiles: all that tiles
    read and write; least: operands read once, result written once."""

    moved: float
    tiles: float
    least: float

    def __str__(self) -> str:
        return f"{self.moved / 2**20:.2f} ({self.moved / self.least:.1f}, {self.tiles / self.least:.1f})"


def _up(a: int, b: int) -> int:
    return -(-a // b)


def _reads(element: int) -> int:
    # Of dY by the quantising kernel: its largest entry, its digits, and of half types whether two digits will do.
    return 2 if element == 4 else 3


def cuda_digits(m: int, n: int, k: int, source: float | None) -> Bytes:
    """feedback_mm_digits.cu in float32, after feedback_mm_quantise.cu and, where a weight is given, pack_signs.cu."""
    rows, columns = (8, 256) if m <= 8 else (16, 256) if m <= 16 else (32, 128)
    splits = min(256 // (_up(m, rows) * _up(n, columns)), _up(k, 64) // 8)
    partial = 16 * splits * m * n if splits > 1 else 0
    packing = 0.0 if source is not None else 4.25 * n * k
    signs = 0.0 if source == 0 else n * k / 8
    grad, out = 4 * m * k, 4 * m * n
    return Bytes(
        3 * grad + packing + signs + partial + out,
        grad * (3 + _up(n, columns)) + packing + signs * _up(m, rows) + partial + out,
        grad + n * k * (4 if source is None else source) + out,
    )


def _partial(kind: str, m: int, n: int, k: int, size: int) -> int:
    """Bytes of sums of parts of K, `size` each, that Triton writes and reads with sm_80's tiles."""
    parts = configs.parts(kind, "sm_80", m, n, k)
    return 2 * size * parts * m * n if parts > 1 else 0


def triton_digits(m: int, n: int, k: int, element: int, source: float | None) -> Bytes:
    """The same in Triton, with sm_80's tiles: signs are formed of the weight in every tile of rows."""
    digits = 4 if element == 4 else 2
    tile = configs.pick(f"digits{digits}", "sm_80", m)
    partial = _partial(f"digits{digits}", m, n, k, 8)
    grad, out, given = element * m * k, element * m * n, n * k * (element if source is None else source)
    cut = (4 + digits * _up(n, tile.columns)) * m * k
    return Bytes(
        grad + (4 + digits) * m * k + given + partial + out,
        _reads(element) * grad + cut + given * _up(m, tile.rows) + partial + out,
        grad + given + out,
    )


def triton_formed(m: int, n: int, k: int, element: int, source: float) -> Bytes:
    """B formed a tile at a time of `source` bytes an entry in Triton, with sm_80's tiles."""
    of = "float32" if element == 4 else "half"
    tile = configs.pick(of, "sm_80", m)
    return _formed(m, n, k, element, source, tile.rows, tile.columns, _partial(of, m, n, k, 4))


def _formed(m: int, n: int, k: int, element: int, source: float, rows: int, columns: int, partial: int) -> Bytes:
    grad, out, given = element * m * k, element * m * n, n * k * source
    least = grad + given + out
    return Bytes(least + partial, grad * _up(n, columns) + given * _up(m, rows) + out + partial, least)


def locally_connected(layer: tuple[int, ...], n: int, part: str, samples: int, rows: int) -> Bytes:
    """A product of locally_connected.LAYERS in float32, channels-last, "same" padding, in tiles of `samples` and `rows`
    outputs (of the weight gradient: columns and rows). Taps in the padding count as if they were read."""
    c, o, kernel, stride, size = layer
    positions, taps = _up(size, stride) ** 2, kernel**2
    weight, x, y = positions * o * taps * c, n * c * size**2, n * o * positions
    patches = positions * taps * c * n
    tiles = {
        "forward": weight * _up(n, samples) + patches * _up(o, rows) + y,
        "backward input": weight * _up(n, samples) + positions * taps * o * n * _up(c, rows) + x,
        "backward weight": weight + y * _up(taps * c, samples) + patches * _up(o, rows),
    }
    least = 4 * (weight + x + y)
    return Bytes(least, 4 * tiles[part], least)


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def _kernels(target: str) -> Iterator[list[str]]:
    for r in gpu_static.read():
        if r.target == target:
            per = f"{r.loop_instructions / r.loop_products:.1f}" if r.loop_products else "–"
            loop = f"{r.loop_instructions} / {r.loop_products}" if r.loop_products else "–"
            figures = (r.registers, r.spill_bytes, r.static_shared + r.dynamic_shared, r.threads)
            blocks = str(r.occupancy_blocks or "–")
            yield [
                f"{r.kernel} ({r.toolchain.split()[0]})",
                *map(str, figures),
                f"{blocks}, {r.claimed_blocks} claimed" if r.claimed_blocks else blocks,
                str(r.tensor_core_instructions),
                str(r.vector_global_loads),
                loop,
                per,
            ]


def _by_shape(columns: list) -> Iterator[list[str]]:
    for k, n in SHAPES:
        for m in BATCHES:
            yield [f"{k}x{n} M={m}", *(str(f(m, n, k, *of)) for f, *of in columns)]


def _lc_tile(backend: str, part: str, n: int, outputs: int) -> tuple[int, int]:
    """Samples (or columns) and rows of a tile."""
    if backend == "CUDA":
        return (64, 64) if part == "backward weight" or n > 8 else (8, 64)
    tile = configs.pick("lc_float32", "sm_80", outputs if part == "backward weight" else n)
    return (tile.columns, tile.rows) if part == "backward weight" else (tile.rows, tile.columns)


def _by_layer(columns: list[tuple[str, str]]) -> Iterator[list[str]]:
    for name, layer in LAYERS.items():
        for n in LC_BATCHES:
            cells = (locally_connected(layer, n, p, *_lc_tile(b, p, n, layer[1])) for b, p in columns)
            yield [f"{name} N={n}", *map(str, cells)]


def text() -> str:
    """The whole report."""
    head = ["kernel", "registers", "spilled", "shared", "threads", "blocks", "mma", "128-bit", "loop", "a product"]
    toolchains = sorted({r.toolchain for r in gpu_static.read()})
    lines = [
        "# GPU kernels on paper",
        "",
        "Written by `python -m bench gpu-report`. Checked by interpreter and host execution, not yet on hardware: no",
        "figure here is a speed.",
        "",
        "Registers a thread, bytes spilled and of shared memory a block, blocks that fit on a processor at once (those",
        "that the kernel's launch bounds claim beside them), tensor-core instructions and 128-bit global loads in the",
        f"machine code (bench/gpu_static.csv; {', '.join(toolchains)}). Last, a step of the product: the instructions",
        "of the innermost loop with products, those of them that are products (tensor-core instructions, or FMA where",
        "there are none), and how many of the first come with one of the second. Both sides of every branch count:",
        "where a kernel has all loaders in that loop (lc_kernel of half types) far fewer run.",
        "",
    ]
    for target in sorted({r.target for r in gpu_static.read()}, key=lambda t: (len(t), t)):
        lines += [f"## {target}", "", *_table(head, _kernels(target))]
    lines += [
        "## Bytes moved",
        "",
        "By arithmetic from the kernels' tiles, for the shapes of the CPU benchmark (out x in). A cell: MiB between",
        "memory and processors where the L2 cache keeps what tiles share, with all that is written and read again on",
        "the way (digits, packed signs, sums of parts of K); in brackets its ratio to the least possible, operands",
        "read once and the result written once, and the ratio of what all tiles read and write, from L2 too.",
        "feedback_weight and pack_signs read every operand and write every result once: 1.0 at any shape.",
        "",
    ]
    cells = [(cuda_digits, s) for s in SOURCES.values()]
    lines += ["### ±s feedback, CUDA, float32", "", *_table(["shape", *SOURCES], _by_shape(cells))]
    cells = [(triton_digits, e, s) for e in DTYPES.values() for s in SOURCES.values()]
    names = [f"{d}, {s}" for d in DTYPES for s in SOURCES]
    lines += ["### ±s feedback, Triton", "", *_table(["shape", *names], _by_shape(cells))]
    cells = [(triton_formed, e, s) for e in DTYPES.values() for s in (0.0, float(e))]
    names = [f"{d}, {s}" for d in DTYPES for s in ("drawn", "signs of W, drawn")]
    lines += ["### Uniform feedback, Triton", "", *_table(["shape", *names], _by_shape(cells))]
    parts = [(b, p) for b in ("CUDA", "Triton") for p in ("forward", "backward input", "backward weight")]
    lines += [
        "### Locally-connected products, float32, channels-last",
        "",
        *_table(["layer", *(f"{b} {p}" for b, p in parts)], _by_layer(parts)),
    ]
    return "\n".join(lines)


def write(path: Path = REPORT) -> None:
    """The report, in its place."""
    path.write_text(text())
