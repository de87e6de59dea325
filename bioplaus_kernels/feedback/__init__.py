"""The rules: what B is in a layer's input gradient.

A linear map y = x Wᵀ + b keeps its forward product and its weight gradient; only the input gradient changes, dX = dY B.
`scale` is the root mean square of B's entries for every rule that has one:

* a number;
* "xiao": 1/√in for a linear map, √(2/(∏kernel · out_channels)) for a convolution, groups not divided out
  (Xiao et al. 2018, official code);
* "xavier": √(2/(fan_in + fan_out)) (Glorot and Bengio 2010);
* "torch": 1/√(3 · fan_in), that of torch.nn's default initialisation;
* "match": ‖W‖_F/√numel at each call (Moskovitz et al. 2018, strict normalisation);
* "initial": ‖W₀‖_F/√numel, W₀ the weight when the rule is given to the layer (the same, initial normalisation).

Fans are torch.nn.init's; those of a locally-connected layer are the fans of one position's block.
"""

from .alignment import ActivationAlignment, InformationAlignment, SymmetricAlignment
from .record import Frozen, Key, Record, decode, derived_key, drawn_key, encode, feedback_key
from .rule import BACKPROP, Operands, Rule, State, Stateful, identity, stored
from .rules import (
    RULES,
    Backprop,
    BatchMagnitude,
    FeedbackAlignment,
    FixedMagnitude,
    InputHidden,
    KolenPollack,
    LowRank,
    SignConcordance,
    SignedInit,
    SignSymmetry,
    WeightMirror,
    as_rule,
    fill,
    whole,
)
from .scale import Entries, Fans, Scale, bilinear_fans, conv_fans, lc_fans, linear_fans, root_mean_square, weight_rms


class Plan(tuple[object, ...]):
    """What pickles of version 0.1 hold, and a layer drops when it is loaded."""

    def __new__(cls, *fields: object) -> "Plan":
        return super().__new__(cls, fields)


__all__ = [
    "BACKPROP",
    "RULES",
    "ActivationAlignment",
    "Backprop",
    "BatchMagnitude",
    "Entries",
    "Fans",
    "FeedbackAlignment",
    "FixedMagnitude",
    "Frozen",
    "InformationAlignment",
    "InputHidden",
    "Key",
    "KolenPollack",
    "LowRank",
    "Operands",
    "Record",
    "Rule",
    "Scale",
    "SignConcordance",
    "SignSymmetry",
    "SignedInit",
    "State",
    "Stateful",
    "SymmetricAlignment",
    "WeightMirror",
    "as_rule",
    "bilinear_fans",
    "conv_fans",
    "decode",
    "derived_key",
    "drawn_key",
    "encode",
    "feedback_key",
    "fill",
    "identity",
    "lc_fans",
    "linear_fans",
    "root_mean_square",
    "stored",
    "weight_rms",
    "whole",
]
