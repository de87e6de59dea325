"""How far a layer's feedback is from its weights, and what is learned from what back-propagation would.

Of a model that `fully_shard` (FSDP2) has sharded, every rank calls, and gets the same: what is measured is whole. Every
measure raises ValueError for a model in FullyShardedDataParallel (FSDP1), and for one on the meta device.
"""

import csv
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.parametrize import cached, is_parametrized

from ._restore import kept, sharded
from .backends.reference import checks
from .direct import DirectFeedback
from .feedback import as_rule, whole
from .nn.base import FeedbackLayer
from .proof import unwrapped
from .targetprop import TargetProp

Row = dict[str, float]
# Numbers a chunk: their float64 copies stay in a cache.
_CHUNK = 1 << 17
_HOOKED = re.compile(r"(.*weight(?:_(?:ih|hh|hr).*)?)_(orig|g|v)")
# A locally-connected layer's bias has dimensions too.
_OTHERS = re.compile(r"(.*\.)?[^.]*(bias|feedback_)[^.]*")


class Comparison(NamedTuple):
    """Of two tensors a, b taken as vectors: angle ∠(a, b) in degrees, ‖b‖/‖a‖, and the share of equal signs.

    The angle is NaN where one of them is zero; the norm ratio where a is.
    """

    angle: float
    norm_ratio: float
    sign_agreement: float


@torch.no_grad()
def compare(a: Tensor, b: Tensor) -> Comparison:
    """Compare two tensors of one shape: arccos(a·b / ‖a‖‖b‖), ‖b‖/‖a‖, mean(sign(a) = sign(b)).

    One pass over both in float64, some rows at a time, so no copy of their size is made. An angle is exact to 1e-6
    degrees, and 0 where a = b. Sharded tensors are gathered. Raises ValueError where the shapes differ, and for a
    tensor on the meta device.
    """
    checks.tensor("a", a)
    checks.shape("b", b, a.shape)
    a, b = whole(a), whole(b)
    if a.is_meta:
        checks.fail("a", "a tensor with content", "one on the meta device")
    if b.device != a.device:
        checks.fail("b", f"a tensor on {a.device}, as a", f"one on {b.device}")
    flat = a.dim() == 0 or (a.is_contiguous() and b.is_contiguous())
    a, b = (t.reshape(-1) if flat else t for t in (a, b))
    rows = max(1, _CHUNK * len(a) // max(a.numel(), 1))
    total = torch.zeros(4, dtype=torch.float64, device=a.device)
    for x, y in zip(a.split(rows), b.split(rows), strict=True):
        x, y = x.double().flatten(), y.double().flatten()
        total += torch.stack((x @ y, x @ x, y @ y, (x.sign() == y.sign()).sum()))
    ab, aa, bb, equal = total.tolist()
    # By their exponents, as the product of both squares may be no number where each is one.
    (fa, i), (fb, j) = math.frexp(aa), math.frexp(bb)
    half = (i + j) // 2 - 1
    cosine = ab / 2.0**half / math.sqrt(fa * fb * 2.0 ** (i + j - 2 * half)) if aa and bb else math.nan
    angle = cosine if math.isnan(cosine) else math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
    return Comparison(angle, math.sqrt(bb) / math.sqrt(aa) if aa else math.nan, equal / max(a.numel(), 1))


def weights(model: torch.nn.Module) -> dict[str, Comparison]:
    """W against the B its next backward would use, for every weight of every layer with a rule, by the weight's name.

    The angle of a normal W to sign(W) is arccos √(2/π) = 37.07°, that of a uniform W 30°, and of any W to an
    independent B about 90°. B of a seeded rule is formed for the comparison, one layer at a time.
    """
    _measurable("model", model)
    # W and B of one draw, where a parametrization is random.
    found = {}
    with kept(model), cached():
        for prefix, layer in model.named_modules():
            if isinstance(layer, FeedbackLayer) and layer.uses_feedback:
                with _gathered(model, layer):
                    for name in layer.weights():
                        compared = compare(layer.weight_of(name), layer.feedback_matrix(name))
                        found[unwrapped(f"{prefix}.{name}").removeprefix(".")] = compared
    return found


def _measurable(argument: str, model: torch.nn.Module) -> None:
    checks.module(argument, model)
    if any(p.is_meta for p in model.parameters()):
        checks.fail(argument, "a model with content", "Parameters on the meta device")
    for module in model.modules():
        if "_fsdp_wrapped_module" in module._modules:
            wanted = "a model that no FullyShardedDataParallel (FSDP1) flattens; shard it by fully_shard (FSDP2)"
            checks.fail(argument, wanted, type(module).__name__)


@contextmanager
def _gathered(model: torch.nn.Module, layer: torch.nn.Module) -> Iterator[None]:
    # What FSDP2 has sharded of a layer whose weight is computed: not every parametrization takes sharded tensors.
    owners = [m for m in sharded(model) if layer in m.modules()] if is_parametrized(layer) else []
    try:
        for owner in owners:
            owner.unshard()
        yield
    finally:
        for owner in owners:
            owner.reshard()


@contextmanager
def backprop(model: torch.nn.Module) -> Iterator[None]:
    """In the block every feedback layer has B = W, and every `DirectFeedback` is the model it holds.

    What counts is where the forward is called. What torch.compile compiled is compiled once more, for such calls.
    A rule given to a call of `functional` stays. Where FSDP2 was told to gather no weight for the backward, it does for
    backwards in the block.
    """
    checks.module("model", model)
    rules = [(m, m._feedback) for m in model.modules() if isinstance(m, FeedbackLayer)]
    direct = [(m, m._bypassed) for m in model.modules() if isinstance(m, DirectFeedback)]
    groups = {group: group.unshard_in_backward for m in model.modules() for group in _groups(m)}
    try:
        for group in groups:
            group.unshard_in_backward = True
        for layer, _ in rules:
            layer._feedback = as_rule(None)
        for wrapper, _ in direct:
            wrapper._bypassed = True
        yield
    finally:
        for layer, rule in rules:
            layer._feedback = rule
        for wrapper, bypassed in direct:
            wrapper._bypassed = bypassed
        for group, gathers in groups.items():
            group.unshard_in_backward = gathers


def _groups(module: torch.nn.Module) -> list[Any]:
    # What FSDP2 gathers at once; torch has no way to ask what it was told.
    if not hasattr(module, "set_unshard_in_backward"):
        return []
    state = cast(Any, module)._get_fsdp_state()
    found = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in found if group is not None]


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trained Parameters of two dimensions or more, biases and feedback apart, by name in the model's order.

    Of a weight that is computed (torch.nn.utils.parametrize, pruning) its original; not where that is several tensors.
    """
    checks.module("model", model)
    return {name: parts[0] for name, parts in _trained(model).items() if len(parts) == 1}


def _trained(model: torch.nn.Module) -> dict[str, list[torch.nn.Parameter]]:
    # By a weight's name, which no wrapper changes, what is trained of it: the Parameter, or what it is computed from.
    sharded(model)
    found: dict[str, list[torch.nn.Parameter]] = {}
    inside: set[torch.nn.Module] = set()
    seen: set[torch.nn.Parameter] = set()

    def add(name: str, parts: Iterable[torch.nn.Parameter]) -> None:
        new = [p for p in parts if p.requires_grad and p not in seen]
        if new and not _OTHERS.fullmatch(name):
            found[name] = new
            seen.update(new)

    for prefix, module in model.named_modules():
        if module in inside:
            continue
        prefix = unwrapped(f"{prefix}.") if prefix else ""
        own: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # Of pruning and the older spectral_norm and weight_norm.
                hooked = _HOOKED.fullmatch(name)
                own.setdefault(hooked[1] if hooked and hasattr(module, hooked[1]) else name, []).append(parameter)
        for name, parts in own.items():
            if any(p.ndim > 1 for p in parts):
                add(prefix + name, parts)
        if is_parametrized(module):
            computed = cast(torch.nn.ModuleDict, module.parametrizations)
            inside.update(computed.modules())
            with torch.no_grad(), kept(module), _gathered(model, module):
                shapes = {name: getattr(module, name).shape for name in computed}
            for name, shape in shapes.items():
                if len(shape) > 1:
                    add(prefix + name, computed[name].parameters())
    return found


def updates(model: torch.nn.Module, loss: Callable[[], Tensor]) -> dict[str, Comparison]:
    """The gradient of every trained weight against that of back-propagation: its angle, ‖g_BP‖/‖g‖, equal signs.

    `loss` computes the model's loss; it is called twice, with the same random state. The model is not copied; its
    buffers, training modes, `.grad` and torch's random state are as before afterwards, also after an error. Buffers are
    constants: no gradient goes back to earlier calls. A weight that gets no gradient counts as zero.

    What is compared is what training changes: where a weight is computed (weight_norm, orthogonal, pruning), the
    gradients of all Parameters that it is computed from, as one vector under the weight's name. torch.compile's and
    checkpointing's wrappers are not in the names, "module." of DistributedDataParallel is.

    Of an FSDP2 model they are the gradients that training has, means over the ranks, taken by `backward`: whatever else
    the loss depends on gets a `.grad`. Not between the backwards of one step without gradient synchronisation.
    """
    _measurable("model", model)
    parameters = _trained(model)
    checks.function("loss", loss, "a function that computes the model's loss")
    if not parameters:
        checks.fail("model", "a model with weights that require a gradient", "none")

    def gradients() -> dict[str, Tensor]:
        with kept(model), torch.enable_grad():
            value = loss()
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.dim() else repr(value)
                checks.fail("loss", "a function that returns one number with a gradient", got, TypeError)
            return _gradients(value, parameters, model)

    ours = gradients()
    with backprop(model):
        exact = gradients()
    return {name: compare(g, exact[name]) for name, g in ours.items()}


def _gradients(
    loss: Tensor, parameters: dict[str, list[torch.nn.Parameter]], model: torch.nn.Module
) -> dict[str, Tensor]:
    every = [p for parts in parameters.values() for p in parts]
    if sharded(model):
        # The sharded Parameters are in no graph: FSDP2 gives them their gradients in backward.
        loss.backward()
        found = [p.grad for p in every]
    else:
        found = list(torch.autograd.grad(loss, every, allow_unused=True))
    if not any(g is not None for g in found):
        checks.fail("loss", "a loss of the model's weights", "one that depends on none of them")
    left = iter([torch.zeros_like(p) if g is None else g for p, g in zip(every, found, strict=True)])
    return {
        name: next(left) if len(parts) == 1 else torch.cat([whole(next(left)).flatten() for _ in parts])
        for name, parts in parameters.items()
    }


@contextmanager
def _evaluated(*models: torch.nn.Module) -> Iterator[None]:
    with kept(*models):
        for model in models:
            model.eval()
        yield


def gauss_newton_targets(tp: TargetProp, h: Sequence[Tensor], y: Tensor, damping: float = 0.0) -> list[Tensor]:
    """[ĥ_1, …, ĥ_{L-1}] by Gauss and Newton, ĥ_l = h_l − α J_lᵀ (J_l J_lᵀ + λ I)⁻¹ ∂L/∂h_L (Meulemans et al. 2020).

    J_l = ∂h_L/∂h_l of each sample, h_L the logits; α and `reduction` are those of `tp`. damping: λ ≥ 0; 0 takes the
    pseudo-inverse J_l⁺, and math.inf the limit of λ (h_l − ĥ_l), h_l − α J_lᵀ ∂L/∂h_L, which is back-propagation's.

    h, y: as `TargetProp.targets` takes them. In float64, with N · classes · n_l numbers for J_l. The Jacobians are
    exact whatever rules the layers have, and taken in eval mode, so that no sample sees another. Raises ValueError or
    TypeError for a damping that is no number of at least 0, and for h of another length.
    """
    checks.instance("tp", tp, TargetProp, "a TargetProp")
    _measurable("tp", tp)
    damping = checks.number("damping", damping, "a number of at least 0", lambda v: v >= 0)
    h = checks.tensors("h", h, len(tp.layers) + 1, "activations")
    checks.tensor("y", y)
    hidden = [h[1].detach().requires_grad_()]
    with torch.enable_grad(), _evaluated(tp), backprop(tp):
        for layer in tp.layers[1:-1]:
            hidden.append(layer(hidden[-1]))
        jacobians = _jacobians(tp.layers[-1](hidden[-1]), hidden)
    error = tp._step(torch.nn.Identity(), h[-1], y).double().unsqueeze(2)
    targets = []
    for activation, j in zip(h[1:-1], jacobians, strict=True):
        if damping == 0:
            change = torch.linalg.pinv(j) @ error
        elif damping == math.inf:
            change = j.mT @ error
        else:
            change = j.mT @ torch.linalg.solve(j @ j.mT + damping * torch.eye(j.shape[1]).to(j), error)
        targets.append(activation.detach() - change.reshape(activation.shape).to(activation.dtype))
    return targets


def gauss_newton(tp: TargetProp, x: Tensor, y: Tensor, damping: float = 0.0) -> dict[str, Comparison]:
    """The gradient of every trained hidden weight against that of `gauss_newton_targets`, by its name in `tp`.

    The angle to Gauss–Newton targets of Meulemans et al. 2020; with damping=math.inf the angle to back-propagation.
    Both gradients are those of the loss ‖h_l − ĥ_l‖² in eval mode; no `.grad` is changed. To compare the targets
    themselves, `compare(h_l − ĥ_l, h_l − theirs)`.
    """
    checks.instance("tp", tp, TargetProp, "a TargetProp")
    _measurable("tp", tp)
    parameters = {f"layers.{name}": parts for name, parts in _trained(tp.layers[:-1]).items()}
    if not parameters:
        checks.fail("tp", "hidden layers with weights that require a gradient", "none")
    with torch.enable_grad(), _evaluated(tp):
        h = tp.activations(x)
        both = tp.targets(h, y), gauss_newton_targets(tp, h, y, damping)

    def gradients(targets: list[Tensor]) -> dict[str, Tensor]:
        # FSDP2 goes through a graph once.
        with torch.enable_grad(), _evaluated(tp):
            return _gradients(tp.forward_loss(tp.activations(x), targets, y), parameters, tp)

    ours, exact = map(gradients, both)
    return {name: compare(g, exact[name]) for name, g in ours.items()}


class Spectrum(NamedTuple):
    """Of J_f J_g: the share of eigenvalues with a positive real part, and the trace; means over the samples."""

    positive: float
    trace: float


def jacobian_spectrum(layer: torch.nn.Module, inverse: torch.nn.Module, h: Tensor) -> Spectrum:
    """Eigenvalues of J_f J_g for f = `layer` at h and its inverse g at f(h) (Shibuya et al. 2023).

    Positive eigenvalues are the strict condition, a positive trace the weak one, for a change of the target of f(h)
    that g takes down to move f(h) the same way.

    h: (N, …). J_f (n_l, n_{l-1}) of each sample takes n_l gradients and N · n_l · n_{l-1} numbers in float64: a few
    samples are enough. Of n_l > n_{l-1} eigenvalues the surplus are zero and not positive; nor is what rounding leaves
    of a zero, up to n ε ‖J_f‖₂ ‖J_g‖₂, n the smaller size and ε that of the dtype (in half types ε alone, as n ε would
    be everything). Taken in eval mode.
    Raises ValueError where g does not map f's output to the size of h.
    """
    _are_modules(layer, inverse)
    checks.tensor("h", h)
    with torch.enable_grad(), _evaluated(layer, inverse), backprop(layer), backprop(inverse):
        below = h.detach().requires_grad_()
        out = layer(below)
        (jf,) = _jacobians(out, [below])
        above = out.detach().requires_grad_()
        back = inverse(above)
        checks.shape("inverse", back, h.shape)
        (jg,) = _jacobians(back, [above])
    # The smaller of the two products has all the eigenvalues that are not zero.
    smaller = jf @ jg if jf.shape[1] <= jf.shape[2] else jg @ jf
    eps = max(torch.finfo(t.dtype).eps for t in (h, out, back))
    noise = eps * (smaller.shape[1] if eps < 1e-6 else 1)
    for j in (jf, jg):
        noise = noise * torch.linalg.svdvals(j)[:, :1]
    positive = (torch.linalg.eigvals(smaller).real > noise).double().sum(1) / max(jf.shape[1], 1)
    return Spectrum(positive.mean().item(), smaller.diagonal(dim1=1, dim2=2).sum(1).mean().item())


def _are_modules(layer: torch.nn.Module, inverse: torch.nn.Module) -> None:
    _measurable("layer", layer)
    _measurable("inverse", inverse)


def _jacobians(out: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    # (N, numbers of out, numbers of the input) for each of the inputs.
    out = out.flatten(1)
    rows = [torch.autograd.grad(out[:, j].sum(), inputs, retain_graph=True) for j in range(out.shape[1])]
    return [torch.stack(row, 1).flatten(2).double() for row in zip(*rows, strict=True)]


@torch.no_grad()
def inverse_loss(layer: torch.nn.Module, inverse: torch.nn.Module, h: Tensor) -> float:
    """‖h − g(f(h))‖², summed over units and averaged over the batch, for f = `layer` and its learned inverse g.

    The inverse loss of Bartunov et al. 2018 without noise: how well g undoes f at the activations h.
    """
    _are_modules(layer, inverse)
    checks.tensor("h", h)
    with kept(layer, inverse):
        back = inverse(layer(h))
    checks.shape("inverse", back, h.shape)
    return (back - h).square_().sum().item() / max(len(h), 1)


def row(model: torch.nn.Module, loss: Callable[[], Tensor] | None = None) -> Row:
    """All measures as columns: `angle_weight/<layer>`, `norm_ratio/<layer>`, `sign_agreement/<layer>` of `weights`.

    With `loss` also `angle_grad/<layer>` of `updates`. <layer> is the weight's name without ".weight".
    """
    found: Row = {}
    for name, c in weights(model).items():
        layer = name.removesuffix(".weight")
        found |= {f"angle_weight/{layer}": c.angle, f"norm_ratio/{layer}": c.norm_ratio}
        found[f"sign_agreement/{layer}"] = c.sign_agreement
    if loss is not None:
        found |= {f"angle_grad/{n.removesuffix('.weight')}": c.angle for n, c in updates(model, loss).items()}
    return found


class Monitor:
    """Calls back, or writes a CSV line, every `every` steps.

        monitor = Monitor(model, every=100, to="angles.csv", loss=lambda: F.cross_entropy(model(x), y))
        for …:
            optimizer.step()
            monitor.step()

    to: a function of the row, or a path, whose file is begun with a header or, where it has that very header, gone on
        with; with several ranks, a path on one of them. measure: what makes a row; by default `row(model, loss)`.
        steps: how many steps there were before.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        every: int,
        to: Callable[[Row], object] | str | os.PathLike[str],
        *,
        loss: Callable[[], Tensor] | None = None,
        measure: Callable[[], Row] | None = None,
        steps: int = 0,
    ) -> None:
        checks.module("model", model)
        every, steps = checks.integer("every", every, 1), checks.integer("steps", steps, 0)
        if not callable(to) and not isinstance(to, str | os.PathLike):
            checks.fail("to", "a function or a path", type(to).__name__, TypeError)
        for name, function in (("loss", loss), ("measure", measure)):
            if function is not None:
                checks.function(name, function, "a function or None")
        if loss is not None and measure is not None:
            checks.fail("loss", "None where measure is given", "both")
        self.every, self.steps = every, steps
        self._measure = measure or (lambda: row(model, loss))
        self._write = to if callable(to) else _Csv(Path(to))

    def step(self) -> Row | None:
        """Count one step; the row, with its `step`, where it is one to measure."""
        self.steps += 1
        if self.steps % self.every:
            return None
        found = {"step": self.steps, **self._measure()}
        self._write(found)
        return found


class _Csv:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, row: Row) -> None:
        with self.path.open("a+", newline="") as file:
            file.seek(0)
            header = next(csv.reader(file), None)
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if header is None:
                writer.writeheader()
            elif header != list(row):
                checks.fail("to", f"a file with the columns {', '.join(row)}", f"{self.path} with {', '.join(header)}")
            writer.writerow(row)
