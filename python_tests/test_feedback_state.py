"""State that knows whose it is: what is averaged, cast, filled, replaced or resumed is B as it was, or an error."""

import copy
import gzip
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small import ONE_WEIGHT, RULES, assert_equal, build, gradients
from torch import Tensor, nn
from torch.nn.utils import parametrize

import bioplaus_kernels as bk
from bioplaus_kernels.feedback import Frozen, decode, encode

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY = RULES | {"kp": bk.KolenPollack(), "usf-initial": bk.SignSymmetry(scale="initial")}
EVERY.pop("backprop")
# What W was when the rule was given, which no key draws again.
INITIAL = ("fa_signed_init", "usf-initial")
every_rule = pytest.mark.parametrize("rule", EVERY)


def mlp(rule: str | None, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(40, 33), nn.Tanh(), nn.Linear(33, 40))
    if rule is not None:
        bk.convert_(model, EVERY[rule], seed=seed)
    return model


def plain(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if "feedback" not in name}


def x() -> Tensor:
    return torch.randn(3, 40, generator=torch.Generator().manual_seed(2)).requires_grad_()


def matrices(model: nn.Sequential) -> list[Tensor]:
    return [model[0].feedback_matrix(), model[2].feedback_matrix()]


# Never drawn.


@every_rule
@pytest.mark.parametrize("layer", ONE_WEIGHT)
def test_plain_weights_assigned_to_a_layer_on_meta(layer: str, rule: str) -> None:
    full, x = build(layer, None)
    with torch.device("meta"):
        empty, _ = build(layer, EVERY[rule])
    empty.load_state_dict(full.state_dict(), assign=True, strict=False)
    if rule in INITIAL:
        with pytest.raises(RuntimeError, match=r"was lost, by to_empty\(\) or a load without it: call reset_feedback"):
            empty(x)
        empty.reset_feedback()
    drawn = empty.feedback_matrix()
    assert drawn.isfinite().all() and 0 < drawn.square().mean().sqrt() < 2
    assert all(grad.isfinite().all() for grad in gradients(empty, x))


@every_rule
def test_state_materialised_by_hand(rule: str) -> None:
    """As accelerate's init_empty_weights and set_module_tensor_to_device leave it: weights real, the rest not."""
    expected = mlp(rule)
    model = copy.deepcopy(expected).to("meta")
    for name, t in plain(expected).items():
        module, _, attribute = name.rpartition(".")
        model.get_submodule(module)._parameters[attribute] = nn.Parameter(t)
    if rule in INITIAL:
        with pytest.raises(RuntimeError, match=r"of 0.weight of Linear\(|state of .*weight of Linear\(.*was lost"):
            model(x()).sum().backward()
        return
    parameters = list(model.parameters())
    model(x())
    assert list(map(id, model.parameters())) == list(map(id, parameters))  # an optimizer has them
    assert_equal(gradients(model, x()), gradients(expected, x()))


@every_rule
def test_memory_that_another_layers_record_was_in(rule: str) -> None:
    model = mlp(rule).to_empty(device="cpu")
    other = mlp(rule, seed=5)
    with torch.no_grad():
        for layer, theirs in zip(model[::2], other[::2], strict=True):
            # What to_empty finds may be a record that is whole, of a layer that is gone.
            for name in plain(layer):
                getattr(layer, name).copy_(getattr(theirs, name))
    if rule in INITIAL:
        with pytest.raises(RuntimeError, match="was lost"):
            model(x())
        return
    expected = mlp(rule)
    for ours, theirs in zip(matrices(model), matrices(expected), strict=True):
        assert torch.equal(ours.abs(), theirs.abs()) or rule in ("brsf", "usf-match")


# Averages.


def in_place(states: list[dict[str, Tensor]]) -> None:
    """An exponential average over all a state_dict has, one model that never changes with itself."""
    for _ in range(50):
        for name, t in states[0].items():
            t.copy_(0.999 * t + 0.001 * states[1][name])


@every_rule
def test_an_average_in_place(rule: str) -> None:
    model = mlp(rule)
    expected = matrices(model)
    in_place([model.state_dict(), copy.deepcopy(model).state_dict()])
    if rule == "fa_signed_init":
        with pytest.raises(RuntimeError, match=r"feedback_signs is not what was saved, as after an average of int"):
            model(x())
        # Saving it loses nothing, and does not make it right.
        damaged = model.state_dict()
        with pytest.raises(RuntimeError, match="feedback_signs is not what was saved"):
            mlp(rule).load_state_dict(damaged)
        return
    model(x()).sum().backward()
    for ours, theirs in zip(matrices(model), expected, strict=True):
        if rule in ("kp", "wm", "low_rank", "fa-stored", "frsf-stored"):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
        elif rule != "brsf":
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0.0)


@every_rule
def test_a_federated_average(rule: str) -> None:
    """FedAvg's stack.float().mean(0) of all that three state_dicts have, loaded."""
    clients = [mlp(rule) for _ in range(3)]
    averaged = {
        name: torch.stack([c.state_dict()[name].float() for c in clients]).mean(0) for name in clients[0].state_dict()
    }
    model = mlp(rule, seed=3)
    if rule == "fa_signed_init":
        with pytest.raises(RuntimeError, match="feedback_signs is not what was saved"):
            model.load_state_dict(averaged)
        return
    model.load_state_dict(averaged)
    for ours, theirs in zip(matrices(model), matrices(clients[0]), strict=True):
        if rule != "brsf":
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_record_that_was_cut_off_does_not_load() -> None:
    model = mlp("fa")
    state = model.state_dict()
    record = state["0.feedback_state"]
    state["0.feedback_state"] = record - (torch.arange(len(record)) % 3 == 0).byte()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"0.feedback_state: expected a record as it was saved, got one altered"):
            mlp("fa").load_state_dict(state, strict=strict)
    state["0.feedback_state"] = torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"0.feedback_state: expected a record of a layer's feedback, got something"):
        mlp("fa").load_state_dict(state)


@every_rule
def test_one_flipped_bit_in_what_is_kept(rule: str) -> None:
    state = {name: t.clone() for name, t in mlp(rule).state_dict().items()}
    kept = [n for n in state if n.endswith(("feedback_weight", "feedback_signs"))]
    if not kept or rule in ("kp", "wm"):  # B that learns is no part of the record
        return
    state[kept[0]].view(torch.int32).flatten()[5] ^= 1 << 30
    model = mlp(rule, seed=9)
    if rule == "concordance":
        model.load_state_dict(state)
        assert_equal(matrices(model), matrices(mlp(rule)))
        return
    with pytest.raises(RuntimeError, match=rf"{kept[0].split('.')[1]} is not what was saved"):
        model.load_state_dict(state)


# Casts, copies, files.


@every_rule
def test_a_state_dict_that_was_cast(rule: str) -> None:
    state = {n: t.bfloat16() if t.is_floating_point() else t for n, t in mlp(rule).state_dict().items()}
    model = mlp(rule, seed=3)
    model.load_state_dict(state)
    for ours, theirs in zip(matrices(model), matrices(mlp(rule)), strict=True):
        if rule in ("fa", "fa-constant", "fa-stored"):
            assert torch.equal(ours, theirs)
        elif rule != "brsf":
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-3)


@every_rule
def test_the_key_survives_what_becomes_of_buffers(rule: str) -> None:
    model = mlp(rule)
    expected = matrices(model)
    for change in (
        lambda m: m.half().float(),
        lambda m: copy.deepcopy(m),
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: [b.zero_() for b in m.buffers() if b.dtype == torch.uint8] and m,
    ):
        other = change(copy.deepcopy(model))
        for ours, theirs in zip(matrices(other), expected, strict=True):
            if rule != "brsf":
                torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


@every_rule
def test_state_made_in_inference_mode_trains(rule: str) -> None:
    model = mlp(rule)
    with torch.inference_mode():
        for layer in model:
            if isinstance(layer, bk.nn.Linear):
                keys = {name: held.key for name, held in layer._held.items()}
                layer.install_feedback(layer.feedback, keys.get)
    assert_equal(gradients(model, x()), gradients(mlp(rule), x()))


@every_rule
def test_a_call_does_not_wait_for_the_device(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp(rule)
    model(x())
    counted = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "numpy", "cpu"):
        original = getattr(Tensor, name)

        def count(self: Tensor, *args: Any, original: Callable[..., Any] = original, name: str = name) -> Any:
            counted.append(name)
            return original(self, *args)

        monkeypatch.setattr(Tensor, name, count)
    model(x()).sum().backward()
    assert counted == []


# Stored B.


@pytest.mark.parametrize("unfreeze", ["requires_grad_", "requires_grad"])
@pytest.mark.parametrize("rule", ["fa-stored", "frsf-stored", "wm"])
def test_a_stored_b_is_never_trained(rule: str, unfreeze: str) -> None:
    def steps(model: nn.Sequential) -> None:
        if unfreeze == "requires_grad_":
            model.requires_grad_(True)
        else:
            for p in model.parameters():
                p.requires_grad = True
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(x()).square().sum().backward()
            optimizer.step()

    model = mlp(rule)
    expected = [layer.feedback_weight.clone() for layer in model[::2]]
    with torch.device("meta"):
        assigned = mlp(rule)
    assigned.load_state_dict(model.state_dict(), assign=True)
    for other in (
        model,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model).double().float(),
        copy.deepcopy(model).to_empty(device="cpu"),
        copy.deepcopy(assigned),
    ):
        with torch.no_grad():
            for ours, theirs in zip(other[::2], model[::2], strict=True):
                ours.weight.copy_(theirs.weight), ours.bias.copy_(theirs.bias)
        before = other[0].weight.clone()
        steps(other)
        assert not torch.equal(other[0].weight, before)
        for layer, b in zip(other[::2], expected, strict=True):
            assert isinstance(layer.feedback_weight, Frozen) and not layer.feedback_weight.requires_grad
            assert torch.equal(layer.feedback_weight, b)


# W is fetched once.


class _Noise(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return weight + torch.randn_like(weight)


@pytest.mark.parametrize("layer", ONE_WEIGHT)
@pytest.mark.parametrize("rule", [bk.SignConcordance(1.0), bk.SignSymmetry(scale="match"), "usf", "brsf"])
def test_one_weight_a_call(rule: Any, layer: str) -> None:
    module, x = build(layer, rule)
    noise = _Noise()
    parametrize.register_parametrization(module, "weight", noise)
    # The product alone: the bias's share would hide what W was.
    del module.bias
    module.register_parameter("bias", None)
    noise.calls = 0
    seen: list[Tensor] = []
    handle = noise.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    y = module(x)
    assert noise.calls == 1
    handle.remove()
    direction = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, x, direction)
    parametrize.remove_parametrizations(module, "weight")
    with torch.no_grad():
        module.weight.copy_(seen[0])
    (expected,) = torch.autograd.grad(module(x), x, direction)
    torch.testing.assert_close(ours, expected)


def test_attention_fetches_each_weight_once() -> None:
    module, _ = build("MultiheadAttention", bk.SignConcordance(1.0))
    noise = _Noise()
    parametrize.register_parametrization(module, "in_proj_weight", noise)
    for inputs in (1, 2, 3):
        noise.calls = 0
        q, k, v = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(3))
        module(q, (q, k, k)[inputs - 1], (q, k, v)[inputs - 1])[0].sum().backward()
        assert noise.calls == 1


# frozen_signs and convert_.


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_within_frozen_signs_is_not_frozen(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = mlp("usf")
    with bk.frozen_signs(model):
        other = duplicate(model)
        bk.convert_(model, EVERY["fa_signed_init"])
        model(x())
    with torch.no_grad():
        other[0].weight.neg_()
    assert torch.equal(other[0].feedback_matrix().sign(), other[0].weight.sign())


def test_convert_within_frozen_signs() -> None:
    model = mlp("usf")
    with bk.frozen_signs(model):
        bk.convert_(model, "fa")
        assert_equal(gradients(model, x()), gradients(mlp("fa"), x()))
        bk.convert_(model, None)
    assert "_frozen" not in vars(model[0])


class Broken(bk.Rule):
    name = "broken"

    def matrix(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        return weight

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        if weight.shape[0] == 40:
            raise ValueError("no")
        return {}


@pytest.mark.parametrize("rule", [None, "fa-stored", "usf"])
def test_convert_changes_a_layer_wholly_or_not(rule: str | None) -> None:
    model = mlp(rule)
    before, expected = dict(vars(model[2])), gradients(model, x())
    kind, state = type(model[2]), set(model[2].state_dict())
    with pytest.raises(ValueError, match=r"^2: no$"):
        bk.convert_(model, Broken())
    assert type(model[2]) is kind and set(model[2].state_dict()) == state and vars(model[2]).keys() == before.keys()
    assert isinstance(model[0].feedback, Broken)
    bk.convert_(model[0], EVERY[rule] if rule else None)
    if rule != "fa-stored":  # drawn by its own name
        assert_equal(gradients(model, x()), expected)


def test_a_copy_of_a_parametrized_layer_within_frozen_signs_is_not_frozen() -> None:
    layer = nn.utils.parametrizations.weight_norm(bk.nn.Linear(8, 8, feedback="usf"))
    with bk.frozen_signs(layer):
        other = copy.deepcopy(layer)
    with torch.no_grad():
        other.parametrizations.weight.original1.neg_()
    assert torch.equal(other.feedback_matrix().sign(), other.weight.sign())


# Ties.


@pytest.mark.parametrize("rule", ["kp", "fa", "fa-stored", "concordance"])
def test_attention_and_a_linear_layer_that_share_a_weight_share_one_b(rule: str) -> None:
    model = nn.Module()
    model.a = nn.MultiheadAttention(8, 2, batch_first=True)
    model.l, model.o = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
    model.l.weight, model.o.weight = model.a.in_proj_weight, model.a.out_proj.weight
    bk.convert_(model, EVERY[rule])
    assert torch.equal(model.a.feedback_matrix(), model.l.feedback_matrix())
    assert torch.equal(model.a.out_proj.feedback_matrix(), model.o.feedback_matrix())
    below = torch.randn(2, 4, 8, requires_grad=True)
    (model.a(below, below, below)[0].sum() + model.l(below).sum() + model.o(below).sum()).backward()
    if rule == "kp":
        for linear in (model.l, model.o):
            torch.testing.assert_close(linear.feedback_weight.grad, linear.weight.grad)
        assert model.a.in_proj_feedback_weight is model.l.feedback_weight


# What is written past autograd, or cast with everything else.


@pytest.mark.parametrize("rule", ["fa", "concordance", "fa_signed_init", "fa-stored"])
def test_a_copy_through_data(rule: str) -> None:
    model, other = mlp(rule), mlp(rule, seed=3)
    for ours, theirs in zip(model.buffers(), other.buffers(), strict=True):
        ours.data.copy_(theirs.data)
    used = matrices(model)
    again = mlp(rule, seed=8)
    again.load_state_dict(model.state_dict())
    assert_equal(matrices(model), used)
    assert_equal(matrices(again), used)


@every_rule
def test_a_cast_of_every_buffer(rule: str) -> None:
    model = mlp(rule)
    expected = [b.double() for b in matrices(model)]
    model.type(torch.float64)
    if rule != "brsf":
        for ours, theirs in zip(matrices(model), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7 if rule == "low_rank" else 1e-9)
    again = mlp(rule).double()
    again.load_state_dict(model.state_dict())


def test_skip_init_and_the_signature() -> None:
    layer = nn.utils.skip_init(bk.nn.Linear, 8, 8, feedback="fa")
    assert layer.feedback_matrix().isfinite().all()
    assert list(inspect.signature(bk.nn.Conv2d).parameters)[-3:] == ["device", "dtype", "feedback"]


# What identifies it.


def test_hostile_records() -> None:
    record = decode(mlp("fa").state_dict()["0.feedback_state"])
    assert record is not None and record.key is not None
    for other in (
        record._replace(fields="x"),
        record._replace(sums=[1]),
        record._replace(key=record.key._replace(seed="zz")),
        record._replace(key=record.key._replace(version=99)),
        record._replace(key=None),
    ):
        model = mlp("fa")
        with pytest.raises(RuntimeError, match=r"0.feedback_state: expected"):
            model.load_state_dict(model.state_dict() | {"0.feedback_state": encode(other)})
        model(x()).sum().backward()
    assert decode(torch.zeros(64, dtype=torch.complex64)) is None
    old = {n: t for n, t in mlp("fa").state_dict().items() if "state" not in n} | {"0.feedback_key": 3}
    with pytest.raises(RuntimeError, match=r"0.feedback_key: expected a tensor"):
        mlp("fa").load_state_dict(old)


def test_the_record_of_a_layer() -> None:
    model = mlp("fa", seed=12)
    record = decode(model.state_dict()["0.feedback_state"])
    assert record is not None and str(record) == "FeedbackAlignment(scale='xavier', entries='uniform', stored=False)"
    assert record.key is not None and record.key.seed == 12 and record.key.name == "0.weight"
    assert torch.equal(record.key.tensor(), bk.feedback.feedback_key(12, "0.weight"))
    assert decode(encode(record)) == record and decode(encode(record).float() + 0.4) == record


def test_describe(tmp_path: Any) -> None:
    from bioplaus_kernels.describe import describe_file

    model = nn.ModuleDict({"body": mlp("fa", seed=4), "head": bk.nn.Linear(3, 2, feedback=bk.SignSymmetry(scale=0.5))})
    text = str(bk.describe(model))
    named = ["weight", "body.0.weight", "body.2.weight", "head.weight"]
    assert [line.split()[0] for line in text.splitlines()] == named
    assert text.splitlines()[1].endswith("stored=False)  4") and "SignSymmetry(scale=0.5)" in text
    assert str(bk.describe(model.state_dict())) == text
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "a.pt")
    assert str(describe_file(tmp_path / "a.pt")).splitlines()[1].split()[0] == "model.body.0.weight"
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert str(describe_file(tmp_path / "dcp")) == text
    direct = bk.DirectFeedback(mlp(None), ["1"], example=x())
    assert "DFA(scale='nokland'" in str(bk.describe(direct)) and "blocks=['1']" in str(bk.describe(direct.state_dict()))
    assert str(bk.describe(nn.Linear(2, 2))) == "no weight with feedback"
    for content in ("nothing of the kind", ""):
        (tmp_path / "b.pt").write_text(content)
        with pytest.raises(ValueError, match=r"b.pt: cannot be read as a checkpoint \(\w+: "):
            describe_file(tmp_path / "b.pt")
    torch.save([model.state_dict()], tmp_path / "c.bin")
    assert "0.body.0.weight" in str(describe_file(tmp_path / "c.bin"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: expected a checkpoint of torch.distributed, or files \*.safetensors"):
        describe_file(tmp_path / "empty")
    assert "on the meta device" in str(bk.describe(model.to("meta").state_dict()))
    with pytest.raises(FileNotFoundError, match="no such file"):
        describe_file(tmp_path / "c.pt")
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module or a state_dict, got int"):
        bk.describe(3)


def test_a_checkpoint_in_place(tmp_path: Any) -> None:
    """torch.distributed.checkpoint writes into the tensors of the state_dict that it is given."""
    for rule in ("fa", "concordance", "kp", "fa_signed_init"):
        model, other = mlp(rule, seed=1), mlp(rule, seed=2)
        dcp.save(model.state_dict(), checkpoint_id=tmp_path / rule, no_dist=True)
        dcp.load(other.state_dict(), checkpoint_id=tmp_path / rule, no_dist=True)
        assert_equal(gradients(other, x()), gradients(model, x()))


def test_what_ddp_leaves_alone() -> None:
    model = mlp("fa")
    assert model._ddp_params_and_buffers_to_ignore == ["0.feedback_state", "2.feedback_state"]
    model[0].reset_feedback()  # each rank's own draw
    assert model._ddp_params_and_buffers_to_ignore == ["2.feedback_state"]
    bk.convert_(model, "fa_signed_init")  # of the weights a rank began with
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
    bk.convert_(model, "concordance", filter_fn=lambda m, name: name == "2")
    assert model._ddp_params_and_buffers_to_ignore == ["2.feedback_signs", "2.feedback_state"]
    bk.convert_(model, None)
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


# Version 0.1.


@every_rule
def test_a_checkpoint_of_version_0_1(rule: str) -> None:
    model = mlp(rule)
    old = {n: t for n, t in model.state_dict().items() if not n.endswith("state")}
    if model[0].feedback.seeded:
        for i in (0, 2):
            old[f"{i}.feedback_key"] = torch.tensor([1, model[i].feedback_key[1], 0])
    other = mlp(rule, seed=8)
    if rule == "brsf":
        with pytest.warns(UserWarning, match=r"brsf: a key of layout version 1 takes its stream from 64 elements"):
            other.load_state_dict(old)
        assert other[0].feedback_key.tolist() == old["0.feedback_key"].tolist()
        return
    other.load_state_dict(old)
    assert_equal(gradients(other, x()), gradients(model, x()))
    again = mlp(rule, seed=9)
    again.load_state_dict(other.state_dict())
    assert_equal(gradients(again, x()), gradients(model, x()))


def test_pickled_modules_and_state_dicts_that_version_0_1_wrote() -> None:
    """Made by 0.1.0: a linear layer, a convolution and attention by every rule, their state_dicts, and every B."""
    found = pickle.loads(gzip.decompress((Path(__file__).parent / "data/version_0_1_0.pickle.gz").read_bytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rule, model in found["models"].items():
            fresh = copy.deepcopy(model)
            for layer in fresh.modules():
                if isinstance(layer, bk.nn.FeedbackLayer):
                    layer.reset_feedback()
            fresh.load_state_dict(found["states"][rule])
            again = pickle.loads(pickle.dumps(model))
            again.load_state_dict(model.state_dict())
            for own in (model, fresh, again):
                for layer, b in zip(own.values(), found["b"][rule], strict=True):
                    assert torch.equal(layer.feedback_matrix(), b)
                below = torch.randn(2, 4, requires_grad=True)
                own["linear"](below).sum().backward()
                assert below.grad.isfinite().all()


def test_a_stranger_in_the_file() -> None:
    file = io.BytesIO()
    torch.save(mlp("fa").state_dict() | {"0.feedback_other": torch.zeros(1)}, file)
    file.seek(0)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*feedback_other"):
        mlp("fa").load_state_dict(torch.load(file))
