"""recipes/train.py: every model, data set and rule for an epoch or two, what it writes, and resuming."""

import csv
import gzip
import hashlib
import math
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import bioplaus_kernels as bk
from recipes import data, measure, models, train

RULES = list(bk.feedback.RULES)

# The networks are too small for a second thread to help.
pytestmark = pytest.mark.usefixtures("one_thread")


def run(out, *args):
    return train.main([*map(str, args), "--out", str(out), "--device", "cpu"])


def metrics(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


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

    def third(*args):
        loaded = load(*args)
        for part in (loaded.train, loaded.test):
            part.tensors = tuple(tensor[: len(tensor) // 3] for tensor in part.tensors)
        return loaded

    monkeypatch.setattr(data, "load", third)


def test_rules_on_digits(tmp_path, fewer_digits):
    runs = run(tmp_path, "--model", "lenet", "--rule", ",".join(RULES), "--epochs", 2, "--batch-size", 32)
    assert list(runs) == RULES
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    layers = ["conv1", "conv2", "fc1", "fc2", "fc3"]
    for rule in RULES:
        rows = metrics(tmp_path / rule)
        assert list(rows[0]) == [
            *("epoch", "lr", "train_loss", "train_error", "seconds", "test_loss", "test_error"),
            *(f"angle_weight/{layer}" for layer in layers),
            *(f"angle_grad/{layer}" for layer in layers),
        ]
        assert [row["epoch"] for row in rows] == [0, 1, 2]
        assert rows[2]["train_loss"] < min(rows[1]["train_loss"], 2.0)
        for row in rows:
            assert row["angle_grad/fc3"] == 0
            for layer in layers:
                if rule == "backprop":
                    assert row[f"angle_weight/{layer}"] == row[f"angle_grad/{layer}"] == 0
                else:
                    assert 0 < row[f"angle_weight/{layer}"] < 110
                    assert (0 < row[f"angle_grad/{layer}"] < 150) == (layer != "fc3")
    # 30 degrees for uniform weights, 90 for unrelated ones.
    assert abs(metrics(tmp_path / "usf")[0]["angle_weight/fc1"] - 30) < 0.5
    assert abs(metrics(tmp_path / "fa")[0]["angle_weight/fc1"] - 90) < 1.5
    assert "5 converted" in (tmp_path / "usf" / "layers.txt").read_text()


def test_last_layer(tmp_path, fewer_digits):
    (rows,) = run(tmp_path, "--model", "mlp", "--rule", "fa", "--last-layer", "backprop", "--epochs", 1).values()
    assert rows[0]["angle_weight/fc6"] == rows[0]["angle_grad/fc5"] == 0
    assert rows[0]["angle_weight/fc5"] > 80 and rows[0]["angle_grad/fc4"] > 10


@pytest.mark.parametrize(
    "name", ["lenet", "mlp", "lc-mnist", pytest.param("resnet18", marks=pytest.mark.slow), "mobilenet_v3_small"]
)
def test_models_on_image_folder(tmp_path, images, name):
    data = f"imagefolder:{images}"
    (rows,) = run(
        tmp_path, "--model", name, "--data", data, "--image-size", 32, "--rule", "usf", "--epochs", 1, "--batch-size", 8
    ).values()
    assert len(rows) == 2 and math.isfinite(rows[1]["train_loss"]) and rows[1]["lr"] == 0.03


def test_image_folder_and_workers(tmp_path, images):
    """The images' class is easy to see; two processes load them."""
    args = ["--model", "mlp", "--data", f"imagefolder:{images}", "--image-size", 8, "--rule", "usf", "--epochs", 8]
    (rows,) = run(tmp_path, *args, "--batch-size", 4, "--workers", 2).values()
    assert rows[-1]["test_error"] == 0


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
    args = ["--model", "lenet", "--data", "cifar10", "--data-root", tmp_path, "--rule", "usf", "--epochs", 1]
    (rows,) = run(tmp_path / "out", *args, "--batch-size", 10).values()
    assert len(rows) == 2
    loaded = data.load("cifar10", tmp_path, 32, 3)
    assert (len(loaded.train), len(loaded.test), loaded.shape) == (60, 12, (3, 32, 32))
    image, label = loaded.test[3]
    raw = torch.from_numpy(cifar10(tmp_path, train=False).data[3]).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    torch.testing.assert_close(image, (raw - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert label == 3


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


def test_fashion_mnist_that_cannot_be_had(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "nowhere")
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [f"{tmp_path.as_uri()}/nowhere/"])
    with pytest.raises(SystemExit):
        run(tmp_path / "out", "--data", "fashion-mnist", "--data-root", tmp_path)
    message = capsys.readouterr().err
    assert "argument --data: Error downloading" in message and "dataset-fashion-mnist" in message


def test_digits_are_a_fixed_split():
    first, second = data.load("digits", "", 8, 1), data.load("digits", "", 8, 1)
    assert (len(first.train), len(first.test)) == (1437, 360)
    assert torch.equal(first.test.tensors[0], second.test.tensors[0])
    assert abs(first.train.tensors[0].mean()) < 0.02 and abs(first.train.tensors[0].std() - 1) < 0.02


@pytest.mark.parametrize("interrupted", ["checkpoint.pt", "metrics.csv"])
@pytest.mark.parametrize("model", ["lenet", pytest.param("mobilenet_v3_small", marks=pytest.mark.slow)])
def test_resume_is_exact(tmp_path, monkeypatch, fewer_digits, images, model, interrupted):
    """Dropout, batch norm, augmentation, momentum, the learning rate, the order of the images, brsf's draws."""
    args = ["--model", model, "--epochs", 3, "--rule", "fa,brsf"]
    if model != "lenet":
        args += ["--data", f"imagefolder:{images}", "--image-size", 32, "--batch-size", 8]
    run(tmp_path / "whole", *args)

    replace, written = train._replace, []

    def interrupt(path, content):
        if path.name == interrupted:
            written.append(path)
            if len(written) == 3:  # epoch 2; before the file is written
                raise KeyboardInterrupt
        replace(path, content)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train, "_replace", interrupt)
        run(tmp_path / "parts", *args)
    assert len(metrics(tmp_path / "parts" / "fa")) == 2
    torch.rand(7)
    run(tmp_path / "parts", *args, "--resume")

    for rule in ("fa", "brsf"):
        whole, parts = metrics(tmp_path / "whole" / rule), metrics(tmp_path / "parts" / rule)
        assert len(whole) == 4
        for one, other in zip(whole, parts, strict=True):
            assert list(one) == list(other)
            np.testing.assert_equal(one | {"seconds": 0}, other | {"seconds": 0})
        one, other = (
            torch.load(tmp_path / part / rule / "checkpoint.pt", weights_only=True) for part in ("whole", "parts")
        )
        assert one["model"].keys() == other["model"].keys()
        assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
        assert not list((tmp_path / "parts" / rule).glob("*.tmp"))


def test_resume_goes_on_with_rules_not_yet_trained(tmp_path, fewer_digits, capsys):
    args = ["--model", "mlp", "--epochs", 1]
    run(tmp_path, *args, "--rule", "usf")
    before = (tmp_path / "usf" / "metrics.csv").read_bytes()
    capsys.readouterr()
    run(tmp_path, *args, "--rule", "usf,fa", "--resume")
    assert (tmp_path / "usf" / "metrics.csv").read_bytes() == before
    printed = capsys.readouterr().out
    assert "fa 1/1: test error" in printed and "usf 1/1" not in printed


def test_same_seed_same_run(tmp_path, fewer_digits):
    runs = [run(tmp_path / str(n), "--model", "mlp", "--epochs", 1, "--seed", seed) for n, seed in enumerate((3, 3, 4))]
    first, second, other = (r["usf"][1]["train_loss"] for r in runs)
    assert first == second != other


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_amp(tmp_path, fewer_digits, amp):
    (rows,) = run(tmp_path, "--model", "lenet", "--rule", "usf", "--epochs", 2, "--amp", amp).values()
    assert rows[2]["train_loss"] < rows[1]["train_loss"] < 2.3


@pytest.mark.slow
def test_compile(tmp_path):
    args = ["--model", "lenet", "--rule", "usf", "--epochs", 2]
    (eager,) = run(tmp_path / "eager", *args).values()
    (compiled,) = run(tmp_path / "compiled", *args, "--compile").values()
    assert abs(compiled[2]["train_loss"] - eager[2]["train_loss"]) < 0.02


def test_stops_when_the_loss_is_not_finite(tmp_path, fewer_digits, capsys):
    (rows,) = run(tmp_path, "--model", "mlp", "--rule", "usf", "--epochs", 9, "--lr", 1e30).values()
    assert len(rows) < 9
    assert "try a smaller --lr" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "lanet"], "argument --model: got 'lanet', want mlp, cifar-fc, lenet, "),
        (["--model", "fasterrcnn_resnet50_fpn"], "argument --model: got 'fasterrcnn_resnet50_fpn'"),
        (
            ["--data", "emnist"],
            "argument --data: got 'emnist', want digits, mnist, fashion-mnist, cifar10 or imagefolder:PATH",
        ),
        (["--data", "imagefolder"], "argument --data: got 'imagefolder'"),
        (["--data", "digits:here"], "argument --data: got 'digits:here'"),
        (["--data", "imagefolder:/nowhere"], "argument --data: /nowhere must hold the folders train and val"),
        (["--rule", "usf,bp"], "argument --rule: got 'bp', want one or more of backprop, usf"),
        (["--last-layer", "bp"], "argument --last-layer: invalid choice: 'bp'"),
        (["--epochs", "0"], "argument --epochs: got '0', want a number of type int, at least 1"),
        (["--lr", "nan"], "argument --lr: got 'nan', want a number of type float"),
        (["--lr", "fast"], "argument --lr: got 'fast'"),
        (["--batch-size", "5000"], "argument --batch-size: got 5000, there are only 1437 images"),
        (["--device", "gpu"], "argument --device:"),
        (["--device", "cuda:99"], "argument --device: got 'cuda:99', and torch sees"),
        (["--model", "lenet", "--image-size", "4"], "argument --image-size: lenet takes no images of 1 x 4 x 4"),
        (["--model", "vit_b_16"], "argument --image-size: vit_b_16 takes no images of 3 x 32 x 32"),
        (["--resume"], "argument --resume: needs --out"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        train.main(args)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_run_is_overwritten_or_mixed(tmp_path, fewer_digits, capsys):
    args = ["--model", "mlp", "--rule", "usf", "--epochs", 1]
    run(tmp_path, *args)
    for more, message in (
        ([], "argument --out:"),
        (["--resume", "--lr", 1], "argument --lr: got 1.0,"),
        (["--resume", "--weight-decay", 1], "argument --weight-decay: got 1.0,"),
    ):
        with pytest.raises(SystemExit):
            run(tmp_path, *args, *more)
        assert message in capsys.readouterr().err


def test_image_folder_with_other_classes_in_the_test_split(tmp_path, images, capsys):
    for split, name in (("train", "a"), ("val", "b")):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    with pytest.raises(SystemExit):
        run(tmp_path / "out", "--data", f"imagefolder:{tmp_path}")
    assert "argument --data:" in capsys.readouterr().err


def test_every_torchvision_classifier_is_a_model():
    names = torchvision.models.list_models(module=torchvision.models)
    assert len(names) > 70
    for name in names:
        models.check_name(name)
    for name in ("googlenet", "inception_v3", "vit_b_16", "swin_t"):
        with torch.device("meta"):
            assert isinstance(models.build(name, (3, 224, 224), 7), torch.nn.Module)


def test_measuring_changes_nothing():
    model = models.build("mobilenet_v3_small", (3, 32, 32), 10)
    bk.convert_(model, "brsf")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = measure.angles(model, torch.randn(8, 3, 32, 32), torch.arange(8))
    state_after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.randn(8, 3, 32, 32)
    assert torch.equal(torch.get_rng_state(), state_after)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sum(name.startswith("angle_grad/") for name in found) == len(found) / 2 > 50


def test_attention_is_measured():
    model = torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=3
    )
    # Its last layer starts at zero, and no gradient goes through that.
    torch.nn.init.normal_(model.heads.head.weight)
    bk.convert_(model, "fa")
    found = measure.angles(model, torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))
    attention = "encoder.layers.encoder_layer_0.self_attention"
    assert found[f"angle_weight/{attention}.in_proj_weight"] > 45
    assert found[f"angle_weight/{attention}.out_proj"] > 45
    assert found[f"angle_grad/{attention}.in_proj_weight"] > 1


@pytest.mark.slow
def test_quiet_without_a_terminal(tmp_path):
    command = [sys.executable, "-m", "recipes.train", "--model", "mlp", "--epochs", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "it/s" not in done.stderr and "batch/s" not in done.stderr
    assert str(tmp_path / "curves.png") in done.stdout
    assert "test error %" in done.stdout
