"""Train a classifier with one or several feedback rules and compare them.

    python -m recipes.train --model lenet --data digits --rule backprop,usf,fa

Each rule's run has its own folder in --out: metrics.csv (one row per epoch, the first before training), layers.txt
(what was converted) and checkpoint.pt. A table that is printed and curves.png compare the rules.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

import bioplaus_kernels as bk
from recipes import data as datasets
from recipes import measure, models, report

RULES = bk.feedback.RULES
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# A checkpoint is resumed only by a command that agrees with it on these. The others do not change the result.
SETTINGS = (
    *("model", "data", "image_size", "last_layer", "seed", "amp"),
    *("epochs", "batch_size", "lr", "momentum", "weight_decay"),
)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m recipes.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = p.add_argument_group("what to train")
    what.add_argument(
        "--model",
        type=_checked(models.check_name),
        default="lenet",
        metavar="NAME",
        help=f"{', '.join(models.MODELS)}, or any torchvision classifier, such as resnet18 (default: %(default)s)",
    )
    what.add_argument(
        "--data",
        type=_checked(_data),
        default="digits",
        metavar="NAME",
        help="digits, mnist, fashion-mnist, cifar10, or imagefolder:PATH with PATH/train and PATH/val "
        "(default: %(default)s)",
    )
    what.add_argument(
        "--data-root", default="data", metavar="DIR", help="where downloaded data is kept (default: %(default)s)"
    )
    what.add_argument(
        "--image-size",
        type=_number(int, 1),
        metavar="N",
        help="resize the images to N x N (default: as they are, or the smallest size that the model takes)",
    )
    what.add_argument(
        "--rule",
        type=_checked(_rules),
        default="usf",
        metavar="RULE[,RULE...]",
        help=f"{', '.join(RULES)}; several, separated by commas, are trained in turn (default: %(default)s)",
    )
    what.add_argument(
        "--last-layer",
        choices=("none", *RULES),
        default="none",
        metavar="RULE",
        help="the rule of the last layer; none: the same as the others' (default: %(default)s)",
    )
    how = p.add_argument_group("how (SGD, its learning rate falling to 0 along a cosine)")
    for name, number, default, text in (
        ("--epochs", _number(int, 1), 20, "passes over the training data"),
        ("--batch-size", _number(int, 1), 64, "images per step"),
        ("--lr", _number(float, 0), 0.03, "learning rate at the start"),
        ("--momentum", _number(float, 0), 0.9, "SGD's momentum"),
        ("--weight-decay", _number(float, 0), 1e-4, "SGD's weight decay"),
        ("--seed", _number(int, 0), 0, "of the weights, the feedback and the order of the images"),
        ("--workers", _number(int, 0), 0, "processes that load images"),
    ):
        how.add_argument(name, type=number, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    how.add_argument(
        "--device",
        type=_checked(_device),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ... (default: cuda where there is a GPU, else cpu)",
    )
    how.add_argument(
        "--amp", choices=AMP, default="none", help="train under autocast in this dtype (default: %(default)s)"
    )
    how.add_argument("--compile", action="store_true", help="train through torch.compile")
    out = p.add_argument_group("results")
    out.add_argument("--out", type=Path, metavar="DIR", help="(default: runs/MODEL-DATA-TIME)")
    out.add_argument("--resume", action="store_true", help="go on with the runs in --out from their checkpoints")
    return p


def main(argv: list[str] | None = None) -> dict[str, list[report.Row]]:
    p = parser()
    args = p.parse_args(argv)
    if args.resume and args.out is None:
        p.error("argument --resume: needs --out, the folder of the runs to go on with")
    name = datasets.kind(args.data)
    if args.out is None:
        args.out = Path("runs") / f"{args.model}-{name}-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        runs = compare(args)
    except BadArgument as error:
        p.error(str(error))
    picture = args.out / "curves.png"
    report.picture(runs, f"{args.model} on {name}", picture)
    print(f"\n{report.table(runs)}\n\ncurves: {picture}")
    return runs


class BadArgument(Exception):
    """An argument turns out to be wrong only after the parsing; the message names it."""


def compare(args: argparse.Namespace) -> dict[str, list[report.Row]]:
    """Train each rule of ``args.rule``; the rows of metrics.csv by rule."""
    channels, size = models.input_for(args.model, *datasets.NATIVE[datasets.kind(args.data)])
    try:
        data = datasets.load(args.data, args.data_root, args.image_size or size, channels)
    except (ValueError, RuntimeError, OSError) as error:
        raise BadArgument(f"argument --data: {error}") from error
    if args.batch_size > len(data.train):
        raise BadArgument(f"argument --batch-size: got {args.batch_size}, there are only {len(data.train)} images")
    for rule in args.rule:
        if (args.out / rule / "checkpoint.pt").exists() and not args.resume:
            raise BadArgument(f"argument --out: {args.out} holds a run already; --resume goes on with it")
    return {rule: train(args, rule, data, args.out / rule) for rule in args.rule}


def train(args: argparse.Namespace, rule: str, data: datasets.Data, folder: Path) -> list[report.Row]:
    """One run; writes into ``folder`` after every epoch."""
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    try:
        model = models.build(args.model, data.shape, data.classes)
        with torch.no_grad():
            model.eval()(torch.zeros(1, *data.shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        shape = " x ".join(map(str, data.shape))
        raise BadArgument(
            f"argument --image-size: {args.model} takes no images of {shape}: {str(error).splitlines()[0]}"
        ) from error
    layers = bk.convert_(model, rule, last_layer=None if args.last_layer == "none" else args.last_layer, seed=args.seed)
    model.to(device)
    network = torch.compile(model) if args.compile else model

    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    shuffle = torch.Generator().manual_seed(args.seed)
    options: dict[str, Any] = {"num_workers": args.workers, "pin_memory": device.type == "cuda"}
    # A last batch of one image would stop batch norm, so the rest that fills no batch waits for the next epoch.
    train_batches = DataLoader(data.train, args.batch_size, shuffle=True, drop_last=True, generator=shuffle, **options)
    test_batches = DataLoader(data.test, max(args.batch_size, 256), **options)
    probe = [part.to(device) for part in _probe(data.train)]

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    settings = {"rule": rule} | {name: getattr(args, name) for name in SETTINGS}
    checkpoint = folder / "checkpoint.pt"
    metrics = folder / "metrics.csv"
    rows: list[report.Row] = []
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "layers.txt").write_text(f"{layers}\n")
    if args.resume and checkpoint.exists():
        rows = _load(checkpoint, state, settings, shuffle)
        # The interruption may have come between the two files.
        _replace(metrics, _csv(rows))

    for epoch in range(len(rows), args.epochs + 1):
        if epoch > 1 and not math.isfinite(rows[-1]["train_loss"]):
            print(f"{rule}: stopped, the loss is {rows[-1]['train_loss']}; try a smaller --lr")
            break
        row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
        row |= {"train_loss": math.nan, "train_error": math.nan, "seconds": 0.0}
        if epoch > 0:
            start = time.perf_counter()
            batches = tqdm(train_batches, f"{rule} {epoch}/{args.epochs}", leave=False, disable=None, unit="batch")
            row["train_loss"], row["train_error"] = _epoch(network.train(), batches, args, optimizer, scaler)
            row["seconds"] = time.perf_counter() - start
            scheduler.step()
        with torch.no_grad():
            row["test_loss"], row["test_error"] = _epoch(network.eval(), test_batches, args)
        row |= measure.angles(model, *probe)
        rows.append(row)
        if epoch > 0:
            print(
                f"{rule} {epoch}/{args.epochs}: test error {row['test_error']:.2%}, training {row['train_error']:.2%}, "
                f"loss {row['train_loss']:.4f}, {row['seconds']:.1f} s",
                flush=True,
            )
        _save(checkpoint, rows, state, settings, shuffle)
        _replace(metrics, _csv(rows))
    return rows


def _epoch(
    model: nn.Module,
    batches: Any,
    args: argparse.Namespace,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[float, float]:
    """Mean loss and error over ``batches``; trains when there is an ``optimizer``."""
    device = torch.device(args.device)
    total = torch.zeros(2, device=device)
    seen = 0
    mirrored = any(isinstance(getattr(m, "feedback", None), bk.WeightMirror) for m in model.modules())
    for images, targets in batches:
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with torch.autocast(device.type, AMP[args.amp], enabled=AMP[args.amp] is not None):
            outputs = model(images)
            loss = nn.functional.cross_entropy(outputs, targets)
        if optimizer is not None and scaler is not None:
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if mirrored:
                bk.mirror_(model, lr=0.1, decay=0.1)
        wrong = (outputs.argmax(1) != targets).sum()
        total += torch.stack([loss.detach() * len(targets), wrong])
        seen += len(targets)
    loss_sum, errors = total.tolist()
    return loss_sum / seen, errors / seen


def _probe(train: Any, size: int = 128) -> list[torch.Tensor]:
    """The batch on which the gradients are compared: images evenly spread over the training data, always the same."""
    indices = torch.linspace(0, len(train) - 1, min(size, len(train))).long().tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return default_collate([train[i] for i in indices])


def _save(
    path: Path, rows: list[report.Row], state: dict[str, Any], settings: dict[str, Any], shuffle: torch.Generator
) -> None:
    content = {name: part.state_dict() for name, part in state.items()}
    content |= {"rows": rows, "settings": settings, "shuffle": shuffle.get_state(), "rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        content["cuda_rng"] = torch.cuda.get_rng_state_all()
    buffer = io.BytesIO()
    torch.save(content, buffer)
    _replace(path, buffer.getvalue())


def _load(path: Path, state: dict[str, Any], settings: dict[str, Any], shuffle: torch.Generator) -> list[report.Row]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    for name, value in settings.items():
        if content["settings"][name] != value:
            raise BadArgument(
                f"argument --{name.replace('_', '-')}: got {value}, {path} was made with {content['settings'][name]}"
            )
    for name, part in state.items():
        part.load_state_dict(content[name])
    shuffle.set_state(content["shuffle"])
    torch.set_rng_state(content["rng"])
    if torch.cuda.is_available() and "cuda_rng" in content:
        torch.cuda.set_rng_state_all(content["cuda_rng"])
    return content["rows"]


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, whenever the run is interrupted."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _csv(rows: list[report.Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _checked(function: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse, which shows the message of no other error."""

    def check(value: str) -> Any:
        try:
            return function(value)
        except (ValueError, RuntimeError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return check


def _number(convert: type, least: float) -> Callable[[str], Any]:
    def check(value: str) -> Any:
        try:
            number = convert(value)
        except ValueError:
            number = math.nan
        if not least <= number < math.inf:
            raise ValueError(f"got {value!r}, want a number of type {convert.__name__}, at least {least}")
        return number

    return _checked(check)


def _data(value: str) -> str:
    datasets.kind(value)
    return value


def _rules(value: str) -> list[str]:
    rules = list(dict.fromkeys(value.split(",")))
    unknown = [rule for rule in rules if rule not in RULES]
    if unknown:
        raise ValueError(f"got {', '.join(map(repr, unknown))}, want one or more of {', '.join(RULES)}")
    return rules


def _device(value: str) -> str:
    device = torch.device(value)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"got {value!r}, and torch sees {torch.cuda.device_count()} GPUs on this machine; try cpu")
    return value


if __name__ == "__main__":
    main()
