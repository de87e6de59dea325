"""Locally-connected layers beside convolutions, their transposes, and their geometry."""

import math
from typing import Any

import pytest
import torch
from oracle import LC_CASES, Case, assert_same, with_feedback
from torch import Tensor

import bioplaus_kernels as bk

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

FORWARD = [case for case in LC_CASES if "Transpose" not in case.layer]

# Arguments of a convolution (channels 4 -> 6) and the size of its input.
CONVOLUTIONS: list[tuple[int, tuple[int, ...], dict[str, Any]]] = [
    (1, (7,), {"kernel_size": 3}),
    (1, (8,), {"kernel_size": 3, "stride": 3, "padding": 2}),
    (1, (6,), {"kernel_size": 4, "padding": "same"}),
    (1, (8,), {"kernel_size": 2, "dilation": 3, "groups": 2, "bias": False}),
    (2, (5, 4), {"kernel_size": (3, 2), "padding": (1, 0)}),
    (2, (6, 5), {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2}),
    (2, (4, 4), {"kernel_size": 2, "padding": "same", "dilation": (1, 3)}),
    (2, (4, 4), {"kernel_size": 2, "padding": "valid"}),
    (1, (5,), {"kernel_size": 4, "padding": "same", "padding_mode": "circular"}),
    (2, (5, 4), {"kernel_size": (3, 2), "padding": (2, 1), "padding_mode": "reflect", "stride": 2}),
    (3, (3, 3, 2), {"kernel_size": 2, "padding": "same", "padding_mode": "replicate", "groups": 2}),
    (3, (4, 3, 3), {"kernel_size": 2, "padding": 1, "stride": 2}),
    (3, (3, 3, 3), {"kernel_size": (2, 1, 3), "padding": "same"}),
]
convolutions = pytest.mark.parametrize("d, size, options", CONVOLUTIONS, ids=str)


def pair(d: int, size: tuple[int, ...], options: dict[str, Any], feedback: Any = None) -> tuple[Any, Any, Tensor]:
    """A convolution, the same untied, and an input."""
    conv = getattr(bk.nn, f"Conv{d}d")(4, 6, **options, dtype=torch.float64, feedback=feedback)
    layer = getattr(bk.nn, f"LocallyConnected{d}d").from_conv(conv, size)
    return conv, layer, torch.randn(3, 4, *size, dtype=torch.float64, requires_grad=True)


@convolutions
def test_replicated_weights_are_a_convolution(d: int, size: tuple[int, ...], options: dict[str, Any]) -> None:
    conv, layer, x = pair(d, size, options)
    y, expected = layer(x), conv(x)
    assert_same(y, expected)
    assert tuple(layer.output_size) == y.shape[2:]
    g = torch.randn(y.shape, dtype=torch.float64)
    grads = torch.autograd.grad(y, (x, *layer.parameters()), g)
    expected_grads = torch.autograd.grad(expected, (x, *conv.parameters()), g)
    assert_same(grads[0], expected_grads[0], "input")
    # A shared weight's gradient is the sum over the positions it is used at.
    positions = tuple(range(d))
    assert_same(grads[1].sum(positions).movedim(-1, 1), expected_grads[1], "weight")
    if conv.bias is not None:
        assert_same(grads[2].sum(positions), expected_grads[2], "bias")


@convolutions
def test_untied_convolution_keeps_its_rule(d: int, size: tuple[int, ...], options: dict[str, Any]) -> None:
    # uSF needs no draw, so the untied layer's B is the convolution's at each position, by the same scale.
    for rule in (bk.SignSymmetry(), bk.SignSymmetry(scale="match"), bk.SignSymmetry(scale="xavier")):
        conv, layer, x = pair(d, size, options, rule)
        assert layer.feedback == rule
        assert_same(layer.feedback_matrix()[(0,) * d].movedim(-1, 1), conv.feedback_matrix())
        y, expected = layer(x), conv(x)
        g = torch.randn(y.shape, dtype=torch.float64)
        assert_same(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(expected, x, g)[0])


def test_from_conv_of_torch_nn_and_other_rules() -> None:
    conv = torch.nn.Conv2d(2, 3, 2)
    layer = bk.nn.LocallyConnected2d.from_conv(conv, 4, feedback="fa")
    assert (
        layer.feedback == bk.FeedbackAlignment() and layer.input_size == (4, 4) and layer.weight.dtype == torch.float32
    )
    with torch.no_grad():
        conv.weight.zero_()
    assert layer.weight.count_nonzero() == layer.weight.numel(), "the weights are copies"
    assert bk.nn.LocallyConnected2d.from_conv(conv, (4, 5)).output_size == (3, 4)
    for bad, error in ((torch.nn.Conv1d(2, 3, 2), TypeError), (torch.nn.Linear(2, 3), TypeError)):
        with pytest.raises(error, match="conv"):
            bk.nn.LocallyConnected2d.from_conv(bad, 4)


class _Standardised(torch.nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


class _Scaled(torch.nn.Conv2d):
    def _conv_forward(self, *args: Any) -> Tensor:
        return 2 * super()._conv_forward(*args)


class _Named(torch.nn.Conv2d):
    """Computes what torch.nn's does."""


def test_from_conv_takes_a_forward_that_it_knows() -> None:
    wrapped = torch.nn.Conv2d(2, 3, 2)
    wrapped.forward = lambda x: 2 * torch.nn.Conv2d.forward(wrapped, x)
    for conv in (_Standardised(2, 3, 2), _Scaled(2, 3, 2), wrapped):
        with pytest.raises(TypeError, match=r"conv: expected a module with torch\.nn\.Conv2d's forward"):
            bk.nn.LocallyConnected2d.from_conv(conv, 4)
    normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(2, 3, 2))
    torch.nn.init.ones_(normed.parametrizations.weight.original0)
    bk.register(_Standardised, torch.nn.Conv2d, weight=lambda m: m.weight - m.weight.mean())
    converted = [_Named(2, 3, 2), _Standardised(2, 3, 2)]
    for conv in converted:
        bk.convert_(conv, "usf")
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    for conv in (normed, _Named(2, 3, 2), *converted):
        layer = bk.nn.LocallyConnected2d.from_conv(conv.double(), 4)
        assert_same(layer(x), conv(x))
        assert layer.weight.requires_grad and layer.weight.is_leaf


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_transpose_is_the_input_gradient_of_its_twin(case: Case) -> None:
    layer = case.build(None)
    d, (wide, narrow, kernel) = case.d, case.args
    options = {("output_size" if name == "input_size" else name): v for name, v in case.kwargs.items()}
    twin = getattr(bk.nn, f"LocallyConnectedTranspose{d}d")(narrow, wide, kernel, **options, dtype=torch.float64)
    assert twin.weight.shape == layer.weight.shape
    assert (twin.input_size, twin.output_size) == (layer.output_size, layer.input_size)
    with torch.no_grad():
        twin.weight.copy_(layer.weight)
        if twin.bias is not None:
            twin.bias.zero_()
    x = case.input()
    y = layer(x)
    g = torch.randn(y.shape, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(y, x, g.detach())
    back = twin(g)
    assert_same(back, expected)
    # And the twin's own input gradient is the layer without its bias.
    (forth,) = torch.autograd.grad(back, g, x.detach())
    bias = 0 if layer.bias is None else layer(torch.zeros_like(x)).detach()
    assert_same(forth, (y - bias).detach())


@pytest.mark.parametrize("feedback", ["usf", "fa"])
def test_target_propagation_pair_trains_apart(feedback: str) -> None:
    # f and its inverse g have weights and feedback of their own.
    f = bk.nn.LocallyConnected2d(3, 4, 2, stride=2, input_size=6, dtype=torch.float64, feedback=feedback)
    g = bk.nn.LocallyConnectedTranspose2d(4, 3, 2, stride=2, output_size=6, dtype=torch.float64, feedback=feedback)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    loss = (g(f(x)) - x.detach()).square().mean()
    loss.backward()
    assert all(p.grad.count_nonzero() for p in (*f.parameters(), *g.parameters(), x))


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize(
    "kernel, stride, dilation", [(1, 1, 1), (2, 1, 1), (3, 2, 1), (2, 3, 1), (3, 1, 2), (4, 3, 3), (5, 2, 1), (9, 4, 1)]
)
def test_same_padding(size: int, kernel: int, stride: int, dilation: int) -> None:
    # TensorFlow's rule: ceil(in / stride) outputs, the least padding that gives them, and the odd one at the end.
    layer = bk.nn.LocallyConnected1d(1, 1, kernel, stride, "same", dilation, input_size=size, bias=False)
    out = math.ceil(size / stride)
    assert layer.output_size == (out,)
    total = max((out - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    nested = bk.nn.LocallyConnected1d(
        1, 1, kernel, stride, [(total // 2, total - total // 2)], dilation, input_size=size, bias=False
    )
    x = torch.randn(2, 1, size)
    nested.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), nested(x))
    span = dilation * (kernel - 1) + 1
    if total and size + total - 1 >= span:
        # One less does not do.
        shorter = bk.nn.LocallyConnected1d(1, 1, kernel, stride, [(0, total - 1)], dilation, input_size=size)
        assert shorter.output_size < (out,)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_weight_layout(d: int) -> None:
    size, kernel, out = (6, 5, 4)[:d], (3, 2, 1)[:d], (4, 4, 4)[:d]
    options = {"groups": 2, "padding": (0, 0, 0)[:d]}
    layer = getattr(bk.nn, f"LocallyConnected{d}d")(4, 6, kernel, **options, input_size=size)
    assert layer.weight.shape == (*out, 6, *kernel, 2) and layer.bias.shape == (*out, 6)
    back = getattr(bk.nn, f"LocallyConnectedTranspose{d}d")(6, 4, kernel, **options, output_size=size)
    assert back.weight.shape == (*out, 6, *kernel, 2) and back.bias.shape == (*size, 4)
    per_channel = getattr(bk.nn, f"LocallyConnected{d}d")(4, 6, kernel, input_size=size, bias_per="channel")
    assert per_channel.bias.shape == (6,)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_one_weight_moves_one_input_to_one_output(d: int) -> None:
    # What the layout means: weight[p, o, t, c] takes x[c, p * stride + t * dilation - before] to y[o, p].
    stride, dilation, before = (2, 1, 1)[:d], (1, 2, 1)[:d], (1, 0, 1)[:d]
    size, kernel = (5, 4, 2)[:d], (2, 2, 1)[:d]
    layer = getattr(bk.nn, f"LocallyConnected{d}d")(
        4, 6, kernel, stride, [(b, 0) for b in before], dilation, groups=2, input_size=size, bias=False
    )
    p, o, t, c = (1, 1, 1)[:d], 4, (1, 1, 0)[:d], 1
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[(*p, o, *t, c)] = 3.0
    x = torch.randn(1, 4, *size)
    expected = torch.zeros(1, 6, *layer.output_size)
    place = tuple(pi * s + ti * dil - b for pi, s, ti, dil, b in zip(p, stride, t, dilation, before, strict=True))
    # Output channel 4 is in the second group of three, whose input channels are 2 and 3.
    expected[(0, o, *p)] = 3.0 * x[(0, 2 + c, *place)]
    assert torch.equal(layer(x), expected)


def test_lower_dimensions_are_higher_with_size_1() -> None:
    flat = bk.nn.LocallyConnected1d(2, 3, 2, 2, [(1, 0)], input_size=5, dtype=torch.float64)
    deep = bk.nn.LocallyConnected3d(
        2, 3, (1, 1, 2), (1, 1, 2), [(0, 0), (0, 0), (1, 0)], input_size=(1, 1, 5), dtype=torch.float64
    )
    with torch.no_grad():
        deep.weight.copy_(flat.weight.reshape(deep.weight.shape))
        deep.bias.copy_(flat.bias.reshape(deep.bias.shape))
    x = torch.randn(2, 2, 5, dtype=torch.float64)
    assert_same(deep(x[:, :, None, None]).flatten(2), flat(x))


def test_initialisation_is_that_of_a_convolution() -> None:
    layer = bk.nn.LocallyConnected2d(8, 16, 3, groups=2, input_size=(12, 12))
    bound = 1 / math.sqrt(4 * 9)
    for p in layer.parameters():
        assert 0.99 * bound < p.abs().max() <= bound
    # Uniform: mean 0 and variance bound²/3, to five standard errors.
    n = layer.weight.numel()
    assert abs(layer.weight.mean()) < 5 * bound / math.sqrt(3 * n)
    assert abs(layer.weight.var() / (bound**2 / 3) - 1) < 5 * math.sqrt(0.8 / n)
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)


def test_functional_takes_nested_padding_and_bias_of_either_shape() -> None:
    x, weight = torch.randn(2, 4, 3, 4, dtype=torch.float64), torch.randn(4, 2, 6, 2, 3, 4, dtype=torch.float64)
    pairs, b = ((1, 1), (0, 0)), torch.randn(4, 2, 6, 2, 3, 4, dtype=torch.float64)
    for bias in (None, torch.randn(6).double(), torch.randn(4, 2, 6).double()):
        leaf = x.clone().requires_grad_()
        y = bk.functional.locally_connected2d(leaf, weight, bias, padding=pairs, feedback=b)
        case = Case("", "LocallyConnected2d", (4, 6, (2, 3)), tuple(x.shape), {"input_size": (3, 4)}, pairs=pairs)
        expected = with_feedback(case.plain(), leaf, weight, b, bias)
        assert_same(y, expected)
        assert_same(*(torch.autograd.grad(t.square().sum(), leaf)[0] for t in (y, expected)))
