"""An oracle for every layer and rule that shares no formula with the library, and the layers it is asked about.

With f the plain function of torch, y = f(x.detach(), W, b) + (z - z.detach()) with z = f(x, B.detach(), b.detach()) has
the value of f(x, W, b), its gradients for W and b, and B's gradient for x. Autograd does the rest.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bioplaus_kernels as bk

Plain = Callable[[Tensor, Tensor, Tensor | None], Tensor]

RULES: dict[str, bk.Rule] = {
    "usf": bk.SignSymmetry(),
    "usf-match": bk.SignSymmetry(scale="match"),
    "usf-0.3": bk.SignSymmetry(scale=0.3),
    "frsf": bk.FixedMagnitude(),
    "frsf-normal": bk.FixedMagnitude(entries="normal"),
    "frsf-stored": bk.FixedMagnitude(stored=True),
    "frsf-match": bk.FixedMagnitude(scale="match"),
    "brsf": bk.BatchMagnitude(),
    "brsf-normal": bk.BatchMagnitude(entries="normal"),
    "brsf-match": bk.BatchMagnitude(scale="match"),
    "fa": bk.FeedbackAlignment(),
    "fa-normal": bk.FeedbackAlignment(entries="normal"),
    "fa-constant": bk.FeedbackAlignment(entries="constant"),
    "fa-stored": bk.FeedbackAlignment(stored=True),
    "fa-stored-normal": bk.FeedbackAlignment(entries="normal", stored=True),
    "fa-stored-match": bk.FeedbackAlignment(stored=True, scale="match"),
    "fa-2": bk.FeedbackAlignment(scale=2),
    "fa_signed_init": bk.SignedInit(),
    "fa_signed_init-match": bk.SignedInit(scale="match"),
}


def with_feedback(f: Plain, x: Tensor, weight: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """f(x, weight, bias) whose gradient for x is that of f(x, b, bias)."""
    z = f(x, b.detach(), None if bias is None else bias.detach())
    return f(x.detach(), weight, bias) + (z - z.detach())


def assert_same(actual: Tensor | None, expected: Tensor | None, name: str = "") -> None:
    """Equal in shape and dtype, and in value but for the rounding of float64 sums."""
    assert actual is not None and expected is not None, name
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), name
    assert actual.dtype == torch.float64, name
    if expected.numel():
        error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
        assert error <= 1e-12 * max(size, 1.0), f"{name}: error {error:.3g} where the largest entry is {size:.3g}"


def locally_connected(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The definition: at every position torch's convolution of what it sees, with the position's own weights."""
    d = len(stride)
    conv = (F.conv1d, F.conv2d, F.conv3d)[d - 1]
    x = F.pad(x, [p for pair in reversed(pairs) for p in pair])
    places = _places(x.shape[2:], weight.shape[d + 1 : -1], stride, dilation)
    assert tuple(map(len, places)) == tuple(weight.shape[:d])
    columns = []
    for position in itertools.product(*(range(len(p)) for p in places)):
        window = x[:, :, *(p[i] for p, i in zip(places, position, strict=True))]
        y = conv(window, weight[position].movedim(-1, 1), dilation=tuple(dilation), groups=groups)
        y = y.flatten(1)
        if bias is not None:
            y = y + (bias[position] if bias.dim() > 1 else bias)
        columns.append(y)
    return torch.stack(columns, dim=-1).unflatten(-1, tuple(weight.shape[:d]))


def locally_connected_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_size: Sequence[int],
    stride: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The definition: every position adds, in its place, torch's transposed convolution of its input."""
    d = len(stride)
    conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[d - 1]
    padded = [size + before + after for size, (before, after) in zip(output_size, pairs, strict=True)]
    places = _places(padded, weight.shape[d + 1 : -1], stride, dilation)
    assert tuple(map(len, places)) == tuple(weight.shape[:d])
    total = x.new_zeros(x.shape[0], weight.shape[-1] * groups, *padded)
    for position in itertools.product(*(range(len(p)) for p in places)):
        point = x[:, :, *(slice(i, i + 1) for i in position)]
        y = conv(point, weight[position].movedim(-1, 1), dilation=tuple(dilation), groups=groups)
        window = [p[i] for p, i in zip(places, position, strict=True)]
        margins = [(w.start, size - w.stop) for w, size in zip(window, padded, strict=True)]
        total = total + F.pad(y, [m for pair in reversed(margins) for m in pair])
    inside = (slice(before, before + size) for size, (before, _) in zip(output_size, pairs, strict=True))
    y = total[:, :, *inside]
    if bias is not None:
        y = y + (bias.movedim(-1, 0) if bias.dim() > 1 else bias.reshape(-1, *[1] * d))
    return y


def _places(
    padded: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[list[slice]]:
    # Every window that fits, for each dimension.
    spans = [dil * (k - 1) + 1 for k, dil in zip(kernel, dilation, strict=True)]
    return [
        [slice(start, start + span) for start in range(0, size - span + 1, s)]
        for size, span, s in zip(padded, spans, stride, strict=True)
    ]


@dataclass(frozen=True)
class Case:
    """A layer, its input, and the reason for the case. `pairs` is the padding a locally-connected layer should have."""

    reason: str
    layer: str
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    layout: str = "contiguous"
    pairs: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        return f"{self.layer}-{self.reason}".replace(" ", "_")

    @property
    def d(self) -> int:
        """Spatial dimensions."""
        return int(self.layer[-2]) if self.layer[-1] == "d" else 0

    @property
    def batch_free(self) -> bool:
        """Whether the input has no batch dimension."""
        return len(self.shape) == self.d + 1 and self.d > 0

    def build(self, rule: bk.Rule | str | None, dtype: torch.dtype = torch.float64, device: Any = "cpu") -> Any:
        """The layer, with a few weights exactly zero."""
        layer = getattr(bk.nn, self.layer)(*self.args, **self.kwargs, dtype=dtype, device=device, feedback=rule)
        with torch.no_grad():
            layer.weight.view(-1)[::7] = 0
        if self.layout == "channels_last" and self.layer.startswith("Conv"):
            layer.to(memory_format=(torch.channels_last, torch.channels_last_3d)[self.d - 2])
        layer.reset_feedback()
        return layer

    def input(self, dtype: torch.dtype = torch.float64, device: Any = "cpu") -> Tensor:
        """A random input in the case's layout, which wants a gradient."""
        x = torch.randn(self.shape, dtype=torch.float64).to(device, dtype)
        if self.layout == "channels_last":
            x = x.to(memory_format=(torch.channels_last, torch.channels_last_3d)[self.d - 2])
        elif self.layout == "non-contiguous":
            # Every other element of a transposed buffer: no dimension has stride 1.
            buffer = torch.full((*reversed(self.shape[1:]), self.shape[0], 2), math.nan, dtype=dtype, device=device)
            buffer[..., 0] = x.permute(*range(len(self.shape) - 1, -1, -1))
            x = buffer[..., 0].permute(*range(len(self.shape) - 1, -1, -1))
            assert not x.is_contiguous()
        return x.detach().requires_grad_()

    def plain(self) -> Plain:
        """The layer as a plain function of (input, weight, bias), by torch alone."""
        if self.layer.startswith("Locally"):
            return self._plain_locally_connected()
        twin = self.twin("meta", torch.float64)

        def f(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
            return torch.func.functional_call(twin, parameters, (x,), self.call)

        return f

    def twin(self, device: Any, dtype: torch.dtype) -> torch.nn.Module:
        """The torch.nn layer of the same arguments."""
        return getattr(torch.nn, self.layer)(*self.args, **self.kwargs, device=device, dtype=dtype)

    def _plain_locally_connected(self) -> Plain:
        def every(value: int | tuple[int, ...]) -> tuple[int, ...]:
            return (value,) * self.d if isinstance(value, int) else value

        transposed = "Transpose" in self.layer
        size = every(self.kwargs["output_size"]) if transposed else ()
        stride, dilation = every(self.kwargs.get("stride", 1)), every(self.kwargs.get("dilation", 1))
        groups, pairs = self.kwargs.get("groups", 1), self.pairs or ((0, 0),) * self.d

        def f(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            batched = x.unsqueeze(0) if self.batch_free else x
            if transposed:
                y = locally_connected_transpose(batched, weight, bias, size, stride, pairs, dilation, groups)
            else:
                y = locally_connected(batched, weight, bias, stride, pairs, dilation, groups)
            return y.squeeze(0) if self.batch_free else y

        return f


def _linear_cases() -> list[Case]:
    return [
        Case("plain", "Linear", (5, 7), (4, 5)),
        Case("one vector", "Linear", (5, 7), (5,)),
        Case("sequence", "Linear", (5, 7), (2, 3, 5)),
        Case("four dimensions", "Linear", (5, 7), (2, 3, 2, 5)),
        Case("no bias", "Linear", (5, 7), (4, 5), {"bias": False}),
        Case("empty batch", "Linear", (5, 7), (0, 5)),
        Case("empty inner dimension", "Linear", (5, 7), (3, 0, 5)),
        Case("no input features", "Linear", (0, 7), (2, 3, 0)),
        Case("no output features", "Linear", (5, 0), (2, 3, 5)),
        Case("size 1", "Linear", (1, 1), (1, 1)),
        Case("over a packed word", "Linear", (131, 67), (3, 131)),
        Case("non-contiguous", "Linear", (5, 7), (4, 5), layout="non-contiguous"),
        Case("non-contiguous sequence", "Linear", (5, 7), (2, 3, 5), layout="non-contiguous"),
    ]


def _conv_cases(d: int) -> list[Case]:
    layer = f"Conv{d}d"

    def size(*values: int) -> tuple[int, ...]:
        return values[:d]

    def case(
        reason: str, *spatial: int, kernel: Any = 3, n: int = 2, layout: str = "contiguous", **kwargs: Any
    ) -> Case:
        batch = () if reason == "unbatched" else (n,)
        return Case(reason, layer, (4, 6, kernel), (*batch, 4, *spatial[:d]), kwargs, layout=layout)

    cases = [
        case("unequal kernel and padding", 6, 5, 4, kernel=size(3, 2, 1), padding=size(2, 1, 0)),
        case("stride leaves pixels unread", 8, 7, 5, kernel=size(2, 3, 2), stride=size(3, 3, 2)),
        case("dilation", 7, 6, 5, kernel=size(3, 2, 2), dilation=size(2, 3, 2), padding=1),
        case("groups", 5, 4, 3, groups=2, padding=1),
        case("same, even kernel", 5, 4, 3, kernel=size(4, 2, 3), padding="same"),
        case("same, odd total by dilation", 5, 6, 4, kernel=2, dilation=size(3, 1, 2), padding="same"),
        case("valid", 5, 4, 3, padding="valid"),
        case("no bias", 5, 4, 3, bias=False),
        case("unbatched", 5, 4, 3, stride=2),
        case("empty batch", 5, 4, 3, n=0),
        case("batch of one, output of one", 3, 3, 3, n=1),
        case("non-contiguous", 5, 4, 3, padding=1, layout="non-contiguous"),
        case("circular", 5, 4, 3, padding=size(2, 1, 1), padding_mode="circular"),
        case("reflect", 5, 4, 3, padding=size(2, 1, 1), padding_mode="reflect"),
        case("replicate", 5, 4, 3, padding=size(2, 1, 1), padding_mode="replicate", stride=2),
        case("circular same, even kernel", 5, 4, 3, kernel=2, padding="same", padding_mode="circular"),
        Case("size 1 everywhere", layer, (1, 1, 1), (1, 1, *size(1, 1, 1))),
        Case("depthwise", layer, (4, 8, 3), (2, 4, *size(5, 4, 3)), {"groups": 4}),
    ]
    if d > 1:
        cases.append(case("channels-last", 5, 4, 3, padding=1, layout="channels_last"))
        cases.append(case("channels-last groups", 5, 4, 3, groups=2, layout="channels_last"))
    return cases


def _conv_transpose_cases(d: int) -> list[Case]:
    layer = f"ConvTranspose{d}d"

    def size(*values: int) -> tuple[int, ...]:
        return values[:d]

    def case(
        reason: str,
        *spatial: int,
        kernel: Any = 3,
        n: int = 2,
        layout: str = "contiguous",
        call: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Case:
        batch = () if reason == "unbatched" else (n,)
        return Case(reason, layer, (4, 6, kernel), (*batch, 4, *spatial[:d]), kwargs, call or {}, layout)

    cases = [
        case("unequal kernel and padding", 4, 3, 2, kernel=size(3, 2, 1), padding=size(2, 1, 0)),
        case("output padding", 4, 3, 2, stride=size(3, 2, 2), output_padding=size(2, 1, 0)),
        case("output size", 3, 2, 2, stride=3, call={"output_size": list(size(10, 7, 8))}),
        case("dilation and output padding", 3, 3, 2, dilation=size(2, 3, 2), output_padding=1),
        case("groups", 4, 3, 2, groups=2, stride=2),
        case("no bias", 4, 3, 2, bias=False),
        case("unbatched", 4, 3, 2, stride=2),
        case("empty batch", 4, 3, 2, n=0),
        case("batch of one, input of one", 1, 1, 1, n=1),
        case("non-contiguous", 4, 3, 2, padding=1, layout="non-contiguous"),
        Case("size 1 everywhere", layer, (1, 1, 1), (1, 1, *size(1, 1, 1))),
        Case("depthwise", layer, (4, 8, 3), (2, 4, *size(4, 3, 2)), {"groups": 4}),
    ]
    if d > 1:
        cases.append(case("channels-last", 4, 3, 2, stride=2, layout="channels_last"))
    return cases


def _locally_connected_cases(d: int) -> list[Case]:
    layer = f"LocallyConnected{d}d"

    def size(*values: Any) -> tuple[Any, ...]:
        return values[:d]

    def case(
        reason: str,
        *spatial: int,
        kernel: Any = 3,
        n: int = 2,
        channels: tuple[int, int] = (4, 6),
        pairs: tuple[tuple[int, int], ...] = (),
        layout: str = "contiguous",
        **kwargs: Any,
    ) -> Case:
        batch = () if reason == "unbatched" else (n,)
        kwargs["input_size"] = spatial[:d]
        shape = (*batch, channels[0], *spatial[:d])
        return Case(reason, layer, (*channels, kernel), shape, kwargs, layout=layout, pairs=pairs[:d])

    nested = size((2, 0), (0, 1), (1, 2))
    cases = [
        case("unequal kernel", 5, 4, 3, kernel=size(3, 2, 1)),
        case("padding", 4, 3, 2, padding=size(2, 1, 0), kernel=size(3, 2, 1), pairs=((2, 2), (1, 1), (0, 0))),
        case("asymmetric pairs", 4, 4, 2, padding=nested, pairs=nested, kernel=size(3, 2, 2)),
        case("pairs and stride", 6, 5, 3, padding=nested, pairs=nested, kernel=2, stride=size(2, 3, 2)),
        case("same, even kernel", 4, 3, 2, kernel=size(4, 2, 2), padding="same", pairs=((1, 2), (0, 1), (0, 1))),
        # 7 -> 4 by stride 2 needs 3·2 + 3 − 7 = 2; 5 -> 2 by stride 3 needs 3 + 3 − 5 = 1; 3 -> 2 needs 2 + 3 − 3 = 2.
        case("same, stride", 7, 5, 3, stride=size(2, 3, 2), padding="same", pairs=((1, 1), (0, 1), (1, 1))),
        case("same where stride exceeds kernel", 5, 4, 3, kernel=1, stride=2, padding="same"),
        case("valid", 4, 3, 3, padding="valid"),
        case("stride leaves pixels unread", 8, 6, 3, kernel=2, stride=size(3, 3, 2)),
        case("dilation", 7, 5, 4, kernel=size(3, 2, 2), dilation=size(2, 3, 2)),
        case("groups", 4, 3, 3, kernel=2, groups=2),
        case("depthwise", 4, 3, 3, kernel=2, groups=4, channels=(4, 8)),
        case("bias per channel", 4, 3, 3, kernel=2, bias_per="channel"),
        case("no bias", 4, 3, 3, kernel=2, bias=False),
        case("unbatched", 4, 3, 3, kernel=2),
        case("empty batch", 4, 3, 3, kernel=2, n=0),
        case("one position", 3, 3, 3, n=1),
        case("size 1 everywhere", 1, 1, 1, kernel=1, n=1, channels=(1, 1)),
        case("non-contiguous", 4, 3, 3, kernel=2, layout="non-contiguous"),
    ]
    if d > 1:
        cases.append(case("channels-last", 4, 3, 3, kernel=2, layout="channels_last"))
    return cases


def _transposed(case: Case) -> Case:
    # The transpose of a locally-connected layer: narrow end in, wide end out.
    narrow = getattr(bk.nn, case.layer)(*case.args, **case.kwargs, device="meta").output_size
    kwargs = {("output_size" if name == "input_size" else name): value for name, value in case.kwargs.items()}
    wide, channels, kernel = case.args
    batch = case.shape[: -case.d - 1]
    layer = case.layer.replace("Connected", "ConnectedTranspose")
    args, shape = (channels, wide, kernel), (*batch, channels, *narrow)
    return Case(case.reason, layer, args, shape, kwargs, layout=case.layout, pairs=case.pairs)


TORCH_CASES = [
    *_linear_cases(),
    *(case for d in (1, 2, 3) for case in _conv_cases(d)),
    *(case for d in (1, 2, 3) for case in _conv_transpose_cases(d)),
]
LC_CASES = [case for d in (1, 2, 3) for case in _locally_connected_cases(d)]
LC_CASES += [_transposed(case) for case in LC_CASES]
CASES = TORCH_CASES + LC_CASES


def _rich() -> list[Case]:
    # One case a layer class with much going on, for what is tried with every rule.
    rich = [Case("rich", "Linear", (9, 7), (2, 3, 9))]
    for d in (1, 2, 3):
        stride, kernel = (2, 1, 1)[:d], (3, 2, 2)[:d]
        options: dict[str, Any] = {"stride": stride, "padding": 1, "groups": 2}
        rich.append(Case("rich", f"Conv{d}d", (4, 6, kernel), (2, 4, *(6, 4, 3)[:d]), options))
        rich.append(Case("rich", f"ConvTranspose{d}d", (4, 6, kernel), (2, 4, *(4, 3, 2)[:d]), options))
        pairs = ((1, 0), (0, 1), (0, 0))[:d]
        options = {"stride": stride, "padding": pairs, "groups": 2, "input_size": (6, 3, 2)[:d]}
        lc = Case("rich", f"LocallyConnected{d}d", (4, 6, kernel), (2, 4, *(6, 3, 2)[:d]), options, pairs=pairs)
        rich += [lc, _transposed(lc)]
    return rich


RICH = _rich()
