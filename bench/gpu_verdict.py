"""What gpu_check's stages found, in a few dozen lines. Needs Python alone."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

WAYS = ("cuda", "triton", "digits", "int_mm", "formed", "feedback_weight + cuBLAS")
BACKENDS = ("cuda", "triton")
# In the verdict's table, before what the way is called.
CELLS = ("usf, signs from W", "usf, packed signs", "fa seeded, ±s", "fa seeded, uniform")
BASELINES = ("torch dY @ W, TF32", "stacked digits by torch._int_mm", "sign, then matmul")
_FIRST = 6


def lines(path: Path, size: int = -1) -> Rows:
    """Of a file's first `size` bytes the lines of JSON, some of which may have been cut off."""
    found: Rows = []
    if not path.exists():
        return found
    with path.open("rb") as file:
        text = file.read(size)
    for line in text.splitlines():
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def status(record: dict[str, Any]) -> str:
    """One stage's, in words."""
    if record["status"] == "cut":
        return f"cut off at its limit of {record['limit']:.0f} s"
    if record["status"] == "failed":
        return f"failed with exit status {record['code']}, see log.txt"
    return record["status"] + (f", {record['why']}" if "why" in record else f" in {record['seconds']:.0f} s")


def found(stage: str, results: Rows) -> list[str]:
    """What `stage` has said, its failures by name."""
    mine = [r for r in results if r["stage"] == stage]
    tests = {r["test"]: r for r in mine if "test" in r}  # of one that ran twice the last
    counts = Counter(r["outcome"] for r in tests.values())
    lines = [", ".join(f"{counts[o]} {o}" for o in ("passed", "failed", "skipped"))] if tests else []
    lines += _first((r["test"], _why(r["said"])) for r in tests.values() if r["outcome"] == "failed")
    cases = [r for r in mine if "ok" in r]
    wrong = [r for r in cases if not r["ok"]]
    if cases:
        right = f"{len(cases) - len(wrong)} of {len(cases)} right"
        lines.append(f"{'dead' if len(wrong) == len(cases) else 'alive'}, {right}" if stage in BACKENDS else right)
        lines += _first((r["case"], r["said"]) for r in wrong)
    said = [r["said"] for r in mine if "said" in r and "ok" not in r and "test" not in r]
    return lines + [f"dead: {line}" if stage in BACKENDS else line for line in said]


def _first(failures: Iterable[tuple[str, str]]) -> list[str]:
    # One of each kind before the second of any.
    lines = {f"  {name}: {why}": why[:60] for name, why in failures}
    kinds = {why: line for line, why in reversed(lines.items())}
    return list(dict.fromkeys([*sorted(kinds.values(), key=list(lines).index), *lines]))[:_FIRST]


def _why(said: str) -> str:
    # Of a traceback pytest marks the lines that say why.
    why = [line[1:].strip() for line in said.splitlines() if line.startswith("E ")]
    return (why or said.strip().splitlines() or [""])[0][:160]


def _timed(rows: Rows) -> dict[tuple[str, str, str], dict[str, dict[str, Any]]]:
    found: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "ms" in row:
            found.setdefault((row["op"], row["case"], row["state"]), {})[row["variant"]] = row
    return found


def regrets(rows: Rows) -> list[tuple[float, str]]:
    """The automatic choice's time over the least of all ways, as graphs, the worst first."""
    found = []
    for (op, case, state), variants in _timed(rows).items():
        for name, row in variants.items() if state == "graph" else ():
            ways = {way: variants[f"{name}, {way}"]["ms"] for way in WAYS if f"{name}, {way}" in variants}
            if ways:
                best = min(ways, key=ways.__getitem__)
                found.append((row["ms"] / min(row["ms"], ways[best]), f"{op} {case}, {name}; least: {best}"))
    return sorted(found, reverse=True)


def ratios(rows: Rows) -> list[str]:
    """The product against torch's own, a line a case."""
    found = []
    for (op, case, state), variants in _timed(rows).items():
        base = variants.get("torch dY @ W")
        if op == "feedback_mm" and state == "graph" and base is not None:
            cells = [f"{cell} {variants[cell]['ms'] / base['ms']:.2f}" for cell in CELLS if cell in variants]
            others = [f"{name} {variants[name]['ms'] / base['ms']:.2f}" for name in BASELINES if name in variants]
            found.append(f"{case}: {1e3 * base['ms']:.4g} µs; " + ", ".join(cells) + " | " + ", ".join(others))
    return found


def host(rows: Rows) -> list[str]:
    """Microseconds of the processor for one eager call, the most of all rows of a backend."""
    most: dict[str, tuple[float, str]] = {}
    for row in rows:
        way = re.search(r", (cuda|triton|digits|int_mm|formed)$", row["variant"])
        if row.get("host_ms") and row["op"] == "feedback_mm":
            name = way[1] if way else "automatic" if row["variant"].startswith(CELLS) else "torch"
            most[name] = max(most.get(name, (0.0, "")), (1e3 * row["host_ms"], f"{row['case']}, {row['variant']}"))
    return [f"{name}: {us:.0f} ({where})" for name, (us, where) in most.items()]


def _measured(bench: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(bench.read_text())
    except (OSError, json.JSONDecodeError):
        return {"rows": []}
    return result


def text(results: Rows, records: dict[str, dict[str, Any]], bench: Path) -> str:
    """All of it."""
    said = ["VERDICT"]
    for stage in records:
        lines = found(stage, results)
        said += [f"{stage}: {lines[0]}", *lines[1:]] if lines else []
    rows = _measured(bench)["rows"]
    if rows:
        failed = [row for row in rows if "failed" in row]
        over = [row for row in rows if row["error_over_bound"] is not None and not row["error_over_bound"] <= 1]
        said.append(f"bench: {len(rows)} rows, {len(failed)} failed, {len(over)} over the error bound")
        named = [(row, row["failed"]) for row in failed] + [(r, f"error {r['error_over_bound']:.2g}") for r in over]
        said += _first((f"{r['op']} {r['case']}, {r['variant']}", why) for r, why in named)
        said += ["time over torch's dY @ W, as graphs:", *(f"  {line}" for line in ratios(rows))]
        said += ["host µs of an eager call, the most:", *(f"  {line}" for line in host(rows))]
        said += ["worst regrets:", *(f"  {regret:.2f} {what}" for regret, what in regrets(rows)[:_FIRST])]
    left: dict[str, list[str]] = {}
    for stage, record in records.items():
        if record["status"] != "done":
            left.setdefault(status(record), []).append(stage)
    said += [f"not done: {', '.join(stages)}: {why}" for why, stages in left.items()]
    return "\n".join(line[:400] for line in said)


def clean(results: Rows, records: dict[str, dict[str, Any]]) -> bool:
    """Whether all stages were done and found nothing wrong."""
    wrong = any(not r.get("ok", True) or r.get("outcome") == "failed" for r in results)
    return not wrong and all(record["status"] == "done" for record in records.values())
