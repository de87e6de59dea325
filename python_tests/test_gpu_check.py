"""scripts/gpu_check.sh where there is no GPU: what needs none runs, what is cut off is kept, another call goes on."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_calls, gpu_check, gpu_stages, gpu_verdict
from bench.gpu_check import Check, Stage
from bioplaus_kernels import backends

ROOT = Path(__file__).parents[1]
# Says a line, then sleeps in a process of its own for as long as it is told.
SLEEPS = """
import os, subprocess, sys
with open(os.environ["BIOPLAUS_RESULTS"], "a") as file:
    file.write('{"stage": "%s", "case": "first", "ok": true, "said": ""}\\n{"cut' % os.environ["BIOPLAUS_STAGE"])
print("before", flush=True)
child = subprocess.Popen(["sleep", sys.argv[1]])
open(sys.argv[2], "a").write(f"{child.pid}\\n")
child.wait()
"""


@pytest.fixture
def check(tmp_path: Path) -> Any:
    """Makes calls of the command that find the last one's state, and an empty OUT."""

    def call(budget: float = 100) -> Check:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return Check(tmp_path / "out", tmp_path / "state", budget, lambda text: None)

    return call


def sleeps(tmp_path: Path, name: str, seconds: float, limit: float = 30) -> Stage:
    script = tmp_path / "sleeps.py"
    script.write_text(SLEEPS)
    return Stage(name, limit, f"{script} {seconds} {tmp_path / name}.pids", needs_gpu=False)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_stage_by_stage_it_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    environment = os.environ | {"OUT": str(tmp_path / "out"), "STATE": str(tmp_path / "state"), "BUDGET": "60"}
    environment |= {"PYTHON": sys.executable, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "BIOPLAUS_COMMIT": "abc"}
    script = ROOT / "scripts" / "gpu_check.sh"
    done = subprocess.run([script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    for stage in gpu_check.STAGES[1:]:
        assert f"\n{stage.name}: skipped, no CUDA device in this machine (torch {torch.__version__}" in done.stdout
    verdict = done.stdout.split("VERDICT\n")[1]
    assert verdict.startswith("machine: no GPU: no CUDA device") and "commit abc" in verdict
    names = ", ".join(stage.name for stage in gpu_check.STAGES[1:])
    assert verdict.splitlines()[-1].startswith(f"not done: {names}: skipped, no CUDA")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"stages.json", "results.jsonl", "log.txt", "verdict.txt"}
    wrong = subprocess.run([script, "nonsense"], env=environment, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "expected stages of machine, " in wrong.stderr


def test_a_stage_that_is_cut_off_keeps_what_it_wrote(tmp_path: Path, check: Any) -> None:
    slow = sleeps(tmp_path, "slow", 60, limit=2)
    call = check()
    start = time.monotonic()
    call.run([slow], again=False)
    assert time.monotonic() - start < 10
    assert call.records["slow"]["status"] == "cut"
    assert [r["case"] for r in call.results()] == ["first"]  # without the half line
    assert "before" in (tmp_path / "out" / "log.txt").read_text()
    assert "not done: slow: cut off at its limit of 2 s" in (tmp_path / "out" / "verdict.txt").read_text()
    pids = (tmp_path / "slow.pids").read_text().split()
    while any(alive(int(pid)) for pid in pids):
        assert time.monotonic() - start < 20, "what the stage started runs on"
        time.sleep(0.05)


def test_another_call_goes_on(tmp_path: Path, check: Any) -> None:
    stages = [sleeps(tmp_path, "fast", 0), sleeps(tmp_path, "slow", 60, limit=2)]
    check().run(stages, again=False)

    def runs() -> list[int]:
        return [len((tmp_path / f"{name}.pids").read_text().split()) for name in ("fast", "slow")]

    assert runs() == [1, 1]
    stages = [stage if stage.name == "fast" else sleeps(tmp_path, "slow", 0) for stage in stages]
    stages = [replace(stage, needs_gpu=True) for stage in stages]
    check().run(stages, again=False)
    assert runs() == [1, 2]
    call = check()
    call.run(stages[:1], again=True)
    assert runs() == [2, 2]
    # What a stage found is its last run's.
    assert [r["stage"] for r in call.results()] == ["slow", "slow", "fast"]


@pytest.mark.slow
def test_the_budget_holds(tmp_path: Path, check: Any) -> None:
    start = time.monotonic()
    call = check(budget=6)
    call.run([sleeps(tmp_path, "slow", 60), sleeps(tmp_path, "late", 0)], again=False)
    assert time.monotonic() - start < 10
    assert call.records["slow"]["status"] == "cut" and call.records["slow"]["limit"] < 6
    assert call.records["late"] == {"status": "skipped", "why": "no time left of BUDGET", "commit": ""}
    assert not (tmp_path / "late.pids").exists()


def test_a_benchmark_that_its_own_budget_ended_goes_on(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call = check()
    left = ["feedback_mm: a case"]
    monkeypatch.setattr(gpu_check, "RUN", "-c pass")
    stage = Stage("bench", 9, "-c pass")
    for expected in ("cut", "done", "done"):
        call._bench().write_text(json.dumps({"rows": [], "left_out": left}))
        call.run([stage], again=False)
        assert call.records["bench"]["status"] == expected
        left = [] if expected == "cut" else ["not run again"]


def test_what_was_prepared_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("build/gpu", "bioplaus_kernels", "csrc", "filled/key"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("setup.py", "CMakeLists.txt", "csrc/a.cu", "build/gpu/_C.so", "filled/key/kernel.cubin"):
        (tmp_path / name).write_text(name)
    prepared, cache = tmp_path / "build" / "gpu", tmp_path / "cache"
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "PREPARED", prepared)
    monkeypatch.setattr(gpu_check, "STAMP", tmp_path / "stamp")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    assert gpu_check.install_prepared() == "nothing was prepared"
    subprocess.run(["tar", "-C", tmp_path / "filled", "-czf", prepared / "triton.tar.gz", "."], check=True)
    (prepared / "sources").write_text(gpu_check.fingerprint())
    assert "was put into the package" in gpu_check.install_prepared()
    assert (tmp_path / "bioplaus_kernels" / "_C.so").read_text() == "build/gpu/_C.so"
    assert (cache / "key" / "kernel.cubin").exists()
    call = Check(tmp_path / "out", tmp_path / "out", 100, lambda text: None)
    build = next(stage for stage in gpu_check.STAGES if stage.name == "build")
    call.run([build], again=False)
    assert call.records["build"]["why"] == "the library loads"
    # Of other sources: neither what was prepared nor what it has become is used.
    (tmp_path / "csrc" / "a.cu").write_text("changed")
    assert "of other sources" in gpu_check.install_prepared()
    assert call._why_not(build) is None


def test_files_are_few_and_small(tmp_path: Path) -> None:
    long = tmp_path / "log.txt"
    long.write_bytes(b"a" * 5000 + b"z" * 5000)
    gpu_check.cut(long, 4096)
    text = long.read_text()
    assert len(text) <= 4096 and text.startswith("aaa") and text.endswith("zzz") and "bytes cut" in text
    gpu_check.cut(long, 4096)
    assert long.read_text() == text
    # Those of every stage, and a bench that was cut off while it wrote.
    source = Path(gpu_check.__file__).read_text()
    names = {word.split('"')[0] for word in source.split('_file("')[1:]} | {"cuda-{slug}.tmp"}
    assert not names ^ {
        "stages.json", "results.jsonl", "log.txt", "verdict.txt", "sanitizer.txt", "counters.csv", "cuda-{slug}.tmp"
    }  # fmt: skip
    assert len(names | {"cuda-{slug}.json"}) <= 8


def test_tests_are_written_at_once_and_not_repeated(tmp_path: Path, check: Any) -> None:
    (tmp_path / "test_it.py").write_text(
        "import os\ndef test_good(): open('ran', 'a').write('x')\ndef test_bad(): assert 1 == 2\n"
        "def test_ends(): os._exit(3)\n"
    )
    command = f"-m pytest -q -p bench.gpu_tests -p no:cacheprovider --rootdir {tmp_path} {tmp_path / 'test_it.py'}"
    (ROOT / "ran").unlink(missing_ok=True)
    stage = Stage("tests-it", 60, command, (0, 1), needs_gpu=True)
    try:
        for outcome in (["passed", "failed"], ["passed", "failed", "failed"]):
            call = check()
            call.run([stage], again=False)
            assert call.records["tests-it"]["status"] == "failed"
            assert [r["outcome"] for r in call.results() if "test" in r] == outcome
        assert (ROOT / "ran").read_text() == "x"
    finally:
        (ROOT / "ran").unlink(missing_ok=True)
    lines = gpu_verdict.found("tests-it", call.results())
    assert lines == ["1 passed, 1 failed, 0 skipped", "  test_it.py::test_bad: assert 1 == 2"]


def test_a_worker_without_its_gpu_gives_way(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text(
        "import torch\nlost = []\ntorch.cuda.is_available = lambda: True\n"
        "def synchronize():\n    if lost: raise RuntimeError('an illegal memory access was encountered')\n"
        "torch.cuda.synchronize = synchronize\n"
    )
    (tmp_path / "test_it.py").write_text(
        "import conftest, pytest\n"
        "@pytest.mark.parametrize('n', range(6))\n"
        "def test(n):\n"
        "    if n == 1: conftest.lost.append(1)\n"
        "    assert not conftest.lost\n"
    )
    environment = os.environ | {"BIOPLAUS_RESULTS": str(tmp_path / "r"), "BIOPLAUS_STAGE": "s", "BIOPLAUS_BEFORE": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu_tests", "-n", "1", "--rootdir", str(tmp_path)]
    subprocess.run(
        [*command, str(tmp_path / "test_it.py")], cwd=ROOT, env=environment, capture_output=True, check=False
    )
    found = {r["test"][-2]: r["outcome"] for r in gpu_verdict.lines(tmp_path / "r")}
    assert found == {str(n): "failed" if n == 1 else "passed" for n in range(6)}


def row(case: str, variant: str, ms: float, **more: Any) -> dict[str, Any]:
    return {
        "op": "feedback_mm",
        "case": case,
        "state": "graph",
        "variant": variant,
        "ms": ms,
        "error_over_bound": 0.5,
    } | more


def test_the_verdict(tmp_path: Path) -> None:
    results = [
        {"stage": "machine", "gpu": "Test GPU", "said": "Test GPU, sm_90"},
        {"stage": "cuda", "case": "feedback_mm", "ok": True, "said": ""},
        {"stage": "cuda", "case": "pack_signs", "ok": False, "said": "error 3 of its bound"},
        {"stage": "triton", "said": "the package triton is not installed"},
        {"stage": "tests-cuda", "test": "a::b", "outcome": "failed", "said": "x\nE   assert 1 == 2\nE    more"},
        {"stage": "tests-cuda", "test": "a::c", "outcome": "failed", "said": "x"},
        {"stage": "tests-cuda", "test": "a::c", "outcome": "passed", "said": ""},
    ]
    done = {"status": "done", "seconds": 1.0}
    records: dict[str, Any] = dict.fromkeys(("machine", "cuda", "triton", "tests-cuda"), done)
    records["headline"] = {"status": "cut", "seconds": 100.0, "limit": 100.0}
    bench = tmp_path / "cuda-test.json"
    bench.write_text(
        json.dumps(
            {
                "rows": [
                    row("4096x4096 M=8 float32", "torch dY @ W", 0.02),
                    row("4096x4096 M=8 float32", "torch dY @ W, TF32", 0.01),
                    row("4096x4096 M=8 float32", "usf, signs from W", 0.03),
                    row("4096x4096 M=8 float32", "usf, signs from W, cuda", 0.03),
                    row("4096x4096 M=8 float32", "usf, signs from W, triton", 0.01),
                    row("4096x4096 M=8 float32", "usf, signs from W, int_mm", 0.01) | {"error_over_bound": 2.0},
                    row("4096x4096 M=8 float32", "fa seeded, ±s", 0.01, state="warm", host_ms=0.04),
                    {**row("4096x4096 M=8 float32", "usf, packed signs, triton", 0), "failed": "MemoryError: no"},
                ]
            }
        )
    )
    text = gpu_verdict.text(results, records, bench)
    assert text.splitlines()[:9] == [
        "VERDICT",
        "machine: Test GPU, sm_90",
        "cuda: alive, 1 of 2 right",
        "  pack_signs: error 3 of its bound",
        "triton: dead: the package triton is not installed",
        "tests-cuda: 1 passed, 1 failed, 0 skipped",
        "  a::b: assert 1 == 2",
        "bench: 8 rows, 1 failed, 1 over the error bound",
        "  feedback_mm 4096x4096 M=8 float32, usf, packed signs, triton: MemoryError: no",
    ]
    assert "  4096x4096 M=8 float32: 20 µs; usf, signs from W 1.50 | torch dY @ W, TF32 0.50" in text
    assert "  3.00 feedback_mm 4096x4096 M=8 float32, usf, signs from W; least: triton" in text
    assert "  automatic: 40 (4096x4096 M=8 float32, fa seeded, ±s)" in text
    assert text.endswith("not done: headline: cut off at its limit of 100 s")
    assert not gpu_verdict.clean(results, records)
    assert gpu_verdict.clean(results[:2], {"machine": done, "cuda": done})


@pytest.mark.slow
@pytest.mark.skipif(backends.unavailable("cpu") != "", reason="its calls are those of every backend")
def test_the_calls_know_what_is_right() -> None:
    with backends.use("cpu"):
        calls = list(gpu_calls.calls("cpu"))
        assert {call.name.split()[0] for call in calls} == set(backends.reference.OPS)
        for call in calls:
            result = call.run()
            assert call.error(result) <= 1, call.name
            if result.is_floating_point() and result.numel():
                result[(0,) * result.dim()] += result.abs().max()
            else:
                result.view(-1)[0] += 1
            assert call.error(result) > 1, call.name


@pytest.mark.slow
def test_what_a_user_does(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_stages.step("lenet", "fa", "", device="cpu")
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda x: -model(x))
    gpu_stages.step("lenet", "fa", "", device="cpu")
    right, wrong = capsys.readouterr().out.splitlines()
    assert "'ok': True" in right
    assert "'ok': False" in wrong and "differ" in wrong


@pytest.mark.slow
def test_the_cache_is_filled_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    code = (
        "from bench import gpu_prepare; from itertools import islice\n"
        "for name, run in islice(gpu_prepare.launches(), 2): run()"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sm_90" in "".join(path.read_text() for path in tmp_path.rglob("*.ptx"))
