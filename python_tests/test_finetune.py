"""Fine-tuning: what a run begins with, and the error under attack."""

import json
import types

import pytest
import torch

import bioplaus_kernels as bk

pytest.importorskip("torchvision")
from recipes import __main__ as cli
from recipes import checkpoint, data, experiment, finetune, learn, models

FILE = """
[base]
data = { name = "digits" }
model = { name = "mlp", hidden = [8] }
optimizer = { name = "adam", lr = 1e-3 }
train = { epochs = 1 }
algorithm = { name = "backprop" }
[[row]]
id = "before"
[[row]]
id = "after"
model = { init_from = "before" }
algorithm = { name = "fa_signed_init" }
data = { fgsm = 0.1 }
"""


def test_a_row_begins_with_anothers_weights(tmp_path, capsys):
    path, out = tmp_path / "table.toml", tmp_path / "runs"
    path.write_text(FILE)
    run = ["run", str(path), "--out", str(out), "--seeds", "3", "--device", "cpu"]
    with pytest.raises(SystemExit):
        cli.main([*run, "--rows", "after"])
    assert "run that row first" in " ".join(capsys.readouterr().err.split())
    cli.main(run)
    before = checkpoint.load(out / "table/before/seed-3/checkpoint.pt")["model"]
    header, first, last = map(json.loads, (out / "table/after/seed-3/log.jsonl").read_text().splitlines())
    assert header["experiment"]["model"]["init_from"] == "before"
    # The same data, so with the last layer: it begins where the other ended.
    ended = json.loads((out / "table/before/seed-3/log.jsonl").read_text().splitlines()[-1])
    assert first["test_error"] == ended["test_error"] and 0 < last["test_fgsm"] <= 1 and "test_fgsm_feedback" in last
    # Feedback is made of the weights it begins with.
    e = experiment.load(path, "after")
    learner = learn.build(e, (1, 8, 8), 10, 0, "cpu", start=finetune.start(e, 3, out / "table/after/seed-3"))
    assert torch.equal(learner.model.fc2.feedback_matrix().sign(), before["fc2.weight"].sign())
    unfinished = checkpoint.load(out / "table/before/seed-3/checkpoint.pt")
    checkpoint.save(out / "table/before/seed-3/checkpoint.pt", unfinished | {"rows": unfinished["rows"][:1]})
    with pytest.raises(ValueError, match="has had 0 of 1 epochs; run that row first"):
        finetune.start(e, 3, out / "table/after/seed-3")
    # A finished run needs them no more.
    (out / "table/before/seed-3/checkpoint.pt").unlink()
    cli.main([*run, "--rows", "after"])


def test_another_task_has_a_last_layer_of_its_own():
    weights = models.build("mlp", (1, 4, 4), 10, [6]).state_dict()
    for classes, same, kept in ((10, True, True), (10, False, False), (3, True, False)):
        model = models.build("mlp", (1, 4, 4), classes, [6])
        drawn = model.fc2.weight.clone()
        finetune.load(model, weights, same)
        assert torch.equal(model.fc1.weight, weights["fc1.weight"])
        assert torch.equal(model.fc2.weight, weights["fc2.weight"] if kept else drawn)
    with pytest.raises(ValueError, match=r"fc1\.weight: got shape \(6, 16\), want shape \(7, 16\)"):
        finetune.load(models.build("mlp", (1, 4, 4), 10, [7]), weights, True)
    with pytest.raises(ValueError, match=r"fc2\.weight: got none, want shape"):
        finetune.load(
            models.build("mlp", (1, 4, 4), 10, [6, 6]),
            {"fc1.weight": weights["fc1.weight"], "fc1.bias": weights["fc1.bias"]},
            True,
        )


def test_torchvisions_weights(monkeypatch, tmp_path):
    there = models.build("squeezenet1_1", (3, 32, 32), 1000)
    best = types.SimpleNamespace(get_state_dict=lambda progress: there.state_dict())
    monkeypatch.setattr("torchvision.models.get_model_weights", lambda name: types.SimpleNamespace(DEFAULT=best))
    content = {"data": {"name": "digits"}, "model": {"name": "squeezenet1_1", "init_from": "torchvision"}}
    e = experiment.check(content | {"algorithm": {"name": "usf"}})
    learner = learn.build(e, (3, 32, 32), 10, 0, "cpu", start=finetune.start(e, 0, tmp_path))
    found = dict(learner.model.named_parameters())
    assert found["classifier.1.weight"].shape[0] == 10
    assert all(torch.equal(found[n], p) for n, p in there.named_parameters() if not n.startswith("classifier"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data.fgsm": -1}, "data.fgsm: got -1, want at least 0"),
        ({"data.fgsm": 0.1, "algorithm.name": "dfa"}, "data.fgsm: got 0.1, want 0 but for classifiers with a rule"),
        ({"model.init_from": "torchvision"}, "model.init_from: got 'torchvision', which has no mlp"),
        ({"model.hidden": [0]}, "model.hidden: got 0, want at least 1"),
        ({"model.activation": "elu"}, "model.activation: got 'elu', want one of tanh, sigmoid, relu"),
        ({"model.name": "lenet", "model.hidden": [9]}, "want neither with model.name = 'lenet'"),
        ({"algorithm": {"name": "dtp", "hidden": 9}}, "algorithm.hidden: got 9, want 0 with algorithm.name = 'dtp'"),
    ],
)
def test_keys_that_do_not_fit(keys, message):
    content = {"data": {"name": "digits"}, "model": {"name": "mlp"}, "algorithm": {"name": "usf"}}
    with pytest.raises(ValueError) as raised:
        experiment.check(content, keys)
    assert message in str(raised.value)


def test_a_file_that_is_no_runs_checkpoint_is_named(tmp_path):
    content = {"data": {"name": "digits"}, "algorithm": {"name": "usf"}}
    other = experiment.check(content, {"model.init_from": str(tmp_path / "other.pt")})
    with pytest.raises(OSError, match=r"^model.init_from: got .*other.pt', there is no such file"):
        finetune.start(other, 0, tmp_path)
    torch.save({}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt: not a checkpoint of recipes; model.init_from wants a checkpoint"):
        finetune.start(other, 0, tmp_path)


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_fgsm_is_the_worst_step_of_a_linear_model(scale):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 2))
    # Logits so large that cross-entropy has no gradient left are attacked as well.
    model[1].weight.data.mul_(scale)
    bk.convert_(model, bk.FeedbackAlignment(stored=True))
    pixels = ((0.3,), (0.4,))
    image = torch.rand(64, 1, 3, 3) * 0.4 + 0.3
    y = model((image - 0.3) / 0.4).argmax(1)
    dataset = torch.utils.data.TensorDataset((image - 0.3) / 0.4, y)
    weight = (model[1].weight[1] - model[1].weight[0]).detach()
    towards = torch.where(y == 0, 1.0, -1.0)
    margin = -towards * ((image.flatten(1) - 0.3) / 0.4 @ weight + (model[1].bias[1] - model[1].bias[0]).item())
    size = 0.02
    found = finetune.fgsm(model, data.Batches(dataset, 20), size, pixels)
    expected = (margin - size / 0.4 * weight.abs().sum() < 0).float().mean().item()
    assert 0.1 < expected < 0.9 and found["fgsm"] == pytest.approx(expected)
    b = model[1].feedback_matrix()
    weaker = (margin - size / 0.4 * (weight * (b[1] - b[0]).sign()).sum() < 0).float().mean().item()
    assert found["fgsm_feedback"] == pytest.approx(weaker) and weaker < expected
