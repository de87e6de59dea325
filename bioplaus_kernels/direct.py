"""Direct feedback: the output's error, or the target, goes to each hidden block by a matrix of its own.

With e = ∂L/∂logits, h_l the output of block l (n_l numbers a sample) and B_l of shape (classes, n_l),

    DFA      ∂L/∂h_l := e B_l                       Nøkland 2016; shared slices of one B: Launay et al. 2020
    sDFA     ∂L/∂h_l := sign(e) B_l · mean|e|       Frenkel et al. 2021
    DRTP     ∂L/∂h_l := one_hot(target) B_l / N     Frenkel et al. 2021; N the samples of a mean, 1 for a sum
    DKP      DFA whose B_l takes the gradient eᵀ h_l      Webster et al. 2021
    shallow  no gradient: only what follows the last block learns

Inside a block, and between the last one and the logits, autograd does the rest.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import ops
from ._direct import (
    Broadcast,
    Call,
    Learn,
    _Block,
    _new_block,  # noqa: F401 - version 0.1's pickles look for it here
    _Plan,  # noqa: F401 - and pickles for these
    _plan,
    _Slice,  # noqa: F401
    _Tape,
    block_class,
    drtp_scale,
    each_tensor,
    normalised,
    numbers,
    probabilities,
    reaches,
    same_numbers,
    ways,
)
from ._restore import kept
from .backends.reference import checks
from .feedback import Entries, Frozen, Key, State, Stateful, derived_key, fill, whole
from .feedback.scale import UNIT_RMS
from .functional._common import captured
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

    The mean over the batch keeps the loss's scale, so that a gradient scaler does not divide the error away. It is that
    of the samples in the call: of data-parallel ranks each has its own.
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


@dataclass(frozen=True)
class DKP(DFA):
    """Direct Kolen–Pollack: ∂L/∂h_l := e B_l, and B_l takes the gradient eᵀ h_l, summed over samples.

    Webster et al. 2021, by their code (webstah/dkp-gist). B is the Parameter `feedback_weight`, which belongs in the
    optimizer, with the weights' decay; its first values are those of `DFA`. A forward keeps the blocks' outputs for it,
    and raises ValueError where something behind a block has changed them in place; compiled, it keeps a copy of those.
    Arguments of `DFA`; B is always stored.
    """

    name: ClassVar[str] = "dkp"
    fixed: ClassVar[bool] = False
    stored: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stored:
            raise ValueError("stored: expected True with 'dkp', which learns B, got False")

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": torch.nn.Parameter(torch.empty_like(weight))}


class Shallow(DFA):
    """The control of Frenkel et al. 2021: hidden blocks get no gradient. Arguments of `DFA` have no effect."""

    name = "shallow"


RULES: dict[str, type[DFA]] = {rule.name: rule for rule in (DFA, SDFA, DRTP, DKP, Shallow)}


# Makes of the logits, and of the outputs of each block's calls, the logits that are given on.
_Tie = Callable[[Tensor, list[list[Tensor]]], Tensor]


class DirectFeedback(StatefulLayer):
    """`model`, whose named blocks learn from the output's error directly.

    The output of each block is detached for what follows, so that no gradient crosses it; a path that goes round every
    block stays back-propagation's. A block should end in its nonlinearity (and pooling), since B_l e is the gradient of
    its output. Convert layers with `convert_` before, if a block shall have a rule inside.

    blocks: names of submodules, as in `model.named_modules()`, each returning one tensor.
    feedback: "dfa", "sdfa", "drtp", "dkp", "shallow", or a `DFA`, `SDFA`, `DRTP`, `DKP`, `Shallow`.
    example: an input (or a tuple of arguments) for which the model is run once, in eval mode, to learn the sizes.
    seed: the draw of B is a function of (seed, sizes, order of `blocks`), the same on every rank and device.
    logits: name of the submodule whose output the logits are; what follows it (log_softmax, a loss) is differentiated
    as usual, and e is the gradient that arrives there. Each call of it is tied to the blocks' calls since the one
    before. No checkpoint inside the model may recompute it. By default the logits are what the model returns, and
    probabilities, or logarithms of such, are refused where they can be told: where softmax, log_softmax, sigmoid or
    logsigmoid made them, with nothing but shapes, dtypes, logarithms, bounds and arithmetic with constants after it; or
    where those of the example, in float32 or float64, sum to one over two or more classes. Not told is the rest, such
    as 1/(1 + exp(−z)) written out, a learned factor behind softmax, or 0.9 p of a p made by hand.
    output: a function that picks the logits from what that submodule, or the model, returns: it is given mappings,
    tuples, lists or dataclasses, and returns a tensor that is in them. Where the model computes its loss itself, only
    logits= ties it to the blocks.
    class_dim: the logits' dimension of the classes, −1 by default, 1 of (N, classes, *spatial). It has to be said where
    the example's shapes fit 1.

    With class_dim = −1 the logits are (*samples, classes) and block l returns (*samples, …), n_l numbers a sample, in
    whose C-order B_l's columns are. In general these are (*before, classes, *after) and (*before, …, *after); with
    class_dim = 1, (N, classes, *spatial) and (N, n_l, *spatial):

        ∂L/∂h_l[n, :, y, x] := e[n, :, y, x] B_l

    A block may be called several times in a forward. Each call has the same B_l and gets the same e; or, where the
    logits have one more dimension of samples, of the length of the calls, call t gets slice t of e, as if its outputs
    were stacked. The example tells which, and the number of calls may change.

    State: a key, or for a stored B the Parameter `feedback_weight`, which only DKP trains: (classes, Σ n_l), the blocks
    side by side in their order, or (classes, max n_l) if shared. A key draws those same columns. `logits`, `output` and
    `class_dim` are not in it: with the same classes and n_l, B is the same.

    Raises TypeError or ValueError for arguments that do not fit or leave a doubt, RuntimeError for a block that is not
    called before the logits, or under no_grad (reentrant checkpointing), and for double backward.
    """

    feedback_weight: torch.nn.Parameter | None
    # Set by metrics.backprop.
    _bypassed: bool = False
    # Of each block, the logits' dimension that its calls are slices of, where they are. The defaults are version 0.1's.
    _stacks: dict[str, int | None] = {}  # noqa: RUF012
    _class_dim: int = -1
    _logits: str | None = None
    _REMEDY = "make the DirectFeedback with this rule and these blocks"
    _output: Callable[[Any], Tensor] | None = None
    # How many tensors were returned where the others were looked at: a loss may come with labels alone.
    _looked_at: frozenset[int] = frozenset()
    _device: torch.device = torch.device("cpu")
    _dtype: torch.dtype = torch.float32

    def __init__(
        self,
        model: torch.nn.Module,
        blocks: Sequence[str],
        feedback: str | DFA = "dfa",
        *,
        example: Tensor | tuple[Any, ...],
        seed: int = 0,
        logits: str | None = None,
        output: Callable[[Any], Tensor] | None = None,
        class_dim: int | None = None,
    ) -> None:
        super().__init__()
        checks.module("model", model)
        if isinstance(feedback, str):
            checks.one_of("feedback", feedback, RULES)
            feedback = RULES[feedback]()
        checks.instance("feedback", feedback, DFA, "a direct rule or its name")
        seed = checks.integer("seed", seed)
        modules = dict(model.named_modules())
        wanted = "at least one name (a string), each once"
        names = [] if isinstance(blocks, str) else checks.entries("blocks", blocks, wanted)
        if not names or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            checks.fail("blocks", wanted, repr(blocks))
        if output is not None:
            checks.function("output", output, "a function of what the model returns")
        if class_dim is not None:
            class_dim = checks.integer("class_dim", class_dim)
        tied = [("blocks", name) for name in names] + ([] if logits is None else [("logits", logits)])
        taken: list[torch.nn.Module] = []
        for argument, name in tied:
            if not isinstance(name, str) or name not in modules or not name:
                checks.fail(argument, "names of submodules of the model", repr(name))
            if isinstance(modules[name], _Block):
                checks.fail(argument, "modules that no DirectFeedback has", repr(name))
            if any(modules[name] is other for other in taken):
                checks.fail(argument, "different modules, the logits' not among the blocks", repr(name))
            taken.append(modules[name])
        self.model, self.blocks, self.feedback = model, tuple(names), feedback
        self._logits, self._output = logits, output
        self._tape = _Tape()
        self._tape.blocks, self._tape.taught = self.blocks, feedback.name != "shallow"
        self._tape.learns = not feedback.fixed
        for _, name in tied:
            modules[name].__dict__.update(_block_name=name, _tape=self._tape)
            modules[name].__class__ = block_class(type(modules[name]))
        try:
            example_logits = self._example(example, class_dim)
        except BaseException:
            self.restore()
            raise
        self._seed, self._dtype, self._device = seed, example_logits.dtype, example_logits.device
        self._plan = _plan(feedback, self._sizes, self._classes)
        if feedback.stored:
            # The stored columns have their scales.
            self._plan = self._plan._replace(slices=tuple(part._replace(ratio=1.0) for part in self._plan.slices))
        self.register_parameter("feedback_weight", None)
        self.install_feedback(feedback, self._key)

    def forward(
        self, *args: Any, targets: Tensor | None = None, loss_scale: Tensor | float = 1.0, **kwargs: Any
    ) -> Any:
        """`model(*args, **kwargs)`, its logits tied to the blocks.

        For DRTP: `targets`, int64 classes of shape (*samples), negative ones teaching nothing, and `loss_scale`, what
        the loss is multiplied by before backward beside its rule's `reduction` (a GradScaler's scale, one over the
        steps of gradient accumulation), a number or a 0-dim tensor, since nothing of the loss reaches the blocks.
        """
        if self._bypassed or not torch.is_grad_enabled() or captured():
            return self.model(*args, **kwargs)
        return self._run(args, kwargs, partial(self._tied, targets, loss_scale))

    def _tied(
        self, targets: Tensor | None, loss_scale: Tensor | float, logits: Tensor, hidden: list[list[Tensor]]
    ) -> Tensor:
        self._check(logits, hidden)
        d, scale = self._class_dim % logits.dim(), None
        if self.feedback.name == "drtp":
            scale = drtp_scale(targets, loss_scale, cast(DRTP, self.feedback).reduction, logits, d)
        elif targets is not None:
            checks.fail("targets", f"None with feedback={self.feedback.name!r}", "a tensor")
        state = self._state("weight", logits)
        kept = state.get("key"), state.get("weight")
        stacks = [self._stacks.get(name) for name in self.blocks]
        calls = [Call(i, stacks[i], t) for i, of_block in enumerate(hidden) for t in range(len(of_block))]
        every = [h for of_block in hidden for h in of_block]
        tied: Tensor = Broadcast.apply(self._plan, d, calls, *kept, targets, scale, logits, *every)
        b = self.feedback_weight
        if b is None or not b.requires_grad:
            return tied
        return cast(Tensor, Learn.apply(self._plan, d, calls, b, tied, *(h.detach() for h in every)))

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], tie: _Tie) -> Any:
        # What the model returns, its logits replaced by tie(logits, outputs of each block's calls).
        tape = self._tape
        before = tape.outputs, tape.tie, tape.tied
        tape.outputs = {name: [] for name in self.blocks}
        tape.tie, tape.tied = partial(self._replace, tie), False
        try:
            returned = self.model(*args, **kwargs)
            if self._logits is None:
                return tape.tie(returned)
            late = [name for name, calls in tape.outputs.items() if calls]
            if late or not tape.tied:
                which = f"after {late[0]!r} was" if late else "in this forward"
                raise RuntimeError(f"logits: {self._logits!r} was not called {which}")
            return returned
        finally:
            tape.outputs, tape.tie, tape.tied = before

    def _replace(self, tie: _Tie, returned: Any) -> Any:
        logits = returned if self._output is None else self._output(returned)
        if not isinstance(logits, Tensor):
            wanted = "one tensor, the logits; output= takes a function that picks them, logits= a submodule's name"
            argument = "model: expected one that returns" if self._logits is None else "logits: expected a module of"
            raise TypeError(f"{argument} {wanted}; got {type(logits).__name__}")
        outputs, self._tape.tied = self._tape.outputs or {}, True
        hidden = []
        for name, calls in outputs.items():
            if not calls:
                raise RuntimeError(f"blocks: {name!r} was not called before the logits")
            if any(version is not None and h._version != version for h, version in calls):
                wanted = "outputs that nothing changes in place, as B learns from them (let a block end in what does)"
                checks.fail("blocks", wanted, f"one of {name!r} that was changed after its call")
            hidden.append([h for h, _ in calls])
            outputs[name] = []
        tied, held = tie(logits, hidden), []

        def put(tensor: Tensor) -> Tensor:
            held.append(tensor)
            return tied if tensor is logits else tensor

        returned = each_tensor(returned, put)
        if not any(t is logits for t in held):
            wanted = (
                "a function that picks a tensor from mappings, tuples, lists or dataclasses (or name it by logits=)"
            )
            checks.fail("output", wanted, "one that is not in them")
        if len(held) not in self._looked_at and not torch.compiler.is_compiling():
            if any(reaches(t, logits) for t in held if t is not logits):
                raise ValueError(
                    "output: a loss or something else beside the logits was computed from them inside the model, and "
                    "its gradient would reach no block; name the submodule whose output the logits are by logits="
                )
            self._looked_at |= {len(held)}
        return returned

    def _example(self, example: Any, class_dim: int | None) -> Tensor:
        # Learns what belongs to what, and returns the logits.
        args = example if isinstance(example, tuple) else (example,)
        seen: list[tuple[Tensor, list[list[Tensor]]]] = []

        def tie(logits: Tensor, hidden: list[list[Tensor]]) -> Tensor:
            if self._logits is None and (function := normalised(logits)):
                self._refuse(f"what {function} returns")
            seen.append((logits, hidden))
            return logits

        self._tape.example = True
        try:
            with kept(self.model), torch.enable_grad():
                self.model.eval()
                self._run(args, {}, tie)
        except Exception:
            # A model can take anything, so its own word comes first where there is a tensor.
            if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(args)):
                checks.fail("example", "an input of the model, or a tuple of its arguments", repr(example), TypeError)
            raise
        finally:
            self._tape.example = False
        shapes = [[h.shape for h in calls] for calls in seen[0][1]]
        found = ways(self.blocks, seen[0][0].shape, shapes, class_dim)
        self._stacks = {name: stack for name, (stack, _) in zip(self.blocks, found, strict=True)}
        self._class_dim = -1 if class_dim is None else class_dim
        self._sizes, self._classes = [size for _, size in found], seen[0][0].shape[self._class_dim]
        for logits, hidden in seen:
            self._check(logits, hidden)
            for name, calls in zip(self.blocks, hidden, strict=True):
                if any(same_numbers(h, logits) for h in calls):
                    checks.fail("blocks", "hidden blocks, whose outputs are not the logits", repr(name))
            if self._logits is None and (what := probabilities(logits, self._class_dim)):
                self._refuse(f"numbers that are {what}, by their sums over the classes")
        return seen[0][0].detach()

    @staticmethod
    def _refuse(got: str) -> None:
        checks.fail(
            "model",
            "one that returns logits; name the submodule whose output they are by logits=, or that which ends the "
            "model, to take the error there all the same",
            got,
        )

    def _check(self, logits: Tensor, hidden: list[list[Tensor]]) -> None:
        shape, d = logits.shape, self._class_dim
        if not -len(shape) <= d < len(shape) or shape[d] != self._classes:
            checks.fail("model", f"logits of {self._classes} classes in dimension {d}", f"shape {tuple(shape)}")
        d %= len(shape)
        samples = tuple(shape[:d] + shape[d + 1 :])
        for name, calls, size in zip(self.blocks, hidden, self._sizes, strict=True):
            stack = self._stacks.get(name)
            if stack is not None and shape[stack : stack + 1] != (len(calls),):
                wanted = f"as many calls of {name!r} as dimension {stack} of the logits {tuple(shape)} has"
                checks.fail("blocks", wanted, len(calls))
            for h in calls:
                if numbers(shape, d, h.shape, stack) != size:
                    wanted = f"{name!r} to return {samples} samples of {size} numbers, as the logits have"
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
            return whole(self.feedback_weight.detach())[:, columns]
        if self.feedback_key is None:
            raise RuntimeError(f"block: feedback={self.feedback.name!r} has no B")
        size = (self._classes, part.start + part.size)
        dtypes = [p.dtype for p in self.model.parameters() if p.is_floating_point()]
        dtype = dtypes[-1] if dtypes else self._dtype
        b = ops.feedback_weight(None, None, None, self.feedback_key, plan.entries, plan.scale, size, dtype=dtype)
        return b[:, columns] * part.ratio

    def restore(self) -> torch.nn.Module:
        """The model as it was, its blocks back to back-propagation; this wrapper is not to be used again."""
        for name in (*self.blocks, *([self._logits] if self._logits else [])):
            block = self.model.get_submodule(name)
            block.__class__ = type(block).__bases__[1]
            del block._block_name, block._tape
        return self.model

    def extra_repr(self) -> str:
        """The rule and the blocks."""
        said = "" if self._logits is None else f", logits={self._logits!r}"
        return f"feedback={self.feedback}, blocks={self.blocks}{said}, class_dim={self._class_dim}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickle of version 0.1 is told by the attribute of a layer's.
        super().__setstate__(state if "_held" in state else {"_plans": {}, "_feedback": state["feedback"], **state})

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError("DirectFeedback: use DistributedDataParallel; the threads of DataParallel share its blocks")
