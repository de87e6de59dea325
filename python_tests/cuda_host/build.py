"""Builds csrc/cuda with a C++ compiler, to run on CPU tensors under AddressSanitizer and UBSan.

    python -m cuda_host.build        (in python_tests) builds, and prints the library's path

Every file is compiled once for its text and that of what it includes, into build/cuda_host.
"""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CUDA = CSRC / "cuda"
OUT = ROOT / "build" / "cuda_host"
TORCH = Path(torch.__file__).parent

FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-omit-frame-pointer", "-ffp-contract=off"),
    *("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"),
    *("-Wall", "-Wno-unused-function", "-Wno-unknown-pragmas", "-DBK_HOST_EXECUTION"),
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
]

# (file, text that occurs once, what takes its place): a bug to plant
Patch = tuple[str, str, str]


@cache
def cuda_headers() -> Path | None:
    """Where CUDA's headers lie; no toolkit's programs are needed."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    for home in homes:
        if home and (Path(home) / "include" / "cuda_bf16.h").is_file():
            return Path(home) / "include"
    return None


def why_not() -> str | None:
    """Why nothing can be built here, or None."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return f"host execution switches stacks by hand, for Linux on x86-64, not {platform.machine()}"
    if cuda_headers() is None:
        return "no CUDA headers: set CUDA_HOME to a folder that holds include/cuda_bf16.h"
    return None if shutil.which("g++") else "no g++"


def preload() -> str:
    """What has to be loaded first: the sanitizer, and the library of exceptions that it looks for as it starts."""
    names = ("libasan.so", "libstdc++.so.6")
    return " ".join(
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in names
    )


@cache
def _compiler() -> str:
    return subprocess.run(["g++", "--version"], check=True, capture_output=True, text=True).stdout


def _closure(text: str) -> str:
    """`text` and that of all of ours that it includes."""
    seen: dict[Path, str] = {}

    def visit(text: str, folder: Path) -> None:
        for name in re.findall(r'^\s*#\s*include "([^"]+)"', text, re.M):
            for base in (folder, HERE, CUDA):
                path = (base / name).resolve()
                if path.is_file() and path not in seen:
                    seen[path] = path.read_text()
                    visit(seen[path], path.parent)

    visit(text, CUDA)
    return "\0".join([text, *(seen[p] for p in sorted(seen))])


def _with_shared_memory(text: str, file: str) -> str:
    """Static shared variables become the block's own, which each block fills with garbage and red zones surround."""
    variable = re.compile(
        r"__shared__\s+((?:alignas\([^)]*\)\s*|__align__\([^)]*\)\s*)?)([\w:<>, ]+?)\s+(\w+)((?:\[[^\]]*\])*);"
    )
    count = 0

    def replace(m: re.Match[str]) -> str:
        nonlocal count
        count += 1
        return (
            f"using {m[3]}_type = {m[2]}{m[4]}; auto& {m[3]} = *static_cast<{m[3]}_type*>("
            f"::host_execution::shared({count}, sizeof({m[3]}_type), 16));"
        )

    text = variable.sub(replace, text)
    if "__shared__" in text:
        raise ValueError(f"{file}: a __shared__ variable of a form that host execution does not know")
    return text


def _compile(source: Path, text: str, name: str, flags: Sequence[str], closure: str) -> Path:
    digest = hashlib.sha256("\0".join([_compiler(), torch.__version__, *flags, closure]).encode()).hexdigest()[:16]
    target = OUT / f"{name}-{digest}.o"
    if not target.exists():
        for old in OUT.glob(f"{name}-*.o"):
            old.unlink()
        copy = OUT / f"{name}-{digest}.cpp"
        copy.write_text(f'#line 1 "{source}"\n{text}')
        partial = target.with_suffix(f".{os.getpid()}")
        command = ["g++", *flags, "-c", str(copy), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-6000:]}")
        partial.replace(target)
        copy.unlink()
    return target


def _precompiled(flags: Sequence[str]) -> list[str]:
    """torch's headers, read once for all files."""
    header = HERE / "host_torch.h"
    digest = hashlib.sha256("\0".join([_compiler(), torch.__version__, *flags, header.read_text()]).encode())
    folder = OUT / f"torch-{digest.hexdigest()[:16]}"
    if not (folder / "host_torch.h.gch").exists():
        for old in OUT.glob("torch-*"):
            shutil.rmtree(old)
        folder.mkdir(parents=True)
        (folder / "host_torch.h").write_text(header.read_text())
        partial = folder / f"partial.{os.getpid()}"
        subprocess.run(
            ["g++", *flags, "-x", "c++-header", str(folder / "host_torch.h"), "-o", str(partial)], check=True
        )
        partial.rename(folder / "host_torch.h.gch")
    return [*flags, "-include", str(folder / "host_torch.h")]


def library(patches: Iterable[Patch] = ()) -> Path:
    """The shared library of all of csrc/cuda and of the .cu files here, with `patches`.

    One process builds at a time: each deletes what it found out of date.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _library(patches)


def _library(patches: Iterable[Patch]) -> Path:
    include = cuda_headers()
    assert include is not None
    includes = [f"-I{HERE}", "-iquote", str(CUDA), f"-I{HERE / 'shim'}", "-isystem", str(include)]
    torch_includes = ["-isystem", str(TORCH / "include")]
    texts: dict[Path, str] = {}
    for source in [*sorted(CUDA.glob("*.cu")), *sorted(CUDA.glob("*.cpp")), *HERE.glob("*.cu")]:
        texts[source] = source.read_text()
    texts[CSRC / "schema.cpp"] = (CSRC / "schema.cpp").read_text()
    texts[HERE / "host_execution.cpp"] = (HERE / "host_execution.cpp").read_text()
    for file, old, new in patches:
        source = next(path for path in texts if path.name == file)
        if texts[source].count(old) != 1:
            raise ValueError(f"{file}: expected {old!r} once, found it {texts[source].count(old)} times")
        texts[source] = texts[source].replace(old, new)
    plain = [*FLAGS, *includes]
    needs_torch = _precompiled([*plain, *torch_includes])

    def compile_one(item: tuple[Path, str]) -> Path:
        source, text = item
        patched = text != source.read_text()
        name = source.name.replace(".", "_")
        if patched:
            name += "-" + hashlib.sha256(text.encode()).hexdigest()[:8]
        if source.suffix == ".cu":
            text = f'#include "host_execution.h"\n#line 1 "{source}"\n' + _with_shared_memory(text, source.name)
            return _compile(source, text, name, plain, _closure(text))
        if source.parent == HERE:
            return _compile(source, text, name, plain, _closure(text))
        closure = _closure(text) + (HERE / "host_torch.h").read_text()
        return _compile(source, text, name, needs_torch, closure)

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        # The longest to compile first.
        objects = list(pool.map(compile_one, sorted(texts.items(), key=lambda t: -len(t[1]))))
    digest = hashlib.sha256("".join(map(str, sorted(objects))).encode()).hexdigest()[:16]
    target = OUT / f"lib{digest}.so"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        link = [
            "-shared",
            "-fsanitize=address,undefined",
            "-Wl,-Bsymbolic",
            f"-L{TORCH / 'lib'}",
            "-ltorch_cpu",
            "-lc10",
        ]
        subprocess.run(["g++", *map(str, objects), *link, "-o", str(partial)], check=True)
        partial.replace(target)
    return target


if __name__ == "__main__":
    print(library())
