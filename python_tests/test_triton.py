"""The Triton kernels, in Triton's interpreter with every access checked, or on hardware (`-m gpu`).

The contracts are those of test_feedback_mm.py, run with `use("triton")`. Other tests of the same kernels:
test_triton_lc.py, test_triton_static.py, test_triton_launch.py.
"""

import importlib.util
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import bioplaus_kernels as bk
from bioplaus_kernels import ops
from bioplaus_kernels.backends import reference

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
import test_feedback_mm as contract  # noqa: E402
from interpreter import OutOfBounds, checked  # noqa: E402

from bioplaus_kernels.backends.triton import feedback_mm, launch, lc  # noqa: E402

pytestmark = pytest.mark.slow
interpreted = bk.backends.interpreted()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not interpreted, reason="TRITON_INTERPRET is not set")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
devices = pytest.mark.parametrize("device", DEVICES)
needs_interpreter = pytest.mark.skipif(not interpreted, reason="TRITON_INTERPRET is not set")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def in_triton(one_thread: None) -> Iterator[None]:
    """Every op by Triton, and checked where it is interpreted."""
    with bk.backends.use("triton"):
        if interpreted:
            with checked():
                yield
        else:
            yield


@triton.jit
def _copy(x, y, count, shift, MASKED: tl.constexpr):
    i = tl.arange(0, 16)
    mask = i < count if MASKED else i < 16
    tl.store(y + i, tl.load(x + i + shift, mask=mask), mask=mask)


@needs_interpreter
def test_the_hook_catches_out_of_bounds() -> None:
    # A neighbour in memory, so that nothing else notices.
    memory = torch.arange(64.0)
    for shift, masked, short in ((0, False, 13), (1, True, 13), (-1, True, 13)):
        x, y = memory[:short].clone(), torch.zeros(16)
        with pytest.raises(Exception, match="load of 4 bytes"):
            _copy[(1,)](x, y, 13, shift, MASKED=masked)
    with pytest.raises(Exception, match="store of 4 bytes"):
        _copy[(1,)](memory.clone(), torch.zeros(15), 16, 0, MASKED=True)
    x, y = memory[:13].clone(), torch.zeros(13)
    _copy[(1,)](x, y, 13, 0, MASKED=True)
    assert torch.equal(x, y)
    assert issubclass(OutOfBounds, Exception)


@triton.jit
def _half(x, y, z, DOT: tl.constexpr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    a = tl.load(x + at)
    if DOT:
        tl.store(z + at, tl.dot(a, tl.load(y + at)))
    else:
        tl.store(y + at, (a.to(tl.float32) * 1.01).to(y.dtype.element_ty))


@triton.jit
def _wrong(x, y):
    i = tl.arange(0, 16)
    tl.store(y + i, tl.load(x + i) + tl.load(y + i))


@needs_interpreter
def test_the_interpreter_rounds_bf16_as_hardware_does() -> None:
    x, y, z = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.zeros(16, 16)
    _half[(1,)](x, y, z, DOT=True)
    torch.testing.assert_close(z, x.float() @ y.float())
    _half[(1,)](x, y, z, DOT=False)
    assert torch.equal(y, (x.float() * 1.01).bfloat16())
    with pytest.raises(Exception, match="arithmetic in bf16"):
        _wrong[(1,)](x, y)


# M, K, N and the reason.
SHAPES = {
    "one of everything": (1, 1, 1),
    "primes": (7, 131, 61),
    "a tile, a call of the generator, a flag": (16, 64, 128),
    "one beyond each": (17, 65, 129),
    "two tiles and one in both directions": (131, 40, 257),
    "more tiles along K than stages, and a rest": (3, 64 * 6 + 5, 33),
    "more row tiles than a group holds": (16 * 9 * 4 + 1, 33, 130),
    "columns of less than a word": (5, 300, 3),
    "parts of K, uneven and ragged": (3, 800, 33),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


SIGNS = ["weight constant", "signs constant", "none constant"]


@devices
@dtypes
@shapes
@pytest.mark.parametrize("cell", SIGNS)
def test_signs_are_one_operand_whatever_they_come_from(
    cell: str, shape: tuple, dtype: torch.dtype, device: str
) -> None:
    """The same bits as from a weight that has these signs, run for run, and within the contract."""
    m, k, n = shape
    if m > 200 and cell != "signs constant":
        pytest.skip("many rows, which are the same for every source of signs")
    feedback = contract.operands(cell, k, n, dtype, device)
    signs = reference.feedback_weight(*feedback[:5], 1.0, (k, n), dtype=dtype)
    for data in (contract.normal, contract.log_normal):
        g = contract.grad(data, m, k, dtype).to(device)
        contract.check(g, feedback, n)
        actual = ops.feedback_mm(g, *feedback, n)
        assert torch.equal(actual, ops.feedback_mm(g, *feedback, n))
        assert torch.equal(actual, ops.feedback_mm(g, signs, None, None, None, "constant", feedback[5], n))


@devices
@dtypes
@pytest.mark.parametrize("cell", SIGNS)
def test_error(cell: str, dtype: torch.dtype, device: str) -> None:
    for m, k, n in ((9, 70, 45), (20, 131, 150)):
        feedback = contract.operands(cell, k, n, dtype, device)
        for data in contract.DATA if m == 9 else contract.DATA[:1]:
            contract.check(contract.grad(data, m, k, dtype).to(device), feedback, n)


@devices
@dtypes
def test_a_product_with_the_identity_is_b(dtype: torch.dtype, device: str) -> None:
    k, n = 67, 131
    for cell in SIGNS:
        feedback = contract.operands(cell, k, n, dtype, device)
        b = reference.feedback_weight(*feedback, (k, n), dtype=dtype)
        assert torch.equal(ops.feedback_mm(torch.eye(k, device=device, dtype=dtype), *feedback, n), b), cell


@devices
@dtypes
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_non_finite_rows(value: float, dtype: torch.dtype, device: str) -> None:
    k, n = 66, 40
    for cell in SIGNS:
        feedback = contract.operands(cell, k, n, dtype, device)
        clean = contract.normal(11, k).to(device, dtype)
        dirty = clean.clone()
        dirty[4, 17] = value
        dirty[6, 1], dirty[6, 40] = value, -value
        dirty[7, 1], dirty[7, 40] = value, value
        for scale in (0.5, -0.5):
            arguments = (*feedback[:5], scale)
            expected, actual = (ops.feedback_mm(g, *arguments, n) for g in (clean, dirty))
            torchs = dirty @ contract.matrix(arguments, k, n, dtype)
            for row in range(11):
                if row in (4, 6, 7):
                    assert not actual[row].isfinite().any()
                    assert torch.equal(actual[row].nan_to_num(0.5), torchs[row].nan_to_num(0.5)), (cell, row)
                else:
                    assert torch.equal(actual[row], expected[row]), (cell, row)


@devices
def test_the_largest_numbers(device: str) -> None:
    # In parts, float32's largest numbers are no infinities, though bfloat16 would round them to some.
    g = torch.tensor([torch.finfo(torch.float32).max, 3.392e38, -3.4e38, 3.389e38], device=device).diag()
    w = torch.randn(4, 5, device=device)
    result = ops.feedback_mm(g, w, None, None, None, "constant", 0.5, 5)
    torch.testing.assert_close(result, (g @ w.sign()) * 0.5, rtol=2**-22, atol=0)


@devices
def test_named_arguments(device: str) -> None:
    g, w = torch.randn(3, 4, device=device), torch.randn(4, 5, device=device)
    expected = ops.feedback_mm(g, w, None, None, None, "constant", 1.0, 5)
    named = {"weight": w, "signs": None, "magnitude": None, "key": None, "entries": "constant", "scale": 1.0}
    assert torch.equal(ops.feedback_mm(g, **named, in_features=5), expected)


@devices
def test_strides(device: str) -> None:
    k, n = 40, 34
    for cell in SIGNS:
        feedback = contract.operands(cell, k, n, torch.float32, device)
        dense = contract.normal(12, k).float().to(device)
        expected = ops.feedback_mm(dense, *feedback, n)
        spread = torch.full((k, 12, 2), math.nan, device=device)
        spread[..., 1] = dense.t()
        torch.testing.assert_close(ops.feedback_mm(spread[..., 1].t(), *feedback, n), expected)
        one = dense[:1].expand(12, k)
        torch.testing.assert_close(ops.feedback_mm(one, *feedback, n), expected[:1].expand(12, n))
        moved = tuple(
            t.t().contiguous().t() if isinstance(t, Tensor) and t.is_floating_point() else t for t in feedback
        )
        torch.testing.assert_close(ops.feedback_mm(dense, *moved, n), expected)


@devices
@pytest.mark.parametrize("parameters", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_parameters_of_another_dtype(parameters: torch.dtype, device: str) -> None:
    for cell, dtype in itertools.product(SIGNS, (torch.bfloat16, torch.float32)):
        feedback = contract.operands(cell, 70, 45, parameters, device)
        contract.check(contract.normal(9, 70).to(device, dtype), feedback, 45)


@devices
@dtypes
def test_empty(dtype: torch.dtype, device: str) -> None:
    for cell, (m, k, n) in itertools.product(SIGNS, ((0, 5, 3), (4, 5, 0), (4, 0, 3), (0, 0, 0))):
        feedback = contract.operands(cell, k, n, dtype, device)
        result = ops.feedback_mm(torch.ones(m, k, dtype=dtype, device=device), *feedback, n)
        assert torch.equal(result, torch.zeros(m, n, dtype=dtype, device=device))


@devices
def test_zero_weight_gives_zero_feedback(device: str) -> None:
    weight = torch.randn(66, 40, device=device)
    weight[:, 2] = 0
    weight[3] = -0.0
    eye = torch.eye(66, device=device)
    for signs in ((weight, None), (None, ops.pack_signs(weight))):
        result = ops.feedback_mm(eye, *signs, None, None, "constant", 0.25, 40)
        assert torch.equal(result, 0.25 * weight.sign())


def test_errors_name_the_argument() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g, w = torch.ones(3, 4, device=device), torch.ones(4, 5, device=device)
    with pytest.raises(TypeError, match="grad_output: expected float32, bfloat16 or float16"):
        feedback_mm.feedback_mm(g.double(), w, None, None, None, "constant", 1.0, 5)
    with pytest.raises(ValueError, match="entries: expected 'constant'"):
        feedback_mm.feedback_mm(g, None, None, w, None, "stored", 1.0, 5)
    with pytest.raises(ValueError, match="weight: expected shape"):
        ops.feedback_mm(g, w.t(), None, None, None, "constant", 1.0, 5)
    with pytest.raises(ValueError, match="in_features"):
        ops.feedback_mm(g, w, None, None, None, "constant", 1.0, -1)


@devices
def test_what_has_no_kernel_goes_to_the_devices_own(device: str) -> None:
    g = torch.randn(3, 6, device=device)
    for cell in ("weight uniform", "none stored", "none uniform"):
        feedback = contract.operands(cell, 6, 5, torch.float32, device)
        contract.check(g, feedback, 5)
    contract.check(g.double(), contract.operands("weight constant", 6, 5, torch.float64, device), 5)


def test_parts_of_the_sum() -> None:
    """Parts where tiles are few and the sum is long, each of a program's worth."""
    assert feedback_mm.parts_of(1, 4096, 4096) == 8  # 32 tiles
    assert feedback_mm.parts_of(1, 128, 10**6) == 256
    assert feedback_mm.parts_of(1, 128, 511) == 1
    assert feedback_mm.parts_of(4096, 4096, 10**6) == 1
    assert feedback_mm.parts_of(512, 1024, 4096) == 16  # 2 x 8 tiles


@devices
@dtypes
def test_parts_give_one_launch_its_result(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    k, n = 800, 130
    g = contract.normal(5, k).to(device, dtype)
    g[1, 7], g[1, 700] = math.inf, math.inf
    g[2, 7], g[2, 700] = math.inf, -math.inf
    launched = []
    monkeypatch.setattr(feedback_mm, "launch", lambda *a: launched.append(a[0]) or launch.launch(*a))
    for cell in ("weight constant", "signs constant", "none constant"):
        feedback = contract.operands(cell, k, n, dtype, device)
        launched.clear()
        actual = ops.feedback_mm(g, *feedback, n)
        assert launched == [feedback_mm.sign_kernel, feedback_mm.add_kernel]
        with monkeypatch.context() as patch:
            patch.setattr(feedback_mm, "parts_of", lambda *_: 1)
            feedback_mm._plan.cache_clear()
            expected = ops.feedback_mm(g, *feedback, n)
        feedback_mm._plan.cache_clear()
        assert launched[2:] == [feedback_mm.sign_kernel]
        contract.check(g[[0, 3, 4]], feedback, n)
        assert not actual[[1, 2]].isfinite().any()
        torch.testing.assert_close(actual, expected, equal_nan=True)


def apart(near: Tensor, step: int = 2**30) -> Tensor:
    """The same values in rows so many elements apart. The memory between them is never touched, so it costs nothing."""
    storage = torch.UntypedStorage(near.element_size() * ((len(near) - 1) * step + near[0].numel()))
    return torch.empty(0, dtype=near.dtype).set_(storage, 0, near.shape, (step, *near.stride()[1:])).copy_(near)


@needs_interpreter
def test_strides_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    near = torch.randn(3, 40).half()
    feedback = contract.operands("none constant", 40, 34, torch.float16)
    assert torch.equal(ops.feedback_mm(apart(near), *feedback, 34), ops.feedback_mm(near, *feedback, 34))
    weight, *rest = contract.operands("weight constant", 3, 34, torch.float16)
    expected = ops.feedback_mm(near[:, :3], weight, *rest, 34)
    far = apart(weight)
    assert torch.equal(ops.feedback_mm(near[:, :3], far, *rest, 34), expected)
    # Where they are computed in 32 bits, each of them is noticed.
    plan = feedback_mm._plan
    monkeypatch.setattr(feedback_mm, "_plan", lambda *a: (plan(*a)[0], plan(*a)[1] | {"WIDE": False}))
    with pytest.raises(Exception, match="load of 2 bytes"):
        ops.feedback_mm(near[:, :3], far, *rest, 34)
    with pytest.raises(Exception, match="load of 2 bytes"):
        ops.feedback_mm(apart(near), *feedback, 34)


def in_32_bits(folder: Path) -> ModuleType:
    """backends/triton/lc.py with a bug planted: places that are 64 bits wide cut to 32."""
    text = Path(lc.__file__).read_text()
    assert text.count("tl.int64") > 5
    path = folder / "lc_in_32_bits.py"
    # Its functions alone: the ops are there already.
    path.write_text(re.sub(r"@product.*\n", "", text.replace("tl.int64", "tl.int32")))
    spec = importlib.util.spec_from_file_location(f"{lc.__package__}.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_interpreter
def test_locally_connected_places_beyond_32_bits(tmp_path: Path) -> None:
    """Three samples of 2^30 pixels each, of which two are read: the last sample's lie beyond 2^31."""
    pixels, step = 2**30, 2**29
    near, g, w = torch.randn(3, 1, 2).half(), torch.randn(3, 1, 2).half(), torch.randn(2, 1, 1, 1).half()
    rest = ((0, 0), (1,), 1)
    far = torch.empty(0, dtype=torch.float16).set_(torch.UntypedStorage(2 * 3 * pixels), 0, (3, 1, pixels))
    far[..., ::step] = near
    expected_y = lc.lc_forward(near, w, None, (1,), *rest)
    expected_w = lc.lc_backward_weight(g, near, (1,), (1,), *rest)
    expected_x = lc.lc_backward_input(g, None, None, w, None, "stored", 1.0, w.shape, (2,), (1,), *rest)[..., 0]
    gradient = torch.empty(0, dtype=torch.float16).set_(torch.UntypedStorage(2 * 3 * pixels), 0, (3, 1, pixels))

    def first_pixel(module: ModuleType) -> Tensor:
        # The launch of lc_backward_input, but for one pixel.
        _, sizes, places = lc._geometry(w.shape, (pixels,), (step,), (0, 0), (1,), 1)
        module.backward_input_kernel[(1,)](
            g.movedim(1, -1).contiguous(), None, w, gradient, 1.0, 3, *sizes, *places,
            WGMMA=False, BM=16, BN=64, BK=32
        )  # fmt: skip
        return gradient[..., 0]

    assert torch.equal(lc.lc_forward(far, w, None, (step,), *rest), expected_y)
    assert torch.equal(lc.lc_backward_weight(g, far, (1,), (step,), *rest), expected_w)
    assert torch.equal(first_pixel(lc), expected_x)
    wrong = in_32_bits(tmp_path)
    with pytest.raises(Exception, match="load of 2 bytes"):
        wrong.lc_forward(far, w, None, (step,), *rest)
    with pytest.raises(Exception, match="load of 2 bytes"):
        wrong.lc_backward_weight(g, far, (1,), (step,), *rest)
    with pytest.raises(Exception, match="store of 2 bytes"):
        first_pixel(wrong)
