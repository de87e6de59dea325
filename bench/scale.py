"""A data-parallel step by arithmetic: bytes, memory, time. `python -m bench.scale` prints the tables of docs/scale.md.

What FSDP2 gathers is counted as it does it: every Parameter by itself, its first dimension padded to a multiple of the
ranks. A ring sends (n - 1) / n of that from each GPU, and twice for an all-reduce (nccl-tests, doc/PERFORMANCE.md).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import bioplaus_kernels as bk
from bioplaus_kernels.backends.reference.pack_signs import packed_shape
from recipes.models import bartunov

GPUS = (8, 64, 1024)
# DGX H100: bytes a second of NVLink in each direction from a GPU, of eight 400 Gb/s adapters a node, one a GPU, and of
# one a node; bf16 products and memory of a GPU.
NVLINK, EIGHT, ONE = 450e9, 400e9, 50e9
PEAK, MEMORY = 989e12, 3.35e12
# Bytes of an element: gathered, reduced, kept.
GATHERED, REDUCED, KEPT = 2, 4, 4

WAYS = {"DDP": "DDP", "True": "FSDP2, reshard True", "False": "FSDP2, reshard False", "ours": "ours, usf"}
NODE = 8


class Transformer(nn.Module):
    """24 blocks of width 2048, as GPT-3 XL (Brown et al. 2020, table 2.1), and 50,257 tokens, tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50257, 2048), nn.Embedding(2048, 2048)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(2048, 16, 8192, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(24)
        )
        self.norm = nn.LayerNorm(2048)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.norm(h) @ self.tokens.weight.T


def _images(size: int) -> Tensor:
    return torch.empty(1, 3, size, size)


class Net(NamedTuple):
    """A model for the meta device. samples: of each GPU a step."""

    name: str
    build: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    samples: int
    momenta: int  # numbers that the optimizer keeps of each weight


NETS = (
    Net("ResNet-18, 256 images", torchvision.models.resnet18, lambda: _images(224), 256, 1),
    Net("ResNet-152, 128 images", torchvision.models.resnet152, lambda: _images(224), 128, 1),
    Net(
        "Transformer of 1.3 billion weights, 4 sequences of 2048",
        Transformer,
        lambda: torch.zeros(1, 2048, dtype=torch.long),
        4,
        2,
    ),
    Net(
        "Locally-connected net of Bartunov et al. for ImageNet, 128 images",
        lambda: bartunov.lc(bartunov.SPECS["imagenet"], 3, 224, 1000),
        lambda: _images(224),
        128,
        2,
    ),
)


@dataclass
class Step:
    """Of one rank: elements that come out of its all-gathers, forward and backward, and go into its reductions; bytes
    of weights, or signs, that stay from forward to backward; elements of its shards."""

    forward: int
    backward: int
    reduced: int
    resident: int
    shards: int


def padded(p: Tensor, ranks: int) -> int:
    """Elements of all ranks' shards of p."""
    return -(-p.shape[0] // ranks) * ranks * p[0].numel() if p.dim() else ranks


def step(model: nn.Module, ranks: int, way: str) -> Step:
    """A step of `model`, converted with usf, in one of WAYS."""
    every = list(model.parameters())
    count = sum(p.numel() for p in every)
    if way == "DDP":
        # autocast keeps a copy of each weight in the dtype it computes in.
        return Step(0, 0, 2 * count, GATHERED * count, count)
    whole = sum(padded(p, ranks) for p in every)
    shards = whole // ranks
    if way == "True":
        return Step(whole, whole, whole, 0, shards)
    if way == "False":
        return Step(whole, 0, whole, GATHERED * whole, shards)
    layers = [m for m in model.modules() if isinstance(m, bk.nn.FeedbackLayer)]
    free = {p for layer in layers for p in layer.parameters()}
    signs = sum(4 * math.prod(packed_shape(getattr(m, w).shape)) for m in layers for w in m.weights())
    kept = sum(padded(p, ranks) for p in every if p not in free)
    return Step(whole, 0, whole, GATHERED * kept + signs, shards)


class Traffic(NamedTuple):
    """Of one GPU: bytes that it sends, and seconds of them in the forward and the backward."""

    sent: float
    forward: float
    backward: float


def traffic(step: Step, ranks: int, nodes: int, adapters: float) -> Traffic:
    """Of a step among `ranks`, the sums of each shard then among as many replicas as there are `nodes`, if more than 1.

    adapters: bytes a second into the network of all GPUs of a node together.
    """
    sent = [
        n * (ranks - 1) / ranks for n in (step.forward * GATHERED, step.backward * GATHERED + step.reduced * REDUCED)
    ]
    rate = NVLINK if ranks <= NODE else adapters
    between = 2 * (nodes - 1) / nodes * step.shards * REDUCED
    return Traffic(sum(sent) + between, sent[0] / rate, sent[1] / rate + between * NODE / adapters)


def table(net: Net) -> str:
    """A net's table in Markdown, below what a step computes."""
    with torch.device("meta"):
        model = net.build()
        with FlopCounterMode(display=False) as flops:
            model(net.input()).sum().backward()
    model.zero_grad()
    bk.convert_(model, "usf")
    count = sum(p.numel() for p in model.parameters())
    products = net.samples * flops.get_total_flops() / PEAK
    weights = count * (2 * GATHERED + REDUCED) / MEMORY
    compute = max(products, weights)
    lines = []
    for gpus in GPUS:
        nodes = gpus // NODE
        rows = [(label, step(model, gpus, way), gpus, 1) for way, label in WAYS.items()]
        if nodes > 1:
            hybrid = [(way, step(model, NODE, way)) for way in ("True", "ours")]
            rows += [(f"{WAYS[way]}, {NODE} x {nodes}", s, NODE, nodes) for way, s in hybrid]
        first = traffic(rows[1][1], gpus, 1, EIGHT).sent
        for label, s, ranks, replicas in rows:
            line = [gpus, label, s.shards * KEPT * (2 + net.momenta) / 1e6, s.resident / 1e6]
            line += [traffic(s, ranks, replicas, EIGHT).sent / size for size in (1e6, first)]
            for adapters in (EIGHT, ONE) if nodes > 1 else (EIGHT,):
                t = traffic(s, ranks, replicas, adapters)
                overlapped = max(compute / 3, t.forward) + max(2 * compute / 3, t.backward)
                line += [1e3 * (t.forward + t.backward), 1e3 * overlapped]
            lines.append(line)
    head = ["GPUs", "way", "state, MB", "resident, MB", "sent, MB", "of True's"]
    head += ["traffic, ms", "step, ms", "1 adapter: traffic, ms", "step, ms"]
    formats = ("", "", ".1f", ".1f", ".0f", ".2f", ".2f", ".2f", ".2f", ".2f")
    bound = "products at their peak rate" if products > weights else "reading and writing the weights at the peak rate"
    said = f"{count / 1e6:.1f} million weights and biases; {1e3 * compute:.2f} ms a step of computing: {bound}."
    return f"### {net.name}\n\n{said}\n\n{tabulate(lines, head, 'github', floatfmt=formats)}"


def main() -> None:
    print("\n\n".join(map(table, NETS)))


if __name__ == "__main__":
    main()
