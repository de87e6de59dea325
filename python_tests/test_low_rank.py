"""Low-rank feedback B = P Q, fixed and learned, against its definition and against the two maps one after the other."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import with_feedback
from small import NOT_RECURRENT, build, call, gradients
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")

learning = pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])


@learning
@pytest.mark.parametrize("name", [n for n in NOT_RECURRENT if n not in ("MultiheadAttention", "Bilinear")])
def test_gradients(name: str, learned: bool) -> None:
    layer, x = build(name, bk.LowRank(3, learned=learned), dtype=torch.float64)
    p, q = layer.feedback_p.detach(), layer.feedback_q.detach()
    b = (p @ q).reshape(layer.weight.shape)
    assert torch.equal(layer.feedback_matrix(), b) and torch.linalg.matrix_rank(b.flatten(1)) <= 3
    plain, _ = build(name, None, dtype=torch.float64)

    def f(x: Tensor, w: Tensor, c: Tensor | None) -> Tensor:
        return torch.func.functional_call(plain, {"weight": w, "bias": c}, (x,))

    ours, theirs = layer(x), with_feedback(f, x, layer.weight, b, layer.bias)
    direction, leaves = torch.randn_like(ours), (x, layer.weight, layer.bias)
    for a, e in zip(
        torch.autograd.grad(ours, (*leaves, *[layer.feedback_q] * learned), direction),
        torch.autograd.grad(theirs, leaves, direction, retain_graph=True),
        strict=False,
    ):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def two_maps(kind: str, x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """What has B = P Q for its weight, of two maps: product feedback alignment's R, then its B."""
    if kind == "Linear":
        return F.linear(F.linear(x, q), p)
    return F.conv2d(F.conv2d(x, q.reshape(len(q), 4, 3, 2), stride=2, padding=1), p[:, :, None, None])


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_the_learned_factor_takes_the_gradient_of_its_own_map(kind: str) -> None:
    rule = bk.LowRank(16, learned=True)
    if kind == "Linear":
        layer: Any = bk.nn.Linear(9, 5, feedback=rule, dtype=torch.float64)
        x = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)
    else:
        layer = bk.nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, feedback=rule, dtype=torch.float64)
        x = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    direction = torch.randn_like(y)
    q = layer.feedback_q
    ours = torch.autograd.grad(y, (x, q), direction)
    theirs = torch.autograd.grad(two_maps(kind, x, layer.feedback_p, q), (x, q), direction)
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


class Shapes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.seen.append(tuple(found.shape))
        return found


def test_a_linear_layer_never_forms_b() -> None:
    layer = bk.nn.Linear(40, 30, bias=False, feedback=bk.LowRank(2))
    layer.weight.requires_grad_(False)
    x = torch.randn(7, 40, requires_grad=True)
    y = layer(x)
    with Shapes() as shapes:
        y.sum().backward()
    assert (7, 2) in shapes.seen and not {(30, 40), (40, 30)} & set(shapes.seen)
    torch.testing.assert_close(x.grad, torch.ones(7, 30) @ layer.feedback_p @ layer.feedback_q)


@pytest.mark.parametrize("entries", ["uniform", "normal"])
@pytest.mark.parametrize("rank", [4, 64])
def test_scale_is_the_root_mean_square_of_b(entries: Any, rank: int) -> None:
    layer = bk.nn.Linear(600, 500, feedback=bk.LowRank(rank, entries=entries))
    assert abs(layer.feedback_matrix().square().mean().sqrt() / layer.rms() - 1) < 0.1
    # The two factors are streams of their own, a function of the key.
    p, q = layer.feedback_p, layer.feedback_q
    assert abs(torch.corrcoef(torch.stack((p.flatten()[:1000], q.flatten()[:1000])))[0, 1]) < 0.15
    match = bk.nn.Linear(600, 500, feedback=bk.LowRank(rank, scale="match", entries=entries))
    ratio = match.feedback_matrix().norm() / match.weight.norm()
    assert abs(ratio - 1) < 0.1


def test_with_decay_q_goes_to_the_projection_of_w() -> None:
    lr, decay, steps = 0.05, 0.3, 30
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5)).double()
    assert "add it to the optimizer" in str(bk.convert_(model, bk.LowRank(50, learned=True)))
    step = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=decay)

    def differences() -> list[Tensor]:
        return [m.feedback_q.detach() - m.feedback_p.T @ m.weight.detach().flatten(1) for m in (model[0], model[3])]

    before = differences()
    for _ in range(steps):
        step.zero_grad()
        F.cross_entropy(model(torch.randn(8, 2, 4, 4).double()), torch.randint(5, (8,))).backward()
        step.step()
    for now, then in zip(differences(), before, strict=True):
        torch.testing.assert_close(now, then * (1 - lr * decay) ** steps, rtol=1e-8, atol=1e-12)


def test_product_feedback_alignment_aligns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))
    bk.convert_(model, bk.LowRank(300, learned=True))
    angle = bk.metrics.weights(model)["2.weight"].angle
    step = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.02)
    x, y = torch.randn(64, 20), torch.randint(5, (64,))
    for _ in range(1500):
        step.zero_grad()
        F.cross_entropy(model(x), y).backward()
        step.step()
    assert angle > 70 and bk.metrics.weights(model)["2.weight"].angle < 20


def test_frozen_first_accumulated_and_compiled() -> None:
    layer, x = build("Linear", bk.LowRank(4, learned=True))
    layer(x.detach()).square().sum().backward()
    first = layer.feedback_q.grad.clone()
    assert first.any() and layer.feedback_p.grad is None
    layer(x.detach()).square().sum().backward()
    torch.testing.assert_close(layer.feedback_q.grad, 2 * first)
    compiled = torch.compile(lambda x: call(layer, x), fullgraph=True, backend="aot_eager")
    learnt = layer.weight, layer.feedback_q
    for a, e in zip(gradients(compiled, x, *learnt), gradients(layer, x, *learnt), strict=True):
        torch.testing.assert_close(a, e)
    layer.zero_grad()
    layer.weight.requires_grad_(False)
    layer(x).square().sum().backward()
    assert layer.feedback_q.grad is None or not layer.feedback_q.grad.any()


def test_it_is_identified_and_checked() -> None:
    a, b = (bk.nn.Linear(6, 5, feedback=bk.LowRank(rank)) for rank in (2, 3))
    with pytest.raises(RuntimeError, match=r"expected the state of LowRank\(rank=3"):
        b.load_state_dict(a.state_dict())
    other = bk.nn.Linear(6, 5, feedback=bk.LowRank(2))
    other.load_state_dict(a.state_dict())
    assert torch.equal(other.feedback_matrix(), a.feedback_matrix())
    with pytest.raises(ValueError, match="scale: expected one that does not follow W, as Q learns, got 'match'"):
        bk.LowRank(learned=True, scale="match")
    with pytest.raises(ValueError, match="keeps state"):
        bk.functional.linear(torch.randn(2, 6, requires_grad=True), a.weight, feedback="low_rank")
