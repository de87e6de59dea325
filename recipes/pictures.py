"""Pictures of runs: small multiples of errors and of angles, a table's overview, a search's trials."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from sklearn.isotonic import isotonic_regression

from recipes.report import MEASURES, Row, Run, like_for_like, mean_angle, measured, short

# A rule's colour is the same in every picture, the benchmarks' and the gallery's too.
COLOURS = {
    "backprop": "black",
    "usf": "#1565c0",
    "frsf": "#2e9e3f",
    "brsf": "#8e24aa",
    "fa_signed_init": "#17a2b8",
    "concordance": "#5bb8c9",
    "fa": "#e65100",
    "low_rank": "#f2a65a",
    "kp": "#00897b",
    "wm": "#795548",
    "sa": "#4c9f70",
    "aa": "#73c48f",
    "ia": "#a3d9b1",
    "dfa": "#ad1457",
    "sdfa": "#e05a8f",
    "drtp": "#8e0038",
    "dkp": "#f48fb1",
    "shallow": "#9e9d24",
    "tp": "#a1887f",
    "dtp": "#7b3fa0",
    "sdtp": "#a66bc9",
    "ao_sdtp": "#5c2d78",
    "ddtp": "#8d6e63",
    "dtpdrl": "#6d4c41",
    "l_drl": "#4e342e",
    "fw_dtp": "#bcaaa4",
}
# Between the ends' labels, of a panel's height.
GAP = 0.08
WIDTH = 7.6
OTHER, PAPER = "#d8d8d8", "#777777"


def colour(run: Run) -> str:
    return COLOURS.get(run.header["experiment"].get("algorithm", {}).get("name", ""), PAPER)


def exact(run: Run) -> bool:
    """Whether it trains by back-propagation, in every layer."""
    algorithm = run.header["experiment"].get("algorithm", {})
    return algorithm.get("name") == "backprop" and not {"last_layer", "kinds"} & algorithm.keys()


def curves(rows: list[list[Run]], title: str, path: Path) -> None:
    """A panel a row: its score over the epochs, the mean of its seeds with a band of their standard deviation, dotted
    that of training, and in grey the other rows."""
    figure, panels = _grid(rows, title)
    score = rows[0][0].score
    scale = 1 if score == "test_loss" else 100
    train = score.replace("test", "train")
    means = [_over_seeds(runs, lambda row: row.get(score), scale) for runs in rows]
    learnt = [_over_seeds(runs, lambda row: row.get(train), scale)[1] for runs in rows]
    trained = any(train in row for row in rows[0][0].rows)
    # Not from before training, which would take most of the space.
    lines = [line[1:] for line in (*(mean for _, mean, _ in means), *learnt)]
    values = [value for line in lines for value in line if math.isfinite(value) and value > 0]
    longest = max(epochs[-1] for epochs, _, _ in means)
    for axes, runs, (epochs, mean, deviation), learning in zip(panels, rows, means, learnt, strict=False):
        for other, line, _ in means:
            axes.plot(other[1:], line[1:], color=OTHER, linewidth=0.8, zorder=1)
        own = colour(runs[0])
        low, high = ([m + sign * d for m, d in zip(mean, deviation, strict=True)] for sign in (-1, 1))
        axes.fill_between(epochs[1:], low[1:], high[1:], color=own, alpha=0.25, linewidth=0, zorder=2)
        axes.plot(epochs[1:], mean[1:], color=own, linewidth=1.8, zorder=3)
        ends = [(mean[-1], f"{mean[-1]:.1f}", own)]
        if trained:
            axes.plot(epochs[1:], learning[1:], ":", color=own, linewidth=1.4, zorder=3)
            ends.append((learning[-1], f"{learning[-1]:.1f} train", own))
        known = runs[0].header["published"].get(score)
        if known and like_for_like(runs[0]):
            axes.plot(epochs[1:], [known] * len(epochs[1:]), "--", color=PAPER, linewidth=1, zorder=2)
            ends.append((known, f"{known:.1f} paper", PAPER))
        if score != "test_AP" and values:
            axes.set_yscale("log")
            axes.set_ylim(min(values) * 0.8, max(values) * 1.25)
            _plain(axes.yaxis, (1, 2, 5))
        elif values:
            axes.set_ylim(0, max(values) * 1.1)
        _label_ends(axes, epochs[-1], longest, ends)
    unit = " %" if scale == 100 else ""
    text = f"{short(score)}{unit}: mean of the seeds, band ± their standard deviation; grey: the other rows"
    dotted = "; dotted: training" if trained else ""
    paper = any(like_for_like(runs[0]) and score in runs[0].header["published"] for runs in rows)
    dashed = "; dashed: the paper" if paper else ""
    _caption(figure, f"{text}{dotted}{dashed}; numbers: the last epoch")
    figure.savefig(path, dpi=100)


def angles(rows: list[list[Run]], title: str, path: Path) -> bool:
    """A panel a row with angles: solid the weights' to the feedback, dashed the gradient's to back-propagation's, the
    means over the layers that `columns` has; thin, each layer. False, and no picture, where no row has any."""
    # Back-propagation's own angles are 0.
    rows = [runs for runs in rows if any(measured(runs, kind)[0] for kind in MEASURES) and not exact(runs[0])]
    if not rows:
        return False
    figure, panels = _grid(rows, title)
    longest = max(min(r.epochs for r in runs) for runs in rows)
    for axes, runs in zip(panels, rows, strict=False):
        epochs, ends = [0], []
        for kind, style, name in (("angle_weight", "-", "W to B"), ("angle_grad", "--", "to BP")):
            seeds, layers = measured(runs, kind)
            if not seeds:
                continue
            for layer in layers:
                epochs, line, _ = _over_seeds(seeds, lambda row, layer=layer: row.get(layer), 1)
                axes.plot(epochs, line, style, color=colour(runs[0]), alpha=3 / (6 + len(layers)), linewidth=0.7)
            epochs, mean, deviation = _over_seeds(seeds, lambda row, kind=kind: mean_angle(row, kind), 1)
            low, high = ([m + sign * d for m, d in zip(mean, deviation, strict=True)] for sign in (-1, 1))
            axes.fill_between(epochs, low, high, color=colour(runs[0]), alpha=0.2, linewidth=0)
            axes.plot(epochs, mean, style, color=colour(runs[0]), linewidth=2)
            ends.append((mean[-1], f"{mean[-1]:.0f}° {name}", colour(runs[0])))
            axes.set(ylim=(-3, 123), yticks=range(0, 121, 30))
        _label_ends(axes, epochs[-1], longest, ends)
    text = "degrees. solid: angle of W to B; dashed: of the gradient to back-propagation's; thin: each layer"
    _caption(figure, f"{text}; numbers: the last epoch")
    figure.savefig(path, dpi=100)
    return True


def overview(tables: dict[str, list[list[Run]]], path: Path) -> None:
    """A panel a table, a line a row, from the lowest test error up: ours with the standard deviation of its seeds, and
    the published figure, which is a mark where it is of the same data and epochs."""
    heights = [len(rows) + 2.4 for rows in tables.values()]
    figure = Figure(figsize=(WIDTH, 0.24 * sum(heights) + 0.5), layout="constrained")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights).ravel()
    for axes, (name, rows) in zip(panels, tables.items(), strict=True):
        _ranked(axes, name, rows)
    text = "test error %: ● ours, ± standard deviation of the seeds   ◇ published, for the same data and epochs"
    figure.supxlabel(text, fontsize=9)
    figure.savefig(path, dpi=100)


def _ranked(axes: Axes, name: str, rows: list[list[Run]]) -> None:
    errors = [[100 * r.best["test_error"] for r in runs] for runs in rows]
    found = sorted(zip(map(statistics.fmean, errors), errors, rows, strict=True), key=lambda entry: -entry[0])
    ends = []
    for y, (error, each, runs) in enumerate(found):
        spread = statistics.stdev(each) if len(each) > 1 else 0.0
        text = f"{error:.1f}" + next((f", {r.failed}" for r in runs if r.failed), "")
        right = error + spread
        if published := runs[0].header["published"].get("test_error"):
            text += f" (paper: {published:.1f})"
            if like_for_like(runs[0]):
                axes.plot(published, y, "D", color="white", markeredgecolor=PAPER, markersize=6, zorder=2)
                right = max(right, published)
                ends.append(published)
        axes.errorbar(error, y, xerr=spread or None, fmt="o", color=colour(runs[0]), capsize=3, zorder=3)
        axes.annotate(text, (right, y), (7, 0), textcoords="offset points", va="center", fontsize=8)
        ends += [error, right]
    axes.set_xscale("log")
    axes.set_xlim(min(ends) * 0.93, max(ends) * 1.15 * (max(ends) / min(ends)) ** 0.6)
    axes.set_ylim(-0.7, len(found) - 0.3)
    _plain(axes.xaxis, (1, 1.5, 2, 3, 5, 7))
    axes.set_yticks(range(len(found)), [runs[0].header["row"] for *_, runs in found], fontsize=7.5)
    axes.grid(alpha=0.3)
    data, epochs = rows[0][0].header["experiment"]["data"]["name"], max(r.epochs for runs in rows for r in runs)
    papers = [like_for_like(runs[0]) for runs in rows if runs[0].header["published"]]
    other = "; the paper's on other data" if papers and not any(papers) else ""
    axes.set_title(f"{name}\n{data}, {epochs} epochs{other}", fontsize=9)


def histogram(runs: list[Run], path: Path) -> None:
    """How many of a search's trials came to which score, and the score by each number that was drawn.

    Bartunov et al. 2018, figure 5, and with the number of auxiliary units as the one thing drawn figure 4.
    """
    runs = [r for r in runs if math.isfinite(r.rank)]
    drawn = [r.header["drawn"] for r in runs]
    keys = [key for key in drawn[0] if all(isinstance(d[key], int | float) for d in drawn)]
    figure = Figure(figsize=(4 * (1 + len(keys)), 3.6), layout="constrained")
    figure.suptitle(f"{runs[0].header['row']}, {len(runs)} trials")
    first, *others = figure.subplots(1, 1 + len(keys), squeeze=False)[0]
    score, scores = f"best {short(runs[0].chosen)}", [abs(r.rank) for r in runs]
    first.hist(scores, bins=20, color=colour(runs[0]))
    first.set(xlabel=score, ylabel="trials")
    for axes, key in zip(others, keys, strict=True):
        axes.plot([d[key] for d in drawn], scores, ".", color=colour(runs[0]))
        axes.set(xlabel=key, ylabel=score, xscale="log" if key.endswith("lr") else "linear")
    figure.savefig(path, dpi=100)


def apart(axes: Axes, values: list[float], gap: float) -> list[float]:
    """Heights for labels of `values`, in parts of the panel's: in their order, `gap` apart and in the panel, with as
    little moved as that takes. Where they are too many the gap is what there is room for."""
    if not values:
        return []
    low, high = 0.04, 0.96
    gap = min(gap, (high - low) / len(values))
    order = sorted(range(len(values)), key=values.__getitem__)
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [to_axes.transform((0, values[i]))[1] - k * gap for k, i in enumerate(order)]
    found = isotonic_regression(wanted, y_min=low, y_max=high - gap * (len(values) - 1))
    return [place + k * gap for _, k, place in sorted(zip(order, range(len(values)), found, strict=True))]


def _grid(rows: list[list[Run]], title: str) -> tuple[Figure, list[Axes]]:
    # No wider than a page, which would make what is written small.
    wide = min(3, len(rows))
    high = math.ceil(len(rows) / wide)
    figure = Figure(figsize=(WIDTH, 2 * high + 1), layout="constrained")
    figure.suptitle(textwrap.fill(title, int(9 * figure.get_figwidth())))
    panels = figure.subplots(high, wide, squeeze=False, sharey=True).ravel()
    for axes in panels[len(rows) :]:
        axes.set_axis_off()
    for axes, runs in zip(panels, rows, strict=False):
        failed = next((f" ({r.failed})" for r in runs if r.failed), "")
        name = textwrap.fill(runs[0].header["row"] + failed, 28)
        axes.set_title(name, fontsize=9, color=colour(runs[0]), fontweight="bold")
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    return figure, list(panels)


def _caption(figure: Figure, text: str) -> None:
    figure.supxlabel("epoch\n" + textwrap.fill(text, int(14 * figure.get_figwidth())), fontsize=9)


def _plain(axis: Any, of_ten: tuple[float, ...]) -> None:
    # A logarithmic axis with these parts of each power of ten as plain numbers.
    axis.set_major_locator(LogLocator(subs=of_ten))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _over_seeds(
    runs: list[Run], value: Callable[[Row], Any], scale: float
) -> tuple[list[int], list[float], list[float]]:
    # Epochs that every seed has, their means and standard deviations; nan, a gap, where a seed has no number.
    epochs = list(range(min(r.epochs for r in runs) + 1))
    means, deviations = [], []
    for epoch in epochs:
        found = [value(r.rows[epoch]) for r in runs]
        known = [scale * v for v in found if v is not None and not math.isnan(v)]
        means.append(statistics.fmean(known) if len(known) == len(runs) else math.nan)
        deviations.append(statistics.stdev(known) if len(known) == len(runs) > 1 else 0.0)
    return epochs, means, deviations


def _label_ends(axes: Axes, end: int, longest: int, labels: list[tuple[float, str, str]]) -> None:
    # Beside the lines' ends and apart from one another.
    axes.set_xlim(-0.04 * longest, 1.42 * longest)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= longest and tick == int(tick)])
    where: Any = axes.get_xaxis_transform()
    labels = sorted(label for label in labels if math.isfinite(label[0]))
    places = apart(axes, [label[0] for label in labels], GAP)
    for place, (value, text, own) in zip(places, labels, strict=True):
        axes.plot(end, value, "o", color=own, markersize=2.5)
        axes.annotate(
            text, (end, place), (3, 0), where, textcoords="offset points", va="center", fontsize=7.5, color=own
        )
