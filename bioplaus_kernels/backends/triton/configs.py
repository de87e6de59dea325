"""Tile sizes of every Triton kernel on every architecture: the one table, and autotuning where it is asked for.

Chosen on paper: sums that stay in registers (128 an thread or fewer), tiles of at least 128 columns of B (a call of the
generator, a row of packed words), and as much of the product as shared memory pipelines in `stages`. Compiled for every
architecture in the tests; not yet timed on hardware. BIOPLAUS_AUTOTUNE=1, or `autotune(True)`, times all rows of an
architecture's table at the first call of each shape instead, and Triton keeps what it found in its cache.
"""

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """`rows` of dY (or samples), `columns` of B (or outputs), `depth` of the sum, and how they are run.

    `registers`: the most that a thread may take. ptxas then takes what it needs up to that; unbounded, it spills a few
    to fit one more block on a processor.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None

    def sizes(self) -> dict[str, int]:
        """As a kernel takes it."""
        return {"BM": self.rows, "BN": self.columns, "BK": self.depth}

    def options(self) -> dict[str, int]:
        """As the compiler takes it."""
        run = {"num_warps": self.warps, "num_stages": self.stages}
        return run if self.registers is None else run | {"maxnreg": self.registers}


# The kinds of product: four digits at a time (float32), two (half types), half types, float32, and the
# locally-connected ones. Rows of a kind in order of `rows`: the first one that holds all rows of dY serves, else the
# last.
Table = dict[str, tuple[Tile, ...]]

_SM80: Table = {
    "digits4": (Tile(16, 128, 64, 4, 4), Tile(32, 128, 64, 8, 3)),
    "digits2": (Tile(16, 128, 64, 4, 4), Tile(64, 128, 64, 8, 3)),
    "half": (Tile(16, 128, 32, 4, 4, 168), Tile(64, 128, 32, 4, 4), Tile(128, 128, 32, 8, 4)),
    "float32": (Tile(16, 128, 16, 4, 3), Tile(64, 128, 16, 8, 3)),
    "lc_half": (Tile(16, 64, 32, 4, 3, 168), Tile(64, 64, 32, 4, 3, 255)),
    "lc_float32": (Tile(16, 64, 16, 4, 3, 255), Tile(32, 64, 16, 8, 3)),
}
# wgmma takes 64 rows of its A side, the columns of B, for each 4 warps.
_SM90: Table = _SM80 | {
    "digits4": (Tile(16, 128, 64, 4, 4), Tile(32, 128, 128, 8, 3)),
    "half": (Tile(16, 128, 32, 4, 4, 168), Tile(64, 128, 32, 4, 4), Tile(128, 128, 64, 8, 3)),
    "float32": (Tile(16, 128, 16, 4, 3), Tile(64, 128, 16, 4, 3)),
    # Normal draws for these tiles take 221 registers.
    "lc_half": (Tile(16, 64, 32, 4, 3, 255), Tile(64, 64, 32, 4, 3, 255)),
}
_SM100: Table = _SM90
# Wavefronts of 64 and 64 KiB of shared memory: few stages.
_GFX942: Table = {
    "digits4": (Tile(16, 128, 64, 4, 2),),
    "digits2": (Tile(16, 128, 64, 4, 2), Tile(64, 128, 64, 8, 2)),
    "half": (Tile(16, 128, 64, 4, 2), Tile(64, 128, 32, 4, 2)),
    "float32": (Tile(16, 128, 16, 4, 2), Tile(64, 128, 16, 8, 2)),
    "lc_half": (Tile(16, 64, 64, 4, 2), Tile(64, 64, 32, 4, 2)),
    "lc_float32": (Tile(16, 64, 32, 4, 2), Tile(32, 64, 32, 4, 2)),
}
TABLES: dict[str, Table] = {"sm_80": _SM80, "sm_90": _SM90, "sm_100": _SM100, "gfx942": _GFX942}

_autotune = os.environ.get("BIOPLAUS_AUTOTUNE", "0") not in ("", "0")


def autotune(enabled: bool) -> None:
    """Whether kernels are timed at the first call of each shape, in this process."""
    global _autotune
    _autotune = enabled


@functools.cache
def _architecture(index: int | None) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(index)
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


def architecture(device: torch.device) -> str:
    """The table that serves `device`; the interpreter takes the oldest."""
    return _architecture(device.index) if device.type == "cuda" else "sm_80"


def pick(kind: str, arch: str, rows: int) -> Tile:
    """The tile for a product of `rows` rows."""
    tiles = TABLES[arch][kind]
    for tile in tiles[:-1]:
        if rows <= tile.rows:
            return tile
    return tiles[-1]


def tile_for(kind: str, tensor: Tensor, rows: int) -> dict[str, int]:
    """The tile that a kernel is handed; nothing where `tunable` has put it into the kernel."""
    tile = pick(kind, architecture(tensor.device), rows)
    return {} if _autotune or tile.registers else tile.sizes() | tile.options()


def tunable(kernel: Any, kind: str, tensor: Tensor, rows: int, key: tuple[str, ...]) -> Any:
    """`kernel`, or it tuned where that is asked for; `key` names the arguments a tuning depends on.

    A bound on registers makes a tuning with nothing to choose: torch.compile knows it in no other place.
    """
    arch = architecture(tensor.device)
    tile = pick(kind, arch, rows)
    return _tuned(kernel, TABLES[arch][kind] if _autotune else (tile,), key) if _autotune or tile.registers else kernel


@functools.cache
def _tuned(kernel: Any, tiles: tuple[Tile, ...], key: tuple[str, ...]) -> Any:
    configs = [triton.Config(tile.sizes(), **tile.options()) for tile in tiles]
    return triton.autotune(configs, list(key), cache_results=True)(kernel)
