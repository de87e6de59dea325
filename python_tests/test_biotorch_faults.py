"""The 14 faults probed in BioTorch 0.0.16, by number, as things that must work here; and its state_dicts."""

import copy
import importlib.util
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import with_feedback
from small import DEVICES, RULES, assert_equal, call, gradients
from torch import Tensor, nn

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_follows_b(layer: nn.Module, x: Tensor, f: Any) -> None:
    """The gradients of `layer` are those of f(x, W, bias) with B in the input gradient."""
    x = x.detach().requires_grad_()
    y = layer(x)
    b = layer.feedback_matrix().detach()
    assert not torch.equal(b, layer.weight)
    expected = with_feedback(f, x, layer.weight, b, layer.bias)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    wanted = (x, layer.weight, layer.bias)
    ours, theirs = torch.autograd.grad(y, wanted, direction), torch.autograd.grad(expected, wanted, direction)
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("rule", ["usf", "fa"])
@pytest.mark.parametrize("shape", [(2, 3, 6), (6,), (2, 1, 3, 6)])
def test_1_linear_takes_any_leading_dimensions(rule: str, shape: tuple[int, ...]) -> None:
    assert_follows_b(bk.nn.Linear(6, 5, feedback=rule), torch.randn(shape), F.linear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_2_linear_under_autocast(rule: str, dtype: torch.dtype) -> None:
    layer, x = bk.nn.Linear(6, 5, feedback=RULES[rule]), torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    direction = torch.randn_like(y)
    grad_x, grad_weight, grad_bias = torch.autograd.grad(y, (x, layer.weight, layer.bias), direction)
    assert {grad_x.dtype, grad_weight.dtype, grad_bias.dtype} == {torch.float32}
    torch.testing.assert_close(grad_x, direction.float() @ layer.feedback_matrix(), atol=5e-2, rtol=2e-2)
    torch.testing.assert_close(grad_weight, direction.float().t() @ x, atol=5e-2, rtol=2e-2)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_3_padding_mode_is_obeyed(mode: str) -> None:
    layer = bk.nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode, feedback="fa")
    plain = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode)
    plain.load_state_dict({name: t for name, t in layer.state_dict().items() if "feedback" not in name})
    x = torch.randn(2, 2, 5, 5)
    torch.testing.assert_close(layer(x.clone().requires_grad_()), plain(x))
    assert_follows_b(layer, x, lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1), mode=mode), w, b))


@pytest.mark.parametrize("kernel", [3, 4])
def test_4_same_padding(kernel: int) -> None:
    layer = bk.nn.Conv2d(2, 3, kernel, padding="same", feedback="fa")
    assert_follows_b(layer, torch.randn(2, 2, 5, 5), lambda x, w, b: F.conv2d(x, w, b, padding="same"))


def test_5_unbatched_input() -> None:
    assert_follows_b(bk.nn.Conv2d(2, 3, 3, feedback="fa"), torch.randn(2, 5, 5), F.conv2d)


@pytest.mark.parametrize("scale", ["xavier", "torch", "xiao", "match", 0.25])
def test_6_brsf_with_any_scale(scale: Any) -> None:
    layer = bk.nn.Linear(64, 48, feedback=bk.BatchMagnitude(scale=scale))
    weight = layer.weight.detach()
    wanted = {
        "xavier": (2 / 112) ** 0.5,
        "torch": (1 / 192) ** 0.5,
        "xiao": 1 / 8,
        "match": weight.square().mean() ** 0.5,
    }
    b = layer.feedback_matrix()
    torch.testing.assert_close(b.square().mean() ** 0.5, torch.as_tensor(wanted.get(scale, scale)), rtol=0.03, atol=0)
    assert torch.equal(b.sign(), weight.sign())


@pytest.mark.parametrize("rule", RULES)
def test_7_parameters_train(rule: str) -> None:
    layer = bk.nn.Linear(6, 5, feedback=RULES[rule])
    trained = [layer.weight, layer.bias]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    fixed = {name: t.clone() for name, t in layer.state_dict().items() if "feedback" in name}
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.randn(4, 6, requires_grad=True)).square().sum().backward()
        optimizer.step()
    assert layer.weight is trained[0] and layer.bias is trained[1]
    assert not any(torch.equal(p, old) for p, old in zip(trained, before, strict=True))
    assert all(torch.equal(layer.state_dict()[name], t) for name, t in fixed.items())


@pytest.mark.parametrize("rule", RULES)
def test_8_state_keeps_its_identity(rule: str) -> None:
    layer = bk.nn.Linear(6, 5, feedback=RULES[rule])
    before = layer.state_dict(keep_vars=True)
    layer(torch.randn(4, 6, requires_grad=True)).sum().backward()
    after = layer.state_dict(keep_vars=True)
    assert list(before) == list(after) and all(after[name] is t for name, t in before.items())


def test_9_attention_is_converted_in_deed() -> None:
    plain = nn.MultiheadAttention(8, 2, batch_first=True)
    model = copy.deepcopy(plain)
    report = bk.convert_(model, bk.SignSymmetry(scale=1.0))
    assert report.converted == [""] and type(model.out_proj) is bk.nn.Linear
    x, value = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    for layer in (plain, model):
        query = x.clone().requires_grad_()
        layer(query, query, value)[0].square().sum().backward()
        layer.seen = query.grad, layer.in_proj_weight.grad
    # Through out_proj's B (the packed weight's gradient) and through the packed projection's B (the query's).
    for ours, theirs in zip(model.seen, plain.seen, strict=True):
        assert (ours - theirs).norm() > 0.1 * theirs.norm()
    torch.testing.assert_close(model.out_proj.weight.grad, plain.out_proj.weight.grad)


def test_10_tied_modules_stay_tied() -> None:
    model = nn.ModuleDict({"l": nn.Linear(4, 4)})
    model["tied"] = model["l"]
    bk.convert_(model, "fa")
    assert model["l"] is model["tied"]


@pytest.mark.parametrize("name", ["Conv1d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"])
def test_11_every_convolution_converts(name: str) -> None:
    model = nn.Sequential(getattr(nn, name)(2, 3, 2))
    assert bk.convert_(model, "fa").converted == ["0"]
    f = getattr(F, name.replace("ConvTranspose", "conv_transpose").replace("Conv", "conv"))
    assert_follows_b(model[0], torch.randn(2, 2, *(4,) * int(name[-2])), f)


def test_12_one_graph_under_dynamo() -> None:
    torch._dynamo.reset()
    layer = bk.nn.Linear(6, 5, feedback="usf")
    explained = torch._dynamo.explain(layer)(torch.randn(4, 6, requires_grad=True))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_13_seeded_frsf_saves_the_weight_and_a_key() -> None:
    layer, saved = bk.nn.Linear(1024, 1024, feedback="frsf"), {}

    def pack(t: Tensor) -> Tensor:
        saved[t.data_ptr()] = t
        return t

    x = torch.randn(8, 1024, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    # The weight, which is alive anyway; the input; and 24 bytes. No second matrix in the layer either.
    assert sum(t.nbytes for t in saved.values()) == layer.weight.nbytes + x.nbytes + 24
    assert layer.weight.data_ptr() in saved
    kept = sum(t.nbytes for name, t in layer.state_dict().items() if "feedback" in name)
    assert kept == layer.feedback_state.nbytes <= 256 and not list(layer.parameters())[2:]


@pytest.mark.parametrize("rule", RULES)
def test_14_what_b_depends_on_survives_a_round_trip(rule: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    bk.convert_(model, RULES[rule], seed=3)
    # The scale is part of the rule, not a hidden number that an initialisation left behind.
    other = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    bk.convert_(other, RULES[rule], seed=4)
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 6, requires_grad=True)
    assert_equal(gradients(other, x), gradients(model, x))


# Found in BioTorch by reading.


@pytest.mark.parametrize("device", ["meta", *DEVICES[1:]])
@pytest.mark.parametrize("rule", RULES)
def test_layers_are_converted_where_they_are(rule: str, device: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5, device=device), nn.Conv2d(2, 3, 1, device=device))
    bk.convert_(model, RULES[rule])
    assert {t.device.type for t in model.state_dict().values()} == {device}
    call(model[0], torch.randn(4, 6, device=device, requires_grad=True)).sum().backward()


def test_layers_share_no_mutable_configuration() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    bk.convert_(model, "fa")
    with pytest.raises(AttributeError):
        model[0].feedback.scale = 3.0
    bk.convert_(model, bk.FeedbackAlignment(scale=3.0), filter_fn=lambda m, name: name == "0")
    assert model[1].feedback == bk.FeedbackAlignment()


def test_brsf_redraws_from_the_weight_and_no_generator() -> None:
    layers = [nn.Linear(6, 5) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    drawn = []
    for rank, layer in enumerate(layers):
        bk.convert_(layer, "brsf")
        torch.manual_seed(rank)
        drawn.append(layer.feedback_matrix())
        with torch.no_grad():
            layer.weight += 1
        torch.rand(rank)
        drawn.append(layer.feedback_matrix())
    assert_equal(drawn[:2], drawn[2:])
    assert not torch.equal(drawn[0].abs(), drawn[1].abs())


def biotorch_state(rule: str, bias: bool = True) -> dict[str, Tensor]:
    """What BioTorch 0.0.16 saves for Linear(6, 5), written out."""
    weight, drawn = torch.randn(5, 6), torch.randn(5, 6)
    scale = (2 / 11) ** 0.5
    backward = {"fa": drawn, "frsf": drawn.abs(), "usf": scale * weight.sign(), "brsf": drawn.abs() * weight.sign()}
    state = {"weight": weight, "weight_backward": backward[rule]}
    return state | ({"bias": torch.randn(5), "bias_backward": torch.zeros(5)} if bias else {})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rule", ["fa", "frsf", "usf", "brsf"])
def test_a_biotorch_state_dict_loads(rule: str, bias: bool) -> None:
    state = biotorch_state(rule, bias)
    given = {"usf": bk.SignSymmetry(scale="xavier")}.get(rule, rule)
    model = nn.Sequential(bk.nn.Linear(6, 5, bias=bias, feedback=given))
    own = model[0].feedback_matrix()
    nested = {f"0.{name}": t for name, t in state.items()}
    names = list(nested)
    assert str(model.load_state_dict(nested)) == "<All keys matched successfully>"
    assert list(nested) == names
    layer, backward = model[0], state["weight_backward"]
    assert torch.equal(layer.weight, state["weight"])
    wanted = {"fa": backward, "frsf": backward * state["weight"].sign(), "usf": backward}.get(rule)
    if wanted is None:
        # brSF's is redrawn, and its signs follow W.
        assert torch.equal(layer.feedback_matrix().sign(), state["weight"].sign())
        assert not torch.equal(layer.feedback_matrix().abs(), own.abs())
    else:
        torch.testing.assert_close(layer.feedback_matrix(), wanted)
    if rule in ("fa", "frsf"):
        assert layer.feedback == type(RULES[rule])(stored=True)
        # The adopted B is state like any other: it is saved, and loads into a layer of the same kind.
        other = bk.nn.Linear(6, 5, bias=bias, feedback=layer.feedback)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other.feedback_matrix(), layer.feedback_matrix())


def test_a_usf_state_dict_of_another_scale_says_which() -> None:
    state = biotorch_state("usf")
    for given, own in (("xiao", "0.408248"), ("initial", "that of a W which is not in the file")):
        layer = bk.nn.Linear(6, 5, feedback=bk.SignSymmetry(scale=given))
        match = rf"weight_backward: its magnitude is .* scale='{given}' is {own}.*SignSymmetry\(scale="
        with pytest.raises(RuntimeError, match=match) as raised:
            layer.load_state_dict(state)
    scale = float(str(raised.value).split("SignSymmetry(scale=")[1].split(")")[0])
    layer = bk.nn.Linear(6, 5, feedback=bk.SignSymmetry(scale=scale))
    layer.load_state_dict(state)
    torch.testing.assert_close(layer.feedback_matrix(), state["weight_backward"])


@pytest.mark.parametrize(
    "feedback",
    [
        "fa_signed_init",
        *(kind(scale=s) for kind in (bk.FeedbackAlignment, bk.WeightMirror) for s in ("match", "initial")),
    ],
)
def test_a_biotorch_state_dict_a_rule_has_no_place_for(feedback: Any) -> None:
    with pytest.raises(RuntimeError, match="weight_backward: expected"):
        bk.nn.Linear(6, 5, feedback=feedback).load_state_dict(biotorch_state("fa"))


def biotorch_layers(rule: str) -> Any:
    if importlib.util.find_spec("biotorch") is None:
        pytest.skip("BioTorch is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"biotorch.layers.{rule}")


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
@pytest.mark.parametrize("rule", ["fa", "frsf", "usf", "brsf"])
def test_gradients_are_biotorchs_where_it_runs(rule: str, kind: str) -> None:
    args, shape = ((6, 5), (4, 6)) if kind == "Linear" else ((4, 6, 3, 2, 1, 1, 2), (2, 4, 5, 5))
    theirs = getattr(biotorch_layers(rule), kind)(*args)
    x = torch.randn(shape, requires_grad=True)
    expected = gradients(theirs, x)
    # usf: BioTorch's constant is Xavier's; brsf: it draws in every forward, so only what it drew last can be compared.
    given = {"usf": bk.SignSymmetry(scale="xavier"), "brsf": bk.FeedbackAlignment(stored=True)}.get(rule, rule)
    ours = getattr(bk.nn, kind)(*args, feedback=given)
    ours.load_state_dict(theirs.state_dict())
    for a, e in zip(gradients(ours, x), expected, strict=True):
        torch.testing.assert_close(a, e)


def test_a_whole_model_of_biotorch_loads() -> None:
    layers = biotorch_layers("fa")
    theirs = nn.Sequential(layers.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), layers.Linear(36, 5))
    ours = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
    bk.convert_(ours, "fa")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    for a, e in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        torch.testing.assert_close(a, e)
