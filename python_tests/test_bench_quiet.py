"""Quiet samples: which they are, how long a run waits for them, and what becomes of a row with too few."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import __main__ as command
from bench import device, machine, registry, report, runner
from bench.quiet import LEAST, Probe

FAST = 20e-6


class Shared(device.Cpu):
    """A processor on a clock of its own, where everything takes `load(now)` times as long."""

    def __init__(self, load: Callable[[float], float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.load = 0.0, load
        self.probe = self.Probe(self)
        for module in (device, runner):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    class Probe:
        """One that has seen the processor quiet."""

        best = FAST

        def __init__(self, where: "Shared") -> None:
            self.where = where

        def __call__(self) -> float:
            before = self.where.now
            self.where.work(FAST)
            return self.where.now - before

    def work(self, seconds: float) -> None:
        self.now += seconds * self.load(self.now)

    def rows(self, patience: float) -> list[dict]:
        """Of variants that take 1 and 2 ms where nobody else is."""
        variants = {"one": lambda: self.work(1e-3), "two": lambda: self.work(2e-3)}
        return runner.run(
            registry.Case("op", "label", lambda _: registry.Bench(variants)), 0.05, self, patience=patience
        )


def test_what_falls_on_a_spell_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # Spells longer than a sample, and so many that one begins or ends within most of them.
    where = Shared(lambda now: 3.0 if now % 0.0173 > 0.0071 else 1.0, monkeypatch)
    one, two = where.rows(patience=100.0)
    assert one["ms"] == pytest.approx(1) and two["ms"] == pytest.approx(2) and two["ratio"] == pytest.approx(2)
    assert one["ms_p80"] == pytest.approx(1)
    assert one["quiet"] >= LEAST and two["quiet"] >= LEAST
    # It went on until there were enough and no longer.
    assert min(one["quiet"], two["quiet"]) == LEAST and where.now < 5


@pytest.mark.parametrize("slower, counts", [(1.1, True), (1.2, False)])
def test_what_is_quiet(slower: float, counts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for row in Shared(lambda now: slower, monkeypatch).rows(patience=0.5):
        assert (row["quiet"] >= LEAST) == counts and (row["quiet"] > 0) == counts


def test_a_run_waits_for_quiet_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    where = Shared(lambda now: 3.0 if now < 5 else 1.0, monkeypatch)
    assert [row["ms"] for row in where.rows(patience=10)] == pytest.approx([1, 2])
    assert 5 < where.now < 6
    where = Shared(lambda now: 3.0, monkeypatch)
    rows = where.rows(patience=2.0)
    assert 2 < where.now < 2.2
    # All samples are better than none.
    assert [row["ms"] for row in rows] == pytest.approx([3, 6]) and [row["quiet"] for row in rows] == [0, 0]


def test_a_report_wants_quiet_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"machine": machine.header(device.Cpu()) | {"library_level": "AMX"}, "roofline": {"float32": 1e12}}
    result["rows"] = Shared(lambda now: 1.0, monkeypatch).rows(patience=1.0)
    path, out, method = tmp_path / "cpu.json", tmp_path / "report.md", tmp_path / "report" / "method.md"

    def write(**options: bool) -> str:
        path.write_text(json.dumps(result))
        report.write([path], out, **options)
        return out.read_text() + (tmp_path / "report" / "op.md").read_text()

    text = write()
    assert "| quiet samples" in text and "draft" not in text and "fewer than" not in method.read_text()
    result["rows"] += [row | {"case": "noisy", "quiet": LEAST - 1} for row in result["rows"]]
    text = write()
    assert "noisy" not in text and f"fewer than {LEAST} quiet samples: 1 of op." in method.read_text()
    assert "A draft: some rows" in (text := write(draft=True)) and "noisy" in text
    # Results from before quiet samples were counted.
    for row in result["rows"]:
        del row["quiet"]
    assert "| quiet samples" not in write()


def test_a_run_has_a_budget_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def case(label: str) -> registry.Case:
        def build(_: device.Device) -> registry.Bench:
            built.append(label)
            return registry.Bench({"base": lambda: None, "torch.compile": lambda: None})

        return registry.Case("op", label, build)

    monkeypatch.setattr(registry, "cases", lambda *_: [case("one"), case("two")])
    monkeypatch.setattr(machine, "roofline", lambda *_: {})
    out = tmp_path / "cpu.json"

    def run(*words: str) -> dict:
        settings = "--seconds=0.001", "--patience=0", "--threads=1", "--without=torch.compile"
        monkeypatch.setattr(sys, "argv", ["bench", "run", *settings, "--out", str(out), *words])
        command.main()
        return json.loads(out.read_text())

    monkeypatch.setattr(report, "LEAST", 0)
    assert run("--match", "one")["left_out"] == [] and built == ["one"]
    result = run("--continue", "--budget", "0")
    assert result["left_out"] == ["op: two"] and built == ["one"]
    monkeypatch.setenv("BIOPLAUS_COMMIT", "later")
    result = run("--continue")
    assert built == ["one", "two"] and result["left_out"] == [] and result["machine"]["commit"].endswith(", then later")
    result = run("--again", "--match", "two")
    assert built == ["one", "two", "two"]
    assert [(row["case"], row["variant"]) for row in result["rows"]] == [("one", "base"), ("two", "base")]
    built.clear()
    run("--continue")
    assert not built
    monkeypatch.setattr(report, "LEAST", 10**9)
    assert len(run("--continue")["rows"]) == 2 and built == ["one", "two"]


def test_probe() -> None:
    probe = Probe()
    fastest, taken = probe._all[:7], [probe() for _ in range(20)]
    # Of 120 the seventh.
    assert 0 < probe.best == sorted([*fastest, *taken])[6] < 1e-3
    probe.known = 1e-9
    assert probe.best == 1e-9


def test_a_process_that_begins_in_a_spell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier one found quiet counts in the next."""
    monkeypatch.setattr(
        registry, "cases", lambda *_: [registry.Case("op", "a", lambda _: registry.Bench({"base": int}))]
    )
    monkeypatch.setattr(machine, "roofline", lambda *_: {})
    out = tmp_path / "cpu.json"

    def run(*words: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["bench", "run", "--seconds=0.001", "--patience=0", "--out", str(out), *words])
        command.main()
        return json.loads(out.read_text())

    result = run()
    assert 0 < result["machine"]["probe_seconds"] < 1e-3
    result["machine"]["probe_seconds"] = 1e-9
    out.write_text(json.dumps(result))
    result = run("--again")
    assert result["machine"]["probe_seconds"] == 1e-9 and [row["quiet"] for row in result["rows"]] == [0]
    result["machine"]["processor"] = "another"
    out.write_text(json.dumps(result))
    with pytest.raises(SystemExit, match=r"of processor another; here it is processor .*expected a file of its own"):
        run("--again")
    assert json.loads(out.read_text()) == result
