"""The CUDA ops by host execution, in a process that `cuda_host.run` started.

Each call runs under every order of threads, warps and blocks, and must give the same bits in all.
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

_path = os.environ["BK_CUDA_HOST"]
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


class _Ops:
    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        op = getattr(torch.ops.bioplaus_host, name)

        def under_every_order(*args: Any, **kwargs: Any) -> Tensor:
            results = []
            for order in range(ORDERS):
                configure(order)
                results.append(op(*args, **kwargs))
            for other in results[1:]:
                assert_same_bits(other, results[0])
            return results[0]

        return under_every_order


ops = _Ops()
