"""A run's folder: going on, one process at a time, damaged and other runs' files, and what is said then."""

import json
import shutil

import pytest
import torch

pytest.importorskip("pycocotools")
from test_experiments import INVERSE, run, write

from recipes import __main__ as cli
from recipes import checkpoint, learn
from recipes import run as runner
from recipes.run import order

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run(write(folder, "usf"), folder, "--no-measure")
    return folder


@pytest.fixture
def finished(one_run, tmp_path):
    """A file of one experiment whose run in `tmp_path` is finished, and that run's folder."""
    shutil.copytree(one_run / one_run.name, tmp_path / tmp_path.name)
    return write(tmp_path, "usf"), tmp_path / tmp_path.name / "usf" / "seed-0"


@pytest.mark.slow
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
    assert rows[2]["train_loss"] < rows[1]["train_loss"] and rows[2]["test_loss"] < rows[0]["test_loss"]
    assert rows[2]["lr"] == pytest.approx(1e-4)
    run(path, tmp_path / "parts", "--set", "train.epochs=1")
    _, again, parts = run(path, tmp_path / "parts")
    for row, other in zip(rows, again, strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    for key, value in whole["model"].items():
        assert torch.equal(value, parts["model"][key])


@pytest.mark.slow
def test_a_run_names_every_commit_that_it_was_made_with(tmp_path, monkeypatch, capsys):
    path, commits = write(tmp_path, "usf"), []
    for epochs, commit in enumerate(("one", "one", "two-dirty", "two-dirty", "two", "one"), 1):
        made = {"processor": "p", "versions": "v", "commit": commit}
        for module in (cli, runner):
            monkeypatch.setattr(module, "machine", made.copy)
        header, _, _ = run(path, tmp_path, "--no-measure", "--set", f"train.epochs={epochs}")
        commits.append(header["commit"])
        assert ("in no commit" in capsys.readouterr().err) == commit.endswith("dirty")
    seen = "one; two-dirty"
    assert commits == ["one", "one", seen, seen, f"{seen}; two", f"{seen}; two"] and header["processor"] == "p"


def test_a_finished_run_is_not_repeated(tmp_path, finished):
    path, folder = finished
    before = (folder / "log.jsonl").stat().st_mtime_ns
    run(path, tmp_path)
    assert (folder / "log.jsonl").stat().st_mtime_ns == before


def test_a_folder_of_another_experiment_is_left_alone(tmp_path, finished, capsys):
    path, _ = finished
    with pytest.raises(SystemExit):
        run(path, tmp_path, "--set", "optimizer.lr=0.5")
    said = capsys.readouterr().err
    assert f"{path}, row usf: optimizer.lr: got 0.5, " in said and "was made with 0.001; want the same" in said


def test_a_run_from_before_validation_says_what_differs(tmp_path, finished, capsys):
    path, folder = finished
    file = folder / "checkpoint.pt"
    saved = checkpoint.load(file)
    content = json.loads(saved["experiment"])
    del content["data"]["validation"]
    checkpoint.save(file, saved | {"experiment": json.dumps(content)})
    with pytest.raises(SystemExit):
        run(path, tmp_path)
    assert "data.validation: got 0.1, " in capsys.readouterr().err
    run(path, tmp_path, "--set", "data.validation=0")


@pytest.mark.parametrize("left", ["without its log", "a row short", "torn"])
def test_a_log_is_mended_from_the_checkpoint(tmp_path, finished, left):
    path, folder = finished
    made = folder / "log.jsonl"
    whole = made.read_text()
    if left == "without its log":
        made.unlink()
    else:
        made.write_text("\n".join(whole.splitlines()[:-1]) if left == "a row short" else whole[:-40])
    run(path, tmp_path)
    assert made.read_text() == whole


def test_a_log_without_a_checkpoint_is_left_alone(tmp_path, finished, capsys):
    path, folder = finished
    (folder / "checkpoint.pt").unlink()
    whole = (folder / "log.jsonl").read_text()
    with pytest.raises(SystemExit):
        run(path, tmp_path, "--set", "train.epochs=1")
    assert f"{folder / 'log.jsonl'}: has no checkpoint beside it" in capsys.readouterr().err
    assert (folder / "log.jsonl").read_text() == whole


def test_one_process_holds_a_folder(tmp_path, finished, capsys):
    path, folder = finished
    with checkpoint.lock(folder), pytest.raises(SystemExit):
        run(path, tmp_path)
    assert "another process trains into it" in capsys.readouterr().err
    run(path, tmp_path)


@pytest.mark.parametrize("damage", ["empty", "text", "torch's own", "a bit", "cut", "another content"])
def test_a_damaged_checkpoint_is_named(tmp_path, finished, capsys, damage):
    path, folder = finished
    made = folder / "checkpoint.pt"
    whole = made.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    if damage == "torch's own":
        torch.save({"model": {}}, made)
    elif damage == "another content":
        checkpoint.save(made, {"model": {}})
    else:
        made.write_bytes({"empty": b"", "text": b"not one", "a bit": bytes(flipped), "cut": whole[:-9]}[damage])
    with pytest.raises(SystemExit):
        run(path, tmp_path)
    shown = capsys.readouterr().err.splitlines()[-1]
    assert str(made) in shown and "move its folder away" in shown


def test_stopping_by_hand_says_how_to_go_on(tmp_path, monkeypatch):
    def stopped(self, batches, first):
        raise KeyboardInterrupt

    monkeypatch.setattr(learn.Learner, "epoch", stopped)
    with pytest.raises(SystemExit, match="the same command goes on"):
        run(write(tmp_path, "usf"), tmp_path)


def test_the_order_of_samples_is_a_function_of_seed_and_epoch():
    numbers = {order(seed, epoch) for seed in range(30) for epoch in range(30)}
    assert len(numbers) == 900 and order(0, 1) == 599057444
