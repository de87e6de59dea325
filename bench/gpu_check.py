"""One command for a machine with a GPU: what it is, whether each backend lives, its tests, its speed; then a verdict.

    scripts/gpu_check.sh [STAGE...]

Stages run in order of worth, each in a process of its own with a time limit of its own, and keep what they wrote when
they are cut off; another call goes on after those that are done, or does the named ones again. In the environment:
BUDGET, seconds for all (default 420); OUT, the folder for at most 8 files below 16 MiB (default build/gpu-check);
STATE, where they are kept as well, for another call that finds OUT empty (default build/gpu-check). The GPU's settings
stay as they are. This module needs Python alone: nothing that a stage can break.
"""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from . import gpu_verdict

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "bioplaus_kernels" / "_sources.py"
PREPARED = ROOT / "build" / "gpu"
# Whose module lies in the package, where this program has put it there.
STAMP = ROOT / "build" / "gpu-module"
LARGEST = 16 * 2**20 - 2**10
PYTEST = (
    "-m pytest -q -p bench.gpu_tests -p no:cacheprovider --tb=short --continue-on-collection-errors "
    "-n {processes} --dist worksteal --timeout 60 --timeout-method thread"
)
# Of pytest: all passed, some failed, none was left.
TESTED = (0, 1, 5)
RUN = "-m bench run --device cuda --seconds 0.02 --continue --budget {budget} --out {results}"
FEW = "--state warm --state graph --without torch.compile"
LAYERS = r"(CIFAR.[123]|ImageNet.[2-7]).N=(16|128).(forward.\+|backward.weight.bf)"
STEPS = "--op convolution --op training_step --op feedback_weight --op overhead --match ^((?!compiled|bfloat16).)*$"


@dataclass(frozen=True)
class Stage:
    """`command`, of Python, for at most `limit` seconds; done where it ends with one of `codes`."""

    name: str
    limit: float
    command: str
    codes: tuple[int, ...] = (0,)
    needs_gpu: bool = True


STAGES = (
    Stage("machine", 60, "-m bench.gpu_stages machine", needs_gpu=False),
    Stage("triton", 60, "-m bench.gpu_stages alive triton"),
    Stage("build", 200, "setup.py build_ext --inplace"),
    Stage("cuda", 20, "-m bench.gpu_stages alive cuda"),
    Stage("tests-cuda", 90, f"{PYTEST} {{cuda_tests}}", TESTED),
    Stage("tests-triton", 90, f"{PYTEST} -m gpu {{triton_tests}}", TESTED),
    Stage("tests-layers", 60, f"{PYTEST} -m gpu {{other_tests}}", TESTED),
    Stage("headline", 130, f"{RUN} --headline {FEW}"),
    Stage("user", 60, "-m bench.gpu_stages user"),
    Stage("layers", 80, f"{RUN} {FEW} --op locally_connected --match {LAYERS}"),
    Stage("steps", 60, f"{RUN} {FEW} {STEPS}"),
    Stage("compiled", 120, f"{RUN} --op training_step --match compiled --state warm --seconds 2"),
    Stage("memcheck", 90, "-m bench.gpu_stages sanitizer memcheck {sanitizer}"),
    Stage("racecheck", 90, "-m bench.gpu_stages sanitizer racecheck {sanitizer}"),
    Stage("counters", 50, "-m bench.gpu_stages counters {counters}"),
    Stage("more", 600, RUN),
)


class Check:
    """One call of the command."""

    def __init__(self, out: Path, state: Path, budget: float, say: Callable[[str], None] = print) -> None:
        self.out, self.state, self.say = out, state, say
        self.end = time.monotonic() + budget
        self.records: dict[str, dict[str, Any]] = {}
        for folder in (out, state):
            folder.mkdir(parents=True, exist_ok=True)
        for path in state.iterdir():
            if not self._file(path.name).exists():
                shutil.copyfile(path, self._file(path.name))
        if self._file("stages.json").exists():
            self.records = json.loads(self._file("stages.json").read_text())

    def _file(self, name: str) -> Path:
        return self.out / name

    def results(self) -> list[dict[str, Any]]:
        """What stages have said."""
        return gpu_verdict.lines(self._file("results.jsonl"))

    def machine(self) -> dict[str, Any]:
        """What the stage of that name found."""
        return next((r for r in reversed(self.results()) if r["stage"] == "machine"), {})

    def run(self, stages: Iterable[Stage], again: bool) -> None:
        """Those not done yet; `again`: all of them, from their beginning."""
        for stage in stages:
            if again or not stage.needs_gpu:  # perhaps another machine
                self._forget(stage.name)
                stage = replace(stage, command=stage.command.replace("--continue", "--again"))
            elif self.records.get(stage.name, {}).get("status") == "done":
                self.say(f"{stage.name}: done before")
                continue
            record = self._why_not(stage) or self._run(stage)
            self.records[stage.name] = record | {"commit": os.environ.get("BIOPLAUS_COMMIT", "")}
            self._file("stages.json").write_text(json.dumps(self.records, indent=1))
            verdict = gpu_verdict.text(self.results(), self.records, self._bench())
            self._file("verdict.txt").write_text(verdict + "\n")
            self._keep()
            said = (f"{stage.name}: {gpu_verdict.status(record)}", *gpu_verdict.found(stage.name, self.results()))
            self.say("\n  ".join(said))

    def _forget(self, stage: str) -> None:
        # Rows of the bench it forgets itself.
        kept = [json.dumps(r) + "\n" for r in self.results() if r["stage"] != stage]
        self._file("results.jsonl").write_text("".join(kept))

    def _why_not(self, stage: Stage) -> dict[str, Any] | None:
        machine = self.machine()
        # A machine that could not be asked is taken for one with a GPU.
        if stage.needs_gpu and "no_gpu" in machine:
            return {"status": "skipped", "why": machine["no_gpu"]}
        if (
            stage.name == "build"
            and not self._stale()
            and machine.get("library", "loads" if STAMP.exists() else "") == "loads"
        ):
            return {"status": "done", "why": "the library loads"}
        if self.end - time.monotonic() < 5:
            return {"status": "skipped", "why": "no time left of BUDGET"}
        return None

    def _run(self, stage: Stage) -> dict[str, Any]:
        limit = min(stage.limit, self.end - time.monotonic() - 2)
        with self._file("results.jsonl").open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # Half a line of a stage that was cut off would spoil the next one.
                file.write(b"" if file.read() == b"\n" else b"\n")
        environment = os.environ | {
            "PYTHONUNBUFFERED": "1",
            "BIOPLAUS_STAGE": stage.name,
            "BIOPLAUS_RESULTS": str(self._file("results.jsonl")),
            # How much of it was there before: tests that passed then are not run again.
            "BIOPLAUS_BEFORE": str(self._file("results.jsonl").stat().st_size),
        }
        if stage.name.startswith("tests"):
            environment["OMP_NUM_THREADS"] = "1"
        if stage.name == "build":
            environment |= {"TORCH_CUDA_ARCH_LIST": self.machine().get("capability", "")}
        start = time.monotonic()
        with self._file("log.txt").open("a") as log:
            log.write(f"\n=== {stage.name}, {limit:.0f} s\n")
            log.flush()
            # A group of its own, to end what it started too, but no session: the machine ends what is left over.
            process = subprocess.Popen(
                [sys.executable, *self._words(stage, limit)],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, process_group=0,
            )  # fmt: skip
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        record = {"seconds": round(time.monotonic() - start, 1), "limit": round(limit, 1)}
        if code is None:
            return record | {"status": "cut"}
        if stage.name == "build" and code == 0:
            STAMP.write_text(fingerprint())
        if code == 0 and stage.command.startswith(RUN) and self._left_out():
            # Its own budget ended it: the next call goes on.
            return record | {"status": "cut"}
        return record | {"status": "done" if code in stage.codes else "failed", "code": code}

    def _left_out(self) -> bool:
        try:
            return bool(json.loads(self._bench().read_text())["left_out"])
        except (OSError, KeyError, json.JSONDecodeError):
            return False

    def _words(self, stage: Stage, limit: float) -> list[str]:
        tests = ROOT / "python_tests"
        marked = [p for p in sorted(tests.glob("test_*.py")) if re.search(_MARKED, p.read_text())]
        groups: dict[str, list[Path]] = {
            "{cuda_tests}": sorted(tests.glob("cuda_host/cases_[!t]*.py")),
            "{triton_tests}": [p for p in marked if p.name.startswith("test_triton")],
            "{other_tests}": [p for p in marked if not re.match("test_(triton|cuda)", p.name)],
        }
        values = {
            "budget": f"{limit - 5:.0f}",
            "processes": min(12, os.cpu_count() or 1),
            "results": self._bench(),
            "sanitizer": self._file("sanitizer.txt"),
            "counters": self._file("counters.csv"),
        }
        words: list[str] = []
        for word in stage.command.split():
            words += map(str, groups[word]) if word in groups else [_filled(word, values)]
        return words

    def _bench(self) -> Path:
        slug = re.sub(r"[^a-z0-9]+", "-", str(self.machine().get("gpu") or "").lower()).strip("-")
        return self._file(f"cuda-{slug}.json")

    def _stale(self) -> bool:
        return STAMP.exists() and STAMP.read_text() != fingerprint()

    def _keep(self) -> None:
        for path in self.out.iterdir():
            cut(path)
            if not (self.state / path.name).exists() or not path.samefile(self.state / path.name):
                shutil.copyfile(path, self.state / path.name)


# How a test says that it needs a GPU.
_MARKED = r"mark\.gpu|\bDEVICES\b|from bitwise import"


def _filled(word: str, values: dict[str, Any]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: str(values[found[1]]), word)


def _end(process: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            # A process that waits in the driver may outlive even the second.
            process.wait(2)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def cut(path: Path, largest: int = LARGEST) -> None:
    """Keep of a long file the first and the last part."""
    size, half = path.stat().st_size, largest // 2 - 100
    if size > largest:
        with path.open("rb") as file:
            first = file.read(half)
            file.seek(size - half)
            last = file.read()
        path.write_bytes(first + f"\n... {size - 2 * half} bytes cut ...\n".encode() + last)


def fingerprint() -> str:
    """Of all that the native module is made of."""
    # By its path: the package itself wants torch.
    digest: Callable[[Path], str] = runpy.run_path(str(SOURCES))["digest"]
    return digest(ROOT)


def install_prepared() -> str:
    """Put the module of scripts/gpu_prepare.sh into the package, and its Triton cache where it was filled."""
    cache = os.environ.get("TRITON_CACHE_DIR")
    filled = PREPARED / "triton.tar.gz"
    if cache and filled.exists():
        with tarfile.open(filled) as archive:
            # Python 3.11.4 and later has the filter.
            archive.extractall(cache, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    stamp = PREPARED / "sources"
    if not stamp.exists():
        return "nothing was prepared"
    if stamp.read_text() != fingerprint():
        return "what was prepared is of other sources: not used"
    for module in PREPARED.glob("_C*.so"):
        shutil.copyfile(module, ROOT / "bioplaus_kernels" / module.name)
    STAMP.write_text(fingerprint())
    return "the prepared module was put into the package"


def main(names: list[str]) -> int:
    """Exit status 0 where everything ran and was right."""
    stages = {stage.name: stage for stage in STAGES}
    if unknown := [name for name in names if name not in stages]:
        print(f"expected stages of {', '.join(stages)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    state = Path(os.environ.get("STATE") or ROOT / "build" / "gpu-check")
    say = partial(print, flush=True)
    check = Check(Path(os.environ.get("OUT") or state), state, float(os.environ.get("BUDGET") or 420), say)
    say(install_prepared())

    # What it started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Whatever else is wanted, the machine first: it may be another.
    chosen = [stages[name] for name in dict.fromkeys(("machine", *names))] if names else STAGES
    check.run(chosen, again=bool(names))
    verdict = gpu_verdict.text(check.results(), check.records, check._bench())
    say(f"\n{verdict}")
    return 0 if gpu_verdict.clean(check.results(), check.records) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
