"""Layers within a forward that is not ours: its products with their weights take their B."""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..feedback import BACKPROP, Operands, stored
from ..functional import CUT, captured, conv_transpose_with, conv_with, formed, linear_with
from ..functional._conv import geometry, transpose_geometry
from .base import FeedbackLayer

# torch's own attention, which asks before all else whether a mode wants the whole of it.
_ATTENTION = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


# What turns a matrix over, by name: torch.compile has other objects for properties.
_TURNS = {
    "t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "adjoint", "T", "mT", "H", "mH",
    "numpy_T"
}  # fmt: skip


class _Known(NamedTuple):
    # The tensor is held, so that no other one takes its identity; of what layer's weight, and whether turned over.
    tensor: Any = None
    owner: tuple[FeedbackLayer, str] | None = None
    turned: bool = False


class Products(TorchFunctionMode):
    """In the block a product x W, with W the weight of a layer within `module`, is that layer's; with Wᵀ, by Bᵀ.

    W may also be computed from that weight and other Parameters and buffers of these modules, by anything that gives a
    tensor of W's shape: B is then of what is computed. All else is as it was, and what is not known here stays
    back-propagation's.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        # By identity the Parameters and buffers, and what is computed from them alone.
        self.known: dict[int, _Known] = {}
        parts: list[torch.nn.Module | None] = [module]
        while parts:
            if (part := parts.pop()) is None:
                continue
            parts += part._modules.values()
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                self.known.setdefault(id(tensor), _Known(tensor))
            if isinstance(part, FeedbackLayer) and part.uses_feedback:
                for name in part.weights():
                    # A parametrized W is another tensor at each reading, and costs a computation.
                    if (weight := part._parameters.get(name, vars(part).get(name))) is not None:
                        self.known[id(weight)] = _Known(weight, (part, name))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _ATTENTION(*args, **kwargs)
        product = _PRODUCTS.get(func)
        # Without gradients it is the forward of a Function.
        if product is not None and (torch.is_grad_enabled() or captured()):
            result = product(self, *args, **kwargs)
            if result is not None:
                return result
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._note(func, result, args, kwargs)
        return result

    def _note(self, func: Any, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        owners, turned, computed = [], True, False
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, Tensor):
                source = self.known.get(id(tensor))
                if source is None:
                    # Also where it was written in place.
                    self.known.pop(id(result), None)
                    return
                computed = True
                if source.owner is not None:
                    turned = turned and source.turned
                    if source.owner not in owners:
                        owners.append(source.owner)
        if computed:
            one = len(owners) == 1
            over = one and turned != (result.dim() == 2 and _turns(func))
            self.known[id(result)] = _Known(result, owners[0] if one else None, over)

    def used(self, input: Tensor, weight: Tensor, transposed: bool = False) -> tuple[Tensor, Operands] | None:
        """W and B of input Wᵀ where `weight`, transposed or not, is a W of a layer whose B acts in this call."""
        found = self.known.get(id(weight))
        if found is None or found.owner is None or id(input) in self.known or (transposed and weight.dim() != 2):
            return None
        layer, name = found.owner
        weight = weight.t() if transposed else weight
        shape, over = layer._held[name].shape, False
        if shape is not None and weight.dim() == 2:
            over = weight.shape != shape if shape[0] != shape[1] else self._over(layer, name, found.turned, transposed)
        if (weight.t() if over else weight).shape != shape or layer.is_plain(input):
            return None
        if not over:
            return layer.used(name, weight)
        weight, op = layer.used(name, weight.t())
        if op is not CUT and op is not BACKPROP:
            with torch.no_grad():
                op = stored(formed(op, weight).t().contiguous())
        return weight.t(), op

    def _over(self, layer: FeedbackLayer, name: str, turned: bool, transposed: bool) -> bool:
        # Of a square weight no shape tells; the layer's own W may be the Parameter turned over.
        own = False
        if name in layer._parameters and type(layer).weight_of is not FeedbackLayer.weight_of:
            with self:
                own = self.known.get(id(layer.weight_of(name)), _Known()).turned
        return turned != (transposed != own)


def _turns(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return (func.__self__.__name__ if name == "__get__" else name) in _TURNS


def _linear(mode: Products, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    found = mode.used(input, weight)
    return None if found is None else linear_with(input, found[0], bias, found[1])


def _matmul(
    mode: Products, input: Tensor, other: Any = None, *rest: Any, mat2: Any = None, **others: Any
) -> Tensor | None:
    # mm's name for it. What else torch's functions take, as `out=`, is left to them.
    other = mat2 if other is None else other
    if other is None or rest or others:
        return None
    found = mode.used(input, other, transposed=True)
    if found is not None:
        return linear_with(input, found[0], None, found[1])
    found = mode.used(other, input)
    if found is None or other.dim() < 2 or found[0].dim() != 2:
        return None
    # Laid out as torch's.
    return linear_with(other.mT, found[0], None, found[1]).mT.contiguous()


def _addmm(
    mode: Products, input: Tensor, mat1: Tensor, mat2: Tensor, *rest: Any, beta: Any = 1, alpha: Any = 1, **others: Any
) -> Tensor | None:
    if alpha != 1 or rest or others:
        return None
    product = _matmul(mode, mat1, mat2)
    # As in torch, NaN in `input` is then nothing.
    return product if product is None or beta == 0 else product + beta * input


def _conv(d: int) -> Callable[..., Tensor | None]:
    def product(
        mode: Products,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        found = mode.used(input, weight)
        if found is None:
            return None
        shaped = geometry(d, weight, stride, padding, dilation, groups)
        return conv_with(d, input, found[0], bias, *shaped, found[1])

    return product


def _conv_transpose(d: int) -> Callable[..., Tensor | None]:
    def product(
        mode: Products,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor | None:
        found = mode.used(input, weight)
        if found is None:
            return None
        shaped = transpose_geometry(d, weight, stride, padding, output_padding, groups, dilation)
        return conv_transpose_with(d, input, found[0], bias, *shaped, found[1])

    return product


_PRODUCTS: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    **{getattr(F, f"conv{d}d"): _conv(d) for d in (1, 2, 3)},
    **{getattr(F, f"conv_transpose{d}d"): _conv_transpose(d) for d in (1, 2, 3)},
}


def with_products(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, a method, within `Products`."""

    @functools.wraps(forward)
    def within(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() or captured()):
            return forward(self, *args, **kwargs)
        with Products(self):
            return forward(self, *args, **kwargs)

    return within
