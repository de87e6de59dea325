"""lc_forward, lc_backward_input and lc_backward_weight: within test_lc_cpu.py's bound of the reference, in both ways in
which tensor cores may round, and the same bits in every order of threads and blocks."""

import itertools
from collections.abc import Iterator

import pytest
import test_lc_cpu as shapes
import torch
from bitwise import assert_same_bits
from test_feedback_mm import CELLS
from test_lc_cpu import DTYPES, LAYERS, Layer, channels_last, check, feedback_of, products
from test_lc_ops import GEOMETRIES, Geometry

from bioplaus_kernels.backends import reference
from cuda_host import host
from cuda_host.host import ops

# Only half types go through tensor cores.
WAYS = [(dtype, cut) for dtype in DTYPES for cut in ((False, True) if dtype.itemsize == 2 else (False,))]
dtypes = pytest.mark.parametrize(
    ("dtype", "truncating"), WAYS, ids=lambda x: str(x)[6:] if isinstance(x, torch.dtype) else "cut" if x else "nearest"
)


@pytest.fixture(autouse=True)
def rounding(request: pytest.FixtureRequest) -> Iterator[None]:
    """Sets how tensor cores round, where the test says."""
    with host.truncating("truncating" in request.fixturenames and request.getfixturevalue("truncating")):
        yield


def check_products(layer: Layer, n: int, dtype: torch.dtype, bias_per_position: bool = True) -> None:
    x, w, bias, g = layer.tensors(n, dtype)
    bias = bias if bias_per_position else bias[(0,) * len(layer.size)]
    exact = products(reference, layer, x.double(), w.double(), bias.double(), g.double())
    plain = products(reference, layer, x, w, bias, g)
    for form in (lambda t: t, channels_last):
        for a, e, p in zip(products(ops, layer, form(x), w, bias, form(g)), exact, plain, strict=True):
            check(a, e, p)


# Input channels of a group that are whole 16-byte pieces of float32 and float64 alone.
NARROW = Layer((8, 12), (5, 4), (3, 2), (1, 2), (2, 1, 1, 2), (2, 1), 2)


# Channels of a group that are whole 16-byte pieces of every dtype.
WIDE = Layer((48, 16), (4, 3), (3, 2), (1, 2), (2, 1, 1, 2), (2, 1), 2)


def layer_of(geometry: Geometry) -> Layer:
    stride, padding, dilation, groups = geometry.op()
    return Layer(geometry.channels, geometry.size, geometry.kernel, stride, tuple(padding), dilation, groups)


@dtypes
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_geometries(geometry: Geometry, dtype: torch.dtype, truncating: bool) -> None:
    """What the definition's tests go through: size 1, empty batch, padding that fills a window, depthwise, 3-D ..."""
    check_products(layer_of(geometry), geometry.n, dtype, bias_per_position=False)


SIZES = {
    # name: (layer, batch, why)
    "few samples": (NARROW, 8),  # a whole narrow tile
    "more than few": (NARROW, 9),  # and one more
    "two tiles and one": (Layer((65, 129), (2,), (1,), (1,), (0, 0), (1,)), 129),  # rows, columns and samples
    "wide rows": (Layer((8, 24), (3, 3), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)), 5),  # 16-byte loads of every type
    "wide channels": (WIDE, 9),  # 16-byte pieces of every operand, stages that do not end with a tap
    "wide channels, few samples": (WIDE, 3),
    "wide inputs": (Layer((16, 5), (5,), (3,), (1,), (1, 1), (1,)), 5),  # and outputs entry by entry
    "wide outputs": (Layer((5, 16), (5,), (3,), (1,), (1, 1), (1,)), 5),
    "long sum": (Layer((64, 8), (5,), (5,), (1,), (0, 0), (1,)), 3),  # five stages of a half type
    "padding wider than the kernel": (LAYERS["2d padding wider than the kernel"], 3),
}


@dtypes
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: str, dtype: torch.dtype, truncating: bool) -> None:
    layer, n = SIZES[size]
    check_products(layer, n, dtype)


@dtypes
@pytest.mark.parametrize("cell", CELLS)
def test_feedback(cell: str, dtype: torch.dtype, truncating: bool) -> None:
    """B is formed in dY's dtype; the weight's may be another."""
    for layer, n in ((NARROW, 3), (LAYERS["1d ragged"], 9), (WIDE, 2)):
        g, size = layer.tensors(n, dtype)[-1], layer.weight_size()
        rest = (size, layer.size, *layer.op())
        for other in {dtype, torch.float32}:
            feedback = feedback_of(cell, size, other)
            b = reference.feedback_weight(*feedback, size, dtype=dtype)
            exact = reference.lc_backward_input(g.double(), None, None, b.double(), None, "stored", 1.0, *rest)
            plain = reference.lc_backward_input(g, *feedback, *rest)
            check(ops.lc_backward_input(g, *feedback, *rest), exact, plain)


def test_formed_and_stored_feedback_give_the_same_bits() -> None:
    for layer, cell in itertools.product((NARROW, WIDE), CELLS):
        g, size = layer.tensors(3, torch.float32)[-1], layer.weight_size()
        rest = (size, layer.size, *layer.op())
        feedback = feedback_of(cell, size, torch.float32)
        b = ops.feedback_weight(*feedback, size, dtype=torch.float32)
        stored = ops.lc_backward_input(g, None, None, b, None, "stored", 1.0, *rest)
        assert_same_bits(ops.lc_backward_input(g, *feedback, *rest), stored)


def test_strided_operands() -> None:
    """Any strides of the activations, the bias and the feedback."""
    layer = Layer((5, 7), (5, 6), (3, 2), (2, 2), (1, 2, 1, 2), (1, 1))
    x, w, bias, g = layer.tensors(2, torch.float32)
    strided_w, strided_bias = w.movedim(2, -1).contiguous().movedim(-1, 2), bias.mT.contiguous().mT
    every_other = torch.randn(4, 5, 5, 12)[::2, :, :, ::2].copy_(x)
    expected = products(ops, layer, x, w, bias, g)
    changed = products(ops, layer, every_other, strided_w, strided_bias, g.mT.contiguous().mT)
    for a, e in zip(changed, expected, strict=True):
        assert torch.equal(a, e)
    rest = (w.shape, layer.size, *layer.op())
    for extra in ((None, "constant", 0.5), (torch.tensor([1, 2, 3]), "uniform", 0.5)):
        expected_input = ops.lc_backward_input(g, w, None, None, *extra, *rest)
        assert torch.equal(ops.lc_backward_input(g, strided_w, None, None, *extra, *rest), expected_input)


def test_a_non_finite_sample_stays_alone() -> None:
    layer = NARROW
    for dtype in (torch.float32, torch.bfloat16):
        x, w, _, g = layer.tensors(3, dtype)
        bad_x, bad_g = x.clone(), g.clone()
        bad_x[1], bad_g[1] = torch.nan, torch.inf
        clean, dirty = products(ops, layer, x, w, None, g), products(ops, layer, bad_x, w, None, bad_g)
        for c, d in zip(clean[:2], dirty[:2], strict=True):
            assert torch.equal(c[[0, 2]], d[[0, 2]])
        assert not dirty[0][1].isfinite().any()


@pytest.mark.parametrize("channels", [4, 8], ids=["entries", "pieces"])
def test_offsets_beyond_32_bits(channels: int) -> None:
    """Samples 2³¹ elements apart. The memory between them is never touched, so it costs nothing."""
    layer = Layer((channels, channels), (3,), (2,), (1,), (0, 0), (1,))

    def apart(near: torch.Tensor) -> torch.Tensor:
        storage = torch.UntypedStorage(2 * (2**31 + 64))
        strides = (2**31, *near.stride()[1:])
        return torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, near.shape, strides).copy_(near)

    x, w, _, g = layer.tensors(2, torch.bfloat16)
    x, g = channels_last(x), channels_last(g)
    expected = products(ops, layer, x, w, None, g)
    for a, e in zip(products(ops, layer, apart(x), w, None, apart(g)), expected, strict=True):
        assert torch.equal(a, e)


def test_errors_name_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's test, for the CUDA host code."""
    monkeypatch.setattr(shapes, "ops", ops)
    shapes.test_errors_name_the_argument()
