"""Wrong arguments of the functions and of the ops below them: errors that name the argument."""

from typing import Any

import pytest
import torch
from test_errors import INTEGER, KERNEL, NAN, Wrong, check, short, w, x
from torch import Tensor

import bioplaus_kernels as bk
from bioplaus_kernels import functional as F
from bioplaus_kernels import ops
from bioplaus_kernels.backends import reference
from bioplaus_kernels.feedback import feedback_key

pytestmark = pytest.mark.usefixtures("one_thread")

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


def dw(input: Tensor, grad: Tensor | None = None, **given: Any) -> Any:
    right = {"kernel_size": [3], "stride": [1], "padding": [0], "dilation": [1]}
    return ops.conv_backward_weight(w(2, 5, 6) if grad is None else grad, input, *(right | given).values())


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
    ("dw rank", lambda: dw(w(2, 3)), ValueError, r"input: expected 3, 4 or 5 dimensions, got shape \(2, 3\)"),
    ("dw grad", lambda: dw(w(2, 3, 8), w(2, 8)), ValueError, r"grad_output: expected 3 dimensions, got shape \(2, 8\)"),
    ("dw dtype", lambda: dw(w(2, 3, 8).double()), TypeError, "grad_output: expected torch.float64, got torch.float32"),
    ("dw kernel", lambda: dw(w(2, 3, 8), kernel_size=[0]), ValueError, "kernel_size: expected 1 integers from 1 to"),
    ("dw shape", lambda: dw(w(2, 3, 9)), ValueError, r"grad_output: expected shape \(2, 5, 7\), got \(2, 5, 6\)"),
    (
        "dw size",
        lambda: dw(w(2, 3, 8), kernel_size=[30]),
        ValueError,
        "input: expected a padded size of at least the d",
    ),
    ("dw batch", lambda: dw(w(4, 3, 8)), ValueError, "input: expected 2 samples, as grad_output has, got 4"),
    ("lc rank", lambda: lc(w(4, 5), L), ValueError, "input: expected 3 dimensions"),
    ("lc weight rank", lambda: lc(w(1, 4, 5), V), ValueError, "weight: expected 4 dimensions"),
    (
        "lc stride",
        lambda: lc(w(1, 4, 5), L, stride=[0]),
        ValueError,
        r"stride: expected 1 integers from 1 to 2147483647, got \(0,\)",
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


@pytest.mark.parametrize("wrong", FUNCTIONAL, ids=short)
def test_functional(wrong: Wrong) -> None:
    check(wrong)


@pytest.mark.parametrize("implementation", ["active", "reference"])
@pytest.mark.parametrize("wrong", OPS, ids=short)
def test_ops(wrong: Wrong, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if implementation == "reference":
        for name, op in reference.OPS.items():
            monkeypatch.setattr(ops, name, op)
    check(wrong)
