"""`python -m recipes run`: every experiment's file, running, going on, and what a wrong key is answered."""

import json
from pathlib import Path

import pytest
import torch

from recipes import __main__ as cli
from recipes import experiment

FILES = sorted((Path(experiment.__file__).parent / "experiments").glob("*/*.toml"))

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
    return header, rows, torch.load(log.parent / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize(
    ("name", "options", "inverse"),
    [
        ("usf", 'scale = "xavier"', ""),
        ("dfa", 'scale = "xavier"\nstored = true', ""),
        ("drtp", "", ""),
        ("dtp", 'schedule = "alternating"\nreduction = "sum"', INVERSE),
        ("ao_sdtp", "auxiliary = 16", INVERSE),
    ],
)
def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path, name, options, inverse):
    path = write(tmp_path, name, options, inverse)
    header, rows, whole = run(path, tmp_path / "whole")
    assert header["row"] == "small" and header["experiment"]["algorithm"]["name"] == name
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert rows[2]["train_loss"] < rows[1]["train_loss"] and rows[2]["test_error"] < 0.85
    assert rows[2]["lr"] == pytest.approx(1e-4)
    run(path, tmp_path / "parts", "--set", "train.epochs=1")
    _, again, parts = run(path, tmp_path / "parts")
    for row, other in zip(rows, again, strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    for key, value in whole["model"].items():
        assert torch.equal(value, parts["model"][key])


def test_a_finished_run_is_not_repeated(tmp_path):
    path = write(tmp_path, "usf")
    run(path, tmp_path)
    (log,) = tmp_path.glob("*/usf/seed-0/log.jsonl")
    before = log.stat().st_mtime_ns
    run(path, tmp_path)
    assert log.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.epoch=3", "train.epoch: no such key, want one of epochs, batch_size"),
        ("train.epochs=many", "train.epochs: got 'many', want a value of type int"),
        ("train.epochs=0", "train.epochs: got 0, want at least 1"),
        ("trian.epochs=3", "trian: no such key, want one of row, note"),
        ("algorithm.name=bp", "algorithm.name: got 'bp', want one of backprop, usf"),
        (
            "algorithm.alpha=0.1",
            "algorithm.alpha: no such key, want one of scale, last_layer with algorithm.name = 'usf'",
        ),
        ("algorithm.scale=big", "algorithm: scale: expected a positive finite number"),
        ("algorithm.name=dtp", "inverse_optimizer: got none, want one with algorithm.name = 'dtp'"),
        ("optimizer.name=lion", "optimizer.name: got 'lion', want one of sgd, adam"),
        ("optimizer.momentum=0.9", "optimizer.momentum: no such key, want one of lr, betas"),
        ("optimizer.lr=-1", "optimizer: Invalid learning rate"),
        ("data.name=emnist", "data.name: got 'emnist', want digits"),
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


def test_a_folder_of_another_experiment_is_left_alone(tmp_path, capsys):
    path = write(tmp_path, "usf")
    run(path, tmp_path)
    with pytest.raises(SystemExit):
        run(path, tmp_path, "--set", "optimizer.lr=0.5")
    assert "optimizer.lr: got 0.5, " in capsys.readouterr().err


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_files_load(path):
    assert experiment.load(path).row
