"""A layer's state: copies, pickles, files, dtypes, seeds."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from small import FEW, LAYERS, RULES, STATE, assert_equal, build, call, gradients
from torch import Tensor, nn

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")


def names(layer: nn.Module) -> list[str]:
    return [name for name in layer.state_dict() if "feedback" in name]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_in_the_state_dict(layer: str, rule: str) -> None:
    module, _ = build(layer, RULES[rule])
    suffixes, dtype = STATE.get(rule, ("state", torch.uint8))
    prefixes = ["in_proj_", "out_proj."] if layer == "MultiheadAttention" else [""]
    if layer.startswith(("RNN", "LSTM", "GRU")):
        prefixes = [f"{weight.removeprefix('weight_')}_" for weight in module.weights()]
    wanted = {f"{prefix}feedback_{kept}" for prefix in prefixes for kept in (*suffixes.split(), "state")}
    assert set(names(module)) == (set() if rule == "backprop" else wanted)
    for name in names(module):
        state = module.state_dict(keep_vars=True)[name]
        assert state.dtype == (torch.uint8 if name.endswith("state") else dtype) and not state.requires_grad
        # A stored B or |M| is a Parameter, which data-parallel wrappers shard. Integers are buffers, which averages of
        # the parameters and requires_grad_(True) leave alone.
        assert isinstance(state, nn.Parameter) == name.endswith(("weight", "_p", "_q"))


AVERAGES = {
    "swa": {},
    "ema": {"multi_avg_fn": torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)},
    "ema one by one": {"avg_fn": torch.optim.swa_utils.get_ema_avg_fn(0.9)},
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("rule", [*STATE, "kp"])
def test_averaged_model(rule: str, average: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 40))
    bk.convert_(model, RULES.get(rule, "kp"))
    plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 40))
    averaged, expected = (torch.optim.swa_utils.AveragedModel(m, **AVERAGES[average]) for m in (model, plain))
    for _ in range(3):
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p))
        plain.load_state_dict({name: t for name, t in model.state_dict().items() if "feedback" not in name})
        averaged.update_parameters(model)
        expected.update_parameters(plain)
    for name, t in averaged.module.state_dict().items():
        if "feedback" not in name:
            assert torch.equal(t, expected.module.state_dict()[name])
        elif rule != "kp":
            # What is fixed stays, to the rounding of an average of equal numbers; keys and signs to the last bit.
            if not name.endswith("state"):
                torch.testing.assert_close(t, model.state_dict()[name])
            assert t.dtype != torch.int32 or torch.equal(t, model.state_dict()[name])
    x = torch.randn(2, 6, requires_grad=True)
    wanted = [layer.feedback_matrix() for layer in averaged.module[::2]]
    g = torch.ones(2, 40)
    h = averaged.module[0](x)
    torch.testing.assert_close(torch.autograd.grad(h, x, g[:, :5])[0], g[:, :5] @ wanted[0])


@pytest.mark.parametrize("rule", RULES)
def test_freezing_and_unfreezing_a_model(rule: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    bk.convert_(model, RULES[rule])
    x = torch.randn(3, 6, requires_grad=True)
    expected = gradients(model, x, model[0].weight, model[2].weight)
    model.requires_grad_(False).requires_grad_(True)
    assert_equal(gradients(model, x, model[0].weight, model[2].weight), expected)


def _deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _save_and_load(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("duplicate", [_deepcopy, _pickle, _save_and_load])
@pytest.mark.parametrize("layer", ["Linear", "Conv2d", "LocallyConnected1d", "MultiheadAttention"])
def test_a_copy_has_the_same_gradients(layer: str, duplicate: Any, rule: str) -> None:
    module, x = build(layer, RULES[rule])
    other = duplicate(module)
    assert type(other) is type(module) and other.feedback == module.feedback
    assert repr(other) == repr(module)
    assert not {t.data_ptr() for t in module.state_dict().values()} & {
        t.data_ptr() for t in other.state_dict().values()
    }
    assert_equal(gradients(other, x), gradients(module, x))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layer", FEW)
def test_a_state_dict_carries_the_feedback(layer: str, rule: str) -> None:
    module, x = build(layer, RULES[rule])
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other, _ = build(layer, RULES[rule])
    drawn = rule in STATE or rule == "backprop" or rule.startswith("usf")
    assert drawn and not torch.equal(gradients(other, x)[0], gradients(module, x)[0])
    other.load_state_dict(torch.load(file))
    assert_equal(gradients(other, x), gradients(module, x))


@pytest.mark.parametrize("rule", ["frsf", "brsf", "fa"])
def test_loading_the_record_alone_moves_b(rule: str) -> None:
    a, b = (bk.nn.Linear(6, 5, feedback=rule) for _ in range(2))
    b.load_state_dict({"weight": a.weight, "bias": a.bias, "feedback_state": b.feedback_state.clone()})
    assert not torch.equal(a.feedback_matrix(), b.feedback_matrix())
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.feedback_matrix(), b.feedback_matrix())


@pytest.mark.parametrize(
    "key", [torch.tensor([3, 5, 0]), torch.tensor([0, 5, 0]), torch.tensor([1, 5]), torch.zeros(3, dtype=torch.int64)]
)
def test_a_key_of_another_layout_is_refused(key: Tensor) -> None:
    model = nn.Sequential(bk.nn.Linear(6, 5, feedback="fa"))
    state = {n: t for n, t in model.state_dict().items() if "feedback" not in n} | {"0.feedback_key": key}
    with pytest.raises(
        RuntimeError, match=r"0\.feedback_key: expected \(layout version up to 2, key, stream\), got \["
    ):
        model.load_state_dict(state)


OTHERS = {
    "usf": "SignSymmetry",
    "usf-match": "SignSymmetry",
    "fa": "FeedbackAlignment",
    "fa-stored": "FeedbackAlignment",
    "frsf": "FixedMagnitude",
    "fa_signed_init": "SignedInit",
    "kp": "KolenPollack",
}


@pytest.mark.parametrize("built", OTHERS)
@pytest.mark.parametrize("saved", OTHERS)
def test_a_state_dict_of_another_rule_does_not_load(saved: str, built: str) -> None:
    rules = RULES | {"kp": bk.KolenPollack()}
    state = nn.Sequential(bk.nn.Linear(6, 5, feedback=rules[saved])).state_dict()
    model = nn.Sequential(bk.nn.Linear(6, 5, feedback=rules[built]))
    before = model[0].feedback_matrix()
    if saved == built:
        model.load_state_dict(state)
        return
    wanted = (
        rf"0\.feedback_state: expected the state of {OTHERS[built]}\(.*got that of {OTHERS[saved]}\(.*convert_ with"
    )
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=wanted):
            model.load_state_dict(state, strict=strict)
    if not built.startswith("usf"):
        assert torch.equal(model[0].feedback_matrix().abs(), before.abs())


def test_plain_torch_state_dicts_load_where_a_rule_keeps_nothing() -> None:
    plain = nn.Linear(6, 5)
    layer = bk.nn.Linear(6, 5, feedback="usf")
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.weight, plain.weight)
    with pytest.raises(RuntimeError, match=r"Missing key.*feedback_state"):
        bk.nn.Linear(6, 5, feedback="fa").load_state_dict(plain.state_dict())


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double()])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layer", ["Linear", "Conv2d", "LocallyConnected2d", "MultiheadAttention"])
def test_a_change_of_dtype_keeps_the_draw(layer: str, rule: str, convert: Any) -> None:
    module, x = build(layer, RULES[rule])
    before = module.feedback_matrix()
    keys = {name: t.clone() for name, t in module.state_dict().items() if name.endswith(("key", "signs"))}
    convert(module)
    weight = next(module.parameters())
    for name, t in module.state_dict().items():
        if not name.endswith("state"):
            kept = keys.get(name)
            assert t.dtype == weight.dtype if kept is None else torch.equal(t, kept)
    assert module.feedback_matrix().dtype == weight.dtype
    # brSF draws anew, since W has changed; half types round.
    if rule != "brsf":
        # A product of two factors, each of them rounded.
        near = 5e-3 if rule == "low_rank" else 1e-3
        torch.testing.assert_close(module.feedback_matrix().float(), before, rtol=1e-2, atol=near)
    assert all(grad.dtype == weight.dtype for grad in gradients(module, x.detach().to(weight.dtype).requires_grad_()))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layer", FEW)
def test_a_layer_built_directly_draws_from_torchs_generator(layer: str, rule: str) -> None:
    results = []
    x = None
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        module, made = build(layer, RULES[rule])
        x = made if x is None else x
        results.append(gradients(module, x))
    assert_equal(results[0], results[1])
    assert not torch.equal(results[0][0], results[2][0])


@pytest.mark.parametrize("rule", ["fa", "frsf", "brsf", "fa-stored"])
def test_two_layers_built_one_after_the_other_differ(rule: str) -> None:
    a, b = (bk.nn.Linear(6, 5, feedback=RULES[rule]) for _ in range(2))
    assert not torch.equal(a.feedback_matrix(), b.feedback_matrix())


@pytest.mark.parametrize("rule", STATE)
@pytest.mark.parametrize("layer", ["Linear", "ConvTranspose2d", "LocallyConnected1d", "MultiheadAttention"])
def test_reset_parameters_draws_again(layer: str, rule: str) -> None:
    module, x = build(layer, RULES[rule])
    before = {name: t.clone() for name, t in module.state_dict().items()}
    module.reset_parameters()
    changed = {name for name, t in module.state_dict().items() if not torch.equal(t, before[name])}
    wanted = set(names(module))
    if layer == "MultiheadAttention" and rule == "fa_signed_init":
        # torch.nn's own leaves the weight of out_proj, and so its signs, as they are.
        wanted -= {"out_proj.feedback_signs", "out_proj.feedback_state"}
    assert wanted and changed >= wanted
    call(module, x).sum().backward()


def test_a_pickle_names_functions_by_where_users_find_them() -> None:
    for name in ("linear", "conv2d", "conv_transpose3d", "locally_connected1d"):
        function = getattr(bk.functional, name)
        assert pickle.dumps(function, protocol=0).startswith(f"cbioplaus_kernels.functional\n{name}\n".encode())
        assert pickle.loads(pickle.dumps(function)) is function


def test_a_rule_in_repr() -> None:
    assert repr(bk.nn.Linear(2, 3, feedback="usf")) == (
        "Linear(in_features=2, out_features=3, bias=True, feedback=SignSymmetry(scale='xiao'))"
    )
