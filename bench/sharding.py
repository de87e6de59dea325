"""Bytes that FSDP2 moves in a step and keeps between forward and backward, its two ways and `distributed.fully_shard`.

`torchrun --nproc-per-node 2 -m bench.sharding` prints the tables of docs/distributed.md.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

import bioplaus_kernels as bk

WAYS = ("reshard_after_forward=True", "reshard_after_forward=False", "bk.distributed.fully_shard")
RULES: dict[str, Any] = {
    "usf": "usf",
    "fa": "fa",
    "frsf": "frsf",
    "fa, stored": bk.FeedbackAlignment(stored=True),
    "kp": "kp",
}
POLICIES = {
    "float32": fsdp.MixedPrecisionPolicy(),
    "bfloat16, reduced in float32": fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.float32),
}
# A step of training.
WIDTH, LAYERS, BATCH, LENGTH, WORDS = 256, 4, 2, 16, 512


class Block(nn.Module):
    """A transformer's, of 12 width² weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Net(nn.Module):
    """Words to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        """Logits."""
        x = self.words(words)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Traffic(TorchDispatchMode):
    """Bytes of what is gathered and reduced, whole; a rank sends and receives (ranks − 1) / ranks of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and call."""
        if func is torch.ops.c10d._allgather_base_.default:
            self.gathered += args[0].nbytes
        elif func is torch.ops.c10d._reduce_scatter_base_.default:
            self.reduced += args[1].nbytes
        return func(*args, **(kwargs or {}))


def shard(model: nn.Module, way: str, mesh: Any, policy: Any) -> None:
    """Shard in one of `WAYS`, a group a block."""
    if way == WAYS[2]:
        bk.distributed.fully_shard(model, mesh=mesh, mp_policy=policy)
        return
    for block in (*model.blocks, model):
        fsdp.fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=way == WAYS[0])


def measure(rule: Any, way: str, mesh: Any, policy: Any) -> dict[str, int]:
    """Of one step: all-gathers, bytes gathered and reduced, and of weights and their signs what waits for the backward.

    What waits is what autograd saved (`saved_tensors_hooks`) or a module holds unsharded, whose storage is not freed.
    """
    torch.manual_seed(0)
    model = Net()
    bk.convert_(model, rule, seed=0)
    shard(model, way, mesh, policy)
    rank = torch.distributed.get_rank()
    words = torch.randint(WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(rank))
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    # The first forward is also the proof that the rule acts.
    with CommDebugMode() as calls:
        model(words).sum().backward()
    gathers = calls.get_comm_counts()[torch.ops.c10d._allgather_base_]
    model.zero_grad()
    with Traffic() as traffic:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(words).float().square().mean()
        # Unsharded Parameters and packed signs; views are of Parameters, too.
        waiting = [p for p in model.parameters() if not hasattr(p, "full_tensor")]
        waiting += [t for t in saved if t.dtype == torch.int32 or _is_parameter(t if t._base is None else t._base)]
        weights = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in waiting)}
        loss.backward()
    found = {"gathers": gathers, "gathered": traffic.gathered, "reduced": traffic.reduced}
    return found | {"waiting": sum(weights.values())}


def _is_parameter(tensor: Tensor) -> bool:
    return tensor.is_leaf and tensor.requires_grad


def every(mesh: Any) -> dict[tuple[str, str, str], dict[str, int]]:
    """`measure` of every rule, policy and way."""
    return {
        (policy, rule, way): measure(RULES[rule], way, mesh, POLICIES[policy])
        for policy in POLICIES
        for rule in RULES
        for way in WAYS
    }


def table(found: dict[tuple[str, str, str], dict[str, int]], policy: str) -> str:
    """Markdown, in kB."""
    lines = ["| | " + " | ".join(f"`{way}`" for way in WAYS) + " |", "|---|" + "---:|" * 3]
    for rule in RULES:
        for what in ("gathers", "gathered", "reduced", "waiting"):
            values = [found[policy, rule, way][what] for way in WAYS]
            cells = [f"{value if what == 'gathers' else round(value / 1e3):,}" for value in values]
            lines.append(f"| {rule}: {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables, on the first rank."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = every(torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    if torch.distributed.get_rank() == 0:
        for policy in POLICIES:
            sys.stdout.write(f"{policy}\n\n{table(found, policy)}\n\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
