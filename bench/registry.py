"""What is measured: cases by op, each with interleaved variants, a correctness gate and its least work."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Generator

    from .device import Device

Run = Callable[[], object]


class Work(NamedTuple):
    """The least work of one pass: operations, bytes read, bytes written into memory that is there already."""

    flops: float = 0.0
    read: float = 0.0
    written: float = 0.0


@dataclass
class Bench:
    """One built case.

    variants: what is timed, by name; the first is the baseline that ratios are to.
    copies: the same over operands of their own, as many as `Device.sets` says, for states that are to find none in a
        cache.
    generators: of random numbers that variants draw, which a CUDA graph must know of.
    gate: error of a variant over its bound (at most 1 passes); a variant without an entry is torch's own.
    work: its passes, for the roofline; none where it has none. unit: the dtype whose product rate counts.
    inputs, outputs: bytes of the operands, for the share of the memory that comes on top; 0 where it does not count.
    """

    variants: dict[str, Run]
    gate: dict[str, Callable[[], float]] = field(default_factory=dict)
    work: tuple[Work, ...] = ()
    unit: str = "float32"
    inputs: int = 0
    outputs: int = 0
    copies: Sequence[dict[str, Run]] = ()
    generators: tuple["Generator", ...] = ()


@dataclass
class Case:
    """One row group of the report: built only when it runs, so that one case's memory is held at a time.

    build: called with the device as torch's default for new tensors.
    headline: its place among the few that `--headline` runs, those of most worth first; 0 for the others.
    gpu: it is for GPUs alone, as a processor would take minutes.
    """

    op: str
    label: str
    build: Callable[["Device"], Bench]
    quick: bool = False
    cold: bool = False
    headline: int = 0
    gpu: bool = False


_REGISTRY: dict[str, Callable[[], Iterator[Case]]] = {}


def register(op: str) -> Callable[[Callable[[], Iterator[Case]]], Callable[[], Iterator[Case]]]:
    """Decorator: the function yields the cases of `op`."""

    def add(function: Callable[[], Iterator[Case]]) -> Callable[[], Iterator[Case]]:
        _REGISTRY[op] = function
        return function

    return add


def about(op: str) -> str:
    """The sentence that the module of an op's cases begins with; nothing for an op that is no longer measured."""
    cases([])
    found = _REGISTRY.get(op)
    return (sys.modules[found.__module__].__doc__ or "").partition("\n")[0] if found else ""


def cases(ops: list[str] | None = None, quick: bool = False, headline: bool = False, gpu: bool = False) -> list[Case]:
    """The registered cases, of `ops` only if given, and for a GPU if there is one; ValueError for an unknown op."""
    from . import (  # noqa: F401
        alignment,
        convolution,
        feedback_mm,
        feedback_weight,
        layers,
        locally_connected,
        low_rank,
        recurrent,
        steps,
        untied_nets,
        weight_gradient,
    )

    if unknown := set(ops or ()) - set(_REGISTRY):
        raise ValueError(f"--op: expected one of {', '.join(_REGISTRY)}, got {', '.join(sorted(unknown))}")
    found = [c for op in ops or _REGISTRY for c in _REGISTRY[op]() if (c.quick or not quick) and (gpu or not c.gpu)]
    return sorted((c for c in found if c.headline), key=lambda c: c.headline) if headline else found
