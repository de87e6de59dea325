"""Functional layers: torch.nn.functional's, with `feedback=` for the input gradient.

`feedback` is a rule, its name, or a tensor that is B itself (the weight's shape). Forward and weight gradient are the
namesake's. Rules that draw (`fa`, `frsf`, `brsf`) need `key=`, from `bk.feedback.feedback_key(seed, name)`.
Arguments that do not fit raise ValueError or TypeError; double backward and torch.func transforms raise too.
"""

from types import FunctionType

from ._bilinear import bilinear, bilinear_with
from ._common import (
    CUT,
    Arguments,
    Feedback,
    Grads,
    Ints,
    captured,
    explain,
    formed,
    ints,
    is_backprop,
    needs_feedback,
    no_key,
    resolve,
)
from ._conv import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    conv_transpose_with,
    conv_with,
    explain_conv,
)
from ._linear import linear, linear_with
from ._locally_connected import (
    Padding,
    locally_connected1d,
    locally_connected2d,
    locally_connected3d,
    locally_connected_transpose_with,
    locally_connected_with,
    pad_pairs,
)
from ._recurrent import carries, recurrent_with

__all__ = [
    "CUT",
    "Arguments",
    "Feedback",
    "Grads",
    "Ints",
    "Padding",
    "bilinear",
    "bilinear_with",
    "captured",
    "carries",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "conv_transpose_with",
    "conv_with",
    "explain",
    "explain_conv",
    "formed",
    "ints",
    "is_backprop",
    "linear",
    "linear_with",
    "locally_connected1d",
    "locally_connected2d",
    "locally_connected3d",
    "locally_connected_transpose_with",
    "locally_connected_with",
    "needs_feedback",
    "no_key",
    "pad_pairs",
    "recurrent_with",
    "resolve",
]

# A pickle names a function by where users find it.
for _name in __all__:
    if isinstance(_object := globals()[_name], FunctionType):
        _object.__module__ = __name__
