"""Weight gradients of convolutions that sum few pixels: the vendor's, and a layer's of ours."""

from collections.abc import Iterator

import torch
from torch import Tensor

import bioplaus_kernels as bk

from .device import Device
from .gate import relative_gate
from .registry import Bench, Case, Run, Work, register

# in_channels, out_channels, size, kernel, stride: of ResNet-18's last stages at 64x64, and its last at 32x32. The first
# has as many pixels as channels, and is the vendor's.
LAYERS = ((256, 256, 4, 3, 1), (256, 512, 4, 1, 2), (256, 512, 4, 3, 2), (512, 512, 2, 3, 1), (512, 512, 1, 3, 1))


@register("weight_gradient")
def cases() -> Iterator[Case]:
    """Batch 16, in both memory formats; --quick keeps one."""
    for last in (True, False):
        for c, o, size, kernel, stride in LAYERS:
            strided = f", stride {stride}" if stride > 1 else ""
            label = f"{kernel}x{kernel} {c} to {o}, {size}x{size}{strided}, N=16{'' if last else ', contiguous'}"
            yield Case(
                "weight_gradient",
                label,
                lambda device, a=(c, o, size, kernel, stride, last): build(device, 16, *a),
                quick=size == 1 and last,
            )


def build(device: Device, n: int, c: int, o: int, size: int, kernel: int, stride: int, last: bool) -> Bench:
    """The weight gradient alone, of the same layer by back-propagation and by a rule."""
    torch.manual_seed(0)
    form = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(n, c, size, size).contiguous(memory_format=form).requires_grad_()
    g = torch.randn(n, o, *[(size - 1) // stride + 1] * 2).contiguous(memory_format=form)

    def gradient(rule: str | None) -> Run:
        layer = bk.nn.Conv2d(c, o, kernel, stride, kernel // 2, bias=False, feedback=rule).to(memory_format=form)
        y = layer(x)
        return lambda: torch.autograd.grad(y, layer.weight, g, retain_graph=True)[0]

    variants = {"backprop": gradient(None), "bioplaus, any rule": gradient("usf")}

    def error() -> float:
        shape, padding = (o, c, kernel, kernel), kernel // 2
        exact = torch.nn.grad.conv2d_weight(x.double(), shape, g.double(), stride, padding)
        found: list[Tensor] = [run().flatten(1) for run in variants.values()]
        return relative_gate(found[1], exact.flatten(1), found[0])

    work = Work(2.0 * g.numel() * c * kernel**2, read=x.nbytes + g.nbytes, written=4.0 * o * c * kernel**2)
    return Bench(variants, {"bioplaus, any rule": error}, (work,))
