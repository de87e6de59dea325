"""Rows of bench/gpu_static.csv for the Triton kernels, compiled ahead of time for targets that need not be here."""

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bioplaus_kernels.backends import triton as backend
from bioplaus_kernels.backends.triton import feedback_mm, lc
from bioplaus_kernels.backends.triton.launch import Tile

from .gpu_static import RESERVED_SHARED, VECTOR_LOAD, Row, cached, hot_loop, occupancy

TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 100, 103, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
# Bytes that a block may ask for.
SHARED = {"sm_80": 166_912, "gfx942": 65_536} | dict.fromkeys(("sm_90", "sm_100", "sm_103"), 232_448)
SHARED |= dict.fromkeys(("sm_86", "sm_89", "sm_120"), 101_376)
TENSOR_CORE = {"cuda": r"\b[IH]G?MMA\b|\bUTC[IHQO]?\w*MMA\b", "hip": r"\bv_mfma"}
FMA = {"cuda": r"\bFFMA2?\b", "hip": r"\bv_(?:pk_|dual_)?fma"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def capability(target: str) -> tuple[int, int]:
    """As torch says it; of AMD's, that of a part without wgmma."""
    number = int(target.removeprefix("sm_")) if target.startswith("sm_") else 80
    return number // 10, number % 10


@dataclass(frozen=True)
class Variant:
    """A kernel with the operands of one cell: `source` of signs (weight, packed, seeded or none) and `entries`.

    `parameters`: the dtype of the weight, where it is not that of the activations. `split`: sums of parts of K go to a
    second pass.
    """

    kernel: Any
    dtype: str
    source: str = ""
    entries: str = ""
    split: bool = False
    parameters: str = ""

    def name(self, tile: Tile) -> str:
        """In the table."""
        words = (self.kernel.__name__, self.source, self.parameters, self.entries, self.dtype)
        parts = "in parts" if self.split else ""
        return " ".join((*filter(None, words), *filter(None, (parts,)), f"{tile.rows}x{tile.columns}x{tile.depth}"))

    @property
    def product(self) -> bool:
        """Whether there must be a loop of products."""
        return self.kernel is not feedback_mm.add_kernel

    def tensor_cores(self, target: str) -> bool:
        """Whether they must be tensor cores': all but locally-connected ones in float32 where these have no wgmma."""
        parts = self.kernel is feedback_mm.sign_kernel or capability(target)[0] in (9, 10)
        return self.product and (self.dtype != "fp32" or parts)


SIGNS = ("weight", "packed", "seeded")
# Sign source and entries of a locally-connected input gradient.
CELLS = ("weight", "constant"), ("weight", "stored"), ("none", "stored")


def variants(dtype: str) -> Iterator[Variant]:
    """Every kernel and loader for dY in `dtype`."""
    yield Variant(feedback_mm.add_kernel, dtype)
    for source in SIGNS:
        yield Variant(feedback_mm.sign_kernel, dtype, source, "constant")
    yield Variant(feedback_mm.sign_kernel, dtype, "weight", "constant", split=True)
    if dtype != "fp32":
        yield Variant(feedback_mm.sign_kernel, dtype, "weight", "constant", parameters="fp32")
    yield Variant(lc.forward_kernel, dtype)
    yield Variant(lc.backward_weight_kernel, dtype)
    for source, entries in CELLS:
        yield Variant(lc.backward_input_kernel, dtype, source, entries)


def _arguments(variant: Variant, tile: Tile, target: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of the arguments, and the constants, of a call whose operands are dense and aligned."""
    cell = {
        "weight": variant.source == "weight" or variant.kernel is lc.forward_kernel,
        "planes": variant.source == "packed",
        "magnitude": variant.entries == "stored",
        "key": variant.source == "seeded",
        "bias": False,
        "sums": variant.split or variant.kernel is feedback_mm.add_kernel,
    }
    typed = {"planes": "i32", "key": "i64", "sums": "fp32"}
    if variant.parameters:
        typed["weight"] = variant.parameters
    pointers = {"grad", "out", "x", "y", "dx", "dw", "weight", "magnitude", "planes", "key", "sums"}
    constants: dict[str, Any] = {
        "BIAS": "", "WIDE": False, "WGMMA": capability(target)[0] in (9, 10),
        "BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "BLOCK": tile.columns,
        "grad_column": 1, "weight_column": 1,
        # A 2-D product of stride and dilation 1.
        "I0": 1, "O0": 1, "K0": 1, "S0": 1, "S1": 1, "S2": 1, "D0": 1, "D1": 1, "D2": 1, "B0": 0,
    }  # fmt: skip
    if (variant.source, variant.entries) == ("none", "stored"):
        constants["scale"] = None  # B as it lies there
    types = {}
    for name in variant.kernel.arg_names:
        if name in constants:
            continue
        if not cell.get(name, True):
            constants[name] = None
        elif name in pointers:
            types[name] = f"*{typed.get(name, variant.dtype)}"
        else:
            types[name] = "fp32" if name == "scale" else "i32"
    return types, {k: v for k, v in constants.items() if k in variant.kernel.arg_names}


# Arguments that are multiples of 16 in a call of the usual sizes.
_ODD = {"scale", "G", "P", "I1", "I2", "O1", "O2", "K1", "K2", "B1", "B2", "N"}


def compile_kernel(variant: Variant, target: str, tile: Tile) -> Any:
    """Triton's compiled kernel."""
    types, constants = _arguments(variant, tile, target)
    odd = _ODD if variant.kernel.__module__ == lc.__name__ else {"scale", "parts"}
    names = variant.kernel.arg_names
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in types if n not in odd}
    signature = {n: types.get(n, "constexpr") for n in names}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    source = ASTSource(variant.kernel, signature, constants, attributes)
    return triton.compile(source, TARGETS[target], options)


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _count(pattern: str, code: str) -> int:
    return len(re.findall(pattern, code))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _row(variant: Variant, target: str, tile: Tile) -> Row:
    kernel = compile_kernel(variant, target, tile)
    source = f"bioplaus_kernels/backends/triton/{variant.kernel.__module__.rsplit('.', 1)[1]}.py"
    named = (source, variant.name(tile), target, f"triton {triton.__version__}")
    at = TARGETS[target]
    maker, shared, threads = at.backend, kernel.metadata.shared, tile.warps * at.warp_size
    if maker == "hip":
        code = kernel.asm["amdgcn"]
        # Registers for sums count as well: they lie in the same file.
        figures = _number(r"\.vgpr_count:\s+(\d+)", code), 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", code), 0
        blocks = 0
    else:
        tools = "-blackwell" if capability(target)[0] >= 10 and (_TOOLS / "ptxas-blackwell").exists() else ""
        with tempfile.TemporaryDirectory() as folder:
            ptx, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
            ptx.write_text(kernel.asm["ptx"])
            cubin.write_bytes(kernel.asm["cubin"])
            arch = re.search(r"\.target (\w+)", kernel.asm["ptx"])
            assert arch is not None
            said = _run(_TOOLS / f"ptxas{tools}", "-v", f"--gpu-name={arch[1]}", ptx, "-o", "/dev/null")
            used = _run(_TOOLS / "cuobjdump", "--dump-resource-usage", cubin)
            code = _run(_TOOLS / "nvdisasm", "-c", cubin)
        # From sm_90 on this counts what every block pays, but of a kernel with no shared memory at all.
        reserved = RESERVED_SHARED if capability(target)[0] >= 9 else 0
        static = max(0, _number(r"SHARED:(\d+)", used) - reserved)
        registers = _number(r"REG:(\d+)", used)
        figures = registers, _number(r"(\d+) bytes spill stores", said), static
        blocks = occupancy(target, registers, threads, shared + static)
    tensor_core = _count(TENSOR_CORE[maker], code)
    product = (TENSOR_CORE if tensor_core else FMA)[maker]
    return Row(
        *named,
        *figures,
        shared,
        threads,
        blocks,
        0,
        tensor_core,
        _count(VECTOR_LOAD[maker], code),
        *(hot_loop(code, product) if variant.product else (0, 0)),
    )


@cache
def _sources() -> str:
    files = [*sorted(Path(backend.__file__).parent.glob("*.py")), Path(__file__).with_name("gpu_static.py")]
    # What follows chooses rows and changes none.
    here = Path(__file__).read_text().split("def tiles(")[0]
    text = "".join(f.read_text() for f in files) + here
    return hashlib.sha256(text.encode()).hexdigest() + triton.__version__


def measure(variant: Variant, target: str, tile: Tile) -> Row:
    """The row, compiled only if sources or Triton changed."""
    key = " ".join((_sources(), target, variant.name(tile), str(tile)))
    return cached(key, lambda: [_row(variant, target, tile)])[0]


def tiles(variant: Variant, target: str) -> tuple[Tile, ...]:
    """The configurations that `variant` runs with."""
    if variant.kernel is feedback_mm.add_kernel:
        return (Tile(0, feedback_mm.BLOCK, 0, 4, 3),)
    size = {"fp32": 4, "bf16": 2, "fp16": 2}
    limits = capability(target), SHARED[target]
    if variant.kernel is feedback_mm.sign_kernel:
        source = size[variant.parameters or variant.dtype] if variant.source == "weight" else 0
        found = [feedback_mm.tile_for(DTYPES[variant.dtype], 2**i, source, *limits) for i in range(4, 9)]
    else:
        found = [lc.tile_for(size[variant.dtype], 2**i, *limits)[0] for i in range(4, 9)]
    return tuple(dict.fromkeys(found))


def grid(every: bool = False) -> list[tuple[Variant, str, Tile]]:
    """What is compiled: all tiles for sm_90, elsewhere the last one; float32 for three targets. `every`: all."""
    return [
        (variant, target, tile)
        for target in TARGETS
        for dtype in (DTYPES if every else ("fp32", "bf16") if target in ("sm_80", "sm_90", "sm_103") else ("bf16",))
        for variant in variants(dtype)
        for tile in tiles(variant, target)[None if every or target == "sm_90" else -1 :]
    ]


def _measure(every: bool, i: int) -> Row:
    return measure(*grid(every)[i])


def rows(every: bool = False) -> list[tuple[Variant, Row]]:
    """All of them, compiled in several processes."""
    variants_ = [variant for variant, _, _ in grid(every)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(zip(variants_, pool.map(partial(_measure, every), range(len(variants_))), strict=True))
