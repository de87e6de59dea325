"""The import and `python -m bioplaus_kernels` where something is missing: a compiler, triton, the native library."""

import json
import os
import platform
import textwrap
from typing import Any

import fresh
import pytest
import torch
from small import RULES, gradients

import bioplaus_kernels as bk
from bioplaus_kernels.backends import native, reference

# What each run sets up before the import, and the reason that the report then gives ("" where the library may load).
SURROUNDINGS = {
    "no compiler": ("", ""),
    "no triton": ("sys.modules['triton'] = None", ""),
    "no native library": ("sys.modules['bioplaus_kernels._C'] = None", "not built: install with"),
    "native library that does not load": (
        """
        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == 'bioplaus_kernels._C':
                    return importlib.machinery.ModuleSpec(name, self)
            def create_module(self, spec):
                raise ImportError('undefined symbol: _ZN3c10')
            def exec_module(self, module):
                pass
        sys.meta_path.insert(0, Broken())
        """,
        "built, but it does not load (undefined symbol: _ZN3c10)",
    ),
    "native library of other sources": (
        """
        stale = types.ModuleType('bioplaus_kernels._C')
        stale.__spec__ = importlib.machinery.ModuleSpec(stale.__name__, None)
        sys.modules[stale.__name__] = stale
        """,
        "built from other sources than these: no feedback_mm, feedback_weight",
    ),
}

PROGRAM = """
import importlib.machinery, json, os, runpy, sys, types
import torch
{before}
state = torch.get_rng_state()
import bioplaus_kernels as bk
assert torch.equal(torch.get_rng_state(), state)
from test_import import every_gradient
print(json.dumps(every_gradient()))
print(repr(bk.backends.native.reason))
sys.argv = ["bioplaus_kernels"]
runpy.run_module("bioplaus_kernels", run_name="__main__")
"""


def every_gradient() -> dict[str, list[float]]:
    """The input gradient of two small layers under every rule."""
    results = {}
    for name, rule in RULES.items():
        torch.manual_seed(0)
        conv = bk.nn.Conv1d(2, 3, 2, feedback=rule)
        model = torch.nn.Sequential(conv, bk.nn.LocallyConnected1d(3, 2, 2, input_size=4, feedback=rule))
        results[name] = gradients(model, torch.randn(2, 2, 5, requires_grad=True))[0].flatten().tolist()
    return results


def test_import_leaves_the_level_open() -> None:
    program = """
        import os, torch
        import bioplaus_kernels
        os.environ["ATEN_CPU_CAPABILITY"] = "default"
        print(torch.backends.cpu.get_cpu_capability())
    """
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    done = fresh.run(textwrap.dedent(program), environment=environment)
    assert done.stdout.strip() in ("DEFAULT", "NO AVX"), done.stdout + done.stderr


@pytest.mark.parametrize("case", SURROUNDINGS)
def test_everything_works_where_something_is_missing(case: str) -> None:
    before, reason = SURROUNDINGS[case]
    program = PROGRAM.format(before=textwrap.dedent(before))
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CUDA_HOME")}
    if case == "no compiler":
        environment["PATH"] = os.devnull
    done = fresh.run(program, environment=environment)
    assert done.returncode == 0, done.stderr
    gradients_line, reason_line, *report = done.stdout.splitlines()

    expected = every_gradient()
    for name, values in json.loads(gradients_line).items():
        assert values == pytest.approx(expected[name], abs=1e-5), name

    if reason:
        assert reason in reason_line and any(line.startswith("native library: ") and reason in line for line in report)
    else:
        assert reason_line == repr(native.reason)
    check_report(report, native_library=not reason and native.library is not None)
    if case == "no triton":
        assert report[2].startswith("triton not found, ")


def check_report(report: list[str], native_library: bool) -> None:
    """Versions, what was built, and a row for every op and device with its backend and, if not native, why."""
    assert report[0] == f"bioplaus_kernels {bk.__version__}"
    assert report[1].startswith(f"python {platform.python_version()}, torch {torch.__version__} (CUDA ")
    text = "\n".join(report)
    if native_library:
        for word in ("built with torch", "CPU levels", "active here", "OpenMP", "threads", "  CUDA "):
            assert word in text
    table = report[report.index("") + 1 :]
    assert table[0].split() == ["op", "device", "backend", "why"]
    rows: dict[Any, Any] = {tuple(line.split()[:2]): line.split(maxsplit=3)[2:] for line in table[1:]}
    assert rows.keys() == {(op, device) for op in reference.OPS for device in ("cpu", "cuda")}
    for (_, device), (backend, *why) in rows.items():
        assert backend in ("reference", device) or (backend == "rule" and torch.cuda.is_available())
        # Whatever is not served by its device's own kernel says why.
        assert why or backend == device
        if not native_library:
            assert backend == "reference" and why[0].startswith("native library ")


def test_the_library_in_use_serves_its_ops() -> None:
    choices = {(choice.op, choice.device): choice for choice in bk.backends.choices()}
    assert choices.keys() == {(op, device) for op in reference.OPS for device in ("cpu", "cuda")}
    if native.library is None:
        assert native.reason
        return
    config = native.library.build_config()
    for (op, device), choice in choices.items():
        assert (choice.backend == device) == (op in config["native_ops"].get(device.upper(), []))
    assert config["version"] == bk.__version__
    assert native.library.active_cpu_level() in config["cpu_levels"]
