"""Measures on models that write their buffers, compute their weights, or are wrapped; all comes back as it was."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import bioplaus_kernels as bk
from bioplaus_kernels import metrics
from bioplaus_kernels._restore import buffers, kept

pytestmark = pytest.mark.usefixtures("one_thread")


class Writes(nn.Module):
    """Replaces, grows, registers, deletes and writes buffers; one of them is shared."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("mean", "grows", "goes", "count"):
            self.register_buffer(name, torch.zeros(1))
        self.shared = nn.Module()
        self.shared.register_buffer("count", self.count)

    def forward(self, x: Tensor) -> Tensor:
        # With a graph, as in a model that forgets to detach.
        self.mean = 0.9 * self.mean + x.mean()
        self.grows = torch.cat((self.grows, x.detach().mean().view(1)))
        if not hasattr(self, "born"):
            self.register_buffer("born", x.detach()[:1].clone(), persistent=False)
            del self.goes
        self.count += 1
        assert self.shared.count is self.count
        return x - self.mean - self.born * self.grows.sum()


class Draws(nn.Module):
    """Noise in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Wrapper(nn.Module):
    """A model in a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def model(between: nn.Module | None = None) -> nn.Sequential:
    between = between or nn.Tanh()
    return nn.Sequential(
        nn.Linear(6, 20), nn.BatchNorm1d(20), between, nn.Dropout(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 4)
    )


def state(net: nn.Module) -> dict[str, Any]:
    """By identity and content."""
    tensors = {name: (b, b.clone()) for name, b in net.named_buffers()}
    modes = {name: (m.training, set(m._non_persistent_buffers_set)) for name, m in net.named_modules()}
    grads = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in net.named_parameters()}
    return {"buffers": tensors, "modes": modes, "grads": grads, "random": torch.get_rng_state()}


def unchanged(net: nn.Module, before: dict[str, Any]) -> None:
    after = state(net)
    assert after["modes"] == before["modes"] and torch.equal(after["random"], before["random"])
    for kind in ("buffers", "grads"):
        assert after[kind].keys() == before[kind].keys()
        for name, (tensor, content) in before[kind].items():
            now = after[kind][name]
            assert now[0] is tensor, name
            assert tensor is None or torch.equal(now[1], content), name


def loss_of(net: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    x = torch.randn(16, 6)
    return lambda: F.cross_entropy(net(x), torch.arange(16) % 4)


@pytest.mark.parametrize("rule", [None, "usf", "fa"])
def test_a_model_that_writes_its_buffers(rule: str | None) -> None:
    net = model(Writes())
    bk.convert_(net, rule)
    loss = loss_of(net)
    loss().backward()
    net[2] = Writes()  # whose buffer is not born yet
    before = state(net)
    found = metrics.updates(net, loss)
    unchanged(net, before)
    assert found == metrics.updates(net, loss)
    assert all((c.angle < 1e-3) == (rule is None or name == "6.weight") for name, c in found.items())
    metrics.weights(net)
    unchanged(net, before)


def test_all_comes_back_after_an_error_and_a_careless_loss() -> None:
    net = model(Writes())
    bk.convert_(net, "fa")
    loss = loss_of(net)
    loss().backward()
    before = state(net)

    def careless(fails: bool) -> Tensor:
        net.eval()
        loss().backward()
        net.zero_grad()
        net[2].mean.detach_()
        if fails:
            raise KeyError
        return loss()

    metrics.updates(net, lambda: careless(False))
    unchanged(net, before)
    with pytest.raises(KeyError):
        metrics.updates(net, lambda: careless(True))
    unchanged(net, before)
    assert net[0].feedback.name == "fa"
    with pytest.raises(TypeError, match="loss: expected a function that returns one number"):
        metrics.updates(net, lambda: loss().detach())
    unchanged(net, before)


class Adapted(nn.Module):
    """A frozen layer with what adapters train: matrices of any name, a bias of two dimensions among them."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 4))
        self.token, self.bias = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.zeros(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x + self.token).tanh() @ self.lora_A @ self.lora_B + self.bias


def test_matrices_of_any_name() -> None:
    net = nn.Sequential(nn.Linear(4, 4), Adapted())
    bk.convert_(net, "kp")
    assert list(metrics.trained(net)) == ["0.weight", "1.lora_A", "1.lora_B", "1.token"]
    found = metrics.updates(net, loss_of(nn.Sequential(nn.Linear(6, 4), net)))
    assert found["1.lora_A"].angle < 1e-3 < found["1.token"].angle


def test_a_loss_of_another_model() -> None:
    net, other = nn.Linear(6, 4), nn.Linear(6, 4)
    with pytest.raises(ValueError, match="loss: expected a loss of the model's weights, got one that depends on none"):
        metrics.updates(net, loss_of(other))
    with pytest.raises(TypeError, match=r"loss: expected a function that returns one number.* got shape \(5, 4\)"):
        metrics.updates(net, lambda: net(torch.randn(5, 6)))


def test_a_graph_from_before_can_still_be_gone_through() -> None:
    # Batch norm saves its statistics for the backward.
    net = model(Writes())
    bk.convert_(net, "usf")
    loss = loss_of(net)
    pending = loss()
    metrics.Monitor(net, 1, print, loss=loss).step()
    pending.backward()


@pytest.mark.parametrize("keep", [buffers, kept])
def test_what_a_rule_keeps_stays_where_it_is(keep: Any) -> None:
    net = nn.Sequential(bk.nn.Linear(3, 3, feedback="fa"), nn.BatchNorm1d(3))
    before = dict(net.named_buffers())
    with keep(net):
        assert all((net.get_buffer(name) is b) == ("feedback" in name) for name, b in before.items())
        net(torch.randn(4, 3))
        bk.convert_(net, "usf")
    assert net[0].feedback.name == "usf" and set(net[0]._buffers) == {"feedback_state"}
    assert not net[1].running_mean.any()


def test_buffers_of_scripted_and_meta_modules() -> None:
    scripted = nn.Sequential(torch.jit.script(nn.BatchNorm1d(3)), nn.BatchNorm1d(3, device="meta"))
    with buffers(scripted):
        scripted[0](torch.randn(4, 3))
    assert not scripted[0].running_mean.any() and scripted[0].num_batches_tracked == 0


@pytest.mark.parametrize("keep", [buffers, kept])
def test_a_lazy_module_is_made_for_good(keep: Any) -> None:
    net = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.BatchNorm1d(3))
    with keep(net):
        net(torch.randn(4, 2))
    assert type(net[1]) is nn.BatchNorm1d and net[1].running_mean.shape == (3,)
    assert net[2].running_mean.abs().sum() == 0
    net(torch.randn(4, 2))


@pytest.mark.parametrize("fails", [False, True])
def test_the_example_of_direct_feedback_leaves_no_trace(fails: bool) -> None:
    net = model(Writes())
    net[3] = nn.Sequential(nn.Dropout(), Draws())
    loss_of(net)().backward()
    net[2] = Writes()
    if fails:
        net[6] = nn.Linear(3, 4)
    x = torch.randn(2, 6)
    before = state(net)
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        bk.DirectFeedback(net, ["3", "5"], "dfa", example=x).restore()
    unchanged(net, before)


PARAMETRIZED: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda m: prune.random_unstructured(m, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_computed_weights_count_under_their_own_name(name: str) -> None:
    net = model()
    bk.convert_(net, "usf")
    PARAMETRIZED[name](net[4])
    loss = loss_of(net)
    loss().backward()  # the power iterations of spectral_norm have begun
    before = state(net)
    found = metrics.updates(net, loss)
    unchanged(net, before)
    assert list(found) == ["0.weight", "4.weight", "6.weight"]
    assert list(metrics.weights(net)) == ["0.weight", "4.weight", "6.weight"]
    unchanged(net, before)
    # The same by hand, of the Parameters that an optimizer has.
    parts = [p for n, p in net[4].named_parameters() if "bias" not in n]
    both = []
    for way in (buffers(), metrics.backprop(net)):
        with kept(net), way:
            torch.set_rng_state(before["random"])
            both.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss(), parts)]))
    assert found["4.weight"] == metrics.compare(*both)
    assert ("4.weight" in metrics.trained(net)) == (len(parts) == 1)


class Noisy(nn.Module):
    """A random parametrization with a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(20, 20)

    def forward(self, weight: Tensor) -> Tensor:
        return F.dropout(weight @ self.down.weight, 0.5)


def test_a_random_parametrization_is_drawn_once() -> None:
    net = model()
    bk.convert_(net, bk.SignConcordance(p=1.0))
    parametrize.register_parametrization(net[4], "weight", Noisy())
    before = state(net)
    assert metrics.weights(net)["4.weight"].sign_agreement == 1
    # The weight is its original and what the parametrization learns.
    assert list(metrics.updates(net, loss_of(net))) == ["0.weight", "4.weight", "6.weight"]
    assert len(metrics._trained(net)["4.weight"]) == 3
    net[4].parametrizations.weight.original.requires_grad_(False)
    assert len(metrics._trained(net)["4.weight"]) == 2
    unchanged(net, before | {"random": torch.get_rng_state()})


def test_wrapped_models() -> None:
    net = model(Writes())
    bk.convert_(net, "fa")
    torch.manual_seed(1)
    names = ["0.weight", "4.weight", "6.weight"]
    want = metrics.updates(net, loss_of(net))
    for wrapper, prefix in ((Wrapper(net), "inner."), (nn.DataParallel(net), "module."), (Wrapper(Wrapper(net)), "")):
        prefix = prefix or "inner.inner."
        torch.manual_seed(1)
        before = state(net)
        found = metrics.updates(wrapper, loss_of(wrapper))
        unchanged(net, before | {"random": torch.get_rng_state()})
        assert found == {prefix + name: want[name] for name in names}
        assert list(metrics.weights(wrapper)) == [prefix + name for name in names]
        assert list(metrics.trained(wrapper)) == [prefix + name for name in names]


@pytest.mark.parametrize("direct", [False, True])
def test_compiled_models(direct: bool) -> None:
    net: nn.Module = model()
    net[3] = nn.Identity()
    if direct:
        net = bk.DirectFeedback(net, ["2", "5"], "dfa", example=torch.randn(2, 6))
    else:
        bk.convert_(net, "usf")
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x, y = torch.randn(16, 6), torch.arange(16) % 4
    want = metrics.updates(net, lambda: F.cross_entropy(net(x), y))
    before = state(net)
    for _ in range(3):
        found = metrics.updates(compiled, lambda: F.cross_entropy(compiled(x), y))
        unchanged(net, before)
        assert list(found) == list(want) and list(metrics.weights(compiled)) == list(metrics.weights(net))
        for name, c in found.items():
            assert math.isclose(c.angle, want[name].angle, abs_tol=1e-3), name
    assert 1 < next(iter(found.values())).angle < 179


def test_a_distributed_model_trains_on() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        net = model(Writes())
        bk.convert_(net, "kp")
        loss_of(net)()  # what is born is there when buffers are collected
        net[2].mean.detach_()
        wrapped = nn.parallel.DistributedDataParallel(net)
        loss = loss_of(wrapped)
        before = state(net)
        for _ in range(2):
            found = metrics.updates(wrapped, loss)
            unchanged(net, before)
            assert list(found) == ["module.0.weight", "module.4.weight", "module.6.weight"]
            loss().backward()
            net[2].mean.detach_()
            before = state(net)
    finally:
        torch.distributed.destroy_process_group()


def test_measures_of_target_propagation_leave_buffers() -> None:
    def block(a: int, b: int) -> nn.Module:
        return nn.Sequential(parametrizations.weight_norm(nn.Linear(a, b)), nn.BatchNorm1d(b), Writes(), nn.Tanh())

    layers = [block(6, 5), block(5, 5), nn.Linear(5, 4)]
    tp = bk.TargetProp(layers, [None, block(5, 5), block(4, 5)], "l_drl")
    x, y = torch.randn(8, 6), torch.arange(8) % 4
    h = [t.detach() for t in tp.activations(x)]
    layers[0][2].mean.detach_(), layers[1][2].mean.detach_()
    before = state(tp)
    assert list(metrics.gauss_newton(tp, x, y)) == ["layers.0.0.weight", "layers.1.0.weight"]
    metrics.gauss_newton_targets(tp, h, y)
    metrics.jacobian_spectrum(layers[1], tp.inverses[1], h[1])
    metrics.inverse_loss(layers[1], tp.inverses[1], h[1])
    unchanged(tp, before)
    with pytest.raises(RuntimeError):
        metrics.inverse_loss(layers[1], tp.inverses[1], h[0])
    unchanged(tp, before)
