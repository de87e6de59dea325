"""What the build made: threads, libraries, configuration, and the decisions that setup.py takes."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fresh
import pytest
import torch
from bitwise import needs_native

import bioplaus_kernels
from bioplaus_kernels.backends import native

ROOT = Path(__file__).resolve().parent.parent


@needs_native
def test_config() -> None:
    """The build says what it is."""
    config = native.library.build_config()
    assert config["version"] == bioplaus_kernels.__version__
    assert config["torch"] == torch.__version__
    assert config["openmp"]
    assert config["cpu_levels"][0] == "DEFAULT"
    assert native.library.active_cpu_level() in config["cpu_levels"]
    assert (config["cuda"] is None) == (not config["cuda_archs"])
    ops = {"feedback_weight", "pack_signs", "redraw_key", "unpack_signs"}
    assert ops <= set(config["native_ops"]["CPU"])
    assert set(config["native_ops"]["CUDA"]) >= (ops if config["cuda"] else set())


@needs_native
def test_cpu_level_is_torchs() -> None:
    """The kernels run at the level that torch's own do, as far as it was built."""
    level = torch.backends.cpu.get_cpu_capability()
    assert native.library.active_cpu_level() == (
        level if level in native.library.build_config()["cpu_levels"] else "DEFAULT"
    )


@needs_native
def test_threads() -> None:
    """A parallel loop runs on as many threads as torch is told to use."""
    before = torch.get_num_threads()
    try:
        for threads in (2, 1, 3):
            torch.set_num_threads(threads)
            assert native.library.num_threads_used() == threads
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp() -> None:
    """The module brings no OpenMP library beside torch's: its threads would not know of each other."""
    program = (
        "import torch, re, bioplaus_kernels._C as C; C.num_threads_used();"
        "print(*{m for m in re.findall(r'/\\S*lib[gi]omp\\S*', open('/proc/self/maps').read())})"
    )
    result = fresh.run(program)
    assert len(result.stdout.split()) == 1, result.stdout


@needs_native
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_no_path_of_this_machine() -> None:
    """The module finds torch's libraries because torch is imported first, not by where they were at build time."""
    output = subprocess.run(
        ["readelf", "-d", native.library.__file__], check=True, capture_output=True, text=True
    ).stdout
    assert "RPATH" not in output
    assert "RUNPATH" not in output
    assert "gomp" not in output


@needs_native
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_runs_on_older_systems() -> None:
    """One module for every Python from 3.11 on and for glibc from 2.28 on, as its wheel says, wherever it was built."""
    module = native.library.__file__
    assert module.endswith("_C.abi3.so") or sysconfig.get_config_var("Py_GIL_DISABLED")
    symbols = subprocess.run(["readelf", "-W", "-V", module], check=True, capture_output=True, text=True).stdout
    versions = {tuple(map(int, found.split("."))) for found in re.findall(r"Name: GLIBC_([\d.]+)", symbols)}
    assert versions and max(versions) <= (2, 28)


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, without its call of setup()."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("no source tree")
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("bioplaus_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("BK_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.mark.parametrize(
    ("text", "people", "codes"),
    [
        ("8.0;9.0;10.0+PTX", ["sm_80", "sm_90", "sm_100+PTX"], ["sm_80", "sm_90", "sm_100", "compute_80"]),
        ("8.0 9.0a", ["sm_80", "sm_90"], ["sm_80", "sm_90"]),
        (" 8.6+PTX 9.0+PTX;", ["sm_86+PTX", "sm_90+PTX"], ["sm_86", "compute_80", "sm_90"]),
    ],
)
def test_arch_list(setup_py: ModuleType, text: str, people: list[str], codes: list[str]) -> None:
    """TORCH_CUDA_ARCH_LIST in torch's own syntax."""
    assert setup_py.parse_archs(text) == (people, codes)


def test_old_archs(setup_py: ModuleType, capsys: pytest.CaptureFixture) -> None:
    """A list made for other programs may start where no kernel of these compiles."""
    assert setup_py.parse_archs("7.5 8.6+PTX") == (["sm_86+PTX"], ["sm_86", "compute_80"])
    assert "7.5 is left out of TORCH_CUDA_ARCH_LIST: the kernels need 8.0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST: expected entries such as 8\.0.*, got '7\.5\+PTX'"):
        setup_py.parse_archs("7.5+PTX")


@pytest.mark.parametrize(
    ("archs", "run", "lack"),
    [
        ("8.0;9.0;10.0;12.0+PTX", ["8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0"], ["7.0", "7.5"]),
        ("8.0+PTX", ["8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0"], ["7.5"]),
        ("9.0", ["9.0"], ["7.5", "8.0", "8.6", "8.9", "10.0", "10.3", "12.0"]),
        ("8.6;10.3", ["8.6", "8.9", "10.3"], ["7.5", "8.0", "9.0", "10.0", "12.0"]),
    ],
)
def test_missing_kernels(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, archs: str, run: list[str], lack: list[str]
) -> None:
    """Machine code runs on its major version from its minor on, PTX on all that is newer; the rest is named."""
    people, _ = setup_py.parse_archs(archs)
    monkeypatch.setattr(native, "library", SimpleNamespace(build_config=lambda: {"cuda_archs": people}))
    reasons = {text: native.missing_kernels(tuple(map(int, text.split(".")))) for text in (*run, *lack)}
    assert [text for text, reason in reasons.items() if not reason] == run
    for text in lack:
        if text.startswith("7."):
            assert reasons[text] == f"the CUDA kernels need compute capability 8.0, this GPU has {text}"
        else:
            assert reasons[text].startswith(f"the CUDA kernels are built for {', '.join(people)}, this GPU is sm_")
            assert reasons[text].endswith(f": rebuild with TORCH_CUDA_ARCH_LIST={text}")


def test_default_archs(setup_py: ModuleType) -> None:
    """Nothing that the nvcc at hand does not know."""
    assert setup_py.default_archs("13.0") == setup_py.default_archs("12.8") == "8.0;9.0;10.0;12.0+PTX"
    assert setup_py.default_archs("12.6") == "8.0;9.0+PTX"


@pytest.mark.parametrize("text", ["80", "sm_80", "8.0,9.0", ";", "Hopper"])
def test_bad_arch_list(setup_py: ModuleType, text: str) -> None:
    """Anything else is an error that shows what is wanted."""
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: expected entries such as"):
        setup_py.parse_archs(text)


def fake_toolkit(home: Path, version: str) -> Path:
    """A folder that looks like a CUDA toolkit of a version."""
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    nvcc.chmod(0o755)
    return nvcc


def test_cuda_decision(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whether there is a CUDA part depends on torch, the toolkit and the switch, never on a GPU; reasons are given."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    nvcc = fake_toolkit(tmp_path / "right", "13.2")
    old = fake_toolkit(tmp_path / "old", "12.8")

    monkeypatch.setenv("CUDA_HOME", str(nvcc.parent.parent))
    assert setup_py.decide_cuda(torch) == (str(nvcc), "13.2")

    monkeypatch.setenv("CUDA_HOME", str(old.parent.parent))
    assert setup_py.decide_cuda(torch) == (None, f"torch is built with CUDA 13.0 and {old} is 12.8")

    # A wrapper on PATH that has no headers beside it is not a toolkit.
    monkeypatch.delenv("CUDA_HOME")
    (tmp_path / "wrapper" / "bin").mkdir(parents=True)
    shutil.copy(nvcc, tmp_path / "wrapper" / "bin" / "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "wrapper" / "bin"))
    assert setup_py.find_cuda_home() in (None, Path("/usr/local/cuda"))

    monkeypatch.setenv("BK_CUDA", "0")
    assert setup_py.decide_cuda(torch) == (None, "BK_CUDA=0")
    monkeypatch.setenv("BK_CUDA", "yes")
    with pytest.raises(SystemExit, match="BK_CUDA: expected 0 or 1, got 'yes'"):
        setup_py.decide_cuda(torch)

    monkeypatch.delenv("BK_CUDA")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert setup_py.decide_cuda(torch) == (None, "torch is not a CUDA build")


def test_without_torch(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence says what to do first."""
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"install torch first, then `pip install \. --no-build-isolation`"):
        setup_py.import_torch()


def test_wheel_asks_for_its_torch(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A native module serves one release of torch; without one any will do."""
    from setuptools import Distribution

    wanted = []
    for compiler in ("c++", None):
        monkeypatch.setattr(setup_py, "find_cxx", lambda found=compiler: found)
        distribution = Distribution({"name": "x", "install_requires": ["torch>=2.10"]})
        setup_py.pin_torch(distribution)
        wanted.append(list(distribution.install_requires))
    assert wanted == [[f"torch=={torch.__version__.partition('+')[0]}"], ["torch>=2.10"]]


def test_without_compiler(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The package installs all the same, for the reference backend, and says so in a line."""
    from setuptools import Distribution, Extension

    monkeypatch.setattr(setup_py, "find_cxx", lambda: None)
    command = setup_py.CMakeBuild(Distribution({"name": "x", "ext_modules": [Extension("x._C", sources=[])]}))
    command.ensure_finalized()
    command.run()
    assert command.get_outputs() == []
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_sdist(setup_py: ModuleType, tmp_path: Path) -> None:
    """A source distribution holds what the native build needs."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".git", "build", "*.so", "__pycache__", ".venv", "data", "runs")
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path / "dist")]
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    native_sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*")}
    wanted = {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "bioplaus_kernels/py.typed"}
    assert (native_sources | wanted) - names == set()
