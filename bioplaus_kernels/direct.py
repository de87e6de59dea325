"""Direct feedback: the output's error, or the target, goes to each hidden block by a matrix of its own.

With e = ∂L/∂logits, h_l the output of block l (n_l numbers a sample) and B_l of shape (classes, n_l),

    DFA      ∂L/∂h_l := e B_l                       Nøkland 2016; shared slices of one B: Launay et al. 2020
    sDFA     ∂L/∂h_l := sign(e) B_l · mean|e|       Frenkel et al. 2021
    DRTP     ∂L/∂h_l := one_hot(target) B_l / N     Frenkel et al. 2021; N the samples of a mean, 1 for a sum
    shallow  no gradient: only what follows the last block learns

Inside a block, and between the last one and the logits, autograd does the rest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import ops
from .backends.reference import checks
from .feedback import Entries, Frozen, Key, State, Stateful, derived_key, fill
from .feedback.scale import UNIT_RMS
from .functional._common import captured, once
from .nn.state import Keys, StatefulLayer

_SCALES = ("nokland", "kaiming", "xavier")


@dataclass(frozen=True)
class DFA(Stateful):
    """∂L/∂h_l := e B_l, B_l fixed and random (Nøkland 2016).

    scale: root mean square of B_l's entries: "nokland" 1/√(3 n_l), which is U(±1/√n_l); "kaiming" √(2/n_l) (Frenkel's
    code); "xavier" √(2/(n_l + classes)) (Bartunov et al. 2018); or a number.
    entries: "uniform", "normal" or "constant" (random signs).
    shared: every block takes the first n_l columns of one B, its scale that of the largest n_l (Launay et al. 2020).
    stored: B is the Parameter `feedback_weight`; otherwise it is drawn from a key at each use and takes no memory.

    Shapes: e (*samples, classes), B_l (classes, n_l). Raises ValueError or TypeError for an argument that does not fit.
    """

    name: ClassVar[str] = "dfa"
    scale: float | Literal["nokland", "kaiming", "xavier"] = "nokland"
    entries: Entries = "uniform"
    shared: bool = False
    stored: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", checks.scale(self.scale, _SCALES))
        checks.one_of("entries", self.entries, UNIT_RMS, f"one of {tuple(UNIT_RMS)}")
        checks.boolean("shared", self.shared)
        checks.boolean("stored", self.stored)

    @property
    def seeded(self) -> bool:
        return self.keyed and not self.stored

    @property
    def keyed(self) -> bool:
        return self.name != "shallow"

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored B, not drawn yet."""
        return {"weight": Frozen(torch.empty_like(weight))} if self.stored and self.keyed else {}

    def draw(self, state: State, weight: Tensor, key: Tensor) -> None:
        """Fill the stored B, the blocks' columns side by side."""
        plan, b = state["plan"], state["weight"]
        if b.is_meta:
            return
        fill(b, ops.feedback_weight(None, None, None, key, plan.entries, plan.scale, b.shape, dtype=b.dtype))
        for part in plan.slices:
            if part.ratio != 1.0:
                b[:, part.start : part.start + part.size] *= part.ratio

    def root_mean_square(self, size: int, classes: int) -> float:
        """The root mean square of the entries of a B of shape (classes, size)."""
        size = max(size, 1)
        if self.scale == "nokland":
            return 1.0 / math.sqrt(3.0 * size)
        if self.scale == "kaiming":
            return math.sqrt(2.0 / size)
        return math.sqrt(2.0 / (size + classes)) if self.scale == "xavier" else float(self.scale)


class SDFA(DFA):
    """∂L/∂h_l := sign(e) B_l · mean|e| (Frenkel et al. 2021); arguments of `DFA`.

    The mean over the batch keeps the loss's scale, so that a gradient scaler does not divide the error away.
    """

    name = "sdfa"


@dataclass(frozen=True)
class DRTP(DFA):
    """∂L/∂h_l := B_l's row of the target class, over N (Frenkel et al. 2021); arguments of `DFA`.

    reduction: that of the loss. "mean": N is the number of samples with a class, as e of cross-entropy's mean holds
    1/N; "sum": N = 1. DFA reads it off e, of which nothing reaches a block here.

    A gather where B is stored or has no more rows than the batch; a seeded B of more rows is never formed, its product
    with the one-hot targets is.
    """

    name: ClassVar[str] = "drtp"
    scale: float | Literal["nokland", "kaiming", "xavier"] = "kaiming"
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of("reduction", self.reduction, ("mean", "sum"), "'mean' or 'sum'")


class Shallow(DFA):
    """The control of Frenkel et al. 2021: hidden blocks get no gradient. Arguments of `DFA` have no effect."""

    name = "shallow"


RULES: dict[str, type[DFA]] = {rule.name: rule for rule in (DFA, SDFA, DRTP, Shallow)}


class _Slice(NamedTuple):
    # Columns of the one B that are B_l, and what they are multiplied by.
    start: int
    size: int
    ratio: float


class _Plan(NamedTuple):
    kind: str
    entries: str
    scale: float
    width: int
    slices: tuple[_Slice, ...]


def _plan(rule: DFA, sizes: Sequence[int], classes: int) -> _Plan:
    unit = UNIT_RMS[rule.entries]
    if rule.shared:
        width = max(sizes)
        scale = rule.root_mean_square(width, classes)
        slices = [_Slice(0, size, 1.0) for size in sizes]
    else:
        rms = [rule.root_mean_square(size, classes) for size in sizes]
        width, scale = sum(sizes), max(rms)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        slices = [_Slice(start, size, r / scale) for start, size, r in zip(starts, sizes, rms, strict=True)]
    return _Plan(rule.name, rule.entries, scale / unit, width, tuple(slices))


class _Broadcast(torch.autograd.Function):
    # The logits as they are; backward gives e to them and its projection to every hidden output.
    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        key: Tensor | None,
        matrix: Tensor | None,
        targets: Tensor | None,
        loss_scale: Tensor | None,
        logits: Tensor,
        *hidden: Tensor,
    ) -> Tensor:
        ctx.plan = plan
        ctx.hidden = [(h.shape, h.dtype) for h in hidden]
        ctx.save_for_backward(key, matrix, targets, loss_scale)
        return logits.view_as(logits)

    @staticmethod
    @once
    def backward(ctx: Any, e: Tensor, saved: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[6:]
        grads: list[Tensor | None] = []
        if ctx.plan.kind == "shallow" or not any(wanted):
            grads = [None] * len(wanted)
        else:
            projected = _project(ctx.plan, e.reshape(-1, e.shape[-1]), *saved)
            for (shape, dtype), part, needed in zip(ctx.hidden, ctx.plan.slices, wanted, strict=True):
                grad = projected[:, part.start : part.start + part.size]
                if needed and part.ratio != 1.0:
                    grad = grad * part.ratio
                grads.append(grad.reshape(shape).to(dtype) if needed else None)
        return None, None, None, None, None, e, *grads


def _project(
    plan: _Plan,
    e: Tensor,
    key: Tensor | None,
    matrix: Tensor | None,
    targets: Tensor | None,
    loss_scale: Tensor | None,
) -> Tensor:
    # All blocks' projections side by side: (samples, width).
    entries, scale = ("stored", 1.0) if matrix is not None else (plan.entries, plan.scale)
    classes = e.shape[1]
    if targets is None:
        if plan.kind == "sdfa":
            e = e.sign() * e.abs().mean()
    else:
        assert loss_scale is not None
        # An ignored sample (cross_entropy's ignore_index) has no class and teaches nothing.
        known = targets.flatten().unsqueeze(1) >= 0
        targets = targets.flatten().clamp(min=0)
        if matrix is not None or classes <= len(targets):
            rows = matrix
            if rows is None:
                size = (classes, plan.width)
                rows = ops.feedback_weight(None, None, None, key, entries, scale, size, dtype=e.dtype)
            return (rows[targets] * known).to(e.dtype) * loss_scale
        e = (F.one_hot(targets, classes) * known).to(e.dtype) * loss_scale
    return ops.feedback_mm(e, None, None, matrix, key, entries, scale, plan.width)


class _Tape:
    # What a wrapper and its blocks share: the blocks' outputs in the forward under way. None where something else calls
    # a block, such as the recomputation of a checkpoint.
    outputs: dict[str, Tensor] | None = None


class _Block(torch.nn.Module):
    # Mixed in before a block's own class.
    _block_name: str
    _tape: _Tape

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        h = super().forward(*args, **kwargs)
        name, outputs = self._block_name, self._tape.outputs
        if outputs is None:
            return h.detach() if captured() else h
        if not isinstance(h, Tensor):
            checks.fail("blocks", f"blocks that return one tensor; {name!r}", type(h).__name__, TypeError)
        if name in outputs:
            raise RuntimeError(f"blocks: {name!r} was called twice in one forward; each block has one B")
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"blocks: {name!r} ran without recording gradients inside a forward that records them; leave it out of "
                "blocks, or checkpoint it with use_reentrant=False"
            )
        outputs[name] = h
        return h.detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_block, (type(self).__bases__[1],), self.__dict__


_BLOCK_CLASSES: dict[type[Any], type[Any]] = {}


def _block_class(base: type[Any]) -> type[Any]:
    if base not in _BLOCK_CLASSES:
        names = {"__module__": base.__module__, "__doc__": base.__doc__}
        _BLOCK_CLASSES[base] = type(base.__name__, (_Block, base), names)
    return _BLOCK_CLASSES[base]


def _new_block(base: type[Any]) -> Any:
    return object.__new__(_block_class(base))


class DirectFeedback(StatefulLayer):
    """`model`, whose named blocks learn from the output's error directly.

    The output of each block is detached for what follows, so that no gradient crosses it; a path that goes round every
    block stays back-propagation's. A block should end in its nonlinearity (and pooling), since B_l e is the gradient of
    its output. Convert layers with `convert_` before, if a block shall have a rule inside.

    blocks: names of submodules, as in `model.named_modules()`, each called once a forward and returning one tensor.
    feedback: "dfa", "sdfa", "drtp", "shallow", or a `DFA`, `SDFA`, `DRTP`, `Shallow`.
    example: an input (or a tuple of arguments) for which the model is run once, in eval mode, to learn the sizes.
    seed: the draw of B is a function of (seed, sizes, order of `blocks`), the same on every rank and device.

    The model returns logits (*samples, classes), block l (*samples, …) with n_l numbers a sample; B_l has the C-order
    columns of these. State: the buffer `feedback_key` (version, key, 0), or for a stored B the Parameter
    `feedback_weight` without gradient: (classes, Σ n_l), the blocks side by side in their order, or (classes, max n_l)
    if shared. A key draws those same columns.

    Raises TypeError or ValueError for arguments that do not fit, RuntimeError for a block that is called twice, not at
    all, or under no_grad (reentrant checkpointing), and for double backward.
    """

    feedback_weight: torch.nn.Parameter | None
    # Set by metrics.backprop.
    _bypassed: bool = False

    def __init__(
        self,
        model: torch.nn.Module,
        blocks: Sequence[str],
        feedback: str | DFA = "dfa",
        *,
        example: Tensor | tuple[Any, ...],
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.module("model", model)
        if isinstance(feedback, str):
            checks.one_of("feedback", feedback, RULES)
            feedback = RULES[feedback]()
        checks.instance("feedback", feedback, DFA, "a direct rule or its name")
        seed = checks.integer("seed", seed)
        modules = dict(model.named_modules())
        wanted = "at least one name, each once"
        names = [] if isinstance(blocks, str) else checks.entries("blocks", blocks, wanted)
        if not names or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            checks.fail("blocks", wanted, repr(blocks))
        blocks = names
        for name in blocks:
            if name not in modules or not name:
                checks.fail("blocks", "names of submodules of the model", repr(name))
            if isinstance(modules[name], _Block):
                checks.fail("blocks", "modules that no DirectFeedback has", repr(name))
        if len({id(modules[name]) for name in blocks}) != len(blocks):
            checks.fail("blocks", "different modules", repr(blocks))
        self.model, self.blocks, self.feedback = model, tuple(blocks), feedback
        self._tape = _Tape()
        for name in blocks:
            modules[name].__dict__.update(_block_name=name, _tape=self._tape)
            modules[name].__class__ = _block_class(type(modules[name]))
        try:
            logits, hidden = self._example(example)
            self._sizes = [math.prod(h.shape[logits.dim() - 1 :]) for h in hidden]
            self._classes, self._dtype = logits.shape[-1], logits.dtype
            self._check(logits, hidden)
        except BaseException:
            self.restore()
            raise
        self._seed, self._dtype = seed, logits.dtype
        self._plan = _plan(feedback, self._sizes, self._classes)
        if feedback.stored:
            # The stored columns have their scales.
            self._plan = self._plan._replace(slices=tuple(part._replace(ratio=1.0) for part in self._plan.slices))
        self._device = logits.device
        self.register_parameter("feedback_weight", None)
        self.install_feedback(feedback, self._key)

    def forward(
        self, *args: Any, targets: Tensor | None = None, loss_scale: Tensor | float = 1.0, **kwargs: Any
    ) -> Tensor:
        """`model(*args, **kwargs)`, its logits tied to the blocks.

        For DRTP: `targets`, int64 classes of shape (*samples), negative ones teaching nothing, and `loss_scale`, what
        the loss is multiplied by before backward beside its rule's `reduction` (a GradScaler's scale, one over the
        steps of gradient accumulation), a number or a 0-dim tensor, since nothing of the loss reaches the blocks.
        """
        if self._bypassed or not torch.is_grad_enabled() or captured():
            return self.model(*args, **kwargs)
        logits, hidden = self._run(args, kwargs)
        self._check(logits, hidden)
        scale = None
        if self.feedback.name == "drtp":
            if targets is None:
                checks.fail("targets", "the classes of the samples, as DRTP projects them", "None")
            checks.tensor("targets", targets)
            if targets.dtype != torch.int64:
                checks.fail("targets", "int64", targets.dtype, TypeError)
            checks.shape("targets", targets, logits.shape[:-1])
            if targets.device != logits.device:
                checks.fail("targets", f"a tensor on {logits.device}, as the logits", f"one on {targets.device}")
            if isinstance(loss_scale, bool) or not isinstance(loss_scale, int | float | Tensor):
                checks.fail("loss_scale", "a number or a 0-dim tensor", repr(loss_scale), TypeError)
            if isinstance(loss_scale, Tensor) and loss_scale.dim():
                checks.fail("loss_scale", "a number or a 0-dim tensor", f"shape {tuple(loss_scale.shape)}")
            dtype = torch.promote_types(logits.dtype, torch.float32)
            scale = torch.as_tensor(loss_scale, dtype=dtype, device=logits.device)
            if cast(DRTP, self.feedback).reduction == "mean":
                scale = scale / (targets >= 0).sum().clamp(min=1)
        elif targets is not None:
            checks.fail("targets", f"None with feedback={self.feedback.name!r}", "a tensor")
        state = self._state("weight", logits)
        kept = state.get("key"), state.get("weight")
        return _Broadcast.apply(self._plan, *kept, targets, scale, logits, *hidden)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        before = self._tape.outputs
        found: dict[str, Tensor] = {}
        self._tape.outputs = found
        try:
            logits = self.model(*args, **kwargs)
        finally:
            self._tape.outputs = before
        if not isinstance(logits, Tensor):
            checks.fail("model", "one that returns one tensor, the logits", type(logits).__name__, TypeError)
        for name in self.blocks:
            if name not in found:
                raise RuntimeError(f"blocks: {name!r} was not called in this forward")
        return logits, [found[name] for name in self.blocks]

    def _example(self, example: Any) -> tuple[Tensor, list[Tensor]]:
        args = example if isinstance(example, tuple) else (example,)
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.enable_grad():
                logits, hidden = self._run(args, {})
        except Exception:
            # A model can take anything, so its own word comes first where there is a tensor.
            if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(args)):
                checks.fail("example", "an input of the model, or a tuple of its arguments", repr(example), TypeError)
            raise
        finally:
            for module, mode in modes.items():
                module.training = mode
        if logits.dim() < 2:
            checks.fail("example", "logits of shape (*samples, classes)", f"shape {tuple(logits.shape)}")
        return logits.detach(), [h.detach() for h in hidden]

    def _check(self, logits: Tensor, hidden: list[Tensor]) -> None:
        samples = logits.shape[:-1]
        for name, h, size in zip(self.blocks, hidden, self._sizes, strict=True):
            if h.shape[: len(samples)] != samples or math.prod(h.shape[len(samples) :]) != size:
                wanted = f"{name!r} to return {tuple(samples)} samples of {size} numbers, as the logits have"
                checks.fail("blocks", wanted, f"shape {tuple(h.shape)}")

    def _key(self, name: str) -> Key:
        return derived_key(self._seed, "direct")

    def reset_feedback(self, key: Keys | None = None) -> None:
        """Draw B, or its key, from the seed again."""
        super().reset_feedback(key or self._key)

    def _weight(self, name: str) -> Tensor:
        # What B is like.
        record = self._buffers.get("feedback_state")
        device = self._device if record is None else record.device
        return torch.empty(1, dtype=self._dtype, device=device).expand(self._classes, self._plan.width)

    def _constants(self, rule: Any, name: str) -> State:
        return {"plan": _plan(rule, self._sizes, self._classes)}

    def _identity(self, rule: Any) -> tuple[str, dict[str, Any]]:
        kind, fields = super()._identity(rule)
        return kind, fields | {"blocks": list(self.blocks), "sizes": self._sizes, "classes": self._classes}

    @torch.no_grad()
    def feedback_matrix(self, block: str) -> Tensor:
        """B_l (classes, n_l) of the block called `block`: a view of a stored B, else what its key draws.

        A draw has the dtype of the model's last floating Parameter, or if it has none that of the example's logits.
        """
        checks.one_of("block", block, self.blocks)
        plan, part = self._plan, self._plan.slices[self.blocks.index(block)]
        columns = slice(part.start, part.start + part.size)
        if self.feedback_weight is not None:
            return self.feedback_weight.detach()[:, columns]
        if self.feedback_key is None:
            raise RuntimeError(f"block: feedback={self.feedback.name!r} has no B")
        size = (self._classes, part.start + part.size)
        dtypes = [p.dtype for p in self.model.parameters() if p.is_floating_point()]
        dtype = dtypes[-1] if dtypes else self._dtype
        b = ops.feedback_weight(None, None, None, self.feedback_key, plan.entries, plan.scale, size, dtype=dtype)
        return b[:, columns] * part.ratio

    def restore(self) -> torch.nn.Module:
        """The model as it was, its blocks back to back-propagation; this wrapper is not to be used again."""
        for name in self.blocks:
            block = self.model.get_submodule(name)
            block.__class__ = type(block).__bases__[1]
            del block._block_name, block._tape
        return self.model

    def extra_repr(self) -> str:
        """The rule and the blocks."""
        return f"feedback={self.feedback}, blocks={self.blocks}"

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError("DirectFeedback: use DistributedDataParallel; the threads of DataParallel share its blocks")
