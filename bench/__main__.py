"""Command line of the benchmarks."""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

# torch's profiler, which counts the bytes, otherwise writes two lines a use.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
from tqdm import tqdm

from . import device, instructions, machine, registry, report, runner

RESULTS = Path(__file__).parent / "results"


def _results() -> list[Path]:
    # The best level first, then GPUs.
    levels = sorted(RESULTS.glob("cpu*.json"), key=lambda path: (len(path.name), path.name))
    return levels + sorted(RESULTS.glob("cuda*.json"))


def main() -> None:
    """Parse the command line and run or report."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure; writes one JSON file")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    run.add_argument("--op", action="append", help="only this op; repeat for several")
    run.add_argument("--quick", action="store_true", help="a few small cases")
    run.add_argument("--headline", action="store_true", help="the product's few cases of most worth, most worth first")
    run.add_argument("--match", default="", help="only cases whose label matches this regular expression")
    run.add_argument("--state", action="append", default=[], help="only warm, cold or graph; repeat for several")
    run.add_argument("--without", default="", help="leave out variants that match this regular expression")
    run.add_argument("--seconds", type=float, default=1.0, help="timing of each variant (default 1)")
    run.add_argument("--patience", type=float, default=600, help="seconds a case may wait for 20 quiet samples")
    run.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no case is begun")
    going_on = run.add_mutually_exclusive_group()
    going_on.add_argument("--continue", action="store_true", dest="go_on", help="keep OUT's quiet cases, do the rest")
    going_on.add_argument("--again", action="store_true", help="keep what OUT holds but for these whole cases")
    run.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    run.add_argument("--instructions", action="store_true", help="count those of overhead in valgrind too (minutes)")
    run.add_argument("--out", type=Path, help="default: build/DEVICE.json; bench/results holds those that are kept")
    show = commands.add_parser("report", help="write the pages and pictures of docs from result files")
    show.add_argument("--results", type=Path, nargs="+", default=_results(), help="the best level first")
    show.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"))
    show.add_argument("--draft", action="store_true", help="also of rows with fewer than 20 quiet samples")
    commands.add_parser("gpu-static", help="compile the GPU kernels and rewrite bench/gpu_static.csv")
    commands.add_parser("gpu-report", help="write bench/GPU.md from that table")
    args = parser.parse_args()
    if args.command == "gpu-report":
        from . import gpu_report

        gpu_report.write()
        print(gpu_report.REPORT)
        return
    if args.command == "gpu-static":
        from . import gpu_static

        gpu_static.write(gpu_static.measure_all())
        print(gpu_static.TABLE)
        return
    if args.command == "report":
        report.write(args.results, args.out, args.draft)
        print(args.out)
        return
    if args.instructions and args.device != "cpu":
        parser.error("--instructions: expected --device cpu, valgrind counts no GPU's")
    if args.seconds <= 0 or args.threads < 1:
        parser.error("--seconds and --threads: expected more than 0")
    torch.set_num_threads(args.threads)
    try:
        where = device.Cuda() if args.device == "cuda" else device.Cpu()
    except RuntimeError as error:
        parser.error(f"--device {args.device}: {error}")
    if unknown := set(args.state) - set(where.states(cold=True)):
        parser.error(f"--state: expected {', '.join(where.states(cold=True))}, got {', '.join(sorted(unknown))}")
    try:
        found = registry.cases(args.op, args.quick, args.headline, args.device == "cuda")
        cases = [c for c in found if re.search(args.match, c.label)]
    except ValueError as error:
        parser.error(str(error))
    if not cases:
        parser.error(f"--match: no label matches {args.match!r}")
    out = args.out or Path("build", f"{args.device}.json")
    # All of float32, but where a variant says TF32.
    with device.tf32(False):
        result = _measure(args, cases, where, out)
    if args.instructions:
        try:
            counted = instructions.count("overhead")
        except (FileNotFoundError, RuntimeError) as error:
            parser.error(str(error))
        for row in result["rows"]:
            if (row["case"], row["variant"]) in counted:
                row["instructions"] = counted[row["case"], row["variant"]]
        _save(result, out)
    print(report.table(result))
    print(out)


def _measure(args: argparse.Namespace, cases: list[registry.Case], where: device.Device, out: Path) -> dict[str, Any]:
    # Saved after every case, so that a run that is cut off keeps what it has measured.
    end = time.monotonic() + args.budget
    out.parent.mkdir(parents=True, exist_ok=True)
    if (args.go_on or args.again) and out.exists():
        result: dict[str, Any] = json.loads(out.read_text())
        header, before = machine.header(where), result["machine"]
        which = ("gpu",) if isinstance(where, device.Cuda) else ("processor", "threads")
        if other := [k for k in (*which, "library_level", "torch") if header[k] != before.get(k)]:
            was, here = (", ".join(f"{k} {of.get(k)}" for k in other) for of in (before, header))
            raise SystemExit(f"--out: {out} has results of {was}; here it is {here}: expected a file of its own")
        if header["commit"] not in before["commit"]:
            before["commit"] += f", then {header['commit']}"
        if where.probe:
            where.probe.known = before.get("probe_seconds", float("inf"))
        these = {(case.op, case.label) for case in cases}
        if args.go_on:
            these &= report.loud(result)
        for rows in ("lost", "rows"):
            result[rows] = [row for row in result[rows] if (row["op"], row["case"]) not in these]
        _save(result, out)
    else:
        roofline = machine.roofline(where, min(0.5, args.seconds))
        result = {"machine": machine.header(where), "roofline": roofline, "lost": [], "left_out": [], "rows": []}
        if isinstance(where, device.Cuda):
            # Once it has worked.
            result["machine"] |= machine.driver_and_clocks(where)
    done = {(row["op"], row["case"]) for row in result["rows"]}
    left = [case for case in cases if (case.op, case.label) not in done]
    for i, case in enumerate(tqdm(left, unit="case", disable=None)):
        result["left_out"] = [f"{c.op}: {c.label}" for c in left[i:]] if time.monotonic() > end else []
        if result["left_out"]:
            _save(result, out)
            break
        here = (row for row in result["lost"] if (row["op"], row["case"]) == (case.op, case.label))
        lost = {row["variant"]: row["failed"] for row in here}
        try:
            result["rows"] += runner.run(case, args.seconds, where, args.state, args.without, lost, args.patience)
            if where.probe:
                result["machine"]["probe_seconds"] = where.probe.best
        except runner.DeviceLost as error:
            result["lost"].append({"op": case.op, "case": case.label, "variant": error.variant, "failed": str(error)})
            _save(result, out)
            # Another process has a GPU again, and goes on without that variant.
            again = [a for a in sys.argv[1:] if a not in ("--continue", "--again")]
            budget = ["--budget", str(end - time.monotonic())] if args.budget != float("inf") else []
            os.execv(sys.executable, [sys.executable, "-m", "bench", *again, "--continue", *budget])
        _save(result, out)
    return result


def _save(result: dict[str, Any], out: Path) -> None:
    rows = ",\n".join(json.dumps(row) for row in result["rows"])
    temporary = out.with_suffix(".tmp")
    temporary.write_text(f"{json.dumps(result | {'rows': []})[:-2]}\n{rows}\n]}}\n")
    temporary.replace(out)


if __name__ == "__main__":
    main()
