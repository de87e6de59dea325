"""Kernels and layers for learning without weight transport, and for locally-connected networks."""

from . import backends, direct, feedback, functional, metrics, nn, ops, optim
from ._version import __version__
from .convert import Report, check, convert_
from .direct import DirectFeedback
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
    "DirectFeedback",
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
    "direct",
    "feedback",
    "frozen_signs",
    "functional",
    "metrics",
    "nn",
    "ops",
    "optim",
]
