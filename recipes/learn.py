"""A network, its algorithm and its optimizers, by the algorithm's family: what an epoch does and what is measured."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

import bioplaus_kernels as bk
from bioplaus_kernels import metrics
from recipes import data, detection, models, schedules
from recipes.experiment import AMP, DIRECT, MIRROR, OPTIMIZERS, RULES, Experiment, rule
from recipes.models import bartunov

Shape = tuple[int, int, int]


class Learner:
    """Back-propagation with a feedback rule in the layers, or direct feedback to the blocks."""

    def __init__(
        self, experiment: Experiment, model: nn.Module, shape: tuple[int, ...], seed: int, device: Any
    ) -> None:
        self.experiment, self.device = experiment, torch.device(device)
        self.criterion = squared_error if experiment.reconstructs else nn.functional.cross_entropy
        options = dict(experiment.algorithm)
        name = options.pop("name")
        used: set[type] = set()
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
            blocks, self.loss_scale = options.pop("blocks", None), options.pop("loss_scale", 1.0)
            if blocks is None:
                blocks = [n for n, m in model.named_modules() if isinstance(m, nn.Tanh)]
                if not blocks:
                    raise ValueError(
                        "algorithm.blocks: got none, want names; by default they are the model's Tanh, and it has none"
                    )
            example = torch.zeros(2, *shape)
            model = bk.DirectFeedback(model, blocks, DIRECT[name](**options), example=example, seed=seed)
        # The layout that convolutions and pooling compute in, so that they convert nothing.
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.network = torch.compile(self.model) if experiment.train.compile else self.model
        self.mirrored = RULES["wm"] in used
        self.aligned = not used.isdisjoint(RULES[learned] for learned in ("sa", "aa", "ia"))
        self.labelled = name == "drtp"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=experiment.train.amp == "fp16")
        self.optimizers = [optimizer(experiment.optimizer, self.model)]

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizers[0], "scaler": self.scaler}

    def epoch(self, batches: data.Batches, first: bool = False) -> float:
        """Train once through `batches`, for the `first` time or again; the mean loss."""
        self.network.train()
        total = torch.zeros((), device=self.device)
        (optimizer,) = self.optimizers
        count = 0
        for x, y in batches:
            with self._autocast():
                loss = self.loss(self.network, x, y)
            optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            if self.aligned:
                # Its gradient is of no scaled loss.
                self.scaler.unscale_(optimizer)
                bk.align_(self.model, x)
            self.scaler.step(optimizer)
            self.scaler.update()
            if self.mirrored:
                bk.mirror_(self.model, **self.mirror)
            total += loss.detach()
            count += 1
        return total.item() / count

    def loss(self, model: nn.Module, x: Any, y: Any) -> Tensor:
        # DRTP projects the targets.
        options = {"targets": y, "loss_scale": self.loss_scale * self.scaler.get_scale()} if self.labelled else {}
        return self.criterion(model(x, **options), y)

    @torch.no_grad()
    def evaluate(self, batches: data.Batches) -> dict[str, float]:
        """Mean loss over `batches`, and of classes top-1 and (of more than 10) top-5 error."""
        self.network.eval()
        total = torch.zeros(3, device=self.device)
        for x, y in batches:
            with self._autocast():
                outputs = self.network(x).float()
            total[0] += self.criterion(outputs, y) * len(y)
            if not self.experiment.reconstructs:
                total[1] += (outputs.argmax(1) != y).sum()
                total[2] += (outputs.topk(min(5, outputs.shape[1])).indices != y[:, None]).all(1).sum()
        loss, top1, top5 = (total / batches.count).tolist()
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

    def __init__(
        self, experiment: Experiment, model: nn.Module, shape: tuple[int, ...], seed: int, device: Any
    ) -> None:
        self.experiment, self.device = experiment, torch.device(device)
        self.criterion = squared_error if experiment.reconstructs else nn.functional.cross_entropy
        options = dict(experiment.algorithm)
        variant = options.pop("name")
        self.schedule = options.pop("schedule", "parallel")
        if experiment.reconstructs:
            options |= {"loss": squared_error, "output": nn.Identity()}
        self.model = self.network = bartunov.target_prop(model, shape, variant, **options).to(self.device)
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

    def loss(self, model: nn.Module, x: Any, y: Any) -> Tensor:
        return torch.stack(list(model(x, y).values())).sum()

    def evaluate(self, batches: data.Batches) -> dict[str, float]:
        """COCO's AP, AP50 and AP75 over all of `batches`; in full precision, which torchvision's suppression needs."""
        found = detection.detect(self.network.eval(), batches)
        ids = batches.dataset.ids
        images = ids if batches.only is None else [ids[i] for i in batches.only.tolist()]
        return detection.average_precision(batches.dataset.coco, found, images)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """‖output − target‖², summed over units and averaged over the batch (Bartunov et al. 2018, 5.5)."""
    return (outputs - targets).square().flatten(1).sum(1).mean()


def build(experiment: Experiment, shape: Shape, classes: int, seed: int, device: Any) -> Learner:
    torch.manual_seed(seed)
    name = experiment.model.name
    if experiment.detects:
        model = models.DETECTORS[name](classes, shape[1])
    else:
        try:
            model = models.build(name, shape, classes)
            with torch.no_grad():
                model.eval()(torch.zeros(1, *shape))
        except (RuntimeError, ValueError, AssertionError) as error:
            size = " x ".join(map(str, shape))
            raise ValueError(f"data.size: {name} takes no images of {size}: {str(error).splitlines()[0]}") from error
    if experiment.model.init == "xavier":
        bartunov.glorot(model)
    kind = Detector if experiment.detects else TargetLearner if experiment.family == "targets" else Learner
    return kind(experiment, model, shape, seed, device)


def optimizer(options: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that a TOML table describes; `last_layer` holds what differs for the last module with weights."""
    cls = OPTIMIZERS[options["name"]]
    fused = {"fused": True} if "fused" in inspect.signature(cls).parameters else {}
    options = {**fused, **options}
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
