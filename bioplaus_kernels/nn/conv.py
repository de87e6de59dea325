"""Convolutions and transposed convolutions with a feedback rule."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..feedback import Fans, conv_fans
from ..functional import conv_transpose_with, conv_with, explain_conv
from .base import FeedbackLayer


class _Conv(FeedbackLayer):
    # What both families read of torch.nn's _ConvNd.
    weight: Tensor
    bias: Tensor | None
    out_channels: int

    def fans(self, name: str = "weight") -> Fans:
        return conv_fans(self.weight_of(name), self.out_channels)


class _ConvForward(_Conv, torch.nn.modules.conv._ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        if self.is_plain(input):
            return super().forward(input)
        d, padding = len(self.kernel_size), self.padding
        if self.padding_mode != "zeros":
            try:
                input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            except Exception:
                explain_conv(d, input, self.weight, self.bias, padding, self.dilation, self.groups)
                raise
            padding = (0,) * d
        weight, op = self.used()
        return conv_with(d, input, weight, self.bias, self.stride, padding, self.dilation, self.groups, op)


class _ConvTransposeForward(_Conv, torch.nn.modules.conv._ConvTransposeNd):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.is_plain(input):
            return super().forward(input, output_size)
        d = len(self.kernel_size)
        geometry: Any = (self.stride, self.padding, self.kernel_size, d, self.dilation)
        output_padding = self._output_padding(input, output_size, *geometry)
        weight, op = self.used()
        return conv_transpose_with(
            d,
            input,
            weight,
            self.bias,
            self.stride,
            cast(tuple[int, ...], self.padding),
            output_padding,
            self.groups,
            self.dilation,
            op,
        )


class Conv1d(_ConvForward, torch.nn.Conv1d):
    """torch.nn.Conv1d whose input gradient uses B; torch.nn.Conv1d's arguments and `feedback=`."""


class Conv2d(_ConvForward, torch.nn.Conv2d):
    """torch.nn.Conv2d whose input gradient uses B; torch.nn.Conv2d's arguments and `feedback=`."""


class Conv3d(_ConvForward, torch.nn.Conv3d):
    """torch.nn.Conv3d whose input gradient uses B; torch.nn.Conv3d's arguments and `feedback=`."""


class ConvTranspose1d(_ConvTransposeForward, torch.nn.ConvTranspose1d):
    """torch.nn.ConvTranspose1d whose input gradient uses B; torch.nn.ConvTranspose1d's arguments and `feedback=`."""


class ConvTranspose2d(_ConvTransposeForward, torch.nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d whose input gradient uses B; torch.nn.ConvTranspose2d's arguments and `feedback=`."""


class ConvTranspose3d(_ConvTransposeForward, torch.nn.ConvTranspose3d):
    """torch.nn.ConvTranspose3d whose input gradient uses B; torch.nn.ConvTranspose3d's arguments and `feedback=`."""
