"""The compiled library `bioplaus_kernels._C`, if there is one, and the reason if there is not."""

from importlib import import_module, util
from types import ModuleType


def _load() -> tuple[ModuleType | None, str]:
    name = f"{__name__.split('.')[0]}._C"
    if util.find_spec(name) is None:
        return None, "not built: install with `pip install . --no-build-isolation` where there is a C++ compiler"
    try:
        return import_module(name), ""
    except ImportError as error:
        return None, (
            f"built, but it does not load ({error}); "
            "rebuild against the torch in use: `pip install . --no-build-isolation --force-reinstall --no-deps`"
        )


library, reason = _load()
