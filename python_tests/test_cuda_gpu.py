"""On hardware, the CUDA kernels by themselves, whatever the automatic choice would take.

The grids of cuda_host/cases_*.py, each in a process of its own; run those files directly under compute-sanitizer.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_host import HERE
from cuda_host.host import moved

import bioplaus_kernels as bk


@pytest.mark.gpu
@pytest.mark.parametrize("cases", ["elementwise", "feedback_mm", "lc"])
def test_cases(cases: str) -> None:
    assert bk.backends.unavailable("cuda") == ""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", str(HERE / f"cases_{cases}.py")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:]


def test_operands_arrive_with_their_strides() -> None:
    base = torch.arange(60.0).view(6, 10)
    for x in (base, base.t(), base[::2, 1::3], base[:1].expand(4, 10), base[2:, 3:].bfloat16()):
        y = moved(x, "cpu")
        assert torch.equal(y, x) and y.stride() == x.stride() and y.storage_offset() == x.storage_offset()
        assert y.data_ptr() != x.data_ptr()
    assert moved("constant", "cpu") == "constant" and moved(None, "cpu") is None
