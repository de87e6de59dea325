"""The layers beside torch.nn: back-propagation bit for bit, torch's module samples, B = W, autocast, gradcheck."""

from typing import Any

import pytest
import torch
from oracle import CASES, RICH, TORCH_CASES, Case, assert_same
from torch import Tensor

import bioplaus_kernels as bk

pytest.importorskip("expecttest")  # of torch's own tests
from torch.testing._internal.common_modules import ModuleInput, module_db

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

STORED = bk.FeedbackAlignment(stored=True)


def set_b_to_w(layer: Any) -> None:
    """Make B of a layer with stored feedback alignment its W."""
    with torch.no_grad():
        for module in layer.modules():
            if isinstance(module, bk.nn.FeedbackLayer):
                for name in module.weights():
                    getattr(module, name.removesuffix("weight") + "feedback_weight").copy_(getattr(module, name))


def outputs_and_gradients(module: torch.nn.Module, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Every floating output of module(*args, **kwargs) and its gradients for inputs and parameters, by name."""
    inputs = {f"input {i}": t for i, t in enumerate([*args, *kwargs.values()]) if is_trained(t)}
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    outputs = module(*args, **kwargs)
    outputs = [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if t is not None]
    torch.manual_seed(1)
    grad_outputs = [torch.randn(t.shape, dtype=t.dtype) for t in outputs]
    leaves = {**inputs, **parameters}
    grads = torch.autograd.grad(outputs, list(leaves.values()), grad_outputs, allow_unused=True)
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    return found | {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True) if g is not None}


def is_trained(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def twin_of(layer: torch.nn.Module, twin: torch.nn.Module) -> torch.nn.Module:
    """`twin` with the parameters of `layer`, which it must all have."""
    state = {name: p for name, p in layer.state_dict().items() if "feedback" not in name}
    twin.load_state_dict(state)
    return twin


NAMES = ("Linear", *(f"Conv{t}{d}d" for t in ("", "Transpose") for d in (1, 2, 3)), "MultiheadAttention")
INFOS = [info for info in module_db if info.name.removeprefix("nn.") in NAMES]
assert len(INFOS) == len(NAMES)


def samples(info: Any, dtype: torch.dtype) -> list[ModuleInput]:
    """torch's own samples of a module; their inputs want gradients."""
    found = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)
    assert found
    return found


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_torch_samples_by_back_propagation(info: Any) -> None:
    for sample in samples(info, torch.float32):
        made, call = sample.constructor_input, sample.forward_input
        layer = getattr(bk.nn, info.module_cls.__name__)(*made.args, **made.kwargs)
        twin = twin_of(layer, info.module_cls(*made.args, **made.kwargs))
        ours = outputs_and_gradients(layer, call.args, call.kwargs)
        theirs = outputs_and_gradients(twin, call.args, call.kwargs)
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, msg=f"{sample.desc}: {name}")


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_torch_samples_with_b_set_to_w(info: Any) -> None:
    for sample in samples(info, torch.float64):
        made, call = sample.constructor_input, sample.forward_input
        layer = getattr(bk.nn, info.module_cls.__name__)(
            *made.args, **made.kwargs, dtype=torch.float64, feedback=STORED
        )
        twin = twin_of(layer, info.module_cls(*made.args, **made.kwargs, dtype=torch.float64))
        set_b_to_w(layer)
        ours = outputs_and_gradients(layer, call.args, call.kwargs)
        theirs = outputs_and_gradients(twin, call.args, call.kwargs)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_same(ours[name], theirs[name], f"{sample.desc}: {name}")


@pytest.mark.parametrize("case", TORCH_CASES, ids=str)
def test_back_propagation_is_torch_nn_bit_for_bit(case: Case) -> None:
    layer, x = case.build(None, torch.float32), case.input(torch.float32)
    twin = twin_of(layer, case.twin("cpu", torch.float32))
    if case.layout == "channels_last":
        twin.to(memory_format=(torch.channels_last, torch.channels_last_3d)[case.d - 2])
    ours = outputs_and_gradients(layer, (x,), case.call)
    theirs = outputs_and_gradients(twin, (x,), case.call)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].stride() == theirs[name].stride(), name
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("case", TORCH_CASES, ids=str)
def test_output_of_a_rule_is_torch_nns(case: Case) -> None:
    # The forward product is torch's own, so only the path around it could make a difference.
    layer, x = case.build("usf", torch.float32), case.input(torch.float32)
    twin = twin_of(layer, case.twin("cpu", torch.float32))
    expected = twin(x, **case.call)
    torch.testing.assert_close(layer(x, **case.call), expected)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x, **case.call), twin(x, **case.call), rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_b_set_to_w_is_back_propagation(case: Case) -> None:
    layer, x = case.build(STORED), case.input()
    set_b_to_w(layer)
    ours = outputs_and_gradients(layer, (x,), case.call)
    if case.layer.startswith("Locally"):
        leaves = [x, layer.weight, *([] if layer.bias is None else [layer.bias])]
        y = case.plain()(x, layer.weight, layer.bias)
        torch.manual_seed(1)
        expected = [y, *torch.autograd.grad(y, leaves, torch.randn(y.shape, dtype=y.dtype))]
    else:
        expected = list(
            outputs_and_gradients(twin_of(layer, case.twin("cpu", torch.float64)), (x,), case.call).values()
        )
    for (name, actual), wanted in zip(ours.items(), expected, strict=True):
        assert_same(actual, wanted, name)


@pytest.mark.parametrize("case", RICH, ids=lambda case: case.layer)
def test_usf_with_constant_magnitude_is_back_propagation(case: Case) -> None:
    magnitude = 0.375
    layer, x = case.build(bk.SignSymmetry(scale=magnitude)), case.input()
    with torch.no_grad():
        layer.weight.copy_(magnitude * torch.randn_like(layer.weight).sign())
    ours = outputs_and_gradients(layer, (x,), case.call)
    # "match" finds that constant by itself.
    layer.install_feedback(bk.SignSymmetry(scale="match"))
    matched = outputs_and_gradients(layer, (x,), case.call)
    layer.install_feedback(bk.Backprop())
    theirs = outputs_and_gradients(layer, (x,), case.call)
    assert ours.keys() == matched.keys() == theirs.keys()
    for name in ours:
        assert_same(ours[name], theirs[name], name)
        assert_same(matched[name], theirs[name], name)


@pytest.mark.parametrize("case", [*RICH, *(c for c in CASES if c.reason == "unbatched" and c.d < 3)], ids=str)
def test_gradcheck(case: Case) -> None:
    # Back-propagation of a torch.nn layer is torch's own, so B set to W tries our gradients there.
    layer, x = case.build(None if case.layer.startswith("Locally") else STORED), case.input()
    if layer.uses_feedback:
        set_b_to_w(layer)
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}

    def f(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,), case.call)

    assert torch.autograd.gradcheck(f, (x, *parameters.values()), fast_mode=case.d == 3)


AUTOCAST = [torch.bfloat16, torch.float16]
# Rows whose layer has a torch.nn twin say what is right; the others follow them.
TWINS = [case for case in RICH if not case.layer.startswith("Locally")]


@pytest.mark.parametrize("rule", ["usf", "fa", "fa-stored", "usf-match"])
@pytest.mark.parametrize("dtype", AUTOCAST, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", RICH, ids=lambda case: case.layer)
def test_autocast_dtypes(case: Case, dtype: torch.dtype, rule: str) -> None:
    rules = {"fa-stored": STORED, "usf-match": bk.SignSymmetry(scale="match")}
    layer, x = case.build(rules.get(rule, rule), torch.float32), case.input(torch.float32)
    with torch.autocast("cpu", dtype):
        y = layer(x, **case.call)
    assert y.dtype == dtype
    leaves = (x, layer.weight, layer.bias)
    for leaf, grad in zip(leaves, torch.autograd.grad(y, leaves, torch.randn_like(y)), strict=True):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape and grad.isfinite().all()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", AUTOCAST, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", TWINS, ids=lambda case: case.layer)
def test_autocast_is_torch_nns(case: Case, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    # float64 is left alone by autocast: with float64 parameters the layer runs in it.
    parameter_dtype = torch.float64 if x_dtype == torch.float64 else torch.float32
    layer, x = case.build(STORED, parameter_dtype), case.input(x_dtype)
    set_b_to_w(layer)
    twin = twin_of(layer, case.twin("cpu", parameter_dtype))
    with torch.autocast("cpu", dtype):
        ours, theirs = layer(x, **case.call), twin(x, **case.call)
    assert ours.dtype == theirs.dtype == (torch.float64 if x_dtype == torch.float64 else dtype)
    assert torch.equal(ours, theirs)
    grad_output = torch.randn_like(ours)
    ours_grads = torch.autograd.grad(ours, (x, layer.weight, layer.bias), grad_output)
    theirs_grads = torch.autograd.grad(theirs, (x, twin.weight, twin.bias), grad_output)
    for name, a, b in zip(("x", "weight", "bias"), ours_grads, theirs_grads, strict=True):
        # Both round once to the autocast dtype; sums in another order may round to the neighbour.
        eps = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(a, b, rtol=eps, atol=eps * float(b.abs().max()), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", RICH, ids=lambda case: case.layer)
@pytest.mark.parametrize("rule", ["usf", "frsf", "fa_signed_init"])
def test_signs_come_from_the_parameter_under_autocast(case: Case, rule: str) -> None:
    # 1e-8 is zero in float16: were the signs taken from autocast's copy, dX would be zero.
    layer, x = case.build(rule, torch.float32), case.input(torch.float32)
    with torch.no_grad():
        layer.weight.copy_(1e-8 * torch.randn_like(layer.weight).sign())
    layer.reset_feedback()
    assert layer.weight.half().count_nonzero() == 0
    with torch.autocast("cpu", torch.float16):
        y = layer(x, **case.call)
    (dx,) = torch.autograd.grad(y, x, grad_output := torch.randn_like(y))
    b = layer.feedback_matrix().half()
    assert b.count_nonzero() == b.numel()
    z = case.plain()(x, b.float(), layer.bias.detach())
    (expected,) = torch.autograd.grad(z, x, grad_output.float())
    eps = torch.finfo(torch.float16).eps
    torch.testing.assert_close(dx, expected, rtol=eps, atol=eps * float(expected.abs().max()))


@pytest.mark.parametrize("rule", ["usf", "fa"])
def test_a_gradient_is_laid_out_as_its_weight(rule: str) -> None:
    """A transposed weight, as GPT-2's layers store it, gets a gradient that autograd need not copy."""
    layer = bk.nn.Linear(30, 20, feedback=rule)
    x, dy = torch.randn(7, 30, requires_grad=True), torch.randn(7, 20)
    for weight in (layer.weight.detach(), layer.weight.detach().t().contiguous().t()):
        layer.weight = torch.nn.Parameter(weight)
        given: list[Tensor] = []
        handle = layer.weight.register_hook(given.append)
        layer(x).backward(dy)
        handle.remove()
        assert given[0].stride() == layer.weight.stride() and layer.weight.grad is not None
        torch.testing.assert_close(layer.weight.grad, dy.t() @ x.detach())
