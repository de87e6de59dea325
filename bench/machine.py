"""The machine's header, and its roofline measured in the same run."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import bioplaus_kernels as bk
from bioplaus_kernels.backends import native


def header() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "processor": _processor(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "library_level": native.product_level or "reference",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bioplaus_kernels": bk.__version__,
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def best(function: Callable[[], object], seconds: float = 0.5) -> float:
    """Shortest of the calls that fit in `seconds`, after a warm-up."""
    function()
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def roofline() -> dict[str, float]:
    """Peak products (flop/s by dtype) and memory bandwidths (byte/s: read, copy, write in place, write to a
    fresh tensor)."""
    peaks = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, 2048, 2048).to(dtype)
        peaks[str(dtype).removeprefix("torch.")] = 2 * 2048**3 / best(lambda a=a, b=b: a @ b)
    a8 = torch.randint(-127, 127, (2048, 2048), dtype=torch.int8)
    try:
        peaks["int8"] = 2 * 2048**3 / best(lambda: torch._int_mm(a8, a8))
    except RuntimeError:
        peaks["int8"] = 0.0
    big = torch.ones(2**26)
    target = torch.empty_like(big)
    size = big.numel() * 4
    peaks["read"] = size / best(lambda: big.sum())
    peaks["copy"] = 2 * size / best(lambda: target.copy_(big))
    peaks["write"] = size / best(lambda: target.fill_(1.0))
    peaks["write_fresh"] = size / best(lambda: torch.full((2**26,), 1.0))
    return peaks
