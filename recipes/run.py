"""Run an experiment, one folder a seed: log.jsonl (a header, then a row an epoch) and checkpoint.pt.

Both are written after every epoch, the checkpoint also within one, whole or not at all; the same command goes on from
there, with any number of ranks. A log that is missing or is not that of the checkpoint is written again from it, one
without a checkpoint is refused, and no more is done where the run is finished. Of many ranks the first one writes.
"""

from __future__ import annotations

import functools
import json
import math
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from tqdm import tqdm

from recipes import checkpoint, detection, finetune, learn, models, report
from recipes import data as datasets
from recipes.experiment import Experiment, difference
from recipes.world import ALONE, World

Row = dict[str, Any]


def _one_process(train: Callable[..., list[Row]]) -> Callable[..., list[Row]]:
    @functools.wraps(train)
    def locked(experiment: Experiment, seed: int, folder: Path, *, world: World = ALONE, **options: Any) -> list[Row]:
        with checkpoint.lock(folder) if world.rank == 0 else nullcontext():
            return train(experiment, seed, folder, world=world, **options)

    return locked


@_one_process
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
    checkpoint_steps: int = 0,
    tensorboard: bool = False,
    about: dict[str, Any] | None = None,
    world: World = ALONE,
) -> list[Row]:
    """Train one seed of `experiment` into `folder`, or go on with it; the rows of log.jsonl without its header.

    measure: angles and inverse losses after every epoch. test: the test images after every epoch; without, none of them
    is ever loaded. checkpoint_steps: steps within an epoch after which there is a checkpoint, 0 for none. tensorboard:
    the rows as TensorBoard's events beside. about: more for the header. world: the ranks, each of which calls this.
    Raises ValueError where `folder` holds a run of another experiment, a damaged checkpoint or a log without one, or
    where another seed beside it is of another experiment, and RuntimeError where another process trains into it, or
    where ranks do not see the same one.
    """
    content = {k: v for k, v in experiment.resolved.items() if k not in ("seeds", "search", "published", "row")}
    content["data"] = content.get("data", {}) | {"validation": experiment.data.validation}
    path = folder / "checkpoint.pt"
    saved = checkpoint.load(path) if path.exists() else None
    log = folder / "log.jsonl"
    if saved is None and log.exists():
        raise ValueError(
            f"{log}: has no checkpoint beside it, and a run from the start would replace it; {checkpoint.HOW}"
        )
    within = {"step": 0, "seconds": 0.0, "total": [0.0, 0.0]} | ((saved or {}).get("within") or {})
    places = world.gather((len(saved["rows"]), within["step"]) if saved else None)
    if places != places[:1] * world.size:
        raise RuntimeError(f"{folder}: the ranks see checkpoints of {places}; want one --out for all machines")
    if saved is not None:
        want = "the same to go on with it, another --out to train beside it, or that folder away to start anew"
        _same(json.loads(saved["experiment"]), content, path, want)
        if world.rank == 0:
            _log(folder, json.loads(saved["header"]), saved["rows"])
        # All is done once the picture is there, which comes last.
        pictured = not (experiment.reconstructs and test) or (folder / "reconstructions.png").exists()
        if (len(saved["rows"]) > experiment.train.epochs and pictured) or diverged(saved["rows"]):
            return saved["rows"]

    for beside, made_of in _beside(folder):
        want = "one experiment for all seeds of a row: another --out, or that folder away"
        _same(made_of, content, beside, want)

    spec, size = experiment.data.spec(data_root), experiment.data.size
    with world.first():
        if experiment.detects:
            data = detection.load(spec, data_root, size)
        else:
            channels, native = models.input_for(experiment.model.name, *datasets.NATIVE[experiment.data.name])
            how = experiment.data.augment, experiment.data.normalise
            data = datasets.load(spec, data_root, size or native, channels, *how)
    kept, validation = data.split(experiment.data.validation)
    train = experiment.train
    if train.batch_size > len(kept):
        raise ValueError(f"train.batch_size: got {train.batch_size}, there are {len(kept)} images")
    if train.batch_size % (world.size * train.accumulate):
        raise ValueError(
            f"train.batch_size: got {train.batch_size}, want a multiple of {world.size} ranks times "
            f"{train.accumulate} parts"
        )
    if checkpoint_steps and experiment.family == "targets":
        raise ValueError("--checkpoint-steps: want none with target propagation, whose passes are of whole epochs")
    if experiment.data.fgsm and world.kind:
        raise ValueError(f"--parallel: got {world.kind} with data.fgsm, which one process measures")
    weights = finetune.start(experiment, seed, folder) if experiment.model.init_from and saved is None else None
    learner = learn.build(experiment, data.shape, data.classes, seed, device, world, weights)
    shuffle = torch.Generator()
    options: dict[str, Any] = {"device": device, "workers": workers, "collate": data.collate}
    options["reconstruct"] = experiment.reconstructs
    shares = {"rank": world.rank, "ranks": world.size}
    batches = datasets.Batches(data.train, train.batch_size, shuffle, only=kept, **shares, **options)
    # Of the training images as many as there are test images, evenly spread.
    part = kept[torch.linspace(0, len(kept) - 1, min(len(kept), len(data.test))).long()]
    at_once = 32 if experiment.detects else 500
    seen = data.plain or data.train
    held = {"train": datasets.Batches(seen, 500, only=part, **shares, **options)} if experiment.classifies else {}
    if len(validation):
        held["validation"] = datasets.Batches(seen, at_once, only=validation, **shares, **options)
    if test:
        held["test"] = datasets.Batches(data.test, at_once, **shares, **options)
    many = 32 if experiment.detects else 128
    probe = next(iter(datasets.Batches(data.train, many, only=part[:: max(1, len(part) // many)], **options)))
    schedulers = [_scheduler(experiment, optimizer) for optimizer in learner.optimizers]
    state = learner.state | {f"scheduler{i}": s for i, s in enumerate(schedulers)}

    rows: list[Row] = []
    if saved is not None:
        rows = saved["rows"]
        for name, holder in state.items():
            world.load(holder, saved[name])
        if world.rank == 0:
            learner.total.copy_(torch.tensor(within["total"]))
    header = {"row": experiment.row, "seed": seed, "published": experiment.published, "experiment": content}
    if experiment.classifies:
        header |= {"classes": data.classes, "test_images": len(data.test)}
    made = machine()
    if saved is not None:
        # Of every part of the run.
        before = json.loads(saved["header"])
        made = {
            key: before[key] if now in before[key].split("; ") else f"{before[key]}; {now}" for key, now in made.items()
        }
    header |= made | (about or {})

    def save(**within: Any) -> None:
        content_now = {"rows": rows, "header": json.dumps(header), "experiment": json.dumps(content), "within": within}
        content_now |= {name: world.whole(holder.state_dict()) for name, holder in state.items()}
        if world.rank == 0:
            checkpoint.save(path, content_now)

    board = _board(folder, len(rows)) if tensorboard and world.rank == 0 else None
    for epoch in range(len(rows), train.epochs + 1):
        if diverged(rows):
            if world.rank == 0:
                tqdm.write(f"{folder}: stopped, the loss is {rows[-1]['train_loss']}; try a smaller rate")
            break
        row: Row = {"epoch": epoch, "lr": learner.optimizers[0].param_groups[0]["lr"], "seconds": 0.0}
        row["train_loss"] = math.nan
        if epoch > 0:
            shuffle.manual_seed(order(seed, epoch))
            batches.order.first = first = within["step"]
            start = time.perf_counter() - within["seconds"]
            within = {"step": 0, "seconds": 0.0}
            progress = tqdm(
                batches,
                f"{experiment.row} {epoch}/{train.epochs}",
                first + len(batches),
                initial=first,
                leave=False,
                disable=None if world.rank == 0 else True,
                unit="batch",
            )

            def after(step: int, start: float = start) -> None:
                if checkpoint_steps and step % checkpoint_steps == 0:
                    total = world.sum(learner.total.clone()).tolist()
                    save(step=step, seconds=time.perf_counter() - start, total=total)

            row["train_loss"] = learner.epoch(_Steps(progress, first, (seed, epoch, world.rank), after), epoch == 1)
            row["seconds"] = time.perf_counter() - start
            for scheduler in schedulers:
                scheduler.step()
        for split, part_batches in held.items():
            found = {f"{split}_{name}": value for name, value in learner.evaluate(part_batches).items()}
            # The loss of training is that of the batches it learnt from.
            row |= {name: value for name, value in found.items() if name not in row}
        if experiment.data.fgsm and test:
            pixels = datasets.pixels(experiment.data.name, experiment.data.normalise)
            found = finetune.fgsm(learner.model, held["test"], experiment.data.fgsm, pixels)
            row |= {f"test_{name}": value for name, value in found.items()}
        if measure:
            row |= learner.measure(*probe)
        rows.append(row)
        save()
        if world.rank > 0:
            continue
        _log(folder, header, rows)
        for name, value in row.items() if board else ():
            if math.isfinite(value):
                board.add_scalar(name, value, epoch)
        if epoch > 0:
            shown = ", ".join(
                f"{name} {row[name]:.4f}" for name in row if name.startswith(("train_", "validation_", "test_"))
            )
            tqdm.write(f"{experiment.row} seed {seed} {epoch}/{train.epochs}: {shown}, {row['seconds']:.1f} s")
            sys.stdout.flush()
    if board:
        board.close()
    if experiment.reconstructs and test:
        images = next(iter(held["test"]))[0][:10]
        with torch.no_grad():
            outputs = learner.model(images).view_as(images)
        if world.rank == 0:
            reconstructions(images, outputs, folder / "reconstructions.png")
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
    train, of = experiment.train, torch.optim.lr_scheduler
    if train.cosine:
        main: Any = of.CosineAnnealingLR(optimizer, train.epochs)
    else:
        main = of.MultiStepLR(optimizer, train.milestones, train.gamma)
    if not train.warmup:
        return main
    # Epoch k of them at k / (warmup + 1) of the rate.
    return of.ChainedScheduler([main, of.LinearLR(optimizer, 1 / (train.warmup + 1), total_iters=train.warmup)])


def order(*numbers: int) -> int:
    """Of (seed, epoch) the seed of an epoch's order of samples, which so depends on nothing that went before."""
    return random.Random(" ".join(map(str, numbers))).getrandbits(32)


@dataclass
class _Steps:
    """The batches of an epoch from step `first` on, any number of times over.

    What is random in a step depends on `numbers`, the pass and the step. after: called with its number when it is done.
    """

    batches: Iterable[Any]
    first: int
    numbers: tuple[int, ...]
    after: Callable[[int], None]
    passes: int = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        for step, batch in enumerate(self.batches, self.first + 1):
            torch.manual_seed(order(*self.numbers, self.passes, step))
            yield batch
            self.after(step)


def _board(folder: Path, epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"--tensorboard: {error}; pip install tensorboard") from error
    return SummaryWriter(str(folder), purge_step=epoch)


def diverged(rows: list[Row]) -> bool:
    return len(rows) > 1 and not math.isfinite(rows[-1]["train_loss"])


def _beside(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The row's other seeds and their experiments; a damaged log waits for its own run to write it again."""
    for log in sorted(folder.parent.glob("seed-*/log.jsonl")):
        with suppress(ValueError):
            if log.parent != folder:
                yield log.parent, report.read(log.parent).header["experiment"]


def _same(before: dict[str, Any], content: dict[str, Any], path: Path, want: str) -> None:
    if other := difference(before, content):
        key, made, now = (other[0], *("nothing" if value is None else repr(value) for value in other[1:]))
        raise ValueError(f"{key}: got {now}, {path} was made with {made}; want {want}")


def _short(row: Row) -> Row:
    # JSON has no nan, and figures need no more digits.
    return {k: (float(f"{v:.6g}") if math.isfinite(v) else None) if isinstance(v, float) else v for k, v in row.items()}


def _log(folder: Path, header: dict[str, Any], rows: list[Row]) -> None:
    path, text = folder / "log.jsonl", "".join(json.dumps(_short(r)) + "\n" for r in (header, *rows)).encode()
    if not path.exists() or path.read_bytes() != text:
        checkpoint.write(path, text)
