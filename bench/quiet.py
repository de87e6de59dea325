"""Which samples a quiet machine gave: neighbours on a host take its product units and caches in spells of seconds."""

import time
from typing import NamedTuple

import torch

from .registry import Run

# A probe this much slower than the run's fastest is not quiet.
LIMIT = 1.15
# Samples of a quiet machine that a variant needs to be kept.
ENOUGH = 20
# Seconds of a probe: shorter than a spell, and little beside a sample.
_LEAST = 40e-6


class Sample(NamedTuple):
    """One timing, and the slower of the probes around it."""

    seconds: float
    probe: float


class NoProbe:
    """Of a device that no neighbour shares."""

    enough = 0

    def __call__(self) -> float:
        """Nothing is asked."""
        return 0.0

    def quiet(self, samples: list[Sample]) -> list[float]:
        """All timings."""
        return [sample.seconds for sample in samples]


class Probe:
    """A small product on the processor's fastest units (bfloat16 where it has any), from operands in the L2 cache."""

    enough = ENOUGH

    def __init__(self, run: Run | None = None) -> None:
        self.best = float("inf")
        self._run = run or _product()
        for _ in range(500):
            self()

    def __call__(self) -> float:
        """Seconds: of two calls the faster one, as an interrupt is no spell."""
        seconds = min(_seconds(self._run), _seconds(self._run))
        self.best = min(self.best, seconds)
        return seconds

    def quiet(self, samples: list[Sample]) -> list[float]:
        """The timings between two probes near the fastest so far."""
        return [sample.seconds for sample in samples if sample.probe <= LIMIT * self.best]


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _product() -> Run:
    dtype = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    found: Run | None = None
    for n in (64, 96, 128, 192, 256):
        a, b, out = torch.randn(3, n, n).to(dtype)

        def run(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> object:
            return torch.mm(a, b, out=out)

        if found and min(_seconds(run) for _ in range(50)) > _LEAST:
            break
        found = run
    assert found is not None
    return found
