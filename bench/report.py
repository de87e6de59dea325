"""The benchmark pages, from result files: a summary, a page for each op, the goals and the method."""

import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from tabulate import tabulate

from . import pictures, registry
from .quiet import LEAST

# The ops whose baseline is back-propagation, or for locally-connected layers what torch has for it.
AGAINST = {
    "feedback_mm": "input gradient of a linear layer",
    "convolution": "input gradient of a convolution",
    "weight_gradient": "weight gradient of a convolution of few pixels",
    "low_rank": "low-rank feedback, a linear layer",
    "recurrent": "recurrent layers",
    "locally_connected": "locally-connected layers",
    "untied_nets": "layers of untied nets",
    "training_step": "training steps",
    "alignment": "steps that learn B",
    "overhead": "a layer of eight units",
}
HOW = (
    "Time over the baseline's, the first way of each case, whose line is at 1: lower is faster. "
    "[How it is measured](method.md)."
)
GOALS = (
    "What the kernels are to reach, and what these runs reached: the worst row unless a mean is named. What bounds "
    "those that are not reached: [notes](../benchmarks-notes.md#what-bounds-the-goals)."
)
METHOD = """\
Times are medians, variants of a case interleaved in one process, over the quiet samples where a page has their number
([what they are](../benchmarks-notes.md#what-a-quiet-sample-is)). A variant whose error is over its bound (twice
torch's own in the same dtype plus one rounding, against float64) is not timed. Ratios are to the first row of a case;
rows that lose are here too. Peak is what torch's allocator held for one call, results included. On a GPU calls are
timed by CUDA events, eager with a warm and a cold L2 cache, and cold as the replay of a CUDA graph, which alone tells
what the kernels take: a short eager call takes what the processor needs to launch it, the column of host µs. There
float32 is computed without TF32 but where a variant names it. The 20th and 80th percentile and the share of the
roofline are in what `python -m bench run` prints, the latter as max(flops / product rate, bytes / rate of memory),
pass by pass and from the rates below, over the time taken; a product by int8 digits can pass 100 % of the float32
rate."""

_STATES = {"warm": "", "cold": " (cold)", "graph": " (cold, CUDA graph)"}
_COLUMNS = ("variant", "ms (p20–p80)", "ratio", "share of roofline", "peak MiB", "error / bound")


def least_seconds(row: dict[str, Any], roofline: dict[str, float]) -> float | None:
    """The least time the machine allows: max(flops / product rate, bytes / rate of memory), pass by pass."""
    if not row["work"]:
        return None
    peak = roofline[row["unit"]]
    return sum(
        max(flops / peak, read / roofline["read"], written / roofline["write"]) for flops, read, written in row["work"]
    )


def _cells(row: dict[str, Any], roofline: dict[str, float]) -> list[str]:
    error = row["error_over_bound"]
    error_cell = "" if error is None else f"{error:.2g}"
    if "ms" not in row:
        reason = row.get("failed") or f"{error_cell}: over the bound"
        return [row["variant"], "not timed", "", "", "", reason]
    least = least_seconds(row, roofline)
    peak = row["peak_bytes"]
    return [
        row["variant"],
        f"{row['ms']:.3g} ({row['ms_p20']:.3g}–{row['ms_p80']:.3g})",
        "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        "" if least is None else f"{least / (row['ms'] / 1e3):.0%}",
        "" if peak is None else f"{peak / 2**20:.3g}",
        error_cell,
    ]


def groups(result: dict[str, Any]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Rows by (op, case, warm or cold)."""
    grouped: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        grouped.setdefault((row["op"], row["case"], row["state"]), []).append(row)
    return grouped


def table(result: dict[str, Any]) -> str:
    """Every row, losing ones too."""
    lines, last = [], ""
    for (op, case, state), rows in groups(result).items():
        if op != last:
            lines += [f"## {op}", ""]
            last = op
        lines += [f"**{case}**{_STATES[state]}, ratio to {rows[0]['variant']}", ""]
        cells, columns = [_cells(row, result["roofline"]) for row in rows], _COLUMNS
        if any("quiet" in row for row in rows):
            cells = [[*row, str(r.get("quiet", ""))] for row, r in zip(cells, rows, strict=True)]
            columns = (*columns, "quiet samples")
        if any("instructions" in row for row in rows):
            cells = [[*row, f"{r['instructions']:,.0f}"] for row, r in zip(cells, rows, strict=True)]
            columns = (*columns, "instructions")
        if any("host_ms" in row for row in rows):
            cells = [
                [*row, f"{1e3 * r['host_ms']:.3g}" if "host_ms" in r else ""]
                for row, r in zip(cells, rows, strict=True)
            ]
            columns = (*columns, "host µs")
        lines += [tabulate(cells, columns, tablefmt="pipe", disable_numparse=True), ""]
    return "\n".join(lines)


def _properties(title: str, values: dict[str, Any]) -> str:
    return tabulate(values.items(), (title, ""), tablefmt="pipe", disable_numparse=True)


def _rates(result: dict[str, Any]) -> dict[str, str]:
    rates = result["roofline"].items()
    return {key: value if isinstance(value, str) else f"{value / 1e9:.4g}" for key, value in rates}


def _missing(result: dict[str, Any]) -> str:
    ops = Counter(case.partition(":")[0] for case in result.get("left_out", ()))
    counts = ", ".join(f"{n} of {op}" for op, n in ops.items())
    return f"\n\nCases that the last run left out, or with fewer than {LEAST} quiet samples: {counts}." if ops else ""


def loud(result: dict[str, Any]) -> set[tuple[str, str]]:
    """(op, case) of rows with too few quiet samples; results from before they were counted have none."""
    return {(row["op"], row["case"]) for row in result["rows"] if row.get("quiet", LEAST) < LEAST}


def pivot(rows: list[dict[str, Any]]) -> str:
    """Ways by batch: ratio and milliseconds; then over all batches the worst error, the most memory, and the fewest
    quiet samples where they were counted."""
    cells: dict[str, dict[int, str]] = {}
    errors: dict[str, float] = {}
    peaks: dict[str, int] = {}
    quiet: dict[str, int] = {}
    for row in rows:
        way, batch = row["variant"], pictures.split(row["case"])[2]
        ratio = "" if row.get("ratio") is None else f"**{row['ratio']:.2f}** · "
        found = f"{ratio}{row['ms']:.3g} ms" if "ms" in row else row.get("failed", "not timed")
        cells.setdefault(way, {})[batch] = found
        errors[way] = max(errors.get(way, 0), row["error_over_bound"] or 0)
        peaks[way] = max(peaks.get(way, 0), row.get("peak_bytes") or 0)
        if "quiet" in row:
            quiet[way] = min(quiet.get(way, row["quiet"]), row["quiet"])
    batches = sorted({batch for found in cells.values() for batch in found})
    columns = [f"batch {batch}" if batch else "ratio · time" for batch in batches]
    header = ("way", *columns, "error / bound", "peak MiB", *["quiet samples"] * bool(quiet))
    lines = [
        [
            way,
            *(found.get(batch, "") for batch in batches),
            f"{errors[way]:.2g}" if errors[way] else "",
            f"{peaks[way] / 2**20:.3g}" if peaks[way] else "",
            *[str(quiet.get(way, ""))] * bool(quiet),
        ]
        for way, found in cells.items()
    ]
    return tabulate(lines, header, tablefmt="pipe", disable_numparse=True)


def means(named: dict[str, pictures.Panel]) -> str:
    """Geometric mean of the ratios by way and batch, over so many cases; nothing where all are of one case."""
    found: dict[str, dict[int, list[float]]] = {}
    for panel in named.values():
        for way, points in list(panel.items())[1:]:
            for batch, ratio in points.items():
                found.setdefault(way, {}).setdefault(batch, []).append(ratio)
    batches = sorted({batch for points in found.values() for batch in points})
    if all(len(ratios) == 1 for points in found.values() for ratios in points.values()):
        return ""
    lines = [
        [way, *(f"{geometric_mean(points[b]):.2f} ({len(points[b])})" if b in points else "" for b in batches)]
        for way, points in found.items()
    ]
    header = ("mean ratio (cases)", *(f"batch {batch}" if batch else "" for batch in batches))
    return tabulate(lines, header, tablefmt="pipe", disable_numparse=True)


def _folded(title: str, text: str) -> str:
    return f'<details markdown="1">\n<summary>{title}</summary>\n\n{text}\n\n</details>\n'


def where(result: dict[str, Any]) -> str:
    """A heading for the machine."""
    machine = result["machine"]
    if "gpu" in machine:
        return f"{machine['gpu']} ({machine['library_level']})"
    family = re.search(r", family \d+", machine["processor"])
    return f"CPU, {machine['library_level']}{family[0] if family else ''}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def page(op: str, results: list[dict[str, Any]], folder: Path) -> str:
    """The page of one op, and its pictures in `folder`."""
    parts = [f"# {op}", registry.about(op), HOW]
    for result in results:
        rows = [row for row in result["rows"] if row["op"] == op]
        if not rows:
            continue
        parts.append(f"## {where(result)}")
        for part, named in pictures.panels(result, op).items():
            picture = folder / f"{_slug(f'{op} {where(result)} {part}')}.svg"
            parts += [f"### {part}"] * bool(part)
            parts += [f"![{op}, {part or 'all cases'}]({made.name})" for made in pictures.multiples(named, picture)]
            parts += list(filter(None, [means(named)]))
        works: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for row in rows:
            part, name, _ = pictures.split(row["case"])
            work = f"{part}{_STATES[row['state']]}".strip() or "all cases"
            works.setdefault(work, {}).setdefault(name, []).append(row)
        parts.append("### Figures")
        for work, cases in works.items():
            parts.append(_folded(work, "\n\n".join(f"**{case}**\n\n{pivot(found)}" for case, found in cases.items())))
    return "\n\n".join(parts) + "\n"


def ranges(result: dict[str, Any]) -> list[tuple[str, str, float, float, float]]:
    """Our ways: (work, way, geometric mean, least and most of its ratios over the work's cases)."""
    found = []
    for op, title in AGAINST.items():
        parts = pictures.panels(result, op)
        # The whole where there is a whole.
        whole = any(part.startswith("forward + backward") for part in parts)
        for part, named in parts.items():
            if whole and not part.startswith("forward + backward"):
                continue
            ways: dict[str, list[float]] = {}
            for panel in named.values():
                for way, points in list(panel.items())[1:]:
                    ways.setdefault(way, []).extend(points.values())
            for way, values in ways.items():
                if not pictures.THEIRS.match(way):
                    dtype = part.split(",")[0].removeprefix("forward + backward").strip()
                    work = f"{title}, {dtype}" if dtype else title
                    found.append((work, way, geometric_mean(values), min(values), max(values)))
    return found


def _summary(result: dict[str, Any], out: Path) -> str:
    rows = ranges(result)
    picture = out.with_suffix("") / f"summary-{_slug(where(result))}.svg"
    if rows:
        pictures.ranges(rows, picture)
    sides: dict[str, tuple[list[str], list[str]]] = {}
    for work, way, mean, least, most in sorted(rows, key=lambda row: row[2]):
        sides.setdefault(work, ([], []))[mean >= 1].append(
            f"{pictures.label(way)} **{mean:.2f}** ({least:.2f} to {most:.2f})"
        )
    cells = [[work, *("; ".join(side) for side in both)] for work, both in sides.items()]
    heads = ("geometric mean (best to worst case)", "faster", "slower")
    machine = result["machine"]
    return f"""## {where(result)}

{machine["processor"]}, {machine["threads"]} threads, version {machine["bioplaus_kernels"]}, {machine["time"][:10]}

{f"![time over the baseline's, by work and way]({out.stem}/{picture.name})" if rows else ""}

{_folded("figures", tabulate(cells, heads, tablefmt="pipe", disable_numparse=True))}"""


def write(results: list[Path], out: Path, draft: bool = False) -> None:
    """Write the summary `out`, and beside it a folder of its name with a page for each op, goals, and the method.

    Cases with too few quiet samples count among those that a run lacks, unless it is a draft.
    """
    loaded = [json.loads(path.read_text()) for path in results]
    warning = ""
    for result in loaded:
        if not (noisy := loud(result)):
            continue
        if draft:
            warning = f"A draft: some rows have fewer than {LEAST} quiet samples.\n\n"
        else:
            result["rows"] = [row for row in result["rows"] if (row["op"], row["case"]) not in noisy]
            result["left_out"] = [*result.get("left_out", ()), *(f"{op}: {case}" for op, case in sorted(noisy))]
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as made:
        _write(loaded, warning, Path(made, out.name))
        # What an earlier report made may not be made again.
        for old in (*folder.glob("*.md"), *folder.glob("*.svg")):
            old.unlink()
        for file in Path(made, out.stem).iterdir():
            file.replace(folder / file.name)
        Path(made, out.name).replace(out)


def _write(loaded: list[dict[str, Any]], warning: str, out: Path) -> None:
    from . import goals

    folder = out.with_suffix("")
    folder.mkdir()
    ops = list(dict.fromkeys(row["op"] for result in loaded for row in result["rows"]))
    for op in ops:
        (folder / f"{op}.md").write_text(page(op, loaded, folder))
    (folder / "goals.md").write_text(f"# Goals\n\n{GOALS}\n\n{goals.table(loaded)}\n")
    machines = "\n\n".join(
        f"## {where(result)}\n\n{_properties('machine', result['machine'])}\n\n"
        f"{_properties('measured in this run, 1e9 flop/s or byte/s', _rates(result))}{_missing(result)}"
        for result in loaded
    )
    (folder / "method.md").write_text(f"# How it is measured\n\n{METHOD}\n\n{machines}\n")
    # Levels of one processor differ in the products alone: the first is the best, and stands for it.
    shown: dict[str, dict[str, Any]] = {}
    for result in loaded:
        shown.setdefault(result["machine"].get("gpu", result["machine"]["processor"]), result)
    pages = tabulate(
        [[f"[{op}]({out.stem}/{op}.md)", registry.about(op)] for op in ops], ("page", "what"), tablefmt="pipe"
    )
    out.write_text(
        f"""# Benchmarks

{warning}Time of each rule beside back-propagation's, which is 1: what lies in the shade is faster. A dot is the
geometric mean over the cases of a work, the number beside it; its line goes from the best to the worst.
Locally-connected layers, of which torch has none, are beside unfold and bmm.

{chr(10).join(_summary(result, out) for result in shown.values())}
## Pages

{pages}

Times are medians of `python -m bench run`, these pages are made by `python -m bench report`:
[how it is measured]({out.stem}/method.md), [goals]({out.stem}/goals.md). No row is left out because it loses.
""",
    )
