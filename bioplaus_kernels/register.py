"""Whose class can be ours: torch.nn's, those of other libraries that are known, and those that a user registers."""

import copyreg
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import nn
from .backends.reference import checks
from .nn.base import FeedbackLayer
from .nn.linear import LinearProduct
from .nn.products import with_products

Kind = TypeVar("Kind", bound=type[torch.nn.Module])
_Module = type[torch.nn.Module]

PAIRS: dict[_Module, type[FeedbackLayer]] = {
    getattr(torch.nn, name): getattr(nn, name)
    for name in (
        "Linear",
        "Conv1d",
        "Conv2d",
        "Conv3d",
        "ConvTranspose1d",
        "ConvTranspose2d",
        "ConvTranspose3d",
        "MultiheadAttention",
        "Bilinear",
        "RNN",
        "LSTM",
        "GRU",
        "RNNCell",
        "LSTMCell",
        "GRUCell",
    )
}
PLAIN = {ours: theirs for theirs, ours in PAIRS.items()}
OWN = tuple(getattr(nn, name) for name in nn.__all__ if name.startswith("LocallyConnected"))

# Before what a report says in brackets.
ALLOWS = "to allow it: bioplaus_kernels.register"
# What makes a subclass compute what its parent does.
_COMPUTES = ("forward", "_conv_forward", "_output_padding", "__call__", "weight", "bias")


@dataclass(frozen=True)
class _How:
    # torch.nn's class whose product it is, and that of a parent None; the forward that runs within `Products`, "theirs"
    # or a function, and "" where our class's does instead.
    base: _Module | None = None
    forward: Callable[..., Any] | str = ""
    weight: Callable[[Any], Tensor] | None = None


def _transposed(module: Any) -> Tensor:
    return module.weight.t()


def _standardised(module: Any) -> Tensor:
    # Qiao et al. 2019, and Brock et al. 2021 where there is a gain.
    gain = (module.gain * module.scale).view(-1) if hasattr(module, "gain") else None
    rows = module.weight.reshape(1, module.out_channels, -1)
    return F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=module.eps).reshape_as(
        module.weight
    )


_PARENT = _How(forward="theirs")
# By name, so that nothing is imported.
_KNOWN = {
    "transformers.pytorch_utils.Conv1D": _How(torch.nn.Linear, weight=_transposed),
    "transformers.models.falcon.modeling_falcon.FalconLinear": _How(torch.nn.Linear),
    "torch_geometric.nn.dense.linear.Linear": _How(torch.nn.Linear),
    "timm.layers.linear.Linear": _How(torch.nn.Linear),
    "timm.layers.conv2d_same.Conv2dSame": _How(torch.nn.Conv2d, "theirs"),
    **{
        f"timm.layers.std_conv.{name}": _How(torch.nn.Conv2d, "theirs", _standardised)
        for name in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
    },
    "transformers.models.bit.modeling_bit.WeightStandardizedConv2d": _How(torch.nn.Conv2d, "theirs", _standardised),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": _PARENT,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": _PARENT,
    "timm.models.beit.Attention": _PARENT,
    "timm.models.eva.EvaAttention": _PARENT,
    "timm.models.swin_transformer_v2.WindowAttention": _PARENT,
    "transformers.models.wavlm.modeling_wavlm.WavLMAttention": _PARENT,
    "transformers.models.mamba.modeling_mamba.MambaMixer": _PARENT,
    "transformers.models.mamba2.modeling_mamba2.Mamba2Mixer": _PARENT,
    "transformers.models.falcon_mamba.modeling_falcon_mamba.FalconMambaMixer": _PARENT,
    "transformers.models.jamba.modeling_jamba.JambaMambaMixer": _PARENT,
}
_registered: dict[_Module, _How] = {}
_made: dict[_Module, _Module] = {}


def register(
    cls: Kind,
    how: Callable[..., Any] | _Module | None = None,
    *,
    weight: Callable[[Any], Tensor] | None = None,
) -> Kind:
    """Let `convert_` convert modules of `cls`: layers with a forward of their own, and what reads layers within.

    how: None runs its forward as it is, and each product x Wᵀ in it, with W the weight of the module or of a layer
    within, takes the B of that layer, and x W takes Bᵀ; W may be computed from them there, and B is of what the product
    has. A function of (module, *arguments) is run in the place of its forward, in the same way. A torch.nn class says
    that `cls` computes what that does, with the same attributes: Linear for any class, another one for a subclass of
    it.
    weight: a function of the module that gives W as its product has it, (out, in) for a linear map, where that is not
    `module.weight`; what a rule keeps and `feedback_matrix` are of it.

    Returns `cls`, and so serves as a decorator. What was converted before keeps its class. Raises TypeError for what is
    no class of modules, for a torch.nn class that does not fit, and for one that converts anyway.
    """
    if not isinstance(cls, type) or not issubclass(cls, torch.nn.Module):
        checks.fail("cls", "a class of modules", repr(cls), TypeError)
    if cls in PAIRS or issubclass(cls, FeedbackLayer):
        checks.fail("cls", "a class that does not convert by itself", cls.__name__, TypeError)
    base = next((kind for kind in cls.__mro__ if kind in PAIRS), None)
    forward: Callable[..., Any] | str = "theirs" if how is None else cast(Callable[..., Any], how)
    if isinstance(how, type):
        forward, base = "", next((k for k in PAIRS if how in (k, PAIRS[k])), None)
        if base is None or not (base is torch.nn.Linear or issubclass(cls, base)):
            checks.fail("how", f"torch.nn.Linear or a layer of torch.nn above {cls.__name__}", how.__name__, TypeError)
    elif how is not None:
        checks.function("how", how, "a function of the module and its inputs, a class of torch.nn, or None")
    if weight is not None:
        checks.function("weight", weight, "a function of the module or None")
        if base is None:
            checks.fail("weight", f"None where {cls.__name__} is no layer", repr(weight), TypeError)
    _registered[cls] = _How(base, forward, weight)
    _made.clear()
    return cls


class Registered:
    """Mixin of the classes made here. A pickle names theirs."""

    _theirs: ClassVar[_Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(2)
        return (_new, (self._theirs,), *made[2:]) if made[0] is copyreg.__newobj__ else made  # type: ignore[attr-defined]


def _new(theirs: _Module) -> torch.nn.Module:
    ours = ours_of(theirs)
    if ours is None:
        raise TypeError(f"{name_of(theirs)}: bioplaus_kernels.register it first, as where this was saved")
    return ours.__new__(ours)


def name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def layer_of(kind: _Module) -> type[FeedbackLayer] | None:
    """The class that a module of class `kind` has with a rule; None where it can have none."""
    ours = ours_of(kind)
    return ours if ours is not None and issubclass(ours, FeedbackLayer) else None


def ours_of(kind: _Module) -> _Module | None:
    """`layer_of`, or what a module of class `kind` is while layers within have rules; None where it is itself."""
    if kind in OWN or kind in PLAIN or issubclass(kind, Registered):
        return kind
    for base in kind.__mro__:
        how = _registered.get(base) or _KNOWN.get(name_of(base)) or (_How(base) if base in PAIRS else None)
        if how is not None or base in OWN or base in PLAIN:
            if any(getattr(kind, name, None) is not getattr(base, name, None) for name in _COMPUTES):
                return None
            return PAIRS.get(kind) or (kind if how is None else _make(kind, how))
    return None


def plain_of(kind: _Module) -> _Module | None:
    """What `kind`, a class of ours, was before; None where it was ours from the beginning."""
    return kind._theirs if issubclass(kind, Registered) else PLAIN.get(cast(Any, kind))


def runs_ours(kind: _Module) -> bool:
    """Whether `kind` was made here and its forward is ours, in the place of that of its class."""
    runs = next(base for base in kind.__mro__ if "forward" in vars(base))
    return issubclass(kind, Registered) and runs.__module__.startswith(nn.__name__)


def _make(kind: _Module, how: _How) -> _Module:
    if kind not in _made:
        body: dict[str, Any] = {"_theirs": kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        if how.forward:
            body["forward"] = with_products(kind.forward if how.forward == "theirs" else cast(Any, how.forward))
        if how.weight is not None:
            body["weight_of"] = _checked(cast(_Module, how.base), how.weight)
        product = () if how.base is None else (LinearProduct if how.base is torch.nn.Linear else PAIRS[how.base],)
        meta: Any = type(kind)
        _made[kind] = meta(kind.__name__, (Registered, *product, kind), body)
    return _made[kind]


def _checked(base: _Module, weight: Callable[[Any], Tensor]) -> Callable[..., Tensor]:
    # Of a convolution as many dimensions as its class's name says.
    d = base.__name__[-2:-1]
    dims = int(d) + 2 if d.isdigit() else 2 if base is torch.nn.Linear else None

    def weight_of(self: Any, name: str = "weight") -> Tensor:
        w = weight(self)
        if not isinstance(w, Tensor) or w.dim() != (dims or w.dim()):
            wanted = f"a function that gives a tensor of {dims or 'its'} dimensions, as {base.__name__}'s"
            checks.fail("weight", wanted, f"shape {tuple(w.shape)}" if isinstance(w, Tensor) else repr(w), TypeError)
        return w

    return weight_of
