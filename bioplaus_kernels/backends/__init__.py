"""The backends, which one serves each op on each device, with the reason, and the user's own choice."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NamedTuple

import torch

from . import choice, native
from .reference import OPS, checks

NAMES = ("reference", "cpu", "cuda", "triton")
# The ops that Triton has kernels for; B and packed signs are formed by the device's own kernels whatever is chosen.
TRITON_OPS = ("feedback_mm", "lc_forward", "lc_backward_input", "lc_backward_weight")
VARIABLE = "BIOPLAUS_BACKEND"


class Choice(NamedTuple):
    """The backend that serves `op` on `device`, and why not a faster one."""

    op: str
    device: str
    backend: str
    reason: str


_chosen: str | None = None
# Called with each new choice: the ops, which bind their names to it.
followers: list[Callable[[str | None], None]] = []


def chosen() -> str | None:
    """The backend that `use` or the environment chose, or None where each product is left to `choice`."""
    return _chosen


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unavailable(backend: str) -> str:
    """Why `backend` cannot run in this process; empty if it can."""
    if backend not in NAMES:
        return f"expected one of {NAMES}"
    if backend == "reference" or (backend == "triton" and find_spec("triton") and interpreted()):
        return ""
    if backend == "triton" and find_spec("triton") is None:
        return "the package triton is not installed"
    if backend != "triton":
        if native.library is None:
            return f"native library {native.reason}"
        if backend == "cpu":
            return ""
        if native.library.build_config()["cuda"] is None:
            return "native library built without CUDA"
    if not torch.cuda.is_available():
        return f"no GPU in this machine{', and TRITON_INTERPRET is not set' if backend == 'triton' else ''}"
    reasons = [lacks_kernels(backend, index) for index in range(torch.cuda.device_count())]
    return "" if "" in reasons else reasons[0]


def lacks_kernels(backend: str, index: int) -> str:
    """Why `backend`, "cuda" or "triton", has no kernels for CUDA device `index`; empty if it has."""
    if torch.version.hip is not None:
        return "" if backend == "triton" else "CUDA C++ on an AMD device"
    capability = torch.cuda.get_device_capability(index)
    if backend == "cuda":
        return native.missing_kernels(capability)
    # Below 8.0 tensor cores have neither bf16 nor int8 as these kernels use them.
    return "" if capability >= (8, 0) else f"compute capability {capability[0]}.{capability[1]} is below 8.0"


def lacks(op: str, backend: str) -> str:
    """Why `backend` has no kernel of its own for `op`; empty if it has one."""
    if backend in ("cpu", "cuda") and not torch._C._dispatch_has_kernel_for_dispatch_key(
        f"bioplaus::{op}", backend.upper()
    ):
        return f"no {backend.upper() if backend == 'cpu' else 'CUDA'} kernel for {op} in this version"
    if backend == "triton" and op not in TRITON_OPS:
        return f"no Triton kernel for {op}"
    return ""


def choose(backend: str | None) -> None:
    """`use` for the rest of the process."""
    global _chosen
    if backend is not None:
        checks.one_of("backend", backend, NAMES)
        if reason := unavailable(backend):
            raise RuntimeError(f"backend {backend!r} cannot be used: {reason}")
    for follow in followers:
        follow(backend)
    _chosen = backend


@contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Every op, and so every layer, of this process is served by `backend` inside, or raises and says why it cannot be.

    "reference": plain torch on any device. "cpu", "cuda": the native kernels, of tensors on that device. "triton": the
    products that it has kernels for by Triton (on tensors of the CPU under TRITON_INTERPRET=1), everything else by the
    device's own. None: what is fastest by `choice`. For all threads, as a backward runs in autograd's own. A compiled
    function is compiled anew where the choice differs; enter this outside of it. The environment variable
    BIOPLAUS_BACKEND does the same for the whole process.
    """
    before = _chosen
    choose(backend)
    try:
        yield
    finally:
        choose(before)


def choices() -> list[Choice]:
    """One row for each op and device type."""
    return [Choice(op, device, *_serves(op, device)) for device in ("cpu", "cuda") for op in OPS]


def _serves(op: str, device: str) -> tuple[str, str]:
    if _chosen == "reference":
        return "reference", "chosen"
    if _chosen == "triton" and op in TRITON_OPS:
        return "triton", "chosen" if device == "cuda" or interpreted() else "chosen: raises on this device"
    if _chosen in ("cpu", "cuda"):
        return _chosen, "chosen" if _chosen == device else "chosen: raises on this device"
    if device == "cuda" and torch.cuda.is_available():
        reasons = {name: unavailable(name) or lacks(op, name) for name in ("cuda", "triton")}
        able = [name for name, reason in reasons.items() if not reason]
        if not able:
            return "reference", reasons["cuda"]
        return " or ".join(able), "by shape, dtype and device: backends.choice" if op in TRITON_OPS else ""
    if native.library is None:
        return "reference", f"native library {native.reason}"
    if lacks(op, device):
        return "reference", "no native kernel in this build"
    return device, "" if device == "cpu" else "no GPU in this machine"


__all__ = [
    "NAMES",
    "TRITON_OPS",
    "VARIABLE",
    "Choice",
    "choice",
    "choices",
    "choose",
    "chosen",
    "followers",
    "interpreted",
    "lacks",
    "lacks_kernels",
    "unavailable",
    "use",
]
