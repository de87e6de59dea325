"""Batch Manhattan and the no-sign-change clamp against a loop over numbers, and what torch's optimizers promise."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bioplaus_kernels.optim import BatchManhattan

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "decay": {"weight_decay": 0.1},
    "both": {"momentum": 0.9, "weight_decay": 0.1},
    "clamped": {"momentum": 0.9, "weight_decay": 0.1, "no_sign_change": True},
    "sgd": {"momentum": 0.9, "weight_decay": 0.1, "manhattan": False},
    "clamped sgd": {"manhattan": False, "no_sign_change": True},
}


def sign(x: float) -> float:
    """-1, 0 or 1."""
    return (x > 0) - (x < 0)


def by_hand(w: float, g: float, v: float, matrix: bool, lr: float, **s: Any) -> tuple[float, float]:
    """One number's step, as the authors' code words it: the weight and its momentum after."""
    if s.get("manhattan", True):
        g = sign(g)
    g += s.get("weight_decay", 0.0) * w
    v = s.get("momentum", 0.0) * v + g
    new = w - lr * v
    if matrix and s.get("no_sign_change", False) and (w >= 0) != (new >= 0):
        new = 1e-10 if w >= 0 else -1e-10
    return new, v


def parameters() -> list[nn.Parameter]:
    """A matrix with a zero, a bias and a kernel, small enough that signs change."""
    matrix = 0.1 * torch.randn(4, 3, dtype=torch.float64)
    matrix[0, 0] = 0
    rest = [0.1 * torch.randn(shape, dtype=torch.float64) for shape in ((4,), (2, 3, 2))]
    return [nn.Parameter(t) for t in (matrix, *rest)]


def gradients(step: int) -> list[Tensor]:
    """Those of one step, a zero among them."""
    generator = torch.Generator().manual_seed(step)
    found = [torch.randn(s, dtype=torch.float64, generator=generator) for s in ((4, 3), (4,), (2, 3, 2))]
    found[0][1, 1] = 0
    return found


def run(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Some steps."""
    for i in steps:
        for p, g in zip(params, gradients(i), strict=True):
            p.grad = g.clone()
        optimizer.step()
        # The gradient is the caller's.
        for p, g in zip(params, gradients(i), strict=True):
            assert torch.equal(p.grad, g)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_against_a_loop_over_numbers(setting: str, tensor_lr: bool, foreach: bool | None) -> None:
    params = parameters()
    lr = torch.tensor(0.05, dtype=torch.float64) if tensor_lr else 0.05
    optimizer = BatchManhattan(params, lr, **SETTINGS[setting], foreach=foreach)
    state = [[(w, 0.0) for w in p.detach().flatten().tolist()] for p in params]
    for i in range(6):
        run(params, optimizer, range(i, i + 1))
        for k, (p, g) in enumerate(zip(params, gradients(i), strict=True)):
            state[k] = [
                by_hand(w, d, v, p.dim() > 1, 0.05, **SETTINGS[setting])
                for (w, v), d in zip(state[k], g.flatten().tolist(), strict=True)
            ]
            expected = torch.tensor([w for w, _ in state[k]], dtype=torch.float64).view_as(p)
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=2e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_weight_of_a_matrix_changes_its_sign(dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.randn(8, 8).to(dtype)), nn.Parameter(torch.randn(8).to(dtype))]
    before = [p.detach().clone() >= 0 for p in params]
    optimizer = BatchManhattan(params, 3.0, no_sign_change=True)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert torch.equal(params[0] >= 0, before[0]) and (params[0] != 0).all()
    assert not torch.equal(params[1] >= 0, before[1])


def test_groups_differ() -> None:
    body, head = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    groups = [{"params": [body]}, {"params": [head], "lr": 0.5, "manhattan": False, "no_sign_change": True}]
    optimizer = BatchManhattan(groups, lr=0.25)
    for p in (body, head):
        p.grad = torch.full((2, 2), 3.0)
    optimizer.step()
    assert torch.equal(body, torch.full((2, 2), 0.75))
    assert torch.equal(head, torch.full((2, 2), 1e-10))


def test_a_reloaded_state_goes_on() -> None:
    params = parameters()
    optimizer = BatchManhattan(params, 0.05, **SETTINGS["clamped"])
    run(params, optimizer, range(3))
    twins = copy.deepcopy(params)
    resumed = BatchManhattan(twins, 1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(isinstance(t, Tensor) for state in resumed.state_dict()["state"].values() for t in state.values())
    run(params, optimizer, range(3, 6))
    run(twins, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_without_gradients_or_with_a_closure_and_a_schedule() -> None:
    p, untouched = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = BatchManhattan([p, untouched], 0.5)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4
    schedule.step()
    assert optimizer.step(closure) == 2
    assert torch.equal(p, torch.full((2, 2), 0.25)) and torch.equal(untouched, torch.ones(2))


def test_a_gradient_scaler_changes_nothing() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = BatchManhattan([p], 0.5, manhattan=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(p, torch.full((2, 2), 0.5))


def test_it_learns() -> None:
    x = torch.randn(64, 8)
    y = (x @ torch.randn(8, 1)).tanh()
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = BatchManhattan(model.parameters(), 2e-3, momentum=0.5)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.gpu
def test_a_step_is_captured_in_a_graph() -> None:
    p = nn.Parameter(torch.ones(4, 4, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = BatchManhattan([p], torch.tensor(0.25, device="cuda"), momentum=0.5, no_sign_change=True)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    # 1 − 0.25 · 1 − 0.25 · 1.5
    assert torch.equal(p.cpu(), torch.full((4, 4), 0.375))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"lr": -1.0}, ValueError, "lr: expected a finite number of at least 0, got -1.0"),
        ({"lr": math.inf}, ValueError, "lr: expected a finite number of at least 0, got inf"),
        ({"lr": torch.ones(2)}, ValueError, r"lr: expected a number or a 0-dim tensor, got shape \(2,\)"),
        ({"lr": torch.ones(1)}, ValueError, r"lr: expected a number or a 0-dim tensor, got shape \(1,\)"),
        ({"momentum": "0.9"}, TypeError, "momentum: expected a finite number of at least 0, got '0.9'"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay: expected a finite number of at least 0"),
        ({"manhattan": 1}, TypeError, "manhattan: expected True or False, got 1"),
        ({"no_sign_change": None}, TypeError, "no_sign_change: expected True or False, got None"),
        ({"foreach": "yes"}, TypeError, "foreach: expected True, False or None, got 'yes'"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=match):
        BatchManhattan([p], **arguments)
    with pytest.raises(error, match=match):
        BatchManhattan([{"params": [p], **arguments}])


def test_errors_of_parameters() -> None:
    with pytest.raises(TypeError, match="params: expected real Parameters"):
        BatchManhattan([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    embedding = nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="params: expected dense gradients"):
        BatchManhattan(embedding.parameters()).step()
