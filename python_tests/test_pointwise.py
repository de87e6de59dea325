"""Convolutions whose backward is not the vendor's with a B formed for it: digits, tables, a stored B, few pixels.

Fed back by ±s from AVX2 on. A 1x1 one of 64 channels and more that is channels-last is a feedback_mm; else, and where
the kernel is larger and has 32 channels, it is a feedback_conv. Half types are too where there are no tile units, from
more channels on where the processor multiplies them itself.
"""

import os

import fresh
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bioplaus_kernels as bk
from bioplaus_kernels.backends import native

OUT, IN = 256, 128
LEVEL = native.product_level()
OURS, TILES = LEVEL not in ("", "DEFAULT"), LEVEL == "AMX"
RULES = ["usf", bk.FeedbackAlignment(entries="constant"), "fa_signed_init"]


class Ops(TorchDispatchMode):
    """Names of the ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def backward(layer: torch.nn.Module, x: Tensor) -> tuple[dict[str, Tensor], set[str]]:
    y = layer(x)
    leaves = {"input": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    grad = torch.randn(y.shape).to(y.dtype)
    # Strides of y, as the layer after it would give them.
    grad = torch.empty_like(y).copy_(grad)
    with Ops() as ops:
        grads = torch.autograd.grad(y, list(leaves.values()), grad)
    return dict(zip(leaves, grads, strict=True)) | {"output": grad}, ops.names


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_input_gradient(d: int, rule: object, trained: bool) -> None:
    layer = getattr(bk.nn, f"Conv{d}d")(IN, OUT, 1, feedback=rule).requires_grad_(trained)
    x = channels_last(torch.randn(2, IN, *(3, 4, 5)[:d])).requires_grad_()
    found, names = backward(layer, x)
    product = OURS and found["output"].movedim(1, -1).is_contiguous()
    assert ("bioplaus::feedback_mm" in names) == product
    assert ("bioplaus::feedback_conv" in names) == (OURS and not product)
    if not trained and OURS:
        assert "aten::convolution_backward" not in names
    b = layer.feedback_matrix().flatten(1).double()
    exact = torch.einsum("no...,oi->ni...", found["output"].double(), b)
    assert (found["input"] - exact).abs().max() < 1e-5 * exact.abs().max()
    if d > 1:
        # oneDNN keeps the layout of 4-D and on some processors of 5-D inputs.
        plain, _ = backward(getattr(torch.nn, f"Conv{d}d")(IN, OUT, 1), x)
        assert found["input"].stride() == plain["input"].stride()
    if trained:
        g = found["output"].double()
        dw = torch.einsum("no...,ni...->oi", g.flatten(2), x.double().flatten(2))
        torch.testing.assert_close(found["weight"].flatten(1).double(), dw, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["bias"].double(), g.flatten(2).sum((0, 2)), rtol=1e-4, atol=1e-4)


def test_frozen_signs() -> None:
    layer = bk.nn.Conv2d(IN, OUT, 1, bias=False, feedback="usf")
    x = channels_last(torch.randn(2, IN, 3, 4)).requires_grad_()
    torch.manual_seed(0)
    plain, _ = backward(layer, x)
    torch.manual_seed(0)
    with bk.frozen_signs(layer):
        packed, _ = backward(layer, x)
    assert torch.equal(plain["input"], packed["input"])


OTHERS = [
    {"groups": 2},
    {"kernel_size": 3, "groups": 2},
    {"kernel_size": 3, "dtype": torch.float64},
    {"feedback": "brsf"},
    {"dtype": torch.float64},
]
HALVES = (torch.bfloat16, torch.float16)
# Fewer channels than are done by tables, of half types where the processor multiplies bfloat16 and where it does not.
SMALL = [{"in_channels": 63}, {"out_channels": 63}] + [
    {"kernel_size": 3, f"{side}_channels": 31} for side in ("in", "out")
]
SMALL_HALVES = [
    change | {"dtype": dtype}
    for dtype in HALVES
    for change in (
        [{}, {"out_channels": 127, "in_channels": 256}, {"kernel_size": 3, "in_channels": 63}]
        if native.half_instructions(dtype)
        else SMALL
    )
]
ANY_HALVES = [{"kernel_size": kernel, "dtype": dtype} for kernel in (1, 3) for dtype in HALVES]
if OURS:
    OTHERS += SMALL + (ANY_HALVES if TILES else SMALL_HALVES)
else:
    OTHERS += [{}, {"kernel_size": 3}, *ANY_HALVES]


@pytest.mark.parametrize("change", OTHERS, ids=str)
def test_others_take_the_vendors_convolution(change: dict) -> None:
    arguments = {"in_channels": IN, "out_channels": OUT, "kernel_size": 1, "feedback": "usf"} | change
    layer = bk.nn.Conv2d(**arguments)
    x = torch.randn(2, arguments["in_channels"], 6, 4, dtype=layer.weight.dtype)
    _, names = backward(layer, channels_last(x).requires_grad_())
    assert "aten::convolution_backward" in names
    assert not names & {"bioplaus::feedback_mm", "bioplaus::feedback_conv"}


@pytest.mark.parametrize("last", [True, False], ids=["last", "first"])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("d", [1, 2, 3])
def test_windows(d: int, rule: object, last: bool) -> None:
    geometry = {"kernel_size": 3, "stride": 2, "padding": (1, 0, 2)[:d], "dilation": (1, 2, 1)[:d]}
    layer = getattr(bk.nn, f"Conv{d}d")(64, 70, **geometry, feedback=rule)
    plain = getattr(torch.nn, f"Conv{d}d")(64, 70, **geometry).double()
    plain.weight.data.copy_(layer.feedback_matrix())
    x = torch.randn(2, 64, *(9, 8, 7)[:d])
    x = (channels_last(x) if last else x).requires_grad_()
    found, names = backward(layer, x)
    assert ("bioplaus::feedback_conv" in names) == OURS
    leaf = x.detach().double().requires_grad_()
    exact = torch.autograd.grad(plain(leaf), leaf, found["output"].double())[0]
    assert (found["input"] - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.skipif(not OURS, reason="the vendor's")
@pytest.mark.parametrize("geometry", [{"stride": 2}, {"padding": 1}], ids=str)
def test_a_pointwise_one_that_moves_is_a_convolution(geometry: dict) -> None:
    layer = bk.nn.Conv2d(IN, OUT, 1, **geometry, feedback="usf")
    x = channels_last(torch.randn(2, IN, 6, 4)).requires_grad_()
    found, names = backward(layer, x)
    assert "bioplaus::feedback_conv" in names and "bioplaus::feedback_mm" not in names
    exact = torch.nn.grad.conv2d_input(x.shape, layer.feedback_matrix().double(), found["output"].double(), **geometry)
    assert (found["input"] - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("autocast", [False, True], ids=["dtype", "autocast"])
@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kernel", [1, 3])
def test_half_types(kernel: int, dtype: torch.dtype, autocast: bool) -> None:
    layer = bk.nn.Conv2d(256, 128, kernel, padding=kernel // 2, bias=False, feedback="usf")
    x = channels_last(torch.randn(2, 256, 5, 4, dtype=dtype)).requires_grad_()
    b = layer.feedback_matrix()
    with torch.autocast("cpu", dtype, enabled=autocast):
        found, names = backward(layer if autocast else layer.to(dtype), x)
    assert ("bioplaus::feedback_mm" in names) == (OURS and not TILES and kernel == 1)
    assert ("bioplaus::feedback_conv" in names) == (OURS and not TILES and kernel == 3)
    assert found["output"].dtype == found["input"].dtype == dtype
    exact = torch.nn.grad.conv2d_input(x.shape, b.double(), found["output"].double(), padding=kernel // 2)
    assert (found["input"] - exact).abs().max() < torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kernel", [1, 3])
def test_one_graph(kernel: int, dtype: torch.dtype) -> None:
    layer = bk.nn.Conv2d(2 * IN, OUT, kernel, feedback="usf", dtype=dtype)
    x = channels_last(torch.randn(2, 2 * IN, 3, 4, dtype=dtype)).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (layer, compiled)]
    if OURS and not (TILES and dtype == torch.bfloat16):
        # The bits of our own product, which the vendor's would not have.
        assert torch.equal(*grads)
    torch.testing.assert_close(*grads)


def test_stored_feedback_is_not_copied() -> None:
    layer = bk.nn.Conv2d(8, 8, 3, feedback=bk.FeedbackAlignment(stored=True))
    x = torch.randn(2, 8, 6, 4).requires_grad_()
    found, names = backward(layer, x)
    assert "bioplaus::feedback_weight" not in names
    b = layer.feedback_matrix()
    exact = torch.nn.grad.conv2d_input(x.shape, b, found["output"])
    torch.testing.assert_close(found["input"], exact)


# As oneDNN names them.
LEVELS = {"AVX2": "AVX2", "AVX512": "AVX512_CORE"}


@pytest.mark.parametrize("level", LEVELS)
def test_lower_levels(level: str) -> None:
    order = ("", "DEFAULT", "AVX2", "AVX2_VNNI", "AVX512", "AVX512_VNNI", "AMX")
    if order.index(level) >= order.index(LEVEL):
        pytest.skip(f"at {LEVEL or 'no level'} itself the tests above run")
    program = (
        "import pytest, sys\n"
        "from bioplaus_kernels import _C\n"
        f"assert (_C.active_cpu_level(), _C.active_product_level()) == ({level!r}, {level!r})\n"
        "chosen = 'input_gradient or others or windows or half'\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', {__file__!r}, '-k', chosen]))\n"
    )
    forced = {"ATEN_CPU_CAPABILITY": level.lower(), "ONEDNN_MAX_CPU_ISA": LEVELS[level]}
    done = fresh.run(program, environment=os.environ | forced)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


FEW_PIXELS = [
    (1, (5,), {"kernel_size": 3, "stride": 2, "padding": 1}),
    (2, (4, 5), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}),
    (2, (6, 6), {"kernel_size": 2, "bias": False}),
    (3, (3, 2, 3), {"kernel_size": 2, "padding": "same"}),
]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("d", "size", "arguments"), FEW_PIXELS)
def test_weight_gradient_of_few_pixels(
    d: int, size: tuple[int, ...], arguments: dict, dtype: torch.dtype, last: bool
) -> None:
    layer = getattr(bk.nn, f"Conv{d}d")(6, 128, **arguments, feedback="fa").to(dtype)
    twin = getattr(torch.nn, f"Conv{d}d")(6, 128, **arguments).to(dtype)
    x = torch.randn(2, 6, *size).to(dtype)
    x = (channels_last(x) if last else x).requires_grad_()
    found, names = backward(layer, x)
    if native.library is not None:
        ours = dtype == torch.float32 or (dtype in HALVES and OURS)
        assert ("bioplaus::conv_backward_weight" in names) == ours
    if d == 2:
        assert found["weight"].stride() == backward(twin, x)[0]["weight"].stride()
    exact = torch.autograd.grad(twin.double()(x.double()), list(twin.parameters()), found["output"].double())
    for (name, p), wanted in zip(twin.named_parameters(), exact, strict=True):
        assert found[name].shape == p.shape
        assert (found[name] - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max(), name


def test_weight_gradient_of_few_pixels_leaves_a_frozen_part() -> None:
    layer, x = bk.nn.Conv2d(6, 128, 3, feedback="usf"), torch.randn(2, 6, 4, 4, requires_grad=True)
    for name in ("weight", "bias"):
        layer.requires_grad_(False).get_parameter(name).requires_grad_()
        assert backward(layer, x)[0].keys() == {"input", name, "output"}
    assert backward(layer, x[:0].detach().requires_grad_())[0]["bias"].tolist() == [0.0] * 128
