"""Sizes whose products leave 64 bits: an error that names the argument, from the ops and from the reference."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from bioplaus_kernels import ops
from bioplaus_kernels.backends import reference

KEY = torch.tensor([2, 7, 0])
SEEDED = (None, None, None, KEY, "constant", 1.0)
K, M = 2**21, 2**31 - 1
X = torch.ones(1, 1, 2, 2, 2)
ROUND_3 = ([1] * 3, [2**20] * 6, [1] * 3, 1)
ENTRIES = r"expected at most 2\*\*48 entries, got size"

CASES: dict[str, tuple[Callable[[Any], object], str]] = {
    "convolution": (
        lambda m: m.feedback_conv(X, *SEEDED, [1, 1, K, K, K], [1] * 3, [1] * 3, [2**20] * 3, [1] * 3),
        "size: " + ENTRIES,
    ),
    "its input": (
        lambda m: m.feedback_conv(X[:, :0, :1, :1, :1], *SEEDED, [0, 8, 1, 1, 1], [M] * 3, [M] * 3, [0] * 3, [1] * 3),
        "input_size: " + ENTRIES,
    ),
    "locally connected": (
        lambda m: m.lc_backward_input(X, *SEEDED, [2, 2, 2, 1, K, K, K, 1], [2] * 3, *ROUND_3),
        "weight: " + ENTRIES,
    ),
    "several samples": (
        lambda m: m.lc_backward_input(X.expand(8, 1, 2, 2, 2), *SEEDED, [2, 2, 2, 1, K, K, K, 2], [2] * 3, *ROUND_3),
        "weight: " + ENTRIES,
    ),
    "convolution's weight gradient": (
        lambda m: m.conv_backward_weight(X[0], torch.ones(1, 64, 2, 2), [2 * K] * 2, [1] * 2, [K] * 2, [1] * 2),
        "kernel_size: " + ENTRIES,
    ),
    "weight gradient": (
        lambda m: m.lc_backward_weight(X[0], torch.ones(1, 8, 2, 2), [2 * K] * 2, [1] * 2, [K] * 4, [1] * 2, 1),
        "weight: " + ENTRIES,
    ),
    "groups": (
        lambda m: m.lc_forward(torch.ones(1, 0, 3), torch.ones(3, 0, 1, 0), None, [1], [0, 0], [1], 2**62),
        "groups: expected 1 to 2147483647, got 4611686018427387904",
    ),
    "B": (lambda m: m.feedback_weight(*SEEDED, [2**31, 2**31, 4], dtype=torch.float32), "size: " + ENTRIES),
    "product": (lambda m: m.feedback_mm(torch.ones(1, 2), *SEEDED, 2**62), "size: " + ENTRIES),
}  # fmt: skip


@pytest.mark.parametrize("module", [ops, reference], ids=["op", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_no_product_of_sizes_overflows(name: str, module: ModuleType) -> None:
    call, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        call(module)
