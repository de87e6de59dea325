"""Plain-torch backend: the specification of every op, on any device and dtype."""

from collections.abc import Callable
from typing import Any

from .conv_backward_weight import conv_backward_weight
from .feedback_conv import feedback_conv
from .feedback_mm import feedback_mm
from .feedback_weight import feedback_weight
from .lc import lc_backward_input, lc_backward_weight, lc_forward
from .pack_signs import pack_signs, unpack_signs
from .recurrent import MODES, recurrent_backward, recurrent_forward
from .redraw_key import redraw_key

__all__ = [
    "MODES",
    "OPS",
    "conv_backward_weight",
    "feedback_conv",
    "feedback_mm",
    "feedback_weight",
    "lc_backward_input",
    "lc_backward_weight",
    "lc_forward",
    "pack_signs",
    "recurrent_backward",
    "recurrent_forward",
    "redraw_key",
    "unpack_signs",
]

OPS: dict[str, Callable[..., Any]] = {
    op.__name__: op
    for op in (
        feedback_mm,
        feedback_conv,
        conv_backward_weight,
        feedback_weight,
        pack_signs,
        unpack_signs,
        redraw_key,
        lc_forward,
        lc_backward_input,
        lc_backward_weight,
        recurrent_forward,
        recurrent_backward,
    )
}
