"""What is pointwise in an LSTM's step, the CPU's one pass: its errors, what is not finite, every level's bits."""

import hashlib
import os

import fresh
import pytest
import torch
from torch import Tensor

from bioplaus_kernels import ops
from bioplaus_kernels.backends import native, reference

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(native.library is None, reason="no native library"),
]


def gates_of(x: Tensor, cell: float = 0.0) -> tuple[Tensor, Tensor]:
    """Gates (n, 4) and outputs (n) of one step in which every sum is x."""
    n = len(x)
    sums, state = x.expand(4, n).t().reshape(1, n, 4), x.new_full((n, 1), cell)
    output, _, _, gates, _ = ops.recurrent_forward(
        sums, torch.zeros_like(state), state, x.new_zeros(4, 1), None, None, None, "LSTM", False
    )
    return gates[0, :, :, 0], output[0, :, 0]


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_of_a_few_roundings(dtype: torch.dtype) -> None:
    scales = torch.tensor([1e-20, 1e-4, 0.01, 0.3, 1, 4, 20], dtype=dtype)
    x = (torch.randn(len(scales), 4096, dtype=dtype) * scales[:, None]).flatten()
    gates, _ = gates_of(x)
    exact, info = x.double(), torch.finfo(dtype)
    # Half types are rounded once, below their normal numbers to a multiple of the smallest.
    half = dtype.itemsize == 2
    roundings, least = (0.51 * info.eps, info.smallest_normal * info.eps) if half else (4 * info.eps, 0.0)
    for k, e in enumerate((exact.sigmoid(), exact.sigmoid(), exact.tanh(), exact.sigmoid())):
        assert (((gates[:, k].double() - e).abs() < roundings * e.abs() + least) | (gates[:, k] == e)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_and_what_is_not_finite(dtype: torch.dtype) -> None:
    inf = float("inf")
    x = torch.tensor([inf, -inf, 1e4, -1e4, 0.0, float("nan")], dtype=dtype)
    gates, output = gates_of(x)
    assert torch.equal(gates[:5, 0], torch.tensor([1, 0, 1, 0, 0.5], dtype=dtype))
    assert torch.equal(gates[:5, 2], torch.tensor([1, -1, 1, -1, 0], dtype=dtype))
    assert gates[5].isnan().all() and output[5].isnan() and output[:5].isfinite().all()
    assert gates_of(x[:1], inf)[1] == 1


PROGRAM = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[2])
import test_lstm_cpu
from bioplaus_kernels.backends import native
assert native.library.active_cpu_level() == sys.argv[1], native.library.active_cpu_level()
print(test_lstm_cpu.bits())
"""


def bits() -> str:
    """Of all that both passes make, of sums that need no product."""
    found = hashlib.sha256()
    for dtype in DTYPES:
        x = (torch.arange(3 * 4 * 37) * 89 % 97 / 16 - 3).to(dtype).view(1, 3, 4 * 37)
        h, c = x[0, :, :37].clone(), x[0, :, 37:74].clone()
        w = x.new_zeros(4 * 37, 37)
        output, _, _, gates, cells = ops.recurrent_forward(x, h, c, w, None, None, None, "LSTM", False)
        grads = ops.recurrent_backward(
            *(output + 1, h, c, output, gates, cells, h, c, None, None, None, "LSTM", False, [False] * 3)
        )
        for t in (output, gates, cells, *grads[:3]):
            found.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def test_every_level_has_the_same_bits() -> None:
    here, levels = os.path.dirname(__file__), native.library.build_config()["cpu_levels"]
    for level in levels[: levels.index(native.library.active_cpu_level())]:
        environment = os.environ | {"ATEN_CPU_CAPABILITY": level.lower()}
        result = fresh.run(PROGRAM, level, here, environment=environment)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == bits()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_reference(dtype: torch.dtype) -> None:
    """One pass in float32, ATen's operators in bfloat16."""
    x, h, c, w = (torch.randn(size, dtype=dtype) for size in ((5, 4, 28), (4, 7), (4, 7), (28, 7)))
    forward = (x, h, c, w, None, None, None, "LSTM", True)
    found, wanted = ops.recurrent_forward(*forward), reference.recurrent_forward(*forward)
    backward = (*(torch.randn_like(t) for t in (wanted[0], h, c)), wanted[0], wanted[3], wanted[4], h, c, w)
    rest = (None, None, "LSTM", True, [True, True, False])
    found += ops.recurrent_backward(*backward, *rest)
    wanted += reference.recurrent_backward(*backward, *rest)
    for a, e in zip(found, wanted, strict=True):
        bound = 1e-5 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(a, e, rtol=bound, atol=bound * float(e.abs().max()) if e.numel() else 0)
