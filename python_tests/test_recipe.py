"""recipes/run.py: every model, data set and rule for an epoch or two, what is measured, and going on when stopped."""

import gzip
import hashlib
import math
import pickle
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import bioplaus_kernels as bk

pytest.importorskip("pycocotools")
from recipes import checkpoint, data, experiment, learn, models, report
from recipes import run as runner

RULES = list(bk.feedback.RULES)
ADAM = {"name": "adam", "lr": 0.005}

# The networks are too small for a second thread to help.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Where the files are there no loader asks for more."""
    connect = socket.socket.connect

    def local(self, address):
        if self.family != socket.AF_UNIX:
            raise AssertionError(f"a connection to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)


def run(folder, seed=0, *, root="data", workers=0, **changes):
    """The rows of a run of LeNet on the digits with what `changes` changes: train__epochs=2 is train.epochs."""
    plain = {
        "data": {"name": "digits"},
        "model": {"name": "lenet"},
        "algorithm": {"name": "usf"},
        "optimizer": {"name": "sgd", "lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4},
        "train": {"epochs": 1, "cosine": True},
    }
    e = experiment.check(plain, {key.replace("__", "."): value for key, value in changes.items()})
    return runner.run(e, seed, folder, data_root=root, workers=workers)


def of(folder):
    """Changes for a data set of images in `folder`."""
    return {"data__name": "imagefolder", "data__path": str(folder)}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 2 x 16 training and 2 x 4 test images: noise, brighter in one class than in the other."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for brightness, name in ((0, "dark"), (128, "light")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(brightness, brightness + 128, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture
def fewer_digits(monkeypatch):
    """A third of the digits, for what is not about how well they are learnt."""
    load = data.load

    def third(spec, *args):
        loaded = load(spec, *args)
        for part in (loaded.train, loaded.test) if spec == "digits" else ():
            part.tensors = tuple(tensor[: len(tensor) // 3] for tensor in part.tensors)
        return loaded

    monkeypatch.setattr(data, "load", third)


@pytest.mark.slow
def test_rules_on_digits(tmp_path, fewer_digits):
    layers = ["conv1", "conv2", "fc1", "fc2", "fc3"]
    for rule in RULES:
        # R is a sum over positions, for an optimizer with a scale of its own.
        other = {"optimizer": ADAM} if rule in ("sa", "aa", "ia") else {}
        run(tmp_path / rule, algorithm__name=rule, train__epochs=2, train__batch_size=32, **other)
        rows = report.read(tmp_path / rule).rows
        assert [row["epoch"] for row in rows] == [0, 1, 2]
        assert rows[2]["train_loss"] < min(rows[1]["train_loss"], 2.0)
        for row in rows:
            assert row["angle_grad/fc3"] < 0.01
            for layer in layers:
                if rule == "backprop":
                    assert f"angle_weight/{layer}" not in row and row[f"angle_grad/{layer}"] < 0.01
                else:
                    assert 0 < row[f"angle_weight/{layer}"] < 110
                    assert (0.01 < row[f"angle_grad/{layer}"] < 150) == (layer != "fc3")
    # 30 degrees for uniform weights, 90 for unrelated ones.
    assert abs(report.read(tmp_path / "usf").rows[0]["angle_weight/fc1"] - 30) < 0.5
    assert abs(report.read(tmp_path / "fa").rows[0]["angle_weight/fc1"] - 90) < 1.5


@pytest.mark.parametrize("rule", ["wm", "sa", "aa"])
def test_what_learns_b_between_steps_is_called(tmp_path, fewer_digits, rule):
    run(tmp_path, algorithm__name=rule, train__epochs=2, train__batch_size=32, optimizer=ADAM)
    rows = report.read(tmp_path).rows
    assert rows[2]["angle_weight/fc2"] < rows[0]["angle_weight/fc2"] - 1


def test_last_layer(tmp_path, fewer_digits):
    rows = run(tmp_path, model__name="mlp", algorithm__name="fa", algorithm__last_layer="backprop")
    assert "angle_weight/fc6" not in rows[0] and rows[0]["angle_grad/fc5"] == 0
    assert rows[0]["angle_weight/fc5"] > 80 and rows[0]["angle_grad/fc4"] > 10


@pytest.mark.parametrize(
    "name", ["lenet", "mlp", "lc-mnist", pytest.param("resnet18", marks=pytest.mark.slow), "mobilenet_v3_small"]
)
def test_models_on_image_folder(tmp_path, images, name):
    rows = run(tmp_path, model__name=name, **of(images), data__size=32, train__batch_size=8)
    assert len(rows) == 2 and math.isfinite(rows[1]["train_loss"]) and rows[1]["lr"] == 0.03


@pytest.mark.slow
def test_image_folder_and_workers(tmp_path, images):
    """The images' class is easy to see; two processes load them."""
    changes = of(images) | {"data__size": 8, "train__epochs": 4, "train__batch_size": 4}
    rows = run(tmp_path, workers=2, model__name="mlp", **changes)
    assert rows[-1]["test_error"] == 0


def test_the_papers_augmentation(images):
    """Training images are cropped and flipped anew each time, test images and whole ones stay."""
    whole = data.load(f"imagefolder:{images}", "", 16, 3, "none")
    assert torch.equal(whole.train[0][0], whole.train[0][0])
    for augment, flipped in (("standard", 2), ("vertical", 1)):
        cropped = data.load(f"imagefolder:{images}", "", 16, 3, augment)
        assert not torch.equal(cropped.train[0][0], cropped.train[0][0])
        # Tests see the middle, always the same one.
        assert torch.equal(cropped.test[0][0], cropped.test[0][0])
        names = [type(t).__name__ for t in cropped.train.transform.transforms]
        assert names[:2] == ["RandomResizedCrop", {2: "RandomHorizontalFlip", 1: "RandomVerticalFlip"}[flipped]]


def test_cifar10(tmp_path, monkeypatch):
    """torchvision's own loader on files of its format."""
    noise = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name):
        pixels = noise.integers(0, 256, (12, 3072), dtype=np.uint8)
        return write(name, {"data": pixels, "labels": [i % 10 for i in range(12)]})

    cifar10 = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar10, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(cifar10, "test_list", [batch("test_batch")])
    meta = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(cifar10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    assert (
        len(run(tmp_path / "out", root=tmp_path, data__name="cifar10", data__validation=0.25, train__batch_size=10))
        == 2
    )
    loaded = data.load("cifar10", tmp_path, 32, 3)
    assert (len(loaded.train), len(loaded.test), loaded.shape) == (60, 12, (3, 32, 32))
    image, label = loaded.test[3]
    raw = torch.from_numpy(cifar10(tmp_path, train=False).data[3]).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    torch.testing.assert_close(image, (raw - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert label == 3
    # Crops move a picture by at most 4 pixels on a black margin, and flip it as the paper says.
    picture = torch.nn.functional.pad(raw_train(cifar10, tmp_path), (4, 4, 4, 4))
    for augment, dim in (("standard", 2), ("vertical", 1)):
        seen = set()
        loaded = data.load("cifar10", tmp_path, 32, 3, augment)
        for _ in range(60):
            image = loaded.train[0][0] * std.view(3, 1, 1) + mean.view(3, 1, 1)
            for flip in (False, True):
                source = image.flip(dim) if flip else image
                seen |= {
                    (flip, y, x)
                    for y in range(9)
                    for x in range(9)
                    if torch.allclose(picture[:, y : y + 32, x : x + 32], source, atol=1e-5)
                }
        assert {flip for flip, _, _ in seen} == {False, True} and len(seen) > 30
    plain = data.load("cifar10", tmp_path, 32, 3, "none").train[0][0] * std.view(3, 1, 1) + mean.view(3, 1, 1)
    torch.testing.assert_close(plain, picture[:, 4:36, 4:36], atol=1e-5, rtol=0)


def raw_train(cifar10, root):
    return torch.from_numpy(cifar10(root).data[0]).permute(2, 0, 1) / 255


def test_mnist(tmp_path):
    """torchvision's own loader on files of its format: big-endian sizes, then bytes."""
    folder, pixels = tmp_path / "MNIST" / "raw", np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        sizes = struct.pack(">4B3I", 0, 0, 8, 3, *pixels.shape)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(sizes + pixels.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI7B", 0, 0, 8, 1, 7, *range(7)))
    loaded = data.load("mnist", tmp_path, 28, 1)
    assert (len(loaded.train), len(loaded.test), loaded.shape, loaded.classes) == (7, 7, (1, 28, 28), 10)
    image, label = loaded.test[5]
    torch.testing.assert_close(image[0], (torch.from_numpy(pixels[5]) / 255 - 0.1307) / 0.3081)
    assert label == 5
    plain = data.load("mnist", tmp_path, 28, 1, normalise=False)
    torch.testing.assert_close(plain.test[5][0][0], torch.from_numpy(pixels[5]) / 255)


def test_fashion_mnist_in_debians_place(tmp_path, monkeypatch):
    noise = np.random.default_rng(0)
    archives = tmp_path / "debian"
    archives.mkdir()
    for split, count in (("train", 20), ("t10k", 10)):
        pixels = noise.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        with gzip.open(archives / f"{split}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">iiii", 0x803, count, 28, 28) + pixels.tobytes())
        with gzip.open(archives / f"{split}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">ii", 0x801, count) + labels.tobytes())
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", archives)
    loaded = data.load("fashion-mnist", tmp_path / "root", 32, 3)
    assert (len(loaded.train), len(loaded.test), loaded.classes) == (20, 10, 10)
    image, label = loaded.test[7]
    assert image.shape == loaded.shape == (3, 32, 32) and label == 7
    assert torch.equal(image[0], image[2])


def test_fashion_mnist_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "nowhere")
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [f"{tmp_path.as_uri()}/nowhere/"])
    with pytest.raises(RuntimeError, match=r"Error downloading[\s\S]*dataset-fashion-mnist"):
        run(tmp_path / "out", root=tmp_path, data__name="fashion-mnist")


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_validation_images_are_held_out_of_training_by_class(share):
    loaded = data.load("digits", "", 8, 1)
    targets = loaded.train.tensors[1]
    kept, held = loaded.split(share)
    assert torch.cat([kept, held]).sort().values.equal(torch.arange(len(targets)))
    assert len(held) == round(share * len(targets))
    expected = share * targets.bincount()
    assert (targets[held].bincount() - expected).abs().max() <= 1
    assert loaded.split(share)[1].equal(held)
    with pytest.raises(
        ValueError, match=r"data\.validation: got 0\.001, which is 1 of 1437 images; want one of each class"
    ):
        loaded.split(0.001)


def test_validation_images_are_prepared_as_test_images(images):
    loaded = data.load(f"imagefolder:{images}", "", 16, 3)
    _, held = loaded.split(0.25)
    first, second = (list(data.Batches(loaded.plain, 3, only=held)) for _ in range(2))
    assert sum(len(y) for _, y in first) == 8 and sum(y.sum() for _, y in first) == 4
    assert all(torch.equal(x, again) for (x, _), (again, _) in zip(first, second, strict=True))


def test_training_never_sees_validation_images(tmp_path, monkeypatch):
    made, batches = [], data.Batches

    def make(dataset, size, *args, only=None, **options):
        made.append((dataset, args, only))
        return batches(dataset, size, *args, only=only, **options)

    monkeypatch.setattr(data, "Batches", make)
    rows = run(tmp_path, model__name="mlp")
    assert {"train_loss", "train_error", "validation_loss", "validation_error", "test_error"} <= rows[1].keys()
    seen = [set(only.tolist()) for _, _, only in made if only is not None]
    training, part, validation, probe = seen
    assert len(validation) == 144 and training.isdisjoint(validation)
    assert part <= training and probe <= part
    assert len(training) + len(validation) == 1437


def test_digits_are_a_fixed_split():
    first, second = data.load("digits", "", 8, 1), data.load("digits", "", 8, 1)
    assert (len(first.train), len(first.test)) == (1437, 360)
    assert torch.equal(first.test.tensors[0], second.test.tensors[0])
    assert abs(first.train.tensors[0].mean()) < 0.02 and abs(first.train.tensors[0].std() - 1) < 0.02


@pytest.mark.parametrize("interrupted", ["checkpoint.pt", "log.jsonl"])
@pytest.mark.parametrize("rule", ["fa", "brsf"])
@pytest.mark.parametrize("model", ["lenet", pytest.param("mobilenet_v3_small", marks=pytest.mark.slow)])
def test_resume_is_exact(tmp_path, monkeypatch, fewer_digits, images, model, rule, interrupted):
    """Dropout, batch norm, augmentation, momentum, the learning rate, the order of the images, brsf's draws."""
    changes = {"model__name": model, "algorithm__name": rule, "train__epochs": 3}
    if model != "lenet":
        changes |= of(images) | {"data__size": 32, "train__batch_size": 8}
    run(tmp_path / "whole", **changes)
    write, written = checkpoint.write, []

    def interrupt(path, content):
        if path.name == interrupted:
            written.append(path)
            if len(written) == 3:  # epoch 2; before the file is written
                raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint, "write", interrupt)
        run(tmp_path / "parts", **changes)
    assert len(report.read(tmp_path / "parts").rows) == 2
    torch.rand(7)
    run(tmp_path / "parts", **changes)
    whole, parts = (report.read(tmp_path / part).rows for part in ("whole", "parts"))
    assert len(whole) == 4
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_equal(one | {"seconds": 0}, other | {"seconds": 0})
    one, other = (checkpoint.load(tmp_path / part / "checkpoint.pt") for part in ("whole", "parts"))
    assert one["model"].keys() == other["model"].keys()
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    assert not list((tmp_path / "parts").glob("*.tmp"))


def test_same_seed_same_run(tmp_path, fewer_digits):
    losses = [run(tmp_path / str(n), seed, model__name="lenet")[1]["train_loss"] for n, seed in enumerate((3, 3, 4))]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_amp(tmp_path, fewer_digits, amp):
    rows = run(tmp_path, train__epochs=2, train__amp=amp)
    assert rows[2]["train_loss"] < rows[1]["train_loss"] < 2.3


@pytest.mark.slow
def test_compile(tmp_path):
    eager, compiled = (run(tmp_path / str(c), train__epochs=2, train__compile=c)[2] for c in (False, True))
    assert abs(compiled["train_loss"] - eager["train_loss"]) < 0.02


def test_stops_when_the_loss_is_not_finite(tmp_path, fewer_digits, capsys):
    changes = {"model__name": "mlp", "train__epochs": 9, "optimizer__lr": 1e30}
    rows = run(tmp_path, **changes)
    assert len(rows) < 9
    assert "try a smaller rate" in capsys.readouterr().out
    assert len(run(tmp_path, **changes)) == len(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (of("/nowhere"), "/nowhere must hold the folders train and val"),
        ({"train__batch_size": 5000}, "train.batch_size: got 5000, there are 1293 images"),
        ({"data__size": 4}, "data.size: lenet takes no images of 1 x 4 x 4"),
        ({"model__name": "vit_b_16"}, "data.size: vit_b_16 takes no images of 3 x 32 x 32"),
    ],
)
def test_what_does_not_fit_together(tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(tmp_path / "out", root=tmp_path, **changes)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name != "lock"]


def test_image_folder_with_other_classes_in_the_test_split(tmp_path):
    for split, name in (("train", "a"), ("val", "b")):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    with pytest.raises(ValueError, match="train and val do not hold the same classes"):
        run(tmp_path / "out", **of(tmp_path))


def test_every_torchvision_classifier_is_a_model():
    names = torchvision.models.list_models(module=torchvision.models)
    assert len(names) > 70
    for name in names:
        models.check_name(name)
    for name in ("googlenet", "inception_v3", "vit_b_16", "swin_t"):
        with torch.device("meta"):
            assert isinstance(models.build(name, (3, 224, 224), 7), torch.nn.Module)


def learner(model, rule, shape):
    content = {"algorithm": {"name": rule}, "optimizer": {"name": "sgd", "lr": 0.1}}
    return learn.Learner(experiment.check(content), model, shape, 0, "cpu")


def test_direct_feedback_says_which_blocks_it_takes():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"algorithm\.blocks: got none, want names; .* Tanh, and it has none"):
        learner(model, "dfa", (3, 2, 2))
    model[2] = torch.nn.Tanh()
    assert learner(model, "dfa", (3, 2, 2)).model.blocks == ("2",)


def test_measuring_changes_nothing():
    trained = learner(models.build("mobilenet_v3_small", (3, 32, 32), 10), "brsf", (3, 32, 32))
    model = trained.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = trained.measure(torch.randn(8, 3, 32, 32), torch.arange(8))
    state_after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.randn(8, 3, 32, 32)
    assert torch.equal(torch.get_rng_state(), state_after)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())
    kinds = [sum(name.startswith(kind) for name in found) for kind in ("angle_grad/", "angle_weight/")]
    assert kinds[0] == kinds[1] > 50


def test_attention_is_measured():
    model = torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=3
    )
    # Its last layer starts at zero, and no gradient goes through that.
    torch.nn.init.normal_(model.heads.head.weight)
    found = learner(model, "fa", (3, 8, 8)).measure(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))
    attention = "encoder.layers.encoder_layer_0.self_attention"
    assert found[f"angle_weight/{attention}.in_proj_weight"] > 45
    assert found[f"angle_weight/{attention}.out_proj"] > 45
    assert found[f"angle_grad/{attention}.in_proj_weight"] > 1


@pytest.mark.slow
def test_quiet_without_a_terminal(tmp_path):
    file = str(Path(experiment.__file__).parent / "experiments" / "digits.toml")
    command = [
        sys.executable,
        "-m",
        "recipes",
        "run",
        file,
        "--rows",
        "usf",
        "--set",
        "train.epochs=1",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "it/s" not in done.stderr and "batch/s" not in done.stderr
    assert str(tmp_path / "digits" / "curves.png") in done.stdout
    assert "test error %" in done.stdout
