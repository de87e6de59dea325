"""One small network with direct feedback by each rule, for tests that try each."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioplaus_kernels import direct

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


def assert_same(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], **tolerance: Any) -> None:
    """Both have the same gradients, and none in the same places."""
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        a = actual[name]
        assert (a is None) == (e is None), name
        if a is not None:
            torch.testing.assert_close(a, e, **tolerance)
