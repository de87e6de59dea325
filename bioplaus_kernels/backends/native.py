"""The compiled library `bioplaus_kernels._C`, if there is one, and the reason if there is not."""

from importlib import import_module, util
from types import ModuleType

import torch

from .reference import OPS


def _load() -> tuple[ModuleType | None, str]:
    name = f"{__name__.split('.')[0]}._C"
    if util.find_spec(name) is None:
        return None, "not built: install with `pip install . --no-build-isolation` where there is a C++ compiler"
    try:
        module = import_module(name)
        missing = [op for op in OPS if not hasattr(torch.ops.bioplaus, op)]
        if not missing:
            return module, ""
        problem = f"built from other sources than these: no {', '.join(missing)}"
    except ImportError as error:
        problem = f"built, but it does not load ({error})"
    return None, (
        f"{problem}; rebuild against the torch in use: `pip install . --no-build-isolation --force-reinstall --no-deps`"
    )


library, reason = _load()


def product_level() -> str:
    """Of integer products on this processor: AMX, AVX512_VNNI, …; fixed, with torch's own level, by the first call."""
    return library.active_product_level() if library else ""


# What torch.compiler.assume_constant_result does, without its import of the compiler.
product_level._dynamo_marked_constant = True  # type: ignore[attr-defined]


def missing_kernels(capability: tuple[int, int]) -> str:
    return ""
