"""Runs and the tables of them, the papers' figures beside ours.

A run's folder is TABLE/ROW/seed-N, or TABLE/ROW/trial-N of a search, with the log.jsonl that `recipes.run` writes: a
header, then a row an epoch, the first before training.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tabulate import tabulate

from recipes.experiment import difference

Row = dict[str, Any]
# Classes and test images, for logs whose header does not say.
SIZES = {"digits": (10, 360), "mnist": (10, 10000), "fashion-mnist": (10, 10000), "cifar10": (10, 10000)}
# Columns of text, numbers among it.
TEXTS = ("best on", "seeds", "failed (seed)", "uncommitted code (seed)")
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
    def seed(self) -> str:
        """The number in its folder's name."""
        return re.sub(r"\D+", "", self.folder.name)

    @property
    def searched(self) -> bool:
        """Whether it is a trial of a search, which is no seed."""
        return self.folder.name.startswith("trial-")

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
    and for a row whose seeds are of different experiments.
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
                # The trials of a search differ.
                known = seeds.get(seed) if seed.startswith("trial-") else next(iter(seeds.values()), None)
                other = known or found
                if differs := difference(other.header["experiment"], found.header["experiment"]):
                    key, one, two = differs
                    raise ValueError(
                        f"{key}: {one!r} in {other.folder}, {two!r} in {found.folder}; "
                        "want one experiment in a row: remove what is replaced, or move it to a row of its own"
                    )
                seeds[seed] = max(seeds.get(seed, found), found, key=lambda run: len(run.rows))
    return {table: [list(seeds.values()) for seeds in rows.values()] for table, rows in sorted(tables.items())}


def columns(row: Row, kind: str) -> list[str]:
    """The columns of `kind` ("angle_weight" or "angle_grad") that say something about the feedback.

    That leaves out the first layer's weight angle, as nothing uses its feedback, and the last layer's gradient angle,
    which is 0 by definition. Target propagation has no inverse of its first layer, and all of its angles count.
    """
    weights, gradients = ([n for n in row if n.startswith(k + "/")] for k in ("angle_weight", "angle_grad"))
    if kind == "angle_grad":
        return gradients[:-1]
    unused = weights[:1] and gradients and weights[0].partition("/")[2] == gradients[0].partition("/")[2]
    return weights[1:] if unused else weights


def measured(runs: list[Run], kind: str) -> tuple[list[Run], list[str]]:
    """Those of a row's seeds that have angles of `kind`, and the columns of the first of them."""
    found = [run for run in runs if columns(run.rows[-1], kind)]
    return found, columns(found[0].rows[-1], kind) if found else []


def mean_angle(row: Row, kind: str) -> float:
    """Mean over `columns`, nan where there are none."""
    return _average(row[name] for name in columns(row, kind))


def table(rows: list[list[Run]], style: str = "simple") -> str:
    """A line for each row: the published figures, then ours, each at the best epoch and as a mean over seeds."""
    lines, score = [], rows[0][0].score
    percent = score != "test_loss"
    names = [
        "train_error",
        "test_error",
        "test_fgsm",
        "test_fgsm_feedback",
        "test_top5",
        "test_AP",
        "test_AP50",
        "test_AP75",
    ]
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
        line.append(", ".join(r.seed for r in runs))
        line.append(", ".join(f"{r.failed} ({r.seed})" for r in runs if r.failed))
        dirty = [r.seed for r in runs if "-dirty" in r.header["commit"]]
        line.append(", ".join(dirty))
        line += [_average(mean_angle(r.rows[-1], kind) for r in runs) for kind in MEASURES]
        lines.append(["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in line])
    titles = [short(name) + (" %" if percent else "") for name in names]
    headers = ["row", *(f"paper: {title}" for title in titles), *titles]
    last = f"last: {short(score)}" + (" %" if percent else "")
    headers += ["epochs", "best epoch", "best on", last, "seeds", "failed (seed)", "uncommitted code (seed)"]
    headers += ["W to B °", "to BP °"]
    used = [i for i in range(len(headers)) if any(line[i] not in (None, "") for line in lines)]
    formats = [""] + [".2f"] * (2 * len(names)) + ["", ".0f", "", ".2f", "", "", "", ".1f", ".1f"]
    return tabulate(
        [[line[i] for i in used] for line in lines],
        [headers[i] for i in used],
        tablefmt=style,
        floatfmt=[formats[i] for i in used],
        disable_numparse=[0, *(i for i, k in enumerate(used) if headers[k] in TEXTS)],
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


def short(name: str) -> str:
    """A figure's name in a table or a picture."""
    return name.replace("_", " ")


def changes(run: Run) -> dict[str, str]:
    """What the run's command changed of the experiment's file, by key."""
    words = shlex.split(run.header["command"])
    return dict(value.split("=", 1) for option, value in pairwise(words) if option == "--set")


def like_for_like(run: Run) -> bool:
    """Whether the published figures are of the same data and as many epochs."""
    return not {"data.name", "data.path", "train.epochs"} & changes(run).keys() and run.epochs >= run.planned


def layers(rows: list[list[Run]]) -> str:
    """A sentence of the layers over which a table's angles are means; empty without angles."""
    parts = []
    for kind, name in (("angle_weight", "W to B"), ("angle_grad", "to BP")):
        found: dict[str, list[str]] = {}
        for runs in rows:
            names = [column.partition("/")[2] for column in measured(runs, kind)[1]]
            text = ", ".join(names) if len(names) < 4 else f"{names[0]} … {names[-1]}"
            if names:
                found.setdefault(text, []).append(runs[0].header["row"])
        # The layers of most rows, and then whose are others.
        texts = sorted(found, key=lambda text: -len(found[text]))
        others = [f"{text} ({'; '.join(found[text])})" for text in texts[1:]]
        if texts:
            parts.append(f'"{name} °" is the mean over the layers {"; ".join([texts[0], *others])}')
    return ". ".join(parts) + "." if parts else ""


def _average(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def _mean(values: list[float | None], scale: float) -> str | None:
    known = [scale * value for value in values if value is not None]
    if not known:
        return None
    spread = f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.2f}{spread}"


def _kendall(ranks: list[int]) -> float:
    pairs = [(a, b) for i, a in enumerate(ranks) for b in ranks[i + 1 :]]
    return sum(1 if a < b else -1 for a, b in pairs) / len(pairs)
