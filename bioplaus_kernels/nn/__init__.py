"""torch.nn layers with a `feedback=` rule, and locally-connected layers."""

from .align import align_
from .attention import MultiheadAttention
from .base import FeedbackLayer, frozen_signs, mirror_
from .conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from .layouts import load_kernel_
from .linear import Linear
from .locally_connected import (
    LocallyConnected1d,
    LocallyConnected2d,
    LocallyConnected3d,
    LocallyConnectedTranspose1d,
    LocallyConnectedTranspose2d,
    LocallyConnectedTranspose3d,
)

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "FeedbackLayer",
    "Linear",
    "LocallyConnected1d",
    "LocallyConnected2d",
    "LocallyConnected3d",
    "LocallyConnectedTranspose1d",
    "LocallyConnectedTranspose2d",
    "LocallyConnectedTranspose3d",
    "MultiheadAttention",
    "align_",
    "frozen_signs",
    "load_kernel_",
    "mirror_",
]
