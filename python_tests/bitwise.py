"""Operands and the comparison that the tests of the index-by-index ops share: native against reference, bit for bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bioplaus_kernels.backends import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# Both halves of the key and of the stream are in use, and both numbers are negative as int64.
KEY = torch.tensor([2, 0x8123456789ABCDEF - 2**64, 0xFEDCBA9876543210 - 2**64])

each_device = pytest.mark.parametrize(
    "device", [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=str
)
needs_native = pytest.mark.skipif(native.library is None, reason=f"no native library: {native.reason}")


def special(*size: int) -> Tensor:
    """Normal draws in float64, the first of which are what a sign or a rounding can go wrong at."""
    x = torch.randn(size, dtype=torch.float64)
    # fp32 and fp16 subnormals, a tie of bf16's rounding, one that overflows fp16, and one that rounds to its maximum.
    values = [
        0.0,
        -0.0,
        torch.nan,
        -torch.nan,
        torch.inf,
        -torch.inf,
        1e-45,
        -1e-42,
        6e-8,
        -3e-6,
        1.00390625,
        65520,
        65519,
    ]
    n = min(x.numel() // 2, len(values))
    # Spread, so that some tiles and words hold one and others none.
    x.view(-1)[torch.arange(n) * x.numel() // (n or 1)] = torch.tensor(values[:n], dtype=torch.float64)
    return x


def transposed(*size: int) -> Tensor:
    """Columns first in memory."""
    return special(*size).t().contiguous().t()


def channels_last(*size: int) -> Tensor:
    """As a convolution's weight in channels-last."""
    return special(*size).contiguous(memory_format=torch.channels_last)


def sliced(*size: int) -> Tensor:
    """Neither rows nor columns are adjacent."""
    return special(2 * size[0], 3 * size[1])[::2, ::3]


def expanded(*size: int) -> Tensor:
    """All rows are one."""
    return special(1, *size[1:]).expand(size)


# name: (make, size, why)
LAYOUTS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "one element": (special, (1, 1)),
    "0-dim": (special, ()),
    "1-dim": (special, (70,)),  # columns of 1
    "empty": (special, (4, 0)),
    "one column": (special, (130, 1)),  # rows over two flag tiles
    "one row": (special, (1, 300)),
    "below a call of signs": (special, (3, 127)),
    "a call of signs": (special, (64, 128)),  # a whole tile and no more
    "beyond a call of signs": (special, (65, 129)),
    "several chunks": (special, (2, 2500)),
    "whole pieces": (special, (70, 264)),  # of 16 bytes in every dtype, and rows over two flag tiles
    "convolution": (special, (6, 5, 3, 3)),
    "channels-last": (channels_last, (6, 5, 3, 3)),
    "size-1 dims": (channels_last, (4, 1, 1, 7)),
    "position-major": (special, (2, 3, 4, 3, 3, 5)),  # a locally-connected weight
    "transposed": (transposed, (67, 131)),
    "sliced": (sliced, (5, 200)),
    "expanded": (expanded, (5, 40)),
}


def make(layout: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The operand of a row of LAYOUTS."""
    function, size = LAYOUTS[layout]
    return function(*size).to(device=device, dtype=dtype)  # keeps dense strides


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal shape, strides, dtype and bits, but for the bits of a NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.stride() == expected.stride()
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    bits = BITS[actual.element_size()]
    wrong = (actual.contiguous().view(bits) != expected.contiguous().view(bits)) & ~nan
    assert not wrong.any(), f"at {wrong.nonzero()[:4].tolist()}: {actual[wrong][:4]}, expected {expected[wrong][:4]}"
