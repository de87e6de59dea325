"""Choosing a backend: explicitly, by the environment, and by the rule, which needs no GPU to be asked."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

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
@pytest.mark.parametrize("layer", FEW)
@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=needs_triton)])
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
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=False
    )


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


def chosen(m: int, n: int, k: int, element: int, source: float, constant: bool, arch: str) -> str:
    return rule.least(rule.times(rule.Product(m, n, k, element, source, constant), arch), BOTH)


@pytest.mark.parametrize("arch", rule.ARCHITECTURES)
def test_the_rule_is_total_and_positive(arch: str) -> None:
    sizes = (1, 3, 16, 17, 128, 4096, 100_000)
    for m, n, k in itertools.product(sizes, repeat=3):
        for element, source, constant in itertools.product((2, 4), (0, 0.125, 2, 4), (False, True)):
            times = rule.times(rule.Product(m, n, k, element, source, constant), arch)
            assert all(0 < t < 1e6 for t in times.values())
            assert rule.least(times, BOTH) in BOTH
            assert rule.least(times, ("cublas",)) == "cublas"


def test_the_rule_by_hand() -> None:
    # At one row the product is bound by what is read of B. 4096 x 4096, A100: packed signs 2 MiB, 1 microsecond,
    # against B written and read in float32, 3 x 64 MiB, 67 microseconds and more.
    p = rule.Product(1, 4096, 4096, 4, 0.125, True)
    times = rule.times(p, "sm_80")
    assert times["cublas"] == pytest.approx(2 * 4e-6 + (0.125 + 4) * 2**24 / 2e12 + (4 * 2**24 + 2 * 4 * 4096) / 2e12)
    # 32 tiles of columns on 108 processors: 27/8 of the time of the operations, 16 times too many rows of them.
    operations = 4 * 2 * 2**24 / (624e12 * 0.6) * 16 * (108 / 32)
    moved = (0.125 * 2**24 + 4 * 4096 + 4 * 4096) / 2e12
    assert times["cuda"] == pytest.approx(2 * 4e-6 + (2 * 4 + 4) * 4096 / 2e12 + max(operations, moved))
    assert chosen(1, 4096, 4096, 4, 0.125, True, "sm_80") == "cuda"
    # Large and in float32: four digits at 624 against 19.5 tera-operations.
    assert chosen(4096, 4096, 4096, 4, 4, True, "sm_80") == "cuda"
    # sm_80's instructions reach a quarter of a B200.
    assert chosen(4096, 4096, 4096, 4, 4, True, "sm_100") == "triton"
    # Uniform draws in bf16 with many rows: B once, and the vendor's product.
    assert chosen(8192, 4096, 4096, 2, 0, False, "sm_90") == "cublas"
    # MI300X has no CUDA C++.
    assert "cuda" not in rule.times(p, "gfx942")


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
        way = rule.least(rule.times(rule.Product(x.shape[0], 512, x.shape[1], 4, 0.125, True), "sm_90"), BOTH)
        return x + {"cublas": 1, "cuda": 2, "triton": 3}[way]

    compiled = torch.compile(f, fullgraph=True, backend="eager", dynamic=True)
    for m in (3, 5, 64, 1000, 4096):
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
