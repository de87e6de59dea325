"""Input gradients of 1x1 convolutions, channels-last: the vendor's with W, with B formed for it, and ours."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import bioplaus_kernels as bk
from bioplaus_kernels import ops

from .device import Device, with_tf32
from .gate import relative_gate
from .registry import Bench, Case, Run, Work, register

# in_channels, out_channels, size: the 1x1 convolutions of ResNet-50's blocks, and small ones.
LAYERS = (
    (64, 256, 56),
    (256, 64, 56),
    (128, 512, 28),
    (512, 128, 28),
    (256, 1024, 14),
    (1024, 256, 14),
    (512, 2048, 7),
    (2048, 512, 7),
    (128, 256, 8),
    (512, 512, 2),
)


@register("convolution")
def cases() -> Iterator[Case]:
    """Batch 16; --quick keeps a small one."""
    for c, o, size in LAYERS:
        label = f"1x1 {c} to {o}, {size}x{size}, N=16"
        yield Case("convolution", label, lambda device, a=(c, o, size): build(device, 16, *a), quick=size == 2)


def build(device: Device, n: int, c: int, o: int, size: int) -> Bench:
    """The input gradient alone; on a GPU with TF32 too."""
    torch.manual_seed(0)
    x, g = (torch.randn(n, k, size, size).contiguous(memory_format=torch.channels_last) for k in (c, o))
    w = torch.randn(o, c, 1, 1)
    x.requires_grad_()

    def gradient(y: Tensor) -> Run:
        return lambda: torch.autograd.grad(y, x, g, retain_graph=True)[0]

    def formed() -> Tensor:
        b = ops.feedback_weight(w, None, None, None, "constant", scale, w.shape, dtype=w.dtype)
        return torch.ops.aten.convolution_backward(
            g, x, b, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (True, False, False)
        )[0]

    layer = bk.nn.Conv2d(c, o, 1, bias=False, feedback="usf")
    with torch.no_grad():
        layer.weight.copy_(w)
    layer.weight.requires_grad_(False)
    b = layer.feedback_matrix()
    scale = float(b.abs().max())
    variants = {"backprop": gradient(F.conv2d(x, w)), "B formed": formed, "bioplaus, usf": gradient(layer(x))}

    if device.backends:
        variants |= {f"{name}, TF32": with_tf32(run) for name, run in variants.items()}

    def rows(t: Tensor) -> Tensor:
        return t.movedim(1, -1).flatten(0, -2)

    def error() -> float:
        # The bound is of the vendor's convolution, whose sums may lose more than those of its product.
        exact = rows(g).double() @ b.flatten(1).double()
        return relative_gate(rows(variants["bioplaus, usf"]()), exact, rows(formed()))

    return Bench(
        variants, {"bioplaus, usf": error}, (Work(2.0 * g.numel() * c, read=w.nbytes + g.nbytes, written=x.nbytes),)
    )
