"""feedback_conv: the input gradient of a convolution by ±s, by digits and by tables, against float64, and its bits."""

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bioplaus_kernels import ops
from bioplaus_kernels.backends import native, reference

needs_library = pytest.mark.skipif(native.library is None, reason=native.reason)

# O, C, kernel, input, stride, padding, dilation
SHAPES = [
    (64, 64, (3, 3), (9, 7), (1, 1), (1, 1), (1, 1)),
    (70, 33, (3, 3), (8, 11), (2, 2), (1, 1), (1, 1)),
    (5, 3, (7, 7), (23, 20), (4, 4), (2, 2), (1, 1)),
    (130, 40, (2, 3), (10, 9), (1, 2), (0, 3), (2, 1)),
    (64, 200, (1, 1), (6, 5), (2, 2), (0, 0), (1, 1)),
    (16, 8, (3, 3), (7, 7), (3, 3), (0, 0), (1, 1)),
    (16, 8, (2, 2), (9, 8), (5, 3), (1, 0), (1, 1)),
    (12, 20, (5,), (33,), (2,), (4,), (3,)),
    (9, 6, (3, 3, 3), (5, 6, 7), (1, 2, 1), (1, 1, 1), (1, 1, 1)),
    (8, 16, (3, 3), (40, 3), (1, 1), (6, 6), (1, 1)),
    # Bands of a large sample, of one and of three dimensions, and several passes along K.
    (64, 16, (3, 3), (90, 60), (1, 1), (1, 1), (1, 1)),
    (64, 16, (3, 3), (90, 60), (2, 2), (1, 1), (1, 1)),
    (64, 16, (9,), (9000,), (2,), (3,), (1,)),
    (64, 16, (3, 3, 3), (9, 24, 24), (2, 1, 1), (1, 1, 1), (1, 1, 1)),
    (520, 32, (3, 3), (7, 7), (1, 1), (1, 1), (1, 1)),
    # More than 64 input channels and a tap, more taps than a word has bits.
    (64, 130, (3, 3), (5, 6), (1, 1), (1, 1), (1, 1)),
    (5, 70, (9, 9), (12, 11), (1, 1), (4, 4), (1, 1)),
    (8, 66, (100,), (130,), (1,), (3,), (1,)),
    # Bands where some of dY reaches padding alone, dilated, and strides that leave pixels out.
    (64, 16, (3, 3), (90, 60), (3, 2), (7, 5), (2, 1)),
    (64, 16, (2, 2), (91, 62), (4, 4), (1, 0), (1, 1)),
    # dX has one pixel in a dimension and dY several.
    (70, 16, (3, 1), (1, 16), (1, 1), (2, 1), (1, 1)),
    (64, 16, (3, 3, 3), (1, 20, 30), (1, 1, 1), (2, 1, 1), (1, 1, 1)),
    # Pixels of 1x1, of any band.
    (70, 64, (1, 1), (50, 40), (1, 1), (0, 0), (1, 1)),
]


def output_size(shape: Sequence) -> list[int]:
    _, _, kernel, size, stride, padding, dilation = shape
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def problem(shape: Sequence, samples: int = 3) -> tuple[Tensor, Tensor, tuple]:
    out, channels, kernel, size, *geometry = shape
    grad = torch.randn(samples, out, *output_size(shape))
    weight = torch.randn(out, channels, *kernel)
    return grad, weight, (list(weight.shape), list(size), *map(list, geometry))


def exact(grad: Tensor, b: Tensor, geometry: tuple) -> tuple[Tensor, Tensor]:
    """dX in float64, and the norm of each pixel's patch."""

    def product(g: Tensor, w: Tensor) -> Tensor:
        return reference.feedback_conv(g, None, None, w, None, "stored", 1.0, *geometry)

    b = b.double()
    square = product(grad.double().square(), torch.ones_like(b))
    return product(grad.double(), b), square.sqrt()


WAYS = ["digits", "tables"]


def by(way: str, *arguments: object) -> Tensor:
    return torch.ops.bioplaus.feedback_conv_by(*arguments, way)


@needs_library
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("source", ["weight", "last", "signs", "key"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple, source: str, way: str) -> None:
    torch.manual_seed(0)
    grad, weight, geometry = problem(shape)
    if way == "digits":
        weight[0, 0] = 0
        weight[-1] *= torch.rand_like(weight[-1]).round()
    else:
        # As many as there may be.
        weight.flatten()[:: -(-weight.numel() // (weight.numel() // 4096 + 1))] = 0
    key = torch.tensor([2, 7, 11])
    feedback: tuple = {
        "weight": (weight, None, None, None),
        "last": (weight.movedim(1, -1).contiguous().movedim(-1, 1), None, None, None),
        "signs": (None, ops.pack_signs(weight.flatten(1)), None, None),
        "key": (None, None, None, key),
    }[source]
    found = by(way, grad, *feedback, "constant", 0.5, *geometry)
    b = ops.feedback_weight(*feedback, "constant", 0.5, geometry[0], dtype=torch.float64)
    wanted, norm = exact(grad, b, geometry)
    # Half a last place of the result, and what fixed point, or rounding short sums, may lose.
    limit = 2**-24 * wanted.abs() + (2**-24 if way == "digits" else 2**-20) * norm
    assert ((found - wanted).abs() <= limit).all()
    last = grad.movedim(1, -1).contiguous().movedim(-1, 1)
    again = by(way, last, *feedback, "constant", 0.5, *geometry)
    assert torch.equal(again, found)
    if grad.dim() == 4:
        assert found.is_contiguous()
        assert again.is_contiguous(memory_format=torch.channels_last)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_types_by_tables(shape: tuple, dtype: torch.dtype) -> None:
    """float32's sums of the same numbers, rounded once; s is what a B of the half type would hold."""
    torch.manual_seed(0)
    grad, weight, geometry = problem(shape)
    weight.flatten()[:1] = 0
    grad = grad.to(dtype)
    scale = torch.tensor(0.3, dtype=dtype).item()
    for g in (grad, grad.movedim(1, -1).contiguous().movedim(-1, 1)):
        found = by("tables", g, weight.to(dtype), None, None, None, "constant", 0.3, *geometry)
        wide = by("tables", g.float(), weight, None, None, None, "constant", scale, *geometry)
        assert torch.equal(found, wide.to(dtype)) and found.stride() == wide.stride()


@needs_library
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[-1]], ids=str)
def test_tables_are_more_accurate_than_torch(shape: tuple) -> None:
    torch.manual_seed(0)
    grad, weight, geometry = problem(shape, 16)
    args = (weight, None, None, None, "constant", 1.0, *geometry)
    wanted, norm = exact(grad, weight.sign(), geometry)
    ours, torchs = (
        ((x - wanted).abs() / norm).max() for x in (by("tables", grad, *args), reference.feedback_conv(grad, *args))
    )
    # The vendor's sums differ from processor to processor: on those tried, ours were half of theirs.
    assert ours < 1.25 * torchs


def took_the_vendors(way: str, *arguments: object) -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        by(way, *arguments)
    return any(event.name == "aten::convolution_backward" for event in profiler.events())


@needs_library
def test_what_is_for_tables() -> None:
    for shape in (*SHAPES, *WIDE[:2]):
        grad, weight, geometry = problem(shape, 2)
        assert not took_the_vendors("tables", grad, weight, None, None, None, "constant", 0.5, *geometry), shape
    # Bands that share most of their tables, more than 128 taps, a row of dY of many megabytes.
    for shape in (
        WIDE[2],
        (4, 4, (129,), (140,), (1,), (0,), (1,)),
        (64, 1, (3, 3), (4, 5000), (1, 1), (1, 1), (1, 1)),
    ):
        grad, weight, geometry = problem(shape, 1)
        assert took_the_vendors("tables", grad, weight, None, None, None, "constant", 0.5, *geometry), shape


@needs_library
@pytest.mark.skipif(native.product_level() != "AMX", reason="no tile units")
@pytest.mark.parametrize(
    ("out", "channels", "kernel", "size", "way"),
    [
        (33, 3, 3, 4, "digits"),
        (64, 64, 3, 5, "digits"),
        (257, 64, 1, 4, "digits"),
        (32, 128, 3, 4, "tables"),
        (64, 64, 2, 4, "tables"),
        (128, 128, 3, 3, "tables"),
        (256, 128, 1, 4, "tables"),
    ],
)
def test_the_way_on_tile_units(out: int, channels: int, kernel: int, size: int, way: str) -> None:
    grad, weight, rest = problem((out, channels, [kernel] * 2, [size] * 2, (1, 1), [kernel // 2] * 2, (1, 1)))
    arguments = grad, weight, None, None, None, "constant", 0.25, *rest
    ways = {name: torch.ops.bioplaus.feedback_conv_by(*arguments, name) for name in ("digits", "tables")}
    assert not torch.equal(*ways.values())
    assert torch.equal(ops.feedback_conv(*arguments), ways[way])


@needs_library
@pytest.mark.skipif(native.product_level() != "AMX", reason="no tile units")
def test_the_other_way_on_tile_units() -> None:
    """Where bands would be mostly each other's images it is tables."""
    grad, weight, rest = problem((256, 32, (3, 3), (8, 128), (1, 1), (1, 1), (1, 1)))
    arguments = grad, weight, None, None, None, "constant", 0.25, *rest
    found = by("tables", *arguments)
    assert not torch.equal(found, reference.feedback_conv(*arguments))
    assert torch.equal(ops.feedback_conv(*arguments), found)


@needs_library
def test_many_zeros_are_not_for_tables() -> None:
    """Pruned: the same bits as B formed and torch's convolution. One in 4,096, and one more, is not many."""
    grad, weight, geometry = problem(SHAPES[0])
    few = weight.numel() // 4096 + 1
    weight.flatten()[:few] = 0
    rest = (None, None, None, "constant", 0.5, *geometry)
    assert not took_the_vendors("tables", grad, weight, *rest)
    weight.flatten()[: few + 1] = 0
    assert took_the_vendors("tables", grad, weight, *rest)
    weight *= torch.rand_like(weight).round()
    found = by("tables", grad, weight, *rest)
    torch.testing.assert_close(found, reference.feedback_conv(grad, weight, *rest), rtol=0, atol=0)


@needs_library
@pytest.mark.parametrize(("way", "dtype"), [*((way, torch.float32) for way in WAYS), ("tables", torch.bfloat16)])
def test_an_expanded_gradient(way: str, dtype: torch.dtype) -> None:
    _, weight, geometry = problem(SHAPES[0])
    grad = torch.randn(1, 64, 1, 1, dtype=dtype).expand(3, 64, *output_size(SHAPES[0]))
    rest = (weight, None, None, None, "constant", 0.5, *geometry)
    assert torch.equal(by(way, grad, *rest), by(way, grad.contiguous(), *rest))


@needs_library
@pytest.mark.parametrize(("way", "dtype"), [*((way, torch.float32) for way in WAYS), ("tables", torch.float16)])
def test_the_same_bits_whatever_the_blocks(way: str, dtype: torch.dtype) -> None:
    """Threads without a sample of their own take bands, of tables, and parts of the columns."""
    before = torch.get_num_threads()
    try:
        for shape in (
            *(SHAPES[i] for i in (0, 4, 10, 12)),
            (32, 200, (3, 3), (6, 5), (1, 1), (1, 1), (1, 1)),
            # As many threads as would cut them into bands that share most of their tables.
            (32, 32, (5, 5), (6, 6), (1, 1), (4, 4), (1, 1)),
            (32, 32, (3,), (100,), (1,), (32,), (16,)),
        ):
            grad, weight, geometry = problem(shape, 9)
            grad = grad.to(dtype)
            weight[3, -1].flatten()[0] = 0
            grad[0, :, 1:3] *= 1e-6
            grad[1, 0].flatten()[5] = float("inf")
            args = (weight, None, None, None, "constant", 0.5, *geometry)
            found = []
            for threads in (1, 2, 3, 16):
                torch.set_num_threads(threads)
                for g in (grad, grad.movedim(1, -1).contiguous().movedim(-1, 1)):
                    found += [by(way, g[:n], *args)[:2].nan_to_num(nan=7.0) for n in (9, 1, 2)]
            assert all(torch.equal(x, found[0][: len(x)]) for x in found), shape
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[10]], ids=str)
def test_a_sample_and_a_small_patch_stand_alone(shape: tuple, way: str) -> None:
    torch.manual_seed(0)
    grad, weight, geometry = problem(shape, 4)
    grad[:, :, :, 4:] *= 1e-6
    grad[1, :, :3] = 0
    grad[2, 5, 2, 2] = 1e30
    args = (weight, None, None, None, "constant", 1.0)
    found = by(way, grad, *args, *geometry)
    wanted, norm = exact(grad, weight.sign(), geometry)
    assert ((found - wanted).abs() <= (2**-22 if way == "digits" else 2**-20) * norm).all()
    assert (found[1, :, :2] == 0).all()
    assert torch.equal(by(way, grad.contiguous(memory_format=torch.channels_last), *args, *geometry), found)
    for i in range(4):
        assert torch.equal(by(way, grad[i : i + 1], *args, *geometry)[0], found[i])


@needs_library
@pytest.mark.parametrize(("way", "dtype"), [*((way, torch.float32) for way in WAYS), ("tables", torch.bfloat16)])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_patches(value: float, way: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    grad, weight, geometry = problem(SHAPES[1])
    grad = grad.to(dtype)
    weight[3, 2, 1, 1:] = 0
    args = (weight, None, None, None, "constant", 1.0)
    clean = by(way, grad, *args, *geometry)
    grad[1, 3, 2, 2] = value
    found = by(way, grad, *args, *geometry)
    wanted = reference.feedback_conv(grad, *args, *geometry)
    assert torch.equal(found.isfinite(), wanted.isfinite())
    assert torch.equal(found.isnan(), wanted.isnan())
    torch.testing.assert_close(found[[0, 2]], clean[[0, 2]], rtol=0, atol=0)
    near = max(1e-4, torch.finfo(dtype).eps)
    torch.testing.assert_close(found, wanted, equal_nan=True, rtol=near, atol=near)


@needs_library
def test_other_entries_and_dtypes_are_the_vendors() -> None:
    grad, weight, geometry = problem(SHAPES[1])
    for dtype, feedback in (
        (torch.float32, (None, None, weight, None, "stored", 2.0)),
        (torch.float32, (None, None, None, torch.tensor([2, 7, 11]), "normal", 2.0)),
        (torch.float64, (weight, None, None, None, "constant", 2.0)),
    ):
        args = (grad.to(dtype), *feedback, *geometry)
        torch.testing.assert_close(ops.feedback_conv(*args), reference.feedback_conv(*args), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("op", [ops.feedback_conv, reference.feedback_conv], ids=["op", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": [9]}, "weight_size: expected 3 integers"),
        ({"input_size": []}, "input_size: expected 1, 2 or 3 integers"),
        ({"input_size": [2, 1], "padding": [0, 0]}, r"input_size: expected a padded size of at least .*\(3, 3\)"),
        ({"stride": [0, 1]}, "stride: expected 2 integers from 1"),
        ({"padding": [2**31, 1]}, "padding: expected 2 integers from 0"),
        ({"dilation": [1]}, "dilation: expected 2 integers from 1"),
        ({"input_size": [10, 7]}, r"grad_output: expected shape \(3, 64, 10, 7\), got \(3, 64, 9, 7\)"),
        ({"weight_size": [64, 63, 3, 3]}, r"weight: expected shape \(64, 63, 3, 3\)"),
        ({"grad_output": torch.zeros(3, 64, 9)}, "grad_output: expected 4 dimensions"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors(op: object, change: dict, message: str) -> None:
    grad, weight, geometry = problem(SHAPES[0])
    names = ("weight_size", "input_size", "stride", "padding", "dilation")
    given = {"grad_output": grad, **dict(zip(names, geometry, strict=True))} | change
    with pytest.raises(ValueError, match=message):
        op(given["grad_output"], weight, None, None, None, "constant", 1.0, *(given[name] for name in names))


@needs_library
def test_errors_of_the_way() -> None:
    grad, weight, geometry = problem(SHAPES[0], 1)
    for op, rest in ((torch.ops.bioplaus.feedback_conv_by, geometry), (torch.ops.bioplaus.feedback_mm_by, (63,))):
        g, w = (grad, weight) if rest is geometry else (grad.flatten(1), torch.randn(64 * 63, 63))
        with pytest.raises(ValueError, match=r"way: expected one of \('digits', 'tables'\), got 'table'"):
            op(g, w, None, None, None, "constant", 1.0, *rest, "table")
        with pytest.raises(ValueError, match="way: expected entries='constant', got 'stored'"):
            op(g, None, None, w, None, "stored", 1.0, *rest, "tables")
        with pytest.raises(
            ValueError, match=r"way: expected a grad_output of float32 or a half type, got torch\.float64"
        ):
            op(g.double(), w, None, None, None, "constant", 1.0, *rest, "digits")
    with pytest.raises(ValueError, match=r"way: expected .* float32 for 'digits', got torch\.bfloat16"):
        by("digits", grad.bfloat16(), weight, None, None, None, "constant", 1.0, *geometry)


# O, C, kernel, input, stride, padding, dilation, where an image of digits would be mostly border or shared.
WIDE = [
    (8, 8, (3, 3), (8, 8), (1, 1), (1000, 1000), (1000, 1000)),
    (8, 8, (2, 2), (1, 1), (1, 1), (2**20, 2**20), (2**21, 2**21)),
    (256, 32, (2,), (4096,), (1,), (256,), (512,)),
    (64, 8, (3, 3, 3), (12, 48, 48), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    # A block that cannot be cut, of more than four megabytes.
    (64, 8, (3, 3, 3), (1, 90, 90), (1, 1, 1), (2, 1, 1), (1, 1, 1)),
]


@needs_library
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_wide_dilation_is_not_for_digits(shape: Sequence) -> None:
    """The same bits as B formed and torch's convolution."""
    grad, weight, geometry = problem(shape, 1)
    feedback = (weight, None, None, None, "constant", 0.5)
    assert torch.equal(by("digits", grad, *feedback, *geometry), reference.feedback_conv(grad, *feedback, *geometry))


@needs_library
@pytest.mark.parametrize("way", WAYS)
def test_an_image_beyond_64_bits(way: str) -> None:
    """Of an expanded gradient, which takes no memory: what torch says of its own, and no division by 0."""
    seeded = (None, None, None, torch.tensor([2, 7, 11]), "constant", 1.0)
    grad = torch.ones(1, 1, 1, 1, 1).expand(1, 2**16, 2, 2**23, 2**22)
    with pytest.raises(RuntimeError):
        by(way, grad, *seeded, [2**16, 1, 1, 1, 2], [2, 2**23, 2**22], [1] * 3, [0, 0, 2**21], [1, 1, 2**22])
    grad = torch.ones(1, 1, 1, 1, 1).expand(1, 2**17, 1, 2**23, 2**22)
    with pytest.raises(RuntimeError):
        by(way, grad, *seeded, [2**17, 1, 2, 1, 1], [2, 2**23, 2**22], [1] * 3, [0] * 3, [1] * 3)


def test_nothing_to_do() -> None:
    grad, weight, geometry = problem(SHAPES[0], 0)
    assert ops.feedback_conv(grad, weight, None, None, None, "constant", 1.0, *geometry).shape == (0, 64, 9, 7)


BITS = """
import hashlib, numpy, sys, torch
sys.path.insert(0, sys.argv[1])
from bioplaus_kernels import _C
from test_feedback_conv import SHAPES, WAYS, by, problem
torch.set_num_threads(int(sys.argv[2]))
digests = []
for way in WAYS:
    digest = hashlib.sha256()
    rng = numpy.random.default_rng(0)
    for shape in SHAPES:
        # torch's own draws depend on the level.
        grad, weight, geometry = problem(shape)
        grad, weight = (torch.from_numpy(rng.standard_normal(x.shape, numpy.float32)) for x in (grad, weight))
        weight[0, 0].flatten()[0] = 0
        grad[..., :2] *= 1e-5
        grad[0, 0].flatten()[3] = float("nan")
        x = by(way, grad, weight, None, None, None, "constant", 0.3, *geometry)
        digest.update(x.nan_to_num(nan=7.0).numpy().tobytes())
    digests.append(digest.hexdigest())
print(_C.active_product_level(), *digests)
"""


@needs_library
@pytest.mark.slow
def test_bits_at_every_level_and_number_of_threads() -> None:
    here = os.path.dirname(__file__)
    found = {}
    for capability, isa, threads in (
        ("", "", 1),
        ("", "", 2),
        ("", "avx512_core_vnni", 1),
        ("", "avx512_core", 1),
        ("avx2", "", 1),
        ("avx2", "avx2", 1),
        ("default", "", 1),
    ):
        env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": isa}
        env = {k: v for k, v in env.items() if v}
        out = subprocess.run(
            [sys.executable, "-c", BITS, here, str(threads)], env=env, check=True, capture_output=True, text=True
        )
        level, *digests = out.stdout.split()
        found[level, threads] = tuple(digests)
    assert len(set(found.values())) == 1, found
