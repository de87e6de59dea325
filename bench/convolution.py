"""Input gradients of convolutions: the vendor's with W, with B formed for it, what our layer takes, and by each way."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import bioplaus_kernels as bk
from bioplaus_kernels import ops

from .device import Device, with_tf32
from .gate import relative_gate
from .registry import Bench, Case, Run, Work, register

# in_channels, out_channels, size, kernel, stride: the 1x1 convolutions of ResNet-50's blocks, the 3x3 ones of
# ResNet-18's at 224x224 and at 64x64, and small ones.
LAYERS = (
    (64, 256, 56, 1, 1),
    (256, 64, 56, 1, 1),
    (128, 512, 28, 1, 1),
    (512, 128, 28, 1, 1),
    (256, 1024, 14, 1, 1),
    (1024, 256, 14, 1, 1),
    (512, 2048, 7, 1, 1),
    (2048, 512, 7, 1, 1),
    (128, 256, 8, 1, 1),
    (512, 512, 2, 1, 1),
    (64, 64, 56, 3, 1),
    (64, 128, 56, 3, 2),
    (128, 128, 28, 3, 1),
    (256, 256, 14, 3, 1),
    (512, 512, 7, 3, 1),
    (32, 32, 28, 3, 1),
    (64, 64, 16, 3, 1),
    (128, 128, 8, 3, 1),
    (256, 256, 4, 3, 1),
    (512, 512, 2, 3, 1),
)
# Channels-last or not, and dtype.
FORMS = ((True, torch.float32), (False, torch.float32), (True, torch.bfloat16))


def label(c: int, o: int, size: int, kernel: int, stride: int, last: bool, dtype: torch.dtype = torch.float32) -> str:
    """A layer's name: kernel, channels, image, batch; memory format and dtype where not channels-last and float32."""
    strided = f", stride {stride}" if stride > 1 else ""
    rest = ("" if last else ", contiguous") + (" bfloat16" if dtype == torch.bfloat16 else "")
    return f"{kernel}x{kernel} {c} to {o}, {size}x{size}{strided}, N=16{rest}"


@register("convolution")
def cases() -> Iterator[Case]:
    """Batch 16, float32 in both memory formats, bfloat16 channels-last; --quick keeps a small layer in float32."""
    for last, dtype in FORMS:
        for layer in LAYERS if last else [layer for layer in LAYERS if layer[3] > 1]:
            a = (*layer, last, dtype)
            quick = layer[2] == 2 and dtype == torch.float32
            yield Case("convolution", label(*a), lambda device, a=a: build(device, 16, *a), quick=quick)


def build(
    device: Device, n: int, c: int, o: int, size: int, kernel: int, stride: int, last: bool, dtype: torch.dtype
) -> Bench:
    """The input gradient alone; on a GPU with TF32 too."""
    torch.manual_seed(0)
    form = torch.channels_last if last else torch.contiguous_format
    padding = kernel // 2
    x = torch.randn(n, c, size, size, dtype=dtype).contiguous(memory_format=form).requires_grad_()
    g = torch.randn(n, o, *[(size - 1) // stride + 1] * 2, dtype=dtype).contiguous(memory_format=form)
    w = torch.randn(o, c, kernel, kernel, dtype=dtype)
    geometry = [stride] * 2, [padding] * 2, [1, 1]

    def gradient(y: Tensor) -> Run:
        return lambda: torch.autograd.grad(y, x, g, retain_graph=True)[0]

    def formed() -> Tensor:
        b = ops.feedback_weight(w, None, None, None, "constant", scale, w.shape, dtype=w.dtype)
        return torch.ops.aten.convolution_backward(g, x, b, None, *geometry, False, [0, 0], 1, [True, False, False])[0]

    layer = bk.nn.Conv2d(c, o, kernel, stride, padding, bias=False, feedback="usf", dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(w)
    layer.weight.requires_grad_(False)
    b = layer.feedback_matrix()
    scale = float(b.abs().max())
    variants = {
        "backprop": gradient(F.conv2d(x, w, None, stride, padding)),
        "B formed": formed,
        "bioplaus, usf": gradient(layer(x)),
    }
    if kernel > 1 and not device.backends:
        for way in ("digits", "tables") if dtype == torch.float32 else ("tables",):
            variants[f"by {way}"] = lambda way=way: torch.ops.bioplaus.feedback_conv_by(
                g, w, None, None, None, "constant", scale, w.shape, x.shape[2:], *geometry, way
            )
    ours = [name for name in variants if name in ("bioplaus, usf", "by digits", "by tables")]

    if device.backends and dtype == torch.float32:
        variants |= {f"{name}, TF32": with_tf32(run) for name, run in variants.items()}

    def rows(t: Tensor) -> Tensor:
        return t.movedim(1, -1).flatten(0, -2)

    def error(name: str) -> float:
        # The bound is of the vendor's convolution, whose sums may lose more than those of its product.
        exact = torch.nn.grad.conv2d_input(x.shape, b.double(), g.double(), stride, padding)
        return relative_gate(rows(variants[name]()), rows(exact), rows(formed()))

    work = Work(2.0 * g.numel() * c * kernel**2, read=w.nbytes + g.nbytes, written=x.nbytes)
    return Bench(variants, {name: lambda name=name: error(name) for name in ours}, (work,))
