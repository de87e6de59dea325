"""Runs cases: gate first, then interleaved timing and the peak memory of one call."""

import time
from statistics import median, quantiles
from typing import Any

from .device import Device
from .registry import Bench, Case, Run

# Seconds of a call that passes through more memory than caches hold.
_SLOW = 0.3


def run(case: Case, seconds: float, device: Device) -> list[dict[str, Any]]:
    """One result row for each variant in each state of the device; `seconds` of timing a variant."""
    with device.device:
        bench = case.build(device)
        errors, broken = _gates(bench, device)
    rows = []
    for state in device.states(case.cold):
        ready, failed = {}, dict(broken)
        for name, function in bench.variants.items():
            if name not in failed and errors.get(name, 0.0) <= 1.0:
                try:
                    ready[name] = device.prepared(function, state)
                except device.failures as error:
                    failed[name] = _said(error)
        measured = _interleave(ready, seconds, device, cold=state != "warm") if ready else {}
        baseline = measured.get(next(iter(bench.variants)))
        for name, function in bench.variants.items():
            row: dict[str, Any] = {"op": case.op, "case": case.label, "state": state, "variant": name}
            row["error_over_bound"] = errors.get(name)
            if name in measured:
                row |= _summary(measured[name], median(baseline) if baseline else None, bench)
                row["peak_bytes"] = device.peak_bytes(function) if state == "warm" else None
            elif name in failed:
                row["failed"] = failed[name]
            rows.append(row)
    return rows


def _gates(bench: Bench, device: Device) -> tuple[dict[str, float], dict[str, str]]:
    errors, failed = {}, {}
    for name, gate in bench.gate.items():
        try:
            errors[name] = gate()
        except device.failures as error:
            failed[name] = _said(error)
    return errors, failed


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _interleave(variants: dict[str, Run], seconds: float, device: Device, cold: bool) -> dict[str, list[float]]:
    # Rounds over all variants, so that a slow spell of the machine falls on all of them; each sample is long enough to
    # read on the clock, and follows a call that brings back what the other variants drove out of the caches, where
    # the caches matter.
    flush = device.flusher() if cold else None
    samples: dict[str, list[float]] = {name: [] for name in variants}
    repeats = {}
    for name, function in variants.items():
        first, once = device.seconds(function), 0.0
        if first > _SLOW:
            samples[name].append(first)
        else:
            once = device.seconds(function)
        repeats[name] = 1 if cold or not once else max(1, int(0.002 / once))
    slow = {name for name, taken in samples.items() if taken}
    least = 2 if slow else 3
    end = time.perf_counter() + seconds * len(variants)
    while time.perf_counter() < end or min(len(taken) for taken in samples.values()) < least:
        for name, function in variants.items():
            if flush is not None:
                flush()
            elif name not in slow:
                function()
            n = repeats[name]
            samples[name].append(device.seconds(function, n) / n)
    return samples


def _summary(samples: list[float], baseline: float | None, bench: Bench) -> dict[str, Any]:
    cuts = quantiles(samples, n=5)
    middle = median(samples)
    return {
        "ms": middle * 1e3,
        "ms_p20": cuts[0] * 1e3,
        "ms_p80": cuts[-1] * 1e3,
        "ratio": middle / baseline if baseline else None,
        "work": bench.work,
        "unit": bench.unit,
        "inputs": bench.inputs,
        "outputs": bench.outputs,
    }
