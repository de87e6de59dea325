"""Run an experiment, one folder a seed: log.jsonl (a header, then a row an epoch) and checkpoint.pt.

Both are written after every epoch, whole or not at all; the same command goes on from there. A log that is missing or
is not that of the checkpoint is written again from it, and no more is done where the run is finished.
"""

from __future__ import annotations

import json
import math
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from tqdm import tqdm

from recipes import checkpoint, detection, learn, models
from recipes import data as datasets
from recipes.experiment import Experiment, difference

Row = dict[str, Any]


def run(
    experiment: Experiment,
    seed: int,
    folder: Path,
    *,
    data_root: str | Path = "data",
    device: str = "cpu",
    workers: int = 0,
    measure: bool = True,
    test: bool = True,
    about: dict[str, Any] | None = None,
) -> list[Row]:
    """Train one seed of `experiment` into `folder`, or go on with it; the rows of log.jsonl without its header.

    measure: angles and inverse losses after every epoch. test: the test images after every epoch; without, none of them
    is ever loaded. about: more for the header.
    Raises ValueError where `folder` holds a run of another experiment or a damaged checkpoint, and RuntimeError where
    another process trains into it.
    """
    with checkpoint.lock(folder):
        return _run(experiment, seed, folder, data_root, device, workers, measure, test, about)


def _run(
    experiment: Experiment,
    seed: int,
    folder: Path,
    data_root: str | Path,
    device: str,
    workers: int,
    measure: bool,
    test: bool,
    about: dict[str, Any] | None,
) -> list[Row]:
    content = {k: v for k, v in experiment.resolved.items() if k not in ("seeds", "search", "published", "row")}
    content["data"] = content.get("data", {}) | {"validation": experiment.data.validation}
    path = folder / "checkpoint.pt"
    saved = checkpoint.load(path) if path.exists() else None
    if saved is not None:
        if other := difference(json.loads(saved["experiment"]), content):
            key, made, now = other
            raise ValueError(
                f"{key}: got {now!r}, {path} was made with {made!r}; give another --out, or move that folder away"
            )
        _log(folder, json.loads(saved["header"]), saved["rows"])
        if len(saved["rows"]) > experiment.train.epochs or diverged(saved["rows"]):
            return saved["rows"]

    spec, size = experiment.data.spec(data_root), experiment.data.size
    if experiment.detects:
        data = detection.load(spec, data_root, size)
    else:
        channels, native = models.input_for(experiment.model.name, *datasets.NATIVE[experiment.data.name])
        data = datasets.load(
            spec, data_root, size or native, channels, experiment.data.augment, experiment.data.normalise
        )
    kept, validation = data.split(experiment.data.validation)
    if experiment.train.batch_size > len(kept):
        raise ValueError(f"train.batch_size: got {experiment.train.batch_size}, there are {len(kept)} images")
    learner = learn.build(experiment, data.shape, data.classes, seed, device)
    shuffle = torch.Generator()
    options: dict[str, Any] = {"device": device, "workers": workers, "collate": data.collate}
    options["reconstruct"] = experiment.reconstructs
    batches = datasets.Batches(data.train, experiment.train.batch_size, shuffle, only=kept, **options)
    # Of the training images as many as there are test images, evenly spread.
    part = kept[torch.linspace(0, len(kept) - 1, min(len(kept), len(data.test))).long()]
    size = 32 if experiment.detects else 500
    held = {"train": datasets.Batches(data.train, 500, only=part, **options)} if experiment.classifies else {}
    if len(validation):
        held["validation"] = datasets.Batches(data.plain or data.train, size, only=validation, **options)
    if test:
        held["test"] = datasets.Batches(data.test, size, **options)
    many = 32 if experiment.detects else 128
    probe = next(iter(datasets.Batches(data.train, many, only=part[:: max(1, len(part) // many)], **options)))
    schedulers = [_scheduler(experiment, optimizer) for optimizer in learner.optimizers]
    state = learner.state | {f"scheduler{i}": s for i, s in enumerate(schedulers)}

    rows: list[Row] = []
    if saved is not None:
        rows = saved["rows"]
        for name, holder in state.items():
            holder.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
        if torch.cuda.is_available() and "cuda_rng" in saved:
            torch.cuda.set_rng_state_all(saved["cuda_rng"])
    header = {"row": experiment.row, "seed": seed, "published": experiment.published, "experiment": content}
    if experiment.classifies:
        header |= {"classes": data.classes, "test_images": len(data.test)}
    made = machine()
    if saved is not None:
        # Of every part of the run.
        before = json.loads(saved["header"])
        made = {key: now if now in before[key] else f"{before[key]}; {now}" for key, now in made.items()}
    header |= made | (about or {})

    epochs = experiment.train.epochs
    for epoch in range(len(rows), epochs + 1):
        if diverged(rows):
            tqdm.write(f"{folder}: stopped, the loss is {rows[-1]['train_loss']}; try a smaller rate")
            break
        row: Row = {"epoch": epoch, "lr": learner.optimizers[0].param_groups[0]["lr"], "seconds": 0.0}
        row["train_loss"] = math.nan
        if epoch > 0:
            shuffle.manual_seed(order(seed, epoch))
            start = time.perf_counter()
            progress = tqdm(batches, f"{experiment.row} {epoch}/{epochs}", leave=False, disable=None, unit="batch")
            row["train_loss"] = learner.epoch(progress, epoch == 1)
            row["seconds"] = time.perf_counter() - start
            for scheduler in schedulers:
                scheduler.step()
        for split, part_batches in held.items():
            found = {f"{split}_{name}": value for name, value in learner.evaluate(part_batches).items()}
            # The loss of training is that of the batches it learnt from.
            row |= {name: value for name, value in found.items() if name not in row}
        if measure:
            row |= learner.measure(*probe)
        rows.append(row)
        _save(path, {"rows": rows, "header": json.dumps(header), "experiment": json.dumps(content)}, state)
        _log(folder, header, rows)
        if epoch > 0:
            shown = ", ".join(
                f"{name} {row[name]:.4f}" for name in row if name.startswith(("train_", "validation_", "test_"))
            )
            tqdm.write(f"{experiment.row} seed {seed} {epoch}/{epochs}: {shown}, {row['seconds']:.1f} s")
            sys.stdout.flush()
    if experiment.reconstructs and test:
        images = next(iter(held["test"]))[0][:10]
        with torch.no_grad():
            reconstructions(images, learner.model(images).view_as(images), folder / "reconstructions.png")
    return rows


def reconstructions(images: torch.Tensor, made: torch.Tensor, path: Path) -> None:
    """Images above, what the autoencoder made of them below, in one scale of grey."""
    both = torchvision.utils.make_grid(torch.cat([images, made]).cpu(), len(images))
    low, high = images.min().item(), images.max().item()
    torchvision.utils.save_image((both - low).div_(high - low).clamp_(0, 1), path)


def machine() -> dict[str, str]:
    """Where a run was made, and with what: processor, versions, commit."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        commit = described.stdout.strip()
    except OSError:
        commit = ""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    if torch.cuda.is_available():
        processor += f", {torch.cuda.get_device_name()}"
    return {
        "processor": f"{processor}, {torch.get_num_threads()} thread(s)",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "commit": commit,
    }


def _scheduler(experiment: Experiment, optimizer: torch.optim.Optimizer) -> Any:
    train = experiment.train
    if train.cosine:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, train.epochs)
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, train.milestones, train.gamma)


def order(seed: int, epoch: int) -> int:
    """The seed of an epoch's order of samples, which so depends on nothing that went before."""
    return random.Random(f"{seed} {epoch}").getrandbits(32)


def diverged(rows: list[Row]) -> bool:
    return len(rows) > 1 and not math.isfinite(rows[-1]["train_loss"])


def _short(row: Row) -> Row:
    # JSON has no nan, and figures need no more digits.
    return {k: (float(f"{v:.6g}") if math.isfinite(v) else None) if isinstance(v, float) else v for k, v in row.items()}


def _log(folder: Path, header: dict[str, Any], rows: list[Row]) -> None:
    path, text = folder / "log.jsonl", "".join(json.dumps(_short(r)) + "\n" for r in (header, *rows)).encode()
    if not path.exists() or path.read_bytes() != text:
        checkpoint.write(path, text)


def _save(path: Path, content: dict[str, Any], state: dict[str, Any]) -> None:
    content |= {name: holder.state_dict() for name, holder in state.items()}
    content["rng"] = torch.get_rng_state()
    if torch.cuda.is_available():
        content["cuda_rng"] = torch.cuda.get_rng_state_all()
    checkpoint.save(path, content)
