"""What the compilers say of every GPU kernel, without a GPU: bench/gpu_static.csv.

A row is a kernel for a target by a toolchain: registers, spills, shared memory, threads, blocks that fit on a processor
at once, tensor-core instructions and 128-bit global loads in the machine code. A row is compared only with a row of its
own toolchain. `python -m bench gpu-static` writes the rows of the toolchains that are here anew and keeps the others.
"""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

TABLE = Path(__file__).parent / "gpu_static.csv"


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
    tensor_core_instructions: int
    vector_global_loads: int

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
    return found


# Registers, threads, blocks and bytes of shared memory of a processor, and what a block pays of the last beside its
# own.
# (from sm_90 on the compiler counts that among static shared memory).
_LIMITS = {"sm_80": (65536, 2048, 32, 167936, 1024), "sm_90": (65536, 2048, 32, 233472, 0)}
_LIMITS["sm_100"] = _LIMITS["sm_90"]


def occupancy(target: str, registers: int, threads: int, shared: int) -> int:
    """Blocks that fit on one processor of `target` at once."""
    all_registers, all_threads, most, memory, reserved = _LIMITS[target]
    # Registers are handed to warps in units of 256.
    for_warp = -(-registers * 32 // 256) * 256
    warps = -(-threads // 32)
    return min(all_registers // for_warp // warps, all_threads // (32 * warps), most, memory // (shared + reserved))


def cached(key: str, make: Callable[[], Row]) -> Row:
    """`make()`, or what it gave when the same key was last asked for."""
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bioplaus_kernels" / "gpu_static"
    path = root / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if path.exists():
        return Row(**json.loads(path.read_text()))
    row = make()
    root.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(asdict(row)))
    temporary.replace(path)
    return row


def measure_all() -> list[Row]:
    """Rows of every toolchain that is here."""
    from . import gpu_static_triton

    return [row for _, row in gpu_static_triton.rows()]
