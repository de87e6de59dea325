"""Builds the native module with CMake, against the torch in use.

Switches: BK_CUDA=0/1 (default: where torch is a CUDA build and a matching nvcc is found), TORCH_CUDA_ARCH_LIST (torch's
syntax; default 8.0;9.0;10.0;12.0+PTX), MAX_JOBS, CXX, CUDA_HOME. No GPU is needed to build.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
INSTALL = "`pip install . --no-build-isolation`"
TOOLS = "`pip install --upgrade setuptools cmake ninja`"
# One module for every Python from 3.11 on, but for a Python without the global lock, which has no limited API.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")


def say(message):
    print(f"bioplaus_kernels: {message}", flush=True)


def stop(message):
    raise SystemExit(f"bioplaus_kernels: {message}")


def import_torch():
    # A build in pip's isolation would get a torch of its own, and its module would not load with the user's.
    try:
        import torch
    except ImportError as error:
        stop(f"torch cannot be imported ({error}): install torch first, then {INSTALL}.")
    return torch


def find_cxx():
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def find_tool(name):
    """`name` from the Python package of that name, else from PATH."""
    try:
        module = __import__(name)
        directory = getattr(module, "CMAKE_BIN_DIR", None) or module.BIN_DIR
        return shutil.which(name, path=directory) or shutil.which(name)
    except (ImportError, AttributeError):
        return shutil.which(name)


def find_cuda_home():
    """A CUDA home is right when it holds the headers: nvcc on PATH may be a wrapper that lies elsewhere."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc:
        candidates.append(Path(nvcc).resolve().parent.parent)
    candidates.append("/usr/local/cuda")
    for home in (Path(c) for c in candidates if c):
        if (home / "include" / "cuda_runtime.h").is_file() and (home / "bin" / "nvcc").is_file():
            return home
    return None


def default_archs(nvcc_version):
    """Blackwell is known to nvcc from 12.8 on; the driver compiles PTX for it too, but for seconds at the first use."""
    return "8.0;9.0;10.0;12.0+PTX" if tuple(map(int, nvcc_version.split("."))) >= (12, 8) else "8.0;9.0+PTX"


def parse_archs(text):
    """Torch's arch list: names for people ("sm_90", "sm_100+PTX") and nvcc's codes ("sm_100", "compute_80").

    No kernel uses what an arch has over sm_80 (Triton's do), so that all have sm_80's PTX; a and f change nothing.
    """
    people, codes = [], []
    for arch in text.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if not match:
            stop(f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 10.0+PTX, got {arch!r}.")
        if int(match[1]) < 8:
            say(f"{arch} is left out of TORCH_CUDA_ARCH_LIST: the kernels need 8.0")
            continue
        people.append(f"sm_{match[1]}{match[2]}{match[4] or ''}")
        codes += [f"sm_{match[1]}{match[2]}"] + ["compute_80"] * bool(match[4])
    if not people:
        stop(f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 10.0+PTX, got {text!r}.")
    return people, list(dict.fromkeys(codes))


def decide_cuda(torch):
    """(nvcc, its version), or (None, why there is no CUDA part)."""
    wanted = os.environ.get("BK_CUDA", "").strip()
    if wanted not in ("", "0", "1"):
        stop(f"BK_CUDA: expected 0 or 1, got {wanted!r}.")
    if wanted == "0":
        return None, "BK_CUDA=0"
    if torch.version.cuda is None:
        return None, "torch is not a CUDA build"
    home = find_cuda_home()
    if home is None:
        return None, "no CUDA toolkit found (set CUDA_HOME to a folder that holds bin/nvcc and include/cuda_runtime.h)"
    nvcc = str(home / "bin" / "nvcc")
    try:
        output = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return None, f"{nvcc} does not run ({error})"
    version = re.search(r"release (\d+)\.(\d+)", output)
    if version is None or version[1] != torch.version.cuda.split(".")[0]:
        found = f"{version[1]}.{version[2]}" if version else "of unknown version"
        return None, f"torch is built with CUDA {torch.version.cuda} and {nvcc} is {found}"
    return nvcc, f"{version[1]}.{version[2]}"


class CMakeBuild(build_ext):
    """Runs CMake in build/, in a folder per torch, so that a second build is incremental."""

    def run(self):
        torch = import_torch()
        cxx = find_cxx()
        if cxx is None:
            say("no native module: no C++ compiler found; every op runs on the reference backend")
            for extension in self.extensions:  # of an earlier build, which the wheel would pick up
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.extensions = []
            return
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        if cmake is None:
            stop(f"cmake not found: {TOOLS}, then {INSTALL}.")
        for extension in self.extensions:
            self.build_with_cmake(extension, torch, cxx, cmake, ninja)

    def build_with_cmake(self, extension, torch, cxx, cmake, ninja):
        torch_root = Path(torch.__file__).parent
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        for other in {*output.parent.glob("_C.*")} - {output}:  # Python would prefer one of its own version's name
            other.unlink()
        defines = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CXX_COMPILER": cxx,
            "Python_EXECUTABLE": sys.executable,
            "BK_VERSION": self.distribution.get_version(),
            "BK_DIGEST": runpy.run_path(str(ROOT / "bioplaus_kernels" / "_sources.py"))["digest"](ROOT),
            "BK_TORCH_VERSION": torch.__version__,
            "BK_TORCH_INCLUDE": torch_root / "include",
            "BK_TORCH_LIB": torch_root / "lib",
            "BK_TORCH_CXX11_ABI": int(torch._C._GLIBCXX_USE_CXX11_ABI),
            "BK_LIMITED_API": "0x030B0000" if LIMITED_API else "",
            "BK_OUTPUT_DIR": output.parent,
            "BK_OUTPUT_SUFFIX": output.name.removeprefix("_C"),
            "BK_CUDA_ARCHS": "",
        }
        nvcc, found = decide_cuda(torch)
        if nvcc is None:
            if os.environ.get("BK_CUDA", "").strip() == "1":
                stop(f"BK_CUDA=1, but the CUDA part cannot be built: {found}.")
            say(f"CPU only: {found}")
        else:
            people, codes = parse_archs(os.environ.get("TORCH_CUDA_ARCH_LIST") or default_archs(found))
            defines |= {
                "BK_CUDA_ARCHS": " ".join(people),
                "CMAKE_CUDA_COMPILER": nvcc,
                "CMAKE_CUDA_HOST_COMPILER": cxx,
                "CMAKE_CUDA_ARCHITECTURES": "OFF",
                "BK_CUDA_CODES": ",".join(codes),
            }
            say(f"CPU and CUDA {found} ({', '.join(people)})")

        # CMake remembers where torch lies, so another environment has another folder.
        where = f"{zlib.crc32(str(torch_root).encode()):08x}"
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{torch.__version__}-{where}"
        command = [cmake, "-S", str(ROOT), "-B", str(build), *(f"-D{name}={value}" for name, value in defines.items())]
        if ninja is not None:
            command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.run(command, check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)


class DistInfo(dist_info):
    """Asks for torch before pip resolves dependencies and would install one only for this build."""

    def run(self):
        pin_torch(self.distribution)
        super().run()


class BdistWheel(bdist_wheel):
    def run(self):
        pin_torch(self.distribution)
        super().run()


def pin_torch(distribution):
    """A native module is of one release of torch, and so is a wheel with one."""
    torch = import_torch()
    if find_cxx() is not None:
        wanted = [f"torch=={torch.__version__.partition('+')[0]}"]
        distribution.install_requires = distribution.metadata.install_requires = wanted


# Without build isolation pip does not look at build-system.requires.
if int(setuptools.__version__.split(".")[0]) < 77:
    stop(f"setuptools 77 or newer is needed, this is {setuptools.__version__}: {TOOLS}, then {INSTALL}.")

setup(
    ext_modules=[Extension("bioplaus_kernels._C", sources=[], py_limited_api=LIMITED_API)],
    cmdclass={"build_ext": CMakeBuild, "dist_info": DistInfo, "bdist_wheel": BdistWheel},
    install_requires=["torch>=2.10"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED_API else {},
)
