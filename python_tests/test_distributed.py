"""Feedback that several calls or processes must agree on: data-parallel ranks, recomputed forwards, repeated use."""

from typing import Any

import processes
import pytest
import torch
from small import FEW, RULES, assert_equal, build, call, gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")


def _model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(36, 12),
        nn.Tanh(),
        nn.Linear(12, 3),
    )


# rule, and whether the keys are drawn by each rank's own generator as those of layers built directly are.
CASES = [("fa", False), ("frsf", False), ("brsf", False), ("fa", True), ("fa-stored", True), ("fa_signed_init", False)]
# Their B is learned: by W's gradient, and from noise that every rank draws alike.
CASES += [(rule, direct) for rule in ("kp", "wm") for direct in (False, True)]
LEARNED: dict[str, bk.Rule] = {"kp": bk.KolenPollack(), "wm": bk.WeightMirror()}
LR, MOMENTUM, DECAY = 0.1, 0.9, 0.05


def _steps(model: nn.Module, forward: nn.Module, rule: str, batches: list[Tensor]) -> list[dict[str, Tensor]]:
    """Train on each batch; every layer's B before each step."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, bk.nn.FeedbackLayer)}
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=DECAY)
    noise, seen = torch.Generator().manual_seed(6), []
    for x in batches:
        seen.append({name: layer.feedback_matrix().clone() for name, layer in layers.items()})
        optimizer.zero_grad()
        forward(x).square().mean().backward()
        optimizer.step()
        if rule == "wm":
            bk.mirror_(model, lr=0.3, decay=0.3, batch_size=32, generator=noise)
    return seen


def _train(rank: int, world: int, rule: str, direct: bool) -> dict[str, Any]:
    torch.manual_seed(100 + rank)  # each rank has its own random state
    model = _model()
    bk.convert_(model, (RULES | LEARNED)[rule])
    if direct:
        for layer in model.modules():
            if isinstance(layer, bk.nn.FeedbackLayer):
                layer.reset_feedback()
    model.requires_grad_(True)  # which trains no B that is fixed
    ranks = nn.parallel.DistributedDataParallel(model)
    inputs = torch.randn(3, 4, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    start = {name: t.clone() for name, t in model.state_dict().items()}
    seen = _steps(model, ranks, rule, [x[rank::world] for x in inputs])
    return {"start": start, "inputs": inputs, "seen": seen, "end": model.state_dict()}


class _Losses(nn.Module):
    """The two losses of target propagation as one output, which is what DistributedDataParallel wraps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in ((64, 8), (8, 8))] + [nn.Linear(8, 3)]
        inverses = [None, bk.targetprop.learned_inverse(layers[1]), nn.Linear(3, 8)]
        # No noise, and a target of each sample alone: ranks draw their own, and "mean" divides by the rank's samples.
        self.tp = bk.TargetProp(layers, inverses, "dtpdrl", inverse_objective="preserving", sigma=0, reduction="sum")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.tp.activations(x.flatten(1))
        return self.tp.inverse_loss(h) + self.tp.forward_loss(h, self.tp.targets(h, y), y)


def _propagate(rank: int, world: int) -> dict[str, Tensor]:
    model = _Losses()
    losses = model if world == 1 else nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM)
    for x in torch.randn(3, 4, 1, 8, 8, generator=torch.Generator().manual_seed(5)):
        optimizer.zero_grad()
        losses(x[rank::world], torch.arange(4)[rank::world] % 3).backward()
        optimizer.step()
    return model.state_dict()


def _every_case(rank: int, world: int) -> dict[Any, Any]:
    results: dict[Any, Any] = {case: _train(rank, world, *case) for case in CASES}
    return results | {"target propagation": _propagate(rank, world)}


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    """What each of two processes saw, for every case."""
    return processes.run(_every_case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_stay_in_step(case: tuple[str, bool], ranks: list[dict[Any, Any]]) -> None:
    (rule, _), (ours, theirs) = case, (rank[case] for rank in ranks)
    for a, b in zip(ours["seen"], theirs["seen"], strict=True):
        assert_equal(list(a.values()), list(b.values()))
    end = ours["end"]
    assert_equal(list(end.values()), list(theirs["end"].values()))
    moved = {name for name, t in end.items() if not torch.equal(t, ours["start"][name])}
    learned = {name for name in end if rule in LEARNED and name.endswith("feedback_weight")}
    assert moved == {name for name in end if "feedback" not in name} | learned
    if rule == "brsf":
        # A draw a step; one process would not end as two do: sums round differently, and another bit is another draw.
        assert not torch.equal(ours["seen"][0]["4"].abs(), ours["seen"][1]["4"].abs())
        return
    # One process on whole batches does the same.
    model = _model()
    bk.convert_(model, (RULES | LEARNED)[rule])
    model.load_state_dict(ours["start"])
    _steps(model, model, rule, list(ours["inputs"]))
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, end[name])


@pytest.mark.slow
def test_target_propagation_on_two_ranks(ranks: list[dict[Any, Any]]) -> None:
    ours, theirs = (rank["target propagation"] for rank in ranks)
    assert_equal(list(ours.values()), list(theirs.values()))
    start = _Losses().state_dict()
    for name, t in _propagate(0, 1).items():
        assert not torch.equal(t, start[name])
        torch.testing.assert_close(ours[name], t)


@pytest.mark.parametrize("direct", [False, True])
def test_learned_feedback_follows_its_rule_on_two_ranks(direct: bool, ranks: list[dict[Any, Any]]) -> None:
    for result in (rank["kp", direct] for rank in ranks):
        # Both take every update, so weight decay alone changes W − B: a factor for all elements.
        factor, velocity = 1.0, 0.0
        for _ in result["inputs"]:
            velocity = MOMENTUM * velocity + DECAY * factor
            factor -= LR * velocity
        for name in ("0.", "2.", "4.", "6."):
            first, last = (t[f"{name}weight"] - t[f"{name}feedback_weight"] for t in (result["start"], result["end"]))
            torch.testing.assert_close(last, factor * first, rtol=1e-5, atol=1e-6)
    for result in (rank["wm", direct] for rank in ranks):
        # Towards W from an independent draw, of which three phases leave a third.
        for name in ("0.", "2.", "4.", "6."):
            before, after = (
                torch.cosine_similarity(t[f"{name}weight"].flatten(), t[f"{name}feedback_weight"].flatten(), 0)
                for t in (result["start"], result["end"])
            )
            assert after > before + 0.2


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", FEW)
def test_activation_checkpointing(name: str, rule: str, use_reentrant: bool) -> None:
    layer, x = build(name, RULES[rule])
    trained = [p for p in layer.parameters() if p.requires_grad]
    results = []
    for recompute in (False, True):
        # Two uses: brSF's second draw must equal its first, recomputed or not.
        def run(x: Tensor, recompute: bool = recompute) -> Tensor:
            if not recompute:
                return torch.sin(call(layer, x))
            return checkpoint(lambda x: torch.sin(call(layer, x)), x, use_reentrant=use_reentrant)

        for p in (x, *trained):
            p.grad = None
        (run(x) * run(2 * x)).sum().backward()
        results.append([p.grad.clone() for p in (x, *trained)])
    if use_reentrant and name in ("LSTM", "GRUCell", "Bilinear"):
        # The forward without a gradient is torch's own kernel, and gradients of two inputs add in another order.
        torch.testing.assert_close(*results)
    else:
        assert_equal(*results)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("rule", ["usf", "brsf", "fa"])
def test_checkpointing_a_model_with_frozen_signs(rule: str, use_reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    bk.convert_(model, rule)
    x = torch.randn(4, 6, requires_grad=True)
    model(x).square().sum().backward()
    expected = [x.grad, *(p.grad for p in model.parameters())]
    x.grad = None
    model.zero_grad()
    with bk.frozen_signs(model):
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    assert_equal([x.grad, *(p.grad for p in model.parameters())], expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "LocallyConnected2d", "MultiheadAttention"])
def test_gradient_accumulation(name: str, rule: str) -> None:
    layer, x = build(name, RULES[rule], dtype=torch.float64)
    expected = gradients(
        lambda x: call(layer, x).sum(), x, *(trained := [p for p in layer.parameters() if p.requires_grad])
    )
    parts = [part.detach().requires_grad_() for part in x.chunk(2)]
    total = [torch.zeros_like(p) for p in trained]
    inputs = []
    for part in parts:
        own, *grads = gradients(lambda x: call(layer, x).sum(), part, *trained)
        inputs.append(own)
        total = [t + g for t, g in zip(total, grads, strict=True)]
    for actual, e in zip([torch.cat(inputs), *total], expected, strict=True):
        torch.testing.assert_close(actual, e)


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_used_twice(rule: str) -> None:
    layer = bk.nn.Linear(6, 6, feedback=RULES[rule])
    twin = bk.nn.Linear(6, 6, feedback=RULES[rule])
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(4, 6, requires_grad=True)
    once = gradients(lambda x: twin(torch.tanh(layer(x))), x, layer.weight, twin.weight)
    twice = gradients(lambda x: layer(torch.tanh(layer(x))), x, layer.weight)
    assert torch.equal(twice[0], once[0])
    torch.testing.assert_close(twice[1], once[1] + once[2])


@pytest.mark.parametrize("rule", ["usf", "brsf", "fa"])
def test_backward_twice_through_a_retained_graph(rule: str) -> None:
    layer, x = build("Conv2d", rule)
    y = layer(x)
    first: Any = torch.autograd.grad(y.sum(), (x, layer.weight), retain_graph=True)
    assert_equal(list(first), list(torch.autograd.grad(y.sum(), (x, layer.weight))))


@pytest.mark.parametrize("rule", ["usf", "usf-match", "frsf", "brsf"])
def test_a_weight_changed_between_forward_and_backward_is_noticed(rule: str) -> None:
    layer, x = build("Linear", RULES[rule])
    y = layer(x)
    with torch.no_grad():
        layer.weight.neg_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
