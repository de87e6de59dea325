"""Weight gradients of convolutions that sum few pixels: the vendor's, and that of our layers under any rule."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bioplaus_kernels import ops

from .convolution import FORMS, label
from .device import Device
from .gate import relative_gate
from .registry import Bench, Case, Work, register

# in_channels, out_channels, size, kernel, stride: of ResNet-18's last stage at 64x64, and at 32x32.
LAYERS = ((256, 512, 4, 3, 2), (512, 512, 2, 3, 1), (512, 512, 1, 3, 1))


@register("weight_gradient")
def cases() -> Iterator[Case]:
    """Batch 16, float32 in both memory formats, bfloat16 channels-last; --quick keeps one in float32."""
    for last, dtype in FORMS:
        for layer in LAYERS:
            a = (*layer, last, dtype)
            quick = layer[2] == 1 and (last, dtype) == FORMS[0]
            yield Case("weight_gradient", label(*a), lambda device, a=a: build(device, 16, *a), quick=quick)


def build(
    device: Device, n: int, c: int, o: int, size: int, kernel: int, stride: int, last: bool, dtype: torch.dtype
) -> Bench:
    """The weight gradient alone."""
    torch.manual_seed(0)
    form = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(n, c, size, size, dtype=dtype).contiguous(memory_format=form)
    g = torch.randn(n, o, *[(size - 1) // stride + 1] * 2, dtype=dtype).contiguous(memory_format=form)
    w = torch.empty(o, c, kernel, kernel, dtype=dtype).contiguous(memory_format=form)
    geometry = [stride] * 2, [kernel // 2] * 2, [1, 1]

    def backprop() -> Tensor:
        mask = [False, True, False]
        return torch.ops.aten.convolution_backward(g, x, w, None, *geometry, False, [0, 0], 1, mask)[1]

    def ours() -> Tensor:
        return ops.conv_backward_weight(g, x, w.shape[2:], *geometry)

    def error() -> float:
        exact = torch.nn.grad.conv2d_weight(x.double(), w.shape, g.double(), *geometry)
        return relative_gate(ours(), exact, backprop())

    work = Work(2.0 * g.numel() * c * kernel**2, read=x.nbytes + g.nbytes, written=w.nbytes)
    return Bench({"backprop": backprop, "bioplaus, any rule": ours}, {"bioplaus, any rule": error}, (work,))
