"""torch.export, TorchScript and ONNX: the forward is eager's, and of what a rule governs training gets no gradient."""

import contextlib
import io
import itertools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import direct_net
import pytest
import torch
from small import FEW, LAYERS, RULES, assert_equal, build, call, gradients
from torch import Tensor, nn

import bioplaus_kernels as bk
from bioplaus_kernels import functional

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Where a trace's own check fails it may only warn; that shapes are compared is no failure.
    pytest.mark.filterwarnings(
        "ignore:.*is deprecated", "error::torch.jit.TracerWarning", "ignore:Converting a tensor:torch.jit.TracerWarning"
    ),
]
Run = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """A layer after a Parameter that its input gradient would reach."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.tensor(1.5)), layer

    def forward(self, x: Tensor) -> Tensor:
        return call(self.layer, x * self.scale)


def export(net: nn.Module, x: Tensor, **kwargs: Any) -> nn.Module:
    program = torch.export.export(net, (x,), **kwargs)
    # What other machines have.
    assert "bioplaus" not in str(program.graph)
    return program.module()


def export_dynamic(net: nn.Module, x: Tensor, **kwargs: Any) -> nn.Module:
    shapes = torch.export.ShapesCollection()
    shapes[x] = {0: torch.export.Dim("batch")}
    return export(net, x, dynamic_shapes=shapes, **kwargs)


def export_and_load(net: nn.Module, x: Tensor) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(torch.export.export(net, (x,)), file)
    file.seek(0)
    return torch.export.load(file).module()


def trace(net: nn.Module, x: Tensor) -> nn.Module:
    traced = torch.jit.trace(net, (x,))
    assert "bioplaus::" not in str(traced.inlined_graph)
    return traced


def trace_and_load(net: nn.Module, x: Tensor) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(trace(net, x), file)
    file.seek(0)
    return torch.jit.load(file)


CAPTURES: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "export": export,
    "strict": lambda net, x: export(net, x, strict=True),
    "dynamic": export_dynamic,
    "dynamic-strict": lambda net, x: export_dynamic(net, x, strict=True),
    "exported": export_and_load,
    "trace": trace,
    "traced": trace_and_load,
}
STRICT = pytest.param("strict", marks=pytest.mark.slow)
FIXED = ("export", "strict", "exported")
# Of each way one, in and out of no_grad.
FAST = [("strict", True), ("exported", True), ("dynamic", False), ("trace", True), ("traced", False)]


def ways(rows: Iterable[str], fast: Iterable[str]) -> list[Any]:
    """Every row with every way, in and out of no_grad, marked slow but for FAST's of the rows in `fast`."""
    return [
        pytest.param(row, how, grad, marks=() if row in fast and (how, grad) in FAST else pytest.mark.slow)
        for row, how, grad in itertools.product(rows, CAPTURES, (True, False))
    ]


def capture(how: str, grad: bool, net: nn.Module, x: Tensor) -> nn.Module:
    with torch.set_grad_enabled(grad):
        captured = CAPTURES[how](net, x.detach())
    for p in captured.parameters():
        p.grad = None
    return captured


def check_forward(how: str, captured: Run, net: Run, x: Tensor) -> None:
    # A capture of fixed sizes is one of this batch alone.
    for batch in (x, torch.cat((x, 2 * x, -x))) if how not in FIXED else (x,):
        torch.testing.assert_close(captured(batch).detach(), net(batch).detach())


def check_cut(captured: nn.Module, x: Tensor) -> None:
    y = captured(x)
    with pytest.raises(RuntimeError, match="does not require grad"):
        y.sum().backward()
    # Behind it all is as it was, before it nothing arrives.
    head = torch.tensor(2.0, requires_grad=True)
    (y * head).sum().backward()
    assert head.grad is not None and x.grad is None
    assert all(p.grad is None for p in captured.parameters())


@pytest.mark.parametrize(("layer", "how", "grad"), ways(LAYERS, FEW))
def test_a_layer_is_its_forward_without_gradients(layer: str, how: str, grad: bool) -> None:
    module, x = build(layer, "usf")
    net = Net(module)
    before = gradients(net, x)
    captured = capture(how, grad, net, x)
    check_forward(how, captured, net, x)
    check_cut(captured, x)
    # The layer itself is trained by its rule as before.
    assert_equal(gradients(net, x), before)


@pytest.mark.parametrize("how", ["export", STRICT, "trace"])
@pytest.mark.parametrize("rule", [*(rule for rule in RULES if rule != "backprop"), "kp"])
def test_every_rule(rule: str, how: str) -> None:
    for layer in ("Linear", "MultiheadAttention") if rule in ("usf", "fa", "kp") else ("Linear",):
        module, x = build(layer, RULES.get(rule, rule))
        captured = capture(how, False, Net(module), x)
        check_forward("export", captured, Net(module), x)


@pytest.mark.parametrize("how", [STRICT, "dynamic", "trace"])
@pytest.mark.parametrize("layer", FEW)
def test_back_propagation_keeps_its_gradients(layer: str, how: str) -> None:
    module, x = build(layer, None)
    net = Net(module)
    captured = capture(how, False, net, x)
    check_forward(how, captured, net, x)
    # A strict export has an order of its own.
    own = [captured.get_parameter(name) for name, _ in net.named_parameters()]
    for actual, expected in zip(gradients(captured, x, *own), gradients(net, x), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("how", ["strict", "dynamic", "traced"])
def test_what_no_rule_governs_learns(how: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), bk.nn.Linear(4, 4, feedback="fa"), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(2, 3)
    captured = capture(how, False, net, x)
    check_forward(how, captured, net, x)
    captured(x).sum().backward()
    assert {name for name, p in captured.named_parameters() if p.grad is not None} == {"4.weight", "4.bias"}


@pytest.mark.parametrize(("rule", "how", "grad"), ways(["dfa", "drtp-stored", "shallow"], ["dfa"]))
def test_direct_feedback_is_its_model_with_detached_blocks(rule: str, how: str, grad: bool) -> None:
    wrapper = direct_net.attached(direct_net.RULES[rule])
    x, _ = direct_net.batch()
    captured = capture(how, grad, wrapper, x)
    check_forward(how, captured, wrapper.model, x)
    captured(x).sum().backward()
    learned = {name for name, p in captured.named_parameters() if p.grad is not None}
    assert learned == {"model.3.weight", "model.3.bias"}


def attention_call(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.zeros(x.shape[0], 5, dtype=torch.bool)
    return layer(x, x[..., :4] if layer.kdim != 8 else x + 1, x, padding, attn_mask=mask)


@pytest.mark.parametrize("how", [STRICT, "dynamic", "trace"])
@pytest.mark.parametrize("kwargs", [{}, {"kdim": 4}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("rule", ["usf", "fa"])
def test_attention_with_masks_and_weights(rule: str, kwargs: dict[str, Any], how: str) -> None:
    layer = bk.nn.MultiheadAttention(8, 2, batch_first=True, feedback=rule, **kwargs)

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return attention_call(self.layer, x)

    x = torch.randn(2, 5, 8, requires_grad=True)
    captured = capture(how, False, Attend().eval(), x)
    for actual, expected in zip(captured(x), attention_call(layer, x), strict=True):
        torch.testing.assert_close(actual, expected)
    assert not captured(x)[0].requires_grad


MORE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "one row": (lambda: bk.nn.Linear(3, 4, feedback="usf"), (3,)),
    "no batch": (lambda: bk.nn.Conv1d(2, 3, 3, feedback="usf"), (2, 7)),
    "no batch, untied": (lambda: bk.nn.LocallyConnected1d(2, 3, 3, input_size=7, feedback="usf"), (2, 7)),
    "same": (lambda: bk.nn.Conv1d(2, 3, 4, padding="same", feedback="usf"), (2, 2, 7)),
    "circular": (lambda: bk.nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular", feedback="usf"), (2, 2, 7)),
}


@pytest.mark.parametrize("how", [STRICT, "export", "trace"])
@pytest.mark.parametrize("case", MORE)
def test_more_of_a_layer(case: str, how: str) -> None:
    make, shape = MORE[case]
    net, x = Net(make()), torch.randn(shape, requires_grad=True)
    captured = capture(how, False, net, x)
    check_forward("export", captured, net, x)
    check_cut(captured, x)


@pytest.mark.parametrize("how", ["strict", "dynamic", "trace"])
def test_functions(how: str) -> None:
    class Functions(nn.Module):
        def __init__(self, rule: str | None) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(2, 3, 1, 2))
            self.register_buffer("b", torch.randn(4, 4))
            self.rule = rule

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            given = functional.linear(x, self.w, feedback=self.b), functional.linear(x, self.w, feedback="usf")
            return *given, functional.locally_connected1d(x.unflatten(1, (2, 2)), self.v, feedback=self.rule)

    x = torch.randn(2, 4)
    for rule in ("usf", None):
        net = Functions(rule)
        outputs = capture(how, False, net, x)(x)
        assert [y.requires_grad for y in outputs] == [False, False, rule is None]
        for actual, expected in zip(outputs, net(x), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layer", FEW)
def test_under_autocast(layer: str) -> None:
    module, x = build(layer, "usf")
    net = Net(module)

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(x)

    captured = capture("export", False, Cast(), x)
    y = captured(x)
    # torch's own function of these two is not one that autocast casts whole.
    wanted = torch.float32 if layer in ("Bilinear", "GRUCell") else torch.bfloat16
    assert y.dtype == wanted and not y.requires_grad
    torch.testing.assert_close(y, Cast()(x).detach().to(wanted), rtol=2e-2, atol=2e-2)


def test_a_compiled_layer_is_not_cut_by_an_export_before_it() -> None:
    module, x = build("Linear", "fa")
    expected = gradients(module, x)
    capture("strict", True, module, x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_equal(gradients(lambda x: compiled(x), x, *module.parameters()), expected)
    capture("strict", True, module, x)
    assert_equal(gradients(lambda x: compiled(x), x, *module.parameters()), expected)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize(
    "layer", [pytest.param(layer, marks=() if layer in FEW else pytest.mark.slow) for layer in LAYERS]
)
def test_onnx(layer: str, dynamo: bool) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    module, x = build(layer, "usf")
    net, file, batch = Net(module).eval(), io.BytesIO(), torch.export.Dim("batch")
    axes = {"dynamic_shapes": ({0: batch},)} if dynamo else {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x.detach(),), file, dynamo=dynamo, **axes)
    session = runtime.InferenceSession(file.getvalue())

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.detach().numpy()})[0])

    check_forward("onnx", run, net, x)
