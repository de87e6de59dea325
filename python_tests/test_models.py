"""The papers' networks: parameters by the papers' arithmetic, tied twins, and training by each algorithm."""

import copy
import math
from typing import Any

import pytest
import torch

import bioplaus_kernels as bk

pytest.importorskip("torchvision")
from recipes import models, schedules
from recipes.models import bartunov


def weights(model: torch.nn.Module) -> int:
    """Parameters but biases."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith("bias"))


def built(name: str, shape: tuple[int, int, int], classes: int) -> torch.nn.Module:
    with torch.device("meta"):
        return models.build(name, shape, classes)


# positions · kernel² · channels in · channels out of each layer, and the dense ones.
UNTIED = {
    "mnist": [14**2 * 9 * 1 * 32, 7**2 * 9 * 32 * 64, 3136 * 1024, 1024 * 10],
    "cifar10": [16**2 * 25 * 3 * 64, 8**2 * 25 * 64 * 128, 8**2 * 9 * 128 * 256, 16384 * 1024, 1024 * 10],
    "imagenet": [
        *(56**2 * 81 * 3 * 48, 28**2 * 9 * 48 * 48, 28**2 * 25 * 48 * 96, 14**2 * 9 * 96 * 96),
        *(14**2 * 9 * 96 * 192, 7**2 * 9 * 192 * 192, 7**2 * 9 * 192 * 384, 18816 * 1000),
    ],
}
TIED = {
    "mnist": [9 * 1 * 32, 9 * 32 * 64, 3136 * 1024, 1024 * 10],
    "cifar10": [25 * 3 * 64, 25 * 64 * 128, 9 * 128 * 256, 16384 * 1024, 1024 * 10],
    "imagenet": [
        *(81 * 3 * 48, 9 * 48 * 48, 25 * 48 * 96, 9 * 96 * 96),
        *(9 * 96 * 192, 9 * 192 * 192, 9 * 192 * 384, 18816 * 1000),
    ],
}
SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "imagenet": (3, 224, 224)}
CLASSES = {"mnist": 10, "cifar10": 10, "imagenet": 1000}


@pytest.mark.parametrize("net", SHAPES)
def test_parameters_of_the_locally_connected_networks_and_their_twins(net: str) -> None:
    untied = built(f"lc-{net}", SHAPES[net], CLASSES[net])
    assert [p.numel() for n, p in untied.named_parameters() if n.endswith("weight")] == UNTIED[net]
    tied = built(f"conv-{net}", SHAPES[net], CLASSES[net])
    assert [p.numel() for n, p in tied.named_parameters() if n.endswith("weight")] == TIED[net]


def test_the_imagenet_network_has_259_million_weights_and_348_096_hidden_units() -> None:
    model = built("lc-imagenet", (3, 224, 224), 1000)
    assert weights(model) == 259_510_272
    assert sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias")) == 348_096 + 1000
    with torch.device("meta"):
        tp = bartunov.target_prop(model, (3, 224, 224), "sdtp")
    # Every layer but the first has an inverse with the sparsity of its transpose.
    assert weights(tp.inverses) == 259_510_272 - 56**2 * 81 * 3 * 48


def test_the_all_tnn_and_its_control() -> None:
    blocks = [49 * 3 * 64, 9 * 64 * 81, 9 * 81 * 81, 9 * 81 * 256, 9 * 256 * 256, 9 * 256 * 2500]
    sizes, dense = [48, 22, 20, 8, 6, 1], [2500 * 565]
    untied, tied = (built(name, (3, 150, 150), 565) for name in ("all-tnn", "all-tnn-conv"))
    found = [p.numel() for n, p in untied.named_parameters() if n.endswith("weight")]
    assert found == [s**2 * b for s, b in zip(sizes, blocks, strict=True)] + dense
    assert [p.numel() for n, p in tied.named_parameters() if n.endswith("weight")] == blocks + dense
    for net, size in ((untied, 150), (tied, 150), (built("all-tnn", (3, 148, 148), 565), 148)):
        assert net(torch.zeros(2, 3, size, size, device="meta")).shape == (2, 565)


def test_the_dense_networks() -> None:
    assert weights(built("mlp", (1, 28, 28), 10)) == 784 * 256 + 4 * 256**2 + 2560
    assert weights(built("cifar-fc", (3, 32, 32), 10)) == 3072 * 1024 + 2 * 1024**2 + 10240
    assert weights(bartunov.autoencoder()) == 2 * (784 * 512 + 512 * 64)
    assert bartunov.autoencoder()(torch.zeros(2, 1, 28, 28)).shape == (2, 784)


def test_xiao_networks() -> None:
    # torchvision's documented num_params.
    counts = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}
    for depth, count in counts.items():
        with torch.device("meta"):
            model = models.xiao.resnet(depth)
        assert sum(p.numel() for p in model.parameters()) == count
    first = models.xiao.resnet(18).layer1[0].conv1.weight
    assert first.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    alexnet = built("alexnet-bn", (3, 224, 224), 1000)
    convolutions = 3 * 64 * 121 + 64 * 192 * 25 + 192 * 384 * 9 + 384 * 256 * 9 + 256 * 256 * 9
    norms = 2 * (64 + 192 + 384 + 256 + 256 + 4096 + 4096)
    dense = 9216 * 4096 + 4096 * 4096 + 4096 * 1000 + 1000
    assert sum(p.numel() for p in alexnet.parameters()) == convolutions + norms + dense
    assert models.build("alexnet-bn", (3, 63, 63), 5)(torch.randn(2, 3, 63, 63)).shape == (2, 5)
    with pytest.raises(ValueError, match="size: expected images of 63 x 63 or more, got 62 x 62"):
        models.xiao.alexnet_bn(3, 62, 5)
    with pytest.raises(ValueError, match="depth: expected 18, 34, 50, 101 or 152, got 20"):
        models.xiao.resnet(20)


@pytest.mark.parametrize(("name", "ours"), [("le_net_mnist", "lenet-mnist"), ("le_net_cifar", "lenet-cifar")])
def test_biotorch_lenets(name: str, ours: str) -> None:
    theirs = getattr(pytest.importorskip("biotorch.models.le_net"), name)()
    channels = 1 if name == "le_net_mnist" else 3
    model = models.build(ours, (channels, 32, 32), 10)
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        with torch.no_grad():
            p.copy_(q)
    x = torch.randn(3, channels, 32, 32)
    torch.testing.assert_close(model(x), theirs(x))


def test_a_tied_twin_is_the_untied_network_with_shared_weights() -> None:
    spec = bartunov.Spec(((9, 4, 4), (3, 5, 2), (5, 6, 1)), (7,))
    untied, tied = (bartunov.lc(spec, 2, 24, 3, tied=t) for t in (False, True))
    ours = [m for m in untied if hasattr(m, "weight")]
    theirs = [m for m in tied if hasattr(m, "weight")]
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            b.bias.normal_()
            if isinstance(a, bk.nn.LocallyConnected2d):
                a.weight.copy_(b.weight.movedim(1, -1))
            else:
                a.weight.copy_(b.weight)
            a.bias.copy_(b.bias)
    x = torch.randn(3, 2, 24, 24)
    torch.testing.assert_close(untied(x), tied(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if "small" in name else pytest.mark.slow) for name in models.DETECTORS]
)
def test_every_convolution_of_retinanet_takes_a_rule(name: str) -> None:
    model = models.DETECTORS[name](3, 64)
    convolutions = [name for name, m in model.named_modules() if type(m) is torch.nn.Conv2d]
    report = bk.convert_(model, "usf")
    assert report.converted == convolutions and len(convolutions) > 30
    boxes = torch.tensor([[8.0, 8.0, 40.0, 48.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([k])} for k in (1, 2)]
    images = [torch.rand(3, 64, 64) for _ in targets]
    assert bk.check(model, images, targets).names("read") == []
    losses = model(images, targets)
    assert set(losses) == {"classification", "bbox_regression"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert [set(found) for found in model.eval()(images)] == [{"boxes", "scores", "labels"}] * 2


@pytest.mark.parametrize(("variant", "mix"), [*((v, 0) for v in bk.targetprop.VARIANTS), ("dtp", 0.5), ("sdtp", 1)])
def test_every_variant_of_target_propagation_fits_the_networks(variant: str, mix: float) -> None:
    model = bartunov.lc(bartunov.Spec(((3, 4, 2),), (16, 8)), 1, 8, 3)
    tp = bartunov.target_prop(model, (1, 8, 8), variant, mix=mix)
    h = tp.activations(torch.randn(5, 1, 8, 8))
    targets = tp.targets(h, torch.arange(5) % 3)
    assert [t.shape for t in targets] == [(5, 4, 4, 4), (5, 16), (5, 8)]
    if variant != "fw_dtp" and mix < 1:
        assert len(tp.inverse_losses(h)) == (2 if variant == "dtp" else 3)


@pytest.mark.parametrize("variant", ["dtp", "sdtp", "ao_sdtp"])
@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_schedules(variant: str, schedule: str, one_thread: None) -> None:
    spec = bartunov.Spec(((3, 4, 2),), (16,))
    model = bartunov.lc(spec, 1, 8, 2)
    tp = bartunov.target_prop(model, (1, 8, 8), variant, auxiliary=8, sigma=0.1, alpha=0.2)
    assert torch.equal(tp(torch.ones(1, 1, 8, 8)), model(torch.ones(1, 1, 8, 8)))
    x = torch.randn(96, 1, 8, 8)
    y = (x.mean((1, 2, 3)) > 0).long()
    batches = list(zip(x.split(32), y.split(32), strict=True))
    forward, inverse = schedules.adams(tp, {"lr": 3e-3}, {"lr": 3e-3, "betas": (0.9, 0.99)})
    before = copy.deepcopy(tp.inverses.state_dict())
    losses = [schedules.train_epoch(tp, batches, forward, inverse, schedule) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    after = tp.inverses.state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match="schedule: expected one of parallel, sequential, alternating, got 'both'"):
        schedules.train_epoch(tp, batches, forward, inverse, "both")
    with pytest.raises(ValueError, match="batches: expected at least one"):
        schedules.train_epoch(tp, iter(batches), forward, inverse, "alternating")
    with pytest.raises(ValueError, match=r"inverse_steps: expected one number or \d, got \[1, 1, 1, 1\]"):
        schedules.train_epoch(tp, batches, forward, inverse, schedule, [1, 1, 1, 1])


class Counted(torch.optim.SGD):
    """Counts the steps that each of its parameters has had a gradient in."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.01)
        self.count = dict.fromkeys(self.param_groups[0]["params"], 0)

    def step(self, closure: Any = None) -> None:
        for p in self.count:
            self.count[p] += p.grad is not None
        super().step(closure)


@pytest.mark.parametrize(("steps", "counts"), [([1], (2, 2)), ([3], (6, 6)), ([1, 4], (2, 8))])
@pytest.mark.parametrize("schedule", [*schedules.SCHEDULES, "inverses alone"])
def test_steps_of_the_inverses(schedule: str, steps: list[int], counts: tuple[int, int]) -> None:
    tp = bartunov.target_prop(bartunov.lc(bartunov.Spec(((3, 4, 2),), (6,)), 1, 4, 3), (1, 4, 4), "sdtp")
    batches = [(torch.randn(4, 1, 4, 4), torch.arange(4) % 3) for _ in range(2)]
    inverse, forward = Counted(tp.inverses.parameters()), Counted(tp.layers.parameters())
    if schedule == "inverses alone":
        schedules.train_inverses(tp, batches, inverse, steps)
    else:
        schedules.train_epoch(tp, batches, forward, inverse, schedule, steps)
    for k, count in enumerate(counts, 1):
        assert {inverse.count[p] for p in tp.inverses[k].parameters()} == {count}
    assert set(forward.count.values()) == {0 if schedule == "inverses alone" else 2}


def test_a_sequential_step_uses_the_inverses_that_have_stepped() -> None:
    tp = bartunov.target_prop(bartunov.fc(4, [6, 5], 3), (1, 2, 2), "sdtp", sigma=0.0)
    batches = [(torch.randn(4, 1, 2, 2), torch.arange(4) % 3)]
    found = []
    for way in ("sequential", "by hand", "parallel"):
        copied = copy.deepcopy(tp)
        inverse, forward = (torch.optim.SGD(part.parameters(), lr=0.5) for part in (copied.inverses, copied.layers))
        if way == "by hand":
            schedules.train_inverses(copied, batches, inverse, [2])
        schedules.train_epoch(copied, batches, forward, *((None,) if way == "by hand" else (inverse, way, [2])))
        found.append(copied.layers[0][1].weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_inverses_of_ddtp_rhl_share_a_random_layer() -> None:
    tp = bartunov.target_prop(bartunov.fc(4, [6, 5], 3), (1, 2, 2), "ddtp", hidden=7)
    assert [type(part) for part in tp.inverses[1]] == [torch.nn.Sequential, torch.nn.Linear, torch.nn.Tanh]
    assert tp.inverses[1][0][0].weight.shape == (7, 3) and not tp.inverses[1][0][0].weight.requires_grad
    # That of the last hidden layer is linear in the logits' target.
    assert tp.inverses[2][0].weight.shape == (5, 3)
