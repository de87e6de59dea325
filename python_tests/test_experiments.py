"""`python -m recipes run`: every experiment's file, running, going on, and what a wrong key is answered."""

import json
import math
import pydoc
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("pycocotools")
from recipes import __main__ as cli
from recipes import checkpoint, data, experiment, learn, report, schedules

FILES = sorted((Path(experiment.__file__).parent / "experiments").glob("*.toml"))
ROWS = [(path, row) for path in FILES for _, row, _ in experiment.entries(path)]

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = """
row = "small"
[data]
name = "digits"
[model]
name = "mlp"
[algorithm]
name = "{name}"
{options}
[optimizer]
name = "adam"
lr = 1e-3
{inverse}
[train]
epochs = 2
milestones = [1]
"""
INVERSE = '[inverse_optimizer]\nname = "adam"\nlr = 1e-3'


def write(folder, name, options="", inverse=""):
    path = folder / f"{name}.toml"
    path.write_text(SMALL.format(name=name, options=options, inverse=inverse))
    return path


def run(path, out, *args):
    cli.main(["run", str(path), "--out", str(out), "--device", "cpu", *args])
    (log,) = (out / path.parent.name / path.stem).glob("seed-*/log.jsonl")
    header, *rows = map(json.loads, log.read_text().splitlines())
    return header, rows, checkpoint.load(log.parent / "checkpoint.pt")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.epoch=3", "train.epoch: no such key, want one of epochs, batch_size"),
        ("train.epochs=many", "train.epochs: got 'many', want a value of type int"),
        ("train.epochs=0", "train.epochs: got 0, want at least 1"),
        ("trian.epochs=3", "trian: no such key, want one of row, seeds"),
        ("algorithm.name=bp", "algorithm.name: got 'bp', want one of backprop, usf"),
        (
            "algorithm.alpha=0.1",
            "algorithm.alpha: no such key, want one of scale, last_layer, kinds, mirror with algorithm.name = 'usf'",
        ),
        ("algorithm.scale=big", "algorithm: scale: expected a positive finite number"),
        ("algorithm.name=dtp", "inverse_optimizer: got none, want one with algorithm.name = 'dtp'"),
        ("optimizer.name=lion", "optimizer.name: got 'lion', want one of sgd, adam"),
        ("optimizer.momentum=0.9", "optimizer.momentum: no such key, want one of lr, betas"),
        ("optimizer.lr=fast", "optimizer.lr: got 'fast', want a value of type float"),
        ("optimizer.betas=0.9", "optimizer.betas: got 0.9, want a value of type list"),
        ("optimizer.betas=[0.9]", "optimizer.betas: got [0.9], want 2 numbers"),
        ("optimizer.betas=['a', 'b']", "optimizer.betas: got 'a', want a value of type float"),
        ("optimizer.foreach=3", "optimizer.foreach: got 3, want a value of type bool"),
        ("optimizer.last_layer={betas = [1]}", "optimizer.last_layer.betas: got [1], want 2 numbers"),
        ("algorithm={name = 'dfa', blocks = 'tanh1'}", "algorithm.blocks: got 'tanh1', want a value of type list"),
        ("algorithm={name = 'dfa', blocks = [1]}", "algorithm.blocks: got 1, want a value of type str"),
        ("algorithm={name = 'dfa', blocks = ['fc9']}", "algorithm.blocks: got ['fc9'], want names, each once, among"),
        ("algorithm={name = 'drtp', loss_scale = 'x'}", "algorithm.loss_scale: got 'x', want a value of type float"),
        ("search.x={low = 'a', high = 2}", "search.x: got {'low': 'a', 'high': 2}, want {choices = [...]} or"),
        ("algorithm.last_layer={name = 'fa', size = 1}", "algorithm.last_layer: "),
        ("algorithm.kinds.Conv2=fa", "algorithm.kinds: got 'Conv2', want names of torch.nn's layers"),
        ("algorithm.kinds.Conv2d=bp", "algorithm.kinds.Conv2d: got 'bp', want one of backprop"),
        ("algorithm.mirror.lr=0.1", "algorithm.mirror: got one, want none without wm"),
        ("train.inverse_steps=[0]", "train.inverse_steps: got 0, want at least 1"),
        ("train.inverse_steps=[]", "train.inverse_steps: got none, want one number"),
        ("train.inverse_first=2", "train.inverse_first: got 2, want none without inverse_optimizer"),
        ("data.validation=1", "data.validation: got 1, want a share"),
        ("optimizer.lr=-1", "optimizer: Invalid learning rate"),
        ("data.name=emnist", "data.name: got 'emnist', want one of digits"),
        ("data.name=imagefolder:x", "data.name: got 'imagefolder:x', want one of digits"),
        ("data.name=imagefolder", "data.path: got '', want a folder below --data-root with"),
        ("data.path=x", "data.path: got 'x', want none with data.name = 'digits'"),
        ("data.fgsm=nan", "data.fgsm: got nan, want a finite number"),
        ("optimizer.lr=inf", "optimizer.lr: got inf, want a finite number"),
        ("optimizer.betas=[nan, 0.9]", "optimizer.betas: got nan, want a finite number"),
        ("train.gamma=-1", "train.gamma: got -1, want at least 0"),
        ("train.milestones=[-1]", "train.milestones: got -1, want at least 0"),
        ("algorithm={name = 'ao_sdtp', auxiliary = -1}", "algorithm.auxiliary: got -1, want at least 0"),
        (
            "algorithm={name = 'dtp', auxiliary = 9}",
            "algorithm.auxiliary: got 9, want none with algorithm.name = 'dtp'",
        ),
        ("seeds=[]", "seeds: got none, want one at least"),
        ("seeds=[-1]", "seeds: got -1, want at least 0"),
        ("model.name=lanet", "model.name: got 'lanet', want mlp"),
        ("row.x=1", "row.x: got a key below row, which is no table"),
    ],
)
def test_bad_keys_are_named(tmp_path, capsys, setting, message):
    path = write(tmp_path, "usf")
    with pytest.raises(SystemExit) as stopped:
        run(path, tmp_path, "--set", setting)
    assert stopped.value.code == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert message in shown and str(path) in shown


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("run", ["--workers=-1"], "--workers: got '-1', want whole numbers of at least 0"),
        ("run", ["--checkpoint-steps=-1"], "--checkpoint-steps: got '-1', want whole numbers of at least 0"),
        ("run", ["--seeds=1,-1"], "--seeds: got '-1', want whole numbers of at least 0 with commas between"),
        ("run", ["--seeds=a"], "--seeds: got 'a', want whole numbers"),
        ("run", ["--device=meta"], "--device: got 'meta', want cpu, cuda or cuda:N"),
        ("search", ["--trials=0"], "--trials: got '0', want whole numbers of at least 1"),
        ("search", ["--keep=0"], "--keep: got '0', want whole numbers of at least 1"),
        ("search", ["--first=0"], "--first: got '0', want whole numbers of at least 1"),
    ],
)
def test_bad_arguments_are_named(capsys, command, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "x.toml", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_seeds_of_a_row_are_of_one_experiment(tmp_path, capsys):
    path, out = write(tmp_path, "usf"), tmp_path / "out"
    row = out / path.parent.name / "usf"
    run(path, out, "--set", "train.epochs=1")
    other = ["--seeds", "1", "--set", "train.epochs=1", "--set", "optimizer.lr=0.5"]
    with pytest.raises(SystemExit):
        run(path, out, *other)
    assert f"optimizer.lr: got 0.5, {row / 'seed-0'} was made with 0.001" in capsys.readouterr().err
    assert not (row / "seed-1" / "log.jsonl").exists()
    # A log that its own run would write again stops no other's training.
    (row / "seed-0" / "log.jsonl").write_text("{")
    with pytest.raises(SystemExit):
        run(path, out, "--seeds", "1", "--set", "train.epochs=1")
    assert "not a run's log" in capsys.readouterr().err and len((row / "seed-1" / "log.jsonl").read_text()) > 100


# Images on which the networks are small: for the locally-connected ones a position costs as many weights as a kernel.
SIZES = {"lenet-mnist": 32, "lenet-cifar": 32, "resnet18": 32, "alexnet-bn": 63, "retinanet": 64, "retinanet-small": 64}


@pytest.mark.parametrize(("path", "row"), ROWS, ids=lambda part: getattr(part, "stem", part))
def test_files_load(path, row):
    e = experiment.load(path, row)
    for trial in range(3):
        drawn = e.draw(trial)
        assert drawn == e.draw(trial) and drawn.keys() == e.search.keys()
        experiment.load(path, row, drawn)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "row"), ROWS, ids=lambda part: getattr(part, "stem", part))
def test_files_take_a_step(path, row):
    """Two batches of noise through the network of each file, small images: every weight moves and stays finite."""
    e = experiment.load(path, row)
    size = SIZES.get(e.model.name, 28 if e.model.name == "lenet" else 8)
    shape = (1 if e.data.name in ("digits", "mnist", "fashion-mnist") else 3, size, size)
    trained = learn.build(e, shape, 10, 0, "cpu")
    x, y = torch.randn(4, *shape), torch.arange(4)
    if e.detects:
        boxes = torch.tensor([[8.0, 8.0, 40.0, 48.0]])
        x, y = list(x.sigmoid()), [{"boxes": boxes, "labels": label.view(1)} for label in y + 1]
    elif e.reconstructs:
        y = x.flatten(1)
    weights = {n: p for n, p in trained.model.named_parameters() if p.requires_grad and p.ndim > 1}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    assert math.isfinite(trained.epoch([(x, y)] * 2))
    for name, weight in weights.items():
        stays = e.algorithm["name"] == "shallow" and name != list(weights)[-1]
        assert weight.isfinite().all() and torch.equal(weight, before[name]) == stays, name


def test_top_1_and_top_5_error():
    e = experiment.check({"model": {"name": "mlp"}, "algorithm": {"name": "usf"}})
    trained = learn.build(e, (1, 2, 2), 12, 0, "cpu")
    trained.network = torch.nn.Identity()
    scores = torch.arange(12.0).repeat(4, 1)
    # The label is first, fifth, sixth and last of the scores.
    dataset = torch.utils.data.TensorDataset(scores, torch.tensor([11, 7, 6, 0]))
    found = trained.evaluate(data.Batches(dataset, 3))
    assert found["error"] == 0.75 and found["top5"] == 0.5
    assert found["loss"] == pytest.approx((4 * scores[0].logsumexp(0).item() - 24) / 4)


def test_one_key_of_choices_is_gone_through_in_turn():
    space = {"choices": [16, 64, 1000]}
    e = experiment.check({"algorithm": {"name": "usf"}, "search": {"algorithm.auxiliary": space}})
    assert [e.draw(trial)["algorithm.auxiliary"] for trial in range(4)] == [16, 64, 1000, 16]


def test_inverses_are_measured_against_the_transposed_weights():
    content = {"model": {"name": "lc-mnist"}, "algorithm": {"name": "ao_sdtp", "auxiliary": 6}}
    content |= {"optimizer": {"name": "adam"}, "inverse_optimizer": {"name": "adam"}}
    trained = learn.build(experiment.check(content), (1, 8, 8), 10, 0, "cpu")
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    before = trained.measure(x, y)
    assert [name for name in before if name.startswith("angle_weight/")] == [f"angle_weight/{k}" for k in (2, 3, 4)]
    assert all(abs(before[f"angle_weight/{k}"] - 90) < 3 for k in (2, 3, 4))
    with torch.no_grad():
        for layer, inverse in zip(trained.model.layers, trained.model.inverses, strict=True):
            w = next(p for p in layer.parameters() if p.ndim > 1)
            if inverse is not None:
                v = next(p for p in inverse.parameters() if p.ndim > 1)
                v.copy_(w) if v.ndim > 2 else v[:, : len(w)].copy_(w.T)
    after = trained.measure(x, y)
    assert all(after[f"angle_weight/{k}"] < 1e-3 for k in (2, 3, 4))
    assert [after[f"inverse_loss/{k}"] > 0 for k in (2, 3, 4)] == [True] * 3
    # The output layer learns from the loss itself.
    *_, last = (name for name in after if name.startswith("angle_grad/"))
    assert after[last] < 1e-3


def test_epochs_of_the_inverses_alone(tmp_path, monkeypatch):
    alone = []
    monkeypatch.setattr(schedules, "train_inverses", lambda tp, batches, inverse, steps: alone.append(steps))
    path = write(tmp_path, "dtp", inverse=INVERSE)
    settings = ["train.inverse_first=3", "train.inverse_extra=2", "train.inverse_steps=[2]"]
    run(path, tmp_path, "--no-measure", *[part for setting in settings for part in ("--set", setting)])
    # 3 before the first epoch, 2 after each of two.
    assert alone == [[2]] * 7


def test_loss_scale_of_drtp():
    x, y = torch.randn(4, 1, 2, 2), torch.arange(4)
    gradients = []
    for options in ({}, {"loss_scale": 3.0}):
        e = experiment.check({"model": {"name": "mlp"}, "algorithm": {"name": "drtp", **options}})
        trained = learn.build(e, (1, 2, 2), 10, 0, "cpu")
        trained.loss(trained.model, x, y).backward()
        gradients.append([p.grad for p in trained.model.parameters() if p.grad is not None])
    for plain, scaled in list(zip(*gradients, strict=True))[:-2]:
        torch.testing.assert_close(scaled, 3 * plain)
    # The last layer learns from the loss.
    assert torch.equal(gradients[0][-1], gradients[1][-1])


def test_last_layers_own_rate():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 4))
    options = {"name": "manhattan", "lr": 1e-3, "last_layer": {"lr": 0.5, "manhattan": False}}
    body, head = learn.optimizer(options, model).param_groups
    assert [p.shape for p in head["params"]] == [(4, 3), (4,)] and (head["lr"], head["manhattan"]) == (0.5, False)
    assert [p.shape for p in body["params"]] == [(3, 2), (3,)] and (body["lr"], body["manhattan"]) == (1e-3, True)


def test_draws_are_in_the_ranges():
    search = {"optimizer.lr": {"low": 1e-5, "high": 3e-4, "log": True}, "algorithm.scale": {"choices": [1.0, 2.0]}}
    content = {"algorithm": {"name": "usf"}, "optimizer": {"name": "adam"}, "search": search}
    e = experiment.check(content)
    drawn = [e.draw(trial, seed=1) for trial in range(4000)]
    rates = torch.tensor([d["optimizer.lr"] for d in drawn])
    assert 1e-5 <= rates.min() < 1.2e-5 and 2.6e-4 < rates.max() <= 3e-4
    # Log-uniform: the median is the geometric mean of the ends.
    assert rates.median().item() == pytest.approx((1e-5 * 3e-4) ** 0.5, rel=0.1)
    assert {d["algorithm.scale"] for d in drawn} == {1.0, 2.0}
    for space in ({"low": 1}, {"low": 2, "high": 1}, {"choices": []}, 3):
        with pytest.raises(ValueError, match=r"search\.optimizer\.lr: got .*, want"):
            experiment.check({**content, "search": {"optimizer.lr": space}})


SEARCH = """
[search]
"optimizer.lr" = { low = 1e-4, high = 1e-2, log = true }
"""


def test_search_goes_on_with_the_best_and_report_shows_it(tmp_path, monkeypatch, capsys):
    load, batches, tests = data.load, data.Batches, []

    def loaded(*args):
        tests.append(load(*args))
        return tests[-1]

    def make(dataset, *args, **options):
        assert all(dataset is not one.test for one in tests), "a search looks at test images"
        return batches(dataset, *args, **options)

    monkeypatch.setattr(data, "load", loaded)
    monkeypatch.setattr(data, "Batches", make)
    path = write(tmp_path, "usf")
    path.write_text(path.read_text() + SEARCH)
    arguments = ["search", str(path), "--trials", "3", "--first", "1", "--keep", "1", "--device", "cpu"]
    cli.main([*arguments, "--out", str(tmp_path / "out")])
    (table,) = report.collect([tmp_path / "out"]).values()
    (trials,) = table
    assert sorted(len(r.rows) for r in trials) == [2, 2, 3]
    first = {r.header["seed"]: None for r in trials}
    assert list(first) == [0] and len({r.header["drawn"]["optimizer.lr"] for r in trials}) == 3
    errors = [r.rows[1]["validation_error"] for r in trials]
    assert len(trials[errors.index(min(errors))].rows) == 3
    before = [r.folder.joinpath("log.jsonl").stat().st_mtime_ns for r in trials]
    cli.main([*arguments, "--out", str(tmp_path / "out")])
    assert before == [r.folder.joinpath("log.jsonl").stat().st_mtime_ns for r in trials]
    cli.main(["report", str(tmp_path / "out"), "--to", str(tmp_path / "page.md")])
    assert "3 trials, best validation error" in (tmp_path / "page.md").read_text()
    assert (tmp_path / "page" / path.parent.name / "usf-search.png").stat().st_size > 5000
    # Trials are no seeds of the table that a run prints.
    monkeypatch.undo()
    capsys.readouterr()
    cli.main(["run", str(path), "--set", "train.epochs=1", "--device", "cpu", "--out", str(tmp_path / "out")])
    assert "0, 1, 2" not in capsys.readouterr().out


@pytest.mark.slow
def test_report_has_the_papers_figures_beside_ours(tmp_path):
    published = "published = { test_error = 3.5 }\n"
    for name in ("usf", "fa", "backprop"):
        path = write(tmp_path, name)
        path.write_text(published.replace("3.5", str(len(name))) + path.read_text())
        seeds = "0" if name == "usf" else "0,1"
        cli.main(["run", str(path), "--out", str(tmp_path / "out"), "--seeds", seeds, "--device", "cpu"])
    place = tmp_path / "page" / path.parent.name
    place.mkdir(parents=True)
    (place / "notes.md").write_text("A note.\n")
    cli.main(["report", str(tmp_path / "out"), "--to", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    (line,) = (line for line in page.splitlines() if "8.00" in line)
    found = [report.read(tmp_path / "out" / path.parent.name / "backprop" / f"seed-{seed}") for seed in (0, 1)]
    errors = [min(r.rows, key=lambda row: row["validation_error"])["test_error"] * 100 for r in found]
    spread = abs(errors[0] - errors[1]) / 2**0.5
    assert f"{sum(errors) / 2:.2f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{spread:.2f}" in line
    single = report.read(tmp_path / "out" / path.parent.name / "usf" / "seed-0")
    assert f" {100 * single.best['test_error']:.2f} |" in next(line for line in page.splitlines() if " 3.00 |" in line)
    assert "Paper: small < small < small." in page and "Kendall's τ" in page
    assert "A note." in page and "python -m recipes run recipes/experiments/" in page
    assert str(tmp_path / "out") not in page
    # A shorter run takes no longer one's place, here or on another page, where it says so and is left out of the order.
    log = tmp_path / "out" / path.parent.name / "backprop" / "seed-0" / "log.jsonl"
    log.write_text("\n".join(log.read_text().splitlines()[:-1]) + "\n")
    for roots in (["out"], ["page"], ["out", "page"]):
        cli.main(["report", *(str(tmp_path / root) for root in roots), "--to", str(tmp_path / "page.md")])
        assert (tmp_path / "page.md").read_text() == page
    cli.main(["report", str(tmp_path / "out"), "--to", str(tmp_path / "other.md")])
    other = (tmp_path / "other.md").read_text()
    assert "1 of 2" in other and "Kendall's τ" not in other


def test_autoencoder_reconstructs(tmp_path):
    path = write(tmp_path, "sdtp", inverse=INVERSE)
    changes = "--set", "model.name=autoencoder", "--set", "optimizer.foreach=false"
    header, rows, _ = run(path, tmp_path, *changes)
    assert header["command"].endswith(" ".join(changes))
    assert rows[2]["test_loss"] < 0.8 * rows[0]["test_loss"] and "test_error" not in rows[0]
    picture = tmp_path / tmp_path.name / "sdtp" / "seed-0" / "reconstructions.png"
    # Stopped before the picture, a run has not come to its end.
    picture.unlink()
    run(path, tmp_path, *changes)
    image = Image.open(picture)
    # Ten images of 8 x 8 in two rows, with a frame of 2.
    assert image.size == (10 * 10 + 2, 2 * 10 + 2)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("resnet18", {}, "model.name = 'resnet18', want a network that is its layers one after the other"),
        ("lenet", {}, "model.name = 'lenet': layer: expected [Flatten,] Linear"),
        ("mlp", {"alpha": "x"}, "alpha: expected a finite number"),
    ],
)
def test_what_target_propagation_does_not_take(model, options, message):
    content = {"model": {"name": model}, "algorithm": {"name": "dtp", **options}, "inverse_optimizer": {"name": "adam"}}
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        learn.build(experiment.check(content), (3 if model == "resnet18" else 1, 32, 32), 10, 0, "cpu")
    assert str(raised.value).startswith("algorithm") and "\n" not in str(raised.value)


TABLE = """
[base]
data = { name = "digits" }
model = { name = "mlp" }
optimizer = { name = "adam", lr = 1e-3 }
train = { epochs = 1 }
[[row]]
id = "bp"
name = "BP"
published = { test_error = 1.0 }
algorithm = { name = "backprop" }
[[row]]
id = "bp-slow"
like = "bp"
optimizer = { lr = 1e-4 }
"""


def test_a_row_says_what_is_its_own(tmp_path, capsys):
    path = tmp_path / "small.toml"
    path.write_text(TABLE)
    bp, slow = (experiment.load(path, row) for row in ("bp", "bp-slow"))
    assert (bp.row, bp.published, bp.optimizer["lr"]) == ("BP", {"test_error": 1.0}, 1e-3)
    assert (slow.row, slow.published, slow.algorithm) == ("bp-slow", {}, bp.algorithm)
    assert slow.optimizer == {"name": "adam", "lr": 1e-4}
    cli.main(["run", str(path), "--rows", "bp-slow", "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert [log.parts[-4:-1] for log in tmp_path.rglob("log.jsonl")] == [("small", "bp-slow", "seed-0")]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('like = "bp"', 'like = "fa"', "row bp-slow: like: got 'fa', want one of bp"),
        ('id = "bp-slow"', 'id = "bp"', "id: got 'bp', which another row has"),
        ('id = "bp-slow"', "", "row 1: id: got None, want a value of type str"),
        ("[base]", "[bse]", "got 'bse', want one of base, row"),
        ("lr = 1e-4", "rate = 1e-4", "row bp-slow: optimizer.rate: no such key"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, old, new, message):
    path = tmp_path / "small.toml"
    path.write_text(TABLE.replace(old, new))
    with pytest.raises((ValueError, TypeError), match=message):
        experiment.load(path, "bp-slow")


def test_keys_names_every_key(capsys):
    cli.main(["keys"])
    shown = capsys.readouterr().out
    for key in ("usf (SignSymmetry): scale, last_layer, kinds, mirror", "like =", "weight_decay", "mirror.decay = 0.1"):
        assert key in shown
    # Each with its default and what it means.
    for part, cls in (("data", experiment.Data), ("model", experiment.Model), ("train", experiment.Train)):
        for key in vars(cls()):
            assert re.search(rf"^{part}\.{key} = \S+ +\S+ \S+", shown, re.MULTILINE), key
    for name, cls in re.findall(r"^(\w+) \(([\w.]+)\): ", shown, re.MULTILINE):
        package = "" if "optim" in cls else "torch.optim." if name in experiment.OPTIMIZERS else "bioplaus_kernels."
        assert isinstance(pydoc.locate(package + cls), type), cls


def test_rules_by_kind_and_of_the_last_layer():
    algorithm = {"name": "usf", "kinds": {"Conv2d": {"name": "fa", "scale": "xavier"}}, "last_layer": {"name": "kp"}}
    e = experiment.check({"model": {"name": "lenet"}, "algorithm": algorithm})
    layers = [m for m in learn.build(e, (1, 28, 28), 10, 0, "cpu").model.modules() if hasattr(m, "feedback")]
    found = [(type(m).__mro__, type(m.feedback).__name__) for m in layers]
    names = [*("fa" if torch.nn.Conv2d in mro else "usf" for mro, _ in found[:-1]), "kp"]
    assert [name for _, name in found] == [experiment.RULES[name].__name__ for name in names]
    assert {"fa", "usf", "kp"} == set(names)


@pytest.mark.parametrize("place", ["name", "last_layer", "kinds"])
def test_a_weight_mirror_is_moved_wherever_it_is(monkeypatch, place):
    algorithm = {"name": "usf", "mirror": {"decay": 0.25}, place: {"Linear": "wm"} if place == "kinds" else "wm"}
    e = experiment.check({"model": {"name": "mlp"}, "algorithm": algorithm})
    trained, calls = learn.build(e, (1, 4, 4), 10, 0, "cpu"), []
    monkeypatch.setattr(learn.bk, "mirror_", lambda model, **options: calls.append(options))
    trained.epoch([(torch.randn(2, 1, 4, 4), torch.tensor([0, 1]))] * 2)
    assert calls == [{"lr": 0.1, "decay": 0.25, "batch_size": 64, "normalise": True}] * 2
