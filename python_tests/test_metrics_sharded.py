"""Measures of a model that FSDP2 has sharded are those of the model whole, and it trains on as if nobody had looked."""

from collections.abc import Callable
from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bioplaus_kernels as bk
from bioplaus_kernels import metrics

pytestmark = pytest.mark.usefixtures("one_thread")

# By what it keeps: nothing, a key, packed signs, a sharded B, one that is trained.
RULES: dict[str, bk.Rule] = {
    "usf": bk.SignSymmetry(),
    "brsf": bk.BatchMagnitude(),
    "fa_signed_init": bk.SignedInit(),
    "fa-stored": bk.FeedbackAlignment(stored=True),
    "kp": bk.KolenPollack(),
}
# Which children are sharded by themselves; what is left belongs to the root, which a forward leaves whole.
SPLITS = {"root": (), "first": (0,), "each": (0, 2, 4)}
# Weights are not gathered for a backward that does not read them.
FREED = ("fa_signed_init", "freed", "trained")
COMPUTED = {"weight_norm": parametrizations.weight_norm, "orthogonal": parametrizations.orthogonal}
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(4) % 3


def model(rule: str = "usf", computed: str = "") -> nn.Sequential:
    """Seven rows do not split in two."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))
    bk.convert_(net, RULES[rule])
    if computed:
        COMPUTED[computed](net[2])
    return net


def sharded(net: nn.Module, children: tuple[int, ...] = (0, 2, 4), freed: bool = False) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for i in children:
        fully_shard(net[i], reshard_after_forward=True).set_unshard_in_backward(not freed)
    return fully_shard(net)


def loss_of(net: nn.Module, rank: int = 0, world: int = 1) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(net(X[rank::world]), Y[rank::world])


def targets_of() -> bk.TargetProp:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 7), nn.Tanh()), nn.Sequential(nn.Linear(7, 7), nn.Tanh()), nn.Linear(7, 3)]
    return bk.TargetProp(layers, [None, nn.Linear(7, 7), nn.Linear(3, 7)], "l_drl")


def of_targets(tp: bk.TargetProp) -> dict[str, Any]:
    tp.activations(X)
    h = X[:, :7]
    found: dict[str, Any] = {name: tuple(c) for name, c in metrics.gauss_newton(tp, X, Y).items()}
    found["spectrum"] = tuple(metrics.jacobian_spectrum(tp.layers[1], tp.inverses[1], h))
    found["inverse"] = (metrics.inverse_loss(tp.layers[1], tp.inverses[1], h),)
    return found


def measured(net: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Any]:
    pairs = metrics.weights(net), metrics.updates(net, loss)
    return {f"{kind} {name}": tuple(c) for kind, found in enumerate(pairs) for name, c in found.items()}


def gradients(net: nn.Module) -> list[Tensor]:
    found = [p.grad for p in net.parameters() if p.grad is not None]
    return [(g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for g in found]


def mirrored(net: nn.Module) -> list[Tensor]:
    bk.mirror_(net, generator=torch.Generator().manual_seed(3))
    return [net[i].feedback_matrix() for i in (0, 2, 4)]


def after(net: nn.Module, state: str, loss: Callable[[], Tensor]) -> Tensor | None:
    """Bring a model into a state; the loss where its backward has still to come."""
    if state == "trained":
        loss().backward()
    pending = loss() if state == "pending" else None
    if state == "called":
        with torch.no_grad():
            loss()
    return pending


def direct() -> bk.DirectFeedback:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))
    return bk.DirectFeedback(net, ["1", "3"], bk.direct.DFA(stored=True), example=X)


def of_direct(net: bk.DirectFeedback, loss: Callable[[], Tensor]) -> tuple[dict[str, Any], Tensor]:
    return measured(net, loss), net.feedback_matrix("3").clone()


STATES = ("fresh", "trained", "pending", "called")
CASES = [("usf", split, state) for split in SPLITS for state in STATES]
CASES += [(rule, split, "trained") for rule in RULES if rule != "usf" for split in SPLITS]
CASES += [FREED]


def _ranks(rank: int, world: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for rule, split, state in CASES:
        net = sharded(model(rule), SPLITS.get(split, (0, 2, 4)), split == "freed")
        loss = loss_of(net, rank, world)
        pending = after(net, state, loss)
        measures = measured(net, loss)
        (loss() if pending is None else pending).backward()
        found[rule, split, state] = measures, gradients(net)
    for computed in COMPUTED:
        net = sharded(model(computed=computed))
        found[computed] = measured(net, loss_of(net, rank, world))

    net = sharded(direct(), ())
    found["direct"] = of_direct(net, loss_of(net, rank, world))

    # An optimizer's step in backward waits for every gradient.
    net = sharded(model())
    steps: list[int] = []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda _: steps.append(0))
    metrics.updates(net, loss_of(net, rank, world))
    measuring = len(steps)
    loss_of(net, rank, world)().backward()
    found["steps"] = measuring, len(steps)

    tp = targets_of()
    for layer in tp.layers:
        sharded(layer, ())
    found["targets"] = of_targets(tp)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))
    bk.convert_(net, "wm")
    sharded(net, (0,))(X)
    found["mirrored"] = mirrored(net)
    net = sharded(model(), (0,))
    with bk.frozen_signs(net):
        loss_of(net, rank, world)().backward()
    found["frozen"] = gradients(net)
    return found


@pytest.fixture(scope="module", params=[2, pytest.param(1, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest) -> list[dict[Any, Any]]:
    return processes.run(_ranks, request.param)


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, numbers in found.items():
        # A small angle's last digits are those of its cosine.
        assert numbers[0] == pytest.approx(expected[name][0], abs=0.05), name
        assert numbers[1:] == pytest.approx(expected[name][1:], rel=1e-3), name


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_measures_of_the_whole(case: tuple[str, str, str], ranks: list[dict[Any, Any]]) -> None:
    rule, _, state = case
    net = model(rule)
    loss = loss_of(net)
    if state == "trained":
        loss().backward()
    expected = measured(net, loss)
    assert len(expected) == 6 and expected["1 0.weight"][0] > 1
    loss().backward()
    for measures, grads in (found[case] for found in ranks):
        same(measures, expected)
        for g, e in zip(grads, gradients(net), strict=True):
            torch.testing.assert_close(g, e)


@pytest.mark.parametrize("computed", COMPUTED)
def test_computed_weights(computed: str, ranks: list[dict[Any, Any]]) -> None:
    net = model(computed=computed)
    for found in ranks:
        same(found[computed], measured(net, loss_of(net)))


def test_direct_feedback(ranks: list[dict[Any, Any]]) -> None:
    net = direct()
    expected, b = of_direct(net, loss_of(net))
    for measures, matrix in (found["direct"] for found in ranks):
        same(measures, expected)
        assert torch.equal(matrix, b)


def test_no_optimizer_steps_in_a_measure(ranks: list[dict[Any, Any]]) -> None:
    for found in ranks:
        assert found["steps"] == (0, 6)


def test_measures_of_target_propagation(ranks: list[dict[Any, Any]]) -> None:
    for found in ranks:
        same(found["targets"], of_targets(targets_of()))


def test_mirrored_and_frozen(ranks: list[dict[Any, Any]]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))
    bk.convert_(net, "wm")
    whole = model()
    loss_of(whole)().backward()
    for name, expected in (("mirrored", mirrored(net)), ("frozen", gradients(whole))):
        for found in ranks:
            for t, e in zip(found[name], expected, strict=True):
                torch.testing.assert_close(t, e)


def _flattened(rank: int, world: int) -> list[str]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    said = []
    for original in (False, True):
        wrapped = FullyShardedDataParallel(model(), device_id=torch.device("cpu"), use_orig_params=original)
        net = nn.Sequential(wrapped)
        for measure in (lambda net=net: metrics.weights(net), lambda net=net: metrics.updates(net, loss_of(net))):
            with pytest.raises(ValueError) as error:
                measure()
            said.append(str(error.value))
        loss_of(net)().backward()
    return said


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flattened_weights_are_refused_with_the_way_out() -> None:
    (said,) = processes.run(_flattened, 1)
    assert len(said) == 4
    for error in said:
        assert error.startswith(
            "model: expected a model that no FullyShardedDataParallel (FSDP1) flattens; shard it by"
        )


def test_models_without_content_are_refused() -> None:
    layer = bk.nn.Linear(3, 3, feedback="usf", device="meta")
    x = torch.empty(2, 3, device="meta")
    for measure in (
        lambda: metrics.weights(layer),
        lambda: metrics.updates(layer, lambda: layer(x).sum()),
        lambda: metrics.inverse_loss(nn.Linear(3, 3), layer, x),
        lambda: metrics.jacobian_spectrum(layer, nn.Linear(3, 3), x),
    ):
        with pytest.raises(ValueError, match="expected a model with content, got Parameters on the meta device"):
            measure()
    with pytest.raises(ValueError, match="a: expected a tensor with content, got one on the meta device"):
        metrics.compare(x, x)
