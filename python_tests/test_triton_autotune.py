"""Autotuning where it is asked for: what is timed, what is kept on disk and under which key. Times are made up."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bioplaus_kernels as bk
from bioplaus_kernels import ops

pytest.importorskip("triton")
from triton.runtime.autotuner import Autotuner

from bioplaus_kernels.backends.triton import configs


@pytest.fixture
def autotuned() -> Iterator[None]:
    configs._tuned.cache_clear()
    configs.autotune(True)
    yield
    configs.autotune(False)
    configs._tuned.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(not bk.backends.interpreted(), reason="TRITON_INTERPRET is not set")
@pytest.mark.parametrize("entries", ["constant", "uniform"])
def test_every_row_is_timed_once_a_shape(
    entries: str, autotuned: None, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, name = ("digits4", "digit_product_kernel") if entries == "constant" else ("float32", "product_kernel")
    table = configs.TABLES["sm_80"][kind]
    timed, ran = [], []

    def do_bench(tuner: Autotuner, call: Any) -> list[float]:
        call()
        timed.append((tuner.base_fn.__name__, tuner.nargs["M"]))
        # The last row is the fastest.
        return [1.0 / len(timed)] * 3

    def run(tuner: Autotuner, *args: Any, **kwargs: Any) -> None:
        before(tuner, *args, **kwargs)
        ran.append(tuner.best_config.kwargs)

    before = Autotuner.run
    monkeypatch.setattr(Autotuner, "do_bench", property(lambda tuner: lambda call, quantiles: do_bench(tuner, call)))
    monkeypatch.setattr(Autotuner, "run", run)
    feedback = (None, None, None, torch.tensor([1, 2, 3]), entries, 0.5)
    for m in (3, 3, 5):
        g = torch.randn(m, 70)
        expected = ops.feedback_mm(g, *feedback, 40)
        with bk.backends.use("triton"):
            torch.testing.assert_close(ops.feedback_mm(g, *feedback, 40), expected)
    assert timed == [(name, m) for m in (3, 5) for _ in table]
    last = {"BM": table[-1].rows, "BN": table[-1].columns, "BK": table[-1].depth}
    assert ran == [last] * 3


# Products with a driver that is none. Each is tuned as by a process of its own; the last row is the fastest.
PROGRAM = """
import json, os
from pathlib import Path
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from bioplaus_kernels.backends.triton import configs, feedback_mm

class Driver:
    capability = 80
    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

driver.set_active(Driver())
ran = []
JITFunction.run = lambda self, *args, **kwargs: ran.append([kwargs["BM"], kwargs["num_warps"]])
kernel, results = feedback_mm.product_kernel, {}

def tune(name, m=3, entries="stored"):
    timed = []
    def time(call, quantiles):
        timed.append(1)
        return [1.0 / len(timed)] * 3
    tuner = configs._tuned.__wrapped__(kernel, configs.TABLES["sm_80"]["half"], ("M", "N", "K", "ENTRIES"))
    tuner._do_bench = time
    g = torch.ones(1, dtype=torch.float16)
    operands = (g, g, None, None, None, g, None, 1.0, m, 64, 64, 1, 1, 0, 0, 1, 1)
    try:
        tuner.run(*operands, ENTRIES=entries, grid=(1,), warmup=False)
        results[name] = [len(timed), ran[-1]]
    except OSError as error:
        results[name] = str(error)

def kept():
    return [str(p) for p in Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.autotune.json")]

def fail(*_):
    raise OSError("the machine stops")

replace, os.replace = os.replace, fail
tune("stopped")
results["kept then"] = len(kept())
os.replace = replace
tune("first")
results["file"] = json.loads(Path(kept()[0]).read_text())
tune("again")
tune("batch", m=4)
tune("cell", entries="uniform")
Driver.capability = 90
tune("architecture")
Driver.capability = 80
source = kernel.src
kernel._unsafe_update_src(source.replace("total = tl.zeros", "total = 0 + tl.zeros"))
tune("kernel")
kernel._unsafe_update_src(source)
configs.TABLES["sm_80"]["half"] = configs.TABLES["sm_80"]["half"][1:]
tune("table")
results["kept"] = len(kept())
print(json.dumps(results))
"""


@pytest.mark.slow
def test_what_was_found_is_kept(tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    clean["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    rows = configs.TABLES["sm_80"]["half"]
    fastest = [rows[-1].rows, rows[-1].warps]
    # Nothing is in its place before it is whole.
    assert results["stopped"] == "the machine stops" and results["kept then"] == 0
    assert results["first"] == [len(rows), fastest] and len(results["file"]["configs_timings"]) == len(rows)
    assert results["again"] == [0, fastest]
    # Another shape, cell, architecture, kernel or table is another key.
    for other in ("batch", "cell", "architecture", "kernel"):
        assert results[other] == [len(rows), fastest], other
    assert results["table"] == [len(rows) - 1, fastest]
    assert results["kept"] == 6
