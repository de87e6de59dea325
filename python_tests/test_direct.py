"""Direct feedback against back-propagation of a linear net and a plain computation; scales, state, memory, errors."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from direct_net import BLOCKS, RULES, assert_same, attached, batch, grads, model, run
from torch import Tensor, nn

import bioplaus_kernels as bk
from bioplaus_kernels import direct

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(net: direct.DirectFeedback, x: Tensor, y: Tensor) -> dict[str, Tensor | None]:
    """The same learning rule written out: a forward and an autograd call of its own for every block."""
    blocks, h, hidden = net.model, x, []
    for i in range(3):
        hidden.append(blocks[i](h.detach()))
        h = hidden[-1]
    logits = blocks[3](h.detach())
    p = torch.softmax(logits.detach(), 1)
    e = (p - F.one_hot(y, 5)) / len(y)
    found = dict(zip(("weight", "bias"), torch.autograd.grad(logits, list(blocks[3].parameters()), e), strict=True))
    found = {f"model.3.{name}": g for name, g in found.items()}
    for i, name in enumerate(BLOCKS):
        kind = net.feedback.name
        for parameter in blocks[i].named_parameters():
            found[f"model.{i}.{parameter[0]}"] = None
        if kind == "shallow":
            continue
        b = net.feedback_matrix(name).to(e.dtype)
        delta = {
            "dfa": lambda b: e @ b,
            "sdfa": lambda b: torch.sign(e) @ b * e.abs().mean(),
            "drtp": lambda b: b[y] / len(y),
        }[kind](b)
        own = torch.autograd.grad(hidden[i], list(blocks[i].parameters()), delta.view_as(hidden[i]))
        found |= {f"model.{i}.{n}": g for (n, _), g in zip(blocks[i].named_parameters(), own, strict=True)}
    return found


@pytest.mark.parametrize("n", [2, 7])
@pytest.mark.parametrize("rule", RULES)
def test_against_a_plain_computation(rule: str, n: int) -> None:
    # Fewer and more samples than classes: DRTP has a way for each.
    net = attached(RULES[rule], torch.float64)
    x, y = batch(n, torch.float64)
    run(net, x, y).backward()
    assert_same(grads(net), plain(net, x, y))


def test_with_the_jacobians_of_a_linear_net_it_is_backprop() -> None:
    net = direct.DirectFeedback(
        model(nn.Identity).double(), BLOCKS, direct.DFA(stored=True), example=batch(1, torch.float64)[0]
    )
    rest = net.model[3].weight
    with torch.no_grad():
        for i in (2, 1, 0):
            net.feedback_matrix(BLOCKS[i]).copy_(rest)
            rest = rest @ net.model[i][0].weight if i else rest
    x, y = batch(6, torch.float64)
    run(net, x, y).backward()
    plain_model = copy.deepcopy(net.restore())
    plain_model.zero_grad()
    F.cross_entropy(plain_model(x), y).backward()
    assert_same({n.removeprefix("model."): g for n, g in grads(net).items()}, grads(plain_model))


@pytest.mark.parametrize("rule", ["dfa", "sdfa"])
def test_scales_with_the_loss(rule: str) -> None:
    # What a gradient scaler multiplies in, it divides out again.
    net = attached(rule)
    x, y = batch()
    run(net, x, y).backward()
    once = {n: g.clone() for n, g in grads(net).items()}
    net.zero_grad()
    (1024 * run(net, x, y)).backward()
    assert_same({n: g / 1024 for n, g in grads(net).items()}, once)


def test_drtp_takes_the_loss_scale() -> None:
    net = attached("drtp")
    x, y = batch()
    run(net, x, y).backward()
    once = net.model[0][0].weight.grad.clone()
    net.zero_grad()
    run(net, x, y, loss_scale=torch.tensor(512.0)).backward()
    assert torch.equal(net.model[0][0].weight.grad, 512 * once)


@pytest.mark.parametrize("n", [4, 256])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_drtp_has_the_size_of_dfa(reduction: str, n: int) -> None:
    # At first e is a softmax near uniform minus the one-hot targets: √(1 − 1/5) of their norm.
    x, y = batch(n)
    gradients = []
    for rule in (direct.DFA(), direct.DRTP(scale="nokland", reduction=reduction)):
        torch.manual_seed(0)
        net = attached(rule)
        logits = net(x, targets=y if rule.name == "drtp" else None)
        (16 * F.cross_entropy(logits, y, reduction=reduction)).backward()
        gradients.append(net.model[1][0].bias.grad)
    # As if loss_scale had said the 16.
    dfa, drtp = gradients[0].norm(), 16 * gradients[1].norm()
    assert 0.5 < drtp / dfa < 4


@pytest.mark.parametrize("stored", [False, True])
def test_drtp_of_a_sum_is_n_times_that_of_a_mean(stored: bool) -> None:
    x, y = batch(8)
    y[3:5] = -100
    mean, total = (attached(direct.DRTP(stored=stored, reduction=r)) for r in ("mean", "sum"))
    total.model.load_state_dict(mean.model.state_dict())
    for net in (mean, total):
        net(x, targets=y).sum().backward()
    torch.testing.assert_close(total.model[1][0].bias.grad, 6 * mean.model[1][0].bias.grad)
    mean.zero_grad()
    mean(x, targets=torch.full_like(y, -1)).sum().backward()
    assert not mean.model[1][0].bias.grad.any()


@pytest.mark.parametrize("rule", ["dfa", "dfa-shared", "drtp", "dfa-stored"])
def test_a_matrix_has_the_dtype_in_use(rule: str) -> None:
    net = attached(RULES[rule], torch.float64)
    single = attached(RULES[rule])
    assert net.feedback_matrix("1").dtype == torch.float64 and single.feedback_matrix("1").dtype == torch.float32
    torch.testing.assert_close(net.feedback_matrix("1").float(), single.feedback_matrix("1"))
    assert single.to(torch.bfloat16).feedback_matrix("1").dtype == torch.bfloat16
    bare = direct.DirectFeedback(nn.Sequential(nn.Tanh(), nn.Hardtanh()), ["0"], example=torch.zeros(1, 3).double())
    assert bare.feedback_matrix("0").dtype == torch.float64


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("ignored", [-1, -100])
@pytest.mark.parametrize("n", [3, 8])
def test_drtp_leaves_out_ignored_samples(n: int, ignored: int, stored: bool) -> None:
    # −1 would be the last class's row.
    net = attached(direct.DRTP(stored=stored))
    x, y = batch(n)
    loss = F.cross_entropy(net(x[1:], targets=y[1:]), y[1:])
    loss.backward()
    once = {name: g.clone() for name, g in grads(net).items()}
    net.zero_grad()
    y[0] = ignored
    F.cross_entropy(net(x, targets=y), y, ignore_index=ignored).backward()
    assert_same(grads(net), once, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("rule", "bounds"),
    [
        (direct.DFA(), [64**-0.5, 12**-0.5, 8**-0.5]),
        (direct.DFA(shared=True), [64**-0.5] * 3),
        (direct.DRTP(), [(6 / 64) ** 0.5, (6 / 12) ** 0.5, (6 / 8) ** 0.5]),
        (direct.DFA(scale="xavier"), [(6 / 69) ** 0.5, (6 / 17) ** 0.5, (6 / 13) ** 0.5]),
        (direct.DFA(scale=0.5, entries="constant"), [0.5] * 3),
    ],
    ids=str,
)
def test_scales_of_the_papers(rule: direct.DFA, bounds: list[float]) -> None:
    net = attached(rule)
    for name, bound in zip(BLOCKS, bounds, strict=True):
        b = net.feedback_matrix(name)
        assert 0.8 * bound < b.abs().max() <= bound * (1 + 1e-6)
        assert abs(b.mean()) < bound / 2


@pytest.mark.parametrize("shared", [False, True])
def test_stored_and_seeded_draw_the_same_and_shared_slices_overlap(shared: bool) -> None:
    seeded, stored = (attached(direct.DFA(shared=shared, stored=s), seed=3) for s in (False, True))
    for name in BLOCKS:
        torch.testing.assert_close(seeded.feedback_matrix(name), stored.feedback_matrix(name))
    first, second = (seeded.feedback_matrix(name) for name in BLOCKS[:2])
    assert torch.equal(first[:, :12], second) == shared
    other = attached(direct.DFA(shared=shared), seed=4)
    assert not torch.equal(other.feedback_matrix("0"), first)


def test_seeded_keeps_a_key_and_stored_one_matrix() -> None:
    def state(rule: str) -> dict[str, tuple[int, ...]]:
        named = attached(RULES[rule]).state_dict().items()
        return {n: tuple(t.shape) for n, t in named if "feedback" in n and n != "feedback_state"}

    assert attached("dfa").state_dict()["feedback_state"].dtype == torch.uint8
    assert state("dfa") == state("drtp") == {}
    assert state("dfa-stored") == {"feedback_weight": (5, 84)}
    assert state("dfa-shared-stored") == {"feedback_weight": (5, 64)}
    assert state("shallow") == {}


@pytest.mark.parametrize("rule", RULES)
def test_the_true_gradient_is_never_computed(rule: str) -> None:
    net = attached(RULES[rule])
    x, y = batch()
    out = run(net, x, y)
    # The last layer alone, and each block alone, stand between two edges of the graph.
    tied = out.grad_fn.next_functions[0][0].next_functions[0][0]
    assert "Broadcast" in type(tied).__name__
    reach = [parameters(edge) for edge, _ in tied.next_functions if edge is not None]
    assert sorted(map(len, reach)) == [2, 2, 2, 2]
    assert len(set.union(*reach)) == 8


def parameters(node: Any) -> set[int]:
    """Leaves behind a node of the graph."""
    if hasattr(node, "variable"):
        return {id(node.variable)}
    return set().union(*(parameters(n) for n, _ in node.next_functions if n is not None))


def test_evaluation_is_the_model() -> None:
    net = attached("drtp")
    x, _ = batch()
    with torch.no_grad():
        assert torch.equal(net(x), net.model(x))
    # The model called by itself is back-propagation's.
    assert len(parameters(net.model(x).grad_fn)) == 8


def test_tokens_and_frozen_blocks() -> None:
    # Logits of (N, T, classes): each token has its own error.
    net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 4))
    net[2].requires_grad_(False)
    wrapped = direct.DirectFeedback(net, ["1", "3"], example=torch.randn(1, 2, 6))
    x = torch.randn(3, 5, 6)
    out = wrapped(x)
    e = torch.randn(out.shape)
    out.backward(e)
    h = torch.tanh(net[0](x))
    (expected,) = torch.autograd.grad(h, net[0].weight, e @ wrapped.feedback_matrix("1"))
    torch.testing.assert_close(net[0].weight.grad, expected)
    assert net[2].weight.grad is None


def test_double_backward_raises() -> None:
    net = attached("dfa")
    x, y = batch()
    (g,) = torch.autograd.grad(run(net, x, y), net.model[0][0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


class Odd(nn.Module):
    """A model that calls its blocks as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.pair, self.b, self.how = nn.Linear(4, 4), nn.LSTM(4, 4), nn.Linear(4, 3), how

    def forward(self, x: Tensor) -> Any:
        if self.how == "pair":
            x, _ = self.pair(x)
        x = self.b(x if self.how == "never" else self.a(x))
        return (x, x) if self.how == "tuple" else x[0, 0] if self.how == "flat" else x


@pytest.mark.parametrize(
    ("how", "blocks", "error", "match"),
    [
        ("never", ["a"], RuntimeError, "'a' was not called"),
        ("pair", ["pair"], TypeError, "blocks: expected blocks that return one tensor; 'pair', got tuple"),
        ("tuple", ["a"], TypeError, "model: expected one that returns one tensor"),
        ("flat", ["a"], ValueError, "example: expected logits of shape"),
        ("once", ["c"], ValueError, "blocks: expected names of submodules of the model, got 'c'"),
        ("once", [""], ValueError, "blocks: expected names of submodules of the model, got ''"),
        ("once", [], ValueError, "blocks: expected at least one name"),
        ("once", "a", ValueError, r"blocks: expected at least one name \(a string\), each once, got 'a'"),
        ("once", [1], ValueError, r"blocks: expected at least one name \(a string\), each once, got \[1\]"),
        ("once", ["a", "a"], ValueError, r"blocks: expected at least one name \(a string\), each once"),
    ],
)
def test_errors_of_blocks(how: str, blocks: Any, error: type[Exception], match: str) -> None:
    net = Odd(how)
    with pytest.raises(error, match=match):
        direct.DirectFeedback(net, blocks, example=torch.randn(2, 4))
    assert type(net.a) is nn.Linear


@pytest.mark.parametrize("rule", ["dfa", "dkp", "shallow"])
def test_the_logits_are_no_block(rule: str) -> None:
    x = torch.randn(2, 4)
    head = nn.Sequential(nn.Linear(4, 3), nn.Flatten())
    for blocks in (["0", "1"], ["1.0"]):
        net = nn.Sequential(nn.Linear(4, 4), head)
        with pytest.raises(
            ValueError, match=f"blocks: expected hidden blocks.* are not the logits, got '{blocks[-1]}'"
        ):
            direct.DirectFeedback(net, blocks, rule, example=x)
        assert type(net[0]) is nn.Linear and type(net[1]) is nn.Sequential


def test_errors_of_arguments() -> None:
    x, y = batch()
    for arguments, error, match in (
        ({"model": 3}, TypeError, "model: expected a torch.nn.Module, got int"),
        ({"feedback": "fa"}, ValueError, "feedback: expected one of dfa, sdfa, drtp, dkp, shallow, got 'fa'"),
        ({"feedback": bk.SignSymmetry()}, TypeError, "feedback: expected a direct rule or its name, got SignSymmetry"),
        ({"seed": 1.5}, TypeError, "seed: expected an integer, got 1.5"),
    ):
        given: Any = {"model": model(), "blocks": BLOCKS, "example": x[:1]} | arguments
        with pytest.raises(error, match=match):
            direct.DirectFeedback(**given)
    net = attached("dfa")
    with pytest.raises(ValueError, match="blocks: expected modules that no DirectFeedback has, got '0'"):
        direct.DirectFeedback(net.model, BLOCKS, example=x)
    with pytest.raises(ValueError, match="targets: expected None with feedback='dfa'"):
        net(x, targets=y)
    with pytest.raises(ValueError, match="block: expected one of 0, 1, 2, got '3'"):
        net.feedback_matrix("3")
    net = attached("drtp")
    with pytest.raises(ValueError, match="targets: expected the classes of the samples"):
        net(x)
    with pytest.raises(TypeError, match=r"targets: expected int64, got torch\.float32"):
        net(x, targets=y.float())
    with pytest.raises(ValueError, match="targets: expected shape"):
        net(x, targets=y[:2])
    with pytest.raises(RuntimeError, match="has no B"):
        attached("shallow").feedback_matrix("0")
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        net._replicate_for_data_parallel()
    wide = direct.DirectFeedback(
        nn.Sequential(nn.Conv1d(1, 2, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten()), ["0"], example=torch.randn(1, 1, 4)
    )
    with pytest.raises(ValueError, match=r"blocks: expected '0' to return .* samples of 8 numbers"):
        wide(torch.randn(2, 1, 5))
    for arguments, error, match in (
        ({"scale": "xiao"}, ValueError, "scale: expected a positive finite number or one of"),
        ({"scale": -1.0}, ValueError, "scale: expected"),
        ({"entries": "stored"}, ValueError, "entries: expected one of"),
        ({"shared": 1}, TypeError, "shared: expected True or False, got 1"),
    ):
        with pytest.raises(error, match=match):
            direct.DFA(**arguments)


# The hidden layers of the ImageNet locally-connected net of Bartunov et al. 2018, as numbers a sample: 348 096.
IMAGENET = (150528, 37632, 75264, 18816, 37632, 9408, 18816)
PEAK = """
import resource, torch
from torch import nn
from bioplaus_kernels import direct

class Layer(nn.Module):  # an activation of the real size; weights would only hide what is measured
    def __init__(self, n):
        super().__init__()
        self.n, self.gain = n, nn.Parameter(torch.ones(()))
    def forward(self, x):
        return (x[:, :1] * self.gain).expand(-1, self.n)

net = nn.Sequential(*map(Layer, {sizes}), nn.Linear({sizes}[-1], 1000))
net = direct.DirectFeedback(net, [str(i) for i in range({count})], direct.{rule}, example=torch.ones(1, 1))
x, y = torch.ones(2, 1), torch.tensor([1, 2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = net(x, **({{"targets": y}} if net.feedback.name == "drtp" else {{}}))
nn.functional.cross_entropy(out, y).backward()
assert all(layer.gain.grad != 0 for layer in net.model[:-1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["DFA()", "DFA(shared=True)", "SDFA()", "DRTP()"])
def test_imagenet_needs_no_memory_for_its_348_million_feedback_weights(rule: str) -> None:
    assert sum(IMAGENET) * 1000 == 348_096_000
    program = PEAK.format(sizes=IMAGENET, count=len(IMAGENET), rule=rule)
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    # 1.3 GiB is what B would take; the last layer's gradient (75 MB) and a few activations are in this as well.
    assert int(done.stdout) < 200_000, f"{int(done.stdout) / 1000:.0f} MB"
