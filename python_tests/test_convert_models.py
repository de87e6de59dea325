"""convert_ on models of torchvision and torch.nn."""

import copy
from typing import Any

import pytest
import torch
from small import RULES, assert_equal, gradients
from torch import nn

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")
torchvision = pytest.importorskip("torchvision")


def test_resnet18() -> None:
    model = torchvision.models.resnet18()
    report = bk.convert_(model, "usf", last_layer="backprop")
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert report.converted == convolutions and len(convolutions) == 20
    assert all(type(model.get_submodule(name)) is bk.nn.Conv2d for name in convolutions)
    assert type(model.fc) is nn.Linear and "fc" in report.left
    rows = {row.name: row for row in report.rows}
    why = "left to back-propagation; last_layer: the last of named_modules()"
    assert (rows["fc"].rule, rows["fc"].reason) == ("backprop", why)
    assert (rows["bn1"].outcome, rows["bn1"].reason) == ("left", "has no feedback rule")
    assert rows["conv1"].rule == "usf"
    text = str(report).splitlines()
    assert text[0].split() == ["module", "type", "outcome", "rule", "why"]
    assert len(text) == 2 + len(report.rows) + 1
    assert text[-1] == "20 converted, 21 left"
    assert "layer4.1.conv2 Conv2d converted usf not proven yet" in [" ".join(line.split()) for line in text]


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
    torch.testing.assert_close(model.layer4[1].conv2.weight.grad, expected.layer4[1].conv2.weight.grad)
    assert not torch.allclose(model.conv1.weight.grad, expected.conv1.weight.grad)


def vit(**kwargs: Any) -> nn.Module:
    return torchvision.models.VisionTransformer(16, 8, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, **kwargs)


def test_a_traced_model_converts() -> None:
    model = torchvision.models.resnet18()
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    features = extraction.create_feature_extractor(model, ["layer1.0.conv2"])
    assert bk.convert_(features, "fa").converted == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    checked = bk.check(features, torch.randn(1, 3, 16, 16, requires_grad=True))
    assert checked.proven == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]


@pytest.mark.parametrize("order", ["weights first", "weights last"])
@pytest.mark.parametrize("rule", ["fa", "fa-stored", "frsf"])
def test_pretrained_weights(rule: str, order: str) -> None:
    pretrained, model = (nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)) for _ in range(2))
    if order == "weights first":
        model.load_state_dict(pretrained.state_dict())
        bk.convert_(model, RULES[rule])
    else:
        bk.convert_(model, RULES[rule])
        with pytest.raises(RuntimeError, match=r"Missing key.*feedback_"):
            model.load_state_dict(pretrained.state_dict())
        model.load_state_dict(pretrained.state_dict(), strict=False)
    bk.convert_(pretrained, RULES[rule])
    x = torch.randn(3, 6, requires_grad=True)
    assert_equal(gradients(model, x), gradients(pretrained, x))


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
    ours, theirs = gradients(model, x), gradients(plain, x)
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
    for ours, theirs in zip(gradients(model, x), gradients(plain, x), strict=True):
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
