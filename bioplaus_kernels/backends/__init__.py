"""The backends and which one serves each op on each device, with the reason."""

from typing import NamedTuple

import torch

from . import native
from .reference import OPS


class Choice(NamedTuple):
    """The backend that serves `op` on `device`, and why not a faster one."""

    op: str
    device: str
    backend: str
    reason: str


def choices() -> list[Choice]:
    """One row for each op and device type."""
    rows = []
    for device in ("cpu", "cuda"):
        for op in OPS:
            rows.append(Choice(op, device, *_choose(op, device)))
    return rows


def _choose(op: str, device: str) -> tuple[str, str]:
    if native.library is None:
        return "reference", f"native library {native.reason}"
    if device == "cuda" and native.library.build_config()["cuda"] is None:
        return "reference", "native library built without CUDA"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"bioplaus::{op}", device.upper()):
        return "reference", "no native kernel in this version"
    if device == "cuda" and not torch.cuda.is_available():
        return device, "no CUDA device in this machine"
    return device, ""
