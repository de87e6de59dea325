"""Runs cases: gate first, then interleaved timing and the peak memory of one call."""

import time
from statistics import median, quantiles
from typing import Any

import torch

from .registry import Bench, Case, Run

_FLUSH_BYTES = 2**29
# Seconds of a call that passes through more memory than caches hold.
_SLOW = 0.3


def run(case: Case, seconds: float) -> list[dict[str, Any]]:
    """One result row for each variant, warm and, where the case asks for it, cold; `seconds` of timing a variant."""
    bench = case.build()
    errors = {name: gate() for name, gate in bench.gate.items()}
    timed = {name: f for name, f in bench.variants.items() if errors.get(name, 0.0) <= 1.0}
    times = {"warm": _interleave(timed, seconds, cold=False)}
    if case.cold:
        times["cold"] = _interleave(timed, seconds, cold=True)
    rows = []
    for state, measured in times.items():
        baseline = median(measured[next(iter(bench.variants))])
        for name, function in bench.variants.items():
            row: dict[str, Any] = {"op": case.op, "case": case.label, "state": state, "variant": name}
            row["error_over_bound"] = errors.get(name)
            if name in measured:
                row |= _summary(measured[name], baseline, bench)
                row["peak_bytes"] = peak_bytes(function) if state == "warm" else None
            rows.append(row)
    return rows


def _interleave(variants: dict[str, Run], seconds: float, cold: bool) -> dict[str, list[float]]:
    # Rounds over all variants, so that a slow spell of the machine falls on all of them; each sample is long enough to
    # read on the clock, and follows a call that brings back what the other variants drove out of the caches, where
    # the caches matter.
    flush = torch.empty(_FLUSH_BYTES // 4) if cold else None
    samples: dict[str, list[float]] = {name: [] for name in variants}
    repeats = {}
    for name, function in variants.items():
        first, once = _seconds(function), 0.0
        if first > _SLOW:
            samples[name].append(first)
        else:
            once = _seconds(function)
        repeats[name] = 1 if cold or not once else max(1, int(0.002 / once))
    slow = {name for name, taken in samples.items() if taken}
    least = 2 if slow else 3
    end = time.perf_counter() + seconds * len(variants)
    while time.perf_counter() < end or min(len(taken) for taken in samples.values()) < least:
        for name, function in variants.items():
            if flush is not None:
                flush.add_(1.0)
            elif name not in slow:
                function()
            n = repeats[name]
            samples[name].append(_seconds(function, n) / n)
    return samples


def _seconds(function: Run, times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        function()
    return time.perf_counter() - start


def _summary(samples: list[float], baseline: float, bench: Bench) -> dict[str, Any]:
    cuts = quantiles(samples, n=5)
    middle = median(samples)
    return {
        "ms": middle * 1e3,
        "ms_p20": cuts[0] * 1e3,
        "ms_p80": cuts[-1] * 1e3,
        "ratio": middle / baseline,
        "work": bench.work,
        "unit": bench.unit,
        "inputs": bench.inputs,
        "outputs": bench.outputs,
    }


def peak_bytes(function: Run) -> int:
    """Most bytes that torch's CPU allocator held at once for one call, above what was held before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
