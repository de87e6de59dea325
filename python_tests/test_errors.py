"""Wrong arguments: an error that names the argument, says what it wants and what it got, before anything runs."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import LAYERS, build, call
from torch import Tensor

import bioplaus_kernels as bk
from bioplaus_kernels import functional as F
from bioplaus_kernels import nn, ops
from bioplaus_kernels.backends import reference
from bioplaus_kernels.feedback import feedback_key

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
        "groups: expected an integer of at least 1, got 0",
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
        lambda: nn.LocallyConnected1d.from_conv(torch.nn.Conv1d(1, 1, 1, padding_mode="circular"), 3),
        ValueError,
        "conv: expected padding_mode='zeros', got padding_mode='circular'",
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

V, K, L, Z = w(3, 4), w(6, 2, 3, 3), w(3, 2, 3, 4), feedback_key(0)  # linear, conv, locally-connected weights; a key

FUNCTIONAL: list[Wrong] = [
    (
        "weight rank",
        lambda: F.linear(x(2, 4), w(4), feedback="usf"),
        ValueError,
        r"weight: expected 2 dimensions.*\(4,\)",
    ),
    ("features", lambda: F.linear(x(2, 5), V, feedback="usf"), ValueError, "input: expected 4 features"),
    (
        "bias",
        lambda: F.linear(x(2, 4), V, w(4), feedback="usf"),
        ValueError,
        r"bias: expected shape \(3,\), got \(4,\)",
    ),
    (
        "weight dtype",
        lambda: F.linear(x(2, 4), V.to(torch.complex64), feedback="usf"),
        TypeError,
        "weight: expected float32.*got torch.complex64",
    ),
    (
        "input dtype",
        lambda: F.linear(torch.ones(2, 4, dtype=INTEGER), V, feedback="usf"),
        TypeError,
        "input: expected float32.*got torch.int64",
    ),
    (
        "mixed dtypes",
        lambda: F.linear(x(2, 4, dtype=torch.float64), V, feedback="usf"),
        TypeError,
        "input: expected torch.float32, as weight, got torch.float64",
    ),
    (
        "bias dtype",
        lambda: F.linear(x(2, 4), V, w(3, dtype=torch.float64), feedback="usf"),
        TypeError,
        "input: expected torch.float64, as bias, got torch.float32",
    ),
    (
        "device",
        lambda: F.linear(x(2, 4), w(3, 4, device="meta"), feedback="usf"),
        ValueError,
        "input: expected a tensor on meta, as weight, got one on cpu",
    ),
    ("rule", lambda: F.linear(x(2, 4), V, feedback="dfa"), ValueError, "feedback: expected one of .*got 'dfa'"),
    ("feedback", lambda: F.conv2d(x(2, 4, 5, 5), K, groups=2, feedback=2), TypeError, "feedback: expected a rule"),
    ("B's shape", lambda: F.linear(x(2, 4), V, feedback=V.t()), ValueError, r"feedback: expected shape \(3, 4\)"),
    (
        "B's dtype",
        lambda: F.linear(x(2, 4), V, feedback=V.long()),
        TypeError,
        "feedback: expected float32.*torch.int64",
    ),
    ("B's device", lambda: F.linear(x(2, 4), V, feedback=V.to("meta")), ValueError, "feedback: .* on cpu, got meta"),
    ("rule with state", lambda: F.linear(x(2, 4), V, feedback="fa_signed_init"), ValueError, "feedback: .*keeps state"),
    (
        "stored rule",
        lambda: F.linear(x(2, 4), V, feedback=bk.FeedbackAlignment(stored=True)),
        ValueError,
        "feedback: .*keeps state",
    ),
    (
        "no key",
        lambda: F.linear(x(2, 4), V, feedback="fa"),
        ValueError,
        r"key: expected a tensor from.*feedback_key.*None",
    ),
    (
        "idle key",
        lambda: F.linear(x(2, 4), V, feedback="usf", key=Z),
        ValueError,
        "key: expected None with feedback='usf'",
    ),
    ("key beside B", lambda: F.linear(x(2, 4), V, feedback=V, key=Z), ValueError, "key: expected None where"),
    ("key of backprop", lambda: F.linear(x(2, 4), V, key=Z), ValueError, "key: expected None where"),
    ("key's dtype", lambda: F.linear(x(2, 4), V, feedback="fa", key=w(3)), TypeError, "key: expected int64"),
    ("key's shape", lambda: F.linear(x(2, 4), V, feedback="fa", key=Z[:2]), ValueError, r"key: expected shape \(3,\)"),
    ("key's type", lambda: F.linear(x(2, 4), V, feedback="fa", key=7), TypeError, "key: expected a tensor.*got int"),
    (
        "key's device",
        lambda: F.linear(x(2, 4), V, feedback="fa", key=Z.to("meta")),
        ValueError,
        "key: .* on cpu.*on meta",
    ),
    ("conv weight", lambda: F.conv2d(x(2, 4, 5, 5), K[0], feedback="usf"), ValueError, "weight: expected 4 dimensions"),
    (
        "conv groups",
        lambda: F.conv2d(x(2, 8, 5, 5), K, groups=4, feedback="usf"),
        ValueError,
        "groups: expected a divisor of the weight's 6 output channels, got 4",
    ),
    ("no groups", lambda: F.conv2d(x(2, 4, 5, 5), K, groups=0, feedback="usf"), ValueError, "groups: expected.*got 0"),
    (
        "transposed groups",
        lambda: F.conv_transpose2d(x(2, 6, 5, 5), K, groups=4, feedback="usf"),
        ValueError,
        "groups: expected a divisor of the weight's 6 input channels, got 4",
    ),
    (
        "conv kernel",
        lambda: F.conv2d(x(2, 4, 2, 2), K, groups=2, feedback="usf"),
        ValueError,
        KERNEL,
    ),
    (
        "stride",
        lambda: F.conv2d(x(2, 4, 5, 5), K, None, 0, groups=2, feedback="usf"),
        ValueError,
        "stride: expected an integer of at least 1 or 2 of them, got 0",
    ),
    (
        "same and stride",
        lambda: F.conv2d(x(2, 4, 5, 5), K, None, 2, "same", groups=2, feedback="usf"),
        ValueError,
        "padding: expected integers where stride is not 1, got 'same'",
    ),
    (
        "padding",
        lambda: F.conv2d(x(2, 4, 5, 5), K, None, 1, "full", groups=2, feedback="usf"),
        ValueError,
        "padding: expected integers, 'same' or 'valid', got 'full'",
    ),
    (
        "output padding",
        lambda: F.conv_transpose2d(x(2, 6, 5, 5), K, None, 2, 0, 2, groups=2, feedback="usf"),
        ValueError,
        r"output_padding: expected less than stride \(2, 2\) or dilation \(1, 1\), got \(2, 2\)",
    ),
    ("lc rank", lambda: F.locally_connected1d(x(4), L, feedback="usf"), ValueError, "input: expected 3 dimensions"),
    (
        "lc weight",
        lambda: F.locally_connected1d(x(1, 4, 5), V, feedback="usf"),
        ValueError,
        "weight: expected 4 dimensions",
    ),
    (
        "lc positions",
        lambda: F.locally_connected1d(x(1, 4, 6), L, feedback="usf"),
        ValueError,
        r"weight: expected positions \(4,\) for spatial input \(6,\), got \(3,\)",
    ),
    ("lc kernel", lambda: F.locally_connected1d(x(1, 4, 2), L, feedback="usf"), ValueError, KERNEL),
    (
        "lc channels",
        lambda: F.locally_connected1d(x(1, 4, 5), L, groups=2, feedback="usf"),
        ValueError,
        "input: expected 8 channels",
    ),
    (
        "lc bias",
        lambda: F.locally_connected1d(x(1, 4, 5), L, w(3), feedback="usf"),
        ValueError,
        r"bias: expected .*\(2,\)",
    ),
    (
        "lc device",
        lambda: F.locally_connected1d(x(1, 4, 5, device="meta"), L, feedback="usf"),
        ValueError,
        "input: expected a tensor on cpu",
    ),
]


def b(**given: Any) -> Any:
    """feedback_weight, right but for what is given."""
    right = {
        "weight": None,
        "signs": None,
        "magnitude": None,
        "key": Z,
        "entries": "uniform",
        "scale": 1.0,
        "size": (3, 4),
    }
    return ops.feedback_weight(*(right | given).values(), dtype=given.pop("dtype", torch.float32))


def mm(grad: Tensor, **given: Any) -> Any:
    right = {"weight": V, "signs": None, "magnitude": None, "key": None, "entries": "constant", "scale": 1.0, "n": 4}
    return ops.feedback_mm(grad, *(right | given).values())


def lc(input: Tensor, weight: Tensor, **given: Any) -> Any:
    right = {"bias": None, "stride": [1], "padding": [0, 0], "dilation": [1], "groups": 1}
    return ops.lc_forward(input, weight, *(right | given).values())


INTEGERS = r"weight: expected float32, .*got (torch\.int64|Long)"

OPS: list[Wrong] = [
    ("NaN scale", lambda: b(scale=NAN), ValueError, "scale: expected a finite number, got nan"),
    ("entries", lambda: b(entries="gauss"), ValueError, "entries: expected one of .*got 'gauss'"),
    (
        "two signs",
        lambda: b(weight=V, signs=ops.pack_signs(V)),
        ValueError,
        "signs: expected None where weight is given",
    ),
    ("no key", lambda: b(key=None), ValueError, "key: expected a tensor with entries='uniform', got None"),
    (
        "nothing",
        lambda: b(key=None, entries="constant"),
        ValueError,
        "entries: expected exactly one of weight, signs and key",
    ),
    (
        "no magnitude",
        lambda: b(key=None, entries="stored"),
        ValueError,
        "magnitude: expected a tensor with entries='stored'",
    ),
    ("idle magnitude", lambda: b(magnitude=V), ValueError, "magnitude: expected None with entries='uniform'"),
    ("idle key", lambda: b(magnitude=V, entries="stored"), ValueError, "key: expected None with entries='stored'"),
    ("weight's shape", lambda: b(weight=V.t()), ValueError, r"weight: expected shape .3, 4., got .4, 3."),
    ("weight's dtype", lambda: b(weight=V.long()), TypeError, INTEGERS),
    ("signs' dtype", lambda: b(signs=torch.zeros(7, 4)), TypeError, "signs: expected int32"),
    (
        "signs' shape",
        lambda: b(signs=torch.zeros(3, 4, dtype=torch.int32)),
        ValueError,
        "signs: expected shape .7, 4.",
    ),
    ("key's dtype", lambda: b(key=Z.int()), TypeError, "key: expected int64"),
    ("key's shape", lambda: b(key=Z[:2]), ValueError, "key: expected shape .3,?., got .2,?."),
    (
        "dtype",
        lambda: ops.unpack_signs(ops.pack_signs(V), V.shape, dtype=torch.int32),
        TypeError,
        "dtype: expected float32",
    ),
    (
        "size",
        lambda: ops.unpack_signs(ops.pack_signs(V), (9, 4), dtype=torch.float32),
        ValueError,
        "signs: expected shape",
    ),
    ("packing integers", lambda: ops.pack_signs(V.long()), TypeError, INTEGERS),
    ("redrawing by integers", lambda: ops.redraw_key(Z, V.long()), TypeError, "weight: expected float32"),
    ("redrawing a float", lambda: ops.redraw_key(w(3), V), TypeError, "key: expected int64"),
    ("mm rank", lambda: mm(w(2, 2, 3)), ValueError, r"grad_output: expected 2 dimensions, got shape \(2, 2, 3\)"),
    ("mm shape", lambda: mm(w(2, 5)), ValueError, r"weight: expected shape \(5, 4\), got \(3, 4\)"),
    ("mm dtype", lambda: mm(torch.ones(2, 3, dtype=INTEGER)), TypeError, "grad_output: expected float32"),
    ("mm features", lambda: mm(w(2, 3), n=-1), ValueError, "in_features: expected at least 0, got -1"),
    ("lc rank", lambda: lc(w(4, 5), L), ValueError, "input: expected 3 dimensions"),
    ("lc weight rank", lambda: lc(w(1, 4, 5), V), ValueError, "weight: expected 4 dimensions"),
    (
        "lc stride",
        lambda: lc(w(1, 4, 5), L, stride=[0]),
        ValueError,
        r"stride: expected 1 integers of at least 1, got \(0,\)",
    ),
    ("lc padding", lambda: lc(w(1, 4, 5), L, padding=[1]), ValueError, r"padding: expected 2 integers"),
    ("lc kernel", lambda: lc(w(1, 4, 2), L), ValueError, KERNEL),
    (
        "lc groups",
        lambda: lc(w(1, 12, 5), L, groups=3),
        ValueError,
        "groups: expected a divisor of the 2 output channels",
    ),
    ("lc dtype", lambda: lc(w(1, 4, 5), L.double()), TypeError, "weight: expected torch.float32, got torch.float64"),
]


def _name(wrong: Wrong) -> str:
    return wrong[0].replace(" ", "_")


@pytest.mark.parametrize("wrong", RULES, ids=_name)
def test_rules(wrong: Wrong) -> None:
    check(wrong)


@pytest.mark.parametrize("wrong", LAYER_BUILDS, ids=_name)
def test_building_a_layer(wrong: Wrong) -> None:
    check(wrong)


@pytest.mark.parametrize("wrong", LAYER_CALLS, ids=_name)
def test_calling_a_layer(wrong: Wrong) -> None:
    check(wrong)


@pytest.mark.parametrize("wrong", FUNCTIONAL, ids=_name)
def test_functional(wrong: Wrong) -> None:
    check(wrong)


@pytest.mark.parametrize("implementation", ["active", "reference"])
@pytest.mark.parametrize("wrong", OPS, ids=_name)
def test_ops(wrong: Wrong, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if implementation == "reference":
        for name, op in reference.OPS.items():
            monkeypatch.setattr(ops, name, op)
    check(wrong)


@pytest.mark.parametrize("name", LAYERS)
def test_dtype_and_device_of_the_input(name: str) -> None:
    layer, good = build(name, "fa")
    with pytest.raises(TypeError, match=r"input: expected torch\.float32, as weight, got torch\.float64"):
        call(layer, good.detach().double().requires_grad_())
    with pytest.raises(ValueError, match="input: expected a tensor on cpu, as weight, got one on meta"):
        call(layer, good.detach().to("meta").requires_grad_())


def test_a_layer_made_complex_afterwards() -> None:
    layer = nn.Linear(4, 3, feedback="usf").to(torch.complex64)
    with pytest.raises(TypeError, match=r"input: expected float32.*got torch\.complex64"):
        layer(x(2, 4, dtype=torch.complex64))


ONCE = "double backward: the input gradient of a layer with feedback is not the derivative"


@pytest.mark.parametrize("name", LAYERS)
def test_double_backward(name: str) -> None:
    layer, good = build(name, "usf")
    (grad,) = torch.autograd.grad(call(layer, good).square().sum(), good, create_graph=True)
    # Also where only some of the graph is asked for, which torch's own once_differentiable lets pass.
    for attempt in (
        lambda: grad.sum().backward(retain_graph=True),
        lambda: torch.autograd.grad(grad.square().sum(), good, retain_graph=True),
        lambda: torch.autograd.grad(grad.square().sum(), list(layer.parameters())[:1], retain_graph=True),
    ):
        with pytest.raises(RuntimeError, match=ONCE):
            attempt()


def test_a_gradient_penalty_is_not_dropped_in_silence() -> None:
    layer, good = build("Linear", "fa")
    loss = layer(good).square().sum()
    (grad,) = torch.autograd.grad(loss, good, create_graph=True)
    with pytest.raises(RuntimeError, match=ONCE):
        torch.autograd.grad(loss + grad.square().sum(), layer.weight)


def test_create_graph_alone_is_fine() -> None:
    layer, good = build("Linear", "fa")
    (expected,) = torch.autograd.grad(layer(good).square().sum(), good)
    (grad,) = torch.autograd.grad(layer(good).square().sum(), good, create_graph=True)
    assert torch.equal(grad, expected)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack((x, x))),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_torch_func(name: str, transform: str) -> None:
    layer, good = build(name, "fa")
    for given in (good, good.detach()):
        with pytest.raises(RuntimeError, match=r"torch\.func: its transforms .* do not know feedback"):
            TRANSFORMS[transform](lambda x: call(layer, x), given)


def test_torch_func_without_feedback() -> None:
    plain, good = build("Conv2d", None)
    assert TRANSFORMS["grad"](plain, good.detach()).shape == good.shape
    layer, good = build("Linear", "fa")
    with torch.no_grad():
        assert torch.allclose(torch.func.vmap(layer)(good), layer(good))
    names = dict(layer.named_parameters())
    assert torch.equal(torch.func.functional_call(layer, names, good), layer(good))
