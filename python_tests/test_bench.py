"""The benchmark itself: gates hold, rows are whole, and every quick case is a pytest-benchmark case.

`pytest python_tests/test_bench.py --benchmark-enable` times them; without it each runs once.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import machine, registry, report, runner
from bench.gate import mm_gate

ROOT = Path(__file__).parents[1]
QUICK = [case for case in registry.cases(quick=True) if case.op != "training_step"]


@pytest.mark.slow
@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case.op} {case.label}")
def test_quick_case(case: registry.Case, benchmark) -> None:
    bench = case.build()
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
    rows = runner.run(registry.Case("op", "label", lambda: bench), seconds=0.01)
    assert [row["variant"] for row in rows] == ["copy", "wrong"]
    assert rows[0]["ratio"] == 1 and rows[0]["peak_bytes"] == x.numel() * 4
    assert rows[0]["ms_p20"] <= rows[0]["ms"] <= rows[0]["ms_p80"]
    assert "ms" not in rows[1]
    text = report.table({"rows": rows, "roofline": {"float32": 1e12, "read": 1e10, "write": 1e10}})
    assert "not timed" in text and "over the bound" in text


def test_header_names_the_machine() -> None:
    header = machine.header()
    assert header["torch"] == torch.__version__ and header["processor"] and header["commit"]


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
    done = bench("run", "--op", "overhead", "--match", "Linear 1x8x8 forward", "--seconds", "0.01", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert {row["op"] for row in json.loads(out.read_text())["rows"]} == {"overhead"}
    done = bench("report", "--results", str(out), "--out", str(tmp_path / "report.md"))
    assert done.returncode == 0, done.stderr
    assert "Linear 1x8x8 forward" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report-overhead.png").stat().st_size > 10_000
