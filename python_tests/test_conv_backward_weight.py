"""conv_backward_weight: the weight gradient of a convolution, against float64, and its bits."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from test_feedback_conv import SHAPES, needs_library, output_size
from test_pointwise import channels_last
from torch import Tensor

from bioplaus_kernels import ops
from bioplaus_kernels.backends import native, reference

# Samples: fewer pixels than a part of a sum, and several parts.
CASES = [(shape, samples) for shape in SHAPES if max(shape[3]) < 60 for samples in (1, 3)]
HALVES = (torch.bfloat16, torch.float16)
MANY = (64, 40, (3, 3), (7, 6), (1, 1), (1, 1), (1, 1))


def operands(shape: Sequence, samples: int, dtype: torch.dtype = torch.float32) -> tuple:
    out, channels, kernel, size, *geometry = shape
    grad = torch.randn(samples, out, *output_size(shape)).to(dtype)
    x = torch.randn(samples, channels, *size).to(dtype)
    return grad, x, list(kernel), *map(list, geometry)


def strides(x: Tensor) -> list[int]:
    return [step for step, n in zip(x.stride(), x.shape, strict=True) if n > 1]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("shape", "samples"), CASES)
def test_against_float64(shape: Sequence, samples: int, dtype: torch.dtype, last: bool) -> None:
    grad, x, *rest = operands(shape, samples, dtype)
    grad, x = (channels_last(grad), channels_last(x)) if last else (grad, x)
    exact = reference.conv_backward_weight(grad.double(), x.double(), *rest)
    terms = reference.conv_backward_weight(grad.double().abs(), x.double().abs(), *rest)
    found = ops.conv_backward_weight(grad, x, *rest)
    assert found.dtype == dtype
    assert strides(found) == strides(exact) == strides(reference.conv_backward_weight(grad, x, *rest))
    assert ((found - exact).abs() <= 4 * torch.finfo(dtype).eps * terms).all()


@needs_library
@pytest.mark.skipif(native.product_level() in ("", "DEFAULT"), reason="the vendor's")
@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype)[6:])
def test_half_types_are_float32_rounded_once(dtype: torch.dtype) -> None:
    grad, x, *rest = operands(MANY, 3, dtype)
    found = ops.conv_backward_weight(grad, x, *rest)
    assert torch.equal(found, ops.conv_backward_weight(grad.float(), x.float(), *rest).to(dtype))


@needs_library
def test_errors_are_at_most_twice_the_vendors() -> None:
    grad, x, *rest = operands(MANY, 12)
    exact = reference.conv_backward_weight(grad.double(), x.double(), *rest)
    ours, vendors = (m.conv_backward_weight(grad, x, *rest) - exact for m in (ops, reference))
    assert ours.abs().max() <= 2 * vendors.abs().max()


@needs_library
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_the_same_bits_for_any_number_of_threads_and_strides(last: bool, one_thread: None) -> None:
    grad, x, *rest = operands(MANY, 2)
    grad, x = (channels_last(grad), channels_last(x)) if last else (grad, x)
    alone = ops.conv_backward_weight(grad, x, *rest)
    assert torch.equal(ops.conv_backward_weight(grad.transpose(2, 3).contiguous().transpose(2, 3), x, *rest), alone)
    torch.set_num_threads(3)
    assert torch.equal(ops.conv_backward_weight(grad, x, *rest), alone)


def test_many_pixels_are_the_vendors() -> None:
    grad, x, *rest = operands((2, 3, (3, 3), (70, 70), (1, 1), (1, 1), (1, 1)), 1)
    assert torch.equal(ops.conv_backward_weight(grad, x, *rest), reference.conv_backward_weight(grad, x, *rest))


@needs_library
def test_infinities_stay_in_their_channels() -> None:
    grad, x, *rest = operands(MANY, 2)
    grad[0, 3, 2, 2], x[1, 5, 3, 3] = torch.inf, torch.nan
    found = ops.conv_backward_weight(grad, x, *rest).isfinite()
    assert not found[3].any() and not found[:, 5].any()
    found[3] = found[:, 5] = True
    assert found.all()


@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 6), (2, 4, 0)], ids=str)
def test_nothing_to_sum_or_to_write(shape: tuple[int, int, int]) -> None:
    samples, channels, size = shape
    for out, dtype in itertools.product((0, 3), (torch.float32, torch.float64)):
        x, grad = torch.ones(samples, channels, size, dtype=dtype), torch.full((samples, out, size + 2), torch.inf)
        grad = grad.to(dtype)
        for module in (ops, reference):
            found = module.conv_backward_weight(grad, x, [3], [1], [2], [1])
            assert found.shape == (out, channels, 3) and not found.any()
