"""Direct Kolen–Pollack: what B learns, against the product e ᵀ h of each block written out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")


class Steps(nn.Module):
    """A cell called in steps, whose logits have a dimension of them."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.RNNCell(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, steps = None, []
        for _ in range(5):
            h = self.cell(x, h)
            steps.append(self.head(h))
        return torch.stack(steps, 1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


def pixels() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 3, 1))


# A model, its blocks, an input, class_dim, and of h of a block's calls and e the products, samples first.
CASES: dict[str, tuple[Any, list[str], tuple[int, ...], int | None, str]] = {
    "mlp": (mlp, ["1", "3"], (5, 4), None, "nc,nk->ck"),
    "pixels": (pixels, ["1"], (2, 4, 3, 2), 1, "ncyx,nkyx->ck"),
    "steps": (Steps, ["cell"], (2, 4), None, "ntc,ntk->ck"),
}


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("case", CASES)
def test_b_takes_the_product_of_error_and_output(case: str, shared: bool) -> None:
    make, blocks, shape, class_dim, product = CASES[case]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    outputs: dict[str, list[Tensor]] = {name: [] for name in blocks}
    wrapped = bk.DirectFeedback(model, blocks, bk.direct.DKP(shared=shared), example=x, class_dim=class_dim)
    for name in blocks:
        wrapped.model.get_submodule(name).register_forward_hook(lambda m, a, h, n=name: outputs[n].append(h.detach()))
    logits = wrapped(x)
    logits.retain_grad()
    logits.square().sum().backward()
    e, b = logits.grad, wrapped.feedback_weight
    expected, start = torch.zeros_like(b), 0
    for name in blocks:
        h = torch.stack(outputs[name], 1) if case == "steps" else outputs[name][0]
        found = torch.einsum(product, e, h)
        expected[:, start : start + found.shape[1]] += found.detach()
        start += 0 if shared else found.shape[1]
    torch.testing.assert_close(b.grad, expected, rtol=1e-12, atol=1e-12)
    # What the blocks learn is DFA's with this B.
    fixed = bk.DirectFeedback(
        wrapped.restore(), blocks, bk.direct.DFA(shared=shared, stored=True), example=x, class_dim=class_dim
    )
    with torch.no_grad():
        fixed.feedback_weight.copy_(b)
    ours = [p.grad.clone() for p in fixed.model.parameters()]
    fixed.zero_grad()
    fixed(x).square().sum().backward()
    for a, q in zip(ours, fixed.model.parameters(), strict=True):
        torch.testing.assert_close(a, q.grad, rtol=1e-10, atol=1e-12)


class Writes(nn.Module):
    """What follows the block `a` changes its output in place: in training, or always."""

    def __init__(self, write: Any, always: bool) -> None:
        super().__init__()
        self.a, self.fc, self.write, self.always = nn.Linear(4, 6), nn.Linear(6, 3), write, always

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.training or self.always:
            self.write(h)
        return self.fc(h)


@pytest.mark.parametrize("write", [torch.relu_, lambda h: h.add_(h.mean()), lambda h: h[:, 0].zero_()])
def test_b_learns_of_the_output_as_the_block_gave_it(write: Any) -> None:
    x, changed = torch.randn(5, 4), "blocks: expected outputs that nothing changes in place.* got one of 'a' that was"
    model = Writes(write, always=True)
    with pytest.raises(ValueError, match=changed):
        bk.DirectFeedback(model, ["a"], "dkp", example=x)
    bk.DirectFeedback(model, ["a"], "dfa", example=x)(x).sum().backward()
    net = bk.DirectFeedback(Writes(write, always=False), ["a"], "dkp", example=x)
    with pytest.raises(ValueError, match=changed):
        net(x)
    # Compiled code writes into a copy.
    torch._dynamo.reset()
    torch.compile(net, fullgraph=True, backend="aot_eager")(x).sum().backward()
    torch.testing.assert_close(net.feedback_weight.grad, torch.ones(3, 5) @ net.model.a(x))


def test_a_write_after_the_logits_and_one_inside_the_block() -> None:
    x, seen = torch.randn(5, 4), []
    net = bk.DirectFeedback(Writes(seen.append, always=True), ["a"], "dkp", example=x)
    z = net(x)
    seen[-1].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
    block = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True))
    net = bk.DirectFeedback(nn.Sequential(block, nn.Linear(6, 3)), ["0"], "dkp", example=x)
    net(x).sum().backward()
    torch.testing.assert_close(net.feedback_weight.grad, torch.ones(3, 5) @ net.model[0](x))


def test_it_learns_and_is_saved() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 4), torch.randint(3, (64,))
    model = bk.DirectFeedback(mlp(), ["1", "3"], "dkp", example=x[:1])
    assert model.feedback_weight in list(model.parameters()) and model.feedback_weight.requires_grad
    before, w = model.feedback_matrix("3").clone(), model.model[4].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, weight_decay=0.01)
    for _ in range(500):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    # The last block's B and the output layer's W take the same updates.
    assert bk.metrics.compare(model.feedback_matrix("3"), w).angle < 25 < bk.metrics.compare(before, w).angle
    other = bk.DirectFeedback(mlp(), ["1", "3"], "dkp", example=x[:1], seed=3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.feedback_weight, model.feedback_weight)
    with pytest.raises(RuntimeError, match=r"expected the state of DFA.*got that of DKP"):
        bk.DirectFeedback(mlp(), ["1", "3"], bk.direct.DFA(stored=True), example=x[:1]).load_state_dict(
            model.state_dict()
        )


def test_frozen_and_half() -> None:
    x = torch.randn(5, 4)
    model = bk.DirectFeedback(mlp(), ["1", "3"], "dkp", example=x)
    model.feedback_weight.requires_grad_(False)
    model(x).sum().backward()
    assert model.feedback_weight.grad is None and model.model[0].weight.grad.any()
    model.feedback_weight.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().sum()
    loss.backward()
    assert model.feedback_weight.grad.dtype == torch.float32 and model.feedback_weight.grad.any()
    compiled = torch.compile(model, backend="aot_eager")
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="stored: expected True with 'dkp'"):
        bk.direct.DKP(stored=False)
