"""What torch.compile must not put off to the backward."""

import torch

from ..feedback import Operands

_library = torch.library.Library("bioplaus_compile", "DEF")
_library.define("in_forward(Tensor x) -> Tensor")
_library.impl("in_forward", lambda x: x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("bioplaus_compile::in_forward", torch.empty_like, lib=_library)


def keep_order() -> None:
    """Let `in_forward` have an effect, which keeps its place; else what only a backward reads is made there."""
    # Private, and needed where weights are freed alone.
    from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

    _register_effectful_op(torch.ops.bioplaus_compile.in_forward.default, _EffectType.ORDERED)


def in_forward(op: Operands) -> Operands:
    """`op`, its signs, key and scale made in the forward of a compiled program. B itself stays where it is."""
    made = {"signs": op.signs, "key": op.key, "rescale": op.rescale}
    return op._replace(**{name: torch.ops.bioplaus_compile.in_forward(t) for name, t in made.items() if t is not None})
