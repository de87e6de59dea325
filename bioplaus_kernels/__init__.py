"""Kernels and layers for learning without weight transport, and for locally-connected networks."""

from . import backends, direct, feedback, functional, metrics, nn, ops, optim, targetprop
from ._version import __version__
from .convert import check, convert_
from .describe import describe
from .direct import DirectFeedback
from .feedback import (
    Backprop,
    BatchMagnitude,
    FeedbackAlignment,
    FixedMagnitude,
    InputHidden,
    KolenPollack,
    Rule,
    SignConcordance,
    SignedInit,
    SignSymmetry,
    WeightMirror,
)
from .nn import frozen_signs, mirror_
from .proof import Report
from .targetprop import TargetProp

__all__ = [
    "Backprop",
    "BatchMagnitude",
    "DirectFeedback",
    "FeedbackAlignment",
    "FixedMagnitude",
    "InputHidden",
    "KolenPollack",
    "Report",
    "Rule",
    "SignConcordance",
    "SignSymmetry",
    "SignedInit",
    "TargetProp",
    "WeightMirror",
    "__version__",
    "backends",
    "check",
    "convert_",
    "describe",
    "direct",
    "feedback",
    "frozen_signs",
    "functional",
    "metrics",
    "mirror_",
    "nn",
    "ops",
    "optim",
    "targetprop",
]
