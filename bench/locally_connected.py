"""Locally-connected layers of Bartunov et al. 2018, forward and backward, against plain-torch compositions."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import bioplaus_kernels as bk
from bioplaus_kernels import ops

from .gate import relative_gate
from .registry import Bench, Case, Run, register

# in_channels, out_channels, kernel, stride, input size: the layers of MNIST's, CIFAR-10's and ImageNet's networks.
LAYERS = {
    "MNIST 1": (1, 32, 3, 2, 28),
    "MNIST 2": (32, 64, 3, 2, 14),
    "CIFAR 1": (3, 64, 5, 2, 32),
    "CIFAR 2": (64, 128, 5, 2, 16),
    "CIFAR 3": (128, 256, 3, 1, 8),
    "ImageNet 1": (3, 48, 9, 4, 224),
    "ImageNet 2": (48, 48, 3, 2, 56),
    "ImageNet 3": (48, 96, 5, 1, 28),
    "ImageNet 4": (96, 96, 3, 2, 28),
    "ImageNet 5": (96, 192, 3, 1, 14),
    "ImageNet 6": (192, 192, 3, 2, 14),
    "ImageNet 7": (192, 384, 3, 1, 7),
}


@register("locally_connected")
def cases() -> Iterator[Case]:
    """Every layer at batch 1, 16 and 128; --quick keeps CIFAR 3 at batch 16."""
    for name, layer in LAYERS.items():
        for n in (1, 16, 128):
            for part in ("forward", "backward input", "backward weight", "forward + backward"):
                label = f"{name} N={n} {part}"
                quick = name == "CIFAR 3" and n == 16
                yield Case("locally_connected", label, lambda a=layer, n=n, p=part: build(n, *a, p), quick)


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


def build(n: int, c: int, o: int, kernel: int, stride: int, size: int, part: str) -> Bench:
    """One layer, one batch, one part of the training step."""
    torch.manual_seed(0)
    layer = bk.nn.LocallyConnected2d(c, o, kernel, stride, "same", bias=False, input_size=size)
    w = layer.weight.detach()
    oh, ow = w.shape[:2]
    pairs = bk.functional.pad_pairs("same", (size, size), layer.kernel_size, layer.stride, layer.dilation)
    geometry = (layer.stride, pairs, layer.dilation, 1)
    x, g = torch.randn(n, c, size, size), torch.randn(n, o, oh, ow)
    # torch's compositions get their weights in the layout that suits them.
    taps_first = w.permute(0, 1, 5, 3, 4, 2).reshape(oh * ow, c * kernel * kernel, o).contiguous()

    def ours() -> list[Tensor]:
        results = []
        if part in ("forward", "forward + backward"):
            results.append(ops.lc_forward(x, w, None, *geometry))
        if part in ("backward input", "forward + backward"):
            results.append(
                ops.lc_backward_input(g, None, None, w, None, "stored", 1.0, w.shape, (size, size), *geometry)
            )
        if part in ("backward weight", "forward + backward"):
            results.append(ops.lc_backward_weight(g, x, (kernel, kernel), *geometry))
        return results

    def usf() -> list[Tensor]:
        results = [] if part == "backward input" else [ops.lc_forward(x, w, None, *geometry)]
        results.append(ops.lc_backward_input(g, w, None, None, None, "constant", 0.1, w.shape, (size, size), *geometry))
        if part == "forward + backward":
            results.append(ops.lc_backward_weight(g, x, (kernel, kernel), *geometry))
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

    def gate() -> float:
        y = ours()[0].flatten(1) if part == "forward" else None
        if y is not None:
            exact = unfold_bmm(x.double(), taps_first.double(), kernel, stride, pairs).flatten(1)
            return relative_gate(y, exact, unfold_bmm(x, taps_first, kernel, stride, pairs).flatten(1))
        xd, wd = x.double().requires_grad_(), taps_first.double().requires_grad_()
        exact_grads = torch.autograd.grad(
            unfold_bmm(xd, wd, kernel, stride, pairs), (xd, wd), g.double().reshape(n, o, oh * ow)
        )
        xs, ws = x.clone().requires_grad_(), taps_first.clone().requires_grad_()
        torch_grads = torch.autograd.grad(unfold_bmm(xs, ws, kernel, stride, pairs), (xs, ws), g.reshape(n, o, oh * ow))
        results, errors = ours()[-2:] if part == "forward + backward" else ours(), []
        if part != "backward weight":
            errors.append(relative_gate(results[0], exact_grads[0], torch_grads[0]))
        if part != "backward input":
            dw = results[-1].permute(0, 1, 5, 3, 4, 2).reshape(taps_first.shape)
            errors.append(relative_gate(dw, exact_grads[1], torch_grads[1]))
        return max(errors)

    variants: dict[str, Run] = {
        "unfold + bmm": torchs(unfold_bmm),
        "unfold + einsum": torchs(unfold_einsum),
        "bioplaus, backprop": ours,
    }
    if part in ("backward input", "forward + backward"):
        variants["bioplaus, usf"] = usf
    passes = 3 if part == "forward + backward" else 1
    macs = n * w.numel()
    return Bench(variants, {"bioplaus, backprop": gate}, 2.0 * macs * passes, passes * 4.0 * w.numel())
