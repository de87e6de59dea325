"""The machine's header, and its roofline measured in the same run."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import bioplaus_kernels as bk
from bioplaus_kernels.backends import native

from .device import Cuda, Device, best, with_tf32
from .registry import Run


def header(device: Device) -> dict[str, Any]:
    """What a reader needs to judge the numbers; BIOPLAUS_COMMIT names the sources where git does not."""
    common = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("BIOPLAUS_COMMIT") or _commit() or "unknown",
        "processor": _processor(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "library_level": native.product_level() or "reference",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bioplaus_kernels": bk.__version__,
        "load_at_start": round(os.getloadavg()[0], 2),
    }
    return common | _gpu(device) if isinstance(device, Cuda) else common


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _gpu(device: Cuda) -> dict[str, Any]:
    properties = device.cuda.get_device_properties()
    capability = f"sm_{properties.major}{properties.minor}"
    reasons = {name: bk.backends.unavailable(name) for name in device.backends}
    return {
        "gpu": properties.name,
        "library_level": f"CUDA {capability}",
        "processors": properties.multi_processor_count,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_cache_mib": round(properties.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton") if find_spec("triton") else "not installed",
        "tf32": f"matmul {torch.backends.cuda.matmul.allow_tf32}, cudnn {torch.backends.cudnn.allow_tf32}",
        "backends": ", ".join(f"{name}: {reason}" if reason else name for name, reason in reasons.items()),
    }


# Of nvidia-smi; clocks in MHz and power in W, with their units.
_ASKED = {
    "driver": "driver_version",
    "clock": "clocks.current.sm",
    "clock_most": "clocks.max.sm",
    "memory_clock": "clocks.current.memory",
    "memory_clock_most": "clocks.max.memory",
    "power_limit": "power.limit",
    "temperature": "temperature.gpu",
}


def driver_and_clocks(device: Cuda) -> dict[str, str]:
    """The driver, and the GPU's clocks as they are now."""
    uuid = str(device.cuda.get_device_properties().uuid)
    which = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    command = ["nvidia-smi", f"--id={which}", f"--query-gpu={','.join(_ASKED.values())}", "--format=csv,noheader"]
    try:
        # The program is not everywhere that the driver is.
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return {"driver": f"unknown: {type(error).__name__} of nvidia-smi"}
    return dict(zip(_ASKED, (value.strip() for value in done.stdout.strip().split(",")), strict=True))


def _processor() -> str:
    # A virtual machine's name may be that of all a vendor's processors; its family and model tell them apart.
    said: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        name, _, value = line.partition(":")
        said.setdefault(name.strip(), value.strip())
    if "model name" not in said:
        return platform.processor() or platform.machine()
    kind = f", family {said['cpu family']}, model {said['model']}" if said.keys() >= {"cpu family", "model"} else ""
    return said["model name"] + kind


def roofline(device: Device, seconds: float = 0.5) -> dict[str, float | str]:
    """Peak products (flop/s by dtype) and memory bandwidths (byte/s: read, copy, write in place, write to a
    fresh tensor), each the best of `seconds`; the error of one that cannot be measured."""
    peaks: dict[str, float | str] = {}

    def fastest(run: Run) -> float:
        return best(device, run, seconds)

    n = device.product
    with device.device:
        for dtype in device.dtypes:
            a, b = torch.randn(2, n, n).to(dtype)
            peaks[str(dtype).removeprefix("torch.")] = 2 * n**3 / fastest(lambda a=a, b=b: a @ b)
        if device.backends:
            a, b = torch.randn(2, n, n)
            peaks["tf32"] = 2 * n**3 / fastest(with_tf32(lambda: a @ b))
        a8 = torch.randint(-127, 127, (n, n), dtype=torch.int8)
        try:
            # CUDA 13 multiplies rows by columns only.
            peaks["int8"] = 2 * n**3 / fastest(lambda: torch._int_mm(a8, a8.t()))
        except RuntimeError as error:
            peaks["int8"] = f"failed: {error}".splitlines()[0]
        big = torch.ones(device.numbers)
    target = torch.empty_like(big)
    size = big.numel() * 4
    peaks["read"] = size / fastest(lambda: big.sum())
    peaks["copy"] = 2 * size / fastest(lambda: target.copy_(big))
    peaks["write"] = size / fastest(lambda: target.fill_(1.0))
    peaks["write_fresh"] = size / fastest(lambda: torch.full_like(big, 1.0))
    return peaks
