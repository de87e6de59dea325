"""Experiments, the rows of a paper's table: a TOML file, read and checked.

A file of a table has `[base]`, what its rows share, and a `[[row]]` for each, which says what is its own:

[[row]]
id = "dtp-slow"                          its folder in the results
name = "DTP, slow"                       what the table calls it
like = "dtp"                             a row before it, in place of the base
optimizer = {lr = 1e-5}                  keys of a table within are changed one by one

A file without rows is one experiment. What an experiment may say:

row = "DTP, parallel"                    what the table calls it
published = {test_error = 2.86}          its figures, in percent
seeds = [0]

[data]
name = "mnist"                           digits, mnist, fashion-mnist, cifar10, imagefolder, or to detect: shapes, coco
[model]
name = "mlp"                             as in recipes.models, or to detect: retinanet, retinanet-small
[algorithm]
name = "dtp"                             a feedback rule, a direct rule or a variant of target propagation,
alpha = 0.15                             and the arguments of its class
blocks = ["tanh1"]                       of a direct rule: the modules that it feeds, by default every Tanh
loss_scale = 1.0                         of drtp: a factor of what it feeds
schedule = "parallel"                    of target propagation: or sequential, or alternating by epoch
auxiliary = 512                          units z of ao_sdtp
hidden = 0                               units of ddtp's random hidden layer (DDTP-RHL), 0: linear inverses
[algorithm.last_layer]                    of a feedback rule: another in the last layer, or last_layer = "fa"
name = "fa"
scale = "xavier"
[algorithm.kinds]                        of a feedback rule: another in layers of a class of torch.nn
Conv2d = "usf"
[algorithm.mirror]                       of wm: arguments of mirror_, which follows every step
decay = 0.1
[optimizer]
name = "adam"                            sgd, adam, rmsprop, manhattan, and the arguments of its class
lr = 1e-3
[inverse_optimizer]                      of target propagation's inverses
name = "adam"
[train]
epochs = 500
[search]                                 what `recipes search` draws from
"optimizer.lr" = {low = 1e-5, high = 3e-4, log = true}
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import random
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch

import bioplaus_kernels as bk
from recipes import data, detection, models, schedules

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "rmsprop": torch.optim.RMSprop,
    "manhattan": bk.optim.BatchManhattan,
}
RULES = bk.feedback.RULES
DIRECT = bk.direct.RULES
VARIANTS = bk.targetprop.VARIANTS
# Of the weight mirror after each step, `[algorithm]` mirror: as `bioplaus_kernels.mirror_` takes them.
MIRROR = {"lr": 0.1, "decay": 0.1, "batch_size": 64, "normalise": True}
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Data:
    name: str = "mnist"  # digits, mnist, fashion-mnist, cifar10, imagefolder, shapes or coco
    path: str = ""  # of an image folder, below the data root
    size: int = 0  # height and width of the images; 0: as they are, or the smallest the model takes
    augment: str = "standard"  # of colour: standard crops and flips, vertical instead of horizontal flips, or none
    normalise: bool = True  # pixels to mean 0 and deviation 1; false: they stay from 0 to 1
    fgsm: float = 0.0  # step of FGSM on the test images, of pixels from 0 to 1; 0: no attack
    validation: float = 0.1  # share of the training images that choose the best epoch; 0: the test images do

    def spec(self, root: str | Path) -> str:
        """What `recipes.data.load` takes; `root` is where the data sets are."""
        return f"{self.name}:{Path(root) / self.path}" if self.path else self.name


@dataclass(frozen=True)
class Model:
    name: str = "lenet"  # a network of recipes.models or a classifier of torchvision
    init_from: str = ""  # weights to begin with: a row of this table, a checkpoint.pt, or torchvision
    init: str = "model"  # "model": its own, "xavier": Glorot's uniform weights and zero biases, "zero": both zero
    hidden: list[int] = field(default_factory=list)  # of mlp: units of each hidden layer, none: 5 times 256
    activation: str = "tanh"  # of mlp: tanh, sigmoid or relu


@dataclass(frozen=True)
class Train:
    epochs: int = 20  # through the training images; more of them go on with a run
    batch_size: int = 64  # images a step, of all ranks together; the last ones of an epoch that are fewer are left out
    accumulate: int = 1  # parts of a batch, on each rank, that go forward and back one after the other
    milestones: list[int] = field(default_factory=list)  # epochs after which the rates are multiplied by gamma
    gamma: float = 0.1  # what milestones multiply by
    cosine: bool = False  # the rates fall to 0 along a cosine
    warmup: int = 0  # epochs over which the rates rise, linearly, to what they would be
    amp: str = "none"  # automatic mixed precision: bf16, or fp16 with a scaled loss
    compile: bool = False  # the network, by torch.compile
    sync_bn: bool = False  # batch norm over the images of all ranks
    inverse_steps: list[int] = field(default_factory=lambda: [1])  # of the inverses a batch; of all, or each its own
    inverse_first: int = 0  # epochs of the inverses alone before the first
    inverse_extra: int = 0  # epochs of the inverses alone after each


@dataclass(frozen=True)
class Experiment:
    """A checked experiment; `resolved` is the TOML's content with what `overrides` changed."""

    row: str
    data: Data
    model: Model
    algorithm: dict[str, Any]
    optimizer: dict[str, Any]
    inverse_optimizer: dict[str, Any]
    train: Train
    search: dict[str, Any]
    published: dict[str, float]
    seeds: list[int]
    resolved: dict[str, Any]

    @property
    def family(self) -> str:
        """ "rule", "direct" or "targets", by the algorithm's name."""
        name = self.algorithm["name"]
        return "rule" if name in RULES else "direct" if name in DIRECT else "targets"

    @property
    def detects(self) -> bool:
        """Whether the task is detection; it is classification otherwise, or reconstruction."""
        return self.data.name in detection.KINDS

    @property
    def reconstructs(self) -> bool:
        """Whether the network is to give its input back, with squared error."""
        return self.model.name == "autoencoder"

    @property
    def classifies(self) -> bool:
        return not self.detects and not self.reconstructs

    def draw(self, trial: int, seed: int = 0) -> dict[str, Any]:
        """Overrides for a trial of a random search: of each key of `search` a uniform or log-uniform number in
        [low, high], or one of its choices, of a single key in turn. A function of (seed, trial)."""
        source = random.Random(f"{seed} {trial}")
        drawn: dict[str, Any] = {}
        for key, space in self.search.items():
            if "choices" in space:
                choices = space["choices"]
                drawn[key] = choices[trial % len(choices)] if len(self.search) == 1 else source.choice(choices)
            elif space.get("log", False):
                drawn[key] = float(f"{math.exp(source.uniform(math.log(space['low']), math.log(space['high']))):.4g}")
            else:
                drawn[key] = float(f"{source.uniform(space['low'], space['high']):.4g}")
        return drawn


Entry = tuple[str, str, dict[str, Any]]


def entries(path: str | Path, rows: list[str] | None = None) -> list[Entry]:
    """(table, row's id, content) of the experiments in the file `path`, or of `rows` of them.

    The table of a file with rows has the file's name; a file of one experiment is a row of its folder's table.
    Raises ValueError or TypeError that names what is wrong, and OSError for a missing file.
    """
    path = Path(path).absolute()
    try:
        content = tomllib.loads(path.read_text())
        found = _rows(content) if "row" in content and isinstance(content["row"], list) else {path.stem: content}
        for row in rows or []:
            _one_of("--rows", row, found)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error
    table = path.parent.name if list(found.values()) == [content] else path.stem
    return [(table, row, found[row]) for row in rows or found]


def load(path: str | Path, row: str | None = None, overrides: dict[str, Any] | None = None) -> Experiment:
    """The experiment `row` in the file `path`, by default the only one; `overrides` maps dotted keys ("train.epochs")
    to other values.

    Raises ValueError or TypeError that names the key, what it got and what is wanted, and OSError for a missing file.
    """
    found = entries(path, [row] if row else None)
    if len(found) > 1:
        raise ValueError(f"{path}: row: got none, want one of {', '.join(name for _, name, _ in found)}")
    try:
        return check(found[0][2], overrides)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}{f', row {row}' if row else ''}: {error}") from error


def _rows(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    for key in content:
        _one_of("the file's tables", key, ("base", "row"))
    base = _typed("base", content.get("base", {}), dict)
    found: dict[str, dict[str, Any]] = {}
    for number, own in enumerate(content["row"]):
        own = dict(_typed(f"row {number}", own, dict))
        name = _typed(f"row {number}: id", own.pop("id", None), str)
        like = own.pop("like", None)
        if name in found:
            raise ValueError(f"row {number}: id: got {name!r}, which another row has")
        if like is not None:
            _one_of(f"row {name}: like", like, found)
        start = found[like] if like is not None else base
        own["row"] = own.pop("name", name)
        merged = {key: value for key, value in start.items() if key not in ("row", "published")}
        for key, value in own.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merged[key] | value if both else value
        found[name] = merged
    return found


def check(content: dict[str, Any], overrides: dict[str, Any] | None = None) -> Experiment:
    content = copy.deepcopy(content)
    for key, value in (overrides or {}).items():
        *parents, last = key.split(".")
        table = content
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise ValueError(f"{key}: got a key below {parent}, which is no table")
        table[last] = value
    found = dict(content)
    row = _typed("row", found.pop("row", "experiment"), str)
    seeds = _typed("seeds", found.pop("seeds", [0]), list)
    for seed in seeds:
        _least("seeds", _typed("seeds", seed, int), 0)
    if not seeds:
        raise ValueError("seeds: got none, want one at least")
    published = _typed("published", found.pop("published", {}), dict)
    for name, value in published.items():
        _typed(f"published.{name}", value, float)
    parts = {part: _typed(part, found.pop(part, {}), dict) for part in _PARTS}
    if found:
        raise ValueError(_unknown(next(iter(found)), ["row", "seeds", "published", *_PARTS]))
    experiment = Experiment(
        row,
        _read(Data, parts["data"], "data"),
        _read(Model, parts["model"], "model"),
        _algorithm(parts["algorithm"]),
        _optimizer(parts["optimizer"], "optimizer"),
        _optimizer(parts["inverse_optimizer"], "inverse_optimizer") if parts["inverse_optimizer"] else {},
        _read(Train, parts["train"], "train"),
        parts["search"],
        published,
        seeds,
        content,
    )
    _check_values(experiment)
    return experiment


def difference(made: dict[str, Any], now: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key in which two experiments' contents differ, and its values; None where one goes on with the other.

    More epochs go on with a run, unless its rates were falling towards the last one.
    """
    # What does not say was made before there was the key.
    made, now = ({"data.validation": 0, **_flat(content)} for content in (made, now))
    for key in sorted(made.keys() | now.keys()):
        more = key == "train.epochs" and not now.get("train.cosine")
        if made.get(key) != now.get(key) and not more:
            return key, made.get(key), now.get(key)
    return None


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


_PARTS = ("data", "model", "algorithm", "optimizer", "inverse_optimizer", "train", "search")
TARGETS = ("schedule", "auxiliary", "hidden", "alpha", "sigma", "reduction", "mix", "inverse_objective")


def _check_values(e: Experiment) -> None:
    _one_of("data.name", e.data.name, [*data.NATIVE, *detection.KINDS])
    if (folder := e.data.name in ("imagefolder", "coco")) != bool(e.data.path):
        want = "a folder below --data-root" if folder else "none"
        raise ValueError(f"data.path: got {e.data.path!r}, want {want} with data.name = {e.data.name!r}")
    if e.detects:
        _one_of("model.name", e.model.name, models.DETECTORS)
        if e.family != "rule":
            raise ValueError(f"algorithm.name: got {e.algorithm['name']!r}, want a rule: {', '.join(RULES)}")
    else:
        _wrap("model.name", models.check_name, e.model.name)
    _one_of("data.augment", e.data.augment, data.AUGMENT)
    _one_of("model.init", e.model.init, ("model", "xavier", "zero"))
    if e.model.init_from == "torchvision" and e.model.name in (models.MODELS | models.DETECTORS):
        raise ValueError(
            f"model.init_from: got 'torchvision', which has no {e.model.name}; want a row or a checkpoint.pt"
        )
    if e.data.fgsm and not (e.classifies and e.family == "rule"):
        raise ValueError(f"data.fgsm: got {e.data.fgsm}, want 0 but for classifiers with a rule: {', '.join(RULES)}")
    _one_of("model.activation", e.model.activation, models.bartunov.ACTIVATIONS)
    for units in e.model.hidden:
        _least("model.hidden", _typed("model.hidden", units, int), 1)
    if e.model.name != "mlp" and (e.model.hidden or e.model.activation != "tanh"):
        raise ValueError(f"model.hidden, model.activation: want neither with model.name = {e.model.name!r}")
    _one_of("train.amp", e.train.amp, AMP)
    _least("train.epochs", e.train.epochs, 1)
    _least("train.batch_size", e.train.batch_size, 1)
    _least("train.accumulate", e.train.accumulate, 1)
    _least("train.warmup", e.train.warmup, 0)
    _least("data.size", e.data.size, 0)
    _least("data.fgsm", e.data.fgsm, 0)
    if not 0 <= e.data.validation < 1:
        raise ValueError(f"data.validation: got {e.data.validation}, want a share: at least 0 and less than 1")
    for key, space in e.search.items():
        good = isinstance(space, dict) and (
            (set(space) == {"choices"} and isinstance(space["choices"], list) and space["choices"])
            or (
                {"low", "high"} <= set(space) <= {"low", "high", "log"}
                and all(isinstance(space[end], int | float) for end in ("low", "high"))
                and space["low"] < space["high"]
            )
        )
        if not good:
            raise ValueError(f"search.{key}: got {space!r}, want {{choices = [...]}} or {{low, high, log = true}}")
    for epoch in e.train.milestones:
        _least("train.milestones", _typed("train.milestones", epoch, int), 0)
    _least("train.gamma", e.train.gamma, 0)
    if not e.train.inverse_steps:
        raise ValueError("train.inverse_steps: got none, want one number, or one for each inverse")
    for steps in e.train.inverse_steps:
        _least("train.inverse_steps", _typed("train.inverse_steps", steps, int), 1)
    _least("train.inverse_first", e.train.inverse_first, 0)
    _least("train.inverse_extra", e.train.inverse_extra, 0)
    if e.train.cosine and e.train.milestones:
        raise ValueError("train.cosine: got true beside train.milestones, want one of the two")
    learns = e.family == "targets" and VARIANTS[e.algorithm["name"]].inverse_loss is not None
    if learns and e.algorithm.get("mix") != 1 and not e.inverse_optimizer:
        raise ValueError(f"inverse_optimizer: got none, want one with algorithm.name = {e.algorithm['name']!r}")
    for key in ("inverse_steps", "inverse_first", "inverse_extra"):
        if not e.inverse_optimizer and getattr(e.train, key) != getattr(Train(), key):
            raise ValueError(f"train.{key}: got {getattr(e.train, key)}, want none without inverse_optimizer")
    if not learns and e.inverse_optimizer:
        raise ValueError(f"inverse_optimizer: got one, want none with algorithm.name = {e.algorithm['name']!r}")
    if e.family == "targets":
        for key in ("amp", "compile", "accumulate"):
            if (got := getattr(e.train, key)) != (want := getattr(Train, key)):
                raise ValueError(f"train.{key}: got {got}, want {want} with algorithm.name = {e.algorithm['name']!r}")


def _algorithm(table: dict[str, Any]) -> dict[str, Any]:
    name = table.get("name")
    _one_of("algorithm.name", name, [*RULES, *DIRECT, *VARIANTS])
    if name in VARIANTS:
        allowed = list(TARGETS)
        _least("algorithm.auxiliary", _typed("algorithm.auxiliary", table.get("auxiliary", 512), int), 0)
        if "auxiliary" in table and name != "ao_sdtp":
            raise ValueError(f"algorithm.auxiliary: got {table['auxiliary']}, want none with algorithm.name = {name!r}")
        _one_of("algorithm.schedule", table.get("schedule", "parallel"), schedules.SCHEDULES)
        _least("algorithm.hidden", _typed("algorithm.hidden", table.get("hidden", 0), int), 0)
        if table.get("hidden") and not VARIANTS[name].direct:
            raise ValueError(f"algorithm.hidden: got {table['hidden']}, want 0 with algorithm.name = {name!r}")
    else:
        cls = (RULES | DIRECT)[name]
        allowed = [f.name for f in dataclasses.fields(cls)] + beside(name)
        own = {key: value for key, value in table.items() if key in allowed and key not in beside(name)}
        _wrap("algorithm", lambda options: cls(**options), own)
        if name in DIRECT:
            for block in _typed("algorithm.blocks", table.get("blocks", []), list):
                _typed("algorithm.blocks", block, str)
            _typed("algorithm.loss_scale", table.get("loss_scale", 1.0), float)
        if "last_layer" in table:
            rule("algorithm.last_layer", table["last_layer"])
        for kind, value in _typed("algorithm.kinds", table.get("kinds", {}), dict).items():
            layer = getattr(torch.nn, kind, None)
            if not isinstance(layer, type) or not issubclass(layer, torch.nn.Module):
                raise ValueError(f"algorithm.kinds: got {kind!r}, want names of torch.nn's layers, such as Conv2d")
            rule(f"algorithm.kinds.{kind}", value)
        for key, value in _typed("algorithm.mirror", table.get("mirror", {}), dict).items():
            if key not in MIRROR:
                raise ValueError(_unknown(f"algorithm.mirror.{key}", list(MIRROR)))
            _typed(f"algorithm.mirror.{key}", value, type(MIRROR[key]))
        others = [table.get("last_layer"), *table.get("kinds", {}).values()]
        used = [name, *(other["name"] if isinstance(other, dict) else other for other in others)]
        if "mirror" in table and "wm" not in used:
            raise ValueError("algorithm.mirror: got one, want none without wm among the rules")
    for key in table:
        if key != "name" and key not in allowed:
            raise ValueError(f"{_unknown(f'algorithm.{key}', allowed)} with algorithm.name = {name!r}")
    return table


def rule(key: str, value: Any) -> bk.Rule:
    """The feedback rule that a name or a table of a name and its options states."""
    options = {"name": value} if isinstance(value, str) else dict(_typed(key, value, dict))
    name = options.pop("name", None)
    _one_of(f"{key}.name" if options else key, name, RULES)
    try:
        return RULES[name](**options)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{key}: {error}") from error


def beside(name: str) -> list[str]:
    # What [algorithm] takes beside the arguments of its class.
    if name in DIRECT:
        return ["blocks", "loss_scale"] if name == "drtp" else ["blocks"]
    return ["last_layer", "kinds", "mirror"]


def _optimizer(table: dict[str, Any], where: str) -> dict[str, Any]:
    table = {"name": "sgd", **table} if table else {"name": "sgd", "lr": 0.03, "momentum": 0.9}
    _one_of(f"{where}.name", table["name"], OPTIMIZERS)
    allowed = [p for p in inspect.signature(OPTIMIZERS[table["name"]]).parameters if p not in ("self", "params")]
    last = _typed(f"{where}.last_layer", table.get("last_layer", {}), dict)
    for key, options in ((where, table), (f"{where}.last_layer", last)):
        for name in options:
            if name not in (*allowed, *(("name", "last_layer") if options is table else ())):
                raise ValueError(_unknown(f"{key}.{name}", allowed))
        arguments = {k: v for k, v in options.items() if k not in ("name", "last_layer")}
        for name, value in arguments.items():
            default = inspect.signature(OPTIMIZERS[table["name"]]).parameters[name].default
            if isinstance(default, tuple):
                for number in _typed(f"{key}.{name}", value, list):
                    _typed(f"{key}.{name}", number, float)
                if len(value) != len(default):
                    raise ValueError(f"{key}.{name}: got {value!r}, want {len(default)} numbers")
            else:
                # None stands for torch's own choice of yes or no.
                _typed(f"{key}.{name}", value, bool if default is None or isinstance(default, bool) else float)
        _wrap(key, lambda a: OPTIMIZERS[table["name"]]([torch.zeros(1)], **a), arguments)
    return table


def _read(cls: type, table: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(cls)
    for key, value in table.items():
        if key not in hints:
            raise ValueError(_unknown(f"{where}.{key}", list(hints)))
        _typed(f"{where}.{key}", value, getattr(hints[key], "__origin__", hints[key]))
    return cls(**table)


def _typed(key: str, value: Any, kind: type) -> Any:
    good = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not good or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{key}: got {value!r}, want a value of type {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{key}: got {value}, want a finite number")
    return value


def _one_of(key: str, value: Any, allowed: Any) -> None:
    if value not in allowed:
        raise ValueError(f"{key}: got {value!r}, want one of {', '.join(allowed)}")


def _least(key: str, value: float, least: int) -> None:
    if value < least:
        raise ValueError(f"{key}: got {value}, want at least {least}")


def _wrap(key: str, function: Any, argument: Any) -> None:
    try:
        function(argument)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{key}: {error}") from error


def _unknown(key: str, allowed: list[str]) -> str:
    return f"{key}: no such key, want one of {', '.join(allowed)}"
