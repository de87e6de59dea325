"""Target propagation against back-propagation, closed forms and the equations written out layer by layer."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bioplaus_kernels as bk
from bioplaus_kernels.targetprop import VARIANTS, TargetProp, learned_inverse, rhl_inverses

CLASSES, EXTRA = 4, 3


def dense() -> list[torch.nn.Module]:
    """5 → 7 → 6 → 6 → CLASSES, tanh between."""
    hidden = [torch.nn.Sequential(torch.nn.Linear(a, b), torch.nn.Tanh()) for a, b in ((5, 7), (7, 6), (6, 6))]
    return [*hidden, torch.nn.Linear(6, CLASSES)]


def make(variant: str, **kwargs: Any) -> TargetProp:
    """A dense network of four layers with the inverses that `variant` asks for, float64."""
    layers = dense()
    tanh = torch.nn.Tanh()
    extra = EXTRA if variant == "ao_sdtp" else 0
    inverses: list[Any] = [None, *(learned_inverse(layer) for layer in layers[1:3])]
    inverses.append(learned_inverse(layers[3], activation=tanh, extra=extra))
    if variant == "ddtp":
        inverses = [None, torch.nn.Linear(CLASSES, 7), torch.nn.Linear(CLASSES, 6), torch.nn.Linear(CLASSES, 6)]
    if VARIANTS[variant].first == "hidden":
        inverses[-1] = None
    if kwargs.get("mix") == 1:
        inverses = [None] * 4
    if variant == "ao_sdtp":
        kwargs["auxiliary"] = torch.nn.Linear(6, EXTRA)
    return TargetProp(layers, inverses, variant, **kwargs).double()


def batch(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 5, dtype=torch.float64), torch.randint(CLASSES, (n,))


def gradients(tp: torch.nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in tp.named_parameters()}


class Adjoint(torch.nn.Module):
    """g = Jᵀ of `layer` at the activations `at`, for rows stacked on them: linear, without nonlinearity."""

    def __init__(self, layer: torch.nn.Module, at: Tensor) -> None:
        super().__init__()
        self.layer, self.at = [layer], at.detach()

    def forward(self, rows: Tensor) -> Tensor:
        jacobian = torch.stack([torch.autograd.functional.jacobian(self.layer[0], h) for h in self.at])
        stacked = jacobian.repeat(len(rows) // len(self.at), 1, 1)
        return torch.einsum("noi,no->ni", stacked, rows)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("way", ["adjoint", "mix"])
def test_dtp_with_the_transposed_jacobian_is_backprop(alpha: float, way: str) -> None:
    x, y = batch()
    tp = make("dtp", alpha=alpha, reduction="sum", mix=1.0 if way == "mix" else 0.0)
    h = tp.activations(x)
    if way == "adjoint":
        for k in (1, 2):
            tp.inverses[k] = Adjoint(tp.layers[k], h[k])
    tp.forward_loss(h, tp.targets(h, y), y).backward()
    plain = copy.deepcopy(tp.layers)
    plain.zero_grad()
    out = x
    for layer in plain:
        out = layer(out)
    F.cross_entropy(out, y).backward()
    for k, (ours, theirs) in enumerate(zip(tp.layers, plain, strict=True)):
        factor = 1.0 if k == len(plain) - 1 else 2 * alpha
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, factor * q.grad, rtol=1e-9, atol=1e-12)


def test_reduction_mean_makes_the_first_step_n_times_smaller() -> None:
    x, y = batch()
    tp = make("dtp", alpha=0.3)
    h = tp.activations(x)
    mean = tp.targets(h, y)[-1] - h[-2]
    tp.reduction = "sum"
    torch.testing.assert_close(tp.targets(h, y)[-1] - h[-2], 5 * mean, rtol=1e-9, atol=1e-12)
    # Softmax and cross-entropy by hand: dL/dh = (p - y) W / N.
    error = h[-1].softmax(1) - F.one_hot(y, CLASSES)
    torch.testing.assert_close(mean, -0.3 * error @ tp.layers[-1].weight / 5, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_loss_fills_only_its_own_gradients(variant: str) -> None:
    x, y = batch()
    tp = make(variant)
    h = tp.activations(x)
    targets = tp.targets(h, y)
    assert [t.shape for t in targets] == [t.shape for t in h[1:-1]]
    assert not any(t.requires_grad for t in targets)
    assert all(grad is None for grad in gradients(tp).values())
    tp.forward_loss(h, targets, y).backward()
    for name, grad in gradients(tp).items():
        assert (grad is not None and bool(grad.any())) == name.startswith("layers"), name
    tp.zero_grad()
    if variant == "fw_dtp":
        assert not any(p.requires_grad for p in tp.inverses.parameters())
        with pytest.raises(ValueError, match="variant: expected one that trains its inverses, got 'fw_dtp'"):
            tp.inverse_loss(h)
        return
    tp.inverse_loss(h).backward()
    for name, grad in gradients(tp).items():
        assert (grad is not None and bool(grad.any())) == name.startswith("inverses"), name


@pytest.mark.parametrize("variant", ["tp", "dtp", "sdtp", "ao_sdtp", "l_drl", "dtpdrl", "ddtp"])
def test_targets_are_the_equations(variant: str) -> None:
    x, y = batch()
    tp = make(variant, alpha=0.2)
    h = [t.detach() for t in tp.activations(x)]
    g = list(tp.inverses)
    got = tp.targets(h, y)
    one_hot = F.one_hot(y, CLASSES).double()
    o = h[4].softmax(1)
    step = 0.2 * (o - one_hot) / len(x)
    with torch.no_grad():
        if variant == "tp":
            t3 = g[3](one_hot)
            want = [g[1](g[2](t3)), g[2](t3), t3]
        elif variant == "ddtp":
            want = [h[k] + g[k](h[4] - step) - g[k](h[4]) for k in (1, 2, 3)]
        else:
            if variant == "dtp":
                t3 = h[3] - step @ tp.layers[3].weight
            elif variant == "sdtp":
                t3 = h[3] + g[3](one_hot) - g[3](o)
            elif variant == "ao_sdtp":
                z = tp.auxiliary(h[3])
                t3 = h[3] + g[3](torch.cat((one_hot, z), 1)) - g[3](torch.cat((o, z), 1))
            else:
                t3 = h[3] + g[3](h[4] - step) - g[3](h[4])
            t2 = h[2] + g[2](t3) - g[2](h[3])
            want = [h[1] + g[1](t2) - g[1](h[2]), t2, t3]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_mix_is_the_convex_combination() -> None:
    x, y = batch()
    learned, hybrid = make("sdtp"), make("sdtp", mix=0.25)
    hybrid.load_state_dict(learned.state_dict())
    h = [t.detach() for t in learned.activations(x)]
    top, label = h[4].softmax(1), F.one_hot(y, CLASSES).double()
    one = learned.targets(h, y)[-1] - h[3]
    pulled = Adjoint(torch.nn.Sequential(learned.layers[3], torch.nn.Softmax(-1)), h[3])(label - top)
    torch.testing.assert_close(hybrid.targets(h, y)[-1] - h[3], 0.75 * one + 0.25 * pulled, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ["dtp", "sdtp", "ao_sdtp"])
def test_inverse_losses_are_the_equations(variant: str) -> None:
    x, _ = batch()
    tp = make(variant, sigma=0.3)
    h = [t.detach() for t in tp.activations(x)]
    state = torch.get_rng_state()
    got = tp.inverse_losses(h)
    torch.set_rng_state(state)
    for k, loss in zip((1, 2, 3), got, strict=variant != "dtp"):
        noisy = h[k] + 0.3 * torch.randn_like(h[k])
        f = tp.layers[k](noisy)
        if k == 3:
            f = f.softmax(1)
            if variant == "ao_sdtp":
                f = torch.cat((f, tp.auxiliary(noisy)), 1)
        difference = (noisy if variant == "dtp" else h[k]) - tp.inverses[k](f)
        torch.testing.assert_close(loss, (difference**2).sum() / len(x), rtol=1e-9, atol=1e-12)


def lc_network() -> tuple[list[torch.nn.Module], list[Any]]:
    """A small network of S1's kind, locally connected and then dense, with the inverses of SDTP."""
    layers = [
        torch.nn.Sequential(bk.nn.LocallyConnected2d(1, 3, 3, 2, "same", input_size=8), torch.nn.Tanh()),
        torch.nn.Sequential(bk.nn.LocallyConnected2d(3, 4, 3, 2, "same", input_size=4), torch.nn.Tanh()),
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 12), torch.nn.Tanh()),
        torch.nn.Linear(12, CLASSES),
    ]
    inverses = [None, learned_inverse(layers[1]), learned_inverse(layers[2], (4, 2, 2))]
    return layers, [*inverses, learned_inverse(layers[3], activation=torch.nn.Tanh())]


def test_inverses_of_locally_connected_layers() -> None:
    layers, inverses = lc_network()
    assert isinstance(inverses[1][0], bk.nn.LocallyConnectedTranspose2d)
    # V has the shape of W: it is its transpose by how it is used.
    assert inverses[1][0].weight.shape == layers[1][0].weight.shape
    assert inverses[3][0].weight.shape == layers[3].weight.T.shape
    tp = TargetProp(layers, inverses, "sdtp", sigma=0.1)
    x, y = torch.randn(6, 1, 8, 8), torch.randint(CLASSES, (6,))
    torch.testing.assert_close(tp(x), tp.activations(x)[-1])
    optimizer = torch.optim.Adam(tp.inverses.parameters(), 1e-2)
    h = tp.activations(x)
    assert [t.shape for t in tp.targets(h, y)] == [(6, 3, 4, 4), (6, 4, 2, 2), (6, 12)]
    before = torch.stack(tp.inverse_losses(h))
    for _ in range(100):
        optimizer.zero_grad()
        tp.inverse_loss(h).backward()
        optimizer.step()
    assert (torch.stack(tp.inverse_losses(h)) < 0.7 * before).all()


@pytest.mark.parametrize(
    ("d", "size", "geometry"),
    [
        (1, (7,), {"kernel_size": 3, "stride": 2}),
        (2, (8, 9), {"kernel_size": (3, 2), "stride": (3, 2), "padding": (1, 0)}),
        (2, (6, 5), {"kernel_size": 2, "dilation": 2, "groups": 2, "stride": 2}),
        (3, (4, 3, 5), {"kernel_size": (2, 1, 3), "stride": 2, "padding": (0, 0, 1)}),
    ],
)
def test_the_inverse_of_a_convolution(d: int, size: tuple[int, ...], geometry: dict[str, Any]) -> None:
    conv = getattr(torch.nn, f"Conv{d}d")(4, 6, **geometry).double()
    inverse = learned_inverse(torch.nn.Sequential(conv, torch.nn.ELU()), (4, *size))
    assert isinstance(inverse[1], torch.nn.ELU)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    y = conv(x)
    with torch.no_grad():
        inverse[0].weight.copy_(conv.weight)
        inverse[0].bias.zero_()
    # With V = W it is the transpose: what autograd makes of y.
    torch.testing.assert_close(inverse[0](y), torch.autograd.grad(y, x, y)[0])


@pytest.mark.parametrize("variant", ["dtp", "sdtp", "ao_sdtp", "l_drl", "dtpdrl", "ddtp"])
def test_it_learns(variant: str, one_thread: None) -> None:
    torch.manual_seed(1)
    tp = make(variant, sigma=0.1, alpha=0.5, **({} if VARIANTS[variant].first == "labels" else {"reduction": "sum"}))
    x, y = batch(64)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    forward = torch.optim.Adam(tp.layers.parameters(), 5e-3)
    inverse = torch.optim.Adam(tp.inverses.parameters(), 5e-3)
    for _ in range(300):
        h = tp.activations(x)
        inverse.zero_grad()
        tp.inverse_loss(h).backward()
        inverse.step()
        forward.zero_grad()
        tp.forward_loss(h, tp.targets(h, y), y).backward()
        forward.step()
    assert (tp(x).argmax(1) == y).double().mean() > 0.9


def test_the_state_dict_holds_layers_and_inverses() -> None:
    tp = make("ao_sdtp")
    names = {name.split(".")[0] for name in tp.state_dict()}
    assert names == {"layers", "inverses", "auxiliary"}
    assert not any(p.requires_grad for p in tp.auxiliary.parameters())
    other = make("ao_sdtp")
    other.load_state_dict(tp.state_dict())
    x, _ = batch()
    assert torch.equal(tp(x), other(x))


@pytest.mark.parametrize("variant", [pytest.param("dtp", marks=pytest.mark.slow), "sdtp"])
def test_compiled_step(variant: str) -> None:
    x, y = batch()
    tp = make(variant, sigma=0.0)

    def step() -> Tensor:
        h = tp.activations(x)
        return tp.inverse_loss(h) + tp.forward_loss(h, tp.targets(h, y), y)

    step().backward()
    want = gradients(tp)
    tp.zero_grad()
    # "dtp" takes a gradient inside the step, where torch.compile breaks the graph.
    torch.compile(step, backend="aot_eager", fullgraph=variant == "sdtp")().backward()
    for name, grad in gradients(tp).items():
        torch.testing.assert_close(grad, want[name], rtol=1e-9, atol=1e-12)


def losses(tp: TargetProp, x: Tensor, y: Tensor) -> Tensor:
    """All of a step's losses, the inverses' after the targets have used them without recording."""
    h = tp.activations(x)
    total = tp.forward_loss(h, tp.targets(h, y), y)
    return total if tp.inverse_objective is None else total + tp.inverse_loss(h)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant: str) -> None:
    # Its cache of casted weights must not hand out one that was made where nothing is recorded.
    x, y = batch()
    found = []
    for cache in (True, False):
        torch.manual_seed(3)
        tp = make(variant).float()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            loss = losses(tp, x.float(), y)
        loss.backward()
        found.append(gradients(tp))
        assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in tp.layers.parameters())
    for name, grad in found[0].items():
        assert (grad is None) == (found[1][name] is None) == (not tp.get_parameter(name).requires_grad), name
        assert grad is None or torch.equal(grad, found[1][name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_meta_modules_and_an_empty_batch(variant: str) -> None:
    x, y = batch()
    tp = make(variant)
    meta = copy.deepcopy(tp).to("meta").to_empty(device="cpu")
    meta.load_state_dict(tp.state_dict())
    found = []
    for twin in (tp, meta, pickle.loads(pickle.dumps(tp))):
        torch.manual_seed(3)
        found.append(losses(twin, x, y))
    assert found[0] == found[1] == found[2]
    losses(tp, x[:0], y[:0]).backward()
    assert all(g is None or not g.any() for g in gradients(tp).values())


ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "variant": (lambda: make_with("dpt"), ValueError, "variant: expected one of tp, dtp, .*, got 'dpt'"),
    "alpha": (lambda: make("dtp", alpha=-1.0), ValueError, "alpha: expected a finite number of at least 0, got -1"),
    "sigma": (lambda: make("dtp", sigma="1"), TypeError, "sigma: expected a finite number of at least 0, got '1'"),
    "mix": (lambda: make("dtp", mix=1.5), ValueError, "mix: expected a number from 0 to 1, got 1.5"),
    "mix of tp": (lambda: make("tp", mix=0.5), ValueError, "mix: expected 0 with variant='tp', got 0.5"),
    "reduction": (lambda: make("dtp", reduction="none"), ValueError, "reduction: expected 'mean' or 'sum', got 'none'"),
    "missing inverse": (lambda: make_with("sdtp", None), ValueError, r"inverses\[1\]: expected a module .*got None"),
    "needless inverse": (lambda: make_with("dtp"), ValueError, r"inverses\[1\]: expected None .*got Linear"),
    "auxiliary": (lambda: make_with("ao_sdtp"), ValueError, "auxiliary: expected a module, got None"),
    "objective": (
        lambda: make("tp", inverse_objective="drl"),
        ValueError,
        "inverse_objective: expected preserving or denoising or l_drl with variant='tp'.*got 'drl'",
    ),
    "objective of direct feedback": (
        lambda: make("ddtp", inverse_objective="l_drl"),
        ValueError,
        "inverse_objective: expected preserving or drl with variant='ddtp'.*got 'l_drl'",
    ),
    "objective of fixed inverses": (
        lambda: make("fw_dtp", inverse_objective="preserving"),
        ValueError,
        "inverse_objective: expected None with variant='fw_dtp'.*got 'preserving'",
    ),
    "sizes": (lambda: rhl_inverses([4, (2, 0)], 3), ValueError, r"sizes\[1\]: expected at least 1, got 0"),
    "no sizes": (lambda: rhl_inverses([], 3), ValueError, "sizes: expected at least one hidden layer, got none"),
    "hidden": (lambda: rhl_inverses([4], 3, 2.0), TypeError, "hidden: expected an integer, got 2.0"),
    "sigma of drl": (lambda: make("ddtp", sigma=0.0), ValueError, "sigma: expected a positive number .*got 0.0"),
    "length": (
        lambda: TargetProp(dense(), [None], "dtp"),
        ValueError,
        "inverses: expected 4 entries, one for each of layers, got 1",
    ),
    "targets": (
        lambda: make("dtp").forward_loss([torch.zeros(1)] * 5, [], torch.zeros(1)),
        ValueError,
        "targets: expected 3 tensors, one for each hidden layer, got 0",
    ),
    "labels": (
        lambda: (tp := make("sdtp")).targets(tp.activations(batch()[0]), torch.zeros(5, 3)),
        ValueError,
        r"y: expected classes \(5,\) or values \(5, 4\), got shape \(5, 3\)",
    ),
    "labels' type": (
        lambda: (tp := make("sdtp")).targets(tp.activations(batch()[0]), torch.zeros(5, dtype=torch.int32)),
        TypeError,
        "y: expected int64 classes, or values, got torch.int32",
    ),
    "logits": (
        lambda: (tp := make("sdtp")).targets([t[None] for t in tp.activations(batch()[0])], torch.zeros(1, 5)),
        ValueError,
        r"h\[-1\]: expected 2 dimensions, got shape \(1, 5, 4\)",
    ),
    "inverse of": (
        lambda: learned_inverse(torch.nn.Tanh()),
        ValueError,
        "layer: expected .*Linear, LocallyConnected or Conv.*got Tanh",
    ),
    "flatten": (
        lambda: learned_inverse(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))),
        ValueError,
        "input_size: expected the size that Flatten or a convolution takes, without the batch, got None",
    ),
    "convolution": (
        lambda: learned_inverse(torch.nn.Conv2d(1, 2, 3)),
        ValueError,
        "input_size: expected the size that Flatten or a convolution takes, without the batch, got None",
    ),
    "padding by name": (
        lambda: learned_inverse(torch.nn.Conv2d(1, 2, 3, padding="same"), (1, 5, 5)),
        ValueError,
        "layer: expected a convolution padded with zeros, by numbers, got Conv2d",
    ),
}


def make_with(variant: str, inverse: Any = torch.nn.Linear(4, 4)) -> TargetProp:  # noqa: B008
    return TargetProp([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)], [None, inverse], variant)


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case: str) -> None:
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call()
