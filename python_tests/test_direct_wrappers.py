"""Every kind of wrapper, however its model is run, copied, saved and loaded."""

import copy
import gzip
import pickle
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
from direct_models import Alternating, Conv, Ends, Output, Returning, Siamese, Steps
from direct_net import assert_same, grads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bioplaus_kernels import direct, metrics

pytestmark = pytest.mark.usefixtures("one_thread")


def cases() -> dict[str, Any]:
    """Of each kind of wrapper, the wrapper, an input and a loss."""
    torch.manual_seed(0)
    tokens, y = torch.randn(4, 3, 3), torch.arange(4) % 5
    ends = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.LogSoftmax(1))
    steps = torch.arange(12).reshape(4, 3) % 5
    first = tokens[:, 0]
    pixels = torch.randn(4, 3, 6)
    return {
        "logits": (direct.DirectFeedback(ends, ["1"], example=first, logits="2"), (first,), F.nll_loss, y),
        "class_dim": (
            direct.DirectFeedback(Conv(1), ["1", "3"], example=pixels, class_dim=1),
            (pixels,),
            F.cross_entropy,
            torch.arange(24).reshape(4, 6) % 5,
        ),
        "steps": (
            direct.DirectFeedback(Steps("batch first"), ["act"], example=tokens),
            (tokens,),
            lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
            steps,
        ),
        "taps": (
            direct.DirectFeedback(Alternating(""), ["act"], example=tokens, logits="head"),
            (tokens,),
            lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
            steps,
        ),
        "siamese": (
            direct.DirectFeedback(Siamese(), ["branch"], example=(first, first)),
            (first, tokens[:, 1]),
            F.cross_entropy,
            y,
        ),
        "output": (
            direct.DirectFeedback(Returning(Output), ["act"], example=first, output=_pick),
            (first,),
            lambda o, y: F.cross_entropy(o.logits, y),
            y,
        ),
    }


def _pick(output: Any) -> Tensor:
    return output.logits


every_case = pytest.mark.parametrize("case", ["logits", "class_dim", "steps", "taps", "siamese", "output"])


def wanted(case: str) -> tuple[Any, tuple[Tensor, ...], Any, Tensor, dict[str, Tensor | None]]:
    """The case, with its gradients."""
    net, x, loss, y = cases()[case]
    loss(net(*x), y).backward()
    expected = copy.deepcopy(grads(net))
    assert all(g is not None for g in expected.values())
    net.zero_grad()
    return net, x, loss, y, expected


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@every_case
def test_compiles_to_one_graph(case: str, backend: str) -> None:
    net, x, loss, y, expected = wanted(case)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: loss(net(*x), y), fullgraph=True, backend=backend)
    for _ in range(2):
        net.zero_grad()
        compiled(*x).backward()
        assert_same(grads(net), expected)
    assert net._tape.outputs is None and net._tape.tie is None


@every_case
def test_autocast(case: str) -> None:
    net, x, loss, y, expected = wanted(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(net(*x), y)
    value.backward()
    for name, g in grads(net).items():
        assert g.dtype == torch.float32
        assert (g - expected[name]).norm() < 0.1 * expected[name].norm(), name


@pytest.mark.parametrize("use_reentrant", [False, True])
@every_case
def test_checkpointing_of_it_all(case: str, use_reentrant: bool) -> None:
    net, x, loss, y, expected = wanted(case)
    x = tuple(t.clone().requires_grad_() for t in x)
    checkpoint(lambda *x: loss(net(*x), y), *x, use_reentrant=use_reentrant).backward()
    assert_same(grads(net), expected)


def test_checkpointing_inside() -> None:
    class Inside(Steps):
        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), 6)
            for t in range(x.shape[1]):
                h = checkpoint(lambda x, h: self.act(self.below(x) + self.cell(h)), x[:, t], h, use_reentrant=False)
            return self.head(h)

    x = torch.randn(4, 3, 3)
    nets = [direct.DirectFeedback(kind("last"), ["act"], example=x) for kind in (Steps, Inside)]
    nets[1].model.load_state_dict(nets[0].model.state_dict())
    for net in nets:
        net(x).square().sum().backward()
    assert_same(grads(nets[1]), grads(nets[0]))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_logits_that_are_recomputed_inside_raise(use_reentrant: bool) -> None:
    class Inside(Ends):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.fc, self.act(self.a(x)) * x.mean(), use_reentrant=use_reentrant)

    with pytest.raises(RuntimeError, match=r"logits: 'fc' ran without recording|different number of tensors was saved"):
        net = direct.DirectFeedback(Inside(None), ["act"], example=torch.ones(2, 3).requires_grad_(), logits="fc")
        net(torch.ones(2, 3)).sum().backward()


@every_case
def test_within_metrics_backprop_it_is_the_model(case: str) -> None:
    net, x, loss, y, _ = wanted(case)
    with metrics.backprop(net):
        loss(net(*x), y).backward()
    found = copy.deepcopy(grads(net))
    net.zero_grad()
    model = net.restore()
    loss(model(*x), y).backward()
    assert_same({n.removeprefix("model."): g for n, g in found.items()}, grads(model))


@every_case
def test_copies_and_pickles(case: str) -> None:
    net, x, loss, y, expected = wanted(case)
    if case == "output":
        net.model.how = Output
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        loss(twin(*x), y).backward()
        assert_same(grads(twin), expected)
        assert twin._tape is not net._tape
    assert all(g is None for g in grads(net).values())
    net.restore()
    assert not any(isinstance(m, direct._Block) for m in net.modules())


def _every_case(rank: int, world: int) -> dict[str, Any]:
    found = {}
    for case, (net, x, loss, y) in cases().items():
        ranks = nn.parallel.DistributedDataParallel(net)
        loss(ranks(*(t[rank::world] for t in x)), y[rank::world]).backward()
        found[case] = grads(net)
    return found


@pytest.mark.slow
def test_two_ranks() -> None:
    for found in processes.run(_every_case):
        for case, g in found.items():
            assert_same(g, wanted(case)[-1])


# State.


def test_the_state_is_that_of_the_same_b() -> None:
    x = torch.randn(2, 3)
    plain, named = (
        direct.DirectFeedback(Ends(nn.Identity()), ["act"], example=x, **options) for options in ({}, {"logits": "fc"})
    )
    named.load_state_dict(plain.state_dict())
    assert torch.equal(named.state_dict()["feedback_state"], plain.state_dict()["feedback_state"])
    # Classes read off the wrong dimension are another B.
    pixels = torch.randn(2, 3, 5)
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.Tanh(), nn.Conv1d(8, 8, 1))
    wrong = direct.DirectFeedback(copy.deepcopy(model), ["1"], example=pixels, class_dim=-1)
    right = direct.DirectFeedback(model, ["1"], example=pixels, class_dim=1)
    with pytest.raises(RuntimeError, match="feedback_state: expected the state of"):
        right.load_state_dict(wrong.state_dict())
    # Version 0.1 saved the key alone.
    old = right.state_dict()
    del old["feedback_state"]
    old["feedback_key"] = torch.tensor([1, 3, 0])
    right.load_state_dict(old)
    assert right.feedback_key.tolist() == [1, 3, 0]


def test_pickled_wrappers_that_version_0_1_wrote() -> None:
    """Made by 0.1.0: for each rule a wrapper, its state_dict, an input, the arguments, and the gradients."""
    file = Path(__file__).parent / "data/version_0_1_0_direct.pickle.gz"
    for net, state, x, arguments, expected in pickle.loads(gzip.decompress(file.read_bytes())):
        for own in (net, pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
            own.load_state_dict(state)
            own.load_state_dict(own.state_dict())
            own.zero_grad()
            F.cross_entropy(own(x, **arguments), torch.tensor([0, 1, 2, 0, 1])).backward()
            # DRTP was that of a sum.
            n = 5 if own.feedback.name == "drtp" else 1
            for (name, p), g in zip(own.named_parameters(), expected, strict=True):
                assert (p.grad is None) == (g is None)
                if g is not None:
                    torch.testing.assert_close(p.grad * (1 if "4" in name else n), g)
