"""Every layer under every rule, and every geometry, against the autograd oracle of `oracle.py`, in float64."""

from typing import Any

import pytest
import torch
from oracle import CASES, RICH, RULES, Case, assert_same, with_feedback
from torch import Tensor

import bioplaus_kernels as bk
from bioplaus_kernels.feedback import feedback_key

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


def leaves_of(layer: Any, x: Tensor) -> dict[str, Tensor]:
    """The tensors a gradient is wanted for: the input, the weight and, where there is one, the bias."""
    named = {"x": x, "weight": layer.weight, "bias": layer.bias}
    return {name: t for name, t in named.items() if t is not None and t.requires_grad}


def check(case: Case, layer: Any, b: Tensor, x: Tensor, y: Tensor) -> None:
    """Output y of layer(x), and its gradients, are the oracle's for feedback matrix b."""
    leaves = leaves_of(layer, x)
    expected = with_feedback(case.plain(), x, layer.weight, b, layer.bias)
    assert_same(y, expected, "output")
    grad_output = torch.randn_like(expected)
    actual_grads = torch.autograd.grad(y, leaves.values(), grad_output)
    expected_grads = torch.autograd.grad(expected, leaves.values(), grad_output)
    for name, actual, wanted in zip(leaves, actual_grads, expected_grads, strict=True):
        assert_same(actual, wanted, f"gradient of {name}")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", RICH, ids=lambda case: case.layer)
def test_every_rule(case: Case, rule: str) -> None:
    layer, x = case.build(RULES[rule]), case.input()
    b = layer.feedback_matrix()
    assert b.shape == layer.weight.shape and not torch.equal(b, layer.weight)
    check(case, layer, b, x, layer(x, **case.call))


@pytest.mark.gpu
@pytest.mark.parametrize("case", RICH, ids=lambda case: case.layer)
def test_every_rule_on_cuda(case: Case) -> None:
    for rule in RULES.values():
        layer, x = case.build(rule, device="cuda"), case.input(device="cuda")
        check(case, layer, layer.feedback_matrix(), x, layer(x, **case.call))


@pytest.mark.parametrize("rule", ["usf", "fa"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_geometry(case: Case, rule: str) -> None:
    layer, x = case.build(rule), case.input()
    check(case, layer, layer.feedback_matrix(), x, layer(x, **case.call))


@pytest.mark.parametrize("case", RICH, ids=lambda case: case.layer)
def test_frozen_signs_is_the_same_rule(case: Case) -> None:
    for rule in ("usf", "frsf", "brsf-normal"):
        layer, x = case.build(RULES[rule]), case.input()
        b = layer.feedback_matrix()
        with bk.frozen_signs(layer):
            check(case, layer, b, x, layer(x, **case.call))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "x weight", "x bias", "weight bias"])
@pytest.mark.parametrize("case", RICH, ids=lambda case: case.layer)
def test_gradients_wanted_for_some(case: Case, wanted: str) -> None:
    layer, x = case.build("usf"), case.input()
    for name, tensor in (("x", x), ("weight", layer.weight), ("bias", layer.bias)):
        tensor.requires_grad_(name in wanted.split())
    assert list(leaves_of(layer, x)) == wanted.split()
    check(case, layer, layer.feedback_matrix(), x, layer(x, **case.call))


@pytest.mark.parametrize("case", RICH, ids=lambda case: case.layer)
def test_gradient_of_a_sum(case: Case) -> None:
    # Its output gradient is one number expanded: every stride is 0.
    layer, x = case.build("fa"), case.input()
    leaves = leaves_of(layer, x)
    expected = with_feedback(case.plain(), x, layer.weight, layer.feedback_matrix(), layer.bias).sum()
    grads = torch.autograd.grad(layer(x, **case.call).sum(), leaves.values())
    for name, actual, wanted in zip(leaves, grads, torch.autograd.grad(expected, leaves.values()), strict=True):
        assert_same(actual, wanted, name)


@pytest.mark.parametrize("case", RICH, ids=lambda case: case.layer)
def test_chain_of_two_calls_of_one_layer(case: Case) -> None:
    # The layer used twice: its gradients add up, and the same B acts in both calls.
    layer, x = case.build("brsf"), case.input()
    leaves, b = leaves_of(layer, x), layer.feedback_matrix()
    actual = layer(x, **case.call) * layer(2 * x, **case.call).tanh()
    f = case.plain()
    expected = with_feedback(f, x, layer.weight, b, layer.bias)
    expected = expected * with_feedback(f, 2 * x, layer.weight, b, layer.bias).tanh()
    assert_same(actual, expected)
    grad_output = torch.randn_like(actual)
    wanted = torch.autograd.grad(expected, leaves.values(), grad_output)
    for name, ours, theirs in zip(
        leaves, torch.autograd.grad(actual, leaves.values(), grad_output), wanted, strict=True
    ):
        assert_same(ours, theirs, name)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check_error(case: Case, rule: str, dtype: torch.dtype, device: str) -> None:
    """torch's own error in the same dtype decides: at most twice that, and one rounding of the result."""
    layer, x = case.build(RULES[rule], dtype, device), case.input(dtype, device)
    leaves, b, f = leaves_of(layer, x), layer.feedback_matrix(), case.plain()
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves.values()]
    grad_output = torch.randn(layer(x, **case.call).shape, device=device, dtype=dtype)

    def with_gradients(y: Tensor, inputs: Any) -> list[Tensor]:
        return [y.detach(), *torch.autograd.grad(y, inputs, grad_output.to(y.dtype))]

    exact = with_gradients(
        with_feedback(f, exact_leaves[0], exact_leaves[1], b.double(), exact_leaves[2]), exact_leaves
    )
    torchs = with_gradients(with_feedback(f, x, layer.weight, b, layer.bias), list(leaves.values()))
    ours = with_gradients(layer(x, **case.call), list(leaves.values()))
    for name, e, t, o in zip(("output", *leaves), exact, torchs, ours, strict=True):
        assert o.dtype == dtype and o.shape == e.shape, name
        allowed = 2 * (t.double() - e).abs().max() + torch.finfo(dtype).eps / 2 * e.abs().max()
        assert (o.double() - e).abs().max() <= allowed, name


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("rule", ["usf", "frsf", "fa-stored"])
@pytest.mark.parametrize("case", RICH, ids=lambda case: case.layer)
def test_error_in_lower_precision(case: Case, rule: str, dtype: torch.dtype) -> None:
    check_error(case, rule, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", RICH, ids=lambda case: case.layer)
def test_error_in_lower_precision_on_cuda(case: Case) -> None:
    for dtype in DTYPES:
        for rule in ("usf", "frsf", "fa-stored"):
            check_error(case, rule, dtype, "cuda")


FUNCTIONAL = {
    "Linear": bk.functional.linear,
    **{f"Conv{d}d": getattr(bk.functional, f"conv{d}d") for d in (1, 2, 3)},
    **{f"ConvTranspose{d}d": getattr(bk.functional, f"conv_transpose{d}d") for d in (1, 2, 3)},
    **{f"LocallyConnected{d}d": getattr(bk.functional, f"locally_connected{d}d") for d in (1, 2, 3)},
}


def functional(case: Case, layer: Any, x: Tensor, **feedback: Any) -> Tensor:
    geometry = {name: v for name, v in case.kwargs.items() if name != "input_size"}
    return FUNCTIONAL[case.layer](x, layer.weight, layer.bias, **geometry, **feedback)


@pytest.mark.parametrize("case", [case for case in RICH if case.layer in FUNCTIONAL], ids=lambda case: case.layer)
def test_functional(case: Case) -> None:
    layer, x = case.build(None), case.input()
    b = torch.randn_like(layer.weight)
    check(case, layer, b, x, functional(case, layer, x, feedback=b))
    check(case, layer, layer.weight, x, functional(case, layer, x))
    layer.install_feedback(bk.SignSymmetry())
    check(case, layer, layer.feedback_matrix(), x, functional(case, layer, x, feedback="usf"))
    for rule in ("fa", "frsf", "brsf"):
        key = feedback_key(3, rule)
        layer.install_feedback(bk.feedback.as_rule(rule), lambda name, key=key: key)
        check(case, layer, layer.feedback_matrix(), x, functional(case, layer, x, feedback=rule, key=key))


def test_the_oracle_tells_feedback_from_back_propagation() -> None:
    # Were with_feedback to let W's own gradient through, or the library to use W, the tests above could not fail.
    case = RICH[0]
    layer, x = case.build("fa"), case.input()
    right = with_feedback(case.plain(), x, layer.weight, layer.feedback_matrix(), layer.bias)
    wrong = case.plain()(x, layer.weight, layer.bias)
    assert_same(right, wrong)
    (dx,), (dx_backprop,) = torch.autograd.grad(right.sum(), x), torch.autograd.grad(wrong.sum(), x)
    with pytest.raises(AssertionError):
        assert_same(dx, dx_backprop)
    check(case, layer, layer.feedback_matrix(), x, layer(x))
    with pytest.raises(AssertionError):
        check(case, layer, layer.weight, x, layer(x))


def test_uninitialized_memory_shows() -> None:
    for empty in (torch.empty(3), torch.empty_like(torch.ones(3)), torch.ones(2).new_empty(3)):
        assert empty.isnan().all()
