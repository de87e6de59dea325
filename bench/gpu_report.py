"""bench/GPU.md: what is known of the GPU kernels without a GPU, from bench/gpu_static.csv and arithmetic."""

from collections.abc import Iterator
from pathlib import Path

from . import gpu_static
from .feedback_mm import BATCHES, SHAPES

REPORT = Path(__file__).parent / "GPU.md"
_GROUP = 8  # tiles of rows that share one pass over B's source
_ROWS, _COLUMNS = 64, 128
SOURCES = {"weight": None, "packed signs": 0.125, "seeded signs": 0.0}


def digit_bytes(m: int, n: int, k: int, element: int, source: float) -> float:
    """Bytes that the integer-digit product moves beyond the L2 cache: dY three times, its digits, B's source, dX."""
    rows, columns = -(-m // _ROWS), -(-n // _COLUMNS)
    digits = 4 if element == 4 else 2
    passes = -(-rows // _GROUP)
    # A group's digits are read for the first tile of columns and stay in the cache where they fit (32 MB assumed).
    again = columns if digits * _GROUP * _ROWS * k > 32e6 else 1
    return 3 * m * k * element + 4 * m * k + digits * m * k * again + source * n * k * passes + element * m * n


def least_bytes(m: int, n: int, k: int, element: int, source: float) -> float:
    """dY and B's source read once, dX written once."""
    return m * k * element + source * n * k + element * m * n


def _table(head: list[str], rows: Iterator[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def _kernels(target: str) -> Iterator[list[str]]:
    for r in gpu_static.read():
        if r.target == target:
            shared = r.static_shared + r.dynamic_shared
            yield [
                r.kernel,
                r.toolchain,
                *map(str, (r.registers, r.spill_bytes, shared, r.threads)),
                str(r.occupancy_blocks or "–"),
                *map(str, (r.tensor_core_instructions, r.vector_global_loads)),
            ]


def _traffic() -> Iterator[list[str]]:
    for out, n in SHAPES:
        for m in BATCHES:
            row = [f"{out}x{n} M={m}"]
            for element in (4, 2):
                for source in SOURCES.values():
                    size = element if source is None else source
                    moved, least = (f(m, n, out, element, size) for f in (digit_bytes, least_bytes))
                    row.append(f"{moved / 2**20:.2f} ({moved / least:.1f})")
            yield row


def text() -> str:
    """The whole report."""
    head = ["kernel", "toolchain", "registers", "spilled", "shared", "threads", "blocks", "mma", "128-bit"]
    lines = [
        "# GPU kernels on paper",
        "",
        "Written by `python -m bench gpu-report`. Checked by interpreter and host execution, not yet on hardware: no",
        "figure here is a speed.",
        "",
        "Registers a thread, bytes spilled and of shared memory a block, blocks that fit on a processor at once, and",
        "instructions in the machine code (bench/gpu_static.csv). Tensor-core instructions are those of one step along",
        "the sum, times what the compiler unrolled.",
        "",
    ]
    for target in sorted({r.target for r in gpu_static.read()}):
        lines += [f"## {target}", "", *_table(head, _kernels(target))]
    columns = [f"{dtype}, {name}" for dtype in ("float32", "bfloat16") for name in SOURCES]
    lines += [
        "## Bytes moved by ±s feedback",
        "",
        "MiB beyond the L2 cache for the shapes of the CPU benchmark (out x in), by the integer-digit product in tiles",
        f"of {_ROWS} rows and {_COLUMNS} columns, and in brackets the ratio to the least possible: dY and B's source",
        "read once, dX written once. Digits are 4 bytes an entry of dY that no floating-point product would write.",
        "",
        *_table(["shape", *columns], _traffic()),
    ]
    return "\n".join(lines)


def write(path: Path = REPORT) -> None:
    """The report, in its place."""
    path.write_text(text())
