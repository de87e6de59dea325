"""feedback_mm where its bounds of memory cut rows and columns, which test_feedback_mm_cuda_host.py makes small.

Bits do not depend on the cut, and what is held beside operands and result does not grow with rows or columns.
"""

from collections.abc import Callable

import pytest
import torch
from bitwise import KEY
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bioplaus_kernels.backends import reference
from cuda_host.cases_feedback_mm import INTEGER_WAYS, integer_ways, mixed, needs_cpu, same_as_cpu, sources
from cuda_host.host import configure, ops


@needs_cpu
@integer_ways
@pytest.mark.parametrize("n", [300, 321])
def test_bits(n: int, way: str) -> None:
    m, k = 70, 131
    for source in sources(k, n).values():
        same_as_cpu(mixed(m, k), source, n, way)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("entries", ["constant", "uniform"])
def test_columns(entries: str, dtype: torch.dtype) -> None:
    """B itself, by the unit matrix."""
    k, n = 130, 700
    for source in sources(k, n).values() if entries == "constant" else [(None, None, None, KEY)]:
        args = (*source, entries, 0.37)
        b = reference.feedback_weight(*args, (k, n), dtype=dtype)
        assert torch.equal(ops.feedback_mm_by(torch.eye(k, dtype=dtype), *args, n, "formed"), b)


def peak(call: Callable[[], Tensor]) -> int:
    """Bytes that were allocated at once beside the result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    now = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    assert now == result.untyped_storage().nbytes()
    return most - now


@pytest.mark.parametrize("way", [*INTEGER_WAYS, "formed"])
@pytest.mark.parametrize("growing", ["rows", "columns"])
def test_memory(growing: str, way: str) -> None:
    configure(0)

    def held(m: int, n: int) -> int:
        args = (torch.randn(m, 131), None, None, None, KEY, "constant", 0.37, n, way)
        return peak(lambda: torch.ops.bioplaus_host.feedback_mm_by(*args))

    # Parts of K take more, the fewer tiles there are.
    first, second = ((64, 256), (256, 256)) if growing == "rows" else ((64, 640), (64, 1280))
    assert 0 < held(*second) <= held(*first)
