"""Fills Triton's cache, on a machine without a GPU, with what the first minutes on one launch (gpu_prepare.sh)."""

# ruff: noqa: I001  # before the library
import re
from collections.abc import Iterator

from . import gpu_pretend  # noqa: F401

import torch

import bioplaus_kernels as bk

from . import device, gpu_calls, registry
from .gpu_check import LAYERS
from .registry import Run


class Pretended(device.Cuda):
    """One set of operands is enough to compile for."""

    device = torch.device("cpu")

    def sets(self, size: int) -> int:
        """One."""
        return 1


def launches() -> Iterator[tuple[str, Run]]:
    """The calls of the stages, but for those of tests."""
    with bk.backends.use("triton"):
        yield from ((call.name, call.run) for call in gpu_calls.calls("triton"))
    layers = [c for c in registry.cases(["locally_connected"], gpu=True) if re.search(LAYERS, c.label)]
    for case in registry.cases(headline=True, gpu=True) + layers:
        for name, variant in case.build(Pretended()).variants.items():
            # Triton has kernels for ±s; others would be products of the processor's.
            if name.endswith(", triton") and not re.search("uniform|fa stored|frsf stored", name):
                yield f"{case.label} {name}", variant


def main() -> None:
    """Every launch; what fails is named and does not stop the others."""
    failed = 0
    for name, run in launches():
        try:
            run()
        except Exception as error:
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}"[:300], flush=True)
    print(f"{failed} calls failed", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
