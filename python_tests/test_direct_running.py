"""Direct feedback in every way a model is run: compiled, recomputed, in half types, on two ranks, copied, saved."""

import copy
import io
from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
from direct_net import BLOCKS, RULES, assert_same, attached, batch, grads, model, run
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from bioplaus_kernels import direct

pytestmark = pytest.mark.usefixtures("one_thread")


FAST = ("dfa", "dfa-shared-stored", "sdfa", "drtp")


@pytest.mark.parametrize(
    ("rule", "backend"),
    [(rule, "aot_eager") for rule in FAST]
    + [pytest.param(rule, "aot_eager", marks=pytest.mark.slow) for rule in RULES if rule not in FAST]
    + [pytest.param(rule, "inductor", marks=pytest.mark.slow) for rule in ("dfa", "drtp")],
)
def test_compiles_to_one_graph(rule: str, backend: str) -> None:
    torch._dynamo.reset()
    net = attached(RULES[rule])
    x, y = batch()
    counter = CompileCounterWithBackend(backend)
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


def _train(rank: int, world: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
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
    return x, y, results


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    """What each of two processes ended with, for every rule."""
    return processes.run(_train)


@pytest.mark.slow
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


@pytest.mark.parametrize("rule", ["dfa", "dfa-stored"])
def test_built_on_the_meta_device(rule: str) -> None:
    with torch.device("meta"):
        net = direct.DirectFeedback(model(), BLOCKS, RULES[rule], example=batch(1)[0])
    net.to_empty(device="cpu")
    for name in BLOCKS:
        assert torch.equal(net.feedback_matrix(name), attached(RULES[rule]).feedback_matrix(name))


def test_a_state_of_another_rule_order_or_layout_is_refused() -> None:
    net = attached("dfa", seed=1)
    state = net.state_dict()
    other = attached("dfa", seed=2)
    other.load_state_dict(state)
    assert torch.equal(other.feedback_matrix("1"), net.feedback_matrix("1"))
    for rule, blocks in (("sdfa", BLOCKS), (direct.DFA(scale=0.5), BLOCKS), ("dfa", BLOCKS[::-1])):
        another = direct.DirectFeedback(model(), blocks, rule, example=batch(1)[0])
        with pytest.raises(RuntimeError, match=r"feedback_state: expected the state of .*, got that of DFA\(scale="):
            another.load_state_dict(state)
    # Version 0.1 saved the key.
    del state["feedback_state"]
    state["feedback_key"] = torch.tensor([1, 3, 0])
    other.load_state_dict(state)
    assert not torch.equal(other.feedback_matrix("1"), net.feedback_matrix("1"))
    state["feedback_key"] = torch.tensor([3, 3, 0])
    with pytest.raises(
        RuntimeError, match=r"feedback_key: expected \(layout version up to 2, key, stream\), got \[3, 3, 0\]"
    ):
        other.load_state_dict(state)
