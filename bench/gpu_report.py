"""bench/GPU.md: what the compilers say of the GPU kernels, from bench/gpu_static.csv."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from . import gpu_static

REPORT = Path(__file__).parent / "GPU.md"


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


def text() -> str:
    """The whole report."""
    head = ["kernel", "registers", "spilled", "shared", "threads", "blocks", "mma", "128-bit", "loop", "a product"]
    toolchains = sorted({r.toolchain for r in gpu_static.read()})
    lines = [
        "# GPU kernels as they are compiled",
        "",
        "Written by `python -m bench gpu-report`. Checked by interpreter and host execution, not yet on hardware: no",
        "figure here is a speed.",
        "",
        "Registers a thread, bytes spilled and of shared memory a block, blocks that fit on a processor at once (those",
        "that the kernel's launch bounds claim beside them), tensor-core instructions and 128-bit global loads in the",
        f"machine code (bench/gpu_static.csv; {', '.join(toolchains)}). Last, a step of the product: the instructions",
        "of the innermost loop with products, those of them that are products (tensor-core instructions, or FMA where",
        "there are none), and how many of the first come with one of the second. Both sides of every branch count:",
        "where that loop also loads, 16 bytes at a time or entry by entry (lc_kernel of half types), fewer run.",
        "",
    ]
    for target in sorted({r.target for r in gpu_static.read()}, key=lambda t: (len(t), t)):
        lines += [f"## {target}", "", *_table(head, _kernels(target))]
    return "\n".join(lines)


def write(path: Path = REPORT) -> None:
    """The report, in its place."""
    path.write_text(text())
