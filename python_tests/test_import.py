"""The import and `python -m bioplaus_kernels` where something is missing: a compiler, triton, the native library."""

import json
import os
import platform
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from bitwise import needs_native
from small import RULES, gradients

import bioplaus_kernels as bk
from bioplaus_kernels.__main__ import report
from bioplaus_kernels.backends import native, reference

TORCH = torch.__version__.partition("+")[0].encode()

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
}

# What becomes of the file of the native library, and the reason.
DOCTORED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "half": (lambda file: file[: len(file) // 2], "does not load (_C.so is cut off: "),
    "a byte short": (lambda file: file[:-1], "does not load (_C.so is cut off: "),
    "empty": (lambda file: b"", "does not load ("),
    "no library": (lambda file: b"\x7fELF" + bytes(range(256)) * 64, "does not load ("),
    "another version": (
        lambda file: file.replace(f"\0{bk.__version__}\0".encode(), b"\0" + b"9" * len(bk.__version__) + b"\0"),
        f"built for version {'9' * len(bk.__version__)}, this is {bk.__version__}",
    ),
    "another torch": (
        lambda file: file.replace(b"\0" + TORCH, b"\0" + b"9" * len(TORCH)),
        f"built with torch {'9' * len(TORCH)}, this is torch {TORCH.decode()}",
    ),
    "another signature": (
        lambda file: file.replace(b"(Tensor key, Tensor weight)", b"(Tensor keys,Tensor weight)"),
        "built from other sources than these: no redraw_key with these arguments",
    ),
    "an op less": (
        lambda file: file.replace(b"redraw_key(Tensor", b"redraw_kex(Tensor"),
        "built from other sources than these: no redraw_key with these arguments",
    ),
}

PROGRAM = """
import importlib.machinery, json, os, runpy, sys
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


@needs_native
@pytest.mark.parametrize("case", DOCTORED)
def test_a_library_that_does_not_fit_is_named_and_not_used(case: str, tmp_path: Path) -> None:
    change, reason = DOCTORED[case]
    package = tmp_path / "bioplaus_kernels"
    package.mkdir()
    for path in Path(bk.__file__).parent.iterdir():
        if path.suffix != ".so":
            (package / path.name).symlink_to(path)
    file = Path(native.library.__file__).read_bytes()
    doctored = change(file)
    assert doctored != file
    (package / "_C.so").write_bytes(doctored)
    program = """
        import sys, torch
        sys.path.insert(0, sys.argv[1])
        import bioplaus_kernels as bk
        assert bk.__file__.startswith(sys.argv[1]) and bk.backends.native.library is None
        bk.nn.Linear(3, 2, feedback="brsf")(torch.ones(1, 3, requires_grad=True)).sum().backward()
        print(bk.backends.native.reason)
    """
    done = fresh.run(textwrap.dedent(program), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert reason in done.stdout and "; rebuild against the torch in use: `pip install " in done.stdout


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
        assert backend in ("reference", device) or (device == "cuda" and torch.cuda.is_available())
        # Whatever is not served by its device's own kernel says why.
        assert why or backend == device
        if not native_library:
            assert backend == "reference" and why[0].startswith("native library ")


@needs_native
def test_the_report_names_a_build_of_changed_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.setattr(native, "__file__", str(tmp_path / "bioplaus_kernels" / "backends" / "native.py"))
    assert not native.outdated()  # there are none
    shutil.copytree(root / "csrc", tmp_path / "csrc")
    shutil.copy(root / "CMakeLists.txt", tmp_path)
    assert not native.outdated()
    kernel = tmp_path / "csrc" / "cpu" / "pack_signs_kernel.cpp"
    text = kernel.read_text()
    kernel.write_text(f"{text}\n")
    assert native.outdated()
    report()
    assert "  built from other sources than csrc beside the package: build again" in capsys.readouterr().out
    kernel.write_text(text)
    assert not native.outdated()
    kernel.rename(kernel.with_name("other_kernel.cpp"))
    assert native.outdated()


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
