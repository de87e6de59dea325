"""Locally-connected layers of Bartunov et al. 2018, forward and backward, against plain-torch compositions."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import bioplaus_kernels as bk
from bioplaus_kernels import ops

from .device import Device, ways
from .gate import relative_gate
from .registry import Bench, Case, Run, Work, register


class Layer(NamedTuple):
    """A square layer of two dimensions."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    size: int
    padding: str = "same"


# The layers of MNIST's, CIFAR-10's and ImageNet's networks.
LAYERS = {
    "MNIST 1": Layer(1, 32, 3, 2, 28),
    "MNIST 2": Layer(32, 64, 3, 2, 14),
    "CIFAR 1": Layer(3, 64, 5, 2, 32),
    "CIFAR 2": Layer(64, 128, 5, 2, 16),
    "CIFAR 3": Layer(128, 256, 3, 1, 8),
    "ImageNet 1": Layer(3, 48, 9, 4, 224),
    "ImageNet 2": Layer(48, 48, 3, 2, 56),
    "ImageNet 3": Layer(48, 96, 5, 1, 28),
    "ImageNet 4": Layer(96, 96, 3, 2, 28),
    "ImageNet 5": Layer(96, 192, 3, 1, 14),
    "ImageNet 6": Layer(192, 192, 3, 2, 14),
    "ImageNet 7": Layer(192, 384, 3, 1, 7),
}


PARTS = ("forward", "backward input", "backward weight", "forward + backward")


@register("locally_connected")
def cases() -> Iterator[Case]:
    """Every layer at batch 1, 16 and 128, the whole step in bfloat16 too; --quick keeps CIFAR 3 at batch 16.

    On a GPU the weight gradient alone in bfloat16 as well.
    """
    for name, layer in LAYERS.items():
        for n in (1, 16, 128):
            for part in PARTS:
                label = f"{name} N={n} {part}"
                quick = name == "CIFAR 3" and n == 16
                build_part = functools.partial(build, n=n, layer=layer, part=part)
                yield Case("locally_connected", label, build_part, quick)
                if part == "backward weight":
                    half = functools.partial(build_part, dtype=torch.bfloat16)
                    yield Case("locally_connected", f"{label} bfloat16", half, gpu=True)
            half = functools.partial(build_part, dtype=torch.bfloat16)
            yield Case("locally_connected", f"{label} bfloat16", half, quick)
    yield Case("locally_connected", "building the ImageNet network's layers", construction)


def _unfold(x: Tensor, kernel: int, stride: int, pairs: Sequence[int]) -> Tensor:
    # (N, C * k * k, positions), asymmetric padding written out
    x = F.pad(x, (pairs[2], pairs[3], pairs[0], pairs[1]))
    return F.unfold(x, kernel, stride=stride)


def unfold_bmm(x: Tensor, w: Tensor, kernel: int, stride: int, pairs: Sequence[int]) -> Tensor:
    """w (positions, C * k * k, O); returns (N, O, positions)."""
    return torch.bmm(_unfold(x, kernel, stride, pairs).permute(2, 0, 1), w).permute(1, 2, 0)


def unfold_einsum(x: Tensor, w: Tensor, kernel: int, stride: int, pairs: Sequence[int]) -> Tensor:
    """The same by einsum."""
    return torch.einsum("nkp,pko->nop", _unfold(x, kernel, stride, pairs), w)


def _taps_first(w: Tensor) -> Tensor:
    # torch's compositions get their weights in the layout that suits them.
    positions, o, columns = w.shape[:2].numel(), w.shape[2], w.shape[3:].numel()
    return w.permute(0, 1, 5, 3, 4, 2).reshape(positions, columns, o).contiguous()


def operands(n: int, shape: Layer, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Any, Any]:
    """Input, weight, output gradient, padding and geometry of one layer and batch."""
    torch.manual_seed(0)
    c, o, kernel, stride, size, padding = shape
    layer = bk.nn.LocallyConnected2d(c, o, kernel, stride, padding, bias=False, input_size=size)
    w = layer.weight.detach()
    pairs = bk.functional.pad_pairs(padding, (size, size), layer.kernel_size, layer.stride, layer.dilation)
    tensors = torch.randn(n, c, size, size), w, torch.randn(n, o, *w.shape[:2])
    return (
        *(t.to(dtype) for t in tensors),
        *(pairs, (layer.stride, pairs, layer.dilation, 1)),
    )


def build(device: Device, n: int, layer: Layer, part: str, dtype: torch.dtype = torch.float32) -> Bench:
    """One layer, one batch, one part of the training step, by every way there is."""
    _, o, kernel, stride, size, _ = layer
    x, w, g, pairs, geometry = operands(n, layer, dtype)
    oh, ow = w.shape[:2]
    taps_first = _taps_first(w)

    def ours(backend: Any) -> list[Tensor]:
        results = []
        if part in ("forward", "forward + backward"):
            results.append(backend.lc_forward(x, w, None, *geometry))
        if part in ("backward input", "forward + backward"):
            results.append(
                backend.lc_backward_input(g, None, None, w, None, "stored", 1.0, w.shape, (size, size), *geometry)
            )
        if part in ("backward weight", "forward + backward"):
            results.append(backend.lc_backward_weight(g, x, (kernel, kernel), *geometry))
        return results

    def usf(backend: Any) -> list[Tensor]:
        results = [] if part == "backward input" else [backend.lc_forward(x, w, None, *geometry)]
        results.append(
            backend.lc_backward_input(g, w, None, None, None, "constant", 0.1, w.shape, (size, size), *geometry)
        )
        if part == "forward + backward":
            results.append(backend.lc_backward_weight(g, x, (kernel, kernel), *geometry))
        return results

    def torchs(composition: object) -> Run:
        inputs = (x.clone().requires_grad_(part != "forward"), taps_first.clone().requires_grad_(part != "forward"))
        grad = g.reshape(n, o, oh * ow)
        if part == "forward":
            return lambda: composition(*inputs, kernel, stride, pairs)
        wanted = {"backward input": inputs[:1], "backward weight": inputs[1:]}.get(part, inputs)
        if part == "forward + backward":
            return lambda: torch.autograd.grad(composition(*inputs, kernel, stride, pairs), wanted, grad)
        y = composition(*inputs, kernel, stride, pairs)
        return lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)

    variants: dict[str, Run] = {
        "unfold + bmm": torchs(unfold_bmm),
        "unfold + einsum": torchs(unfold_einsum),
    }
    gate = {}
    for way, backend in ways(device).items():
        found = functools.partial(errors, device, way, n, layer, dtype)
        variants["bioplaus, backprop" + way] = functools.partial(ours, backend)
        gate["bioplaus, backprop" + way] = lambda found=found: max(
            e for p, e in found().items() if p in part or " + " in part
        )
        if part in ("backward input", "forward + backward"):
            variants["bioplaus, usf" + way] = functools.partial(usf, backend)
            gate["bioplaus, usf" + way] = lambda found=found: found()["usf"]
    flops = 2.0 * n * w.numel()
    passes = {
        "forward": (Work(flops, read=w.nbytes),),
        "backward input": (Work(flops, read=w.nbytes),),
        "backward weight": (Work(flops, written=w.nbytes),),
    }
    results = sum(t.nbytes for t in ours(ops))
    return Bench(
        variants,
        gate,
        passes.get(part) or tuple(work for pair in passes.values() for work in pair),
        inputs=w.nbytes
        + (x.nbytes if part in ("forward", "backward weight") else 0)
        + (g.nbytes if part != "forward" else 0),
        outputs=results,
        unit=str(dtype).removeprefix("torch."),
    )


@functools.lru_cache(maxsize=6)
def errors(device: Device, way: str, n: int, layer: Layer, dtype: torch.dtype) -> dict[str, float]:
    """Error over bound of each product and of usf's input gradient, once for all cases of a layer and batch."""
    backend, (_, o, kernel, stride, size, _) = ways(device)[way], layer
    x, w, g, pairs, geometry = operands(n, layer, dtype)
    oh, ow = w.shape[:2]
    grad, found = g.reshape(n, o, oh * ow), {}
    for name, b in (("usf", torch.sign(w) * 0.1), ("backward input", w)):
        taps = _taps_first(b)
        results = []
        for precision in (torch.float64, dtype):
            xs, ws = (t.to(precision).detach().requires_grad_() for t in (x, taps))
            y = unfold_bmm(xs, ws, kernel, stride, pairs)
            results.append((y.detach(), *torch.autograd.grad(y, (xs, ws), grad.to(precision))))
        exact, torchs = results
        feedback = (w, None, None, None, "constant", 0.1) if name == "usf" else (None, None, w, None, "stored", 1.0)
        ours = backend.lc_backward_input(g, *feedback, w.shape, (size, size), *geometry)
        found[name] = relative_gate(ours, exact[1], torchs[1])
    y = backend.lc_forward(x, w, None, *geometry).flatten(2)
    found["forward"] = relative_gate(y, exact[0], torchs[0])
    dw = _taps_first(backend.lc_backward_weight(g, x, (kernel, kernel), *geometry))
    found["backward weight"] = relative_gate(dw, exact[2], torchs[2])
    return found


def construction(device: Device) -> Bench:
    """torch.empty and torch's own initialisation of as many weights, against the layers."""
    layers = [LAYERS[f"ImageNet {i}"] for i in range(1, 8)]

    def layer(c: int, o: int, kernel: int, stride: int, size: int, padding: str) -> torch.nn.Module:
        return bk.nn.LocallyConnected2d(c, o, kernel, stride, padding, input_size=size, device=device.device)

    shapes = [(p.shape, layer_[0] * layer_[2] ** 2) for layer_ in layers for p in layer(*layer_).parameters()]

    def plain() -> list[Tensor]:
        return [torch.empty(shape, device=device.device).uniform_(-(fan**-0.5), fan**-0.5) for shape, fan in shapes]

    return Bench({"torch.empty and uniform_": plain, "LocallyConnected2d": lambda: [layer(*a) for a in layers]})
