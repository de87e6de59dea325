"""LeNet on the real Fashion-MNIST, one epoch, with every rule that learns at one rate."""

import math

import pytest

import bioplaus_kernels as bk

pytest.importorskip("pycocotools")
from recipes import data, experiment, report
from recipes.run import run

# Highest test error, and between what the mean angles of W to B and of the gradients lie after the epoch, in degrees;
# layers left to back-propagation have no angle of W to B.
EXPECTED = {
    "backprop": (0.15, None, (0, 0.01)),
    "usf": (0.18, (25, 36), (20, 55)),
    "frsf": (0.18, (35, 47), (25, 65)),
    "brsf": (0.19, (35, 50), (25, 65)),
    "fa": (0.30, (60, 88), (45, 89)),
    "fa_signed_init": (0.20, (30, 50), (30, 80)),
    "concordance": (0.20, (35, 55), (35, 65)),
    "kp": (0.20, (38, 65), (25, 60)),
    "wm": (0.20, (12, 36), (15, 50)),
    "low_rank": (0.30, (65, 90), (50, 89)),
    "sa": (0.18, (0, 10), (0, 15)),
}
# Whose B, by the loss of its alignment, diverges with this optimizer.
DIVERGE = {"aa", "ia"}


@pytest.mark.slow
@pytest.mark.skipif(
    not data.DEBIAN_FASHION_MNIST.is_dir(), reason="needs Fashion-MNIST: Debian's package dataset-fashion-mnist"
)
@pytest.mark.usefixtures("one_thread")
def test_lenet_learns_fashion_mnist(tmp_path):
    assert EXPECTED.keys() | DIVERGE == bk.feedback.RULES.keys()
    runs = {}
    for rule in EXPECTED:
        optimizer = {"name": "sgd", "lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4}
        e = experiment.check(
            {
                "data": {"name": "fashion-mnist", "validation": 0},
                "model": {"name": "lenet"},
                "algorithm": {"name": rule},
                "optimizer": optimizer,
                "train": {"epochs": 1},
            }
        )
        runs[rule] = before, after = run(e, 0, tmp_path / rule, data_root=tmp_path / "data")
        highest, weight, grad = EXPECTED[rule]
        assert after["train_loss"] < 0.4 * before["test_loss"], rule
        assert after["test_loss"] < 0.4 * before["test_loss"], rule
        assert after["test_error"] < highest, rule
        angle = report.mean_angle(after, "angle_weight")
        assert math.isnan(angle) if weight is None else weight[0] <= angle <= weight[1], rule
        assert grad[0] <= report.mean_angle(after, "angle_grad") <= grad[1], rule
    # Feedback alignment's name: W turns towards B.
    before, after = runs["fa"]
    assert after["angle_weight/fc3"] < before["angle_weight/fc3"] - 15
