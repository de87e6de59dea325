"""Models built on the meta device: state that was lost is not used, and every way to have it again."""

import copy
from collections.abc import Iterator

import pytest
import torch
from small import RULES, assert_equal, gradients
from torch import Tensor, nn

import bioplaus_kernels as bk
from bioplaus_kernels import ops
from bioplaus_kernels.backends import reference

pytestmark = pytest.mark.usefixtures("one_thread")


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
@pytest.mark.parametrize("built_on", ["meta", "cpu"])
def test_memory_that_nobody_wrote_is_not_used(built_on: str, rule: str) -> None:
    expected = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Conv1d(2, 2, 1), nn.Flatten(), nn.Linear(6, 6))
    bk.convert_(expected, RULES[rule])
    model = meta_model(rule) if built_on == "meta" else copy.deepcopy(expected)
    model.to_empty(device="cpu")
    for module in (model[0], model[2], model[4]):
        nn.Linear.reset_parameters(module) if isinstance(module, nn.Linear) else nn.Conv1d.reset_parameters(module)
    x = torch.randn(2, 6, requires_grad=True)
    if rule != "fa_signed_init":
        # What a key draws is there again.
        for ours, theirs in zip(model[::2], expected[::2], strict=True):
            if rule != "brsf":
                assert torch.equal(ours.feedback_matrix().abs(), theirs.feedback_matrix().abs())
        return
    wanted = r"state of 0\.weight of Linear\(.*was lost, by to_empty\(\).*reset_parameters\(\).*load a state_dict"
    with pytest.raises(RuntimeError, match=wanted):
        model[0](x)
    with pytest.raises(RuntimeError, match=wanted):
        model[0].feedback_matrix()
    with pytest.raises(Exception, match="was lost, by to_empty"):
        torch.compile(model[0], fullgraph=True, backend="eager")(x)
    for module in (model[0], model[2], model[4]):
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


def on_meta(*arguments: object) -> Iterator[tuple[object, ...]]:
    """Every mixture: all but one of the tensors here, that one without data."""
    for i, x in enumerate(arguments):
        if isinstance(x, Tensor):
            yield (*arguments[:i], x.to("meta"), *arguments[i + 1 :])


@pytest.mark.parametrize("name", [name for name in reference.OPS if not name.endswith("pack_signs")])
def test_operands_without_data_are_not_mixed_with_others(name: str) -> None:
    g, w, key = torch.randn(3, 4), torch.randn(4, 5), torch.tensor([1, 2, 3])
    x, block, geometry = torch.randn(2, 1, 4), torch.randn(4, 2, 1, 1), ([1], [0, 0], [1], 1)
    calls: dict[str, list[tuple[object, ...]]] = {
        "feedback_mm": [
            (g, w, None, None, key, "uniform", 1.0, 5),
            (g, None, ops.pack_signs(w), w, None, "stored", 1.0, 5),
        ],
        "feedback_conv": [
            (x.expand(2, 4, 4), w.unsqueeze(2), None, None, key, "uniform", 1.0, [4, 5, 1], [4], [1], [0], [1])
        ],
        "conv_backward_weight": [(torch.randn(2, 2, 4), x, [1], [1], [0], [1])],
        "feedback_weight": [(w, None, None, key, "uniform", 1.0, (4, 5))],
        "redraw_key": [(key, w)],
        "lc_forward": [(x, block, torch.randn(4, 2), *geometry)],
        "lc_backward_input": [
            (torch.randn(2, 2, 4), block, None, None, key, "uniform", 1.0, block.shape, [4], *geometry)
        ],
        "lc_backward_weight": [(torch.randn(2, 2, 4), x, [1], *geometry)],
        "recurrent_forward": [
            (
                torch.randn(3, 2, 16),
                w[:2, :4],
                w[2:, :4],
                torch.randn(16, 4),
                torch.randn(16),
                None,
                None,
                "LSTM",
                False,
            )
        ],
    }
    o = torch.randn(3, 2, 5)
    calls["recurrent_backward"] = [
        (
            o,
            o[0],
            None,
            o,
            o[0, 0, :0],
            o[0, 0, :0],
            o[1],
            None,
            torch.randn(5, 5),
            None,
            None,
            "RNN_TANH",
            False,
            [True] * 3,
        )
    ]
    named = {"dtype": torch.float32} if name == "feedback_weight" else {}
    for arguments in calls[name]:
        getattr(ops, name)(*arguments, **named)
        for mixed in on_meta(*arguments):
            with pytest.raises((ValueError, RuntimeError), match=r"on (cpu|meta)|device"):
                getattr(ops, name)(*mixed, **named)
