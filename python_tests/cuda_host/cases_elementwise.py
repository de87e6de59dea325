"""feedback_weight, pack_signs, unpack_signs and redraw_key: the bits of the reference; operands without memory."""

from typing import Any

import pytest
import torch
from bitwise import DTYPES, KEY, LAYOUTS, assert_same_bits, make
from test_feedback_weight import CELLS, MIXTURES, arguments
from test_freed_storage import CALLS, refuses

from bioplaus_kernels.backends import reference
from cuda_host.host import BY_HOST, ops

CPU = torch.device("cpu")
layouts = pytest.mark.parametrize("layout", LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda d: "-".join(str(x)[6:] for x in d))
@layouts
def test_feedback_weight(layout: str, mixture: tuple[torch.dtype, ...]) -> None:
    weight, magnitude = (make(layout, dtype, CPU) for dtype in mixture[:2])
    for sign, entries in CELLS:
        args = arguments(weight, magnitude, sign, entries)
        actual = ops.feedback_weight(*args, dtype=mixture[2])
        expected = reference.feedback_weight(*args, dtype=mixture[2])
        if entries == "normal":
            assert actual.stride() == expected.stride()
            acc = torch.float64 if mixture[2] == torch.float64 else torch.float32
            roundings = 4 * torch.finfo(acc).eps + torch.finfo(mixture[2]).eps
            torch.testing.assert_close(actual, expected, rtol=roundings, atol=roundings, equal_nan=True)
        else:
            assert_same_bits(actual, expected)


@dtypes
@layouts
def test_signs(layout: str, dtype: torch.dtype) -> None:
    weight = make(layout, dtype, CPU)
    packed = reference.pack_signs(weight)
    assert_same_bits(ops.pack_signs(weight), packed)
    assert_same_bits(
        ops.unpack_signs(packed, weight.shape, dtype=dtype), reference.unpack_signs(packed, weight.shape, dtype=dtype)
    )


@dtypes
@layouts
def test_redraw_key(layout: str, dtype: torch.dtype) -> None:
    weight = make(layout, dtype, CPU)
    for key in (KEY, KEY - torch.tensor([1, 0, 0])):
        assert_same_bits(ops.redraw_key(key, weight), reference.redraw_key(key, weight))


@pytest.mark.skipif(not BY_HOST, reason="moving it to a GPU would give it memory")
# Those of torch's operators have no source in csrc/cuda.
@pytest.mark.parametrize(
    "call", [c for c in CALLS if not c[0].startswith(("conv", "recurrent"))], ids=lambda call: call[0]
)
def test_freed_storage(call: tuple[str, tuple[Any, ...], dict[str, Any]]) -> None:
    refuses(getattr(ops, call[0]), *call)


def test_offsets_beyond_32_bits() -> None:
    """Rows 2³⁰ elements apart. The memory between them is never touched, so it costs nothing."""
    far = torch.UntypedStorage(2 * (2 * 2**30 + 64))
    weight = torch.empty(0, dtype=torch.bfloat16).set_(far, 0, (3, 64), (2**30, 1))
    weight.copy_(torch.randn(3, 64))
    near = weight.clone(memory_format=torch.contiguous_format)
    assert_same_bits(ops.pack_signs(weight), reference.pack_signs(near))
    assert_same_bits(ops.pack_signs(weight[:, 1:]), reference.pack_signs(near[:, 1:]))
    assert_same_bits(ops.redraw_key(KEY, weight), reference.redraw_key(KEY, near))
    for entries in ("constant", "uniform"):
        args = arguments(weight, near, "weight", entries)
        actual = torch.empty(3, 64).copy_(ops.feedback_weight(*args, dtype=torch.float32))
        assert_same_bits(
            actual, reference.feedback_weight(*arguments(near, near, "weight", entries), dtype=torch.float32)
        )
