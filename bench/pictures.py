"""Pictures of the benchmark pages: panels of one work each, time over the baseline's by batch, one line a way."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from recipes.pictures import COLOURS as RULES
from recipes.pictures import apart

Row = dict[str, Any]
# A panel: ways by name, each with its ratios by batch; batch is 0 where a case has none.
Panel = dict[str, dict[int, float]]

_WIDTH = 4.2  # of a panel with its labels, in inches

BASELINE, REST = "black", ("#795548", "#827717", "#546e7a", "#ad1457", "#4527a0", "#00838f")
# Torch's ways are greys and browns; a way is found with and without "bioplaus, ".
COLOURS = {
    **RULES,
    "sign, then matmul": "#8d6e63",
    "sign, then matmul, torch.compile": "#bcaaa4",
    "sign x magnitude, then matmul": "#8d6e63",
    "sign x magnitude, then matmul, torch.compile": "#bcaaa4",
    "draw uniform, then matmul": "#9e9e9e",
    "unfold + einsum": "#9e9e9e",
    "B formed": "#8d6e63",
    "backprop": "#00897b",
    "usf, signs from W": "#64a6e8",
    "usf, packed signs": "#1565c0",
    "frsf stored": "#8bc34a",
    "fa seeded, ±s": "#d81b60",
    "fa seeded, uniform": "#e65100",
    "fa seeded, normal": "#ffb300",
    "fa stored": "#f59e42",
    "by digits": "#1565c0",
    "by tables": "#d81b60",
    "LocallyConnected2d": "#00897b",
}
_BATCH = re.compile(r",?\s?\b[MN]=(\d+)")
_PART = re.compile(r"((?:forward \+ backward|forward|backward input|backward weight)?(?: ?(?:float32|bfloat16))?)$")
_ALONE = re.compile(r", (cpu|cuda|triton|digits|int_mm|formed|feedback_weight \+ cuBLAS)$")
_MAGNITUDES = re.compile(r"sign x|draw|.*uniform|.*stored")
THEIRS = re.compile(r"torch|sign|draw|three bf16|stacked|unfold|B formed|backprop|BioTorch|loop")


def split(case: str) -> tuple[str, str, int]:
    """Of a case's label: the part of the work that one picture shows, the panel, and the batch (0: none)."""
    batch = _BATCH.search(case)
    rest = _BATCH.sub("", case).strip(" ,")
    part = _PART.search(rest)[1].strip()
    return part, rest.removesuffix(part).strip(" ,"), int(batch[1]) if batch else 0


def state(result: dict[str, Any]) -> str:
    """What pictures and goals are of: calls one after another, on a GPU as graphs, without the host's time."""
    return "graph" if "gpu" in result["machine"] else "warm"


def panels(result: dict[str, Any], op: str) -> dict[str, dict[str, Panel]]:
    """Panels by part and name. Each backend and way alone, which a GPU's results have too, is left to the tables."""
    found: dict[str, dict[str, Panel]] = {}
    rows = [r for r in result["rows"] if r["op"] == op and r["state"] == state(result) and r.get("ratio")]
    for row in rows:
        if not _ALONE.search(row["variant"]):
            part, name, batch = split(row["case"])
            found.setdefault(part, {}).setdefault(name, {}).setdefault(row["variant"], {})[batch] = row["ratio"]
    # Products of ±s and of magnitudes are two families, too many lines for one panel.
    for part, named in list(found.items()):
        if max(len(panel) for panel in named.values()) > 11:
            del found[part]
            for family, other in (("B of ±s", False), ("B with magnitudes", True)):
                found[f"{part}, {family}"] = {
                    name: {w: p for i, (w, p) in enumerate(panel.items()) if not i or _magnitude(w) == other}
                    for name, panel in named.items()
                }
    return found


def _magnitude(way: str) -> bool:
    return bool(_MAGNITUDES.match(way))


def colour(way: str, first: str) -> tuple[str, str]:
    """Colour and line style of a way, the same in every picture but for the baseline's, `first`."""
    if way == first:
        return BASELINE, "-"
    name = way.removeprefix("bioplaus, ")
    if name in COLOURS:
        return COLOURS[name], "-"
    peer = name.removeprefix("BioTorch ")
    if peer in COLOURS:
        return COLOURS[peer], ":"
    return REST[crc32(name.encode()) % len(REST)], "-"


def label(way: str) -> str:
    """A way's name, as short as a panel wants it."""
    return way.replace("bioplaus, ", "ours, ").replace(", then", ",").replace("torch.compile", "compiled")


def _scale(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def _ratios(axes: Axes, values: list[float], which: str) -> None:
    """A logarithmic axis with the ticks that its range has room for."""
    low, high = min(*values, 0.8) / 1.15, max(*values, 1.25) * 1.15
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    narrow = high / low < 6
    ticks = [m * 10.0**e for e in range(-3, 4) for m in ((1, 1.4, 2, 3, 5, 7) if narrow else (1, 2, 5))]
    ticks = [t for t in ticks if low <= t <= high]
    if len(ticks) > 7:
        ticks = [t for t in ticks if f"{t:.0e}"[0] == "1"]
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    _scale(axis)


def _lines(axes: Axes, panel: Panel) -> None:
    first = next(iter(panel))
    batches = sorted({batch for points in panel.values() for batch in points})
    _ratios(axes, [v for points in panel.values() for v in points.values()], "y")
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlabel("batch", fontsize=8)
    ends = []
    for way, points in panel.items():
        shade, style = colour(way, first)
        last = max(points)
        xs = [i for i, batch in enumerate(batches) if batch in points]
        axes.plot(xs, [points[batches[i]] for i in xs], style, color=shade, marker="o", ms=2.5, lw=1.6)
        ends.append((points[last], way, shade))
    axes.axhline(1, color=BASELINE, lw=0.8)
    gap = 10 / (axes.get_window_extent().height * 72 / axes.figure.dpi)
    for (_, way, shade), y in zip(ends, apart(axes, [end[0] for end in ends], gap), strict=True):
        axes.text(1.03, y, label(way), color=shade, fontsize=7.5, va="center", transform=axes.transAxes)


def _dots(axes: Axes, panel: Panel) -> None:
    first = next(iter(panel))
    values = {way: next(iter(points.values())) for way, points in panel.items()}
    _ratios(axes, list(values.values()), "x")
    for y, (way, value) in enumerate(values.items()):
        shade, _ = colour(way, first)
        axes.plot([1, value], [y, y], color=shade, lw=1.2)
        axes.plot(value, y, "o", color=shade, ms=5)
    axes.set_yticks(range(len(values)), [label(way) for way in values], fontsize=8)
    for text, way in zip(axes.get_yticklabels(), values, strict=True):
        text.set_color(colour(way, first)[0])
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.axvline(1, color=BASELINE, lw=0.8)


def _save(figure: Any, path: Path) -> None:
    # Text stays text, and nothing depends on when or in which order it was drawn.
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    # matplotlib ends lines with blanks.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def multiples(named: dict[str, Panel], path: Path) -> list[Path]:
    """Panels with several batches in one picture, those with one in another; returns the files."""
    lines = {name: panel for name, panel in named.items() if len({b for p in panel.values() for b in p}) > 1}
    rest = {name: panel for name, panel in named.items() if name not in lines}
    one_batch = path.with_stem(f"{path.stem}-one-batch") if lines else path
    pictures = ((lines, _lines, 2.4, (0.4, 2.05), path), (rest, _dots, 0.0, (1.65, 0.15), one_batch))
    for chosen, draw, height, margins, out in pictures:
        if chosen:
            _grid(chosen, draw, height or 0.75 + 0.19 * max(len(panel) for panel in chosen.values()), margins, out)
    return [out for chosen, *_, out in pictures if chosen]


def _grid(
    named: dict[str, Panel],
    draw: Callable[[Axes, Panel], None],
    height: float,
    margins: tuple[float, float],
    path: Path,
) -> None:
    columns = min(2, len(named))
    rows = -(-len(named) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(_WIDTH * columns, height * rows), squeeze=False)
    left, right = margins
    figure.subplots_adjust(
        left=left / (_WIDTH * columns),
        right=1 - right / (_WIDTH * columns),
        top=1 - 0.25 / (height * rows),
        bottom=0.4 / (height * rows),
        hspace=0.65 / (height - 0.65),
        wspace=(left + right) / (_WIDTH - left - right),
    )
    for axes, (name, panel) in zip(grid.flat, named.items(), strict=False):
        draw(axes, panel)
        axes.set_title(name, fontsize=9, loc="left")
        axes.tick_params(axis="x", labelsize=7)
        axes.tick_params(axis="y", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(named) :]:
        axes.set_visible(False)
    _save(figure, path)


def ranges(rows: list[tuple[str, str, float, float, float]], path: Path) -> None:
    """A line a way, grouped by work, in two columns: (work, way, geometric mean, least, most) of the ratios."""
    works = list(dict.fromkeys(row[0] for row in rows))
    columns: tuple[list[str], list[str]] = ([], [])
    for work in works:
        seen = sum(row[0] in columns[0] for row in rows) + len(columns[0])
        columns[seen >= (len(rows) + len(works)) / 2 - 1].append(work)
    tall = max(sum(row[0] in column for row in rows) + len(column) for column in columns)
    height = 0.2 * tall + 0.5
    figure, grid = plt.subplots(1, 2, figsize=(2 * _WIDTH, height))
    figure.subplots_adjust(left=0.16, right=0.96, top=1 - 0.05 / height, bottom=0.42 / height, wspace=0.42)
    for axes, column in zip(grid, columns, strict=True):
        _ratios(axes, [v for row in rows for v in row[2:]], "x")
        y, ticks, names = 0, [], []
        for work in column:
            axes.text(axes.get_xlim()[0] * 1.03, y, work, fontsize=8, weight="bold", va="center")
            y += 1
            for _, way, mean, least, most in (row for row in rows if row[0] == work):
                shade, _ = colour(way, "")
                axes.plot([least, most], [y, y], color=shade, lw=2, alpha=0.5, solid_capstyle="round")
                axes.plot(mean, y, "o", color=shade, ms=5)
                axes.annotate(f"{mean:.2f}", (most, y), (5, 0), textcoords="offset points", va="center", fontsize=8)
                ticks.append(y)
                names.append(label(way))
                y += 1
        axes.set_yticks(ticks, names, fontsize=8)
        axes.set_ylim(tall - 0.4, -0.7)
        axes.axvspan(axes.get_xlim()[0], 1, color="#1565c0", alpha=0.06, lw=0)
        axes.axvline(1, color=BASELINE, lw=0.8)
        axes.set_xlabel("time / the baseline's", fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    _save(figure, path)
