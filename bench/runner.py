"""Runs cases: gate first, then interleaved timing and the peak memory of one call."""

import re
import time
from collections.abc import Collection, Sequence
from statistics import median, quantiles
from typing import Any

from .device import Device
from .quiet import LEAST, Sample, quiet
from .registry import Bench, Case, Run

# Seconds of a call that passes through more memory than caches hold.
_SLOW = 0.3


class DeviceLost(RuntimeError):
    """`variant` failed in a way that leaves the process without its GPU; the message says how."""

    def __init__(self, variant: str, said: str) -> None:
        super().__init__(said)
        self.variant = variant


def run(
    case: Case,
    seconds: float,
    device: Device,
    states: Collection[str] = (),
    without: str = "",
    lost: dict[str, str] | None = None,
    patience: float = 0.0,
) -> list[dict[str, Any]]:
    """One result row for each variant in each state of the device; `seconds` of timing a variant.

    states: of the device's, these only. without: a regular expression of variants to leave out, but for the first.
    lost: variants not to be run, and why. patience: seconds that the case may wait, where the device has a probe, for
    enough quiet samples of every variant; a row with fewer is of all samples. What fails is a row; raises DeviceLost
    where nothing can follow.
    """
    wanted = [state for state in device.states(case.cold) if not states or state in states]
    row: dict[str, Any] = {"op": case.op, "case": case.label}
    failed = dict(lost or {})
    try:
        if "building" not in failed:
            with device.device:
                bench = case.build(device)
    except device.failures as error:
        failed["building"] = _said("building", error, device)
    if said := failed.get("building"):
        return [row | {"state": s, "variant": "building", "error_over_bound": None, "failed": said} for s in wanted]
    first, *others = bench.variants
    names = [first, *(name for name in others if not without or not re.search(without, name))]
    with device.device:
        errors, broken = _gates(bench, names, device, failed)
    rows = []
    last = time.perf_counter() + patience
    for state in wanted:
        copies = (bench.variants, *bench.copies) if state == "graph" else (bench.variants,)
        ready, failed = {}, dict(broken)
        for name in names:
            if name not in failed and errors.get(name, 0.0) <= 1.0:
                try:
                    ready[name] = device.prepared([variants[name] for variants in copies], state, bench.generators)
                except device.failures as error:
                    failed[name] = _said(name, error, device)
        # Sets of operands that no cache holds need no flush.
        cold = state != "warm" and len(copies) == 1
        samples = _interleave(ready, seconds, last, device, cold, len(copies), failed)
        calm = {name: quiet(taken, device.probe.best) for name, taken in samples.items()} if device.probe else {}
        measured = {
            name: calm[name] if len(calm.get(name, ())) >= LEAST else [seconds for seconds, _ in taken]
            for name, taken in samples.items()
        }
        baseline = measured.get(first)
        for name in names:
            found = row | {"state": state, "variant": name, "error_over_bound": errors.get(name)}
            if name in measured:
                found |= _summary(measured[name], median(baseline) if baseline else None, bench)
                if name in calm:
                    found["quiet"] = len(calm[name])
                if state == "warm":
                    found |= _of_one_call(name, ready[name], median(measured[name]), device)
            elif name in failed:
                found["failed"] = failed[name]
            rows.append(found)
    return rows


def _gates(
    bench: Bench, names: Sequence[str], device: Device, lost: dict[str, str]
) -> tuple[dict[str, float], dict[str, str]]:
    errors, failed = {}, dict(lost)
    for name in names:
        if name in bench.gate and name not in lost:
            try:
                errors[name] = bench.gate[name]()
            except device.failures as error:
                failed[name] = _said(name, error, device)
    return errors, failed


def _said(name: str, error: BaseException, device: Device) -> str:
    said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if device.lost():
        raise DeviceLost(name, said) from error
    return said


def _of_one_call(name: str, function: Run, seconds: float, device: Device) -> dict[str, Any]:
    try:
        # As many as a few milliseconds hold.
        host = device.host_seconds(function, max(1, min(20, int(0.005 / max(seconds, 1e-6)))))
        return {"peak_bytes": device.peak_bytes(function)} | ({} if host is None else {"host_ms": host * 1e3})
    except device.failures as error:
        return {"peak_bytes": None, "failed": _said(name, error, device)}


def _interleave(
    variants: dict[str, Run],
    seconds: float,
    last: float,
    device: Device,
    cold: bool,
    calls: int,
    failed: dict[str, str],
) -> dict[str, list[Sample]]:
    # Rounds over all variants, so that a slow spell of the machine falls on all of them; each sample is long enough to
    # read on the clock, and follows a call that brings back what the other variants drove out of the caches, where
    # the caches matter. A variant makes `calls` calls; one that raises goes into `failed`. Rounds go on until `last`
    # where a variant has too few quiet samples.
    probe = device.probe
    flush = device.flusher() if cold and variants else None
    samples: dict[str, list[Sample]] = {name: [] for name in variants}
    repeats: dict[str, int] = {}
    slow = set()

    def timed(function: Run, n: int = 1) -> Sample:
        before = probe() if probe else 0.0
        taken = device.seconds(function, n)
        return taken / (n * calls), max(before, probe() if probe else 0.0)

    def restless() -> bool:
        return probe is not None and any(len(quiet(taken, probe.best)) < LEAST for taken in samples.values())

    def sample(name: str) -> None:
        function = variants[name]
        try:
            if name not in repeats:
                first, once = timed(function), 0.0
                if first[0] * calls > _SLOW:
                    samples[name].append(first)
                    slow.add(name)
                else:
                    once = device.seconds(function)
                repeats[name] = 1 if cold or not once else max(1, int(0.002 / once))
                return
            if flush is not None:
                flush()
            elif name not in slow and calls == 1:
                function()
            samples[name].append(timed(function, repeats[name]))
        except device.failures as error:
            failed[name] = _said(name, error, device)
            del samples[name]

    for name in variants:
        sample(name)
    least = 2 if slow else 3
    end = time.perf_counter() + seconds * len(variants)
    while samples and (
        (now := time.perf_counter()) < end or min(map(len, samples.values())) < least or (now < last and restless())
    ):
        for name in list(samples):
            sample(name)
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
        "peak_bytes": None,
    }
