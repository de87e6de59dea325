"""torch.nn layers with a `feedback=` rule, and locally-connected layers."""

from .align import align_
from .attention import MultiheadAttention
from .base import FeedbackLayer, frozen_signs, mirror_
from .bilinear import Bilinear
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
from .recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Bilinear",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "FeedbackLayer",
    "GRUCell",
    "LSTMCell",
    "Linear",
    "LocallyConnected1d",
    "LocallyConnected2d",
    "LocallyConnected3d",
    "LocallyConnectedTranspose1d",
    "LocallyConnectedTranspose2d",
    "LocallyConnectedTranspose3d",
    "MultiheadAttention",
    "RNNCell",
    "align_",
    "frozen_signs",
    "load_kernel_",
    "mirror_",
]
