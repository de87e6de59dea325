"""`recipes run` on many ranks: one run of all of them, that goes on with another number after a process was killed."""

import collections
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import fresh
import pytest
import torch
from PIL import Image

pytest.importorskip("pycocotools")
from recipes import __main__ as cli
from recipes import checkpoint, data, experiment, learn, world
from recipes import run as runner

pytestmark = pytest.mark.usefixtures("one_thread")

TABLE = """
data = { name = "digits", validation = 0 }
model = { name = "mlp" }
algorithm = { name = "usf" }
optimizer = { name = "sgd", lr = 0.05, momentum = 0.9 }
train = { epochs = 2, batch_size = 64, warmup = 1 }
"""
IMAGES, STEPS = 256, 4

# One process that imports everything and forks the ranks of each launch. An image's number is in its first pixel, and a
# rank writes down what it trains on.
PROGRAM = """
import json, multiprocessing, os, shutil, signal, socket, sys
import torch, torch.distributed.fsdp, torch.distributed.tensor
torch.set_num_threads(1)
from recipes import __main__ as cli, checkpoint, data, pictures
from recipes import run as runner

folder, images = sys.argv[1], int(sys.argv[2])
load, given, give, write, fsync = data.load, runner._Steps.__iter__, checkpoint.save, checkpoint.write, os.fsync
saved, pictures.curves = {}, lambda *args: None

def numbered(*args):
    loaded = load(*args)
    for part in (loaded.train, loaded.test):
        part.tensors = tuple(t[:images].clone() for t in part.tensors)
        part.tensors[0][:, 0, 0, 0] = torch.arange(len(part.tensors[0])) / images
    return loaded

def noted(steps):
    for step, (x, y) in enumerate(given(steps), steps.first + 1):
        numbers = (x[:, 0, 0, 0] * images).round().int().tolist()
        with open(os.environ["NOTES"], "a") as notes:
            notes.write(json.dumps([steps.numbers[1], step, numbers]) + "\\n")
        yield x, y

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def before_the_log(path, content):
    if path.name == "log.jsonl" and content.count(b"\\n") == 3:
        kill()
    write(path, content)

def within_the_write(path, content):
    def half(file):
        os.ftruncate(file, len(content) // 2)
        kill()
    os.fsync = half if path.name == "checkpoint.pt" and saved["within"] == 3 and len(saved["rows"]) == 2 else fsync
    write(path, content)

def save(path, content):
    saved.update(rows=content["rows"], within=content["within"].get("step"))
    give(path, content)

data.load, runner._Steps.__iter__, checkpoint.save = numbered, noted, save

def rank(rank, size, ports, runs):
    for port, (out, killed, args) in zip(ports, runs):
        if size > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ["NOTES"] = f"{folder}/{out}-{size}-{rank}.notes"
        if rank == 0 and killed:
            checkpoint.write = globals()[killed]
        cli.main(["run", f"{folder}/table/row.toml", "--device", "cpu", "--out", f"{folder}/{out}", *args])

def launch(size, *runs):
    free = [socket.create_server(("127.0.0.1", 0)) for _ in runs]
    ports = [one.getsockname()[1] for one in free]
    for one in free:
        one.close()
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=rank, args=(r, size, ports, runs)) for r in range(size)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join()
    return [one.exitcode for one in ranks]

ddp, fsdp2 = ["--parallel", "ddp"], ["--parallel", "fsdp2", "--checkpoint-steps", "1"]
plain, aligned = (["--set", f"algorithm.name={name}"] for name in ("backprop", "aa"))
codes = {"two": launch(
    2,
    ("ddp", "", [*ddp, "--set", "train.accumulate=2"]),
    ("fsdp2", "", fsdp2),
    ("plain", "", [*fsdp2, *plain]),
    ("aligned", "", [*ddp, *aligned]),
    ("log", "before_the_log", ddp),
)}
codes["write"] = launch(2, ("write", "within_the_write", fsdp2))
for out in ("log", "write"):
    shutil.copytree(f"{folder}/{out}", f"{folder}/{out}4")
codes["four"] = launch(4, ("log4", "", fsdp2), ("write4", "", ddp))
alone = [("one", "", []), ("one-plain", "", plain), ("one-aligned", "", aligned)]
codes["one"] = launch(1, *alone, ("log", "", []), ("write", "", []))
print("\\n" + json.dumps(codes))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "table").mkdir()
    (folder / "table" / "row.toml").write_text(TABLE)
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = fresh.run(PROGRAM, str(folder), str(IMAGES), environment=os.environ | paths)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def _end(folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    (run,) = folder.glob("*/row/seed-0")
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()[1:]]
    return rows, checkpoint.load(run / "checkpoint.pt")["model"]


@pytest.mark.slow
@pytest.mark.parametrize("out", ["ddp", "fsdp2", "plain", "aligned", "log", "write", "log4", "write4"])
def test_ranks_train_as_one_process(runs, out):
    folder, codes = runs
    assert codes["one"] == [0] and codes["four"] == [0] * 4
    same = f"one-{out}" if out in ("plain", "aligned") else "one"
    (rows, model), (wanted, one) = _end(folder / out), _end(folder / same)
    assert len(rows) == 3
    for row, other in zip(rows, wanted, strict=True):
        assert row.keys() == other.keys()
        for name in set(row) - {"seconds"}:
            # Before the first step there is no loss of training.
            assert row[name] == other[name] or row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
    for name, weight in one.items():
        torch.testing.assert_close(model[name], weight, rtol=1e-3, atol=1e-5)


def _notes(folder: Path, out: str, size: int) -> list[tuple[int, int, list[int]]]:
    return [json.loads(line) for path in folder.glob(f"{out}-{size}-*.notes") for line in path.open()]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize(("out", "kept"), [("log", (1, STEPS)), ("write", (2, 2))])
def test_no_image_is_lost_or_doubled_when_a_rank_is_killed(runs, out, kept, ranks):
    folder, codes = runs
    assert codes["two" if out == "log" else out][0] == -9
    before, after = _notes(folder, out, 2), _notes(folder, out + ("4" if ranks == 4 else ""), ranks)
    # The killed rank had got further than what was kept.
    assert out == "log" or max(tuple(note[:2]) for note in before) > kept
    for epoch in (1, 2):
        seen = [n for e, step, numbers in before if e == epoch and (e, step) <= kept for n in numbers]
        seen += [n for e, _, numbers in after if e == epoch for n in numbers]
        assert collections.Counter(seen) == collections.Counter(range(IMAGES)), epoch
    assert all((epoch, step) > kept for epoch, step, _ in after)


def test_the_batches_of_ranks_are_parts_of_ones(tmp_path):
    """Order, augmentation and the place within an epoch are the same with any number of ranks and workers."""
    for split, count in (("train", 10), ("val", 5)):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (20, 20, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    loaded = data.load(f"imagefolder:{tmp_path}", "", 8, 3)

    def batches(first=0, **options):
        made = data.Batches(loaded.train, 8, torch.Generator().manual_seed(3), only=torch.arange(1, 20), **options)
        made.order.first = first
        return list(made)

    whole = batches()
    assert [len(y) for _, y in whole] == [8, 8]
    assert not torch.equal(whole[0][0], whole[1][0])
    for ranks in (1, 2, 4):
        parts = [batches(1, rank=rank, ranks=ranks, workers=rank % 2) for rank in range(ranks)]
        assert all(len(part) == 1 for part in parts)
        for k in range(2):
            assert torch.equal(torch.cat([part[0][k] for part in parts]), whole[1][k])
    # Tests: every image once, and equally many batches on each rank, which sums over ranks need.
    for ranks in (1, 2, 3):
        made = [data.Batches(loaded.test, 2, rank=rank, ranks=ranks) for rank in range(ranks)]
        numbers = [[n for n, _ in batch] for one in made for batch in one.order]
        assert sorted(n for batch in numbers for n in batch) == list(range(10))
        assert all(numbers) and max(map(len, numbers)) <= 2
        assert len({len(one) for one in made}) == 1


def test_parts_of_a_batch_add_up_to_it():
    x, y = torch.randn(8, 1, 4, 4), torch.arange(8)
    for name in ("usf", "drtp"):
        ends = []
        for parts in (1, 4):
            content = {"model": {"name": "mlp"}, "algorithm": {"name": name}, "train": {"accumulate": parts}}
            trained = learn.build(experiment.check(content), (1, 4, 4), 10, 0, "cpu")
            loss = trained.epoch([(x, y)] * 2)
            ends.append([torch.tensor(loss), *trained.model.parameters()])
        for one, other in zip(*ends, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("cosine", [False, True])
def test_rates_rise_first(cosine):
    rates = {}
    for warmup in (0, 3):
        train = {"epochs": 6, "warmup": warmup, "cosine": cosine, "milestones": [] if cosine else [5]}
        e = experiment.check({"algorithm": {"name": "usf"}, "train": train})
        optimizer = torch.optim.SGD([torch.zeros(1)], 0.8)
        scheduler, rates[warmup] = runner._scheduler(e, optimizer), []
        for _ in range(6):
            rates[warmup].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    factors = [a / b for a, b in zip(rates[3], rates[0], strict=True)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


@pytest.mark.parametrize(
    ("ranks", "args", "message"),
    [
        ("2", [], "--parallel: got none, want run --parallel ddp or fsdp2 under torchrun, whose 2 processes"),
        ("", ["--parallel", "ddp"], "--parallel: got ddp, want it after torchrun --nproc-per-node N"),
        ("", ["--set", "train.accumulate=3"], "train.batch_size: got 64, want a multiple of 1 ranks times 3 parts"),
        ("", ["--checkpoint-steps", "1", "--set", "algorithm.name=fw_dtp"], "want none with target propagation"),
        ("", ["--set", "train.accumulate=2", "--set", "algorithm.name=fw_dtp"], "train.accumulate: got 2, want 1"),
        ("", ["--checkpoint-steps", "-3"], "--checkpoint-steps: got '-3', want whole numbers of at least 0"),
        ("", ["--workers", "-1"], "--workers: got '-1', want whole numbers of at least 0"),
        ("", ["--set", "train.warmup=-1"], "train.warmup: got -1, want at least 0"),
    ],
)
def test_what_does_not_go_together_is_said(tmp_path, monkeypatch, capsys, ranks, args, message):
    if ranks:
        monkeypatch.setenv("WORLD_SIZE", ranks)
    path = tmp_path / "row.toml"
    path.write_text(TABLE)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", str(path), "--device", "cpu", "--out", str(tmp_path / "out"), *args])
    assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_figures_go_to_tensorboard(tmp_path, monkeypatch, capsys):
    path, added = tmp_path / "row.toml", []
    path.write_text(TABLE)
    args = ["run", str(path), "--device", "cpu", "--tensorboard", "--no-measure", "--set", "train.warmup=0"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit):
        cli.main([*args, "--out", str(tmp_path / "without")])
    assert "--tensorboard: " in (said := capsys.readouterr().err) and "pip install tensorboard" in said

    class Writer:
        def __init__(self, folder, purge_step):
            added.append(purge_step)

        def add_scalar(self, name, value, epoch):
            added.append((name, value, epoch))

        def close(self):
            added.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    for epochs in (1, 2):
        cli.main([*args, "--out", str(tmp_path / "out"), "--set", f"train.epochs={epochs}"])
    (log,) = tmp_path.glob("out/*/row/seed-0/log.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    # A run that goes on takes back what came after its checkpoint.
    assert [one for one in added if not isinstance(one, tuple)] == [0, "closed", 2, "closed"]
    found = {(name, epoch): value for name, value, epoch in filter(lambda one: isinstance(one, tuple), added)}
    assert found == pytest.approx({(n, r["epoch"]): r[n] for r in rows for n in r if r[n] is not None}, rel=1e-4)


@pytest.mark.parametrize("name", ["sdfa", *experiment.VARIANTS])
def test_what_ranks_would_do_apart_is_refused(name):
    content = {"model": {"name": "mlp"}, "algorithm": {"name": name}}
    if name in experiment.VARIANTS and experiment.VARIANTS[name].inverse_loss is not None:
        content["inverse_optimizer"] = {"name": "sgd", "lr": 0.1}
    with pytest.raises(ValueError, match=f"--parallel: got ddp with {name}, which one process trains: "):
        learn.build(experiment.check(content), (1, 4, 4), 10, 0, "cpu", world.World("ddp", 0, 2))


def test_batch_norm_over_ranks_needs_gpus():
    e = experiment.check({"model": {"name": "lenet"}, "algorithm": {"name": "usf"}, "train": {"sync_bn": True}})
    with pytest.raises(ValueError, match=r"train\.sync_bn: got true on a CPU"):
        learn.build(e, (1, 28, 28), 10, 0, "cpu", world.World("ddp", 0, 2))
