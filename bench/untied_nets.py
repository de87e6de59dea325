"""Locally-connected layers as people have them: All-TNN's, DeepFace's, and genomic ones of one dimension."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

import bioplaus_kernels as bk

from .device import Device
from .gate import relative_gate
from .locally_connected import PARTS, Layer, build
from .registry import Bench, Case, Run, Work, register

LAYERS = {
    "All-TNN 1": Layer(3, 64, 7, 3, 150, "valid"),
    "All-TNN 2": Layer(64, 81, 3, 1, 24, "valid"),
    "All-TNN 3": Layer(81, 81, 3, 1, 22, "valid"),
    "All-TNN 4": Layer(81, 256, 3, 1, 10, "valid"),
    "All-TNN 5": Layer(256, 256, 3, 1, 8, "valid"),
    "All-TNN 6": Layer(256, 2500, 3, 1, 3, "valid"),
    "DeepFace L4": Layer(16, 16, 9, 1, 63, "valid"),
    "DeepFace L5": Layer(16, 16, 7, 2, 55, "valid"),
    "DeepFace L6": Layer(16, 16, 5, 1, 25, "valid"),
}
# Markers, out channels, kernel = stride.
GENOMIC = ((1_000_000, 1, 10), (1_000_000, 4, 10), (1_000_000, 1, 1), (10_000, 1, 10))


@register("untied_nets")
def cases() -> Iterator[Case]:
    """Every layer at batch 16, genomic ones at 1, 16 and 64 too; --quick keeps DeepFace L6 and 10,000 markers."""
    for name, layer in LAYERS.items():
        for part in PARTS:
            made = functools.partial(build, n=16, layer=layer, part=part)
            yield Case("untied_nets", f"{name} N=16 {part}", made, quick=name == "DeepFace L6")
    for markers, out, kernel in GENOMIC:
        for n in (1, 16, 64):
            label = f"genomic {markers:,} markers, {out} out, kernel {kernel}, N={n} forward + backward"
            made = functools.partial(genomic, n=n, markers=markers, out=out, kernel=kernel)
            yield Case("untied_nets", label, made, quick=markers == 10_000 and n == 16)


def _views(x: Tensor, w: Tensor) -> Tensor:
    # What one writes in torch: patches are a view.
    return torch.einsum("npk,pok->nop", x.squeeze(1).unflatten(1, (w.shape[0], w.shape[2])), w.squeeze(3))


def genomic(device: Device, n: int, markers: int, out: int, kernel: int) -> Bench:
    """A step of a layer of one input channel whose patches do not overlap."""
    torch.manual_seed(0)
    x = torch.randn(n, 1, markers)
    layers = {
        rule: bk.nn.LocallyConnected1d(1, out, kernel, kernel, input_size=markers, bias=False, feedback=rule)
        for rule in (None, "usf")
    }
    weight = layers[None].weight.detach()
    g = torch.randn(n, out, weight.shape[0])

    def torchs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        leaves = (x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_())
        y = _views(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, g.to(dtype))

    def ours(rule: str | None, backend: str | None = None) -> tuple[Tensor, ...]:
        with bk.backends.use(backend):
            leaves = (x.detach().requires_grad_(), layers[rule].weight)
            y = layers[rule](leaves[0])
            return y.detach(), *torch.autograd.grad(y, leaves, g)

    variants: dict[str, Run] = {"view + einsum": torchs}
    variants |= {f"bioplaus, {rule or 'backprop'}": functools.partial(ours, rule) for rule in layers}
    general = str(device.device.type)
    if not bk.backends.unavailable(general):
        variants["bioplaus, backprop, general kernels"] = functools.partial(ours, None, general)

    def gate(variant: Run) -> float:
        exact, found = torchs(torch.float64), variant()
        return max(relative_gate(*three) for three in zip(found, exact, torchs(), strict=True))

    gates = {name: functools.partial(gate, run) for name, run in variants.items() if "backprop" in name}
    flops = 2.0 * n * weight.numel()
    work = (Work(flops, read=weight.nbytes), Work(flops, read=weight.nbytes), Work(flops, written=weight.nbytes))
    sizes = {"inputs": weight.nbytes + x.nbytes + g.nbytes, "outputs": weight.nbytes + x.nbytes + g.nbytes}
    return Bench(variants, gates, work, **sizes)
