"""What is made of runs' logs: tables, orders, pictures, the page and its notes."""

import json
import math
import re
import shutil

import pytest
from PIL import Image

pytest.importorskip("pycocotools")
from recipes import __main__ as cli
from recipes import experiment, pictures, report
from recipes import page as pages


@pytest.mark.parametrize(("here", "tau"), [([0, 1, 2, 3], 1), ([3, 2, 1, 0], -1), ([1, 0, 2, 3], 2 / 3)])
def test_kendalls_tau(here, tau):
    assert report._kendall(here) == pytest.approx(tau)


def log(folder, errors, lr=0.1, losses=None, data_name="mnist", validation=(), commit="c", more=None, rule="fa"):
    folder.mkdir(parents=True)
    content = {
        "algorithm": {"name": rule},
        "data": {"name": data_name},
        "optimizer": {"lr": lr},
        "train": {"epochs": len(errors) - 1},
    }
    header = {"row": folder.parent.name, "published": {"test_error": 1.0}, "experiment": content}
    header |= {"processor": "p", "versions": "v", "commit": commit, "command": "m"}
    rows = [{"epoch": n, "train_loss": 1.0, "test_error": error, **(more or {})} for n, error in enumerate(errors)]
    for row, error in zip(rows, validation, strict=False):
        row["validation_error"] = error
    for row, loss in zip(rows, losses or [], strict=False):
        row["train_loss"] = loss
    (folder / "log.jsonl").write_text("".join(json.dumps(part) + "\n" for part in (header, *rows)))


def test_the_best_epoch_is_that_of_the_validation_images(tmp_path):
    log(tmp_path / "t" / "a" / "seed-0", [0.9, 0.1, 0.3], validation=[0.9, 0.4, 0.2])
    log(tmp_path / "t" / "b" / "seed-0", [0.9, 0.1, 0.3])
    ((a,), (b,)) = report.collect([tmp_path])["t"]
    assert (a.best["epoch"], a.best["test_error"], b.best["epoch"]) == (2, 0.3, 1)
    for run, on, figure in ((a, "validation", "30.00"), (b, "test", "10.00")):
        (line,) = (part for part in report.table([[run]], "github").splitlines() if "1.00 |" in part)
        assert on in line and figure in line
    # The choice needs no test figure at all.
    for row in a.rows:
        del row["test_error"]
    assert a.best["epoch"] == 2


def test_a_page_keeps_the_tables_that_the_roots_do_not_have(tmp_path):
    page = tmp_path / "page.md"
    log(tmp_path / "one" / "first" / "a" / "seed-0", [0.9, 0.1])
    log(tmp_path / "two" / "second" / "b" / "seed-0", [0.9, 0.2])
    pages.write([tmp_path / "one"], page)
    pages.write([tmp_path / "two"], page)
    assert "## first" in page.read_text() and "## second" in page.read_text()


def test_notes_are_tied_to_the_runs_they_speak_of(tmp_path):
    place = tmp_path / "page" / "t"
    for row in ("a", "b"):
        log(place / row / "seed-0", [0.9, 0.1])
    path = place / "notes.md"

    def notes(text=None):
        if text is not None:
            path.write_text(text)
        return pages.notes(path, report.collect([tmp_path / "page"])["t"])

    shown, stale = notes("<!-- runs: a -->\nOf a.\n\n<!-- runs: a, b -->\nOf both.\n")
    tied = path.read_text()
    assert stale == [] and shown == tied and re.search(r"-->\nOf a[^>]*<!-- runs: a \w{6}, b \w{6} -->\nOf both", tied)
    assert notes() == (tied, [])
    # Another run of b: what speaks of b is marked, what does not is not.
    shutil.rmtree(place / "b")
    log(place / "b" / "seed-0", [0.9, 0.1, 0.05])
    shown, (line,) = notes()
    assert line == f"{path}: runs of b have changed since this was written" and path.read_text() == tied
    before, after = shown.split("Of a.")
    assert "With care" not in before and "**With care: runs of b have changed" in after
    shown, (line,) = notes("<!-- runs: b, c -->\nOf what is not there.\n")
    assert line.endswith("there are no runs of c here") and "no runs of c here" in shown
    shown, (line,) = notes("Of what?\n")
    assert "does not start with a line <!-- runs:" in line and "not named" in shown


def test_a_page_has_its_notes_and_says_which_are_of_other_runs(tmp_path, capsys):
    log(tmp_path / "one" / "t" / "a" / "seed-0", [0.9, 0.1])
    (tmp_path / "page" / "t").mkdir(parents=True)
    (tmp_path / "page" / "t" / "notes.md").write_text("<!-- runs: b -->\nOf b.\n")
    cli.main(["report", str(tmp_path / "one"), "--to", str(tmp_path / "page.md")])
    assert "notes.md: there are no runs of b here" in capsys.readouterr().err
    page = (tmp_path / "page.md").read_text()
    assert "Of b." in page
    for name in re.findall(r"\]\((\S+png)\)", page):
        assert (tmp_path / name).exists(), name
    assert "page/overview.png" in page and "page/t/curves.png" in page


def test_a_row_is_one_experiment_and_says_what_no_commit_has(tmp_path):
    log(tmp_path / "t" / "a" / "seed-0", [0.9, 0.1], commit="c-dirty")
    log(tmp_path / "t" / "a" / "seed-1", [0.9, 0.2])
    (rows,) = report.collect([tmp_path]).values()
    head, _, line = report.table(rows, "github").splitlines()
    cells = dict(zip(*([cell.strip() for cell in part.split("|")] for part in (head, line)), strict=True))
    assert (cells["seeds"], cells["uncommitted code (seed)"], cells["test error %"]) == (
        "0, 1",
        "0",
        "15.00\xa0±\xa07.07",
    )
    log(tmp_path / "t" / "a" / "seed-2", [0.9, 0.2], lr=0.5)
    with pytest.raises(ValueError, match=r"optimizer\.lr: 0\.1 in .*seed-0, 0\.5 in .*seed-2; want one experiment"):
        report.collect([tmp_path])


@pytest.mark.parametrize(
    ("angles", "weights", "gradients"),
    [
        # Nothing is sent back to the input, and the last layer's gradient is exact.
        (("angle_weight/a", "angle_weight/b", "angle_grad/a", "angle_grad/b"), ["b"], ["a"]),
        # Another rule without angles of weights, in the first layer or in the last.
        (("angle_weight/b", "angle_grad/a", "angle_grad/b"), ["b"], ["a"]),
        (("angle_weight/a", "angle_grad/a", "angle_grad/b"), [], ["a"]),
        # Target propagation has no inverse of its first layer.
        (("angle_weight/2", "angle_weight/3", "angle_grad/1", "angle_grad/2", "angle_grad/3"), ["2", "3"], ["1", "2"]),
    ],
)
def test_angles_are_of_the_layers_that_say_something(tmp_path, angles, weights, gradients):
    row = {name: float(number) for number, name in enumerate(angles)}
    for kind, wanted in (("angle_weight", weights), ("angle_grad", gradients)):
        assert report.columns(row, kind) == [f"{kind}/{name}" for name in wanted]
    log(tmp_path / "t" / "a" / "seed-0", [0.9, 0.1], more=row)
    said = report.layers(report.collect([tmp_path])["t"])
    assert f'"to BP °" is the mean over the layers {gradients[0]}' in said


def test_pictures(tmp_path):
    for row, ends in {"a": (0.1, 0.2), "b": (0.3,), "lost": (math.nan,)}.items():
        for seed, end in enumerate(ends):
            log(
                tmp_path / "t" / row / f"seed-{seed}",
                [0.9, 0.5, end],
                losses=[None, 1.0, None if row == "lost" else 1.0],
            )
    rows = report.collect([tmp_path])["t"]
    pictures.curves(rows, "t", tmp_path / "curves.png")
    pictures.overview({"t": rows[:2]}, tmp_path / "overview.png")
    # Of rows without angles and of back-propagation, whose are 0, there is nothing to see.
    measured = {"angle_grad/1": 0.0, "angle_grad/2": 0.0}
    log(tmp_path / "u" / "bp" / "seed-0", [0.9, 0.1], more=measured, rule="backprop")
    for table in (rows, report.collect([tmp_path])["u"]):
        assert not pictures.angles(table, "t", tmp_path / "angles.png") and not (tmp_path / "angles.png").exists()
    log(tmp_path / "u" / "fa" / "seed-0", [0.9, 0.1])
    log(tmp_path / "u" / "fa" / "seed-1", [0.9, 0.1], more=measured)
    # Without a gradient there is no angle.
    log(tmp_path / "u" / "fa" / "seed-2", [0.9, 0.1], more=dict.fromkeys(measured))
    assert pictures.angles(report.collect([tmp_path])["u"], "t", tmp_path / "angles.png")
    for name in ("curves", "angles", "overview"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 500
    assert len(set(pictures.COLOURS.values())) == len(pictures.COLOURS)
    # A colour for each, and for each its own.
    assert pictures.COLOURS.keys() == {*experiment.RULES, *experiment.DIRECT, *experiment.VARIANTS}


def test_report_refuses_what_it_would_lose(tmp_path, capsys):
    page = tmp_path / "page.md"
    log(tmp_path / "one" / "t" / "a" / "seed-0", [0.9, 0.1])
    pages.write([tmp_path / "one"], page)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    log(tmp_path / "two" / "t" / "a" / "seed-0", [0.9, 0.2, 0.1], lr=0.5)
    (tmp_path / "empty").mkdir()
    for root, message in (("two", "optimizer.lr: 0.5 in"), ("empty", "no runs in it"), ("missing", "no runs in it")):
        with pytest.raises(ValueError, match=message):
            pages.write([tmp_path / root], page)
    assert all(path.read_bytes() == content for path, content in before.items())
    (tmp_path / "own.md").write_text("# Results\n\nOf my own.\n")
    for name, message in (("own.md", "is no page of report"), ("page", "want a file whose name ends in .md")):
        with pytest.raises(ValueError, match=message):
            pages.write([tmp_path / "one"], tmp_path / name)
    assert (tmp_path / "own.md").read_text().endswith("Of my own.\n") and not (tmp_path / "own").exists()
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path / "one")])
    assert "--to" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]\n", "{}\n{}\n", '{"row": "a"}\n'])
def test_report_names_a_damaged_log(tmp_path, text):
    log(tmp_path / "t" / "a" / "seed-0", [0.9, 0.1])
    path = tmp_path / "t" / "a" / "seed-0" / "log.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)):
        report.collect([tmp_path])


def test_failed_runs_are_marked_and_in_no_order(tmp_path):
    # Chance of ten classes is 0.9, and its standard error over 10,000 images 0.003.
    ends = {"a": 0.1, "b": 0.2, "c": 0.3, "chance": 0.9089, "worse": 0.8911, "learns": 0.890}
    for name, end in ends.items():
        log(tmp_path / "t" / name / "seed-3", [0.95, 0.05, end])
    log(tmp_path / "t" / "nan" / "seed-3", [0.9, 0.1, 0.1], losses=[None, 1.0, None])
    (rows,) = report.collect([tmp_path]).values()
    failed = {runs[0].header["row"]: runs[0].failed for runs in rows}
    assert failed == dict.fromkeys(("a", "b", "c", "learns"), "") | {
        "chance": "collapsed",
        "worse": "collapsed",
        "nan": "diverged",
    }
    shown = report.order(rows)
    assert "chance" not in shown and "nan" not in shown and "learns" in shown
    lines = {line.split()[0]: line for line in report.table(rows).splitlines()[2:]}
    assert "collapsed (3)" in lines["chance"] and "30.00" in lines["c"] and "5.00" in lines["c"]
