"""BioTorch's own LeNet under the protocol of this folder's rows: what its code does at a rate it does not publish.

python recipes/experiments/biotorch-fashion-mnist/peer.py brsf --lr 0.1 --epochs 10 --seeds 0,1,2

needs the package biotorch and prints the best test error of each seed, in %.
"""

import argparse
import contextlib
import importlib.util
import io
import statistics
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parents[3]))
from recipes import data


def best_error(rule: str, lr: float, epochs: int, seed: int, data_root: str) -> float:
    """The lowest test error, in %, of BioTorch's LeNet trained by `rule`."""
    torch.manual_seed(seed)
    options = {"init": "xavier", "constrain_weights": False, "gradient_clip": False}
    with contextlib.redirect_stdout(io.StringIO()):
        made = importlib.import_module(f"biotorch.models.{rule}.le_net")
        model = made.le_net_mnist(layer_config={"type": rule, "options": options})
    images = data.load("fashion-mnist", data_root, 32, 1)
    train = data.Batches(images.train, 64, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-3)
    best = 100.0
    for _ in range(epochs):
        for x, y in train:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            wrong = sum((model(x).argmax(1) != y).sum().item() for x, y in data.Batches(images.test, 500))
        best = min(best, 100 * wrong / len(images.test))
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rule", choices=["usf", "frsf", "brsf", "fa", "backpropagation"])
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--data-root", default="data")
    given = parser.parse_args()
    if importlib.util.find_spec("biotorch") is None:
        parser.error("the package biotorch is not installed: pip install biotorch")
    errors = []
    for seed in map(int, given.seeds.split(",")):
        errors.append(best_error(given.rule, given.lr, given.epochs, seed, given.data_root))
        print(f"seed {seed}: {errors[-1]:.2f}", flush=True)
    if len(errors) > 1:
        print(f"{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f}")
