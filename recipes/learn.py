"""A network, its algorithm and its optimizers, by the algorithm's family: what an epoch does and what is measured."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import bioplaus_kernels as bk
from bioplaus_kernels import metrics
from recipes import data, detection, finetune, models, schedules
from recipes.experiment import AMP, DIRECT, MIRROR, OPTIMIZERS, RULES, VARIANTS, Experiment, rule
from recipes.models import bartunov
from recipes.world import ALONE, World

Shape = tuple[int, int, int]


class Learner:
    """Back-propagation with a feedback rule in the layers, or direct feedback to the blocks."""

    def __init__(
        self,
        experiment: Experiment,
        model: nn.Module,
        shape: tuple[int, ...],
        seed: int,
        device: Any,
        world: World = ALONE,
    ) -> None:
        self.experiment, self.device, self.world = experiment, torch.device(device), world
        # Of the epoch so far: this rank's part of the sum of the steps' losses, and of their number.
        self.total = torch.zeros(2, device=self.device)
        self.criterion = squared_error if experiment.reconstructs else nn.functional.cross_entropy
        self.set_up(model, shape, seed)

    def set_up(self, model: nn.Module, shape: tuple[int, ...], seed: int) -> None:
        """Give the model the algorithm, and what steps it the optimizers."""
        experiment, world = self.experiment, self.world
        options = dict(experiment.algorithm)
        name = options.pop("name")
        self.loss_scale = options.pop("loss_scale", 1.0)
        used: set[type] = set()
        if world.kind and experiment.train.sync_bn:
            if self.device.type == "cpu":
                raise ValueError("train.sync_bn: got true on a CPU, and torch synchronises batch norm on GPUs alone")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if experiment.family == "rule":
            last, kinds = options.pop("last_layer", None), options.pop("kinds", {})
            self.mirror = MIRROR | options.pop("mirror", {})
            # The nearest class counts, so nn.Module stands for all others.
            rules = {nn.Module: RULES[name](**options)}
            rules |= {getattr(nn, kind): rule(f"algorithm.kinds.{kind}", value) for kind, value in kinds.items()}
            last = None if last is None else rule("algorithm.last_layer", last)
            used = {type(r) for r in (*rules.values(), last)}
            bk.convert_(model, rules if kinds else rules[nn.Module], last_layer=last, seed=seed)
        else:
            blocks = options.pop("blocks", None)
            if blocks is None:
                blocks = [n for n, m in model.named_modules() if isinstance(m, nn.Tanh)]
                if not blocks:
                    raise ValueError(
                        "algorithm.blocks: got none, want names; by default they are the model's Tanh, and it has none"
                    )
            check_parallel(name, world)
            example = torch.zeros(2, *shape)
            missing = [block for block in blocks if block not in dict(model.named_modules())]
            if missing or not blocks or len({*blocks}) < len(blocks):
                names = ", ".join(n for n, m in model.named_modules() if n and not [*m.children()])
                raise ValueError(f"algorithm.blocks: got {blocks}, want names, each once, among {names}")
            model = bk.DirectFeedback(model, blocks, DIRECT[name](**options), example=example, seed=seed)
        # The layout that convolutions and pooling compute in, so that they convert nothing; FSDP2 cuts no such weights.
        layout = torch.preserve_format if world.kind == "fsdp2" else torch.channels_last
        self.model = model.to(self.device, memory_format=layout)
        self.wrapped = world.wrap(self.model, self.device)
        self.network = torch.compile(self.wrapped) if experiment.train.compile else self.wrapped
        self.mirrored = RULES["wm"] in used
        self.aligned = not used.isdisjoint(RULES[learned] for learned in ("sa", "aa", "ia"))
        self.labelled = name == "drtp"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=experiment.train.amp == "fp16")
        # torch's fused SGD takes no shards.
        self.optimizers = [optimizer(experiment.optimizer, self.model, fused=world.kind != "fsdp2")]

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizers[0], "scaler": self.scaler}

    def epoch(self, batches: Iterable[Any], first: bool = False) -> float:
        """Train on `batches`, the rest of the `first` epoch or another; the mean loss of its steps, over the ranks."""
        self.network.train()
        (optimizer,) = self.optimizers
        parts = self.experiment.train.accumulate
        for x, y in batches:
            optimizer.zero_grad()
            size = len(x) // parts
            for part in range(parts):
                chosen = slice(part * size, (part + 1) * size)
                with self.world.apart(self.wrapped, part < parts - 1):
                    with self._autocast():
                        loss = self.loss(self.network, x[chosen], y[chosen], parts) / parts
                    self.scaler.scale(loss).backward()
                self.total[0] += loss.detach() / self.world.size
            if self.aligned:
                # Its gradient is of no scaled loss.
                self.scaler.unscale_(optimizer)
                bk.align_(self.wrapped, x)
            self.scaler.step(optimizer)
            self.scaler.update()
            if self.mirrored:
                bk.mirror_(self.wrapped, **self.mirror)
            self.total[1] += 1 / self.world.size
        total, steps = self.world.sum(self.total.clone()).tolist()
        self.total.zero_()
        return total / steps

    def loss(self, model: nn.Module, x: Any, y: Any, parts: int = 1) -> Tensor:
        # DRTP projects the targets, and sees nothing of what the loss is multiplied by.
        scale = self.scaler.get_scale() / parts
        options = {"targets": y, "loss_scale": self.loss_scale * scale} if self.labelled else {}
        return self.criterion(model(x, **options), y)

    @torch.no_grad()
    def evaluate(self, batches: data.Batches) -> dict[str, float]:
        """Mean loss over `batches`, and of classes top-1 and (of more than 10) top-5 error."""
        self.network.eval()
        self.world.agree(self.model)
        total = torch.zeros(3, device=self.device)
        for x, y in batches:
            with self._autocast():
                outputs = self.network(x).float()
            total[0] += self.criterion(outputs, y) * len(y)
            if not self.experiment.reconstructs:
                total[1] += (outputs.argmax(1) != y).sum()
                total[2] += (outputs.topk(min(5, outputs.shape[1])).indices != y[:, None]).all(1).sum()
        loss, top1, top5 = (self.world.sum(total) / batches.count).tolist()
        if self.experiment.reconstructs:
            return {"loss": loss}
        return {"loss": loss, "error": top1} | ({"top5": top5} if outputs.shape[1] > 10 else {})

    def measure(self, x: Any, y: Any) -> dict[str, float]:
        """`bioplaus_kernels.metrics.row` on one batch, in training mode; the model's state stays as it is."""
        self.model.train()
        # The gradients do not depend on what came before, and neither do dropout masks.
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            return metrics.row(self.model, lambda: self.loss(self.model, x, y))

    def _autocast(self) -> torch.autocast:
        dtype = AMP[self.experiment.train.amp]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)


class TargetLearner(Learner):
    """Target propagation, its layers and its inverses each with an optimizer of their own."""

    def set_up(self, model: nn.Module, shape: tuple[int, ...], seed: int) -> None:
        experiment = self.experiment
        options = dict(experiment.algorithm)
        variant = options.pop("name")
        check_parallel(variant, self.world)
        self.schedule = options.pop("schedule", "parallel")
        if experiment.reconstructs:
            options |= {"loss": squared_error, "output": nn.Identity()}
        if not isinstance(model, nn.Sequential):
            raise ValueError(
                f"algorithm.name: got {variant!r} with model.name = {experiment.model.name!r}, want a network that is "
                "its layers one after the other, such as mlp or lc-mnist"
            )
        try:
            self.model = self.network = bartunov.target_prop(model, shape, variant, **options).to(self.device)
        except (ValueError, TypeError) as error:
            text = " ".join(str(error).split())
            raise ValueError(f"algorithm: {variant} with model.name = {experiment.model.name!r}: {text}") from error
        self.optimizers = [optimizer(experiment.optimizer, self.model.layers)]
        if experiment.inverse_optimizer:
            self.optimizers.append(optimizer(experiment.inverse_optimizer, self.model.inverses))

    @property
    def state(self) -> dict[str, Any]:
        names = ("optimizer", "inverse_optimizer")
        return {"model": self.model, **dict(zip(names, self.optimizers, strict=False))}

    def epoch(self, batches: data.Batches, first: bool = False) -> float:
        self.model.train()
        train, inverse = self.experiment.train, self.optimizers[1] if len(self.optimizers) > 1 else None
        steps = train.inverse_steps
        for _ in range(train.inverse_first if first else 0):
            schedules.train_inverses(self.model, batches, inverse, steps)
        loss = schedules.train_epoch(self.model, batches, self.optimizers[0], inverse, self.schedule, steps)
        for _ in range(train.inverse_extra):
            schedules.train_inverses(self.model, batches, inverse, steps)
        return loss

    def measure(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """Of every layer `angle_grad/<number>`; of every learned inverse its loss and its angle to the transposed W."""
        tp = self.model
        weights = metrics.trained(tp.layers)
        found = {}
        for k, inverse in enumerate(tp.inverses):
            v = next((p for p in inverse.parameters() if p.ndim > 1), None) if inverse is not None else None
            w = next((p for p in tp.layers[k].parameters() if p.ndim > 1), None)
            if v is not None and w is not None:
                # That of a linear inverse is transposed, and may have columns for auxiliary units.
                v = v[:, : len(w)].T if v.ndim == 2 else v
                if v.shape == w.shape:
                    found[f"angle_weight/{k + 1}"] = metrics.compare(w, v).angle
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.manual_seed(0)
            h = tp.activations(x)
            ours = torch.autograd.grad(tp.forward_loss(h, tp.targets(h, y), y), list(weights.values()))
            exact = torch.autograd.grad(tp.loss(tp(x), y), list(weights.values()))
            for name, g, e in zip(weights, ours, exact, strict=True):
                found[f"angle_grad/{int(name.partition('.')[0]) + 1}"] = metrics.compare(g, e).angle
            if tp.inverse_objective is not None:
                with torch.no_grad():
                    losses = [loss.item() for loss in tp.inverse_losses(h)]
                found |= {f"inverse_loss/{number}": loss for number, loss in enumerate(losses, 2)}
        return found

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)


class Detector(Learner):
    """A detector with a feedback rule in its layers; images and targets are torchvision's lists."""

    def loss(self, model: nn.Module, x: Any, y: Any, parts: int = 1) -> Tensor:
        return torch.stack(list(model(x, y).values())).sum()

    def evaluate(self, batches: data.Batches) -> dict[str, float]:
        """COCO's AP, AP50 and AP75 over all of `batches`; in full precision, which torchvision's suppression needs."""
        self.world.agree(self.model)
        parts = self.world.gather(detection.detect(self.network.eval(), batches))
        found = [one for part in parts for one in part]
        images = [batches.dataset.ids[i] for i in batches.only.tolist()]
        return detection.average_precision(batches.dataset.coco, found, images)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """‖output − target‖², summed over units and averaged over the batch (Bartunov et al. 2018, 5.5)."""
    return (outputs - targets).square().flatten(1).sum(1).mean()


# Why not on many ranks.
_ONE_RANK = dict.fromkeys(VARIANTS, "two losses and no module's output give its gradients")
_ONE_RANK["sdfa"] = "mean|e| is that of each one's batch"


def check_parallel(name: str, world: World) -> None:
    """Raises ValueError where the algorithm `name` would not be the same on many ranks as on one."""
    if world.kind and name in _ONE_RANK:
        raise ValueError(f"--parallel: got {world.kind} with {name}, which one process trains: {_ONE_RANK[name]}")


def build(
    experiment: Experiment,
    shape: Shape,
    classes: int,
    seed: int,
    device: Any,
    world: World = ALONE,
    start: tuple[dict[str, Tensor], bool] | None = None,
) -> Learner:
    """start: the weights to begin with, as `finetune.load` takes them."""
    torch.manual_seed(seed)
    name = experiment.model.name
    if experiment.detects:
        model = models.DETECTORS[name](classes, shape[1])
    else:
        try:
            options = experiment.model
            model = models.build(name, shape, classes, options.hidden, options.activation)
            with torch.no_grad():
                model.eval()(torch.zeros(1, *shape))
        except (RuntimeError, ValueError, AssertionError) as error:
            size = " x ".join(map(str, shape))
            raise ValueError(f"data.size: {name} takes no images of {size}: {str(error).splitlines()[0]}") from error
    if experiment.model.init == "xavier":
        bartunov.glorot(model)
    elif experiment.model.init == "zero":
        for p in model.parameters():
            nn.init.zeros_(p)
    if start is not None:
        finetune.load(model, *start)
    kind = Detector if experiment.detects else TargetLearner if experiment.family == "targets" else Learner
    return kind(experiment, model, shape, seed, device, world)


def optimizer(options: dict[str, Any], model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    """The optimizer that a TOML table describes; `last_layer` holds what differs for the last module with weights."""
    cls = OPTIMIZERS[options["name"]]
    options = ({"fused": True} if fused and "fused" in inspect.signature(cls).parameters else {}) | options
    del options["name"]
    last = options.pop("last_layer", None)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not last:
        return cls(trained, **options)
    head = [m for m in model.modules() if m._parameters][-1]
    owned = {id(p) for p in head.parameters()}
    groups = [
        {"params": [p for p in trained if id(p) not in owned]},
        {"params": [p for p in trained if id(p) in owned], **last},
    ]
    return cls(groups, **options)
