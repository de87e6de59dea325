"""BioTorch's own LeNet under the protocol of this folder's rows: what its code does at a rate it does not publish.

python recipes/experiments/biotorch-fashion-mnist/peer.py brsf --lr 0.1 --epochs 10 --seeds 0,1,2

needs the package biotorch. Its logs are a row of the table, runs/biotorch-fashion-mnist/peer-brsf-0.1, as `python -m
recipes report` reads them.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parents[3]))
from recipes import checkpoint, data
from recipes.run import machine, order

RULES = {"backpropagation": "backprop", "usf": "usf", "frsf": "frsf", "brsf": "brsf", "fa": "fa"}
VALIDATION = 0.1


def train(rule: str, lr: float, epochs: int, seed: int, data_root: str, folder: Path) -> None:
    """Train BioTorch's LeNet by `rule`, with the log of each epoch in `folder`."""
    torch.manual_seed(seed)
    options = {"init": "xavier", "constrain_weights": False, "gradient_clip": False}
    with contextlib.redirect_stdout(io.StringIO()):
        made = importlib.import_module(f"biotorch.models.{rule}.le_net")
        model = made.le_net_mnist(layer_config={"type": rule, "options": options})
    images = data.load("fashion-mnist", data_root, 32, 1)
    kept, validation = images.split(VALIDATION)
    shuffle = torch.Generator()
    batches = data.Batches(images.train, 64, shuffle, only=kept)
    held = {
        "validation": data.Batches(images.train, 500, only=validation),
        "test": data.Batches(images.test, 500),
    }
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-3)
    path = "recipes/experiments/biotorch-fashion-mnist/peer.py"
    header = {
        "row": f"BioTorch's code, {rule}, rate {lr:g}",
        "seed": seed,
        "published": {},
        "experiment": {
            "data": {"name": "fashion-mnist", "size": 32, "validation": VALIDATION},
            "algorithm": {"name": RULES[rule], "by": "biotorch"},
            "optimizer": {"name": "sgd", "lr": lr, "momentum": 0.9, "weight_decay": 1e-3},
            "train": {"epochs": epochs, "batch_size": 64},
        },
        "classes": 10,
        "test_images": len(images.test),
        **machine(),
        "command": f"python {path} {rule} --lr {lr:g} --epochs {epochs} --seeds {seed}",
    }
    rows = []
    for epoch in range(epochs + 1):
        losses = []
        if epoch:
            shuffle.manual_seed(order(seed, epoch))
            for x, y in batches:
                loss = cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        loss = sum(losses) / len(losses) if losses else math.nan
        row = {"epoch": epoch, "train_loss": loss if math.isfinite(loss) else None}
        with torch.no_grad():
            for split, part in held.items():
                row[f"{split}_error"] = sum((model(x).argmax(1) != y).sum().item() for x, y in part) / part.count
        rows.append(row)
        checkpoint.write(folder / "log.jsonl", "".join(json.dumps(part) + "\n" for part in (header, *rows)).encode())
        print(f"seed {seed} {epoch}/{epochs}: test_error {row['test_error']:.4f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rule", choices=list(RULES))
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    given = parser.parse_args()
    if importlib.util.find_spec("biotorch") is None:
        parser.error("the package biotorch is not installed: pip install biotorch")
    for seed in map(int, given.seeds.split(",")):
        folder = given.out / "biotorch-fashion-mnist" / f"peer-{given.rule}-{given.lr:g}" / f"seed-{seed}"
        with checkpoint.lock(folder):
            train(given.rule, given.lr, given.epochs, seed, given.data_root, folder)
