"""Makes docs/pictures: what each rule's B is, its angles over training, and the error by depth, on real digits; and the
errors of docs/results beside the times of bench/results.

    python scripts/pictures.py [rules] [angles] [depth] [headline]

Minutes on one core; the figures of docs/choose.md are printed.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.ticker import NullLocator
from sklearn.datasets import load_digits
from torch import Tensor, nn

import bioplaus_kernels as bk

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))
from recipes.pictures import COLOURS, apart  # noqa: E402
from recipes.report import collect  # noqa: E402

OUT = ROOT / "docs" / "pictures"
DEPTHS, SEEDS, EPOCHS = (1, 2, 4, 8, 16), (0, 1, 2), 40
Step = Callable[[nn.Module, Tensor], None]


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,437 images of 8 x 8 to train on, 360 to test."""
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[360:], y[360:], x[:360], y[:360]


def network(depth: int, width: int = 64) -> nn.Sequential:
    """`depth` hidden layers of tanh, Glorot's weights, zero biases."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Linear(width if i else 64, width), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    for layer in model[::2]:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def give(model: nn.Sequential, rule: str) -> nn.Module:
    """The model with the rule; direct feedback goes to every nonlinearity."""
    if rule == "dfa":
        blocks = [name for name, module in model.named_children() if isinstance(module, nn.Tanh)]
        return bk.DirectFeedback(model, blocks, "dfa", example=torch.zeros(1, 64))
    bk.convert_(model, rule)
    return model


def train(model: nn.Module, rule: str, epochs: int, seed: int, each: Callable[[], None] = lambda: None) -> None:
    """SGD by batches of 64 with the updates that learned feedback takes; `each` before each epoch and at the end."""
    x, y, *_ = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        each()
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            if rule in ("sa", "aa", "ia"):
                bk.align_(model, x[batch])
            if rule == "wm":
                bk.mirror_(model, lr=0.05, decay=0.05, batch_size=64)
            optimizer.step()
    each()


def error(model: nn.Module) -> float:
    """Test error in per cent."""
    *_, x, y = digits()
    with torch.no_grad():
        return 100 * (model(x).argmax(1) != y).float().mean().item()


def save(figure: plt.Figure, name: str) -> None:
    """As a small PNG."""
    figure.savefig(OUT / f"{name}.png", dpi=100, metadata={"Software": ""})
    plt.close(figure)


def rules() -> None:
    """For each rule the second layer's W and B before training and after ten epochs, and the angle between them."""
    for name in bk.feedback.RULES:
        torch.manual_seed(0)
        model = network(2, width=24)
        bk.convert_(model, name)
        shown: list[tuple[Tensor, Tensor]] = []

        def look(model: nn.Sequential = model, shown: list[tuple[Tensor, Tensor]] = shown) -> None:
            layer = model[2]
            b = layer.feedback_matrix() if isinstance(layer, bk.nn.Linear) else layer.weight
            shown.append((layer.weight.detach().clone(), b.detach().clone()))

        train(model, name, 10, 0, look)
        figure, axes = plt.subplots(1, 4, figsize=(6.4, 1.75))
        figure.subplots_adjust(left=0.01, right=0.99, top=0.86, bottom=0.02, wspace=0.06)
        for pair, axs, when in ((shown[0], axes[:2], "at first"), (shown[-1], axes[2:], "trained")):
            angle = bk.metrics.compare(*pair).angle
            for matrix, ax, title in zip(pair, axs, (f"W {when}", f"B {when}, {angle:.0f}°"), strict=True):
                limit = 2 * matrix.square().mean().sqrt().item()
                ax.imshow(matrix, cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
                ax.set_title(title, fontsize=9)
                ax.set_axis_off()
        save(figure, f"rule-{name}")
        print(f"{name}: error {error(model):.1f} %")


def _labels(axes: plt.Axes, ends: dict[str, float]) -> None:
    for name, y in zip(ends, apart(axes, [*ends.values()], 0.07), strict=True):
        axes.text(1.02, y, name, color=COLOURS[name], fontsize=9, va="center", transform=axes.transAxes)
    axes.spines[["top", "right"]].set_visible(False)


def angles() -> None:
    """Angle of W to B in the middle of three layers, and of its gradient to back-propagation's, epoch by epoch."""
    x, y, *_ = digits()
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.0))
    figure.subplots_adjust(left=0.07, right=0.93, top=0.9, bottom=0.16, wspace=0.4)
    ends: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for rule in ("usf", "frsf", "brsf", "fa", "kp", "wm", "dfa"):
        torch.manual_seed(0)
        model = give(network(2), rule)
        found: tuple[list[float], list[float]] = ([], [])

        def look(model: nn.Module = model, found: tuple[list[float], list[float]] = found) -> None:
            weights = bk.metrics.weights(model)
            found[0].extend(c.angle for name, c in weights.items() if name.endswith("2.weight"))
            gradients = bk.metrics.updates(model, lambda: F.cross_entropy(model(x[:256]), y[:256]))
            found[1].append(next(c.angle for name, c in gradients.items() if name.endswith("0.weight")))

        train(model, rule, 30, 0, look)
        for ax, values, end in zip(axes, found, ends, strict=True):
            if values:
                ax.plot(values, color=COLOURS[rule], lw=1.6)
                end[rule] = values[-1]
    titles = "W to B, second layer", "gradient to back-propagation's, first layer"
    for ax, end, title in zip(axes, ends, titles, strict=True):
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_xlabel("epoch", fontsize=9)
        ax.set_ylim(0, 95)
        ax.set_yticks(range(0, 91, 30), [f"{v}°" for v in range(0, 91, 30)])
        ax.tick_params(labelsize=8)
        _labels(ax, end)
    save(figure, "angles")


def depth() -> None:
    """Test error by number of hidden layers: mean of three seeds of W, B and order."""
    figure, axes = plt.subplots(figsize=(5.2, 3.2))
    figure.subplots_adjust(left=0.12, right=0.85, top=0.96, bottom=0.15)
    ends = {}
    print("| rule | " + " | ".join(f"{d}" for d in DEPTHS) + " |\n|---|" + "---|" * len(DEPTHS))
    for rule in ("backprop", "usf", "frsf", "brsf", "kp", "fa", "dfa"):
        means, cells = [], []
        for hidden in DEPTHS:
            errors = []
            for seed in SEEDS:
                torch.manual_seed(seed)
                net = network(hidden)
                model = give(net, rule) if rule == "dfa" else net
                if rule != "dfa":
                    bk.convert_(net, rule, seed=seed)
                train(model, rule, EPOCHS, seed)
                errors.append(error(model))
            means.append(mean(errors))
            cells.append(f"{mean(errors):.1f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{stdev(errors):.1f}")
        print(f"| {rule} | " + " | ".join(cells) + " |", flush=True)
        axes.plot(means, marker="o", ms=3, lw=1.6, color=COLOURS[rule])
        ends[rule] = means[-1]
    axes.set_xticks(range(len(DEPTHS)), DEPTHS)
    axes.set_xlabel("hidden layers", fontsize=9)
    axes.set_ylabel("test error %", fontsize=9)
    axes.set_yscale("log")
    axes.set_ylim(1.5, 90)
    ticks = (2, 5, 10, 20, 50)
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8)
    _labels(axes, ends)
    save(figure, "depth")


def headline() -> None:
    """BioTorch's LeNet by rule: test errors, ours and published, and the time of a step, ours and BioTorch's."""
    rows = {runs[0].folder.parent.name: runs for runs in collect([ROOT / "docs" / "results"])["biotorch-fashion-mnist"]}
    timed = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())["rows"]
    ratios = {row["variant"]: row["ratio"] for row in timed if row["case"] == "LeNet N=64"}
    figure, (errors, times) = plt.subplots(1, 2, figsize=(7.6, 2.3), sharey=True)
    figure.subplots_adjust(left=0.06, right=0.97, top=0.9, bottom=0.3, wspace=0.06)
    names = {"bp": "backprop", "usf": "usf", "frsf": "frsf", "brsf": "brsf", "fa": "fa"}
    for y, (row, rule) in enumerate(names.items()):
        ours = 100 * mean(run.best["test_error"] for run in rows[row])
        _pair(errors, y, rule, ours, rows[row][0].header["published"]["test_error"], "{:.1f}")
        if rule != "backprop":
            _pair(times, y, rule, ratios[rule], ratios[f"BioTorch {rule}"], "{:.2f}")
    errors.set_yticks(range(len(names)), [name.upper() if name == "bp" else name for name in names])
    errors.set_ylim(4.5, -0.5)
    errors.set_xlim(8, 16.5)
    times.set_xlim(0.98, 1.32)
    times.axvline(1, color=COLOURS["backprop"], lw=1)
    errors.set_title("test error %, Fashion-MNIST, 100 epochs", fontsize=9, loc="left")
    times.set_title("time of a step / back-propagation's, CPU, batch 64", fontsize=9, loc="left")
    for axes in (errors, times):
        axes.tick_params(labelsize=8, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
    legend = "● ours    ◇ BioTorch's, published on the left, timed here on the right"
    figure.text(0.5, 0.06, legend, fontsize=8, ha="center")
    save(figure, "headline")


def _pair(axes: plt.Axes, y: int, rule: str, ours: float, theirs: float, form: str) -> None:
    axes.plot(theirs, y, "D", color="white", markeredgecolor="#777777", ms=6)
    axes.plot(ours, y, "o", color=COLOURS[rule])
    text = f"{form.format(ours)} ({form.format(theirs)})"
    axes.annotate(text, (max(ours, theirs), y), (7, 0), textcoords="offset points", va="center", fontsize=8)


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    for draw in (rules, angles, depth, headline):
        if draw.__name__ in (sys.argv[1:] or (draw.__name__,)):
            draw()
