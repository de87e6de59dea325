"""The three locally-connected products in Triton: test_lc_ops.py's geometries and contracts, with `use("triton")`."""

from collections.abc import Callable

import pytest
import test_feedback_mm as matrices
import test_lc_ops as contract
import torch
from test_lc_ops import GEOMETRIES, Geometry, geometries
from test_triton import DTYPES, devices, dtypes, in_triton, needs_interpreter  # noqa: F401
from torch import Tensor

from bioplaus_kernels import ops
from bioplaus_kernels.backends import reference
from bioplaus_kernels.backends.reference.lc import memory_format
from bioplaus_kernels.backends.triton import lc

pytestmark = pytest.mark.slow

# Tiles hold 16 samples at least and 64 outputs: beyond one of each, and a sum of several steps and a rest.
TILES = [
    Geometry("more samples than a tile", (3, 4), (4,), (2,), (3,), n=131),
    Geometry("more channels than a tile", (67, 66), (3,), (2,), (2,), n=2),
    Geometry("a sum that wraps the pipeline", (40, 3), (3, 3), (3, 3), (1, 1), n=2),
    Geometry("more channels than a step, of several taps", (3, 40), (4, 3), (2, 2), (3, 2), n=2),
    # A pixel is read by every tap, every second one, or none.
    Geometry("stride and dilation with a common factor", (3, 4), (17, 9), (3, 3), (2, 3), (4, 2), dilation=(6, 2)),
    Geometry("stride and dilation without one", (3, 4), (11,), (3,), (3,), (3,), dilation=(2,)),
]
grid = pytest.mark.parametrize("geometry", [*GEOMETRIES, *TILES], ids=str)


@devices
@dtypes
@grid
def test_error(geometry: Geometry, dtype: torch.dtype, device: str) -> None:
    contract.check_error(geometry, dtype, device)


@devices
@geometries
def test_bias(geometry: Geometry, device: str) -> None:
    x, weight, _ = geometry.tensors(torch.float32, device)
    for size in ((geometry.channels[1],), weight.shape[: len(geometry.out) + 1]):
        bias = torch.randn(size, device=device)
        expected = reference.lc_forward(x, weight, bias, *geometry.op())
        torch.testing.assert_close(ops.lc_forward(x, weight, bias, *geometry.op()), expected)


@devices
@pytest.mark.parametrize("cell", contract.CELLS)
def test_draws_and_signs_are_the_references(cell: str, device: str) -> None:
    # One position that sees one pixel each, and a one-hot output gradient: the result is entries of B.
    size = (3, 2, 37, 1, 1, 5)
    for dtype in DTYPES:
        shaped = [
            t.reshape(size) if isinstance(t, Tensor) and t.is_floating_point() else t
            for t in contract.operands(cell, 3, 2 * 37 * 5, torch.float32, device)
        ]
        b = reference.feedback_weight(*shaped, size, dtype=dtype)
        g = torch.eye(37, device=device, dtype=dtype)[:, :, None, None].expand(37, 37, 3, 2)
        dx = ops.lc_backward_input(g, *shaped, size, (3, 2), (1, 1), (0, 0, 0, 0), (1, 1), 1)
        actual = dx.permute(2, 3, 0, 1).reshape(size)
        if "normal" in cell:
            torch.testing.assert_close(actual, b)
        else:
            assert torch.equal(actual, b)


# Normal draws are close and not equal: the test above compares them.
@devices
@dtypes
@pytest.mark.parametrize("cell", [cell for cell in contract.CELLS if "normal" not in cell])
def test_feedback_of_every_cell(cell: str, dtype: torch.dtype, device: str) -> None:
    if device == "cuda":
        pytest.skip("the contract's operands are made on the CPU; test_draws_and_signs_are_the_references runs there")
    contract.test_feedback_of_every_cell(cell, dtype)


@devices
@geometries
def test_strides(geometry: Geometry, device: str) -> None:
    x, weight, g = geometry.tensors(torch.float32, device)
    expected = contract.products(geometry, x, weight, None, g)

    def spread(t: Tensor) -> Tensor:
        buffer = torch.full((*reversed(t.shape), 2), torch.nan, dtype=t.dtype, device=device)
        buffer[..., 1] = t.permute(*reversed(range(t.dim())))
        return buffer[..., 1].permute(*reversed(range(t.dim())))

    def channels_last(t: Tensor) -> Tensor:
        return t.movedim(1, -1).contiguous().movedim(-1, 1)

    for changed in (
        (spread(x), spread(weight), None, spread(g)),
        (channels_last(x), weight, None, channels_last(g)),
    ):
        for a, e in zip(contract.products(geometry, *changed), expected, strict=True):
            assert torch.equal(a, e)


@devices
@geometries
def test_result_has_the_format_of_the_activation(geometry: Geometry, device: str) -> None:
    x, weight, g = geometry.tensors(torch.float32, device)
    if x.dim() == 3:
        pytest.skip("one dimension has no channels-last")
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    for args in ((x, weight, None, g), (x.to(memory_format=last), weight, None, g.to(memory_format=last))):
        for result, activation in zip(contract.products(geometry, *args), (args[0], args[3]), strict=False):
            assert result.stride() == torch.empty(result.shape, memory_format=memory_format(activation)).stride()


@devices
def test_a_non_finite_sample_stays_alone(device: str) -> None:
    geometry = GEOMETRIES[6]
    x, weight, g = geometry.tensors(torch.float32, device)
    bad_x, bad_g = x.clone(), g.clone()
    bad_x[1], bad_g[1] = torch.nan, torch.inf
    clean = contract.products(geometry, x, weight, None, g)
    dirty = contract.products(geometry, bad_x, weight, None, bad_g)
    for c, d in zip(clean[:2], dirty[:2], strict=True):
        assert torch.equal(c[[0, 2]], d[[0, 2]])
    assert not dirty[0][1].isfinite().any()


@devices
def test_errors_name_the_argument(device: str) -> None:
    geometry = GEOMETRIES[5]
    x, weight, g = geometry.tensors(torch.float32, device)
    with pytest.raises(TypeError, match="input: expected float32, bfloat16 or float16"):
        lc.lc_forward(x.double(), weight.double(), None, *geometry.op())
    with pytest.raises(TypeError, match="weight: expected"):
        ops.lc_forward(x, weight.half(), None, *geometry.op())
    with pytest.raises(ValueError, match="grad_output: expected shape"):
        ops.lc_backward_weight(g[:, :-1, :-1], x, geometry.kernel, *geometry.op())
    with pytest.raises(ValueError, match="feedback: expected weight or magnitude"):
        signs = ops.pack_signs(weight)
        rest = weight.shape, geometry.size, *geometry.op()
        lc.lc_backward_input(g, None, signs, None, None, "constant", 1.0, *rest)
    with pytest.raises(ValueError, match="signs: expected None"):
        ops.lc_backward_input(
            g, weight, ops.pack_signs(weight), None, None, "constant", 1.0, weight.shape, geometry.size, *geometry.op()
        )


# The product dY B of matrices as each op does it: one position that sees one pixel.
AT = ((1,), (0, 0), (1,), 1)
AS_MATRICES: dict[str, Callable[..., Tensor]] = {
    "output": lambda g, b, entries, scale: ops.lc_forward(g[:, :, None], b.t()[None, :, None], None, *AT),
    "grad_input": lambda g, b, entries, scale: ops.lc_backward_input(
        g[:, :, None], *((None, None, b[None, :, None]) if entries == "stored" else (b[None, :, None], None, None)),
        None, entries, scale,
        (1, len(b), 1, b.shape[1]), (1,), *AT
    ),
    "grad_weight": lambda g, b, entries, scale: ops.lc_backward_weight(g.t()[:, :, None], b[:, :, None], (1,), *AT),
}  # fmt: skip


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 by bfloat16 parts, as on devices whose tensor cores make six such products faster than one of FMA."""
    monkeypatch.setattr(lc, "device_limits", lambda device: ((9, 0), 232_448))


@needs_interpreter
@grid
def test_error_by_parts(parts: None, geometry: Geometry) -> None:
    contract.check_error(geometry, torch.float32, "cpu")


@needs_interpreter
@pytest.mark.parametrize("name", AS_MATRICES)
@pytest.mark.parametrize("data", [*matrices.DATA, "small B", "signs"])
def test_parts_of_every_kind_of_rows(
    parts: None, data: Callable[[int, int], Tensor] | str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contract of test_feedback_mm.py; parts not scaled lose half the bits of small rows and of a small B."""
    if data == "signs" and name != "grad_input":
        pytest.skip("only B has signs")

    def by_lc(grad_output: Tensor, *feedback: object) -> Tensor:
        weight, _, magnitude, _, entries, scale, columns = feedback
        b = weight if magnitude is None else magnitude
        return AS_MATRICES[name](grad_output, b, entries, scale).reshape(len(grad_output), columns)

    monkeypatch.setattr(ops, "feedback_mm", by_lc)
    m, k, n = 9, 70, 20
    g = matrices.tiny_rows(m, k) if data == "signs" else (matrices.normal if data == "small B" else data)(m, k)
    b = torch.randn(k, n) * (1e-36 if data == "small B" else 1)
    feedback = (b, None, None, None, "constant", 0.37) if data == "signs" else (None, None, b, None, "stored", 1.0)
    matrices.check(g.float(), feedback, n)


@needs_interpreter
@pytest.mark.parametrize("name", AS_MATRICES)
def test_an_infinity_in_parts_stays_one(parts: None, name: str) -> None:
    g, b = torch.randn(9, 70) * 4, torch.randn(70, 20)
    for x, at, value in ((b, (3, 5), torch.inf), (g, (2, 7), -torch.inf), (b, (6, 1), torch.nan)):
        before = x[at].clone()
        x[at] = value
        expected, found = g @ b, AS_MATRICES[name](g, b, "stored", 1.0).reshape(9, 20)
        special = ~expected.isfinite()
        assert special.any() and torch.equal(found.isfinite(), ~special)
        torch.testing.assert_close(found[special], expected[special], equal_nan=True)
        x[at] = before


@devices
@dtypes
def test_signs_of_special_weights(dtype: torch.dtype, device: str) -> None:
    values = [0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).tiny, -2e-7]
    expected = torch.tensor([0, 0, 0, 0, 1, -1, 1, -1.0]).to(device, dtype) * 0.5
    for of in {dtype, torch.float32}:
        w = torch.tensor(values, dtype=of, device=device)[None, None, None]
        one = torch.ones(1, 1, 1, dtype=dtype, device=device)
        dx = ops.lc_backward_input(one, w, None, None, None, "constant", 0.5, w.shape, (1,), *AT)
        assert torch.equal(dx.flatten(), expected), of
