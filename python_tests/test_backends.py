"""Choosing a backend: explicitly, by the environment, and by the rule, which needs no GPU to be asked."""

import itertools
import os
import re
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import fresh
import pytest
import torch
from small import FEW, build, gradients
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import bioplaus_kernels as bk
from bioplaus_kernels import ops
from bioplaus_kernels.backends import native, reference, rule

pytestmark = pytest.mark.usefixtures("one_thread")
needs_native = pytest.mark.skipif(native.library is None, reason=f"no native library: {native.reason}")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
needs_triton = pytest.mark.skipif(bool(bk.backends.unavailable("triton")), reason=bk.backends.unavailable("triton"))


INTERPRETED = ("Linear", "LocallyConnectedTranspose1d")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@needs_native
@no_gpu
def test_the_automatic_choice_costs_nothing_without_a_gpu() -> None:
    for name in reference.OPS:
        assert getattr(ops, name) is getattr(torch.ops.bioplaus, name).default
    with bk.backends.use("reference"):
        assert ops.feedback_mm is reference.feedback_mm
    assert ops.feedback_mm is torch.ops.bioplaus.feedback_mm.default


def test_the_choice_before_returns() -> None:
    before = ops.feedback_mm
    with bk.backends.use("reference"):
        with bk.backends.use(None):
            assert bk.backends.chosen() is None
            assert ops.lc_forward is not reference.lc_forward or native.library is None
        assert bk.backends.chosen() == "reference"
        with pytest.raises(ZeroDivisionError), bk.backends.use(None):
            raise ZeroDivisionError
        assert ops.feedback_mm is reference.feedback_mm
    assert ops.feedback_mm is before and bk.backends.chosen() is None


def test_what_cannot_run_raises_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'cudnn' cannot be used: expected one of \('reference', 'cpu'"):
        bk.backends.choose("cudnn")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="'cuda' cannot be used: n"), bk.backends.use("cuda"):
            pass
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(RuntimeError, match=r"'triton' cannot be used: (no GPU|the package)"):
            bk.backends.choose("triton")
    monkeypatch.setattr(native, "library", None)
    monkeypatch.setattr(native, "reason", "not built: because")
    with pytest.raises(RuntimeError, match="'cpu' cannot be used: native library not built: because"):
        bk.backends.choose("cpu")
    assert bk.backends.chosen() is None


@needs_native
def test_tensors_elsewhere_raise() -> None:
    w = torch.empty(4, 5, device="meta")
    with bk.backends.use("cpu"), pytest.raises(RuntimeError, match="expected tensors on cpu, got meta"):
        ops.pack_signs(w)


@needs_native
@pytest.mark.parametrize(
    ("backend", "layer"),
    [
        *itertools.product(["reference", "cpu"], FEW),
        # Triton's interpreter takes seconds; one of either kind of product is enough here.
        *(
            pytest.param("triton", n, marks=needs_triton if n in INTERPRETED else [needs_triton, pytest.mark.slow])
            for n in FEW
        ),
    ],
)
def test_layers_follow(backend: str, layer: str) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("layers on the CPU")
    for kind in ("usf", "fa"):
        module, x = build(layer, kind)
        expected = gradients(module, x)
        with bk.backends.use(backend):
            actual = gradients(module, x)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "BIOPLAUS_BACKEND")}
    return fresh.run(code, environment=clean | environment)


def test_environment() -> None:
    code = "import bioplaus_kernels as bk; print(bk.backends.chosen(), bk.ops.feedback_mm.__module__)"
    done = run(code, BIOPLAUS_BACKEND="reference")
    assert done.stdout.split() == ["reference", "bioplaus_kernels.backends.reference.feedback_mm"], done.stderr
    done = run(code, BIOPLAUS_BACKEND="tpu")
    assert done.returncode != 0 and "backend 'tpu' cannot be used: expected one of" in done.stderr
    if not torch.cuda.is_available():
        done = run(code, BIOPLAUS_BACKEND="cuda")
        assert done.returncode != 0 and "backend 'cuda' cannot be used: n" in done.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
def test_import_leaves_triton_alone() -> None:
    done = run("import sys, bioplaus_kernels; print('bioplaus_kernels.backends.triton' in sys.modules)")
    assert done.stdout.strip() == str(torch.cuda.is_available()), done.stderr


def test_the_report_says_who_serves() -> None:
    def of(op: str, device: str) -> tuple[str, str]:
        return next(c[2:] for c in bk.backends.choices() if c[:2] == (op, device))

    with bk.backends.use("reference"):
        assert of("feedback_mm", "cpu") == ("reference", "chosen")
    if native.library is not None:
        assert of("feedback_mm", "cpu") == ("cpu", "")
        with bk.backends.use("cpu"):
            assert of("feedback_mm", "cuda") == ("cpu", "chosen: raises on this device")
    if not bk.backends.unavailable("triton"):
        with bk.backends.use("triton"):
            assert of("feedback_mm", "cuda") == ("triton", "chosen")
            assert of("pack_signs", "cpu")[0] in ("cpu", "reference")


@needs_native
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiled_in_one_graph_and_anew_for_another_choice(backend: str) -> None:
    module = bk.nn.Linear(6, 4, feedback="usf")
    x = torch.randn(3, 6, requires_grad=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: module(x), fullgraph=True, backend=counter)
    expected = gradients(module, x)
    graphs = []
    for choice in (None, backend, backend):
        with bk.backends.use(choice):
            for _ in range(2):
                for a, e in zip(gradients(compiled, x, module.weight, module.bias), expected, strict=True):
                    torch.testing.assert_close(a, e)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2]


# --- the rule ---

BOTH = ("cublas", "cuda", "triton")
ENTRIES = ("constant", "stored", "uniform", "normal")


def chosen(m: int, n: int, k: int, element: int, source: float, entries: str, arch: str) -> str:
    return rule.least(rule.times(rule.Product(m, n, k, element, source, entries), arch), BOTH)


@pytest.mark.parametrize("arch", rule.ARCHITECTURES)
def test_the_rule_is_total_and_positive(arch: str) -> None:
    sizes = (1, 3, 16, 17, 128, 4096, 100_000)
    for m, n, k in itertools.product(sizes, repeat=3):
        for element, source, entries in itertools.product((2, 4), (0, 0.125, 4), ENTRIES):
            times = rule.times(rule.Product(m, n, k, element, source, entries), arch)
            assert all(0 < t < 1e6 for t in times.values())
            assert rule.least(times, BOTH) in BOTH
            assert rule.least(times, ("cublas",)) == "cublas"


def test_the_rule_by_hand() -> None:
    # One row, float32, 4096 x 4096, A100, B's source packed signs: 2 MiB, 1 microsecond, against B written and read, 8
    # times 16 MiB and more, 67 microseconds.
    p = rule.Product(1, 4096, 4096, 4, 0.125, "constant")
    times = rule.times(p, "sm_80")
    assert times["cublas"] == pytest.approx(2 * 4e-6 + (0.125 + 4) * 2**24 / 2e12 + (4 * 2**24 + 2 * 4 * 4096) / 2e12)
    # 16 tiles of 8 x 256, in 8 parts of K: 128 blocks on 108 processors are two waves, each as long as a block.
    operations = 2 * (4 * 2 * 8 * 256 * 4096 / 8) / (624e12 / 108 * 0.6)
    sums = 4e-6 + 2 * 8 * 8 * 4096 / 2e12
    moved = (0.125 * 2**24 + 4 * 4096 + 4 * 4096) / 2e12
    seconds = 2 * 4e-6 + (4 + 4) * 4096 / 2e12 + sums + max(operations, moved)
    assert times["cuda"] == pytest.approx(seconds)
    # A weight's signs are packed first: another kernel, its bytes read, 2 bits an entry written.
    packed_first = rule.times(rule.Product(1, 4096, 4096, 4, 4, "constant"), "sm_80")["cuda"]
    assert packed_first == pytest.approx(seconds + 4e-6 + 4.25 * 2**24 / 2e12)
    # bf16, uniform, 300 rows: 3 x 64 tiles of 128 x 64 are two waves on 108. 25 instructions form an entry for each of
    # the 3 rows of tiles, at 9.75 of them a picosecond: more than the tensor cores' time.
    times = rule.times(rule.Product(300, 4096, 4096, 2, 0, "uniform"), "sm_80")
    assert times["cuda"] == pytest.approx(4e-6 + 25 * 3 * 2**24 / 9.75e12 * (2 * 108 / 192))
    assert 2 * 384 * 2**24 / (312e12 * 0.6) < 25 * 3 * 2**24 / 9.75e12
    # float32, stored, 128 rows: 128 tiles of 128 x 32 in two parts of K are three waves; forming and FMA share
    # their units, and the sums are written and read.
    times = rule.times(rule.Product(128, 4096, 4096, 4, 4, "stored"), "sm_80")
    two = 2 * 4e-6 + 2 * (2 * 4 * 128 * 4096 / 2e12)
    work = 3 * 108 / 256 * (2 * 128 * 2**24 / (19.5e12 * 0.6) + 2 * 5 * 2**24 / 19.5e12)
    assert times["cuda"] == pytest.approx(two + work)


def test_the_choice_of_the_rule() -> None:
    assert chosen(1, 4096, 4096, 4, 0.125, "constant", "sm_80") == "cuda"
    # Large and in float32: four digits at 624 against 19.5 tera-operations.
    assert chosen(4096, 4096, 4096, 4, 4, "constant", "sm_80") == "cuda"
    # sm_80's instructions reach a quarter of a B200.
    assert chosen(4096, 4096, 4096, 4, 4, "constant", "sm_100") == "triton"
    # Uniform draws in bf16 with many rows: B once, and the vendor's product.
    assert chosen(8192, 4096, 4096, 2, 0, "uniform", "sm_90") == "cublas"
    # MI300X has no CUDA C++.
    assert "cuda" not in rule.times(rule.Product(1, 64, 64, 4, 4, "constant"), "gfx942")


def test_tiles_of_the_rule_are_the_cuda_kernels() -> None:
    source = (Path(__file__).parents[1] / "csrc" / "cuda" / "feedback_mm_digits.cu").read_text()
    # (blocks of 8 rows and two digits a warp, warps along M, along N), each of 64 columns
    shapes = [tuple(map(int, found)) for found in re.findall(r"using \w+ = Tile<(\d), (\d), (\d)>;", source)]
    digits = [(blocks * along_m, 64 * along_n) for blocks, along_m, along_n in shapes]
    assert "kWarpColumns = 64;" in source and len(digits) == 3
    for name, rows in (("digits4", 4), ("digits2", 8)):
        assert rule.TILES["cuda"]["sm_80"][name] == tuple((rows * blocks, columns) for blocks, columns in digits)
    source = (Path(__file__).parents[1] / "csrc" / "cuda" / "feedback_mm.cu").read_text()
    half = re.search(r"struct HalfTile \{.*?kRows = (\d+);.*?kCols = (\d+);", source, re.S)
    assert rule.TILES["cuda"]["sm_80"]["half"] == (tuple(map(int, half.groups())),)
    floats = [tuple(map(int, found)) for found in re.findall(r"using \w+ = FloatTile<(\d+), (\d+), \d+>;", source)]
    assert rule.TILES["cuda"]["sm_80"]["float32"] == tuple((8 * m, 4 * n) for m, n in floats) and len(floats) == 2


@pytest.mark.parametrize("arch", rule.ARCHITECTURES)
def test_tiles_of_the_rule_are_tritons(arch: str) -> None:
    configs = pytest.importorskip("bioplaus_kernels.backends.triton.configs")
    entries = {"digits4": "constant", "digits2": "constant", "half": "uniform", "float32": "uniform"}
    for kind, tiles in rule.TILES["triton"][arch].items():
        assert tiles == tuple((t.rows, t.columns) for t in configs.TABLES[arch][kind]), kind
        for m, n, k in itertools.product((1, 16, 17, 200), (100, 4096), (300, 512, 5000)):
            p = rule.Product(m, n, k, 2 if kind in ("digits2", "half") else 4, 0, entries[kind])
            rows, columns = rule.tile("triton", p, arch)
            found = rule.parts("triton", kind, k, arch, -(-m // rows) * -(-n // columns))
            assert found == configs.parts(kind, arch, m, n, k), (kind, m, n, k)


def test_parts_of_the_rule_are_the_cuda_kernels() -> None:
    # feedback_mm_digits.cu's sign_splits and feedback_mm.cu's tile_splits, by hand.
    for m, n, k, entries, element, parts in (
        (1, 4096, 4096, "constant", 4, 8),  # 16 tiles; 64 stages are 8 parts of 8
        (1, 512, 65536, "constant", 4, 128),  # 2 tiles
        (4096, 4096, 4096, "constant", 4, 1),
        (1, 512, 500, "constant", 4, 1),  # 8 stages: one part
        (1, 512, 1000, "constant", 2, 2),
        (16, 4096, 4096, "uniform", 4, 16),
        (128, 4096, 4096, "stored", 2, 4),  # 64 tiles
        (128, 4096, 600, "stored", 2, 2),
    ):
        p = rule.Product(m, n, k, element, 0, entries)
        rows, columns = rule.tile("cuda", p, "sm_80")
        assert rule.parts("cuda", rule.kind(p), k, "sm_80", -(-m // rows) * -(-n // columns)) == parts, (
            m,
            n,
            k,
            entries,
        )


def test_a_tie_goes_to_the_vendor() -> None:
    assert rule.least({"cuda": 1.0, "cublas": 1.0, "triton": 1.0}, BOTH) == "cublas"


def test_the_rule_for_locally_connected_products() -> None:
    p = rule.LocalProduct(64, 64 * 576 * 196, 576 * 196, 2)
    for arch in rule.ARCHITECTURES:
        times = rule.local_times(p, arch)
        assert all(t > 0 for t in times.values())
        assert rule.least(times, ("reference", "cuda", "triton")) != "reference"


def test_the_rule_is_traced_with_any_batch() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        way = rule.least(rule.times(rule.Product(x.shape[0], 512, x.shape[1], 4, 0.125, "constant"), "sm_90"), BOTH)
        return x + {"cublas": 1, "cuda": 2, "triton": 3}[way]

    compiled = torch.compile(f, fullgraph=True, backend="eager", dynamic=True)
    for m in (3, 64, 4096):
        x = torch.zeros(m, 512)
        assert torch.equal(compiled(x), f(x))


@needs_native
@needs_triton
@pytest.mark.parametrize("way", BOTH)
def test_the_automatic_product_takes_the_way_of_the_rule(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = pytest.importorskip("bioplaus_kernels.backends.triton.configs")
    taken = []
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_80")
    monkeypatch.setattr(rule, "least", lambda estimates, ways: way)

    def record(name: str):
        def op(g: torch.Tensor, *rest: object) -> torch.Tensor:
            taken.append(name)
            return g.new_empty(g.shape[0], rest[-1])

        return op

    monkeypatch.setattr(ops, "_bind", lambda function: record("cuda"))
    monkeypatch.setattr(ops, "_triton", lambda name: record("triton"))
    op = ops._automatic_feedback_mm()
    with FakeTensorMode(allow_non_fake_inputs=True):
        g, w = torch.empty(4, 6, device="cuda"), torch.empty(6, 5, device="cuda")

        def form(*arguments: object, dtype: torch.dtype) -> torch.Tensor:
            taken.append("cublas")
            return torch.empty(arguments[-1], dtype=dtype, device="cuda")

        monkeypatch.setattr(ops, "feedback_weight", form)
        assert op(g, w, None, None, None, "constant", 1.0, 5).shape == (4, 5)
        assert taken == [way]
        # What no kernel of ours is for goes where the dispatcher sends it.
        op(g.double(), w, None, None, None, "constant", 1.0, 5)
        op(g.cpu(), w.cpu(), None, None, None, "constant", 1.0, 5)
        assert taken == [way, "cuda", "cuda"]
