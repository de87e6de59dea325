"""Layers within a forward that is not ours: its products with their weights take their B."""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..feedback import Operands
from ..functional import captured, conv_transpose_with, conv_with, linear_with
from ..functional._conv import geometry, transpose_geometry
from .base import FeedbackLayer

# torch's own attention, which asks before all else whether a mode wants the whole of it.
_ATTENTION = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


class Products(TorchFunctionMode):
    """In the block a product x W, with W the weight of `module` or of a child of it, is that layer's.

    W may also be computed from that weight and other Parameters and buffers of these modules, by anything that gives a
    tensor of W's shape: B is then of what is computed. All else is as it was, and what is not known here stays
    back-propagation's.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        # By identity what is computed from Parameters alone, and the layer whose weight is in it. The tensors are held,
        # so that no other takes their identity.
        self.known: dict[int, tuple[Any, tuple[FeedbackLayer, str] | None]] = {}
        for part in (module, *module._modules.values()):
            if part is None:
                continue
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                self.known[id(tensor)] = tensor, None
            if isinstance(part, FeedbackLayer) and part.uses_feedback:
                for name in part.weights():
                    weight = part._parameters.get(name)
                    weight = getattr(part, name) if weight is None else weight
                    self.known[id(weight)] = weight, (part, name)

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
            self._note(result, args, kwargs)
        return result

    def _note(self, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sources = []
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, Tensor):
                if id(tensor) not in self.known:
                    # Also where it was written in place.
                    self.known.pop(id(result), None)
                    return
                sources.append(self.known[id(tensor)][1])
        if sources:
            owners = [source for source in sources if source is not None]
            one = owners and all(owner is owners[0] for owner in owners)
            self.known[id(result)] = result, owners[0] if one else None

    def used(self, input: Tensor, weight: Tensor, transposed: bool = False) -> tuple[Tensor, Operands] | None:
        """W and B of input Wᵀ where `weight`, transposed or not, is a W of a layer whose B acts in this call."""
        if id(weight) not in self.known or id(input) in self.known:
            return None
        owner = self.known[id(weight)][1]
        if owner is None or (transposed and weight.dim() != 2):
            return None
        layer, name = owner
        weight = weight.t() if transposed else weight
        if weight.shape != layer._held[name].shape or layer.is_plain(input):
            return None
        return layer.used(name, weight)


def _linear(mode: Products, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    found = mode.used(input, weight)
    return None if found is None else linear_with(input, found[0], bias, found[1])


def _matmul(mode: Products, input: Tensor, other: Tensor) -> Tensor | None:
    found = mode.used(input, other, transposed=True)
    if found is not None:
        return linear_with(input, found[0], None, found[1])
    found = mode.used(other, input)
    if found is None or other.dim() < 2 or found[0].dim() != 2:
        return None
    return linear_with(other.mT, found[0], None, found[1]).mT


def _addmm(
    mode: Products, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor | None:
    if alpha != 1:
        return None
    product = _matmul(mode, mat1, mat2)
    return None if product is None else product + beta * input


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
