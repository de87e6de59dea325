"""Direct feedback: against back-propagation of a linear net, a plain computation, and in every way a model is run."""

import copy
import io
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import bioplaus_kernels as bk
from bioplaus_kernels import direct

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCKS = ["0", "1", "2"]
RULES = {
    "dfa": direct.DFA(),
    "dfa-stored": direct.DFA(stored=True),
    "dfa-shared": direct.DFA(shared=True),
    "dfa-shared-stored": direct.DFA(shared=True, stored=True, entries="normal"),
    "dfa-xavier": direct.DFA(scale="xavier", entries="constant"),
    "sdfa": direct.SDFA(),
    "drtp": direct.DRTP(),
    "drtp-stored": direct.DRTP(stored=True),
    "shallow": direct.Shallow(),
}


def model(nonlinearity: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """A convolution with a pool, two fully-connected blocks, and a last layer for 5 classes."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nonlinearity(), nn.AvgPool2d(2), nn.Flatten()),
        nn.Sequential(nn.Linear(64, 12), nonlinearity()),
        nn.Sequential(nn.Linear(12, 8), nonlinearity()),
        nn.Linear(8, 5),
    )


def batch(n: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images and classes."""
    return torch.randn(n, 1, 8, 8, dtype=dtype), torch.arange(n) % 5


def attached(rule: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> direct.DirectFeedback:
    """The model with `rule` at its three blocks."""
    return direct.DirectFeedback(model().to(dtype), BLOCKS, rule, example=batch(1, dtype)[0], **kwargs)


def run(net: Any, x: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
    """The loss of one batch."""
    name = net.feedback.name if isinstance(net, direct.DirectFeedback) else net
    return F.cross_entropy(net(x, targets=y, **kwargs) if name == "drtp" else net(x), y)


def grads(net: nn.Module) -> dict[str, Tensor | None]:
    """Gradients by name."""
    return {name: p.grad for name, p in net.named_parameters() if p.requires_grad}


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
            "drtp": lambda b: b[y],
        }[kind](b)
        own = torch.autograd.grad(hidden[i], list(blocks[i].parameters()), delta.view_as(hidden[i]))
        found |= {f"model.{i}.{n}": g for (n, _), g in zip(blocks[i].named_parameters(), own, strict=True)}
    return found


def assert_same(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], **tolerance: Any) -> None:
    """Both have the same gradients, and none in the same places."""
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        a = actual[name]
        assert (a is None) == (e is None), name
        if a is not None:
            torch.testing.assert_close(a, e, **tolerance)


@pytest.mark.parametrize("n", [2, 7])
@pytest.mark.parametrize("rule", RULES)
def test_against_a_plain_computation(rule: str, n: int) -> None:
    # Fewer and more samples than classes: DRTP has a way for each.
    net = attached(RULES[rule], torch.float64)
    x, y = batch(n, torch.float64)
    run(net, x, y).backward()
    if net.feedback_key is None:
        tolerance: dict[str, Any] = {}
    else:
        # feedback_matrix gives float32.
        tolerance = {"rtol": 1e-5, "atol": 1e-7}
    assert_same(grads(net), plain(net, x, y), **tolerance)


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
        return {n: tuple(t.shape) for n, t in attached(RULES[rule]).state_dict().items() if "feedback" in n}

    assert state("dfa") == state("drtp") == {"feedback_key": (3,)}
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


@pytest.mark.parametrize("rule", RULES)
def test_compiles_to_one_graph(rule: str) -> None:
    torch._dynamo.reset()
    net = attached(RULES[rule])
    x, y = batch()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, y: run(net, x, y), fullgraph=True, backend=counter)
    for _ in range(2):
        compiled(x, y).backward()
        found = {n: None if g is None else g.clone() for n, g in grads(net).items()}
        net.zero_grad()
        run(net, x, y).backward()
        for name, e in grads(net).items():
            # A compiled graph may give zeros where eager gives nothing.
            a = found[name]
            if e is None:
                assert a is None or not a.any()
            else:
                torch.testing.assert_close(a, e)
        net.zero_grad()
        x = x + 1
    assert counter.frame_count == 1


class Recomputing(nn.Module):
    """The model with each block's inside, or each block, recomputed."""

    def __init__(self, blocks: nn.Sequential) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("rule", RULES)
def test_checkpointing(rule: str) -> None:
    net = attached(RULES[rule])
    x, y = batch()
    run(net, x, y).backward()
    expected = grads(net)

    blocks = direct.DirectFeedback(
        Recomputing(copy.deepcopy(net).restore()), [f"blocks.{n}" for n in BLOCKS], RULES[rule], example=x[:1]
    )
    blocks.zero_grad()
    run(blocks, x, y).backward()
    assert_same({n.replace("blocks.", ""): g for n, g in grads(blocks).items()}, expected)

    for use_reentrant in (False, True):
        twin = copy.deepcopy(net)
        twin.zero_grad()

        def call(x: Tensor, twin: Any = twin) -> Tensor:
            return run(twin, x, y)

        checkpoint(call, x.clone().requires_grad_(), use_reentrant=use_reentrant).backward()
        assert_same(grads(twin), expected)


def test_reentrant_checkpointing_of_a_block_is_refused() -> None:
    class Reentrant(Recomputing):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x.requires_grad_(), use_reentrant=True)
            return x

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        direct.DirectFeedback(Reentrant(model()), ["blocks.0"], example=batch(1)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_autocast(rule: str, dtype: torch.dtype) -> None:
    net = attached(RULES[rule])
    x, y = batch(20)
    run(net, x, y).backward()
    expected = {n: None if g is None else g.clone() for n, g in grads(net).items()}
    net.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == torch.float16)
    with torch.autocast("cpu", dtype=dtype):
        options = {"loss_scale": scaler.get_scale()} if "drtp" in rule else {}
        loss = run(net, x, y, **options)
    scaler.scale(loss).backward()
    for name, e in expected.items():
        g = dict(net.named_parameters())[name].grad
        if e is None:
            assert g is None
            continue
        g = g / scaler.get_scale()
        error = (g - e).norm() / e.norm()
        assert error < (0.3 if rule == "sdfa" else 0.1), (name, error)


def _worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        results = {}
        for rule in RULES:
            torch.manual_seed(rank)
            net = attached(RULES[rule])
            ranks = nn.parallel.DistributedDataParallel(net)
            x, y = batch(8)
            x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
            start = copy.deepcopy(net.state_dict())
            optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
            for _ in range(2):
                optimizer.zero_grad()
                out = ranks(x[rank::world], targets=y[rank::world] if "drtp" in rule else None)
                F.cross_entropy(out, y[rank::world]).backward()
                optimizer.step()
            results[rule] = (start, net.state_dict())
        torch.save((x, y, results), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two processes ended with, for every rule."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_worker, (2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
@pytest.mark.parametrize("rule", RULES)
def test_two_ranks_train_as_one_process(rule: str, ranks: list[Any]) -> None:
    x, y, _ = ranks[0]
    (start, ours), (_, theirs) = (rank[2][rule] for rank in ranks)
    for name, t in ours.items():
        assert torch.equal(t, theirs[name]), name
    if rule == "sdfa":
        return  # its mean |e| is each rank's own
    net = attached(RULES[rule])
    net.load_state_dict(start)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        run(net, x, y).backward()
        # DRTP's gradient holds no 1/N: a sum over 8 samples here, the mean of two sums over 4 there.
        if "drtp" in rule:
            for name, g in grads(net).items():
                if not name.startswith("model.3"):
                    g /= 2
        optimizer.step()
    for name, t in net.state_dict().items():
        torch.testing.assert_close(t, ours[name])


def test_a_copy_a_pickle_and_a_restored_model() -> None:
    net = attached("dfa")
    x, y = batch()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    run(net, x, y).backward()
    for twin in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        twin.zero_grad()
        run(twin, x, y).backward()
        assert_same(grads(twin), grads(net))
        assert twin._tape is not net._tape and net._tape.outputs is None
    kinds = [type(m) for m in net.restore().modules()]
    assert kinds == [type(m) for m in model().modules()]


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
        if self.how == "twice":
            x = self.a(x)
        if self.how == "pair":
            x, _ = self.pair(x)
        x = self.b(x if self.how == "never" else self.a(x))
        return (x, x) if self.how == "tuple" else x[0, 0] if self.how == "flat" else x


@pytest.mark.parametrize(
    ("how", "blocks", "error", "match"),
    [
        ("twice", ["a"], RuntimeError, "'a' was called twice"),
        ("never", ["a"], RuntimeError, "'a' was not called"),
        ("pair", ["pair"], TypeError, "blocks: expected blocks that return one tensor; 'pair', got tuple"),
        ("tuple", ["a"], TypeError, "model: expected one that returns one tensor"),
        ("flat", ["a"], ValueError, "example: expected logits of shape"),
        ("once", ["c"], ValueError, "blocks: expected names of submodules of the model, got 'c'"),
        ("once", [""], ValueError, "blocks: expected names of submodules of the model, got ''"),
        ("once", [], ValueError, "blocks: expected at least one name"),
        ("once", "a", ValueError, "blocks: expected at least one name, each once, got 'a'"),
        ("once", ["a", "a"], ValueError, "blocks: expected at least one name, each once"),
    ],
)
def test_errors_of_blocks(how: str, blocks: Any, error: type[Exception], match: str) -> None:
    net = Odd(how)
    with pytest.raises(error, match=match):
        direct.DirectFeedback(net, blocks, example=torch.randn(2, 4))
    assert type(net.a) is nn.Linear


def test_errors_of_arguments() -> None:
    x, y = batch()
    for arguments, error, match in (
        ({"model": 3}, TypeError, "model: expected a torch.nn.Module, got int"),
        ({"feedback": "fa"}, ValueError, "feedback: expected one of dfa, sdfa, drtp, shallow, got 'fa'"),
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
