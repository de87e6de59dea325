"""Tables and pictures of runs, the papers' figures beside ours.

A run's folder is TABLE/ROW/seed-N, or TABLE/ROW/trial-N of a search, with the log.jsonl that `recipes.run` writes: a
header, then a row an epoch, the first before training.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from tabulate import tabulate

from recipes.experiment import difference

Row = dict[str, Any]
# Classes and test images, for logs whose header does not say.
SIZES = {"digits": (10, 360), "mnist": (10, 10000), "fashion-mnist": (10, 10000), "cifar10": (10, 10000)}
MEASURES = {"angle_weight": "angle, W to B", "angle_grad": "angle to BP's gradient"}


@dataclass
class Run:
    folder: Path
    header: dict[str, Any]
    rows: list[Row]

    @property
    def score(self) -> str:
        """What is shown of it: test error, average precision where objects are detected, or test loss."""
        return self.chosen.replace("validation", "test")

    @property
    def chosen(self) -> str:
        """What its best epoch is best in: that of validation images, of test images where there were none."""
        names = (f"{split}_{name}" for split in ("validation", "test") for name in ("error", "AP", "loss"))
        return next(name for name in names if name in self.rows[0])

    @property
    def best(self) -> Row:
        return min(self.rows, key=self._rank)

    @property
    def epochs(self) -> int:
        return len(self.rows) - 1

    @property
    def planned(self) -> int:
        return self.header["experiment"].get("train", {}).get("epochs", self.epochs)

    @property
    def failed(self) -> str:
        """ "diverged", "collapsed" or nothing.

        Collapsed: the last epoch's test error is within three standard errors of chance, p = 1 - 1 / classes:
        ``|error - p| <= 3 * sqrt(p * (1 - p) / test images)``.
        """
        last = self.rows[-1]
        if self.epochs and last["train_loss"] is None:
            return "diverged"
        known = SIZES.get(self.header["experiment"]["data"]["name"], (None, None))
        classes, images = (self.header.get(k, size) for k, size in zip(("classes", "test_images"), known, strict=True))
        if classes is None or last.get("test_error") is None:
            return ""
        chance = 1 - 1 / classes
        return "collapsed" if abs(last["test_error"] - chance) <= 3 * math.sqrt(chance / classes / images) else ""

    @property
    def rank(self) -> float:
        """The best epoch's score, lower is better."""
        return self._rank(self.best)

    def _rank(self, row: Row) -> float:
        value = row[self.chosen]
        return math.inf if value is None else -value if self.chosen.endswith("AP") else value


def read(folder: Path) -> Run:
    """The run of `folder`. Raises ValueError where its log is damaged; `recipes run` writes it again."""
    path = folder / "log.jsonl"
    try:
        header, *rows = map(json.loads, path.read_text().splitlines())
        header["experiment"]["data"], header["row"], header["published"], [row["epoch"] for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a run's log; the command that made it writes it again") from error
    return Run(folder, header, rows)


def collect(roots: Iterable[Path]) -> dict[str, list[list[Run]]]:
    """Runs below `roots` that have had an epoch, by table, in each by row its seeds, rows by their files' names.

    Of a seed in two roots the longer run counts, of two as long the first. Raises ValueError for a root without runs
    and for a seed whose runs are of different experiments.
    """
    tables: dict[str, dict[str, dict[str, Run]]] = {}
    for root in roots:
        logs = sorted(root.glob("*/*/*/log.jsonl"))
        if not logs:
            raise ValueError(f"{root}: no runs in it, want TABLE/ROW/seed-N/log.jsonl below it")
        for log in logs:
            table, row, seed = log.relative_to(root).parts[:3]
            found = read(log.parent)
            if len(found.rows) > 1:
                seeds = tables.setdefault(table, {}).setdefault(row, {})
                other = seeds.setdefault(seed, found)
                if differs := difference(other.header["experiment"], found.header["experiment"]):
                    key, one, two = differs
                    raise ValueError(
                        f"{key}: {one!r} in {other.folder}, {two!r} in {found.folder}; "
                        "want one experiment in a row, move one of the two folders to a row of its own"
                    )
                seeds[seed] = max(other, found, key=lambda run: len(run.rows))
    return {table: [list(seeds.values()) for seeds in rows.values()] for table, rows in sorted(tables.items())}


def columns(row: Row, kind: str) -> list[str]:
    """The columns of `kind` ("angle_weight" or "angle_grad") that say something about the feedback.

    That leaves out the first layer's weight angle, as nothing uses its feedback, and the last layer's gradient angle,
    which is 0 by definition.
    """
    found = [name for name in row if name.startswith(kind + "/")]
    return found if len(found) < 2 else found[1:] if kind == "angle_weight" else found[:-1]


def mean_angle(row: Row, kind: str) -> float:
    """Mean over `columns`, nan where there are none."""
    angles = [row[name] for name in columns(row, kind) if row[name] is not None]
    return statistics.fmean(angles) if angles else math.nan


def table(rows: list[list[Run]], style: str = "simple") -> str:
    """A line for each row: the published figures, then ours, each at the best epoch and as a mean over seeds."""
    lines, score = [], rows[0][0].score
    percent = score != "test_loss"
    names = ["train_error", "test_error", "test_top5", "test_AP", "test_AP50", "test_AP75"]
    names = names if percent else ["train_loss", "test_loss"]
    names = [n for n in names if any(n in r.rows[0] or n in r.header["published"] for runs in rows for r in runs)]
    for runs in rows:
        published = {k: float(v) for k, v in runs[0].header["published"].items()}
        line: list[Any] = [runs[0].header["row"], *(published.get(name) for name in names)]
        line += [_mean([r.best.get(name) for r in runs], 100 if percent else 1) for name in names]
        epochs, planned = min(r.epochs for r in runs), max(r.planned for r in runs)
        line.append(epochs if epochs >= planned else f"{epochs} of {planned}")
        line.append(statistics.fmean(r.best["epoch"] for r in runs))
        line.append(", ".join(sorted({r.chosen.partition("_")[0] for r in runs})))
        line.append(_mean([r.rows[-1].get(score) for r in runs], 100 if percent else 1))
        line.append(", ".join(re.sub(r"\D+", "", r.folder.name) for r in runs))
        failed = [r for r in runs if r.failed]
        line.append(", ".join(f"{r.failed} ({re.sub('[^0-9]+', '', r.folder.name)})" for r in failed))
        line += [statistics.fmean(mean_angle(r.rows[-1], kind) for r in runs) for kind in MEASURES]
        lines.append(["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in line])
    short = [name.replace("_", " ") + (" %" if percent else "") for name in names]
    headers = ["row", *(f"paper: {name}" for name in short), *short]
    last = f"last: {score.replace('_', ' ')}" + (" %" if percent else "")
    headers += ["epochs", "best epoch", "best on", last, "seeds", "failed (seed)", "W to B °", "to BP °"]
    used = [i for i in range(len(headers)) if any(line[i] not in (None, "") for line in lines)]
    formats = [""] + [".2f"] * (2 * len(names)) + ["", ".0f", "", ".2f", "", "", ".1f", ".1f"]
    return tabulate(
        [[line[i] for i in used] for line in lines],
        [headers[i] for i in used],
        tablefmt=style,
        floatfmt=[formats[i] for i in used],
        disable_numparse=[0, *(i for i, k in enumerate(used) if headers[k] in ("seeds", "failed (seed)"))],
        colalign=["left", *["right"] * (len(used) - 1)],
        missingval="",
    )


def order(rows: list[list[Run]]) -> str:
    """The finished rows from the lowest test error up, in the paper and here, without those that have failed runs;
    empty where nothing is to compare.
    """
    known = [runs for runs in rows if "test_error" in runs[0].header["published"] and runs[0].score == "test_error"]
    known = [runs for runs in known if all(r.epochs >= r.planned and not r.failed for r in runs)]
    if len(known) < 3:
        return ""
    paper = sorted(known, key=lambda runs: runs[0].header["published"]["test_error"])
    ours = sorted(known, key=lambda runs: statistics.fmean(r.best["test_error"] for r in runs))
    tau = _kendall([paper.index(runs) for runs in ours])
    lists = (" < ".join(runs[0].header["row"] for runs in part) for part in (paper, ours))
    return "Paper: {}.  \nHere: {}.  \nKendall's τ between the two orders: {:.2f}.".format(*lists, tau)


def picture(rows: list[list[Run]], title: str, path: Path) -> None:
    """Errors (or losses) and, where they were measured, angles over the epochs."""
    kinds = [kind for kind in MEASURES if any(columns(runs[0].rows[0], kind) for runs in rows)]
    figure = Figure(figsize=(5 + 4.5 * len(kinds), 4.2), layout="constrained")
    figure.suptitle(title)
    first, *others = figure.subplots(1, 1 + len(kinds), squeeze=False)[0]
    score = rows[0][0].score
    scale = 1 if score == "test_loss" else 100
    colours = colormaps["tab10" if len(rows) <= 10 else "tab20"].colors
    for number, runs in enumerate(rows):
        for r in runs:
            style = {"color": colours[number % len(colours)], "label": r.header["row"] if r is runs[0] else None}
            epochs = [row["epoch"] for row in r.rows]
            for name, line in ((score, "-"), (score.replace("test", "train"), ":")):
                # Gaps where it is 0, which a logarithmic axis has no place for.
                values = [scale * row[name] if row.get(name) else math.nan for row in r.rows]
                first.plot(epochs, values, line, linewidth=1.5, **(style if line == "-" else {"color": style["color"]}))
            for axes, kind in zip(others, kinds, strict=True):
                for name in columns(r.rows[0], kind):
                    values = [math.nan if row.get(name) is None else row[name] for row in r.rows]
                    axes.plot(epochs, values, color=style["color"], alpha=0.3, linewidth=0.7)
                axes.plot(epochs, [mean_angle(row, kind) for row in r.rows], color=style["color"], linewidth=2)
    first.set(title=f"{score.replace('_', ' ')} (dotted: training)", ylabel="%" if scale == 100 else "", yscale="log")
    for axes, kind in zip(others, kinds, strict=True):
        axes.set(
            title=f"{MEASURES[kind]} (thin: each layer)", ylabel="degrees", ylim=(-3, 123), yticks=range(0, 121, 15)
        )
    for axes in (first, *others):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=100)


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
    score, scores = f"best {runs[0].chosen.replace('_', ' ')}", [abs(r.rank) for r in runs]
    first.hist(scores, bins=20)
    first.set(xlabel=score, ylabel="trials")
    for axes, key in zip(others, keys, strict=True):
        axes.plot([d[key] for d in drawn], scores, ".")
        axes.set(xlabel=key, ylabel=score, xscale="log" if key.endswith("lr") else "linear")
    figure.savefig(path, dpi=100)


def write(roots: list[Path], to: Path) -> None:
    """Write the Markdown page `to`, and beside it a folder of its name with the logs it is made of and the pictures.

    That folder is a root itself, after `roots`, so that nothing is lost from a page by writing it again: a table that
    `roots` do not have stays, as does the longer run. A file notes.md in the folder of a table goes below that table.
    Raises ValueError as `collect` does.
    """
    folder = to.with_suffix("")
    parts = [HEAD.format(folder=folder.name)]
    kept = [folder] if any(folder.glob("*/*/*/log.jsonl")) else []
    for name, rows in collect([*roots, *kept]).items():
        place = folder / name
        for r in (r for runs in rows for r in runs):
            copy = place / r.folder.parent.name / r.folder.name
            for file in ("log.jsonl", "reconstructions.png"):
                if (r.folder / file).exists() and copy.resolve() != r.folder.resolve():
                    copy.mkdir(parents=True, exist_ok=True)
                    shutil.copy(r.folder / file, copy / file)
        searches = [runs for runs in rows if runs[0].folder.name.startswith("trial-")]
        rows = [runs for runs in rows if runs not in searches]
        parts.append(f"## {name}\n")
        if rows:
            title = f"{name}, trained on {rows[0][0].header['experiment']['data']['name']}"
            picture(rows, title, place / "curves.png")
            parts += [f"{title}.\n", table(rows, "github") + "\n", order(rows) + "\n", _made(rows)]
            parts.append(f"![curves]({folder.name}/{name}/curves.png)\n")
            for runs in rows:
                image = place / runs[0].folder.parent.name / runs[0].folder.name / "reconstructions.png"
                if image.exists():
                    parts.append(f"{runs[0].header['row']}: ![reconstructions]({image.relative_to(to.parent)})\n")
        for runs in searches:
            row = runs[0].folder.parent.name
            histogram(runs, place / f"{row}.png")
            best = min(runs, key=lambda r: r.rank)
            drawn = ", ".join(f"{key} = {value}" for key, value in best.header["drawn"].items())
            text = f"{len(runs)} trials, best {best.chosen.replace('_', ' ')} {abs(best.rank):.4f} with {drawn}."
            parts.append(f"### {row}\n\n{text}\n\n![histogram]({folder.name}/{name}/{row}.png)\n")
        if (place / "notes.md").exists():
            parts.append((place / "notes.md").read_text())
    temporary = to.with_name(to.name + ".tmp")
    temporary.write_text("\n".join(part for part in parts if part.strip()))
    temporary.replace(to)


HEAD = """# Results

Made by `python -m recipes report`, from the logs in [{folder}]({folder}). Errors are those of the best epoch. "best on"
says what chose it: validation images, which were held out of training, or the test images themselves, as in the papers,
and then errors are a little too good. "last" is the last epoch's, which nothing chose. "train error" is on as many
training images as there are test images. Figures are means over the seeds that are listed, ± their standard deviation;
a row with one seed has none. Collapsed runs end within three standard errors of chance; they and diverged ones are in
no order. "W to B" is the angle of the weights to the feedback at the end of training, over all layers but the first,
"to BP" that of the weights' gradient to back-propagation's on one batch, over all but the last.
"""


def _made(rows: list[list[Run]]) -> str:
    headers = [r.header for runs in rows for r in runs]
    facts = [", ".join(sorted({h[key] for h in headers})) for key in ("processor", "versions", "commit")]
    commands = "\n".join(
        sorted({re.sub(r"(experiments/[\w-]+)/[\w-]+\.toml", r"\1.toml", h["command"]) for h in headers})
    )
    return "{}; {}; commit {}.\n\n```\n{}\n```\n".format(*facts, commands)


def _mean(values: list[float | None], scale: float) -> str | None:
    known = [scale * value for value in values if value is not None]
    if not known:
        return None
    spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.2f}{spread}"


def _kendall(ranks: list[int]) -> float:
    pairs = [(a, b) for i, a in enumerate(ranks) for b in ranks[i + 1 :]]
    return sum(1 if a < b else -1 for a, b in pairs) / len(pairs)
