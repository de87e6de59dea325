"""convert_, check and frozen_signs on whole models."""

import copy
from typing import Any

import pytest
import torch
from small import DEVICES, RULES, assert_equal, gradients
from torch import Tensor, nn

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")
torchvision = pytest.importorskip("torchvision")


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
    return {name: value for name, value in model.state_dict().items() if name.endswith("feedback_key")}


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients that feedback shapes: of every trainable parameter and of the input."""
    return gradients(model, x)


def test_resnet18() -> None:
    model = torchvision.models.resnet18()
    report = bk.convert_(model, "usf", last_layer="backprop")
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert report.converted == convolutions and len(convolutions) == 20
    assert all(type(model.get_submodule(name)) is bk.nn.Conv2d for name in convolutions)
    assert type(model.fc) is nn.Linear and "fc" in report.left
    rows = {row.name: row for row in report.rows}
    assert (rows["fc"].rule, rows["fc"].reason) == ("backprop", "left to back-propagation")
    assert (rows["bn1"].outcome, rows["bn1"].reason) == ("left", "has no feedback rule")
    assert rows["conv1"].rule == "usf"
    text = str(report).splitlines()
    assert text[0].split() == ["module", "type", "outcome", "rule", "why"]
    assert len(text) == 2 + len(report.rows) + 1
    assert text[-1] == "20 converted, 21 left"
    assert "layer4.1.conv2 Conv2d converted usf" in [" ".join(line.split()) for line in text]


def test_resnet18_trains() -> None:
    model = torchvision.models.resnet18(num_classes=4)
    expected = copy.deepcopy(model)
    bk.convert_(model, "usf", last_layer="backprop")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), expected(x))
    model(x).square().sum().backward()
    expected(x).square().sum().backward()
    # The last layers' weight gradients are those of backprop; the first layer's go through 19 feedback matrices.
    assert torch.equal(model.fc.weight.grad, expected.fc.weight.grad)
    assert torch.equal(model.layer4[1].conv2.weight.grad, expected.layer4[1].conv2.weight.grad)
    assert not torch.allclose(model.conv1.weight.grad, expected.conv1.weight.grad)


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
    assert all(grad.dtype == dtype and grad.isfinite().all() for grad in step(model, x))


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


def test_last_layer_is_the_last_that_matches() -> None:
    model = mlp()
    bk.convert_(model, "fa", last_layer=bk.SignSymmetry(scale="match"), filter_fn=lambda m, name: name != "4")
    assert [type(model[i]) for i in (0, 2, 4)] == [bk.nn.Linear, bk.nn.Linear, nn.Linear]
    assert [model[i].feedback for i in (0, 2)] == [bk.FeedbackAlignment(), bk.SignSymmetry(scale="match")]


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
        drawn.append([model[0].feedback_matrix(), model[1].feedback_matrix(), *step(model, x)])
    assert_equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0][0], drawn[2][0])
    assert not torch.equal(drawn[0][0], drawn[0][1])
    assert not torch.equal(drawn[0][2], drawn[2][2])


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
    assert_equal(step(model["net"], x), step(plain["net"], x))


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


def _integer_linear() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def _pruned() -> nn.Module:
    from torch.nn.utils import prune

    return prune.l1_unstructured(nn.Linear(4, 4), "weight", 3)


LEFT = {
    "subclass": (lambda: Odd(4, 4), "subclass of Linear"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "subclass of Linear"),
    "spectral norm by hook": (lambda: nn.utils.spectral_norm(nn.Conv2d(2, 2, 1)), "computed before each call"),
    "pruned": (_pruned, "computed before each call"),
    "lazy": (lambda: nn.LazyLinear(4), "not known before the first call"),
    "complex": (lambda: nn.Linear(4, 4, dtype=torch.complex64), "complex64 weight"),
    "integer": (_integer_linear, "int8 weight"),
    "attention": (_attention_with_odd_projection, "out_proj is a Odd"),
    "embedding": (lambda: nn.Embedding(4, 4), "no feedback rule"),
    "recurrent": (lambda: nn.LSTM(4, 4), "no feedback rule"),
    "bilinear": (lambda: nn.Bilinear(4, 4, 4), "no feedback rule"),
}


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


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer(
        patch_size=[4, 4], embed_dim=8, depths=[2], num_heads=[2], window_size=[2, 2], num_classes=3
    )


def test_swins_bypassed_weights_are_named() -> None:
    model = swin()
    bypassed = [n for n, _ in model.named_modules() if n.endswith(("attn.qkv", "attn.proj"))]
    assert bypassed
    report = bk.convert_(model, "usf")
    reasons = {row.name: row.reason for row in report.rows if row.outcome == "left"}
    for name in bypassed:
        assert reasons[name] == "ShiftedWindowAttention uses its weight without calling it"
        assert type(model.get_submodule(name)) is nn.Linear
    checked = bk.check(model, torch.randn(1, 3, 16, 16))
    assert checked.bypassed == bypassed and checked.unused == []
    assert set(report.converted) <= set(checked.called)
    assert bypassed[0] in str(checked)


def vit(**kwargs: Any) -> nn.Module:
    return torchvision.models.VisionTransformer(16, 8, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, **kwargs)


class Bypass(nn.Module):
    """A model of the user's own that reads a weight, with a batch norm and a dropout that a call moves on."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.spare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(self.called(x @ self.read.weight.t())))


def test_check_finds_bypassed_weights_and_leaves_no_trace() -> None:
    model = Bypass()
    bk.convert_(model, "fa")
    model.called.weight.grad = torch.ones(4, 4)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    x, hooks = torch.randn(3, 4), len(model.called._forward_pre_hooks)
    state = torch.get_rng_state()
    checked = bk.check(model, x)
    assert (checked.called, checked.bypassed, checked.unused) == (["called"], ["read"], ["spare"])
    assert "1 layers called" in str(checked) and "read  bypassed" in str(checked) and "spare  unused" in str(checked)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert torch.equal(model.called.weight.grad, torch.ones(4, 4)) and model.read.weight.grad is None
    assert len(model.called._forward_pre_hooks) == hooks


def test_check_restores_when_the_model_raises() -> None:
    model = Bypass()
    with pytest.raises(RuntimeError):
        bk.check(model, torch.randn(3, 5))
    assert not model.called._forward_pre_hooks
    assert model.norm.num_batches_tracked == 0


@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_check_calls_torchvisions_models_clean(name: str) -> None:
    model = vit() if name == "vit" else torchvision.models.resnet18()
    report = bk.convert_(model, "usf")
    checked = bk.check(model.eval(), torch.randn(1, 3, 16, 16))
    assert checked.bypassed == [] and set(report.converted) <= set(checked.called)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rule", ["usf", "fa"])
def test_transformer_encoder(rule: str, training: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    plain = copy.deepcopy(model)
    report = bk.convert_(model, rule)
    assert report.converted == [f"layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "linear1", "linear2")]
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(model(x), plain(x))
    ours, theirs = step(model, x), step(plain, x)
    assert len(ours) == len(theirs)
    # Output projection and first layer: beyond any rounding from backprop's.
    attention = model.layers[0].self_attn
    for parameter in (attention.in_proj_weight, attention.out_proj.weight):
        i = 1 + next(i for i, p in enumerate(p for p in model.parameters() if p.requires_grad) if p is parameter)
        assert (ours[i] - theirs[i]).norm() > 0.1 * theirs[i].norm()
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))


def test_attention_with_b_set_to_w_is_backprop_inside_a_model() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, dtype=torch.float64), 1)
    plain = copy.deepcopy(model)
    bk.convert_(model, bk.FeedbackAlignment(stored=True))
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, bk.nn.MultiheadAttention):
                m.in_proj_feedback_weight.copy_(m.in_proj_weight)
            elif isinstance(m, bk.nn.Linear):
                m.feedback_weight.copy_(m.weight)
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    for ours, theirs in zip(step(model, x), step(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_vision_transformer() -> None:
    model = torchvision.models.VisionTransformer(
        16, 8, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=3
    )
    report = bk.convert_(model, "usf", last_layer="backprop")
    assert "encoder.layers.encoder_layer_0.self_attention" in report.converted
    assert all("out_proj" not in row.name for row in report.rows)
    nn.init.normal_(model.heads.head.weight)
    model(torch.randn(1, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.encoder.parameters())


def meta_model(rule: str) -> nn.Module:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Conv1d(2, 2, 1), nn.Flatten(), nn.Linear(6, 6))
        bk.convert_(model, RULES[rule])
    assert all(t.is_meta for t in model.state_dict().values())
    return model


def through(model: nn.Module, x: Tensor) -> list[Tensor]:
    return gradients(
        lambda x: model[4](model[0](x).reshape(-1, 6)), x, *(p for p in model[4].parameters() if p.requires_grad)
    )


STATEFUL = ["fa", "frsf", "brsf", "fa-stored", "frsf-stored", "fa_signed_init"]


@pytest.mark.parametrize("rule", STATEFUL)
def test_meta_state_that_was_lost_is_not_used(rule: str) -> None:
    model = meta_model(rule).to_empty(device="cpu")
    x = torch.randn(2, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"lost by to_empty\(\).*reset_parameters\(\).*load a state_dict"):
        model[0](x)
    with pytest.raises(RuntimeError, match=r"lost by to_empty"):
        model[0].feedback_matrix()
    for module in model:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(grad.isfinite().all() for grad in through(model, x))


@pytest.mark.parametrize("rule", [*STATEFUL, "usf"])
def test_meta_then_convert_again_or_load(rule: str) -> None:
    expected = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Conv1d(2, 2, 1), nn.Flatten(), nn.Linear(6, 6))
    bk.convert_(expected, RULES[rule])
    x = torch.randn(2, 6, requires_grad=True)

    loaded = meta_model(rule).to_empty(device="cpu")
    loaded.load_state_dict(expected.state_dict())
    assert_equal(through(loaded, x), through(expected, x))

    assigned = meta_model(rule)
    assigned.load_state_dict(expected.state_dict(), assign=True)
    assert_equal(through(assigned, x), through(expected, x))

    again = meta_model(rule).to_empty(device="cpu")
    with torch.no_grad():
        for ours, theirs in zip(again.parameters(), expected.parameters(), strict=True):
            ours.copy_(theirs)
    bk.convert_(again, RULES[rule])
    assert_equal(through(again, x), through(expected, x))


def test_meta_without_state_needs_nothing() -> None:
    model = meta_model("usf").to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    assert all(grad.isfinite().all() for grad in through(model, torch.randn(2, 6, requires_grad=True)))


@pytest.mark.parametrize("rule", RULES)
def test_meta_model_runs_on_meta(rule: str) -> None:
    x = torch.randn(2, 6, device="meta", requires_grad=True)
    assert [grad.shape for grad in through(meta_model(rule), x)] == [(2, 6), (6, 6), (6,)]


@pytest.mark.parametrize("rule", RULES)
def test_frozen_signs_gives_the_same_gradients(rule: str) -> None:
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Unflatten(1, (2, 20)), nn.Conv1d(2, 3, 3), nn.Flatten())
    model.attention = nn.Identity()
    bk.convert_(model, RULES[rule])
    with torch.no_grad():
        model[0].weight[::3] = 0
    x = torch.randn(3, 6, requires_grad=True)
    expected = step(model, x)
    with bk.frozen_signs(model):
        assert_equal(step(model, x), expected)
        assert_equal(step(model, x), expected)
    assert_equal(step(model, x), expected)


def test_frozen_signs_holds_the_signs_it_began_with() -> None:
    layer = bk.nn.Linear(6, 5, feedback=bk.SignSymmetry(scale=1.0))
    signs = layer.weight.detach().sign()
    with bk.frozen_signs(layer):
        with torch.no_grad():
            layer.weight.neg_()
        assert torch.equal(layer.feedback_matrix(), signs)
    assert torch.equal(layer.feedback_matrix(), -signs)


def test_frozen_signs_nested_raises_and_the_outer_block_goes_on() -> None:
    model = mlp()
    bk.convert_(model, "usf")
    with bk.frozen_signs(model):
        with pytest.raises(RuntimeError, match=r"frozen_signs.*frozen already"), bk.frozen_signs(model[2]):
            pass
        assert model[0]._frozen is not None
    assert all(m._frozen is None for m in model if isinstance(m, bk.nn.Linear))


def test_frozen_signs_ends_with_an_exception() -> None:
    model = mlp()
    bk.convert_(model, "frsf")
    with pytest.raises(ZeroDivisionError), bk.frozen_signs(model):
        raise ZeroDivisionError
    with bk.frozen_signs(model):
        pass


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"feedback": "usff"}, ValueError, "feedback: expected one of backprop, usf, .*got 'usff'"),
        ({"feedback": bk.SignSymmetry}, TypeError, "feedback: expected a rule, its name or None, got type"),
        ({"feedback": torch.ones(1)}, TypeError, "feedback: expected a rule, its name or None, got Tensor"),
        ({"feedback": "fa", "last_layer": "sgd"}, ValueError, "last_layer: expected one of"),
        ({"feedback": "fa", "filter_fn": "conv"}, TypeError, "filter_fn: expected a function"),
        ({"feedback": "fa", "seed": 1.5}, TypeError, "seed: expected an integer, got 1.5"),
        ({"feedback": "fa", "seed": True}, TypeError, "seed: expected an integer, got True"),
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
