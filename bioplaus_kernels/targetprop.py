"""Target propagation: every layer is given a target for its output, made from those above by learned inverses.

Notation of Bartunov et al. 2018 (S1): h_0 = x, h_l = f_l(h_{l-1}), l = 1…L, ĥ_l the target of h_l, and g_l the inverse
of f_l, which maps h_l back to h_{l-1}. Losses are means over the batch and sums over units. An optimizer for the layers
and one for the inverses train them; which one steps when (by epochs in turn, or both on every batch) is the caller's.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._restore import buffers
from .backends.reference import checks
from .nn import locally_connected as lc

Loss = Callable[[Tensor, Tensor], Tensor]
InverseLoss = Literal["preserving", "denoising", "l_drl", "drl"]


class Variant(NamedTuple):
    """One line of the table of variants."""

    # "labels": ĥ_L is the label distribution; "output": ĥ_L = h_L − α ∂L/∂h_L; "hidden": the same one layer below.
    first: Literal["labels", "output", "hidden"]
    difference: bool
    direct: bool
    inverse_loss: InverseLoss | None


VARIANTS = {
    "tp": Variant("labels", False, False, "preserving"),
    "dtp": Variant("hidden", True, False, "preserving"),
    "sdtp": Variant("labels", True, False, "denoising"),
    "ao_sdtp": Variant("labels", True, False, "denoising"),
    "l_drl": Variant("output", True, False, "l_drl"),
    "dtpdrl": Variant("output", True, False, "drl"),
    "ddtp": Variant("output", True, True, "drl"),
    "fw_dtp": Variant("hidden", True, False, None),
}


def softmax(logits: Tensor) -> Tensor:
    """The class distribution o that h_L stands for by default."""
    return logits.softmax(-1)


class TargetProp(torch.nn.Module):
    """A network f_L ∘ … ∘ f_1 and its inverses, trained by target propagation.

        tp = TargetProp(layers, inverses, "dtp")
        h = tp.activations(x)                          # [x, h_1, …, h_L], each cut off from the one before
        tp.inverse_loss(h).backward()                  # gradients of the inverses alone
        tp.forward_loss(h, tp.targets(h, y), y).backward()    # gradients of the layers alone

    | variant | ĥ_L | ĥ_{L-1} | ĥ_l below | inverse loss |
    |---|---|---|---|---|
    | "tp" | labels | g_L(ĥ_L) | g_{l+1}(ĥ_{l+1}) | preserving |
    | "dtp" | | h_{L-1} − α ∂L/∂h_{L-1} | h_l + g_{l+1}(ĥ_{l+1}) − g_{l+1}(h_{l+1}), S1 eq. 2 | preserving |
    | "sdtp" | labels | as below | the same | denoising |
    | "ao_sdtp" | labels, z | as below, g_L(ô, z) − g_L(o, z), S1 eq. 3 | the same | denoising |
    | "l_drl" | h_L − α ∂L/∂h_L | as below | the same (Ernoult et al. 2022) | l_drl |
    | "dtpdrl" | h_L − α ∂L/∂h_L | as below | the same (Meulemans et al. 2020) | drl |
    | "ddtp" | h_L − α ∂L/∂h_L | as below | h_l + Q_l(ĥ_L) − Q_l(h_L) (Meulemans et al. 2020) | drl |
    | "fw_dtp" | | as "dtp" | the same, g fixed and random (Shibuya et al. 2023) | none |

    Where ĥ_L is the label distribution h_L stands for `output` of the logits, else for the logits themselves.

    Inverse losses, ε ~ N(0, σ²) drawn at each call, f a constant, h̃ = h_{l-1} + ε:

    * "preserving": ‖h̃ − g_l(f_l(h̃))‖²
    * "denoising": ‖h_{l-1} − g_l(f_l(h̃))‖²
    * "l_drl": −2 ⟨ε, g_l(f_l(h̃)) − r⟩ + ‖g_l(h_l + η) − r‖², r = g_l(h_l), η ~ N(0, σ²); for linear f = F it
      is least at g = Fᵀ
    * "drl": ‖t_{l-1} − h̃‖² / σ², where t_{l-1} is the target that the inverses, all but g_l as constants, make of
      f_L ∘ … ∘ f_l(h̃) as ĥ_L, layer by layer or by Q_{l-1} at once. For linear f least where these targets are those
      of Gauss and Newton; their damping, the loss's second term, is the inverses' weight decay (Meulemans et al. 2020)

    With "ddtp", "preserving" is ‖h̃ − Q_{l-1}(f_L ∘ … ∘ f_l(h̃))‖², the control DDTP-control of Meulemans et al.

    layers: f_1 … f_L, modules with their nonlinearity; the last one gives logits (N, classes).
    inverses: L entries, entry k maps h_{k+1} (for "ddtp" h_L) to what `layers[k]` takes; entry 0 is None, and where the
        first target is of L − 1 the last one too. None everywhere with mix=1. `learned_inverse` makes one,
        `rhl_inverses` those of DDTP-RHL.
    alpha: step α of the first target. sigma: standard deviation σ of the noise.
    loss: the task loss (logits, y) → mean over the batch.
    reduction: the loss of the first target's gradient, "mean" over the batch as in Lee et al.'s code, or "sum". With
        "sum", g = Jᵀ and α = ½ the hidden layers' gradients are those of back-propagation, with α = 1 twice those: the
        forward loss ‖f_l(h_{l-1}) − ĥ_l‖² has no ½. "mean" makes them N times smaller.
    mix: weight λ of S1's appendix 5.6, g ↦ (1 − λ) g + λ g_bp with g_bp(ĥ_l) − g_bp(h_l) = J_lᵀ (ĥ_l − h_l); 1 is
        back-propagation. For variants with difference targets, layer by layer.
    auxiliary: "ao_sdtp" only, a module h_{L-1} → z (N, any); its parameters are frozen.
    inverse_objective: another inverse loss than the variant's.

    Buffers, batch norm's statistics for one, are what clean activations make them: a layer's move in `activations` and
    `forward`, an inverse's where its own inverse loss calls it, and neither in `targets` nor in noisy passes, which
    normalise by their own batch as training does.
    torch.compile takes a step in one graph; only an α step and mix > 0, which take a gradient inside, break it.
    DistributedDataParallel wraps a module whose forward returns the losses; there reduction="sum" leaves the targets
    what they are on one process, "mean" divides by the samples of the rank alone.
    Raises ValueError or TypeError for an argument that does not fit.
    """

    def __init__(
        self,
        layers: Sequence[torch.nn.Module],
        inverses: Sequence[torch.nn.Module | None],
        variant: str,
        *,
        alpha: float = 0.1,
        sigma: float = 0.1,
        loss: Loss = F.cross_entropy,
        output: Callable[[Tensor], Tensor] = softmax,
        reduction: Literal["mean", "sum"] = "mean",
        mix: float = 0.0,
        auxiliary: torch.nn.Module | None = None,
        inverse_objective: InverseLoss | None = None,
    ) -> None:
        super().__init__()
        checks.one_of("variant", variant, VARIANTS)
        plan = VARIANTS[variant]
        alpha, sigma = checks.not_negative("alpha", alpha), checks.not_negative("sigma", sigma)
        mix = checks.fraction("mix", mix)
        checks.one_of("reduction", reduction, ("mean", "sum"), "'mean' or 'sum'")
        checks.function("loss", loss, "a function of (logits, y)")
        checks.function("output", output, "a function of the logits")
        if auxiliary is not None:
            checks.module("auxiliary", auxiliary)
        if mix and (plan.direct or not plan.difference):
            checks.fail("mix", f"0 with variant={variant!r}", mix)
        if (auxiliary is not None) != (variant == "ao_sdtp"):
            wanted = "a module" if variant == "ao_sdtp" else f"None with variant={variant!r}"
            checks.fail("auxiliary", wanted, "None" if auxiliary is None else type(auxiliary).__name__)
        objective = plan.inverse_loss if inverse_objective is None else inverse_objective
        if mix == 1 or plan.inverse_loss is None:
            objective = None
        allowed: tuple[str, ...] = ("preserving", "drl")
        if objective is None:
            allowed = ()
        elif not plan.direct:
            allowed = ("preserving", "denoising", "l_drl") + ("drl",) * plan.difference
        if inverse_objective is not None:
            wanted = f"{' or '.join(allowed) or None} with variant={variant!r} and mix={mix}"
            checks.one_of("inverse_objective", inverse_objective, allowed, wanted)
        if objective == "drl" and sigma == 0:
            checks.fail("sigma", "a positive number with the loss 'drl'", sigma)

        layers = checks.entries("layers", layers, "modules f_1 … f_L")
        for k, layer in enumerate(layers):
            checks.module(f"layers[{k}]", layer)
        self.layers = torch.nn.ModuleList(layers)
        inverses = checks.entries("inverses", inverses, "modules and None, one for each of layers")
        last = len(self.layers)
        if last < 2:
            checks.fail("layers", "at least 2 modules", last)
        if len(inverses) != last:
            checks.fail("inverses", f"{last} entries, one for each of layers", len(inverses))
        inner = range(1, last - 1 if plan.first == "hidden" else last)
        for k, inverse in enumerate(inverses):
            if inverse is not None:
                checks.instance(f"inverses[{k}]", inverse, torch.nn.Module, "a module or None")
            if (inverse is not None) != (k in inner and mix < 1):
                wanted = "a module" if inverse is None else "None"
                why = f"with variant={variant!r} and mix={mix}"
                checks.fail(f"inverses[{k}]", f"{wanted} {why}", "None" if inverse is None else type(inverse).__name__)
        self.inverses = torch.nn.ModuleList(inverses)
        if objective is None:
            self.inverses.requires_grad_(False)
        self.auxiliary = None if auxiliary is None else auxiliary.requires_grad_(False)
        self.variant, self.alpha, self.sigma, self.mix = variant, alpha, sigma, mix
        self.reduction, self.inverse_objective = reduction, objective
        self.loss, self.output = loss, output
        self._plan, self._inner = plan, inner

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        for layer in self.layers:
            x = layer(x)
        return x

    def activations(self, x: Tensor) -> list[Tensor]:
        """[x, h_1, …, h_{L-1}, logits]; the gradient of each reaches its own layer's parameters and no further."""
        checks.tensor("x", x)
        h = [x.detach()]
        for layer in self.layers:
            h.append(layer(h[-1].detach()))
        return h

    def targets(self, h: Sequence[Tensor], y: Tensor) -> list[Tensor]:
        """[ĥ_1, …, ĥ_{L-1}] for the `activations` h and labels y: classes (N,) or what `loss` takes, shaped as h_L.

        No gradient flows through them. The true loss's own gradient goes through at most the last layer.
        """
        h = self._detached(h)
        checks.tensor("y", y)
        with torch.no_grad(), buffers(self):
            # Here h_L stands for what its inverse sees.
            logits, h[-1] = h[-1], self._top(h[-1], h[-2])
            if self._plan.first == "labels":
                target = self._labels(h[-1], logits, y)
            elif self._plan.first == "output":
                target = h[-1] - self._step(torch.nn.Identity(), h[-1], y)
            else:
                target = h[-2] - self._step(self.layers[-1], h[-2], y)
            if self._plan.direct:
                return [h[k] + self._difference(k, target, h[-1]) for k in self._inner]
            targets = [target] if self._plan.first == "hidden" else []
            for k in reversed(self._inner):
                target = self._target(k, h, target)
                targets.append(target)
        return targets[::-1]

    def forward_loss(self, h: Sequence[Tensor], targets: Sequence[Tensor], y: Tensor) -> Tensor:
        """Σ_{l<L} ‖h_l − ĥ_l‖² + loss(h_L, y): a gradient for every layer's own parameters (S1 1.1)."""
        h = checks.tensors("h", h, len(self.layers) + 1, "activations")
        targets = checks.tensors("targets", targets, len(self.layers) - 1, "tensors, one for each hidden layer")
        checks.tensor("y", y)
        for k, target in enumerate(targets):
            checks.shape(f"targets[{k}]", target, h[k + 1].shape)
        total = self.loss(h[-1], y)
        for activation, target in zip(h[1:-1], targets, strict=True):
            total = total + _squares(activation - target.detach())
        return total

    def inverse_losses(self, h: Sequence[Tensor]) -> list[Tensor]:
        """The inverse loss of each learned inverse, from the lowest up, with fresh noise."""
        if self.inverse_objective is None:
            checks.fail("variant", "one that trains its inverses", repr(self.variant))
        h = self._detached(h)
        # Here h_L stands for what its inverse sees.
        h[-1] = self._top(h[-1], h[-2])
        objective, direct = self.inverse_objective, self._plan.direct
        losses = []
        for k in self._inner:
            noise = torch.randn_like(h[k]) * self.sigma
            noisy = h[k] + noise
            end = self._inner.stop if direct or objective == "drl" else k + 1
            # Only the pass of g_k moves statistics, its own.
            with torch.no_grad(), buffers(*self.layers[k:end], *self.inverses[k + 1 : end], self.auxiliary):
                f = noisy
                for i in range(k, end):
                    below, f = f, self.layers[i](f)
                if end == len(self.layers):
                    f = self._top(f, below)
                if not direct:
                    for i in reversed(range(k + 1, end)):
                        f = h[i] + self._difference(i, f, h[i + 1])
            if objective == "preserving":
                losses.append(_squares(noisy - self.inverses[k](f)))
            elif objective == "denoising":
                losses.append(_squares(h[k] - self.inverses[k](f)))
            elif objective == "drl":
                change = self._difference(k, f, h[-1] if direct else h[k + 1])
                losses.append(_squares(change - noise) / self.sigma**2)
            else:
                clean = h[k + 1]
                shifted = clean + torch.randn_like(clean) * self.sigma
                at_noisy, at_shifted, r = self.inverses[k](torch.cat((f, shifted, clean))).chunk(3)
                inner = (noise * (at_noisy - r)).flatten(1).sum(1).mean()
                losses.append(_squares(at_shifted - r) - 2 * inner)
        return losses

    def inverse_loss(self, h: Sequence[Tensor]) -> Tensor:
        """The sum of `inverse_losses`: a gradient for every inverse's own parameters."""
        return torch.stack(self.inverse_losses(h)).sum()

    def extra_repr(self) -> str:
        """The variant and its numbers."""
        return f"variant={self.variant!r}, alpha={self.alpha}, sigma={self.sigma}, mix={self.mix}"

    def _detached(self, h: Sequence[Tensor]) -> list[Tensor]:
        return [t.detach() for t in checks.tensors("h", h, len(self.layers) + 1, "activations")]

    def _top(self, logits: Tensor, below: Tensor) -> Tensor:
        # h_L as its inverse sees it: o for labels, [o, z] with auxiliary units, the logits for an output target.
        o = self.output(logits) if self._plan.first == "labels" else logits
        return o if self.auxiliary is None else torch.cat((o, self.auxiliary(below)), 1)

    def _labels(self, top: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        # ô, or [ô, z] where z is the tail of h_L.
        checks.rank("h[-1]", logits, 2)
        if not y.is_floating_point() and y.dtype != torch.int64:
            checks.fail("y", "int64 classes, or values", y.dtype, TypeError)
        n, classes = logits.shape
        try:
            label = (y if y.is_floating_point() else F.one_hot(y, classes)).to(top.dtype)
        except RuntimeError:
            if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < classes:
                checks.fail("y", f"classes from 0 to {classes - 1}", f"{int(y.min())} to {int(y.max())}")
            raise
        if label.shape != (n, classes):
            checks.fail("y", f"classes ({n},) or values {(n, classes)}", f"shape {tuple(y.shape)}")
        return torch.cat((label, top[:, classes:]), 1)

    def _step(self, logits_of: torch.nn.Module, h: Tensor, y: Tensor) -> Tensor:
        # α ∂L/∂h
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss(logits_of(leaf), y), leaf)
        return gradient.detach() * (self.alpha * (len(h) if self.reduction == "sum" else 1))

    def _difference(self, k: int, target: Tensor, above: Tensor) -> Tensor:
        # g(target) − g(above), one product over stacked rows.
        at_target, at_h = self.inverses[k](torch.cat((target, above))).chunk(2)
        return at_target - at_h

    def _target(self, k: int, h: list[Tensor], target: Tensor) -> Tensor:
        # ĥ_k from ĥ_{k+1}
        if not self._plan.difference:
            return self.inverses[k](target)
        change = self._difference(k, target, h[k + 1]) if self.mix < 1 else torch.zeros_like(h[k])
        if self.mix > 0:
            with torch.enable_grad():
                leaf = h[k].detach().requires_grad_()
                out = self.layers[k](leaf)
                if k == len(self.layers) - 1:
                    out = self._top(out, leaf)
                (pulled,) = torch.autograd.grad(out, leaf, target - h[k + 1])
            change = torch.lerp(change, pulled.detach(), self.mix)
        return h[k] + change


def learned_inverse(
    layer: torch.nn.Module,
    input_size: Sequence[int] | None = None,
    *,
    activation: torch.nn.Module | None = None,
    extra: int = 0,
) -> torch.nn.Module:
    """g_l(h_l) = σ_l(V_l h_l + c_l) for a layer f_l(h) = σ_l(W_l h + b_l), V_l with the shape and sparsity of W_lᵀ.

    A `Linear` gives a torch.nn.Linear, a `LocallyConnected1d/2d/3d` its transposed layer (S1 5.4), a `Conv1d/2d/3d`
    torch.nn's transposed convolution (Ernoult et al. 2022), newly initialised on the layer's device and in its dtype.
    `layer` is one of these or a Sequential of torch.nn.Flatten, a Linear or one of the others, and an activation
    without parameters, in this order, the first and last as wanted; with Flatten the inverse unflattens.

    input_size: what the layer takes, without the batch (C, H, W); needed with Flatten and with a convolution.
    activation: σ of the inverse in place of the layer's own, for a last layer, which has none.
    extra: auxiliary units of AO-SDTP that a Linear's inverse takes behind its outputs.

    Raises ValueError for another layer, one padded with anything but zeros, and a convolution padded by name.
    """
    checks.module("layer", layer)
    extra = checks.integer("extra", extra, 0)
    if activation is not None:
        checks.instance("activation", activation, torch.nn.Module, "a module or None")
    parts = list(layer) if isinstance(layer, torch.nn.Sequential) else [layer]
    flat = bool(parts) and isinstance(parts[0], torch.nn.Flatten)
    parts = parts[1:] if flat else parts
    convs = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    kinds = (torch.nn.Linear, lc._LocallyConnected, *convs)
    if not parts or not isinstance(parts[0], kinds) or len(parts) > 2 or [p for m in parts[1:] for p in m.parameters()]:
        wanted = "[Flatten,] Linear, LocallyConnected or Conv[, an activation without parameters]"
        checks.fail("layer", wanted, layer)
    main = parts[0]
    shape = _input_size(input_size, main, flat) if flat or isinstance(main, convs) else ()
    if activation is None and len(parts) == 2:
        activation = copy.deepcopy(parts[1])
    like: Any = {"device": main.weight.device, "dtype": main.weight.dtype}
    inverse: torch.nn.Module
    if isinstance(main, torch.nn.Linear):
        inverse = torch.nn.Linear(main.out_features + extra, main.in_features, **like)
    else:
        if extra or flat:
            checks.fail("extra" if extra else "layer", "a Linear behind Flatten, or with auxiliary units", main)
        ends, d = (main.out_channels, main.in_channels), len(main.kernel_size)
        geometry: Any = {n: getattr(main, n) for n in ("kernel_size", "stride", "padding", "dilation", "groups")} | like
        if isinstance(main, convs):
            if isinstance(main.padding, str) or main.padding_mode != "zeros":
                checks.fail("layer", "a convolution padded with zeros, by numbers", main)
            sides = zip(shape[1:], main.kernel_size, main.stride, main.padding, main.dilation, strict=True)
            # What the stride has left unread at the end.
            rest = tuple((n + 2 * p - e * (k - 1) - 1) % s for n, k, s, p, e in sides)
            inverse = getattr(torch.nn, f"ConvTranspose{d}d")(*ends, output_padding=rest, **geometry)
        else:
            if main.padding_mode != "zeros":
                checks.fail("layer", "a locally-connected layer padded with zeros", main)
            transpose = getattr(lc, f"LocallyConnectedTranspose{d}d")
            inverse = transpose(*ends, output_size=main.input_size, **geometry)
    tail = [] if activation is None else [activation]
    if flat:
        tail.append(torch.nn.Unflatten(1, shape))
    return torch.nn.Sequential(inverse, *tail) if tail else inverse


def _input_size(input_size: Any, main: Any, flat: bool) -> tuple[int, ...]:
    # What `main` takes of a sample: (C, H, W) for a convolution, any shape of as many numbers behind Flatten.
    wanted = "the size that Flatten or a convolution takes, without the batch"
    if input_size is None:
        checks.fail("input_size", wanted, None)
    shape = tuple(checks.integer("input_size", n, 1) for n in checks.entries("input_size", input_size, wanted))
    if flat and isinstance(main, torch.nn.Linear) and math.prod(shape) != main.in_features:
        checks.fail("input_size", f"{main.in_features} numbers, as {main} takes", shape)
    if not flat and (len(shape) != len(main.kernel_size) + 1 or shape[0] != main.in_channels):
        checks.fail("input_size", f"{main.in_channels} channels and {len(main.kernel_size)} sizes", shape)
    return shape


def rhl_inverses(
    sizes: Sequence[int | Sequence[int]],
    classes: int,
    hidden: int = 2048,
    *,
    activation: torch.nn.Module | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> list[torch.nn.Module | None]:
    """The inverses of DDTP-RHL (Meulemans et al. 2020), for `TargetProp(layers, rhl_inverses(…), "ddtp")`.

    Q_l(h_L) = σ(V_l tanh(R h_L + r) + c_l) for l = 1 … L − 2 with one random hidden layer R, r that all share and that
    stays as it is drawn, (hidden, classes); for l = L − 1, whose Gauss–Newton target is linear in that of h_L,
    Q_l(h_L) = σ(V_l h_L + c_l). V_l begins as Glorot's normal draw, c_l as zero, R and r as torch.nn.Linear's.

    sizes: of h_1 … h_{L-1} without the batch, each a number or a shape (C, H, W). classes: the size of h_L.
    hidden: of the random layer, 2048 in the paper. activation: σ, a module without parameters, or None for none; the
    paper's configurations have tanh or none.

    Returns L entries for `inverses`, the first None. Raises ValueError or TypeError for a size that is not positive.
    """
    like: Any = checks.factory(device, dtype)
    if activation is not None:
        checks.instance("activation", activation, torch.nn.Module, "a module or None")
    classes, hidden = checks.integer("classes", classes, 1), checks.integer("hidden", hidden, 1)
    shapes = []
    for k, size in enumerate(checks.entries("sizes", sizes, "a size for each hidden layer")):
        ends = [size] if checks.index(size) is not None else checks.entries(f"sizes[{k}]", size, "a number or a shape")
        shapes.append(tuple(checks.integer(f"sizes[{k}]", n, 1) for n in ends))
    if not shapes:
        checks.fail("sizes", "at least one hidden layer", "none")
    random = torch.nn.Sequential(torch.nn.Linear(classes, hidden, **like), torch.nn.Tanh()).requires_grad_(False)
    inverses: list[torch.nn.Module | None] = [None]
    for k, shape in enumerate(shapes):
        last = k == len(shapes) - 1
        trained = torch.nn.Linear(classes if last else hidden, math.prod(shape), **like)
        torch.nn.init.xavier_normal_(trained.weight)
        torch.nn.init.zeros_(trained.bias)
        parts: list[torch.nn.Module] = [trained] if last else [random, trained]
        if activation is not None:
            parts.append(copy.deepcopy(activation))
        if len(shape) > 1:
            parts.append(torch.nn.Unflatten(1, shape))
        inverses.append(torch.nn.Sequential(*parts))
    return inverses


def _squares(difference: Tensor) -> Tensor:
    # Sum over units, mean over the batch.
    return difference.square().flatten(1).sum(1).mean()
