"""convert_: what converts, what is left, and what stays as it was."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import DEVICES, RULES, assert_equal, gradients
from torch import Tensor, nn

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")


class Tied(nn.Module):
    """Two modules and one Parameter, as an autoencoder with shared weights or a tied language model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def mlp(**kwargs: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 5, **kwargs), nn.ReLU(), nn.Linear(5, 4, **kwargs), nn.ReLU(), nn.Linear(4, 3, **kwargs)
    )


def keys(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_buffers() if name.endswith("feedback_key")}


def test_everything_else_about_a_module_stays() -> None:
    model = mlp(dtype=torch.float64).eval()
    model[2].weight.requires_grad_(False)
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].weight.register_hook(lambda grad: calls.append("gradient"))
    model[0].note = "kept"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    modules, parameters = list(model.modules()), list(model.parameters())
    bk.convert_(model, "fa")
    assert list(map(id, model.modules())) == list(map(id, modules))
    assert list(map(id, model.parameters())) == list(map(id, parameters))
    assert not any(m.training for m in model.modules())
    assert not model[2].weight.requires_grad and model[0].note == "kept"
    before = [p.detach().clone() for p in parameters]
    model(torch.randn(2, 6, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert calls == ["forward", "gradient"]
    moved = [not torch.equal(p, old) for p, old in zip(parameters, before, strict=True)]
    assert moved == [p.requires_grad for p in parameters]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["fa-stored", "fa", "brsf", "fa_signed_init"])
def test_dtype_and_device_are_the_weights(rule: str, dtype: torch.dtype, device: str) -> None:
    model = mlp(dtype=dtype, device=device)
    bk.convert_(model, RULES[rule])
    assert {t.device.type for t in model.state_dict().values()} == {device}
    assert {t.dtype for name, t in model.state_dict().items() if "feedback" not in name} == {dtype}
    x = torch.randn(2, 6, dtype=dtype, device=device, requires_grad=True)
    assert all(grad.dtype == dtype and grad.isfinite().all() for grad in gradients(model, x))


def test_a_root_module_converts() -> None:
    layer = nn.Linear(3, 2)
    report = bk.convert_(layer, "fa")
    assert type(layer) is bk.nn.Linear
    assert report.converted == [""] and "(root)  Linear  converted  fa" in str(report)
    assert torch.equal(layer.feedback_key, bk.feedback.feedback_key(0, "weight"))


def test_a_model_without_weights() -> None:
    assert str(bk.convert_(nn.ReLU(), "fa")).splitlines()[-1] == "no module with weights"


def test_every_convertible_class() -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(2, 2),
            "attention": nn.MultiheadAttention(4, 2),
            **{f"conv{d}": getattr(nn, f"Conv{d}d")(2, 2, 1) for d in (1, 2, 3)},
            **{f"conv_transpose{d}": getattr(nn, f"ConvTranspose{d}d")(2, 2, 1) for d in (1, 2, 3)},
            **{f"lc{d}": getattr(bk.nn, f"LocallyConnected{d}d")(2, 2, 1, input_size=2) for d in (1, 2, 3)},
            **{f"lct{d}": getattr(bk.nn, f"LocallyConnectedTranspose{d}d")(2, 2, 1, output_size=2) for d in (1, 2, 3)},
        }
    )
    classes = [type(m) for m in model.values()]
    report = bk.convert_(model, "fa")
    assert report.converted == list(model)
    assert all(type(m) is getattr(bk.nn, kind.__name__) for m, kind in zip(model.values(), classes, strict=True))
    assert {m.feedback.name for m in model.values()} == {"fa"}
    assert type(model["attention"].out_proj) is bk.nn.Linear
    restored = bk.convert_(model, None)
    assert restored.restored == list(model)
    assert [type(m) for m in model.values()] == classes


@pytest.mark.parametrize("case", ["filtered", "subclass", "lazy"])
def test_a_last_layer_that_cannot_convert_is_the_one_left(case: str) -> None:
    model = mlp()
    if case != "filtered":
        model[4] = {"subclass": Odd, "lazy": lambda _, out: nn.LazyLinear(out)}[case](4, 3)
    report = bk.convert_(model, "fa", last_layer="usf", filter_fn=lambda m, name: case != "filtered" or name != "4")
    assert [model[i].feedback.name for i in (0, 2)] == ["fa", "fa"]
    row = next(row for row in report.rows if row.name == "4")
    assert row.outcome == "left" and row.reason.endswith("the last layer: last_layer means no other")


def test_last_layer_is_no_auxiliary_head_norm_or_embedding() -> None:
    layers = {n: nn.Linear(4, 4) for n in ("aux_first", "body", "classifier", "aux_classifier")}
    model = nn.ModuleDict(layers | {"norm": nn.BatchNorm1d(4), "positions": nn.Embedding(4, 4)})
    report = bk.convert_(model, "fa", last_layer="backprop")
    rows = {row.name: row for row in report.rows}
    assert report.converted == ["aux_first", "body", "aux_classifier"]
    assert rows["classifier"].reason == "left to back-propagation; last_layer: the last of named_modules()"
    assert all("auxiliary head" in rows[name].reason for name in ("aux_first", "aux_classifier"))


def test_filter_fn_sees_modules_and_names() -> None:
    model, seen = mlp(), {}

    def choose(module: nn.Module, name: str) -> bool:
        seen[name] = module
        return name == "2"

    report = bk.convert_(model, "usf", filter_fn=choose)
    assert seen == {name: model.get_submodule(name) for name in ("0", "2", "4")}
    assert report.converted == ["2"]
    assert {row.name: row.reason for row in report.rows if row.outcome == "left"} == {
        "0": "filter_fn",
        "4": "filter_fn",
    }


def test_a_second_call_touches_what_it_matches_and_draws_the_same() -> None:
    model = mlp()
    bk.convert_(model, "fa")
    first = {name: key.clone() for name, key in keys(model).items()}
    kept = model[0].feedback_key
    bk.convert_(model, "frsf", filter_fn=lambda m, name: name == "2")
    assert [model[i].feedback.name for i in (0, 2, 4)] == ["fa", "frsf", "fa"]
    assert model[0].feedback_key is kept
    assert all(torch.equal(key, first[name]) for name, key in keys(model).items())
    bk.convert_(model, "fa")
    assert all(torch.equal(key, first[name]) for name, key in keys(model).items())


def test_seeds_and_layers_differ_and_calls_agree() -> None:
    x, drawn = torch.ones(1, 6, requires_grad=True), []
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    for seed in (0, 0, 1):
        model = copy.deepcopy(base)
        torch.manual_seed(len(drawn))  # what torch's generator would say plays no part
        bk.convert_(model, "fa", seed=seed)
        drawn.append([model[0].feedback_matrix(), model[1].feedback_matrix(), *gradients(model, x)])
    assert_equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0][0], drawn[2][0])
    assert not torch.equal(drawn[0][0], drawn[0][1])
    assert not torch.equal(drawn[0][2], drawn[2][2])


def test_a_draw_does_not_depend_on_who_wraps_the_model() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = mlp()
    bk.convert_(model, "fa")
    for wrapped in (torch.compile(mlp()), nn.Sequential(*map(checkpoint_wrapper, mlp()))):
        bk.convert_(wrapped, "fa")
        assert_equal(list(keys(wrapped).values()), list(keys(model).values()))


def test_convert_does_not_touch_torchs_generator() -> None:
    model, state = mlp(), torch.get_rng_state()
    bk.convert_(model, "fa")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_module_used_in_two_places_stays_one() -> None:
    model = mlp()
    model.tied = model[2]
    report = bk.convert_(model, "fa")
    assert model.tied is model[2] and type(model.tied) is bk.nn.Linear
    assert report.converted == ["0", "2", "4"]


@pytest.mark.parametrize("rule", ["fa", "frsf", "brsf", "fa-stored", "frsf-stored", "fa_signed_init", "usf"])
def test_modules_that_share_a_parameter_share_b(rule: str) -> None:
    model = Tied()
    bk.convert_(model, RULES[rule])
    assert model.a.weight is model.b.weight
    assert torch.equal(model.a.feedback_matrix(), model.b.feedback_matrix())
    for name, state in model.a.state_dict(keep_vars=True).items():
        if name.startswith("feedback"):
            assert getattr(model.b, name) is state
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for m in (model, copied):
            m.a.weight.neg_()
    assert torch.equal(copied.a.feedback_matrix(), copied.b.feedback_matrix())
    assert torch.equal(copied.a.feedback_matrix(), model.b.feedback_matrix())
    for name, state in copied.a.state_dict(keep_vars=True).items():
        if name.startswith("feedback"):
            assert getattr(copied.b, name) is state is not getattr(model.a, name)


def test_a_shared_parameter_keeps_its_key_when_only_one_user_is_converted_again() -> None:
    model = Tied()
    bk.convert_(model, "fa")
    before = model.b.feedback_matrix()
    bk.convert_(model, "fa", filter_fn=lambda m, name: name == "b")
    assert torch.equal(model.b.feedback_matrix(), before)
    assert torch.equal(model.a.feedback_matrix(), before)


@pytest.mark.parametrize("rule", RULES)
def test_none_restores_exactly(rule: str) -> None:
    model = nn.ModuleDict({"net": mlp(), "conv": nn.Conv2d(2, 2, 3), "attention": nn.MultiheadAttention(4, 2)})
    plain = copy.deepcopy(model)
    bk.convert_(model, RULES[rule])
    report = bk.convert_(model, None)
    assert report.restored == ([] if rule == "backprop" else ["net.0", "net.2", "net.4", "conv", "attention"])
    assert repr(model) == repr(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert vars(ours).keys() == vars(theirs).keys()
    x = torch.randn(2, 6, requires_grad=True)
    assert_equal(gradients(model["net"], x), gradients(plain["net"], x))


def test_a_rule_for_each_class_or_by_a_function() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(2, 2, 3), "first": nn.Linear(4, 4), "up": nn.ConvTranspose1d(2, 2, 1)})
    model["last"] = nn.Linear(4, 4)
    rules = {nn.Linear: bk.FeedbackAlignment(scale="torch"), nn.modules.conv._ConvNd: "usf", nn.ConvTranspose1d: None}
    report = bk.convert_(model, rules, last_layer="frsf")
    assert report.converted == ["conv", "first", "last"] and type(model["up"]) is nn.ConvTranspose1d
    assert [model[n].feedback for n in report.converted] == [bk.SignSymmetry(), rules[nn.Linear], bk.FixedMagnitude()]
    # As Xiao et al.'s code draws it, of U(±1/√in).
    assert model["first"].rms() == 1 / math.sqrt(3 * 4) and model["first"].feedback_matrix().abs().max() <= 1 / 2
    # The nearest of its classes; one that has none is left as it is.
    report = bk.convert_(model, {nn.Module: "fa", nn.Conv2d: "kp", nn.Linear: "brsf"})
    assert [m.feedback.name for m in model.values()] == ["kp", "brsf", "fa", "brsf"]
    report = bk.convert_(model, {nn.Conv2d: None})
    assert report.restored == ["conv"] and {r.reason for r in report.rows if r.outcome == "left"} == {
        "no rule for its class"
    }
    assert model["first"].feedback.name == "brsf"

    bk.convert_(model, lambda module, name: "usf" if name == "first" else None)
    assert [n for n, m in model.items() if isinstance(m, bk.nn.FeedbackLayer)] == ["first"]


@pytest.mark.parametrize(
    ("feedback", "error", "message"),
    [
        ({"Linear": "fa"}, TypeError, "feedback: expected classes of modules as the keys of a dictionary, got str"),
        ({nn.Linear: "wrong"}, ValueError, "feedback: "),
        (lambda module, name: 3, TypeError, "feedback: "),
        (bk.SignSymmetry, TypeError, "feedback: "),
    ],
)
def test_wrong_rules_for_classes(feedback: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bk.convert_(model := mlp(), feedback)
    assert type(model[0]) is nn.Linear


def test_backprop_leaves_our_layers_alone() -> None:
    model = nn.Sequential(bk.nn.LocallyConnected1d(2, 2, 1, input_size=3, feedback="fa"))
    bk.convert_(model, "backprop")
    assert type(model[0]) is bk.nn.LocallyConnected1d and model[0].feedback == bk.Backprop()
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


class Odd(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def _attention_with_odd_projection() -> nn.Module:
    attention = nn.MultiheadAttention(4, 2)
    attention.out_proj = Odd(4, 4)
    return attention


def _generated_recurrent() -> nn.Module:
    # As weight drop does, from a Parameter of the module around it.
    layer = nn.LSTM(4, 4, bidirectional=True)
    del layer._parameters["weight_hh_l0"]
    layer.weight_hh_l0 = torch.ones(16, 4)
    return layer


def _integer_linear() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def _generated() -> nn.Module:
    # As a hypernetwork does.
    layer = nn.Linear(4, 4)
    del layer._parameters["weight"]
    layer.weight = torch.ones(4, 4)
    return layer


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


LEFT = {
    "subclass": (
        lambda: Odd(4, 4),
        "subclass of Linear: its forward may differ; to allow it: bioplaus_kernels.register(test_convert.Odd)",
    ),
    "linear map": (
        Dense,
        "has no feedback rule; if it is a linear map, to allow it: bioplaus_kernels.register(test_convert.Dense, torch",
    ),
    "generated": (_generated, "its weight is no Parameter"),
    "generated recurrent": (_generated_recurrent, "its weight is no Parameter"),
    "lazy": (lambda: nn.LazyLinear(4), "not known before the first call"),
    "complex": (lambda: nn.Linear(4, 4, dtype=torch.complex64), "complex64 weight"),
    "integer": (_integer_linear, "int8 weight"),
    "attention": (_attention_with_odd_projection, "out_proj is a Odd"),
    "embedding": (lambda: nn.Embedding(4, 4), "no feedback rule"),
}


def test_a_wrapped_forward_is_left() -> None:
    # As accelerate's hooks replace it.
    model = mlp()
    model[2].forward = model[2].forward
    report = bk.convert_(model, "usf")
    assert report.converted == ["0", "4"] and type(model[2]) is nn.Linear
    assert "convert_ first, then wrap" in next(row.reason for row in report.rows if row.name == "2")


@pytest.mark.parametrize("wrap", ["forward", "weight_norm", "weight_norm by hooks", "spectral_norm", "pruning"])
def test_a_rule_can_be_changed_and_taken_off_under_what_came_later(wrap: str) -> None:
    from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

    wraps: dict[str, Callable[[nn.Linear], object]] = {
        "forward": lambda m: setattr(m, "forward", m.forward),
        "weight_norm": parametrizations.weight_norm,
        "weight_norm by hooks": weight_norm,
        "spectral_norm": lambda m: spectral_norm(m.eval()),
        "pruning": lambda m: prune.random_unstructured(m, "weight", 0.5),
    }
    model = mlp().eval()
    bk.convert_(model, "fa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wraps[wrap](model[2])
    x = torch.randn(2, 6, requires_grad=True)
    assert bk.convert_(model, "usf", example=x).proven == ["0", "2", "4"]
    with bk.metrics.backprop(model):
        exact = gradients(model, x)
    assert bk.convert_(model, None).restored == ["0", "2", "4"]
    assert_equal(gradients(model, x), exact)


KEEPING = RULES | {"kp": bk.KolenPollack(), "wm": bk.WeightMirror()}


@pytest.mark.parametrize("rule", ["kp", "wm", "fa_signed_init", "fa-stored", "fa", "usf"])
def test_a_resized_weight_is_named_with_the_way_out(rule: str) -> None:
    # As structured pruning and transformers' resize_token_embeddings leave it.
    model, x = mlp(), torch.randn(2, 6, requires_grad=True)
    bk.convert_(model, KEEPING[rule])
    model[4].weight, model[4].bias = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(2))
    if rule not in ("fa", "usf"):
        with pytest.raises(
            ValueError, match=r"4\.weight of Linear.*\(2, 4\).*\(3, 4\) before: convert_ the model again"
        ):
            model(x)
        bk.convert_(model, KEEPING[rule])
    gradients(model, x)
    assert model[4].feedback_matrix().shape == (2, 4)
    again = copy.deepcopy(model)
    bk.convert_(again, KEEPING[rule])
    assert torch.equal(again[4].feedback_matrix(), model[4].feedback_matrix())


def test_refused_in_inference_mode() -> None:
    model = mlp()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode cannot be trained"):
        bk.convert_(model, "fa")
    with torch.inference_mode():
        inner = mlp()
    assert "inference_mode" in bk.convert_(inner, "fa").rows[0].reason


def test_quantised_layers_have_a_row() -> None:
    quantized = pytest.importorskip("torch.ao.nn.quantized")
    layers = {"static": quantized.Linear(4, 4), "dynamic": quantized.dynamic.Linear(4, 4)}
    report = bk.convert_(nn.ModuleDict(layers | {"lstm": quantized.dynamic.LSTM(4, 4)}), "fa")
    assert [(row.name, row.outcome, row.reason) for row in report.rows] == [
        (name, "left", "quantised: convert_ does not train it") for name in ("static", "dynamic", "lstm")
    ]


def test_a_weight_that_stands_for_another_tensor_is_left() -> None:
    # As torchao's quantised weights, which say that they are of a floating dtype.
    from torch.testing._internal.two_tensor import TwoTensor

    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4)))
    assert "its weight is a TwoTensor, quantised" in bk.convert_(layer, "usf").rows[0].reason


@pytest.mark.parametrize("case", LEFT)
def test_left_with_a_reason(case: str) -> None:
    build, reason = LEFT[case]
    model = nn.ModuleDict({"odd": build(), "plain": nn.Linear(4, 4)})
    kind = type(model["odd"])
    report = bk.convert_(model, "fa")
    assert report.converted == ["plain"]
    row = next(row for row in report.rows if row.name == "odd")
    assert row.outcome == "left" and reason in row.reason
    assert reason in str(report)
    assert type(model["odd"]) is kind
    assert not any("feedback" in name for name in model["odd"].state_dict())


def test_quantization_aware_layers_are_left() -> None:
    qat = pytest.importorskip("torch.ao.nn.qat")
    quantization = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(qat.Linear(4, 4, qconfig=quantization.get_default_qat_qconfig()))
    assert "subclass of Linear" in next(row.reason for row in bk.convert_(model, "fa").rows if row.name == "0")


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"feedback": "usff"}, ValueError, "feedback: expected one of backprop, usf, .*got 'usff'"),
        ({"feedback": bk.SignSymmetry}, TypeError, "feedback: expected a rule, its name or None, got the class SignS"),
        ({"feedback": torch.ones(1)}, TypeError, "feedback: expected a rule, its name or None, got Tensor"),
        ({"feedback": "fa", "last_layer": "sgd"}, ValueError, "last_layer: expected one of"),
        ({"feedback": "fa", "filter_fn": "conv"}, TypeError, "filter_fn: expected a function"),
        ({"feedback": "fa", "seed": 1.5}, TypeError, "seed: expected an integer, got 1.5"),
        ({"feedback": "fa", "seed": True}, TypeError, "seed: expected an integer, got True"),
        ({"feedback": "fa", "example": [torch.ones(1, 6)]}, TypeError, "example: expected a tensor, a tuple"),
    ],
)
def test_wrong_arguments_raise_before_anything_is_touched(arguments: Any, error: type[Exception], match: str) -> None:
    model = mlp()
    with pytest.raises(error, match=match):
        bk.convert_(model, **arguments)
    assert all(type(m) is not bk.nn.Linear for m in model)


@pytest.mark.parametrize(
    "function", [lambda m: bk.convert_(m, "fa"), bk.check, lambda m: bk.frozen_signs(m).__enter__()]
)
def test_a_model_is_a_module(function: Any) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        function({})
