"""The CPU kernels of the locally-connected ops: against the reference, and what only a kernel can get wrong.

What the ops mean is tested in test_lc_ops.py. Here are the batches that choose another path, levels of the processor,
numbers of threads, memory, strides of the results and the wording of errors.
"""

import itertools
import os
from dataclasses import dataclass

import fresh
import pytest
import torch
from test_feedback_mm import CELLS, operands
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bioplaus_kernels import ops
from bioplaus_kernels.backends import native, reference

pytestmark = pytest.mark.skipif(native.library is None, reason=f"no native library: {native.reason}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
# One sample, a few, whole vectors, ragged ones, and more than one product takes.
BATCHES = [0, 1, 3, 16, 17, 33, 130]

one_thread = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Layer:
    channels: tuple[int, int]
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def op(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups

    def weight_size(self) -> tuple[int, ...]:
        out = reference.lc.output_size(self.size, self.kernel, self.stride, self.padding, self.dilation)
        return (*out, self.channels[1], *self.kernel, self.channels[0] // self.groups)

    def tensors(self, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Input, weight, bias per position, output gradient."""
        size, d = self.weight_size(), len(self.size)
        shapes = ((n, self.channels[0], *self.size), size, size[: d + 1], (n, self.channels[1], *size[:d]))
        return tuple(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)


LAYERS = {
    "1d": Layer((16, 32), (40,), (5,), (1,), (2, 2), (2,)),
    "1d ragged": Layer((3, 5), (9,), (3,), (2,), (1, 0), (1,)),
    "2d": Layer((32, 48), (8, 8), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "2d stride, odd pairs": Layer((17, 33), (9, 20), (5, 5), (2, 2), (1, 2, 1, 2), (1, 1)),
    "2d groups, dilation": Layer((8, 12), (7, 6), (3, 3), (1, 2), (2, 1, 1, 2), (2, 1), 2),
    "2d groups, wide": Layer((16, 80), (7, 6), (3, 3), (1, 2), (2, 1, 1, 2), (2, 1), 2),
    "2d padding wider than the kernel": Layer((4, 6), (3, 3), (2, 2), (1, 1), (3, 3, 4, 4), (1, 1)),
    "3d groups": Layer((4, 6), (4, 5, 6), (2, 3, 2), (1, 2, 1), (0, 1, 1, 0, 1, 1), (1, 1, 2), 2),
}
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=[name.replace(" ", "_") for name in LAYERS])


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def products(backend: object, layer: Layer, x: Tensor, w: Tensor, bias: Tensor | None, g: Tensor) -> list[Tensor]:
    """Output, input gradient and weight gradient by `backend`, ops or reference."""
    stored = (None, None, w, None, "stored", 1.0)
    return [
        backend.lc_forward(x, w, bias, *layer.op()),
        backend.lc_backward_input(g, *stored, w.shape, layer.size, *layer.op()),
        backend.lc_backward_weight(g, x, layer.kernel, *layer.op()),
    ]


def check(actual: Tensor, exact: Tensor, plain: Tensor, size: Tensor | float = 1.0) -> None:
    """At most twice the error of the reference in the same dtype, plus one rounding; in float64, a few.

    `size`: what the errors are measured against, that of each sum's terms.
    """
    assert (actual.shape, actual.dtype) == (exact.shape, plain.dtype)
    if exact.numel():
        rounding = torch.finfo(actual.dtype).eps * (1 if actual.dtype != torch.float64 else 16)
        own, torchs, unit = (
            (error.abs() / size).max() for error in (actual.double() - exact, plain.double() - exact, rounding * exact)
        )
        assert own <= 2 * torchs + unit


def norms(layer: Layer, x: Tensor, w: Tensor, g: Tensor) -> list[Tensor]:
    """Of the terms of each sum of `products`: of the activations' the root of their squares, of the others the most."""
    squares = products(reference, layer, x.double().square(), torch.ones_like(w).double(), None, g.double().square())
    squares[2] = reference.lc_backward_weight(
        g.double().square(), torch.ones_like(x).double(), layer.kernel, *layer.op()
    )
    largest = [float(t.abs().max()) if t.numel() else 1.0 for t in (w, w, x)]
    # Where all taps lie in the padding there is nothing to measure by, and nothing may be wrong.
    return [s.sqrt().clamp_min(1e-30) * b for s, b in zip(squares, largest, strict=True)]


def check_products(layer: Layer, n: int, dtype: torch.dtype) -> None:
    x, w, bias, g = layer.tensors(n, dtype)
    exact = products(reference, layer, x.double(), w.double(), bias.double(), g.double())
    plain = products(reference, layer, x, w, bias, g)
    sizes = norms(layer, x, w, g)
    sizes[0] = sizes[0] + bias.abs().double().movedim(-1, 0)
    for form in (lambda t: t, channels_last):
        for found in zip(products(ops, layer, form(x), w, bias, form(g)), exact, plain, sizes, strict=True):
            check(*found)


@one_thread
@dtypes
@layers
def test_against_the_reference(layer: Layer, dtype: torch.dtype) -> None:
    for n in BATCHES if dtype == torch.float32 else BATCHES[1::2]:
        check_products(layer, n, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pairs_of_channels_that_straddle_words(dtype: torch.dtype) -> None:
    layer = LAYERS["2d"]
    x, w, _, g = layer.tensors(17, dtype)
    apart = [torch.cat([t[:, :1], t], 1).contiguous(memory_format=torch.channels_last)[:, 1:] for t in (x, g)]
    assert not any(t.stride(3) % 2 == 0 or t.data_ptr() % 4 == 0 for t in apart)
    expected = products(ops, layer, x, w, None, g)
    for a, e in zip(products(ops, layer, apart[0], w, None, apart[1]), expected, strict=True):
        assert torch.equal(a, e)


def test_bias_per_channel() -> None:
    layer = LAYERS["2d stride, odd pairs"]
    for n in (1, 17):
        x, w, bias, _ = layer.tensors(n, torch.float64)
        torch.testing.assert_close(
            ops.lc_forward(x, w, bias[0, 0], *layer.op()), reference.lc_forward(x, w, bias[0, 0], *layer.op())
        )


def feedback_of(cell: str, size: tuple[int, ...], dtype: torch.dtype) -> list:
    rows = operands(cell, size[0], torch.Size(size[1:]).numel(), dtype)
    return [t.reshape(size) if isinstance(t, Tensor) and t.is_floating_point() else t for t in rows]


@one_thread
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("cell", CELLS)
def test_feedback(cell: str, dtype: torch.dtype) -> None:
    cases = ("2d stride, odd pairs", 5), ("2d groups, dilation", 1), ("1d", 1), ("3d groups", 2), ("2d groups, wide", 3)
    for name, n in cases:
        layer = LAYERS[name]
        g = layer.tensors(n, dtype)[-1]
        size = layer.weight_size()
        rest = (size, layer.size, *layer.op())
        for other in {dtype, torch.float32}:
            feedback = feedback_of(cell, size, other)
            b = reference.feedback_weight(*feedback, size, dtype=dtype)
            plain = reference.lc_backward_input(g, *feedback, *rest)
            stored = (None, None, b.double(), None, "stored", 1.0)
            check(
                ops.lc_backward_input(g, *feedback, *rest),
                reference.lc_backward_input(g.double(), *stored, *rest),
                plain,
            )


def test_strided_feedback_is_read_where_it_lies() -> None:
    layer = LAYERS["2d"]
    _, w, _, g = layer.tensors(3, torch.float32)
    strided = w.movedim(2, -1).contiguous().movedim(-1, 2)
    rest = (w.shape, layer.size, *layer.op())
    for extra in ((None, "constant", 0.5), (torch.tensor([1, 2, 3]), "uniform", 0.5)):
        expected = ops.lc_backward_input(g, w, None, None, *extra, *rest)
        assert torch.equal(ops.lc_backward_input(g, strided, None, None, *extra, *rest), expected)


@one_thread
@pytest.mark.parametrize("name", ["1d", "2d", "2d stride, odd pairs", "2d groups, wide"])
def test_signs_that_are_zero(name: str) -> None:
    """None, few and many in a row of taps, NaN too, which has no sign; the same for all threads and layouts."""
    layer = LAYERS[name]
    for pruned, n in itertools.product((0.0, 0.001, 0.3, 1.0), (1, 9)):
        _, w, _, g = layer.tensors(n, torch.float32)
        w[torch.rand_like(w) < pruned] = 0
        flat = w.flatten(0, len(layer.size) - 1)
        flat[0, 3, 0] = 0
        flat[1, 5].fill_(float("nan"))
        flat[-1, :, 0] = 0
        rest = (w, None, None, None, "constant", -0.3, w.shape, layer.size, *layer.op())
        exact = (g.double(), w.double(), *rest[1:])
        found = ops.lc_backward_input(g, *rest)
        check(found, reference.lc_backward_input(*exact), reference.lc_backward_input(g, *rest))
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(ops.lc_backward_input(channels_last(g), *rest), found)
        torch.set_num_threads(1)


@one_thread
@pytest.mark.skipif(native.product_level() in ("", "DEFAULT"), reason="sums of table entries are not faster")
@pytest.mark.parametrize("cell", ["weight constant", "signs constant", "none constant"])
@pytest.mark.parametrize(
    "dtype", DTYPES[: 1 if native.product_level() == "AMX" else 3], ids=lambda dtype: str(dtype)[6:]
)
def test_a_sample_has_the_same_bits_in_every_batch_by_tables(cell: str, dtype: torch.dtype) -> None:
    layer = LAYERS["2d"]
    g, size = layer.tensors(130, dtype)[-1], layer.weight_size()
    rest = (*feedback_of(cell, size, torch.float32), size, layer.size, *layer.op())
    found = ops.lc_backward_input(g, *rest)
    for n in (2, 5, 9, 17, 25, 33, 129):
        assert torch.equal(ops.lc_backward_input(g[:n], *rest), found[:n])


def all_results(dtype: torch.dtype) -> list[Tensor]:
    """Every op on every layer, from one seed."""
    results = []
    for layer, n in itertools.product(LAYERS.values(), (1, 17)):
        torch.manual_seed(1)
        x, w, bias, g = layer.tensors(n, dtype)
        for form in (lambda t: t, channels_last)[: 2 if n > 1 else 1]:
            results += products(ops, layer, form(x), w, bias, form(g))
            for cell in ("weight constant", "none uniform"):
                feedback = feedback_of(cell, layer.weight_size(), dtype)
                results.append(ops.lc_backward_input(form(g), *feedback, w.shape, layer.size, *layer.op()))
    return results


def check_threads(dtype: torch.dtype, numbers: tuple[int, ...] = (2, 5)) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = all_results(dtype)
        for threads in numbers:
            torch.set_num_threads(threads)
            assert all(torch.equal(a, e) for a, e in zip(all_results(dtype), expected, strict=True)), threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "dtype", [*DTYPES[:2], *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[2:])], ids=str
)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    check_threads(dtype)


LEVELS = {
    "DEFAULT": ("default", "SSE41", "SSE4_2"),
    "AVX2": ("avx2", "AVX2", "AVX2"),
    "AVX512": ("avx512", "AVX512_CORE", "AVX512"),
}


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_level(level: str) -> None:
    capability, onednn, mkl = LEVELS[level]
    program = (
        "import torch, test_lc_cpu as t\n"
        "from bioplaus_kernels import _C\n"
        f"assert _C.active_cpu_level() == {level!r}, _C.active_cpu_level()\n"
        "for layer in t.LAYERS.values():\n"
        "    t.check_products(layer, 17, torch.float32)\n"
        "for n, dtype in ((1, torch.float32), (17, torch.bfloat16), (17, torch.float16)):\n"
        "    t.check_products(t.LAYERS['2d'], n, dtype)\n"
        "t.check_threads(torch.float32, (2,))\n"
        "with torch.backends.mkldnn.flags(enabled=False):\n"
        "    t.check_products(t.LAYERS['2d'], 17, torch.bfloat16)\n"
    )
    if level not in native.library.build_config()["cpu_levels"] or not native_level_at_least(level):
        pytest.skip(f"no {level} here")
    forced = {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}
    done = fresh.run(program, environment=os.environ | forced)
    assert done.returncode == 0, done.stderr[-3000:]


def native_level_at_least(level: str) -> bool:
    """Whether this processor runs `level`."""
    flags = torch.cpu.get_capabilities()
    return level == "DEFAULT" or bool(flags.get("avx512_f" if level == "AVX512" else "avx2", False))


def peak_bytes(f: object) -> int:
    """The most memory that torch's allocator had handed out at a time within f, what was there before not counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = f()
    now = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert peak >= result.numel() * result.element_size()
    return peak


@pytest.mark.parametrize("n", [1, 16, 128])
@pytest.mark.parametrize("form", [lambda t: t, channels_last], ids=["contiguous", "channels_last"])
def test_peak_memory(form: object, n: int) -> None:
    # The widest layer of the CIFAR-10 network: 75 MB of weights. Each thread has its own scratch.
    torch.set_num_threads(2)
    layer = Layer((128, 256), (8, 8), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    size = layer.weight_size()
    x, w, g = form(torch.zeros(n, 128, 8, 8)), torch.zeros(size), form(torch.zeros(n, 256, 8, 8))
    bytes_of = lambda t: 4 * t.numel()  # noqa: E731
    operands = sum(map(bytes_of, (x, w, g)))
    usf = (w, None, None, None, "constant", 1.0)
    for f, out in (
        (lambda: ops.lc_forward(x, w, None, *layer.op()), g),
        (lambda: ops.lc_backward_input(g, None, None, w, None, "stored", 1.0, size, (8, 8), *layer.op()), x),
        (lambda: ops.lc_backward_input(g, *usf, size, (8, 8), *layer.op()), x),
        (lambda: ops.lc_backward_weight(g, x, (3, 3), *layer.op()), w),
    ):
        f()
        extra = peak_bytes(f) - bytes_of(out)
        assert extra <= 0.05 * operands, f"{extra} bytes beside {operands}"


@pytest.mark.parametrize("name", ["2d groups, dilation", "3d groups"])
@pytest.mark.parametrize("form", [lambda t: t, channels_last], ids=["contiguous", "channels_last"])
def test_opcheck_and_strides(form: object, name: str) -> None:
    layer = LAYERS[name]
    x, w, bias, g = layer.tensors(2, torch.float32)
    x, g = form(x), form(g)
    library, rest = torch.ops.bioplaus, [list(v) if isinstance(v, tuple) else v for v in layer.op()]
    feedback = (w, None, None, None, "constant", 0.5, list(w.shape), list(layer.size))
    torch.library.opcheck(library.lc_forward.default, (x, w, bias, *rest))
    torch.library.opcheck(library.lc_backward_input.default, (g, *feedback, *rest))
    torch.library.opcheck(library.lc_backward_weight.default, (g, x, list(layer.kernel), *rest))
    for result, like in ((ops.lc_forward(x, w, None, *rest), x), (ops.lc_backward_input(g, *feedback, *rest), g)):
        assert result.is_contiguous(memory_format=reference.lc.memory_format(like))


def test_errors_name_the_argument() -> None:
    layer = LAYERS["2d"]
    x, w, bias, g = layer.tensors(2, torch.float32)
    stride, padding, dilation, groups = layer.op()

    def forward(x=x, w=w, bias=bias, stride=stride, padding=padding, dilation=dilation, groups=groups) -> None:
        ops.lc_forward(x, w, bias, stride, padding, dilation, groups)

    def backward(g=g, size=layer.size, weight_size=w.shape, scale=1.0, weight=None) -> None:
        ops.lc_backward_input(g, weight, None, w, None, "stored", scale, weight_size, size, *layer.op())

    def gradient(g=g, x=x, kernel=layer.kernel) -> None:
        ops.lc_backward_weight(g, x, kernel, *layer.op())

    for call, arguments, error, name in (
        (forward, {"x": x.int()}, TypeError, "input"),
        (forward, {"x": x[0]}, ValueError, "input"),
        (forward, {"x": x[:, :31]}, ValueError, "input"),
        (forward, {"x": x[..., :1, :1], "padding": (0, 0, 0, 0)}, ValueError, "input"),
        (forward, {"w": w.double()}, TypeError, "weight"),
        (forward, {"w": w[0]}, ValueError, "weight"),
        (forward, {"w": w[1:]}, ValueError, "weight"),
        (forward, {"bias": bias[..., 1:]}, ValueError, "bias"),
        (forward, {"bias": bias.half()}, TypeError, "bias"),
        (forward, {"stride": (0, 1)}, ValueError, "stride"),
        (forward, {"padding": (1, 1)}, ValueError, "padding"),
        (forward, {"dilation": (1, -1)}, ValueError, "dilation"),
        (forward, {"groups": 0}, ValueError, "groups"),
        (forward, {"groups": 7}, ValueError, "groups"),
        (backward, {"g": g.long()}, TypeError, "grad_output"),
        (backward, {"g": g[:, 1:]}, ValueError, "grad_output"),
        (backward, {"size": (9, 8)}, ValueError, "weight"),
        (backward, {"size": (8,)}, ValueError, "input"),
        (backward, {"weight_size": w.shape[1:]}, ValueError, "weight"),
        (backward, {"scale": float("nan")}, ValueError, "scale"),
        (backward, {"weight": w[1:]}, ValueError, "weight"),
        (gradient, {"g": g.double()}, TypeError, "grad_output"),
        (gradient, {"g": g[1:]}, ValueError, "grad_output"),
        (gradient, {"kernel": (3,)}, ValueError, "kernel_size"),
        (gradient, {"x": x[:, :, 1:]}, ValueError, "grad_output"),
    ):
        with pytest.raises(error, match=rf"^{name}.*expected .*got "):
            call(**arguments)
