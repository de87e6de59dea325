"""Locally-connected layers: convolutions whose weights are not shared between positions, and their transposes."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.reference import checks
from ..backends.reference.lc import output_size
from ..feedback import Fans, Rule, as_rule, lc_fans
from ..functional import (
    Ints,
    Padding,
    ints,
    locally_connected_transpose_with,
    locally_connected_with,
    needs_feedback,
    pad_pairs,
)
from .base import FeedbackLayer
from .conv import _ConvForward

PaddingMode = Literal["zeros", "circular", "reflect", "replicate"]
_MODES = ("zeros", "circular", "reflect", "replicate")


class _LocallyConnectedNd(FeedbackLayer):
    """Geometry, weight (*positions, rows, *kernel, columns/groups) and bias of both directions.

    The wide end is the input of a locally-connected layer and the output of its transpose; positions are counted at the
    narrow end.
    """

    d: ClassVar[int]
    transposed: ClassVar[bool] = False
    padding_mode: PaddingMode | tuple[PaddingMode, ...] = "zeros"
    in_channels: int
    out_channels: int
    weight: Tensor
    bias: Tensor | None

    def _build(
        self,
        size: Ints,
        size_name: str,
        kernel_size: Ints,
        stride: Ints,
        padding: Padding,
        dilation: Ints,
        groups: int,
        like: dict[str, Any],
    ) -> tuple[list[int], list[int]]:
        d = self.d
        self.groups = checks.integer("groups", groups, 1)
        for name in ("in_channels", "out_channels"):
            value = checks.integer(name, getattr(self, name), 1)
            setattr(self, name, value)
            if value % self.groups:
                checks.fail("groups", f"a divisor of {name}={value}", groups)
        self.kernel_size = tuple(ints("kernel_size", kernel_size, d, 1))
        self.stride = tuple(ints("stride", stride, d, 1))
        self.dilation = tuple(ints("dilation", dilation, d, 1))
        wide = ints(size_name, size, d, 1)
        self._pairs = pad_pairs(padding, wide, self.kernel_size, self.stride, self.dilation)
        self.padding = _plain(padding)
        narrow = output_size(wide, self.kernel_size, self.stride, self._pairs, self.dilation)
        if any(n < 1 for n in narrow):
            checks.fail(size_name, f"a padded size of at least the dilated kernel {self.kernel_size}", tuple(wide))
        ends = self.in_channels, self.out_channels
        wide_channels, narrow_channels = ends[::-1] if self.transposed else ends
        shape = (*narrow, narrow_channels, *self.kernel_size, wide_channels // self.groups)
        self.weight = torch.nn.Parameter(torch.empty(shape, **like))
        return wide, narrow

    def _build_bias(self, bias: bool, bias_per: str, positions: Sequence[int], like: dict[str, Any]) -> None:
        checks.boolean("bias", bias)
        checks.one_of("bias_per", bias_per, ("position", "channel"), "'position' or 'channel'")
        self.bias_per = bias_per
        if not bias:
            self.register_parameter("bias", None)
            return
        shape = (*positions, self.out_channels) if bias_per == "position" else (self.out_channels,)
        self.bias = torch.nn.Parameter(torch.empty(shape, **like))

    def fans(self, name: str = "weight") -> Fans:
        return lc_fans(self.weight, self.out_channels)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform within ±1/√fan_in of one position's block, weight and bias, as torch.nn's convolutions."""
        bound = 1.0 / math.sqrt(self.fans().fan_in)
        self.weight.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)
        if "_feedback" in self.__dict__:
            self.reset_feedback()

    @torch.no_grad()
    def init_(self, init: Callable[..., object], *args: Any, **kwargs: Any) -> Self:
        """Fill the weight by `init`, a function of torch.nn.init, with the fans of one position's block.

        It is called as init(block, *args, **kwargs) for each position, whose block is laid out as a convolution's
        weight, (rows, columns/groups, *kernel); torch.nn.init of the whole weight would count positions as fans.
        Returns the layer.
        """
        checks.function("init", init, "a function of torch.nn.init")
        for position in itertools.product(*map(range, self.weight.shape[: self.d])):
            block = self.weight[position].movedim(-1, 1).contiguous()
            init(block, *args, **kwargs)
            self.weight[position] = block.movedim(1, -1)
        return self

    def _spatial(self, input: Tensor, channels: int, size: Sequence[int]) -> None:
        try:
            spatial, batchless = tuple(input.shape[-self.d :]), input.dim() == self.d + 1
        except AttributeError:
            checks.tensor("input", input)
            raise
        if input.dim() not in (self.d + 1, self.d + 2):
            checks.fail("input", f"{self.d + 2} dimensions, or {self.d + 1} without a batch", tuple(input.shape))
        if input.shape[0 if batchless else 1] != channels or spatial != tuple(size):
            checks.fail("input", f"{channels} channels and spatial size {tuple(size)}", f"shape {tuple(input.shape)}")

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}", f"{self.out_channels}", f"kernel_size={self.kernel_size}"]
        parts += [f"stride={self.stride}", f"padding={self.padding!r}"]
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode!r}")
        if any(v != 1 for v in self.dilation):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        parts.append("bias=False" if self.bias is None else f"bias_per={self.bias_per!r}")
        return ", ".join([*parts, self._size_repr(), f"feedback={self.feedback}"])

    def _size_repr(self) -> str:
        raise NotImplementedError


def _plain(padding: Any) -> Any:
    # numpy's integers as Python's.
    if isinstance(padding, str):
        return padding
    if not isinstance(padding, Sequence):
        return checks.index(padding)
    return (list if isinstance(padding, list) else tuple)(map(_plain, padding))


class _LocallyConnected(_LocallyConnectedNd):
    # What is padded before the product by other modes than zeros, as F.pad takes it, by mode.
    _pads: dict[PaddingMode, list[int]] = {}  # noqa: RUF012  never written, and of layers that were pickled without

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Padding = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        input_size: Ints,
        bias_per: Literal["position", "channel"] = "position",
        padding_mode: PaddingMode | Sequence[PaddingMode] = "zeros",
        device: Any = None,
        dtype: Any = None,
        feedback: Rule | str | None = None,
    ) -> None:
        rule, like = as_rule(feedback), checks.factory(device, dtype)
        torch.nn.Module.__init__(self)
        self.in_channels, self.out_channels = in_channels, out_channels
        wide, narrow = self._build(input_size, "input_size", kernel_size, stride, padding, dilation, groups, like)
        self.input_size, self.output_size = tuple(wide), tuple(narrow)
        self._build_pads(padding_mode)
        self._build_bias(bias, bias_per, narrow, like)
        self.reset_parameters()
        self.install_feedback(rule)

    def _build_pads(self, padding_mode: Any) -> None:
        # Each dimension is padded by itself, zeros by the product.
        modes: Any = (padding_mode,) * self.d if isinstance(padding_mode, str) else padding_mode
        if not isinstance(modes, Sequence) or len(modes) != self.d or any(mode not in _MODES for mode in modes):
            checks.fail("padding_mode", f"one of {_MODES} or {self.d} of them", repr(padding_mode))
        self.padding_mode = modes[0] if len(set(modes)) == 1 else tuple(modes)
        self._pads = {}
        for dim, (mode, size) in enumerate(zip(modes, self.input_size, strict=True)):
            pair = self._pairs[2 * dim : 2 * dim + 2]
            if mode == "zeros" or not any(pair):
                continue
            most = {"circular": size, "reflect": size - 1}.get(mode)
            if most is not None and max(pair) > most:
                checks.fail("padding", f"at most {most} of {mode!r} in a dimension of size {size}", tuple(pair))
            last = 2 * (self.d - 1 - dim)
            self._pads.setdefault(mode, [0] * (2 * self.d))[last : last + 2] = pair
            self._pairs[2 * dim : 2 * dim + 2] = [0, 0]

    def forward(self, input: Tensor) -> Tensor:
        self._spatial(input, self.in_channels, self.input_size)
        for mode, pads in self._pads.items():
            input = F.pad(input, pads, mode=mode)
        weight, op = self.used(feedback=self.uses_feedback and needs_feedback(input))
        return locally_connected_with(
            input, weight, self.bias, self.stride, self._pairs, self.dilation, self.groups, op
        )

    def _size_repr(self) -> str:
        return f"input_size={self.input_size}"

    @classmethod
    @torch.no_grad()
    def from_conv(cls, conv: torch.nn.Module, input_size: Ints, *, feedback: Rule | str | None = None) -> Self:
        """Untie a convolution for inputs of spatial `input_size`: the same function, a copy of its weights a position.

        `conv` is the torch.nn (or bioplaus_kernels.nn) convolution of the same dimensions, parametrized or not; the
        bias becomes one per position. The rule is `feedback`, or that of `conv` if it has one. Raises TypeError for
        another module, and for a forward of its own.
        """
        twin = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[cls.d - 1]
        if not isinstance(conv, twin):
            checks.fail("conv", f"a torch.nn.{twin.__name__}", type(conv).__name__, TypeError)
        kind, own = type(conv), (twin.forward, _ConvForward.forward)
        if "forward" in vars(conv) or kind.forward not in own or kind._conv_forward is not twin._conv_forward:
            wanted = f"a module with torch.nn.{twin.__name__}'s forward (what another makes of its weight is not known)"
            checks.fail("conv", wanted, f"{kind.__name__} with a forward of its own", TypeError)
        if feedback is None and isinstance(conv, FeedbackLayer):
            feedback = conv.feedback
        with torch.enable_grad():
            # Read once; what a parametrization computes tells here whether its Parameters train.
            weight = conv.weight_of() if isinstance(conv, FeedbackLayer) else conv.weight
            bias = conv.bias
        layer = torch.nn.utils.skip_init(
            cls,
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias is not None,
            input_size=input_size,
            padding_mode=conv.padding_mode,
            device=weight.device,
            dtype=weight.dtype,
        )
        layer.weight.copy_(weight.movedim(1, -1))
        layer.weight.requires_grad_(weight.requires_grad)
        if bias is not None:
            layer.bias.copy_(bias)
            layer.bias.requires_grad_(bias.requires_grad)
        layer.install_feedback(as_rule(feedback))
        return layer


class _LocallyConnectedTranspose(_LocallyConnectedNd):
    transposed: ClassVar[bool] = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Padding = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        output_size: Ints,
        bias_per: Literal["position", "channel"] = "position",
        device: Any = None,
        dtype: Any = None,
        feedback: Rule | str | None = None,
    ) -> None:
        rule, like = as_rule(feedback), checks.factory(device, dtype)
        torch.nn.Module.__init__(self)
        self.in_channels, self.out_channels = in_channels, out_channels
        wide, narrow = self._build(output_size, "output_size", kernel_size, stride, padding, dilation, groups, like)
        self.input_size, self.output_size = tuple(narrow), tuple(wide)
        self._build_bias(bias, bias_per, wide, like)
        self.reset_parameters()
        self.install_feedback(rule)

    def forward(self, input: Tensor) -> Tensor:
        self._spatial(input, self.in_channels, self.input_size)
        weight, op = self.used(feedback=self.uses_feedback and needs_feedback(input))
        return locally_connected_transpose_with(
            input, weight, self.bias, self.output_size, self.stride, self._pairs, self.dilation, self.groups, op
        )

    def _size_repr(self) -> str:
        return f"output_size={self.output_size}"


_FORWARD_DOC = """Untied {d}-D convolution: every output position has its own weights.

    y[n, o, p] = bias[p, o] + Σ over taps t, channels c of weight[p, o, t, c] · x[n, c, p·stride + t·dilation − before]

    weight (*out, out_channels, *kernel, in_channels/groups), one position's block contiguous; bias (*out, out_channels)
    for bias_per="position", (out_channels) for "channel". Input (N, in_channels, *input_size) or without N. `padding`:
    one integer a dimension, nested (before, after) pairs in spatial order, "same" (out = ⌈in/stride⌉, the odd pad at
    the end) or "valid". `padding_mode`: "zeros", "circular", "reflect" or "replicate", or one of them a dimension. With
    replicated weights it equals torch.nn.Conv{d}d (Bartunov et al. 2018, 5.4).

    torch.nn.init takes the weight for a convolution's and its fans for far larger ones: use
    layer.init_(torch.nn.init.kaiming_normal_).
    """
_TRANSPOSE_DOC = """Transpose of LocallyConnected{d}d: its input gradient, used forward, plus a bias.

    The twin maps (out_channels, *output_size) to this layer's input with weights V of the same shape; this layer is
    y = (∂twin/∂x)ᵀ x + c, the inverse g of target propagation (Bartunov et al. 2018, 5.4).
    weight (*input_size, in_channels, *kernel, out_channels/groups); bias (*output_size, out_channels) or
    (out_channels).
    """


class LocallyConnected1d(_LocallyConnected):
    __doc__ = _FORWARD_DOC.format(d=1)
    d = 1


class LocallyConnected2d(_LocallyConnected):
    __doc__ = _FORWARD_DOC.format(d=2)
    d = 2


class LocallyConnected3d(_LocallyConnected):
    __doc__ = _FORWARD_DOC.format(d=3)
    d = 3


class LocallyConnectedTranspose1d(_LocallyConnectedTranspose):
    __doc__ = _TRANSPOSE_DOC.format(d=1)
    d = 1


class LocallyConnectedTranspose2d(_LocallyConnectedTranspose):
    __doc__ = _TRANSPOSE_DOC.format(d=2)
    d = 2


class LocallyConnectedTranspose3d(_LocallyConnectedTranspose):
    __doc__ = _TRANSPOSE_DOC.format(d=3)
    d = 3
