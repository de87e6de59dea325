"""Which samples count on a processor that others use as well: those with two fast probes around them.

Programs beside this one take cores, vector and tile units and caches in spells of seconds; a probe is then slower than
the fast ones of the run.
"""

import time
from bisect import insort
from collections.abc import Callable

import torch

# How many times as long as the fast probes a quiet one may take, the share of all that are faster still, as a few are
# far faster on some processors, and quiet samples without which a row is none to be kept.
NEAR = 1.15
FASTEST = 0.05
LEAST = 20
# Seconds in which a probe is tried again, far fewer than a spell has: what ran before may have driven its operands out
# of the caches, and a long call leaves the processor slower for a while.
PATIENCE = 0.002

# Seconds of a call, and of the slower of the two probes around it.
Sample = tuple[float, float]


class Probe:
    """Seconds of an int8 product: by all threads, on tile units where there are, in the L2 caches.

    Large enough to be slower where others use these units. Of a small float32 one, a mean over 20 µs, where torch
    multiplies int8 in loops, as on AVX2. known: `best` of an earlier process on this processor, as one that begins in a
    spell may see nothing else.
    """

    def __init__(self) -> None:
        self.known = float("inf")
        x = torch.randint(-9, 9, (384, 384), dtype=torch.int8, device="cpu")
        y = x.float()
        out, sums = torch.empty(384, 384, dtype=torch.int32, device="cpu"), torch.empty_like(y)
        small, small_sums = y[:128, :128].contiguous(), sums[:128, :128].contiguous()
        self._calls = 1
        narrow, wide = (lambda: torch._int_mm(x, x, out=out)), (lambda: torch.mm(y, y, out=sums))
        in_loops = self._least(narrow) > self._least(wide)
        self._product = (lambda: torch.mm(small, small, out=small_sums)) if in_loops else narrow
        self._calls = max(1, round(20e-6 / min(self._seconds() for _ in range(100))))
        self._all = sorted(self._seconds() for _ in range(100))

    @property
    def best(self) -> float:
        """Of all so far, what one in twenty stays below, or what is known."""
        return min(self.known, self._all[int(FASTEST * len(self._all))])

    def __call__(self) -> float:
        """Seconds now."""
        end = time.perf_counter() + PATIENCE
        taken = self._seconds()
        while taken > NEAR * self.best and time.perf_counter() < end:
            taken = min(taken, self._seconds())
        insort(self._all, taken)
        return taken

    def _least(self, product: Callable[[], object]) -> float:
        self._product = product
        return min(self._seconds() for _ in range(10))

    def _seconds(self) -> float:
        start = time.perf_counter()
        for _ in range(self._calls):
            self._product()
        return (time.perf_counter() - start) / self._calls


def quiet(samples: list[Sample], best: float) -> list[float]:
    """Seconds of the quiet ones; `best`: of the run's probes."""
    return [seconds for seconds, probe in samples if probe <= NEAR * best]
