"""Kernels and layers for learning without weight transport, and for locally-connected networks."""

from . import backends, direct, distributed, feedback, functional, metrics, nn, ops, optim, targetprop
from ._version import __version__
from .convert import check, convert_
from .describe import describe
from .direct import DirectFeedback
from .feedback import (
    ActivationAlignment,
    Backprop,
    BatchMagnitude,
    FeedbackAlignment,
    FixedMagnitude,
    InformationAlignment,
    InputHidden,
    KolenPollack,
    LowRank,
    Rule,
    SignConcordance,
    SignedInit,
    SignSymmetry,
    SymmetricAlignment,
    WeightMirror,
)
from .nn import align_, frozen_signs, mirror_
from .proof import Report
from .register import register
from .targetprop import TargetProp
from .untie import untie_

__all__ = [
    "ActivationAlignment",
    "Backprop",
    "BatchMagnitude",
    "DirectFeedback",
    "FeedbackAlignment",
    "FixedMagnitude",
    "InformationAlignment",
    "InputHidden",
    "KolenPollack",
    "LowRank",
    "Report",
    "Rule",
    "SignConcordance",
    "SignSymmetry",
    "SignedInit",
    "SymmetricAlignment",
    "TargetProp",
    "WeightMirror",
    "__version__",
    "align_",
    "backends",
    "check",
    "convert_",
    "describe",
    "direct",
    "distributed",
    "feedback",
    "frozen_signs",
    "functional",
    "metrics",
    "mirror_",
    "nn",
    "ops",
    "optim",
    "register",
    "targetprop",
    "untie_",
]
