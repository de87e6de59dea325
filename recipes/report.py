"""A run's metrics as a table and as a picture. A run is a list of rows, one per epoch, the first before training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

Row = dict[str, Any]


def columns(row: Row, kind: str) -> list[str]:
    """The columns of ``kind`` ("angle_weight" or "angle_grad") that say something about the feedback.

    That leaves out the first layer's weight angle, as nothing uses its feedback, and the last layer's gradient angle,
    which is 0 by definition.
    """
    found = [name for name in row if name.startswith(kind + "/")]
    return found[1:] if kind == "angle_weight" else found[:-1]


def mean_angle(row: Row, kind: str) -> float:
    """Mean over :func:`columns`; layers left to back-propagation, whose weight angle is 0, do not count."""
    angles = [row[name] for name in columns(row, kind)]
    if kind == "angle_weight":
        angles = [value for value in angles if value != 0] or [0.0]
    return sum(angles) / len(angles) if angles else math.nan


def table(runs: dict[str, list[Row]]) -> str:
    rows = []
    for rule, run in runs.items():
        last = run[-1]
        seconds = [row["seconds"] for row in run[1:]]
        rows.append(
            [
                rule,
                100 * last["test_error"],
                mean_angle(last, "angle_weight"),
                mean_angle(last, "angle_grad"),
                sum(seconds) / len(seconds),
            ]
        )
    headers = ["rule", "test error %", "angle W to B °", "angle to BP's gradient °", "s/epoch"]
    return tabulate(rows, headers, floatfmt=("", ".2f", ".1f", ".1f", ".2f"))


def picture(runs: dict[str, list[Row]], title: str, path: Path) -> None:
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    figure.suptitle(title)
    error, weight, grad = figure.subplots(1, 3)
    for number, (rule, run) in enumerate(runs.items()):
        colour = f"C{number}"
        epochs = [row["epoch"] for row in run]
        error.plot(epochs, _percent(run, "test_error"), color=colour, linewidth=2, label=rule)
        error.plot(epochs, _percent(run, "train_error"), color=colour, linestyle=":")
        for axes, kind in ((weight, "angle_weight"), (grad, "angle_grad")):
            for name in columns(run[0], kind):
                axes.plot(epochs, [row[name] for row in run], color=colour, alpha=0.3, linewidth=0.7)
            axes.plot(epochs, [mean_angle(row, kind) for row in run], color=colour, linewidth=2)
    error.set(title="test error (dotted: training)", ylabel="%", yscale="log")
    weight.set(title="angle, W to B (thin: each layer)", ylabel="degrees")
    grad.set(title="angle to BP's gradient (thin: each layer)", ylabel="degrees")
    for axes in (error, weight, grad):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    for axes in (weight, grad):
        axes.set(ylim=(-3, 123), yticks=range(0, 121, 15))
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=120)


def _percent(run: list[Row], name: str) -> list[float]:
    """With gaps where it is 0, which a logarithmic axis has no place for."""
    return [100 * row[name] or math.nan for row in run]
