"""What the compilers say of every GPU kernel, without a GPU: bench/gpu_static.csv.

A row is a kernel for a target by a toolchain: registers, spills, shared memory, threads, blocks that fit on a processor
at once and that the kernel claims to fit, tensor-core instructions and 128-bit global loads in the machine code, and of
its innermost loop with products how many instructions it has and how many of them form the products. A row is compared
only with a row of its own toolchain. `python -m bench gpu-static` writes the rows of the toolchains that are here anew
and keeps the others.
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

TABLE = Path(__file__).parent / "gpu_static.csv"

# In the machine code of either maker.
VECTOR_LOAD = {
    "cuda": r"\bLDG(?:STS)?\.\S*128\b|\bUTMALDG",
    "hip": r"\b(?:global|buffer)_load_(?:dwordx4|b128)",
}


@dataclass(frozen=True, order=True)
class Row:
    """One kernel; the first four name it. On AMD registers are vector registers, and occupancy is left at 0."""

    source: str
    kernel: str
    target: str
    toolchain: str
    registers: int
    spill_bytes: int
    static_shared: int
    dynamic_shared: int
    threads: int
    occupancy_blocks: int
    claimed_blocks: int
    tensor_core_instructions: int
    vector_global_loads: int
    loop_instructions: int
    loop_products: int

    @property
    def name(self) -> tuple[str, ...]:
        """What it is compared by."""
        return self.source, self.kernel, self.target, self.toolchain


def read(path: Path = TABLE) -> list[Row]:
    """The committed rows."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        counts = {f.name for f in fields(Row) if f.type in (int, "int")}
        return [Row(**{k: int(v) if k in counts else v for k, v in row.items()}) for row in csv.DictReader(file)]


def write(rows: Iterable[Row], path: Path = TABLE) -> None:
    """All rows, in order; those of other toolchains than the given ones' stay."""
    rows = list(rows)
    makers = {(r.toolchain.split()[0]) for r in rows}
    kept = [r for r in read(path) if r.toolchain.split()[0] not in makers]
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(f.name for f in fields(Row))
        out.writerows(astuple(r) for r in sorted([*kept, *rows]))


def worse(measured: Iterable[Row], committed: Iterable[Row]) -> list[str]:
    """What got worse, one line each: a figure grew, instructions vanished, a kernel is not in the table."""
    before, found = {r.name: r for r in committed}, []
    toolchains = {r.toolchain for r in before.values()}
    for row in measured:
        was = before.get(row.name)
        if was is None:
            if row.toolchain in toolchains:
                found.append(f"{' '.join(row.name)}: not in the table; run python -m bench gpu-static")
            continue
        for figure in ("registers", "spill_bytes", "static_shared", "dynamic_shared"):
            if getattr(row, figure) > getattr(was, figure):
                found.append(f"{' '.join(row.name)}: {figure} {getattr(was, figure)} -> {getattr(row, figure)}")
        for figure in ("tensor_core_instructions", "vector_global_loads"):
            if getattr(was, figure) > 0 and getattr(row, figure) == 0:
                found.append(f"{' '.join(row.name)}: {figure} {getattr(was, figure)} -> 0")
        if row.loop_instructions * was.loop_products > was.loop_instructions * row.loop_products:
            loops = f"{was.loop_instructions} / {was.loop_products} -> {row.loop_instructions} / {row.loop_products}"
            found.append(f"{' '.join(row.name)}: instructions a product {loops}")
    return found


_LABEL = re.compile(r"\s*(\.L\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s|\t[a-z]+_\w+")
_JUMP = re.compile(r"\b(?:BRA|s_c?branch).*?(\.L\w+)")


def hot_loop(code: str, product: str) -> tuple[int, int]:
    """Instructions of the innermost loop with products, of two such that with the larger share of them, and its
    products: lines that match `product`. Both sides of every branch count. (0, 0) where no loop has products."""
    label: dict[str, int] = {}
    loops = []
    products = [0]
    for line in code.splitlines():
        if found := _LABEL.match(line):
            label[found[1]] = len(products) - 1
        elif _INSTRUCTION.match(line):
            products.append(products[-1] + bool(re.search(product, line)))
            if (jump := _JUMP.search(line)) and jump[1] in label:
                loops.append((label[jump[1]], len(products) - 1))
    loops = [(a, b) for a, b in loops if products[b] > products[a]]
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    return max(((b - a, products[b] - products[a]) for a, b in inner), key=lambda x: x[1] / x[0], default=(0, 0))


# Registers, threads, blocks and bytes of shared memory of a processor.
_LIMITS = {"sm_80": (65536, 2048, 32, 167936), "sm_90": (65536, 2048, 32, 233472)}
_LIMITS["sm_100"] = _LIMITS["sm_103"] = _LIMITS["sm_90"]
_LIMITS |= {"sm_86": (65536, 1536, 16, 102400)} | dict.fromkeys(("sm_89", "sm_120"), (65536, 1536, 24, 102400))
# What a block pays of the last beside its own.
RESERVED_SHARED = 1024


def occupancy(target: str, registers: int, threads: int, shared: int) -> int:
    """Blocks that fit on one processor of `target` at once."""
    all_registers, all_threads, most, memory = _LIMITS[target]
    # Registers are handed to warps in units of 256.
    for_warp = -(-registers * 32 // 256) * 256
    warps = -(-threads // 32)
    by_shared = memory // (shared + RESERVED_SHARED)
    return min(all_registers // for_warp // warps, all_threads // (32 * warps), most, by_shared)


def cached(key: str, make: Callable[[], list[Row]]) -> list[Row]:
    """`make()`, or what it gave when the same key was last asked for."""
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bioplaus_kernels" / "gpu_static"
    path = root / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if path.exists():
        return [Row(**row) for row in json.loads(path.read_text())]
    rows = make()
    root.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps([asdict(row) for row in rows]))
    temporary.replace(path)
    return rows


def measure_all() -> list[Row]:
    """Rows of every toolchain that is here."""
    from . import gpu_static_cuda, gpu_static_triton

    cuda = gpu_static_cuda.rows() if gpu_static_cuda.tools() else []
    return cuda + [row for _, row in gpu_static_triton.rows()]
