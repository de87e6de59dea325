"""The three locally-connected ops, whichever backend serves them, against the definitions of `oracle.py` in float64."""

from dataclasses import dataclass

import pytest
import torch
from oracle import assert_same, locally_connected, locally_connected_transpose
from test_feedback_mm import CELLS, operands
from torch import Tensor

from bioplaus_kernels import ops
from bioplaus_kernels.backends import native, reference

pytestmark = pytest.mark.usefixtures("one_thread")

# float64 is held to the definition itself, these to torch's own error against it.
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@dataclass(frozen=True)
class Geometry:
    """Sizes of a locally-connected product; `out` is written out so that no formula decides it."""

    reason: str
    channels: tuple[int, int]
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    out: tuple[int, ...]
    stride: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    n: int = 3

    def __str__(self) -> str:
        return f"{len(self.size)}d {self.reason}".replace(" ", "_")

    def definition(self) -> tuple:
        """Stride, pairs, dilation, groups, as the definition takes them."""
        d = len(self.size)
        return self.stride or (1,) * d, self.pairs or ((0, 0),) * d, self.dilation or (1,) * d, self.groups

    def op(self) -> tuple:
        """The same as the ops take them."""
        stride, pairs, dilation, groups = self.definition()
        return stride, [p for pair in pairs for p in pair], dilation, groups

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Input, weight and output gradient."""
        c, o = self.channels
        shapes = ((self.n, c, *self.size), (*self.out, o, *self.kernel, c // self.groups), (self.n, o, *self.out))
        return tuple(torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes)


GEOMETRIES = [
    Geometry("plain", (3, 4), (7,), (3,), (5,)),
    Geometry("stride leaves a pixel unread", (3, 4), (9,), (2,), (3,), stride=(3,)),
    Geometry("asymmetric pairs", (2, 4), (5,), (3,), (6,), pairs=((2, 1),)),
    Geometry("padding alone fills a window", (2, 4), (2,), (2,), (5,), pairs=((2, 2),)),
    Geometry("dilation and groups", (4, 6), (8,), (3,), (4,), dilation=(2,), groups=2),
    Geometry("plain", (3, 4), (5, 4), (3, 2), (3, 3)),
    Geometry("everything", (4, 6), (7, 6), (2, 3), (3, 2), (2, 3), ((1, 0), (0, 2)), (2, 1), 2),
    Geometry("depthwise", (4, 8), (4, 4), (2, 2), (3, 3), groups=4),
    Geometry("one position", (3, 4), (3, 3), (3, 3), (1, 1), n=1),
    Geometry("pointwise", (3, 4), (3, 2), (1, 1), (3, 2)),
    Geometry("wide channels", (33, 17), (3, 3), (2, 2), (2, 2)),
    Geometry("size 1", (1, 1), (1, 1), (1, 1), (1, 1), n=1),
    Geometry("plain", (2, 3), (3, 3, 3), (2, 2, 2), (2, 2, 2)),
    Geometry("everything", (4, 2), (4, 3, 4), (2, 1, 2), (3, 2, 3), (2, 2, 1), ((1, 1), (0, 0), (0, 1)), (1, 1, 2), 2),
    Geometry("empty batch", (3, 4), (5, 4), (3, 2), (3, 3), n=0),
]
geometries = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


def definitions(geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, g: Tensor) -> list[Tensor]:
    """Output, input gradient and weight gradient by the definition, in the dtype of what is given."""
    leaf = weight.detach().requires_grad_()
    y = locally_connected(x, leaf, bias, *geometry.definition())
    (grad_weight,) = torch.autograd.grad(y, leaf, g)
    return [
        y.detach(),
        locally_connected_transpose(g, weight, None, geometry.size, *geometry.definition()),
        grad_weight,
    ]


def products(geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, g: Tensor) -> list[Tensor]:
    """The same by the three ops."""
    stored = (None, None, weight, None, "stored", 1.0)
    return [
        ops.lc_forward(x, weight, bias, *geometry.op()),
        ops.lc_backward_input(g, *stored, weight.shape, geometry.size, *geometry.op()),
        ops.lc_backward_weight(g, x, geometry.kernel, *geometry.op()),
    ]


@geometries
def test_against_the_definition(geometry: Geometry) -> None:
    x, weight, g = geometry.tensors(torch.float64)
    for bias in (
        None,
        torch.randn(geometry.channels[1]).double(),
        torch.randn(weight.shape[: len(geometry.out) + 1]).double(),
    ):
        actual, expected = products(geometry, x, weight, bias, g), definitions(geometry, x, weight, bias, g)
        for name, a, e in zip(("output", "grad_input", "grad_weight"), actual, expected, strict=True):
            assert_same(a, e, name)


def allowed_error(exact: list[Tensor], torchs: list[Tensor]) -> Tensor:
    """Twice the largest error of torch in several draws of a result, as one of a few entries may be right by luck, and
    one rounding of the first."""
    largest = max((t.double() - e).abs().max() for e, t in zip(exact, torchs, strict=True))
    return 2 * largest + torch.finfo(torchs[0].dtype).eps / 2 * exact[0].abs().max()


def check_error(geometry: Geometry, dtype: torch.dtype, device: str) -> None:
    """At most twice the error torch's own convolutions make in that dtype, plus one rounding."""
    draws = []
    for _ in range(8):
        x, weight, g = geometry.tensors(dtype, device)
        draws.append((x, weight, torch.randn(geometry.channels[1], device=device).to(dtype), g))
    exact = [definitions(geometry, *(t.double() for t in draw)) for draw in draws]
    torchs, ours = [definitions(geometry, *draw) for draw in draws], products(geometry, *draws[0])
    names = ("output", "grad_input", "grad_weight")
    for name, e, t, o in zip(names, zip(*exact, strict=True), zip(*torchs, strict=True), ours, strict=True):
        assert o.dtype == dtype and o.shape == e[0].shape, name
        if o.numel():
            assert (o.double() - e[0]).abs().max() <= allowed_error(e, t), name


@dtypes
@geometries
def test_error(geometry: Geometry, dtype: torch.dtype) -> None:
    check_error(geometry, dtype, "cpu")


@pytest.mark.gpu
@geometries
def test_error_on_cuda(geometry: Geometry) -> None:
    for dtype in DTYPES:
        check_error(geometry, dtype, "cuda")


@dtypes
@pytest.mark.parametrize("cell", CELLS)
def test_feedback_of_every_cell(cell: str, dtype: torch.dtype) -> None:
    geometry = GEOMETRIES[6]
    _, weight, g = geometry.tensors(torch.float32)
    rows, columns = weight.shape[0], weight[0].numel()
    shaped = [
        t.reshape(weight.shape) if isinstance(t, Tensor) and t.is_floating_point() else t
        for t in operands(cell, rows, columns, torch.float32)
    ]
    # Normal draws of two backends are close, not equal; test_feedback_weight compares them.
    form = ops if "normal" in cell else reference
    b = form.feedback_weight(*shaped, weight.shape, dtype=dtype)
    draws = [g.to(dtype), *(torch.randn_like(g).to(dtype) for _ in range(7))]
    actual = ops.lc_backward_input(draws[0], *shaped, weight.shape, geometry.size, *geometry.op())

    def transposed(dtype: torch.dtype) -> list[Tensor]:
        return [
            locally_connected_transpose(d.to(dtype), b.to(dtype), None, geometry.size, *geometry.definition())
            for d in draws
        ]

    exact = transposed(torch.float64)
    assert actual.dtype == dtype
    assert (actual.double() - exact[0]).abs().max() <= allowed_error(exact, transposed(dtype))


@geometries
def test_strides(geometry: Geometry) -> None:
    x, weight, g = geometry.tensors(torch.float64)
    expected = products(geometry, x, weight, None, g)

    def spread(t: Tensor) -> Tensor:
        buffer = torch.full((*reversed(t.shape), 2), torch.nan, dtype=t.dtype)
        buffer[..., 1] = t.permute(*reversed(range(t.dim())))
        return buffer[..., 1].permute(*reversed(range(t.dim())))

    def channels_last(t: Tensor) -> Tensor:
        return t.movedim(1, -1).contiguous().movedim(-1, 1)

    for changed in (
        (spread(x), spread(weight), None, spread(g)),
        (channels_last(x), weight, None, channels_last(g)),
        (x, weight, None, channels_last(g)),
    ):
        for a, e in zip(products(geometry, *changed), expected, strict=True):
            assert_same(a, e)
    ones = torch.ones((), dtype=torch.float64)
    expanded = products(geometry, ones.expand_as(x), ones.expand_as(weight), None, ones.expand_as(g))
    dense = products(geometry, *(torch.ones_like(t) for t in (x, weight)), None, torch.ones_like(g))
    for a, e in zip(expanded, dense, strict=True):
        assert_same(a, e)


@geometries
def test_products_are_adjoint(geometry: Geometry) -> None:
    # <g, f(x, W)> is linear in x and in W: the other two products are its gradients.
    x, weight, g = geometry.tensors(torch.float64)
    y, grad_input, grad_weight = products(geometry, x, weight, None, g)
    inner = (g * y).sum()
    torch.testing.assert_close((x * grad_input).sum(), inner, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close((weight * grad_weight).sum(), inner, rtol=1e-12, atol=1e-11)


def test_a_non_finite_sample_stays_alone() -> None:
    geometry = GEOMETRIES[6]
    x, weight, g = geometry.tensors(torch.float32)
    bad_x, bad_g = x.clone(), g.clone()
    bad_x[1], bad_g[1] = torch.nan, torch.inf
    clean, dirty = products(geometry, x, weight, None, g), products(geometry, bad_x, weight, None, bad_g)
    for c, d in zip(clean[:2], dirty[:2], strict=True):
        assert torch.equal(c[[0, 2]], d[[0, 2]])
    assert not dirty[0][1].isfinite().any()


@pytest.mark.parametrize("samples", [1, 3, 40])
def test_no_channels(samples: int) -> None:
    for c, o in ((3, 0), (0, 3)):
        x, w = torch.randn(samples, c, 5, 5), torch.randn(3, 3, o, 3, 3, c)
        geometry = (1, 1), (0, 0, 0, 0), (1, 1), 1
        y = ops.lc_forward(x, w, None, *geometry)
        assert torch.equal(y, torch.zeros(samples, o, 3, 3))
        dx = ops.lc_backward_input(y, w, None, None, None, "constant", 1.0, w.shape, (5, 5), *geometry)
        assert torch.equal(dx, torch.zeros_like(x))
        assert torch.equal(ops.lc_backward_weight(y, x, (3, 3), *geometry), torch.zeros_like(w))


def test_padding_is_zero_whatever_the_weights() -> None:
    # Weights that only ever meet padding change nothing, and have no gradient.
    geometry = GEOMETRIES[3]
    x, weight, g = geometry.tensors(torch.float64)
    before = products(geometry, x, weight, None, g)
    assert torch.equal(before[2][0], torch.zeros_like(before[2][0]))
    changed = weight.clone()
    changed[0] = 1e300
    for a, e in zip(products(geometry, x, changed, None, g), before, strict=True):
        assert torch.equal(a, e)


@pytest.mark.skipif(native.library is None, reason="the ops are plain functions without the native library")
@pytest.mark.parametrize("geometry", [GEOMETRIES[i] for i in (4, 6, 12, 14)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_opcheck(geometry: Geometry, dtype: torch.dtype) -> None:
    x, weight, g = geometry.tensors(dtype)
    bias = torch.randn(weight.shape[: len(geometry.out) + 1]).to(dtype)
    library, signs = torch.ops.bioplaus, ops.pack_signs(weight)
    stride, padding, dilation, groups = (list(v) if isinstance(v, tuple) else v for v in geometry.op())
    rest = (stride, padding, dilation, groups)
    torch.library.opcheck(library.lc_forward.default, (x, weight, bias, *rest))
    torch.library.opcheck(library.lc_backward_weight.default, (g, x, list(geometry.kernel), *rest))
    sizes = (list(weight.shape), list(geometry.size))
    for feedback in (
        (weight, None, None, None, "constant", 0.5),
        (None, signs, None, None, "constant", 0.5),
        (None, None, weight, None, "stored", 1.0),
    ):
        torch.library.opcheck(library.lc_backward_input.default, (g, *feedback, *sizes, *rest))
