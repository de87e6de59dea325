"""State that knows whose it is: what is averaged, cast, filled, replaced or resumed is B as it was, or an error."""

import copy
import inspect
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mlp import EVERY, INITIAL, every_rule, matrices, mlp, plain, x
from small import ONE_WEIGHT, assert_equal, build, gradients
from torch import Tensor, nn

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")


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


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "to": lambda m: m.to(torch.float64),
    "meta": lambda m: m.to("meta").to_empty(device="cpu"),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.load": _saved,
}


@pytest.mark.parametrize("rule", ["usf", "fa", "fa_signed_init", "kp"])
@pytest.mark.parametrize("modes", [(True, False), (True, True)])
def test_changes_in_inference_mode(modes: tuple[bool, bool], rule: str) -> None:
    """What plain torch.nn lets be done in and out of inference mode, one after the other, is done with a rule too."""
    wanted = mlp(rule)
    state, b, expected = wanted.state_dict(), matrices(wanted), gradients(wanted, x())
    for changes in itertools.product(CHANGES, repeat=2):
        model = mlp(rule)
        for mode, change in zip(modes, changes, strict=True):
            with torch.inference_mode(mode):
                model = CHANGES[change](model)
                assert model.state_dict().keys() == state.keys()
        if not {"to_empty", "meta"} & set(changes):
            torch.testing.assert_close([m.float() for m in matrices(model)], b)
        for layer in model[::2]:
            layer.reset_feedback()
        # W may be of inference mode still, which no one can write: it is replaced.
        model.load_state_dict(state, assign=True)
        assert_equal(gradients(model, x()), expected)


@every_rule
def test_weights_of_inference_mode_do_not_train(rule: str) -> None:
    model = mlp(rule)
    with torch.inference_mode():
        model = copy.deepcopy(model)
        model(x().detach())
    with pytest.raises(RuntimeError, match=r"inference_mode cannot be trained|Inference tensors cannot be saved"):
        model(x())


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
