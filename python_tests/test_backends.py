"""Choosing a backend: explicitly, by the environment, and by the rule, which needs no GPU to be asked."""

import functools
import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import fresh
import pytest
import torch
from small import FEW, build, gradients
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import bioplaus_kernels as bk
from bioplaus_kernels import ops
from bioplaus_kernels.backends import choice, native, reference

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
    with pytest.raises(ValueError, match="backend: expected one of reference, cpu, cuda, triton, got 'cudnn'"):
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


def interpreted_rightly(backend: str) -> AbstractContextManager[None]:
    if backend != "triton":
        return nullcontext()
    import interpreter

    return interpreter.checked()


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
        with bk.backends.use(backend), interpreted_rightly(backend):
            actual = gradients(module, x)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "BIOPLAUS_BACKEND")}
    return fresh.run(code, environment=clean | environment)


@pytest.mark.slow
def test_environment() -> None:
    code = "import bioplaus_kernels as bk; print(bk.backends.chosen(), bk.ops.feedback_mm.__module__)"
    done = run(code, BIOPLAUS_BACKEND="reference")
    assert done.stdout.split() == ["reference", "bioplaus_kernels.backends.reference.feedback_mm"], done.stderr
    done = run(code, BIOPLAUS_BACKEND="tpu")
    assert done.returncode != 0 and "backend: expected one of reference, cpu" in done.stderr
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
    for which in (None, backend, backend):
        with bk.backends.use(which):
            for _ in range(2):
                for a, e in zip(gradients(compiled, x, module.weight, module.bias), expected, strict=True):
                    torch.testing.assert_close(a, e)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2]


# --- the automatic choice on a GPU ---

A100, RTX4090, H100, B200, B300 = (choice.Gpu(c, True, True) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3)))
T4 = choice.Gpu((7, 5), False, False)
W = torch.empty(4096, 4096, device="meta")


def chosen(
    gpu: choice.Gpu, m: int, dtype: torch.dtype, weight: torch.Tensor | None = W, entries: str = "constant"
) -> str:
    g = torch.empty(m, 4096, dtype=dtype, device="meta")
    return choice.way("feedback_mm", (g, weight, None, None, None, entries, 1.0, 4096), gpu)


@pytest.mark.parametrize(
    "gpu", [A100, RTX4090, H100, B200, B300, T4, H100._replace(triton=False), H100._replace(cuda=False)]
)
def test_the_choice_takes_only_what_is_there(gpu: choice.Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    for tf32, dtype, m, weight, entries in itertools.product(
        (False, True), reference.checks.DTYPES, (0, 1, 64, 65, 300, 4096), (W, None), ("constant", "stored", "uniform")
    ):
        monkeypatch.setattr(choice, "tf32", lambda tf32=tf32: tf32)
        way = chosen(gpu, m, dtype, weight, entries)
        assert way in {
            *(("digits", "int_mm", "formed") if gpu.cuda else ("reference",)), *(("triton",) if gpu.triton else ())
        }  # fmt: skip
        if entries != "constant" or dtype == torch.float64:
            assert way == ("formed" if gpu.cuda else "reference")
        elif dtype == torch.float32 and gpu.cuda and not tf32 and gpu is not B300 and m > 0:
            # Bits that neither shape nor GPU decides.
            assert way in ("digits", "int_mm")
        for name in ("lc_forward", "lc_backward_input", "lc_backward_weight"):
            lc = choice.way(name, (torch.empty(1, dtype=dtype, device="meta"),), gpu)
            triton = gpu.triton and dtype != torch.float64
            assert lc == ("triton" if triton else "cuda" if gpu.cuda else "reference")


def test_the_thresholds() -> None:
    half, float32 = torch.bfloat16, torch.float32
    assert [chosen(H100, m, half) for m in (1, 2048, 2049)] == ["triton", "triton", "formed"]
    assert [chosen(H100, m, float32) for m in (1, 256, 257)] == ["digits", "digits", "int_mm"]
    assert [chosen(B200, m, float32) for m in (16, 17)] == ["digits", "int_mm"]
    assert [chosen(B300, m, float32) for m in (1, 4096)] == ["triton", "triton"]
    assert chosen(H100._replace(triton=False), 1, half) == "formed"
    assert chosen(H100._replace(cuda=False), 1, float32) == "reference"


def test_tf32_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not choice.tf32()
    before = torch.backends.cuda.matmul.fp32_precision
    for allow in (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
                  lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")):  # fmt: skip
        try:
            allow()
            assert choice.tf32()
            assert chosen(H100, 4096, torch.float32) == "formed" and chosen(H100, 1, torch.float32) == "digits"
            assert chosen(H100, 64, torch.float32) == "formed" and chosen(H100, 64, torch.float32, None) == "digits"
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
            torch.backends.cuda.matmul.allow_tf32 = False


def test_the_choice_is_traced_with_any_batch() -> None:
    ways = ("triton", "formed", "digits", "int_mm")

    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x + ways.index(choice.way("feedback_mm", (x, w, None, None, None, "constant", 1.0, 4096), H100))

    compiled = torch.compile(f, fullgraph=True, backend="eager", dynamic=True)
    w = torch.empty(512, 4096)
    for m in (3, 64, 4096):
        x = torch.zeros(m, 512)
        assert torch.equal(compiled(x, w), f(x, w))


def test_what_a_gpu_is_is_a_constant_of_a_trace(gpus: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked at the first call, driver and library, is nothing that torch.compile could look into."""
    monkeypatch.undo()
    monkeypatch.setattr(choice, "_gpu", functools.cache(lambda index: (bk.backends.unavailable("cuda"), H100)[1]))
    compiled = torch.compile(lambda x: x + choice.gpu(0).capability[0], fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == 9


def test_the_choice_costs_little() -> None:
    """5 µs are some 25 calls of functions."""
    count = 0

    def profile(_: object, event: str, __: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    g = torch.empty(300, 4096, device="meta")
    sys.setprofile(profile)
    choice.way("feedback_mm", (g, W, None, None, None, "constant", 1.0, 4096), H100)
    sys.setprofile(None)
    assert count <= 20, count


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[choice.Gpu]:
    """Two GPUs that are not there; a test may change what they are."""
    found = [H100, T4]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(choice, "gpu", lambda index: found[index])
    return found


@needs_native
@no_gpu
@needs_triton
def test_each_device_gets_the_way_that_is_chosen_for_it(gpus: list, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def record(way: str) -> Any:
        def op(*args: Any, **_: Any) -> str:
            taken.append(args[-1] if way == "by" else way)
            return way

        return op

    monkeypatch.setattr(ops, "_bind", lambda function: record("cuda"))
    monkeypatch.setattr(ops, "_triton", lambda name: record("triton"))
    monkeypatch.setattr(ops, "_by", record("by"))
    for name in reference.OPS:
        monkeypatch.setitem(reference.OPS, name, functools.wraps(reference.OPS[name])(record("reference")))
    mm, pack, forward = (ops._automatic(name) for name in ("feedback_mm", "pack_signs", "lc_forward"))
    with FakeTensorMode():
        for device, expected in (
            ("cuda:0", ["triton", "digits", "formed", "cuda", "triton"]),
            ("cuda:1", ["reference"] * 5),
            ("cpu", ["cuda"] * 5),
        ):
            w = torch.empty(8, 5, device=device)
            for dtype, magnitude, entries in (
                (torch.bfloat16, None, "constant"), (torch.float32, None, "constant"), (torch.float32, w, "stored"),
            ):  # fmt: skip
                g = torch.empty(4, 8, device=device, dtype=dtype)
                mm(g, w, None, magnitude, None, entries, 1.0, in_features=5)
            pack(weight=w)
            forward(w, w, None, [1], [0, 0], [1], 1)
            assert taken == expected, device
            taken.clear()
    gpus[1] = H100
    assert ops._automatic("pack_signs").__name__ == "op" and ops._automatic("pack_signs") is not pack


@needs_native
@no_gpu
def test_gpus_without_kernels_are_named(
    gpus: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One of two with kernels is enough for a backend; which device lacks them is known by device."""
    capabilities = [(7, 5), (9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"NVIDIA {'T4' if index == 0 else 'H200'}")
    importlib.import_module("bioplaus_kernels.__main__").report()
    report = capsys.readouterr().out
    assert "  0: NVIDIA T4, sm_75\n" in report and "  1: NVIDIA H200, sm_90\n" in report
    assert report.count("not served by triton: compute capability 7.5 is below 8.0") == 1
    assert bk.backends.lacks_kernels("triton", 0) == "compute capability 7.5 is below 8.0"
    assert bk.backends.lacks_kernels("triton", 1) == ""
    assert bk.backends.unavailable("triton") == ""
    capabilities[1] = (7, 0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert bk.backends.unavailable("triton") == "compute capability 7.5 is below 8.0"
    if native.library.build_config()["cuda"] is not None:
        assert bk.backends.unavailable("cuda") != ""
        assert {(c.backend, c.reason) for c in bk.backends.choices() if c.device == "cuda"} == {
            ("reference", bk.backends.unavailable("cuda"))
        }
