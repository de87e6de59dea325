"""The papers' experiments: train them, search their hyperparameters, report.

    python -m recipes run recipes/experiments/biotorch-fashion-mnist.toml
    python -m recipes run recipes/experiments/bartunov-mnist-fc.toml --rows fa,dfa --set train.epochs=10
    python -m recipes search recipes/experiments/bartunov-mnist-fc.toml --rows fa --set train.epochs=10 --trials 60
    python -m recipes report runs --to docs/results.md
    torchrun --nproc-per-node 8 -m recipes run recipes/experiments/xiao-imagenet-resnet18.toml --parallel ddp

Every command goes on where it was stopped. A row's runs are in OUT/TABLE/ROW/seed-N, after the TOML file's name and the
row's id; `python -m recipes keys` says what may be in such a file and after --set.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # Ctrl-C while torch is loaded, before anything is begun: no traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from tqdm import tqdm

from recipes import experiment, keys, page, pictures, report, world
from recipes.run import machine, run


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    r = commands.add_parser("run", help="train experiments, or go on with them, then print their table")
    r.add_argument("--seeds", type=_seeds, metavar="N[,N...]", help="in place of the files' own")
    r.add_argument(
        "--parallel", choices=world.KINDS, default="", help="under torchrun: a run is that of all its processes"
    )
    r.add_argument(
        "--checkpoint-steps",
        type=_least(0),
        default=0,
        metavar="N",
        help="a checkpoint also after every N steps of an epoch",
    )
    r.add_argument("--tensorboard", action="store_true", help="the logs' figures as TensorBoard's events, too")
    s = commands.add_parser("search", help="random search in the files' own ranges")
    s.add_argument("--trials", type=_least(1), default=60, metavar="N", help="(default: %(default)s)")
    s.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: %(default)s)")
    s.add_argument("--first", type=_least(1), metavar="N", help="epochs after which only the best trials go on")
    s.add_argument("--keep", type=_least(1), default=1, metavar="N", help="how many go on (default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for c in (r, s):
        c.add_argument("files", nargs="+", type=Path, metavar="FILE.toml", help="a table's experiments, or one")
        c.add_argument("--rows", type=lambda text: text.split(","), metavar="ID[,ID...]", help="of them (default: all)")
        c.add_argument(
            "--set",
            action="append",
            default=[],
            type=_assignment,
            metavar="KEY=VALUE",
            dest="changes",
            help="in every row, such as train.epochs=10; the value is TOML, any other text a string; again for more",
        )
        c.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="(default: %(default)s)")
        c.add_argument("--data-root", default="data", metavar="DIR", help="where data sets are (default: %(default)s)")
        c.add_argument("--device", type=_device, default=device, help="(default: %(default)s)")
        c.add_argument(
            "--workers", type=_least(0), default=0, metavar="N", help="processes that load images of folders"
        )
        c.add_argument("--no-measure", action="store_true", help="leave out the angles after every epoch")
    t = commands.add_parser("report", help="tables and pictures as a Markdown page, from runs or their copied logs")
    t.add_argument("roots", nargs="+", type=Path, metavar="DIR", help="what --out was")
    t.add_argument("--to", type=Path, required=True, metavar="FILE.md", help="the page; its own folder's logs stay")
    commands.add_parser("keys", help="what an experiment's file may say")
    return p


def main(argv: list[str] | None = None) -> None:
    p = parser()
    args = p.parse_args(argv)
    try:
        world.check(getattr(args, "parallel", ""))
        {"run": _run, "search": _search, "report": _report, "keys": _keys}[args.command](args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        p.error(str(error))
    except KeyboardInterrupt:
        raise SystemExit(
            "stopped" if args.command == "report" else "stopped; the same command goes on from the last checkpoint"
        ) from None


def _run(args: argparse.Namespace) -> None:
    found = _entries(args)
    experiments = [experiment.load(path, row, _changes(args)) for path, _, row in found]
    more = {"checkpoint_steps": args.checkpoint_steps, "tensorboard": args.tensorboard}
    with world.join(args.parallel, args.device) as ranks:
        if ranks.rank == 0 and "-dirty" in machine()["commit"]:
            print("the code has changes that are in no commit, and a report will say so of these runs", file=sys.stderr)
        about = {"parallel": f"{ranks.kind}, {ranks.size} ranks"} if ranks.kind else {}
        for e, (path, table, row) in zip(experiments, found, strict=True):
            for seed in args.seeds or e.seeds:
                options = _options(args, path, table, **about) | more
                _train(path, row, e, seed, args.out / table / row / f"seed-{seed}", world=ranks, **options)
    if ranks.rank > 0:
        return
    for name in dict.fromkeys(table for _, table, _ in found):
        rows = [seeds for seeds in report.collect([args.out])[name] if not seeds[0].searched]
        image = args.out / name / "curves.png"
        pictures.curves(rows, name, image)
        print(f"\n{report.table(rows)}\n\ncurves: {image}")


def _search(args: argparse.Namespace) -> None:
    for path, table, row in _entries(args):
        e = experiment.load(path, row, _changes(args))
        if not e.search:
            raise ValueError(f"{path}, row {row}: search: got none, want keys and their ranges")
        if not e.data.validation:
            raise ValueError(f"{path}, row {row}: data.validation: got 0, want validation images: trials see no others")
        trials = range(args.trials)
        for epochs in dict.fromkeys((args.first or e.train.epochs, e.train.epochs)):
            scores = {}
            for trial in tqdm(trials, f"{e.row}, {epochs} epochs", leave=False, disable=None, unit="trial"):
                drawn = e.draw(trial, args.seed)
                one = experiment.load(path, row, _changes(args) | drawn | {"train.epochs": epochs})
                folder = args.out / table / f"{row}-search" / f"trial-{trial}"
                _train(path, row, one, args.seed, folder, test=False, **_options(args, path, table, drawn=drawn))
                trained = report.read(folder)
                trained.rows = trained.rows[: epochs + 1]
                scores[trial] = trained.rank
            trials = sorted(scores, key=scores.__getitem__)[: args.keep]
        print(f"{e.row}: best trial {trials[0]}, {abs(scores[trials[0]]):.4f}, {e.draw(trials[0], args.seed)}")


def _report(args: argparse.Namespace) -> None:
    for line in page.write(args.roots, args.to):
        print(line, file=sys.stderr)
    print(args.to)


def _keys(args: argparse.Namespace) -> None:
    print(keys.text())


def _entries(args: argparse.Namespace) -> list[tuple[Path, str, str]]:
    return [(path, table, row) for path in args.files for table, row, _ in experiment.entries(path, args.rows)]


def _train(path: Path, row: str, *args: Any, **options: Any) -> None:
    try:
        run(*args, **options)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}, row {row}: {error}") from error


def _options(args: argparse.Namespace, path: Path, table: str, **about: Any) -> dict[str, Any]:
    # What changes a result, without where it is kept and computed.
    changes = [part for change in args.changes for part in ("--set", change.text)]
    for name in ("seeds", "trials", "seed", "first", "keep"):
        if getattr(args, name, None) is not None:
            value = getattr(args, name)
            changes += [f"--{name}", ",".join(map(str, value)) if name == "seeds" else str(value)]
    file = path.name if table == path.stem else f"{table}/{path.name}"
    command = shlex.join(["python", "-m", "recipes", args.command, f"recipes/experiments/{file}", *changes])
    return {
        "data_root": args.data_root,
        "device": args.device,
        "workers": args.workers,
        "measure": not args.no_measure,
        "about": {"command": command, **about},
    }


class _Change(NamedTuple):
    key: str
    value: Any
    text: str


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    return {change.key: change.value for change in args.changes}


def _assignment(text: str) -> _Change:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"got {text!r}, want KEY=VALUE")
    try:
        return _Change(key, tomllib.loads(f"value = {value}")["value"], text)
    except tomllib.TOMLDecodeError:
        return _Change(key, value, text)


def _device(text: str) -> str:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, want cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"got {text!r}, want cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"got {text!r}, and torch sees {torch.cuda.device_count()} GPUs; try cpu")
    return text


def _seeds(text: str) -> list[int]:
    try:
        return [_least(0)(number) for number in text.split(",")]
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error} with commas between") from error


def _least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            found = int(text)
        except ValueError:
            found = least - 1
        if found < least:
            raise argparse.ArgumentTypeError(f"got {text!r}, want whole numbers of at least {least}")
        return found

    return number


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
