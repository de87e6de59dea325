"""The benchmark itself: gates hold, rows are whole, and every quick case is a pytest-benchmark case.

`pytest python_tests/test_bench.py --benchmark-enable` times them; without it each runs once.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure

import bioplaus_kernels as bk
from bench import __main__ as command
from bench import device, feedback_mm, machine, pictures, registry, report, runner
from bench.gate import mm_gate
from bioplaus_kernels.backends import native
from recipes.pictures import apart

ROOT = Path(__file__).parents[1]
QUICK = [case for case in registry.cases(quick=True) if case.op != "training_step"]


@pytest.mark.slow
@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case.op} {case.label}")
def test_quick_case(case: registry.Case, benchmark) -> None:
    bench = case.build(device.Cpu())
    # torch's bf16 parts are there to be seen failing.
    for name, gate in bench.gate.items():
        assert name.startswith("three bf16 parts") == (gate() > 1), name
    ours = next(reversed(bench.variants))
    benchmark(bench.variants[ours])


def test_gate_tells_right_from_wrong() -> None:
    g, b = torch.randn(8, 64), torch.randn(64, 32)
    assert mm_gate(g @ b, g, b) <= 1
    assert mm_gate(g @ b * (1 + 1e-5), g, b) > 1
    assert mm_gate((g.bfloat16() @ b.bfloat16()).float(), g, b) > 1


def test_rows_hold_what_the_report_shows() -> None:
    x = torch.ones(1 << 16)
    bench = registry.Bench(
        {"copy": lambda: x.clone(), "wrong": lambda: x},
        {"wrong": lambda: 2.0},
        work=(registry.Work(flops=1e3, read=x.nbytes, written=x.nbytes),),
    )
    rows = runner.run(registry.Case("op", "label", lambda _: bench), 0.01, device.Cpu())
    assert [row["variant"] for row in rows] == ["copy", "wrong"]
    assert rows[0]["ratio"] == 1 and rows[0]["peak_bytes"] == x.numel() * 4
    assert rows[0]["ms_p20"] <= rows[0]["ms"] <= rows[0]["ms_p80"]
    assert "ms" not in rows[1]
    text = report.table({"rows": rows, "roofline": {"float32": 1e12, "read": 1e10, "write": 1e10}})
    assert "not timed" in text and "over the bound" in text


def test_header_names_the_machine() -> None:
    header = machine.header(device.Cpu())
    assert header["torch"] == torch.__version__ and header["processor"] and header["commit"]


def test_commit_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert machine.header(device.Cpu())["commit"] == "unknown"
    monkeypatch.setenv("BIOPLAUS_COMMIT", "v1-2-gabc")
    assert machine.header(device.Cpu())["commit"] == "v1-2-gabc"


def test_roofline_says_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # As CUDA 13 has it: columns of the second operand contiguous.
        if b.is_contiguous():
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")
        return a

    where = OnTestGpu()
    monkeypatch.setattr(torch, "_int_mm", no_kernel)
    assert machine.roofline(where, 0.001)["int8"] > 0
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: no_kernel(a, a))
    peaks = machine.roofline(where, 0.001)
    assert peaks["int8"] == "failed: CUBLAS_STATUS_NOT_SUPPORTED" and peaks["tf32"] > 0
    assert report._rates({"roofline": peaks})["int8"] == peaks["int8"]


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"

    def bench(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "bench", *args], cwd=ROOT, capture_output=True, text=True, check=False
        )

    wrong = bench("run", "--op", "nonsense")
    assert wrong.returncode == 2 and "--op: expected one of" in wrong.stderr
    wrong = bench("run", "--match", "nonsense")
    assert wrong.returncode == 2 and "--match: no label" in wrong.stderr
    quick = ("--patience", "0", "--out", str(out))
    done = bench("run", "--op", "overhead", "--match", "Linear 1x8x8 forward", "--seconds", "0.01", *quick)
    assert done.returncode == 0, done.stderr
    assert {row["op"] for row in json.loads(out.read_text())["rows"]} == {"overhead"}
    done = bench("report", "--results", str(out), "--out", str(tmp_path / "report.md"), "--draft")
    assert done.returncode == 0, done.stderr
    assert "report/overhead.md" in (tmp_path / "report.md").read_text()
    assert "**Linear 1x8x8**" in (tmp_path / "report" / "overhead.md").read_text()


class Gpu:
    """What bench.device asks of torch.cuda: a clock that `work` moves, a cache, and graphs of captured work."""

    L2 = 2**20

    def __init__(self) -> None:
        self.now = self.allocated = self.peak = 0.0
        self.capturing: list[Callable[[], None]] | None = None
        self.cached: object = None
        self.read: list[int] = []

    def is_available(self) -> bool:
        return True

    def get_device_properties(self) -> SimpleNamespace:
        numbers = {"multi_processor_count": 4, "total_memory": 2**34, "L2_cache_size": self.L2}
        return SimpleNamespace(name="Test GPU", major=8, minor=0, uuid="1-2", **numbers)

    def work(self, name: str, seconds: float) -> None:
        """A kernel: ten times as fast where its operands are in the cache."""

        def run() -> None:
            self.now += seconds / 10 if self.cached == name else seconds
            self.cached = name

        run() if self.capturing is None else self.capturing.append(run)

    def Event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(at=None, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now + time.perf_counter())
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event

    def Stream(self) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    @contextmanager
    def stream(self, stream: SimpleNamespace) -> Iterator[None]:
        yield

    def CUDAGraph(self) -> SimpleNamespace:
        graph = SimpleNamespace(launches=[], register_generator_state=lambda generator: None)
        graph.replay = lambda: [launch() for launch in graph.launches]
        return graph

    @contextmanager
    def graph(self, graph: SimpleNamespace) -> Iterator[None]:
        self.capturing = graph.launches
        try:
            yield
        finally:
            self.capturing = None

    def synchronize(self) -> None:
        if self.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    def memory_allocated(self) -> float:
        return self.allocated

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.allocated

    def max_memory_allocated(self) -> float:
        return self.peak


class OnTestGpu(device.Cuda):
    """Tensors lie on the CPU, small ones, and its kernels are the backend to compare."""

    device, backends, product, numbers = torch.device("cpu"), ("cpu",), 64, 2**10

    def __init__(self, gpu: Gpu | None = None) -> None:
        super().__init__(gpu or Gpu())

    def flusher(self) -> Callable[[], object]:
        flush = super().flusher()

        def noted() -> None:
            self.cuda.cached = None
            self.cuda.read.append(flush.__self__.nbytes)
            flush()

        return noted


def test_gpu_states_and_failures() -> None:
    gpu = Gpu()

    def fails() -> None:
        raise MemoryError("out of memory\nand more")

    def waits() -> None:
        gpu.work("waits", 1e-2)
        gpu.synchronize()

    def grows() -> None:
        gpu.work("grows", 2e-2)
        gpu.peak = max(gpu.peak, gpu.allocated + 4096)

    variants = {"base": lambda: gpu.work("base", 4e-2), "waits": waits, "fails": fails, "grows": grows, "wrong": grows}
    bench = registry.Bench(variants, {"wrong": lambda: 3.0})
    rows = runner.run(registry.Case("op", "label", lambda _: bench), 0.0, OnTestGpu(gpu))
    found = {(row["state"], row["variant"]): row for row in rows}
    assert list(found) == [(state, name) for state in ("warm", "cold", "graph") for name in variants]
    for state, seconds in (("warm", 4e-3), ("cold", 4e-2), ("graph", 4e-2)):
        base = found[state, "base"]
        assert base["ms"] == pytest.approx(seconds * 1e3, rel=0.3) and base["ratio"] == 1
        assert found[state, "grows"]["ratio"] == pytest.approx(0.5, rel=0.3)
        assert found[state, "fails"]["failed"] == "MemoryError: out of memory"
        assert "ms" not in found[state, "wrong"] and "failed" not in found[state, "wrong"]
    assert found["warm", "grows"]["peak_bytes"] == 4096
    # What waits for the GPU cannot be captured; nothing but that is lost.
    assert "ms" in found["cold", "waits"] and "capturing" in found["graph", "waits"]["failed"]
    assert gpu.read and min(gpu.read) > gpu.L2
    assert not any("quiet" in row for row in rows)
    text = report.table({"rows": rows, "roofline": {}})
    assert "(cold, CUDA graph)" in text and "MemoryError" in text and "3: over the bound" in text


def test_operands_take_turns_in_a_graph() -> None:
    gpu = Gpu()
    variants, *copies = [{"base": lambda i=i: gpu.work(f"base {i}", 4e-2)} for i in range(4)]
    bench = registry.Bench(variants, copies=copies)
    rows = runner.run(registry.Case("op", "label", lambda _: bench), 0.0, OnTestGpu(gpu), ["graph"])
    # No call finds its operands in the cache, and nothing is read to empty it.
    assert [row["state"] for row in rows] == ["graph"] and rows[0]["ms"] == pytest.approx(40, rel=0.1)
    assert not gpu.read
    assert OnTestGpu(gpu).sets(2**30) == 1 and OnTestGpu(gpu).sets(2**18) * 2**18 > 3 * gpu.L2


def test_what_fails_is_a_row() -> None:
    def broken(_: device.Device) -> registry.Bench:
        raise MemoryError("no room\nat all")

    rows = runner.run(registry.Case("op", "label", broken), 0.0, OnTestGpu())
    assert [(row["state"], row["failed"]) for row in rows] == [
        (state, "MemoryError: no room") for state in ("warm", "cold", "graph")
    ]
    gpu, calls = Gpu(), []

    def fails_late() -> None:
        gpu.work("late", 1e-3)
        calls.append(gpu.now)
        if len(calls) > 3:
            raise RuntimeError("late")

    def no_memory() -> None:
        raise RuntimeError("no statistics")

    gpu.reset_peak_memory_stats = no_memory
    bench = registry.Bench({"base": lambda: gpu.work("base", 1e-3), "late": fails_late})
    base, late = runner.run(registry.Case("op", "label", lambda _: bench), 0.0, OnTestGpu(gpu), ["warm"])
    assert base["ms"] and base["failed"] == "RuntimeError: no statistics" and base["peak_bytes"] is None
    assert late["failed"] == "RuntimeError: late" and "ms" not in late
    assert "RuntimeError: late" in report.table({"rows": [base, late], "roofline": {}})


def test_a_lost_gpu_ends_the_process_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()

    def illegal() -> None:
        gpu.capturing = []  # from now on synchronize raises
        raise RuntimeError("an illegal memory access was encountered")

    variants = {"base": lambda: gpu.work("base", 1e-3), "bad": illegal}
    cases = [registry.Case("op", label, lambda _: registry.Bench(variants)) for label in ("one", "two")]

    class Replaced(Exception):
        pass

    def execv(path: str, words: list[str]) -> None:
        raise Replaced(words)

    out = tmp_path / "cuda.json"
    monkeypatch.setattr(OnTestGpu.__init__, "__defaults__", (gpu,))
    monkeypatch.setattr(device, "Cuda", OnTestGpu)
    monkeypatch.setattr(registry, "cases", lambda *_: cases)
    monkeypatch.setattr(os, "execv", execv)
    words = ["run", "--device", "cuda", "--state", "warm", "--seconds", "0.001", "--threads", "1", "--out", str(out)]
    for _ in cases:
        monkeypatch.setattr(sys, "argv", ["bench", *words, "--budget", "100"])
        with pytest.raises(Replaced) as replaced:
            command.main()
        again = replaced.value.args[0]
        assert again[1:3] == ["-m", "bench"] and again[-3:-1] == ["--continue", "--budget"]
        gpu.capturing = None
        if "--continue" not in words:
            words.append("--continue")
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    command.main()
    rows = json.loads(out.read_text())["rows"]
    assert [(row["case"], row["variant"], "ms" in row) for row in rows] == [
        (case, variant, variant == "base") for case in ("one", "two") for variant in ("base", "bad")
    ]
    assert all("illegal memory" in row["failed"] for row in rows if row["variant"] == "bad")


def test_gpu_without_its_baseline() -> None:
    gpu = Gpu()
    variants = {"base": gpu.synchronize, "other": lambda: gpu.work("other", 1e-2)}
    rows = runner.run(registry.Case("op", "label", lambda _: registry.Bench(variants)), 0.0, OnTestGpu(gpu))
    other = next(row for row in rows if row["state"] == "graph" and row["variant"] == "other")
    assert other["ratio"] is None and other["ms"] > 1
    assert "capturing" in report.table({"rows": rows, "roofline": {}})


@pytest.mark.slow
@pytest.mark.skipif(native.library is None, reason="it is the backend to compare")
def test_gpu_from_the_command_line_to_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows by each backend, and the GPU under a header of its own."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "$@" > $0.asked\necho "580.1, 1410 MHz, 1980 MHz, 2619 MHz, 2619 MHz, 700 W, 41"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(device, "Cuda", OnTestGpu)
    monkeypatch.setattr(feedback_mm, "WAYS", ())  # which take no tensors of the CPU
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    out, cpu = tmp_path / "cuda.json", tmp_path / "cpu.json"
    ops = ("overhead", "locally_connected", "feedback_mm")
    for where, path, match in (
        ("cpu", cpu, "^Linear 1x8x8 forward$"),
        ("cuda", out, "^Linear.*forward$|M=8|N=16 backward input"),
    ):
        monkeypatch.setattr(sys, "argv", ["bench", "run", "--device", where, "--quick", "--match", match])
        sys.argv += [
            "--seconds",
            "0.001",
            "--patience",
            "0",
            "--threads",
            "1",
            "--out",
            str(path),
            *(f"--op={op}" for op in ops),
        ]
        command.main()
    result = json.loads(out.read_text())
    header = result["machine"]
    assert header["gpu"] == "Test GPU" and header["library_level"] == "CUDA sm_80"
    assert header["driver"] == "580.1" and header["clock"] == "1410 MHz" and header["power_limit"] == "700 W"
    assert header["triton"] and header["cuda"] == torch.version.cuda
    assert "--id=GPU-1-2 " in (tmp_path / "nvidia-smi.asked").read_text()
    assert {"float16", "int8", "read", "write"} <= result["roofline"].keys()
    assert {row["op"] for row in result["rows"]} == set(ops)
    assert not [row for row in result["rows"] if "failed" in row]
    timed = {row["variant"] for row in result["rows"] if "ms" in row and row["state"] == "graph"}
    for name in ("usf, packed signs", "fa seeded, uniform", "frsf stored", "bioplaus, usf", "bioplaus, backprop"):
        assert {name, f"{name}, cpu"} <= timed
    assert {"usf, packed signs, feedback_weight + cuBLAS", "torch dY @ W"} <= timed
    report.write([cpu, out], tmp_path / "report.md", draft=True)
    first, second = (tmp_path / "report" / "overhead.md").read_text().split("## Test GPU (CUDA sm_80)")
    assert "Test GPU" not in first and "(cold, CUDA graph)" in second
    assert "| driver " in (tmp_path / "report" / "method.md").read_text()
    assert "## Test GPU (CUDA sm_80)" in (tmp_path / "report.md").read_text()


def _row(case: str, variant: str, ratio: float, op: str = "feedback_mm") -> dict:
    timed = {"state": "warm", "error_over_bound": None, "ms": ratio, "ratio": ratio}
    return {"op": op, "case": case, "variant": variant, **timed}


def test_pages_say_what_is_faster_and_what_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        _row(f"{size} M={batch} float32", variant, ratio)
        for size, scale in (("64x64", 1.0), ("128x128", 4.0))
        for batch in (1, 8)
        for variant, ratio in (("torch dY @ W", 1.0), ("usf, packed signs", 0.2 * scale), ("fa stored", 1.5))
    ]
    steps = {"torch.nn, backprop": 1.0, "usf": 0.5, "fa stored": 1.5}
    layers = {"backprop": 1.0, "bioplaus, usf": 2.0}
    for op, ways in (("training_step", steps), ("convolution", layers)):
        rows += [_row("N=64 net", way, ratio, op) for way, ratio in ways.items()]
    colours: dict[str, set[str]] = {}
    colour = pictures.colour

    def seen(way: str, first: str) -> tuple[str, str]:
        found = colour(way, first)
        colours.setdefault(way.removeprefix("bioplaus, "), set()).add(found[0])
        return found

    monkeypatch.setattr(pictures, "colour", seen)
    said = machine.header(device.Cpu()) | {"library_level": "AMX", "processor": "A, family 6, model 1"}
    result = {"machine": said, "roofline": {}, "rows": rows}
    (tmp_path / "cpu.json").write_text(json.dumps(result))
    report.write([tmp_path / "cpu.json"], tmp_path / "report.md")
    summary, page = ((tmp_path / name).read_text() for name in ("report.md", "report/feedback_mm.md"))
    line = next(line for line in summary.splitlines() if "input gradient of a linear layer" in line)
    _, _, faster, slower, _ = line.split("|")
    assert "usf, packed signs **0.40** (0.20 to 0.80)" in faster and "fa stored **1.50**" in slower
    # A way's colour is the same in the summary and on every page.
    assert colours.keys() == {"torch dY @ W", "usf, packed signs", "fa stored", "torch.nn, backprop", "usf", "backprop"}
    assert all(len(found) == 1 for found in colours.values()) and colours["usf"] == {pictures.COLOURS["usf"]}
    # A panel for each size, an axis of batches.
    found = pictures.panels(result, "feedback_mm")["float32"]
    assert found["128x128"]["usf, packed signs"] == {1: 0.8, 8: 0.8} and list(found) == ["64x64", "128x128"]
    drawn = [path.read_text() for path in sorted(tmp_path.glob("report/*.svg"))]
    assert len(drawn) == 4
    assert all(name in "".join(drawn) for name in ("64x64", "128x128", "net", ">batch<", ">ours, usf<"))
    assert page.count("**0.80** · 0.8 ms") == 2
    assert "(feedback-mm-cpu-amx-family-6-float32.svg)" in page


def test_a_summary_shows_each_processor_once(tmp_path: Path) -> None:
    paths = []
    for processor, level in (("A", "AMX"), ("B", "AVX512_VNNI"), ("A", "AVX2")):
        said = machine.header(device.Cpu()) | {"processor": processor, "library_level": level}
        paths.append(tmp_path / f"{level}.json")
        paths[-1].write_text(json.dumps({"machine": said, "roofline": {}, "rows": [_row("1x1 M=1 float32", "usf", 1)]}))
    report.write(paths, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert text.index("## CPU, AMX\n\nA, ") < text.index("## CPU, AVX512_VNNI\n\nB, ") and "AVX2" not in text
    assert f"version {bk.__version__}" in text


def test_pictures_of_a_gpu_are_of_graphs_and_without_backends_alone() -> None:
    ways = (
        "torch dY @ W",
        "torch dY @ W, TF32",
        "usf",
        "usf, packed signs",
        "usf, triton",
        "usf, packed signs, int_mm",
    )
    rows = [_row("64x64 M=1 float32", way, 1.0) | {"state": state} for state in ("cold", "graph") for way in ways]
    result = {"machine": {"gpu": "Test GPU"}, "rows": [row | {"ratio": 0.5} for row in rows if row["state"] == "graph"]}
    result["rows"] += [row for row in rows if row["state"] == "cold"]
    assert pictures.panels(result, "feedback_mm") == {"float32": {"64x64": {way: {1: 0.5} for way in ways[:4]}}}


@pytest.mark.parametrize("values", [[0.1, 0.1, 0.1], [0.9, 0.95, 1.2], [0.5], []])
def test_labels_are_apart_and_in_order(values: list[float]) -> None:
    placed = apart(Figure().subplots(), values, 0.1)
    assert all(0 <= y <= 1 + 1e-9 for y in placed)
    order = sorted(range(len(values)), key=values.__getitem__)
    assert all(placed[b] - placed[a] >= 0.1 - 1e-9 for a, b in itertools.pairwise(order))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "run", "--device", "cuda"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--device cuda: no CUDA device in this machine (torch " in capsys.readouterr().err
