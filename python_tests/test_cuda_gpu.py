"""On hardware, the CUDA kernels by themselves, whatever the automatic choice would take.

The grids of cuda_host/cases_*.py, each in a process of its own; run those files directly under compute-sanitizer. And
sizes that the host cannot execute.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitwise import KEY, assert_same_bits
from cuda_host import HERE
from cuda_host.cases_feedback_mm import INTEGER_WAYS, mixed, needs_cpu
from cuda_host.host import moved

import bioplaus_kernels as bk


@pytest.mark.gpu
@pytest.mark.parametrize("cases", ["elementwise", "feedback_mm", "lc"])
def test_cases(cases: str) -> None:
    assert bk.backends.unavailable("cuda") == ""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", str(HERE / f"cases_{cases}.py")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.mark.gpu
@needs_cpu
@pytest.mark.parametrize("way", INTEGER_WAYS)
def test_bits_of_a_large_product(way: str) -> None:
    """Rows are cut, of int_mm columns too; the last ones are ragged."""
    m, k, n = 4500, 5003, 8010
    grad, weight = mixed(m, k), torch.randn(k, n)
    weight[::7, ::5] = 0
    args = (weight, None, None, None, "constant", 0.37, n)
    actual = torch.ops.bioplaus.feedback_mm_by(*(moved(x, "cuda") for x in (grad, *args)), way)
    assert_same_bits(actual.cpu(), torch.ops.bioplaus.feedback_mm_by(grad, *args, "digits"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("way", "m", "k", "n", "mebibytes"),
    [("digits", 16384, 4096, 1024, 64), ("int_mm", 16384, 4096, 4096, 256 + 32), ("formed", 64, 8192, 8192, 32)],
)
def test_memory(way: str, m: int, k: int, n: int, mebibytes: int) -> None:
    """All rows at once take 256 MiB of digits and 1024 of sums; B takes 256."""
    args = (torch.randn(m, k, device="cuda"), None, None, None, KEY.cuda(), "constant", 0.37, n, way)
    torch.ops.bioplaus.feedback_mm_by(*args)  # cuBLAS keeps a workspace from its first call on
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = torch.ops.bioplaus.feedback_mm_by(*args)
    held = torch.cuda.max_memory_allocated() - before - result.nbytes
    assert 0 < held <= (mebibytes + 2) * 2**20


def test_operands_arrive_with_their_strides() -> None:
    base = torch.arange(60.0).view(6, 10)
    for x in (base, base.t(), base[::2, 1::3], base[:1].expand(4, 10), base[2:, 3:].bfloat16()):
        y = moved(x, "cpu")
        assert torch.equal(y, x) and y.stride() == x.stride() and y.storage_offset() == x.storage_offset()
        assert y.data_ptr() != x.data_ptr()
    assert moved("constant", "cpu") == "constant" and moved(None, "cpu") is None
