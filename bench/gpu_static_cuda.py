"""Rows of bench/gpu_static.csv for the CUDA kernels, compiled by nvcc for GPUs that need not be here.

As in a build (CMakeLists.txt), nvcc makes PTX of a file once, for compute_80, and ptxas machine code of it for each
target.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from .gpu_static import VECTOR_LOAD, Row, cached, hot_loop, occupancy

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
FLAGS = ("-std=c++17", "-O3", "--fmad=false")

TENSOR_CORE = r"\b[IH]MMA\b"
# What forms the sums of each product kernel, in its machine code.
PRODUCTS = {
    r"multiply_kernel|lc_kernel<(half|bfloat16)": TENSOR_CORE,
    r"lc_kernel<float": r"\bFFMA2?\b",
    r"lc_kernel<double": r"\bDFMA\b",
}
# The constants that say how much dynamic shared memory the kernels of a file are launched with.
DYNAMIC_SHARED = {
    "feedback_mm_digits.cu": {
        f"multiply_kernel<Tile<{sizes}> >": f"Tile<{sizes}>" for sizes in ("2, 1, 4", "4, 1, 4", "4, 2, 2")
    },
}


@cache
def tools() -> dict[str, str] | None:
    """nvcc and ptxas of one toolkit, and the disassembler that Triton brings; None where one is missing."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and str(Path(nvcc).resolve().parent.parent), "/usr/local/cuda"]
    home = next((h for h in homes if h and (Path(h) / "include" / "cuda_runtime.h").is_file()), None)
    try:
        import triton
    except ImportError:
        return None
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    found = {"nvcc": f"{home}/bin/nvcc", "ptxas": f"{home}/bin/ptxas", "nvdisasm": str(disassembler)}
    return found if all(Path(path).is_file() for path in found.values()) and shutil.which("c++filt") else None


def _run(tool: str, *arguments: str | Path, text: str | None = None) -> str:
    command = [(tools() or {}).get(tool, tool), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, input=text)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr


@cache
def toolchain() -> str:
    """As the table names it."""
    version = re.search(r"V([\d.]+)", _run("nvcc", "--version"))
    assert version is not None
    return f"nvcc {version[1]}"


def sources() -> list[Path]:
    """The files with kernels, those that take longest first."""
    return sorted(CUDA.glob("*.cu"), key=lambda path: (path.name != "lc.cu", path))


def readable(names: list[str]) -> dict[str, str]:
    """Kernels' names without the namespaces and the arguments."""
    short = {}
    for mangled, name in zip(names, _run("c++filt", text="\n".join(names)).splitlines(), strict=True):
        name = re.sub(r"\(anonymous namespace\)::|bioplaus::|^void ", "", name)
        name = re.sub(r"\((?=[^<>]*$).*|(?<=>)\(.*", "", name).replace("__nv_", "").replace("__half", "half")
        short[mangled] = re.sub(r"\(Product\)(\d)", lambda p: ("forward", "input", "weight")[int(p[1])], name)
    return short


def one_of_each(names: dict[str, str]) -> list[str]:
    """One kernel of those that differ in the dtype alone, in the first of these that there is."""
    dtypes = ("bfloat16", "float", "half", "double")
    rank = {m: next((i for i, t in enumerate(dtypes) if re.search(rf"\b{t}\b", name)), 0) for m, name in names.items()}
    chosen: dict[str, str] = {}
    for mangled in sorted(names, key=rank.__getitem__):
        chosen.setdefault(re.sub(rf"\b({'|'.join(dtypes)})\b", "T", names[mangled]), mangled)
    return list(chosen.values())


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


@cache
def _hash() -> str:
    """Of the headers and this program."""
    headers = [p for folder in ("cuda", "common") for p in sorted((ROOT / "csrc" / folder).glob("*.*h"))]
    files = (*headers, Path(__file__), Path(__file__).with_name("gpu_static.py"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest() + toolchain()


@cache
def _ptx(source: Path) -> str:
    # Names of shared memory's sizes, so that they are in the PTX.
    sizes = (f"__device__ int shared_{i} = {t}::kSharedBytes;" for i, t in enumerate(_tiles(source)))
    with tempfile.TemporaryDirectory() as folder:
        program, out = Path(folder, "k.cu"), Path(folder, "k.ptx")
        program.write_text(f'#include "{source}"\nnamespace bioplaus {{ {" ".join(sizes)} }}\n')
        _run("nvcc", *FLAGS, "-arch=compute_80", "-ptx", program, "-o", out)
        return out.read_text()


def _tiles(source: Path) -> list[str]:
    return sorted(set(DYNAMIC_SHARED.get(source.name, {}).values()))


def _dynamic_shared(source: Path, kernel: str, ptx: str) -> int:
    tile = DYNAMIC_SHARED.get(source.name, {}).get(kernel)
    return _number(rf"shared_{_tiles(source).index(tile)}E? = (\d+)", ptx) if tile else 0


def _heads(ptx: str) -> dict[str, str]:
    """What PTX says of each kernel before its code: the bounds of its launch among others."""
    return dict(re.findall(r"\.entry (\w+)\((.*?)\{", ptx, flags=re.S))


def _rows(source: Path, target: str, every: bool) -> list[Row]:
    ptx = _ptx(source)
    heads = _heads(ptx)
    names = readable(list(heads))
    chosen = list(names) if every else one_of_each(names)
    with tempfile.TemporaryDirectory() as folder:
        text, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        text.write_text(ptx)
        said = _run("ptxas", "-v", f"-arch={target}", *(f"--entry={name}" for name in chosen), text, "-o", cubin)
        code = re.split(r"^\s*\.section\s+\.text\.", _run("nvdisasm", "-c", cubin), flags=re.M)[1:]
    code_of = {block.split(",", 1)[0].strip('"'): block for block in code}
    rows = []
    for mangled in chosen:
        name, code_here = names[mangled], code_of[mangled]
        report = said.split(f"Compiling entry function '{mangled}'", 1)[1].split("Compiling entry function", 1)[0]
        registers, static = _number(r"Used (\d+) registers", report), _number(r"(\d+) bytes smem", report)
        threads, shared = _number(r"\.maxntid (\d+)", heads[mangled]), _dynamic_shared(source, name, ptx)
        product = next((p for kernels, p in PRODUCTS.items() if re.match(kernels, name)), None)
        rows.append(
            Row(
                f"csrc/cuda/{source.name}",
                name,
                target,
                toolchain(),
                registers,
                _number(r"(\d+) bytes spill stores", report),
                static,
                shared,
                threads,
                occupancy(target, registers, threads, static + shared),
                _number(r"\.minnctapersm (\d+)", heads[mangled]),
                len(re.findall(TENSOR_CORE, code_here)),
                len(re.findall(VECTOR_LOAD["cuda"], code_here)),
                *(hot_loop(code_here, product) if product else (0, 0)),
            )
        )
    return rows


def measure(source: Path, target: str, every: bool) -> list[Row]:
    """The rows of one file: of all its kernels, or of one of those that differ in the dtype alone. Compiled only if
    sources or compiler changed since it was last asked."""
    key = " ".join((_hash(), hashlib.sha256(source.read_bytes()).hexdigest(), source.name, target, str(every)))
    return cached(key, lambda: _rows(source, target, every))


def rows(every: bool = False) -> list[Row]:
    """Of all kernels for sm_80 and one of each for other targets; `every`: of all. Compiled side by side."""
    cells = [(source, target, every or target == "sm_80") for target in TARGETS for source in sources()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for some in pool.map(lambda cell: measure(*cell), cells) for row in some]
