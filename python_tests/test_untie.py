"""untie_: convolutions of a model become locally connected and compute what they did."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Convolutions of one, two and three dimensions, one used twice and under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 4, (3, 1), padding="same", groups=2, bias=False), nn.Tanh())
        self.again = self.body[0]
        self.line, self.block = nn.Conv1d(4, 3, 2, dilation=2), nn.Conv3d(1, 2, 2, padding=(0, 1, 1))
        self.head = nn.ConvTranspose2d(4, 2, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        h = self.again(self.body(self.norm(self.stem(x * scale))))
        return self.line(h.flatten(2)).sum() + self.block(input=h.unsqueeze(1)).square().sum() + self.head(h).sum()


def test_the_function_stays() -> None:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(3, 2, 6, 8, dtype=torch.float64)
    model.norm.eval()
    expected, mean = model(x), model.norm.running_mean.clone()
    model.line.eval().weight.requires_grad_(False)
    seen: list[str] = []
    model.stem.register_forward_hook(lambda *_: seen.append("stem"))
    stem = model.stem
    found = bk.untie_(model, x[:1])
    assert found == {"stem": (6, 8), "body.0": (3, 4), "line": (12,), "block": (4, 3, 4)}
    assert model.stem is stem and type(stem) is bk.nn.LocallyConnected2d and stem.padding_mode == "circular"
    assert type(model.head) is nn.ConvTranspose2d and model.again is model.body[0]
    assert model.training and not model.norm.training and not model.line.training
    assert not model.line.weight.requires_grad and model.block.weight.requires_grad
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert seen == ["stem", "stem"], "a hook of the user's"
    assert torch.equal(model.norm.running_mean, mean) and all(p.grad is None for p in model.parameters())
    # It is a model as any: it converts, trains, is saved and loaded.
    bk.convert_(model, "usf", example=x)
    model(x).backward()
    assert model.stem.weight.grad is not None and model.stem.weight.shape == (3, 4, 4, 3, 3, 2)
    other = Net().double()
    bk.untie_(other, {"x": x, "scale": 2.0})
    bk.convert_(other, "usf")
    other.load_state_dict(model.state_dict())
    model.eval(), other.eval()
    torch.testing.assert_close(other(x), model(x))


def test_chosen_ones_and_their_rules() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    bk.convert_(model, bk.SignSymmetry(scale=0.5), filter_fn=lambda m, name: name == "1")
    x = torch.randn(2, 1, 9, 9, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    assert bk.untie_(model, (x,), filter_fn=lambda m, name: name != "0") == {"1": (7, 7), "2": (5, 5)}
    assert type(model[0]) is nn.Conv2d and model[1].feedback == bk.SignSymmetry(scale=0.5)
    torch.testing.assert_close(torch.autograd.grad(model(x).sum(), x)[0], expected)
    root: Any = nn.Conv1d(1, 2, 3)
    assert bk.untie_(root, torch.randn(1, 9)) == {"": (9,)} and isinstance(root, bk.nn.LocallyConnected1d)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_what_stays_and_errors() -> None:
    model = nn.Sequential(Standardised(1, 2, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3)))
    assert bk.untie_(model, torch.randn(1, 1, 9, 9)) == {}

    class Sizes(nn.Module):
        def __init__(self, sizes: list[int]) -> None:
            super().__init__()
            self.conv, self.sizes = nn.Conv1d(1, 1, 3), sizes

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.conv(x[..., :n]) for n in self.sizes]

    for sizes, got in (([5, 6], r"\[\(5,\), \(6,\)\]"), ([], "none")):
        model = Sizes(sizes)
        with pytest.raises(ValueError, match=f"example: expected a call that conv sees with one size, got {got}"):
            bk.untie_(model, torch.randn(1, 1, 9))
        assert type(model.conv) is nn.Conv1d and not model.conv._forward_pre_hooks
    broken = nn.Sequential(nn.Conv1d(1, 1, 3))
    with pytest.raises(RuntimeError):
        bk.untie_(broken, torch.randn(1, 2, 9))
    assert not broken[0]._forward_pre_hooks


class Computed(NamedTuple):
    change: Callable[[Any], Any]
    back: Callable[[Any], Any]


def _replaced(conv: Any) -> None:
    conv.forward = conv.forward


COMPUTED = {
    "pruned": Computed(lambda m: prune.l1_unstructured(m, "weight", 2), lambda m: prune.remove(m, "weight")),
    "pruned bias": Computed(lambda m: prune.l1_unstructured(m, "bias", 1), lambda m: prune.remove(m, "bias")),
    "weight_norm": Computed(nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm": Computed(nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "forward": Computed(_replaced, lambda m: delattr(m, "forward")),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", COMPUTED)
def test_computed_weights_are_refused(case: str) -> None:
    model, x = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Conv1d(2, 2, 3)), torch.randn(2, 1, 9)
    COMPUTED[case].change(model[1])
    model.eval()  # spectral_norm iterates in training
    expected, state = model(x), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"model: expected convolutions with their own weight.*got 1, with one that"):
        bk.untie_(model, x)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items()) and type(model[0]) is nn.Conv1d
    bk.untie_(model, x, filter_fn=lambda m, name: name == "0")
    torch.testing.assert_close(model(x), expected)
    COMPUTED[case].back(model[1])
    assert bk.untie_(model, x) == {"1": (7,)}
    torch.testing.assert_close(model(x), expected)


HOOKS: dict[str, Callable[[Any, Callable[..., None]], Any]] = {
    "forward": lambda m, hook: m.register_forward_hook(hook),
    "forward, keywords": lambda m, hook: m.register_forward_hook(lambda m, args, kwargs, y: hook(), with_kwargs=True),
    "forward, always": lambda m, hook: m.register_forward_hook(hook, always_call=True),
    "before": lambda m, hook: m.register_forward_pre_hook(hook),
    "before, keywords": lambda m, hook: m.register_forward_pre_hook(lambda m, args, kwargs: hook(), with_kwargs=True),
    "backward": lambda m, hook: m.register_full_backward_hook(hook),
    "before backward": lambda m, hook: m.register_full_backward_pre_hook(hook),
    "state_dict": lambda m, hook: m.register_state_dict_post_hook(hook),
    "before state_dict": lambda m, hook: m.register_state_dict_pre_hook(hook),
    "load": lambda m, hook: m.register_load_state_dict_post_hook(hook),
    "before load": lambda m, hook: m.register_load_state_dict_pre_hook(hook),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_every_kind_of_hook_stays(kind: str) -> None:
    model, x, called = nn.Sequential(nn.Conv1d(1, 2, 3)), torch.randn(2, 1, 9, requires_grad=True), []
    handle = HOOKS[kind](model[0], lambda *_: called.append(kind))

    def use() -> int:
        called.clear()
        model(x).sum().backward()
        model.load_state_dict(model.state_dict())
        if "always" in kind:
            with pytest.raises((RuntimeError, ValueError)):
                model(x[..., :1])
        return len(called)

    before = use()
    bk.untie_(model, x)
    assert use() == before > 0
    handle.remove()
    assert use() == 0


def test_what_else_was_registered_stays() -> None:
    model, x = nn.Sequential(nn.Conv1d(1, 2, 3)), torch.randn(2, 1, 9)
    conv = model[0]
    conv.child, conv.note = nn.Linear(2, 2), "a note"
    conv.register_buffer("seen", torch.ones(1), persistent=False)
    conv.register_buffer("count", torch.ones(1))
    conv.register_parameter("gain", nn.Parameter(torch.ones(2)))
    bk.convert_(model, "fa_signed_init", filter_fn=lambda m, name: name == "0")
    bk.convert_(model, "fa", filter_fn=lambda m, name: name == "0")
    seeded, names, gain = model._ddp_params_and_buffers_to_ignore, set(model.state_dict()), conv.gain
    assert seeded == ["0.feedback_state"]
    bk.untie_(model, x)
    assert set(model.state_dict()) == names and conv.gain is gain and conv.note == "a note"
    assert torch.equal(conv.seen, torch.ones(1))
    # The new state is drawn, not derived from the seed: each rank's own, which is to be sent.
    assert seeded == []
    bk.convert_(model, None)
    assert set(model.state_dict()) == {name for name in names if "feedback" not in name}


@pytest.mark.parametrize("d", [1, 2])
def test_initialisation_by_torchs_functions(d: int) -> None:
    kind = getattr(bk.nn, f"LocallyConnected{d}d")
    layer = kind(8, 16, 3, groups=2, input_size=12)
    assert layer.init_(nn.init.xavier_uniform_, gain=2.0) is layer
    taps = 3**d
    bound = 2 * (6 / (taps * (4 + 16))) ** 0.5
    assert 0.98 * bound < layer.weight.abs().max() <= bound
    layer.init_(nn.init.kaiming_normal_, nonlinearity="relu")
    assert abs(layer.weight.std() / (2 / (taps * 4)) ** 0.5 - 1) < 0.05
    layer.init_(nn.init.orthogonal_)
    block = layer.weight[(0,) * d].flatten(1)
    rows = block if len(block) <= block.shape[1] else block.T
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=1e-4, atol=1e-4)
    # Of a transposed layer as torch.nn.init takes a transposed convolution's weight.
    back = bk.nn.LocallyConnectedTranspose1d(16, 8, 3, output_size=12).init_(nn.init.xavier_uniform_)
    bound = (6 / (3 * (8 + 16))) ** 0.5
    assert 0.98 * bound < back.weight.abs().max() <= bound
