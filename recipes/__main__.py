"""The papers' experiments.

python -m recipes run recipes/experiments/biotorch-fashion-mnist/*.toml
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any

import torch

from recipes import experiment
from recipes.run import run


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    r = commands.add_parser("run", help="train experiments, or go on with them")
    r.add_argument("files", nargs="+", type=Path, metavar="FILE.toml", help="experiments, one a row of a table")
    r.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="(default: %(default)s)")
    r.add_argument("--set", action="append", default=[], type=_assignment, metavar="KEY=VALUE", help="train.epochs=5")
    r.add_argument("--seeds", type=_seeds, metavar="N[,N...]", help="in place of the files' own")
    r.add_argument("--data-root", default="data", metavar="DIR", help="where data sets are (default: %(default)s)")
    r.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    r.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load images of folders")
    r.add_argument("--no-measure", action="store_true", help="leave out the angles after every epoch")
    return p


def main(argv: list[str] | None = None) -> None:
    p = parser()
    args = p.parse_args(argv)
    try:
        experiments = [(path, experiment.load(path, dict(args.set))) for path in args.files]
        for path, e in experiments:
            for seed in args.seeds or e.seeds:
                run(
                    e,
                    seed,
                    args.out / path.parent.name / path.stem / f"seed-{seed}",
                    data_root=args.data_root,
                    device=args.device,
                    workers=args.workers,
                    measure=not args.no_measure,
                )
    except (ValueError, TypeError, OSError) as error:
        p.error(str(error))


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"got {text!r}, want KEY=VALUE")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def _seeds(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, want whole numbers with commas between") from error


if __name__ == "__main__":
    main()
