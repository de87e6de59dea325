"""Kernels and layers for learning without weight transport, and for locally-connected networks."""

from . import backends, feedback, functional, nn, ops
from ._version import __version__
from .convert import Report, check, convert_
from .feedback import (
    Backprop,
    BatchMagnitude,
    FeedbackAlignment,
    FixedMagnitude,
    Rule,
    SignedInit,
    SignSymmetry,
)
from .nn import frozen_signs

__all__ = [
    "Backprop",
    "BatchMagnitude",
    "FeedbackAlignment",
    "FixedMagnitude",
    "Report",
    "Rule",
    "SignSymmetry",
    "SignedInit",
    "__version__",
    "backends",
    "check",
    "convert_",
    "feedback",
    "frozen_signs",
    "functional",
    "nn",
    "ops",
]
