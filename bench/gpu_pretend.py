"""Imported, it makes this process take a machine without a GPU for one with an H200, whose kernels compute nothing.

For filling Triton's cache: everything up to a launch runs, compilation included, on tensors of the CPU that say they
lie on the GPU. Import it before bioplaus_kernels.
"""

import functools
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

GPU = torch.device("cuda", 0)
SHARED = 232_448


class Driver:
    """As much of one as a launch asks for."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": SHARED, "multiprocessor_count": 132},
        load_binary=lambda name, kernel, shared, device: (1, 1, 0, 0, 1024),
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        # Triton 3.6 compiles a launcher for each signature, and keeps it beside the kernels; newer ones do not.
        if hasattr(nvidia, "make_launcher"):
            nvidia.CudaLauncher(source, metadata)
        return lambda *args: None


# What takes a device.
_MAKERS = (
    "arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like",
    "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like",
)  # fmt: skip
_METHODS = ("to", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def _here(x: Any) -> Any:
    # A device by any of its names.
    named = isinstance(x, (str, torch.device)) and str(x).partition(":")[0] == "cuda"
    return torch.device("cpu") if named else x


def _on_cpu(function: Any) -> Any:
    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        return function(*map(_here, args), **{name: _here(x) for name, x in kwargs.items()})

    return on_cpu


def pretend() -> None:
    """Of this process, for good."""
    triton.runtime.driver.set_active(Driver())
    torch.Tensor.device = property(lambda tensor: GPU)
    torch.Tensor.is_cuda = property(lambda tensor: True)
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=SHARED,
        L2_cache_size=60 * 2**20, total_memory=140 * 2**30, uuid="0",
    )  # fmt: skip
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 0),
        "get_device_properties": properties, "synchronize": None, "current_stream": None, "device": nullcontext(),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    for where, names in ((torch, _MAKERS), (torch.Tensor, _METHODS)):
        for name in names:
            setattr(where, name, _on_cpu(getattr(where, name)))
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor


pretend()
