"""The compiled library `bioplaus_kernels._C`, if there is one that fits, and the reason if there is not."""

import struct
from importlib import import_module, util
from pathlib import Path
from types import ModuleType

import torch

from .._sources import digest
from .._version import __version__
from .reference import OPS


def _load() -> tuple[ModuleType | None, str]:
    name = f"{__name__.split('.')[0]}._C"
    spec = util.find_spec(name)
    if spec is None:
        return None, "not built: install with `pip install . --no-build-isolation` where there is a C++ compiler"
    try:
        if spec.origin is not None:
            _check_whole(Path(spec.origin))
        module = import_module(name)
        problem = _misfit(module)
        if not problem:
            return module, ""
    except (ImportError, OSError) as error:
        problem = f"built, but it does not load ({error})"
    return None, (
        f"{problem}; rebuild against the torch in use: `pip install . --no-build-isolation --force-reinstall --no-deps`"
    )


def _check_whole(path: Path) -> None:
    # The loader maps what an ELF file's header promises, and a process that reads there what the file lacks is killed.
    # Linkers write the table of sections last.
    with path.open("rb") as file:
        header, size = file.read(64), file.seek(0, 2)
    if len(header) == 64 and header.startswith(b"\x7fELF\2"):
        (table,), (entry, count) = struct.unpack_from("=Q", header, 40), struct.unpack_from("=HH", header, 58)
        if table + entry * count > size:
            raise ImportError(f"{path.name} is cut off: {table + entry * count} bytes wanted, got {size}")


def _misfit(module: ModuleType) -> str:
    # Why these sources cannot use it. An op's signature stands twice, in csrc/schema.cpp and in the reference.
    config = module.build_config()
    if config["version"] != __version__:
        return f"built for version {config['version']}, this is {__version__}"
    built, here = (version.partition("+")[0] for version in (config["torch"], torch.__version__))
    if built != here:
        return f"built with torch {built}, this is torch {here}"
    others = []
    for name, reference in OPS.items():
        wanted = f"bioplaus::{name}{torch.library.infer_schema(reference, mutates_args=())}"
        if wanted not in map(str, torch._C._jit_get_schemas_for_operator(f"bioplaus::{name}")):
            others.append(name)
    return f"built from other sources than these: no {', '.join(others)} with these arguments" if others else ""


library, reason = _load()


def outdated() -> bool:
    """Whether the sources beside the package, as an editable install has them, are others than it was built from."""
    found = digest(Path(__file__).parents[2])
    return library is not None and found not in ("", library.build_config().get("digest"))


def missing_kernels(capability: tuple[int, int]) -> str:
    """Why no kernel that was built runs on a GPU of this compute capability; empty if they do.

    Machine code runs on its own major version from its minor on; PTX, which is always sm_80's, on whatever is newer.
    """
    if capability < (8, 0):
        return f"the CUDA kernels need compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    archs = library.build_config()["cuda_archs"] if library else []
    for arch in archs:
        number, _, ptx = arch.removeprefix("sm_").partition("+")
        if ptx or (int(number[:-1]) == capability[0] and int(number[-1]) <= capability[1]):
            return ""
    return (
        f"the CUDA kernels are built for {', '.join(archs)}, this GPU is sm_{capability[0]}{capability[1]}: "
        f"rebuild with TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}"
    )


def product_level() -> str:
    """Of integer products on this processor: AMX, AVX512_VNNI, …; fixed, with torch's own level, by the first call."""
    return library.active_product_level() if library else ""


def half_instructions(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies bfloat16, or float16, itself; fixed like the level. Said of any but x86."""
    return bool(library and library.half_instructions(dtype == torch.bfloat16))


# What torch.compiler.assume_constant_result does, without its import of the compiler.
product_level._dynamo_marked_constant = True  # type: ignore[attr-defined]
half_instructions._dynamo_marked_constant = True  # type: ignore[attr-defined]
