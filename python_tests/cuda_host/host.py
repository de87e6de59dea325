"""The CUDA ops, on tensors of the CPU: by host execution in a process that `cuda_host.run` started, else on the GPU.

Each call runs under every order of threads, warps and blocks, or as often on the GPU, and must give the same bits.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitwise import assert_same_bits
from torch import Tensor

ORDERS = 3

_path = os.environ.get("BK_CUDA_HOST")
BY_HOST = bool(_path)
if _path:
    library = ctypes.CDLL(_path)
    torch.ops.load_library(_path)
_truncating = False


@contextmanager
def truncating(on: bool) -> Iterator[None]:
    """Whether tensor cores truncate their float sums within the block, as hardware does, or round to nearest."""
    global _truncating
    _truncating = on
    yield
    _truncating = False


def configure(order: int) -> None:
    """Chooses one order, for what is called by ctypes."""
    library.host_execution_configure(order, int(_truncating))


def moved(x: Any, device: str) -> Any:
    """A tensor with its strides and its place in its storage; anything else as it is."""
    if not isinstance(x, Tensor):
        return x
    storage = x.untyped_storage()
    to = torch.UntypedStorage(storage.nbytes(), device=device)
    result = torch.empty(0, dtype=x.dtype, device=device).set_(to, x.storage_offset(), x.size(), x.stride())
    if storage.nbytes() < 2**30:
        to.copy_(storage)
    else:
        # Mostly memory that nobody has touched.
        result.copy_(x)
    return result


class _Ops:
    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        def under_every_order(*args: Any, **kwargs: Any) -> Tensor:
            results = []
            for order in range(ORDERS):
                if _path:
                    configure(order)
                    results.append(getattr(torch.ops.bioplaus_host, name)(*args, **kwargs))
                else:
                    there = [moved(x, "cuda") for x in args]
                    results.append(getattr(torch.ops.bioplaus, name)(*there, **kwargs).cpu())
            for other in results[1:]:
                assert_same_bits(other, results[0])
            return results[0]

        return under_every_order


ops = _Ops()
