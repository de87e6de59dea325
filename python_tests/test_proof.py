"""What proves that a rule acts: convert_'s example."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from proving import Reads, mlp, outcomes, pending, reason, x
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")


class Autoencoder(nn.Module):
    """Tied: the encoder's weight decodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.encoder = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encoder(self.first(x))), self.encoder.weight.t())


def test_an_example_proves_each_row_or_says_why_not() -> None:
    model = Reads()
    report = bk.convert_(model, "usf", example=x())
    assert outcomes(report) == {"read": "left", "called": "proven", "spare": "unused", "norm": "left"}
    assert reason(report, "read") == (
        "its weight goes into TBackward0 without a call of the layer; see (root) (Reads); "
        "to allow it: bioplaus_kernels.register(proving.Reads)"
    )
    assert type(model.read) is nn.Linear and type(model.spare) is bk.nn.Linear
    assert not pending(model)
    assert str(report).splitlines()[-1] == "1 proven, 1 unused, 2 left"


@pytest.mark.parametrize("example", [x(), (x(),), {"x": x()}])
def test_an_example_is_a_tensor_a_tuple_or_a_dict(example: Any) -> None:
    assert bk.convert_(Reads(), "usf", example=example).proven == ["called"]


def test_resnet18s_rows_are_proven_but_for_the_first() -> None:
    model = pytest.importorskip("torchvision").models.resnet18(num_classes=4)
    report = bk.convert_(model, "usf", last_layer="backprop", example=torch.randn(1, 3, 64, 64))
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert report.proven == convolutions[1:] and report.converted == convolutions
    assert reason(report, "conv1") == "not proven: its input needs no gradient, so none goes through B"


@pytest.mark.parametrize("rule", ["usf", "fa", "kp"])
def test_attention_is_proven_by_both_its_projections(rule: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    report = bk.convert_(model, rule, example=x(2, 3, 8))
    assert report.proven == report.converted and len(report.proven) == 6
    other = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    assert bk.convert_(other, rule, example=(x(3, 2, 8), x(5, 2, 4), x(5, 2, 6))).proven == [""]


@pytest.mark.parametrize("layer", ["LocallyConnected1d", "LocallyConnectedTranspose1d"])
def test_locally_connected_layers_are_proven(layer: str) -> None:
    size = {"output_size" if "Transpose" in layer else "input_size": 4}
    model = nn.Sequential(getattr(bk.nn, layer)(2, 2, 1, **size))
    assert bk.convert_(model, "fa", example=x(1, 2, 4)).proven == ["0"]


def test_called_and_read_is_a_row_and_one_warning() -> None:
    model = Autoencoder()
    with pytest.warns(UserWarning, match="does not act everywhere: encoder: its weight goes into TBackward0"):
        report = bk.convert_(model, "usf", example=x())
    assert outcomes(report) == {"first": "proven", "encoder": "called and read"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x()).sum().backward()


def test_autocast_hides_no_read() -> None:
    model = Reads()
    bk.convert_(model, "usf")
    with torch.autocast("cpu", torch.bfloat16):
        assert outcomes(bk.check(model, x())) == {"read": "read", "called": "proven", "spare": "unused"}


def test_non_reentrant_checkpointing_is_seen_and_reentrant_is_not() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.inner, self.reentrant = mlp(), reentrant

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=self.reentrant)

    assert bk.convert_(Checkpointed(False), "usf", example=x()).proven == ["inner.0", "inner.2"]
    report = bk.convert_(Checkpointed(True), "usf", example=x())
    assert report.converted == ["inner.0", "inner.2"] and report.proven == []
    assert "called without gradients, as in reentrant checkpointing" in reason(report, "inner.0")


class Penalised(nn.Module):
    """Experts of which one gets no token, and a scalar of its weight instead."""

    def __init__(self, penalty: Callable[[Tensor], Tensor], called: bool) -> None:
        super().__init__()
        self.first, self.expert, self.penalty, self.called = nn.Linear(4, 4), nn.Linear(4, 4), penalty, called

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return (self.expert(h) if self.called else h) + self.penalty(self.expert.weight)


@pytest.mark.parametrize(
    "penalty",
    [
        lambda w: 0.0 * sum(p.sum() for p in (w, w)),
        lambda w: w.norm(),
        lambda w: 1e-4 * w.pow(2).sum(),
        lambda w: (w * w).mean(),
        lambda w: (w @ w.t() - torch.eye(4)).norm(),
        lambda w: (w - w.mean()).abs().max(),
    ],
)
def test_a_scalar_of_a_weight_alone_is_no_read(penalty: Callable[[Tensor], Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = bk.convert_(model := Penalised(penalty, called=False), "usf", example=x())
        assert outcomes(report) == {"first": "proven", "expert": "unused"}
        assert "nothing but a scalar is made of its weight" in reason(report, "expert")
        assert type(model.expert) is bk.nn.Linear
        assert bk.convert_(Penalised(penalty, called=True), "usf", example=x()).proven == ["first", "expert"]
        bk.convert_(model := Penalised(penalty, called=False), "usf")
        model(x())


@pytest.mark.parametrize("read", [lambda w: (w / w.norm())[0], lambda w: w.sum(0), lambda w: w.flatten()[:4]])
def test_more_than_a_scalar_is(read: Callable[[Tensor], Tensor]) -> None:
    assert outcomes(bk.check(_converted(Penalised(read, called=False)), x()))["expert"] == "read"


def _converted(model: nn.Module) -> nn.Module:
    bk.convert_(model, "usf")
    return model


class Tied(nn.Module):
    """A head with an embedding's weight, or another layer's, whose own call is `calls`, and a read of it."""

    def __init__(self, other: nn.Module, calls: bool, reads: bool) -> None:
        super().__init__()
        self.other, self.middle, self.head = other, nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.head.weight = other.weight
        self.calls, self.reads = calls, reads

    def forward(self, x: Tensor) -> Tensor:
        embedding = isinstance(self.other, nn.Embedding)
        y = self.middle(self.other(torch.arange(3)) if embedding else x)
        y = self.head(y) if self.calls else y
        return F.linear(y, self.head.weight) if self.reads else y


@pytest.mark.parametrize("other", [nn.Embedding, nn.Linear])
@pytest.mark.parametrize("calls", [False, True])
def test_a_tied_weight_that_is_read_is_a_row_and_a_warning(other: Callable[..., nn.Module], calls: bool) -> None:
    expected = "called and read" if calls else "read"
    reports = []
    with pytest.warns(UserWarning, match="does not act everywhere: .*head: its weight goes into TBackward0"):
        reports.append(bk.convert_(model := Tied(other(4, 4), calls, reads=True), "usf"))
        model(x())
    with pytest.warns(UserWarning, match="head: its weight goes into TBackward0"):
        reports.append(bk.convert_(Tied(other(4, 4), calls, reads=True), "usf", example=x()))
    assert [outcomes(report)["head"] for report in reports] == [expected, expected if calls else "left"]
    assert outcomes(bk.check(model, x()))["head"] == expected
    assert outcomes(bk.check(Tied(other(4, 4), calls, reads=True), x()))["head"] == ("called" if calls else "read")


@pytest.mark.parametrize("calls", [False, True])
def test_a_tied_weight_that_only_its_owners_call(calls: bool) -> None:
    model = Tied(nn.Embedding(4, 4), calls, reads=False)
    assert outcomes(bk.check(model, x()))["head"] == ("called" if calls else "unused")
    hooks = dict(model.other._forward_hooks), dict(model.other._forward_pre_hooks)
    report = bk.convert_(model, "usf", example=x())
    assert outcomes(report)["head"] == ("proven" if calls else "unused")
    assert (dict(model.other._forward_hooks), dict(model.other._forward_pre_hooks)) == hooks
    bk.convert_(model, "usf")
    model(x())
    assert (dict(model.other._forward_hooks), dict(model.other._forward_pre_hooks)) == hooks


def test_a_function_with_a_feedback_of_its_own() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return bk.functional.linear(self.first(x), self.second.weight, feedback="usf")

    report = bk.convert_(Functional(), "usf", example=torch.randn(3, 4))
    assert outcomes(report) == {"first": "converted", "second": "converted"}
    assert reason(report, "first").startswith("not proven: its input needs no gradient")
    assert "its weight goes into a function that has a B of its own" in reason(report, "second")


def test_each_of_an_attentions_weights_is_told() -> None:
    class Attends(nn.Module):
        def __init__(self, whole: bool) -> None:
            super().__init__()
            self.attention, self.whole = nn.MultiheadAttention(4, 2), whole

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0] if self.whole else self.attention.out_proj(x)

    report = bk.convert_(Attends(True), "usf", example=torch.randn(3, 4))
    idle = "not proven: its input needs no gradient, so none goes through B"
    assert outcomes(report) == {"attention": "converted"}
    assert reason(report, "attention") == f"in_proj_weight {idle}; out_proj.weight proven"
    report = bk.convert_(Attends(False), "usf", example=x())
    assert outcomes(report) == {"attention": "converted"}
    assert reason(report, "attention") == "in_proj_weight unused; out_proj.weight proven"


@pytest.mark.parametrize("hidden", ["checkpoint", "function"])
def test_who_records_nothing_may_hide_a_read(hidden: str) -> None:
    class Hides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = Reads(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.inner.read.weight

            class Function(torch.autograd.Function):
                @staticmethod
                def forward(ctx: Any, x: Tensor) -> Tensor:
                    return x @ weight

                @staticmethod
                def backward(ctx: Any, grad: Tensor) -> Tensor:
                    return grad @ weight.t()

            y = checkpoint(self.inner, x, use_reentrant=True) if hidden == "checkpoint" else Function.apply(x)
            return self.last(y)

    report = bk.convert_(Hides(), "usf", example=x())
    assert outcomes(report)["inner.read"] == "converted" and outcomes(report)["last"] == "proven"
    name = {"checkpoint": "CheckpointFunctionBackward", "function": "FunctionBackward"}[hidden]
    assert reason(report, "inner.read") == f"not proven: not called, and {name} may hide a read"


def test_a_parameter_of_two_modules_is_nobodys_fault() -> None:
    class Language(nn.Module):
        def __init__(self, calls: bool) -> None:
            super().__init__()
            self.embedding, self.head, self.calls = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False), calls
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            y = self.embedding(x)
            return self.head(y) if self.calls else y

    tokens = torch.arange(6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = bk.convert_(Language(True), "usf", example=tokens)
        assert report.proven == ["head"] and reason(report, "head") == "its weight is embedding's too"
        report = bk.convert_(model := Language(False), "usf")
        model(tokens)
    assert outcomes(report)["head"] == "unused" and "only that was called" in reason(report, "head")


def test_parametrized_weights() -> None:
    model = mlp()
    bk.convert_(model, "usf")
    nn.utils.parametrizations.weight_norm(model[0])
    assert bk.check(model, x()).proven == ["0", "2"]

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = model[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) @ self.layer.weight

    with pytest.warns(UserWarning, match="layer: its weight goes into"):
        bk.convert_(whole := Twice(), "usf")
        whole(x())


def test_frozen_weights() -> None:
    model = Reads().requires_grad_(False)
    report = bk.convert_(model, "usf", example=x())
    assert outcomes(report) == {"read": "left", "called": "proven", "spare": "unused", "norm": "left"}
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv1d(3, 3, 1), nn.MultiheadAttention(4, 2)])
def test_a_frozen_first_layer_is_not_said_to_be_checkpointed(layer: nn.Module) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = layer.requires_grad_(False), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x, x, x)[0] if isinstance(self.first, nn.MultiheadAttention) else self.first(x)
            return self.second(y)

    example = torch.randn(3, 4)
    reports = [bk.convert_(First(), "usf", example=example), bk.convert_(model := First(), "usf")]
    model(example)
    for report in reports:
        assert outcomes(report)["first"] == "converted" and "checkpoint" not in reason(report, "first")


class Output:
    __slots__ = ("hidden", "parts")

    def __init__(self, parts: Any) -> None:
        self.parts, self.hidden = parts, self


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: Output([{"y": y}]),
        lambda y: torch.distributions.Normal(y, 1.0),
        lambda y: {"aux": None, "y": (y, "text")},
    ],
)
def test_outputs_of_any_kind(wrap: Callable[[Tensor], Any]) -> None:
    model = mlp()
    model.register_forward_hook(lambda module, args, y: wrap(y))
    assert bk.convert_(model, "usf", example=x()).proven == ["0", "2"]


def test_outer_modes_do_not_matter() -> None:
    model = mlp()
    bk.convert_(model, "usf")
    with torch.no_grad():
        assert bk.check(model, x()).proven == ["0", "2"]
    with torch.inference_mode():
        assert bk.check(model, torch.randn(1, 4)).names("converted", "proven") == ["0", "2"]


def test_an_example_whose_outputs_have_no_gradient_proves_nothing() -> None:
    model = mlp()
    model.register_forward_hook(lambda module, args, y: y.detach())
    report = bk.convert_(model, "usf", example=x())
    assert outcomes(report) == {"0": "converted", "2": "converted"} and reason(report, "0") == "not proven yet"
    assert pending(model)


def test_an_example_that_raises_leaves_the_proof_to_the_first_forward() -> None:
    with pytest.raises(ValueError, match="input"):
        bk.convert_(model := mlp(), "usf", example=x(3, 5))
    assert pending(model) and "used" not in vars(model[0])
