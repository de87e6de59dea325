"""The root mean square of B's entries."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Scale = float | Literal["xiao", "xavier", "torch", "match", "initial"]
Entries = Literal["uniform", "normal", "constant"]
SCALES = ("xiao", "xavier", "torch", "match", "initial")
# The seeded draws have these root mean squares at scale 1.
UNIT_RMS = {"uniform": 1.0 / math.sqrt(3.0), "normal": 1.0, "constant": 1.0}


class Fans(NamedTuple):
    """What a layer's shape says about scales: torch.nn.init's fans, and Xiao et al.'s constant."""

    fan_in: int
    fan_out: int
    xiao: float


def linear_fans(weight: Tensor) -> Fans:
    """Fans of a linear weight (out, in)."""
    return Fans(weight.shape[1], weight.shape[0], 1.0 / math.sqrt(max(weight.shape[1], 1)))


def bilinear_fans(weight: Tensor) -> Fans:
    """Fans of a bilinear weight (out, in1, in2), linear in the products of one entry of each input."""
    inputs = weight.shape[1] * weight.shape[2]
    return Fans(inputs, weight.shape[0] * weight.shape[2], 1.0 / math.sqrt(max(inputs, 1)))


def conv_fans(weight: Tensor, out_channels: int) -> Fans:
    """Fans of a convolution weight (c0, c1, *kernel), transposed or not."""
    kernel = math.prod(weight.shape[2:])
    return Fans(weight.shape[1] * kernel, weight.shape[0] * kernel, math.sqrt(2.0 / max(kernel * out_channels, 1)))


def lc_fans(weight: Tensor, out_channels: int) -> Fans:
    """Fans of one position's block (O, *kernel, C/groups) of a locally-connected weight, transposed or not."""
    d = (weight.dim() - 2) // 2
    o, kernel = weight.shape[d], math.prod(weight.shape[d + 1 : -1])
    return Fans(weight.shape[-1] * kernel, o * kernel, math.sqrt(2.0 / max(kernel * out_channels, 1)))


def root_mean_square(scale: Scale, fans: Fans) -> float:
    """The root mean square of B's entries that `scale` asks for; 1 for "match" and "initial", which act on dX."""
    if scale == "xiao":
        return fans.xiao
    if scale == "xavier":
        return math.sqrt(2.0 / max(fans.fan_in + fans.fan_out, 1))
    if scale == "torch":
        return 1.0 / math.sqrt(3.0 * max(fans.fan_in, 1))
    return 1.0 if scale in ("match", "initial") else float(scale)


def weight_rms(weight: Tensor) -> Tensor:
    """‖W‖_F/√numel, 0-dim and at least float32."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # torch adds all squares one after the other, which costs a float32 sum over 4096² of them two digits or more: rows
    # of a few thousand at a time, and the rows in float64.
    first = 1
    while first < weight.dim() - 1 and math.prod(weight.shape[first:]) > 2**13:
        first += 1
    rows = torch.linalg.vector_norm(weight.detach(), dim=tuple(range(first, weight.dim())), dtype=dtype)
    norm = torch.linalg.vector_norm(rows, dtype=torch.float64) / math.sqrt(max(weight.numel(), 1))
    return norm.to(dtype)
