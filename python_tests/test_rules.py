"""B itself, as `feedback_matrix` gives it, against the definition of each rule."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import bioplaus_kernels as bk
from bioplaus_kernels.feedback import feedback_key, weight_rms

SIGN_RULES = {
    "usf": bk.SignSymmetry,
    "frsf": bk.FixedMagnitude,
    "brsf": bk.BatchMagnitude,
}

# Layer, arguments, and by hand: fan_in, fan_out, and the square of Xiao et al.'s constant. A kernel has 2·3 = 6 taps.
# torch.nn.init's fans: the weight's second dimension times taps, and its first; groups make the second smaller.
LAYERS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], int, int, float]] = {
    "Linear": (bk.nn.Linear, (96, 80), {}, 96, 80, 1 / 96),
    "Conv2d": (bk.nn.Conv2d, (16, 24, (2, 3)), {}, 16 * 6, 24 * 6, 2 / (6 * 24)),
    "Conv2d groups": (bk.nn.Conv2d, (32, 64, (2, 3)), {"groups": 4}, 8 * 6, 64 * 6, 2 / (6 * 64)),
    "Conv1d": (bk.nn.Conv1d, (24, 64, 6), {}, 24 * 6, 64 * 6, 2 / (6 * 64)),
    "Conv3d": (bk.nn.Conv3d, (24, 64, (1, 2, 3)), {}, 24 * 6, 64 * 6, 2 / (6 * 64)),
    "ConvTranspose2d": (bk.nn.ConvTranspose2d, (32, 40, (2, 3)), {}, 40 * 6, 32 * 6, 2 / (6 * 40)),
    "ConvTranspose2d groups": (
        bk.nn.ConvTranspose2d,
        (64, 64, (2, 3)),
        {"groups": 4},
        16 * 6,
        64 * 6,
        2 / (6 * 64),
    ),
    "LocallyConnected2d": (
        bk.nn.LocallyConnected2d,
        (8, 20, (2, 3)),
        {"groups": 2, "input_size": 5},
        4 * 6,
        20 * 6,
        2 / (6 * 20),
    ),
    # The transpose's block is (in_channels, taps, out_channels / groups), as a transposed convolution's weight is.
    "LocallyConnectedTranspose2d": (
        bk.nn.LocallyConnectedTranspose2d,
        (8, 20, (2, 3)),
        {"groups": 2, "output_size": 5},
        10 * 6,
        8 * 6,
        2 / (6 * 20),
    ),
}
layers = pytest.mark.parametrize("layer", LAYERS)


def build(layer: str, rule: bk.Rule | str | None, dtype: torch.dtype = torch.float64) -> Any:
    kind, args, kwargs, *_ = LAYERS[layer]
    return kind(*args, **kwargs, dtype=dtype, feedback=rule)


def scales(layer: str) -> dict[Any, float]:
    """The root mean square each scale stands for."""
    *_, fan_in, fan_out, xiao_squared = LAYERS[layer]
    return {
        "xiao": math.sqrt(xiao_squared),
        "xavier": math.sqrt(2 / (fan_in + fan_out)),
        "torch": 1 / math.sqrt(3 * fan_in),
        0.125: 0.125,
        3: 3.0,
    }


def root_mean_square(b: Tensor) -> float:
    return b.double().square().mean().sqrt().item()


@layers
def test_constant_magnitude_is_exactly_the_scale(layer: str) -> None:
    for scale, expected in scales(layer).items():
        for rule in (
            bk.SignSymmetry(scale=scale),
            bk.SignedInit(scale=scale),
            bk.FeedbackAlignment(scale=scale, entries="constant"),
            bk.FeedbackAlignment(scale=scale, entries="constant", stored=True),
        ):
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                built = build(layer, rule, dtype)
                b = built.feedback_matrix()
                # The scale is rounded to the accumulator's type first, then to the weight's.
                accumulate = torch.float64 if dtype == torch.float64 else torch.float32
                wanted = torch.tensor(expected, dtype=torch.float64).to(accumulate).to(dtype).expand_as(b)
                if not isinstance(rule, bk.FeedbackAlignment):
                    # Some torch's initial weights of few bits are exactly zero here and there.
                    wanted = wanted * (built.weight != 0)
                assert torch.allclose(b.abs(), wanted, rtol=1e-15 if dtype == torch.float64 else 0, atol=0)


@layers
def test_root_mean_square_of_draws(layer: str) -> None:
    # Five standard errors of the mean square of n draws: its relative variance is (kurtosis - 1)/n.
    for scale, expected in scales(layer).items():
        for entries, kurtosis in (("uniform", 1.8), ("normal", 3.0)):
            for rule in (
                bk.FeedbackAlignment(scale=scale, entries=entries),
                bk.FeedbackAlignment(scale=scale, entries=entries, stored=True),
                bk.FixedMagnitude(scale=scale, entries=entries),
                bk.FixedMagnitude(scale=scale, entries=entries, stored=True),
                bk.BatchMagnitude(scale=scale, entries=entries),
            ):
                b = build(layer, rule).feedback_matrix()
                tolerance = 5 * math.sqrt((kurtosis - 1) / b.numel())
                assert abs((root_mean_square(b) / expected) ** 2 - 1) < tolerance, rule


def test_default_scales() -> None:
    table = scales("Conv2d")
    for name, scale in (("usf", "xiao"), ("fa_signed_init", "xiao")):
        assert math.isclose(root_mean_square(build("Conv2d", name).feedback_matrix()), table[scale], rel_tol=1e-12)
    for name in ("fa", "frsf", "brsf"):
        # Uniform within ±√3 times the root mean square, and near that bound.
        largest = build("Conv2d", name).feedback_matrix().abs().max().item() / (math.sqrt(3) * table["xavier"])
        assert 0.99 < largest <= 1


@layers
def test_match_follows_the_norm_of_the_weight(layer: str) -> None:
    for rule in (
        bk.SignSymmetry(scale="match"),
        bk.SignedInit(scale="match"),
        bk.FeedbackAlignment(scale="match", entries="constant"),
    ):
        built = build(layer, rule)
        for factor in (1.0, 7.0, 1e-5):
            with torch.no_grad():
                built.weight.mul_(factor)
            wanted = torch.linalg.vector_norm(built.weight) / math.sqrt(built.weight.numel())
            assert torch.allclose(built.feedback_matrix().abs(), wanted, rtol=1e-13, atol=0)
            if isinstance(rule, bk.SignSymmetry):
                norms = [torch.linalg.vector_norm(t).item() for t in (built.feedback_matrix(), built.weight)]
                assert math.isclose(*norms, rel_tol=1e-13)
    drawn = build(layer, bk.FeedbackAlignment(scale="match", stored=True))
    relative = drawn.feedback_matrix() / root_mean_square(drawn.weight)
    with torch.no_grad():
        drawn.weight.mul_(3)
    assert torch.allclose(drawn.feedback_matrix() / root_mean_square(drawn.weight), relative, rtol=1e-13)
    assert abs(root_mean_square(relative) ** 2 - 1) < 5 * math.sqrt(0.8 / relative.numel())


@pytest.mark.parametrize("shape", [(2048, 2048), (256, 128, 9, 9), (2, 64, 8, 64, 3, 3)], ids=str)
def test_match_is_close_for_equal_entries(shape: tuple[int, ...]) -> None:
    weight = torch.full(shape, 0.3)
    for w in (weight, weight.movedim(1, -1)):
        assert abs(weight_rms(w) / weight[(0,) * len(shape)] - 1) < 1e-5
    assert weight_rms(weight.double()).dtype == torch.float64 and weight_rms(weight.half()).dtype == torch.float32


@layers
@pytest.mark.parametrize("rule", SIGN_RULES)
def test_signs_are_the_weights(layer: str, rule: str) -> None:
    built = build(layer, rule)
    with torch.no_grad():
        built.weight.view(-1)[::3] = 0
        built.weight.view(-1)[1::9] = -0.0
        built.weight.view(-1)[2::9] = 5e-324
    b = built.feedback_matrix()
    assert b.shape == built.weight.shape and b.dtype == built.weight.dtype
    assert torch.equal(b.sign(), built.weight.sign())
    assert torch.equal(b == 0, built.weight == 0)
    # They follow the weight at once, in every later call.
    with torch.no_grad():
        built.weight.neg_()
    assert torch.equal(built.feedback_matrix().sign(), built.weight.sign())
    assert "feedback_signs" not in built.state_dict()


def support(b: Tensor, scale: float) -> None:
    """`b` is `scale`·√3 times multiples of 2⁻²³ in [-1, 1), well spread."""
    integers = b / (scale * math.sqrt(3)) * 2**23
    assert torch.allclose(integers, integers.round(), rtol=0, atol=1e-6)
    integers = integers.round()
    assert integers.min() >= -(2**23) and integers.max() < 2**23
    assert integers.unique().numel() > 0.99 * integers.numel()
    # Sixteen equal bins of a uniform draw: chi square of 15 degrees of freedom stays under 50 but for one in 10⁵.
    counts = torch.histc(integers, bins=16, min=-(2**23), max=2**23)
    expected = integers.numel() / 16
    assert ((counts - expected) ** 2 / expected).sum() < 50


@layers
def test_uniform_draws(layer: str) -> None:
    support(build(layer, bk.FeedbackAlignment(scale=0.3)).feedback_matrix(), 0.3)
    support(build(layer, bk.FeedbackAlignment(scale=0.3, stored=True)).feedback_matrix(), 0.3)
    for rule in (bk.FixedMagnitude(scale=0.3), bk.FixedMagnitude(scale=0.3, stored=True), bk.BatchMagnitude(scale=0.3)):
        b = build(layer, rule).feedback_matrix().abs() / (0.3 * math.sqrt(3))
        assert b.max() <= 1
        # The mean of |U| is 1/2 and its variance 1/12.
        assert abs(b.mean() - 0.5) < 5 / math.sqrt(12 * b.numel())


@layers
def test_normal_draws(layer: str) -> None:
    b = build(layer, bk.FeedbackAlignment(scale=0.3, entries="normal")).feedback_matrix() / 0.3
    n = b.numel()
    # Five standard errors; the variances of z, z², z³ and z⁴ are 1, 2, 15 and 96.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((b**power).mean() - mean) < 5 * math.sqrt(variance / n), power
    # Kolmogorov and Smirnov's distance to the normal distribution; one in 10⁵ is beyond 2.47/√n.
    ordered = b.flatten().sort().values
    distribution = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((distribution - steps[:-1]).abs().max(), (distribution - steps[1:]).abs().max())
    assert distance < 2.47 / math.sqrt(n)


@layers
@pytest.mark.parametrize("entries", ["uniform", "normal", "constant"])
def test_neighbours_are_independent(layer: str, entries: str) -> None:
    b = build(layer, bk.FeedbackAlignment(scale=1.0, entries=entries)).feedback_matrix().flatten(1)
    if entries != "constant":
        assert b.unique().numel() > 0.99 * b.numel()
    # A generator call gives four words along a row, or four words of 32 signs.
    for rows, columns in ((0, 1), (0, 2), (0, 3), (0, 4), (0, 32), (1, 0), (1, 1)):
        if columns < b.shape[1]:
            one, other = b[rows:, columns:], b[: b.shape[0] - rows, : b.shape[1] - columns]
            assert abs((one * other).mean()) < 5 / math.sqrt(one.numel()), (rows, columns)


@layers
def test_random_signs_are_fair(layer: str) -> None:
    b = build(layer, bk.FeedbackAlignment(entries="constant", scale=1.0)).feedback_matrix()
    assert abs(b.mean()) < 5 / math.sqrt(b.numel())
    rows = b.flatten(1)
    assert rows.unique(dim=0).shape[0] == rows.shape[0], "no two rows alike"


@layers
def test_seeded_and_stored_hold_the_same_values(layer: str) -> None:
    key = feedback_key(11, "same")
    for rule in (bk.FeedbackAlignment, bk.FixedMagnitude):
        for entries in ("uniform", "normal", "constant"):
            if (rule, entries) == (bk.FixedMagnitude, "constant"):
                continue
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                seeded, stored = (build(layer, rule(entries=entries, stored=s), dtype) for s in (False, True))
                stored.load_state_dict({"weight": seeded.weight, "bias": seeded.bias}, strict=False)
                for built in (seeded, stored):
                    built.reset_feedback(lambda name: key)
                assert torch.equal(seeded.feedback_matrix(), stored.feedback_matrix())
                assert "feedback_weight" not in seeded.state_dict() and "feedback_weight" in stored.state_dict()


@layers
def test_different_keys_give_different_feedback(layer: str) -> None:
    for rule in (bk.FeedbackAlignment(), bk.FeedbackAlignment(entries="constant"), bk.FixedMagnitude()):
        built, matrices = build(layer, rule), []
        for key in (feedback_key(0, "a"), feedback_key(0, "b"), feedback_key(1, "a")):
            built.reset_feedback(lambda name, key=key: key)
            matrices.append(built.feedback_matrix().flatten())
        for i, j in ((0, 1), (0, 2), (1, 2)):
            a, b = (m - m.mean() for m in (matrices[i], matrices[j]))
            if rule.sign_of_weight:
                a, b = (m.abs() - m.abs().mean() for m in (matrices[i], matrices[j]))
            # Uncorrelated, to five standard errors.
            assert abs(torch.cosine_similarity(a, b, dim=0)) < 5 / math.sqrt(a.numel())


@layers
def test_layers_built_directly_draw_from_torchs_generator(layer: str) -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return build(layer, "fa").feedback_matrix()

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert not torch.equal(build(layer, "fa").feedback_matrix(), build(layer, "fa").feedback_matrix())


def step(layer: Any) -> None:
    """One step of an optimizer, with the layer's own gradient."""
    shape = (3, *LAYER_INPUTS[type(layer)])
    x = torch.randn(shape, dtype=layer.weight.dtype, requires_grad=True)
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.01).step()


LAYER_INPUTS: dict[Any, tuple[int, ...]] = {
    bk.nn.Linear: (96,),
    bk.nn.Conv2d: (16, 4, 4),
    bk.nn.ConvTranspose2d: (32, 4, 4),
    bk.nn.LocallyConnected2d: (8, 5, 5),
    bk.nn.LocallyConnectedTranspose2d: (8, 4, 3),
}
TRAINED = ["Linear", "Conv2d", "ConvTranspose2d", "LocallyConnected2d", "LocallyConnectedTranspose2d"]


@pytest.mark.parametrize("layer", TRAINED)
def test_fixed_feedback_stays_while_the_weight_moves(layer: str) -> None:
    for rule in ("fa", bk.FeedbackAlignment(stored=True), "fa_signed_init"):
        built = build(layer, rule)
        before, weight = built.feedback_matrix(), built.weight.detach().clone()
        step(built)
        with torch.no_grad():
            built.weight.neg_()
        assert torch.equal(built.feedback_matrix(), before) and not torch.equal(built.weight, weight)
        if rule == "fa_signed_init":
            assert torch.equal(before.sign(), weight.sign())
    for rule in ("frsf", bk.FixedMagnitude(stored=True), bk.FixedMagnitude(entries="normal")):
        built = build(layer, rule)
        before = built.feedback_matrix().abs()
        step(built)
        assert torch.equal(built.feedback_matrix().abs(), before)
        assert torch.equal(built.feedback_matrix().sign(), built.weight.sign())


@pytest.mark.parametrize("layer", TRAINED)
@pytest.mark.parametrize("entries", ["uniform", "normal"])
def test_batch_magnitude_is_drawn_again_exactly_when_the_weight_changes(layer: str, entries: str) -> None:
    built = build(layer, bk.BatchMagnitude(entries=entries))
    weight, state = built.weight.detach().clone(), torch.get_rng_state()
    first = built.feedback_matrix()
    assert torch.equal(built.feedback_matrix(), first)
    # A call, a backward, or torch's own generator moving on change nothing.
    torch.randn(3)
    x = torch.randn(2, *LAYER_INPUTS[type(built)], dtype=torch.float64, requires_grad=True)
    built(x).sum().backward()
    assert torch.equal(built.feedback_matrix(), first)

    step(built)
    second = built.feedback_matrix()
    assert torch.equal(second.sign(), built.weight.sign())
    a, b = (m.abs().flatten() - m.abs().mean() for m in (first, second))
    assert abs(torch.cosine_similarity(a, b, dim=0)) < 5 / math.sqrt(a.numel()), "a fresh draw"
    # The draw is a function of W and the key: the old W brings the old draw back, whoever else draws meanwhile.
    with torch.no_grad():
        built.weight.copy_(weight)
    assert torch.equal(built.feedback_matrix(), first)
    torch.set_rng_state(state)
    assert torch.equal(built.feedback_matrix(), first)


def test_batch_magnitude_sees_the_smallest_change_of_a_whole_weight() -> None:
    built = build("Linear", "brsf", torch.float32)
    first = built.feedback_matrix()
    with torch.no_grad():
        built.weight.copy_(built.weight.nextafter(torch.tensor(math.inf)))
    assert not torch.equal(built.feedback_matrix().abs(), first.abs())


def test_batch_magnitude_watches_64_elements_all_over_the_weight() -> None:
    built = build("Conv2d", "brsf")
    numel, flat = built.weight.numel(), built.weight.data.view(-1)
    draws = [built.feedback_matrix().abs()]
    for k in range(64):
        flat[k * numel // 64] += 1
        draws.append(built.feedback_matrix().abs())
    assert torch.stack(draws).flatten(1).unique(dim=0).shape[0] == 65


def test_gradient_of_brsf_uses_the_draw_of_its_own_forward() -> None:
    # The draw is made from the W of the forward, also for a backward that comes later.
    built = build("Linear", "brsf")
    x = torch.randn(4, 96, dtype=torch.float64, requires_grad=True)
    b, y, g = built.feedback_matrix(), built(x), torch.randn(4, 80, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], g @ b, rtol=1e-12, atol=1e-12)


def test_angle_to_the_weight() -> None:
    """sign(W) leans to W by arccos(E|w| / √E w²): 37.07° for normal weights, 30° for uniform ones.

    By the delta method the angle of n draws has a standard error of 20.2°/√n (normal) and 18.1°/√n (uniform).
    """
    layer = bk.nn.Linear(1024, 512, feedback="usf", dtype=torch.float64)
    tolerance = 5 * 20.2 / math.sqrt(layer.weight.numel())
    for draw, expected in ((torch.nn.init.normal_, 37.07), (torch.nn.init.uniform_, 30.0)):
        draw(layer.weight)
        if expected == 30.0:
            # On either side of zero.
            layer.weight.data.mul_(0.02).sub_(0.01)
        weight, b = layer.weight.detach().flatten(), layer.feedback_matrix().flatten()
        cosine = torch.cosine_similarity(weight, b, dim=0).item()
        assert abs(math.degrees(math.acos(cosine)) - expected) < tolerance
    assert round(math.degrees(math.acos(math.sqrt(2 / math.pi))), 2) == 37.07


@pytest.mark.parametrize("rule", ["fa", "frsf"])
def test_angle_of_drawn_feedback(rule: str) -> None:
    # fa starts at a right angle; frsf's cosine is E|w| E|m| / √(E w² E m²) = (√3/2)² for uniform w and m.
    layer = bk.nn.Linear(1024, 512, feedback=rule, dtype=torch.float64)
    cosine = torch.cosine_similarity(layer.weight.flatten(), layer.feedback_matrix().flatten(), dim=0).item()
    assert abs(cosine - {"fa": 0.0, "frsf": 0.75}[rule]) < 5 / math.sqrt(layer.weight.numel())


def test_back_propagation_has_the_weight_itself() -> None:
    for layer in LAYERS:
        built = build(layer, None)
        assert torch.equal(built.feedback_matrix(), built.weight) and built.feedback == bk.Backprop()
        assert not [name for name in built.state_dict() if "feedback" in name]


def test_state_of_each_rule() -> None:
    expected = {
        "usf": {"feedback_state"},
        "frsf": {"feedback_state"},
        "brsf": {"feedback_state"},
        "fa": {"feedback_state"},
        "fa_signed_init": {"feedback_state", "feedback_signs"},
    }
    for rule, names in expected.items():
        built = build("Conv2d", rule)
        assert {name for name in built.state_dict() if "feedback" in name} == names
        if "feedback_signs" in names:
            # Two planes of one bit each and the flags: 24 rows of 96 columns, padded to 128.
            assert built.feedback_signs.shape == (24 + 24 + 1, 4) and not built.feedback_signs.requires_grad


def test_named_rules_are_the_rules_with_their_defaults() -> None:
    rules = {
        "backprop": bk.Backprop(),
        "usf": bk.SignSymmetry(scale="xiao"),
        "frsf": bk.FixedMagnitude(scale="xavier", entries="uniform", stored=False),
        "brsf": bk.BatchMagnitude(scale="xavier", entries="uniform"),
        "fa": bk.FeedbackAlignment(scale="xavier", entries="uniform", stored=False),
        "fa_signed_init": bk.SignedInit(scale="xiao"),
    }
    for name, rule in rules.items():
        assert bk.nn.Linear(2, 3, feedback=name).feedback == rule == bk.nn.Linear(2, 3, feedback=rule).feedback
