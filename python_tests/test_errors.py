"""Wrong arguments of the rules and layers: errors that name the argument, before anything runs."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import LAYERS, build, call
from torch import Tensor

import bioplaus_kernels as bk
from bioplaus_kernels import nn

pytestmark = pytest.mark.usefixtures("one_thread")
Wrong = tuple[str, Callable[[], Any], type[Exception], str]


def x(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """An input that wants a gradient."""
    return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)


def w(*shape: int, **kwargs: Any) -> Tensor:
    return torch.randn(shape, **kwargs)


def check(wrong: Wrong) -> None:
    _, run, error, match = wrong
    with pytest.raises(error, match=match):
        run()


NAN, INTEGER = math.nan, torch.int64

RULES: list[Wrong] = [
    ("NaN scale", lambda: bk.SignSymmetry(scale=NAN), ValueError, "scale: expected a positive finite number.*got nan"),
    ("infinite scale", lambda: bk.FeedbackAlignment(scale=math.inf), ValueError, "scale: expected.*got inf"),
    ("zero scale", lambda: bk.FixedMagnitude(scale=0), ValueError, "scale: expected a positive.*got 0"),
    ("negative scale", lambda: bk.BatchMagnitude(scale=-1.0), ValueError, "scale: expected a positive.*got -1.0"),
    ("unknown scale", lambda: bk.SignedInit(scale="kaiming"), ValueError, "scale: .*'xiao', 'xavier'.*got 'kaiming'"),
    ("boolean scale", lambda: bk.SignSymmetry(scale=True), ValueError, "scale: expected.*got True"),
    ("tensor scale", lambda: bk.SignSymmetry(scale=torch.tensor(1.0)), ValueError, "scale: expected.*got tensor"),
    ("unknown entries", lambda: bk.FeedbackAlignment(entries="gauss"), ValueError, "entries: .*'uniform'.*got 'gauss'"),
    ("constant |M|", lambda: bk.FixedMagnitude(entries="constant"), ValueError, "entries: expected.*got 'constant'"),
    ("stored", lambda: bk.FixedMagnitude(stored=1), TypeError, "stored: expected True or False, got 1"),
    (
        "unknown rule",
        lambda: nn.Linear(2, 2, feedback="kpp"),
        ValueError,
        "feedback: expected one of backprop, usf.*'kpp'",
    ),
    ("rule's class", lambda: nn.Linear(2, 2, feedback=bk.Backprop), TypeError, "feedback: expected a rule, its name"),
    ("class", lambda: nn.Linear(2, 2, feedback=bk.SignSymmetry), TypeError, "its name or None, got the class SignS"),
    ("number", lambda: nn.Conv2d(2, 2, 1, feedback=1), TypeError, "feedback: expected a rule, its name.*got int"),
]

LAYER_BUILDS: list[Wrong] = [
    *(
        (
            f"complex {rule}",
            lambda rule=rule: nn.Linear(2, 2, feedback=rule, dtype=torch.complex64),
            TypeError,
            f"feedback: '{rule}' takes a floating weight, got weight of torch.complex64",
        )
        for rule in ("usf", "frsf", "brsf", "fa", "fa_signed_init")
    ),
    (
        "groups",
        lambda: nn.Conv2d(4, 6, 3, groups=3, feedback="fa"),
        ValueError,
        "in_channels must be divisible by groups",
    ),
    (
        "lc groups",
        lambda: nn.LocallyConnected2d(4, 6, 3, input_size=5, groups=4),
        ValueError,
        "groups: expected a divisor of out_channels=6, got 4",
    ),
    (
        "lc no groups",
        lambda: nn.LocallyConnected2d(4, 6, 3, input_size=5, groups=0),
        ValueError,
        "groups: expected at least 1, got 0",
    ),
    (
        "lc kernel",
        lambda: nn.LocallyConnected2d(4, 6, 4, input_size=(5, 2), padding=(0, 0)),
        ValueError,
        r"input_size: expected a padded size of at least the dilated kernel.*got \(5, 2\)",
    ),
    (
        "transposed lc kernel",
        lambda: nn.LocallyConnectedTranspose1d(4, 6, 3, output_size=4, dilation=2),
        ValueError,
        r"output_size: expected a padded size",
    ),
    (
        "lc kernel of one half",
        lambda: nn.LocallyConnected1d(4, 6, 1.5, input_size=5),
        ValueError,
        "kernel_size: expected an integer of at least 1 or 1 of them, got 1.5",
    ),
    (
        "lc strides",
        lambda: nn.LocallyConnected2d(4, 6, 3, (1, 2, 3), input_size=5),
        ValueError,
        r"stride: expected an integer of at least 1 or 2 of them, got \(1, 2, 3\)",
    ),
    (
        "lc negative padding",
        lambda: nn.LocallyConnected1d(4, 6, 3, padding=-1, input_size=5),
        ValueError,
        "padding: expected.*got -1",
    ),
    (
        "lc padding by name",
        lambda: nn.LocallyConnected1d(4, 6, 3, padding="full", input_size=5),
        ValueError,
        "padding: expected integers, pairs, 'same' or 'valid', got 'full'",
    ),
    (
        "lc bias",
        lambda: nn.LocallyConnected1d(4, 6, 3, bias_per="layer", input_size=5),
        ValueError,
        "bias_per: expected 'position' or 'channel', got 'layer'",
    ),
    (
        "lc without size",
        lambda: nn.LocallyConnected1d(4, 6, 3),
        TypeError,
        "input_size",
    ),
    (
        "from_conv of another dimension",
        lambda: nn.LocallyConnected2d.from_conv(torch.nn.Conv1d(1, 1, 1), 3),
        TypeError,
        "conv: expected a torch.nn.Conv2d, got Conv1d",
    ),
    (
        "from_conv padding mode",
        lambda: nn.LocallyConnected1d.from_conv(torch.nn.Conv1d(1, 1, 1, padding=4, padding_mode="circular"), 3),
        ValueError,
        r"padding: expected at most 3 of 'circular' in a dimension of size 3, got \(4, 4\)",
    ),
]

KERNEL = "input: expected a padded spatial size of at least the dilated kernel"


def attention(*shapes: tuple[int, ...], **kwargs: Any) -> Any:
    return nn.MultiheadAttention(8, 2, batch_first=True, feedback="fa")(*(x(*shape) for shape in shapes), **kwargs)


LAYER_CALLS: list[Wrong] = [
    (
        "linear features",
        lambda: nn.Linear(4, 3, feedback="usf")(x(2, 5)),
        ValueError,
        r"input: expected 4 features in the last dimension, got shape \(2, 5\)",
    ),
    (
        "nested tensor",
        lambda: nn.Linear(4, 3, feedback="usf")(
            torch.nested.nested_tensor([x(2, 4), x(3, 4)], layout=torch.jagged, requires_grad=True)
        ),
        TypeError,
        r"input: expected a dense tensor, such as the values\(\) of a nested one, got a nested tensor",
    ),
    ("linear scalar", lambda: nn.Linear(4, 3, feedback="usf")(x()), ValueError, r"input: expected 4 features.*\(\)"),
    (
        "conv rank",
        lambda: nn.Conv2d(4, 6, 3, feedback="fa")(x(4, 5)),
        ValueError,
        r"input: expected 4 dimensions, or 3 without a batch, got shape \(4, 5\)",
    ),
    (
        "conv channels",
        lambda: nn.Conv2d(4, 6, 3, feedback="fa", groups=2)(x(2, 3, 5, 5)),
        ValueError,
        "input: expected 4 channels, got",
    ),
    ("conv kernel", lambda: nn.Conv2d(4, 6, 5, padding=1, feedback="fa")(x(2, 4, 2, 5)), ValueError, KERNEL),
    ("dilated kernel", lambda: nn.Conv1d(4, 6, 3, dilation=2, feedback="fa")(x(2, 4, 4)), ValueError, KERNEL),
    (
        "transposed rank",
        lambda: nn.ConvTranspose1d(4, 6, 3, feedback="fa")(x(2, 1, 4, 5)),
        ValueError,
        "input: expected 3 dimensions, or 2 without a batch",
    ),
    (
        "transposed channels",
        lambda: nn.ConvTranspose2d(4, 6, 3, feedback="fa")(x(2, 3, 5, 5)),
        ValueError,
        "input: expected 4 channels, got",
    ),
    (
        "lc size",
        lambda: nn.LocallyConnected2d(4, 6, 3, input_size=5, feedback="fa")(x(2, 4, 5, 6)),
        ValueError,
        r"input: expected 4 channels and spatial size \(5, 5\), got shape \(2, 4, 5, 6\)",
    ),
    (
        "lc channels",
        lambda: nn.LocallyConnected2d(4, 6, 3, input_size=5, feedback="fa")(x(2, 3, 5, 5)),
        ValueError,
        "input: expected 4 channels",
    ),
    (
        "lc rank",
        lambda: nn.LocallyConnectedTranspose2d(4, 6, 3, output_size=5, feedback="fa")(x(4, 3)),
        ValueError,
        "input: expected 4 dimensions, or 3 without a batch",
    ),
    (
        "attention rank",
        lambda: attention((8,), (8,), (8,)),
        ValueError,
        "query, key, value: expected 3 dimensions each",
    ),
    (
        "attention lengths",
        lambda: attention((2, 3, 8), (2, 4, 8), (2, 5, 8)),
        ValueError,
        "key, value: expected equal lengths",
    ),
    (
        "attention batch",
        lambda: attention((2, 3, 8), (1, 3, 8), (1, 3, 8)),
        ValueError,
        "key, value: expected equal lengths, and query's batch",
    ),
    ("attention features", lambda: attention(*[(2, 3, 7)] * 3), ValueError, "input: expected 8 features"),
    (
        "attention mask",
        lambda: attention(*[(2, 3, 8)] * 3, attn_mask=torch.zeros(4, 4)),
        ValueError,
        r"attn_mask: expected shape \(3, 3\) or \(4, 3, 3\), got \(4, 4\)",
    ),
    (
        "attention padding mask",
        lambda: attention(*[(2, 3, 8)] * 3, key_padding_mask=torch.zeros(3, 3)),
        ValueError,
        r"key_padding_mask: expected shape \(2, 3\), got \(3, 3\)",
    ),
    (
        "attention mask dtype",
        lambda: attention(*[(2, 3, 8)] * 3, attn_mask=torch.zeros(3, 3, dtype=INTEGER)),
        TypeError,
        "attn_mask: expected bool or a floating dtype, got torch.int64",
    ),
    (
        "attention causal",
        lambda: attention(*[(2, 3, 8)] * 3, is_causal=True),
        ValueError,
        "attn_mask: expected a mask with is_causal=True",
    ),
]


def short(wrong: Wrong) -> str:
    return wrong[0].replace(" ", "_")


@pytest.mark.parametrize("wrong", RULES, ids=short)
def test_rules(wrong: Wrong) -> None:
    check(wrong)


@pytest.mark.parametrize("wrong", LAYER_BUILDS, ids=short)
def test_building_a_layer(wrong: Wrong) -> None:
    check(wrong)


@pytest.mark.parametrize("wrong", LAYER_CALLS, ids=short)
def test_calling_a_layer(wrong: Wrong) -> None:
    check(wrong)


@pytest.mark.parametrize("name", LAYERS)
def test_dtype_and_device_of_the_input(name: str) -> None:
    layer, good = build(name, "fa")
    with pytest.raises(TypeError, match=r"input1?: expected torch\.float32, as weight, got torch\.float64"):
        call(layer, good.detach().double().requires_grad_())
    with pytest.raises(ValueError, match=r"input1?: expected a tensor on cpu, as weight, got one on meta"):
        call(layer, good.detach().to("meta").requires_grad_())


def test_a_layer_made_complex_afterwards() -> None:
    layer = nn.Linear(4, 3, feedback="usf").to(torch.complex64)
    with pytest.raises(TypeError, match=r"input: expected float32.*got torch\.complex64"):
        layer(x(2, 4, dtype=torch.complex64))
