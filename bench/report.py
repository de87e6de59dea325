"""The Markdown report and its pictures, from a result file."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tabulate import tabulate

from .quiet import LEAST

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


def _picture(op: str, result: dict[str, Any], path: Path) -> None:
    chosen = {key: rows for key, rows in groups(result).items() if key[0] == op and key[2] == "warm"}
    variants = list(dict.fromkeys(row["variant"] for rows in chosen.values() for row in rows if row.get("ratio")))
    labels = [key[1] for key in chosen]
    figure, axes = plt.subplots(figsize=(max(6.0, 0.35 * len(labels) + 3), 4.5), layout="constrained")
    for variant in variants:
        found = [
            next((r["ratio"] for r in rows if r["variant"] == variant and r.get("ratio")), None)
            for rows in chosen.values()
        ]
        axes.plot(
            range(len(labels)), [float("nan") if f is None else f for f in found], marker="o", ms=3, lw=1, label=variant
        )
    axes.axhline(1.0, color="black", lw=0.8)
    axes.set_yscale("log")
    axes.set_ylabel("time / baseline's (lower is faster)")
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    axes.legend(fontsize=6, ncols=2)
    axes.set_title(op)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _properties(title: str, values: dict[str, Any]) -> str:
    return tabulate(values.items(), (title, ""), tablefmt="pipe", disable_numparse=True)


def _rates(result: dict[str, Any]) -> dict[str, str]:
    rates = result["roofline"].items()
    return {key: value if isinstance(value, str) else f"{value / 1e9:.4g}" for key, value in rates}


def loud(result: dict[str, Any]) -> list[str]:
    """The rows with too few quiet samples; results from before they were counted have none."""
    return [
        f"{row['op']}: {row['case']}{_STATES[row['state']]}, {row['variant']}: {row['quiet']}"
        for row in result["rows"]
        if row.get("quiet", LEAST) < LEAST
    ]


def write(results: list[Path], out: Path, draft: bool = False) -> None:
    """Write `out` and a picture for each op of the first result beside it; the goals are looked up in all results.

    Raises ValueError that names the rows with too few quiet samples, unless it is a draft.
    """
    from . import goals

    loaded = [json.loads(path.read_text()) for path in results]
    rows = [f"{path}: {row}" for path, result in zip(results, loaded, strict=True) for row in loud(result)]
    if rows and not draft:
        raise ValueError(
            f"--results: expected at least {LEAST} quiet samples in every row, got fewer in {len(rows)} (run these "
            "cases --again, or report a --draft):\n" + "\n".join(rows)
        )
    result = loaded[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures = []
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        picture = out.parent / f"{out.stem}-{op}.png"
        _picture(op, result, picture)
        pictures.append(f"![{op}]({picture.name})")
    notes = out.with_name(f"{out.stem}-notes.md")
    text = f"""# Benchmarks

{f"A draft: {len(rows)} rows have fewer than {LEAST} quiet samples.{chr(10) * 2}" if rows else ""}\
Written by `python -m bench report` from `python -m bench run`. Times are medians with the 20th and 80th percentile,
variants of a case interleaved in one process, over the quiet samples where a row has their number. A variant whose
error is over its bound (twice torch's own in the same dtype plus one rounding, against float64) is not timed. Ratios
are to the first row of a case; rows that lose are here too. The roofline's share is max(flops / product rate, bytes /
rate of memory), pass by pass and from the rates below, over the time taken; a product by int8 digits can pass 100 % of
the float32 rate. Peak is what torch's allocator held for one call, results included. On a GPU calls are timed by CUDA
events, eager with a warm and a cold L2 cache, and cold as the replay of a CUDA graph, which alone tells what the
kernels take: a short eager call takes what the processor needs to launch it, the column of host µs. There float32 is
computed without TF32 but where a variant names it.

{_properties("machine", result["machine"])}

{_properties("measured in this run, 1e9 flop/s or byte/s", _rates(result))}

## Goals

{goals.table(loaded)}

{notes.read_text() if notes.exists() else ""}
## Pictures

{chr(10).join(pictures)}

{table(result)}"""
    for other in loaded[1:]:
        machine = other["machine"]
        where = f"{machine['gpu']}, " if "gpu" in machine else "Level "
        text += f"""
# {where}{machine["library_level"]}

{_properties("machine", machine)}

{_properties("measured in this run, 1e9 flop/s or byte/s", _rates(other))}

{table(other)}"""
    temporary = out.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(out)
