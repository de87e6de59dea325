"""bk.distributed.fully_shard on models of many kinds: gradients, gathers and the report, on two ranks."""

import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import processes
import pytest
import small
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import bioplaus_kernels as bk
from bench import sharding

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

D = 16
MATCH = bk.SignSymmetry(scale="match")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def inner(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Recomputed(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.inner, x, use_reentrant=False)


class Around(nn.Module):
    """A checkpoint around a block, or around a part of one."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Mlp()])

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.parts[0], x, use_reentrant=False)


class Selective(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        saved = partial(create_selective_checkpoint_contexts, _keep_products)
        return x + checkpoint(self.inner, x, use_reentrant=False, context_fn=saved)


def _keep_products(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    product = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE


class Reused(Mlp):
    """Its layers called twice in a forward, one of them in every other forward alone."""

    def __init__(self) -> None:
        super().__init__()
        self.odd, self.calls = nn.Linear(D, D), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = super().forward(super().forward(x))
        return self.odd(x) if self.calls % 2 else x


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            outputs.append(self.out(h))
        return x + torch.stack(outputs, 1)


class Autoencoder(nn.Module):
    """A weight that is called and read."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.mid = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mid(torch.tanh(self.code(x))) @ self.code.weight


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(D, 2, batch_first=True), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x[:, :3])
        return x + self.out(self.attention(x, y, y, need_weights=False)[0])


class Raw(Mlp):
    """With what is no layer's, and a layer that has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.words = nn.Parameter(torch.randn(3, D)), nn.Embedding(4, D)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.table.mean(0) + self.words(torch.arange(2)).sum(0)


class Net(nn.Module):
    def __init__(self, block: Callable[[], nn.Module] = Mlp) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(11, D), nn.Linear(D, 11, bias=False)
        self.blocks = nn.Sequential(nn.Sequential(block(), block()), block())

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.blocks(self.words(words)))


def _tied() -> nn.Module:
    model = Net()
    model.head.weight = model.words.weight
    return model


def _tied_blocks() -> nn.Module:
    model = Net()
    model.blocks[1].up.weight = model.blocks[0][0].up.weight
    model.blocks[0][1].twin = nn.Linear(D, 2 * D)
    model.blocks[0][1].twin.weight = model.blocks[0][1].up.weight
    return model


def _computed() -> nn.Module:
    model = Net()
    nn.utils.parametrizations.weight_norm(model.blocks[1].up)
    nn.utils.parametrizations.orthogonal(model.blocks[0][0].up)
    return model


def _frozen() -> nn.Module:
    model = Net()
    for part in (model.words, model.blocks[0][0], model.blocks[0][1].up):
        part.requires_grad_(False)
    return model


def _wrapped() -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Net()
    model.blocks[0][0] = checkpoint_wrapper(model.blocks[0][0])
    return model


def _mixed(module: nn.Module, name: str) -> str:
    return "kp" if name.endswith("up") else "usf" if name.endswith("down") else "fa"


COMPUTED, SHARED = "its W is computed from other Parameters", "its weight is that of"
ANEW, TRAINED = "activation checkpointing computes its forward anew", "its B is trained"
# The model; the rule; all-gathers of the first and of the third step; of some rows the outcome and how why begins.
CASES: dict[str, tuple[Callable[[], nn.Module], Any, int, int, dict[str, tuple[str, str]]]] = {
    "plain": (Net, "usf", 5, 5, {"words": ("gathered and kept", "no rule")}),
    "a layer's own rules": (Net, _mixed, 11, 11, {"blocks.1.up": ("gathered twice", TRAINED)}),
    "low rank": (Net, "low_rank", 5, 5, {"blocks.1.up": ("gathered once", "its stored B is whole")}),
    "tied to an embedding": (_tied, "usf", 4, 4, {"head": ("gathered and kept", SHARED + " words")}),
    "tied layers": (_tied_blocks, "usf", 5, 5, {"blocks.1.up": ("gathered and kept", SHARED)}),
    "computed weights": (_computed, "usf", 9, 9, {"blocks.1.up": ("gathered twice", COMPUTED)}),
    "frozen layers": (_frozen, "usf", 5, 5, {}),
    "checkpoint_wrapper": (
        _wrapped,
        "usf",
        6,
        6,
        {"blocks.0.0._checkpoint_wrapped_module.up": ("gathered twice", ANEW)},
    ),
    "checkpoint": (partial(Net, Recomputed), "fa", 8, 8, {}),
    "checkpoint around": (partial(Net, Around), "usf", 8, 8, {}),
    "selective checkpoint": (partial(Net, Selective), "usf", 8, 8, {}),
    "layers used twice or not": (partial(Net, Reused), "usf", 5, 5, {}),
    "a cell at every step": (partial(Net, Cell), "usf", 5, 5, {}),
    "called and read": (partial(Net, Autoencoder), "usf", 8, 8, {}),
    "attention of two inputs": (partial(Net, Cross), "usf", 5, 5, {}),
    "a table": (partial(Net, Raw), "fa", 11, 11, {"blocks.1": ("gathered and kept", "no rule")}),
}


class Every(nn.Module):
    """Every layer with one rule, each on its own input."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gain = nn.Parameter(torch.ones(1))
        self.layers = nn.ModuleDict({name: make(small.RULES[rule]) for name, (make, _) in small.LAYERS.items()})

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(())
        for name, layer in self.layers.items():
            shape = small.LAYERS[name][1][1:]
            inputs = x[:, : math.prod(shape)].reshape(-1, *shape)
            total = total + small.call(layer, inputs * self.gain).square().mean()
        return total


def _every(rule: str, mesh: Any = None, rank: int = 0, world: int = 1) -> tuple[dict[str, Tensor], set[str]]:
    model, outcomes = Every(rule), set()
    if mesh is not None:
        outcomes = {row.outcome for row in bk.distributed.fully_shard(model, mesh=mesh).rows}
    size = max(math.prod(shape[1:]) for _, shape in small.LAYERS.values())
    x = torch.randn(4, size, generator=torch.Generator().manual_seed(6))
    model(x.chunk(world)[rank]).backward()
    return _gradients(model), outcomes


EVERY = [rule for rule in small.RULES if rule != "backprop"]


def _model(case: str) -> nn.Module:
    make, rule = CASES[case][:2]
    torch.manual_seed(0)
    model = make()
    bk.convert_(model, rule, seed=1)
    return model


def _words() -> Tensor:
    return torch.randint(11, (3, 8, 4), generator=torch.Generator().manual_seed(2))


def _step(model: nn.Module, words: Tensor, rank: int = 0, world: int = 1) -> None:
    model(words.chunk(world)[rank]).square().mean().backward()


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        name.replace("_orig_mod.", ""): g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()
    }


def _train(
    model: nn.Module, rank: int = 0, world: int = 1, begins: Callable[[], Any] = lambda: None
) -> list[dict[str, Tensor]]:
    found, optimizer = [], torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for words in _words():
        begins()
        _step(model, words, rank, world)
        found.append({name: grad.clone() for name, grad in _gradients(model).items()})
        optimizer.step()
        optimizer.zero_grad()
    return found


class Gathers:
    """Counts the all-gathers of FSDP, within selective checkpoints too."""

    def __init__(self) -> None:
        from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp

        self.counts: list[int] = []
        gather = fsdp.foreach_all_gather

        def counted(*args: Any) -> Any:
            self.counts[-1] += 1
            return gather(*args)

        fsdp.foreach_all_gather = counted
        self.begin: Callable[[], None] = lambda: self.counts.append(0)


def _work(rank: int, world: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    found: dict[str, Any] = {}
    gathers = Gathers()
    for case in CASES:
        model = _model(case)
        report = bk.distributed.fully_shard(model, mesh=mesh)
        gathers.counts = []
        grads = _train(model, rank, world, gathers.begin)
        rows = {row.name: (row.outcome, row.reason) for row in report.rows}
        found[case] = {"grads": grads, "gathers": gathers.counts, "rows": rows}
    gathers.begin()
    found["every"] = {rule: _every(rule, mesh, rank, world) for rule in EVERY}
    found["accumulated"] = _accumulate(_sharded(mesh), rank, world)
    found["saved"] = _saved(mesh, rank, world)
    found["compiled"] = _compiled(mesh, rank, world)
    found["compiled anew"] = [_compiled_anew(mesh, rank, world, parts) for parts in (False, True)]
    found["different"] = [_different(mesh, rank, *drawn) for drawn in (("fa", rank), (("fa", "usf")[rank], 1))]
    found["tools"] = _tools(_sharded(mesh), rank, world)
    found["bytes"] = {way: sharding.measure("usf", way, mesh, sharding.POLICIES["float32"]) for way in sharding.WAYS}
    found["aligned"] = _align(_sharded(mesh, "aa"), rank, world)
    model = _sharded(mesh)
    rows = bk.convert_(model, "kp").rows
    found["converted after"] = {row.name: row.reason for row in rows}, _train(model, rank, world)
    return found


def _sharded(mesh: Any, rule: Any = "usf") -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    bk.convert_(model, rule, seed=1)
    if mesh is not None:
        bk.distributed.fully_shard(model, mesh=mesh)
    return model


def _accumulate(model: Any, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    blocks = [model.blocks[0][0], model.blocks[0][1], model.blocks[1]]
    if world > 1:
        for one, next_one in itertools.pairwise(blocks):
            one.set_modules_to_forward_prefetch([next_one])
            next_one.set_modules_to_backward_prefetch([one])
    for i, words in enumerate(_words()):
        if world > 1:
            model.set_requires_gradient_sync(i == 2)
            model.set_is_last_backward(i == 2)
        with torch.no_grad():
            model(words)
        _step(model, words, rank, world)
    return _gradients(model)


def _saved(mesh: Any, rank: int, world: int) -> dict[str, Any]:
    # What two ranks saved, one model of another seed loads.
    import tempfile

    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    pairs = {}
    for name, rule in (("usf", "usf"), ("stored", bk.FeedbackAlignment(stored=True)), ("signs", "fa_signed_init")):
        model = _sharded(mesh, rule)
        _train(model, rank, world)
        dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder[0]}/{name}")
        _step(model, _words()[0], rank, world)
        torch.manual_seed(7)
        alone = Net()
        bk.convert_(alone, rule, seed=5)
        state = alone.state_dict()
        dcp.load(state, checkpoint_id=f"{folder[0]}/{name}")
        alone.load_state_dict(state)
        _step(alone, _words()[0])
        pairs[name] = _gradients(model), _gradients(alone)
    return pairs


def _compiled(mesh: Any, rank: int, world: int) -> list[dict[str, Tensor]]:
    # Its signs and its scale are made of W.
    model = _sharded(None, MATCH)
    model.blocks[1] = torch.compile(model.blocks[1], backend="aot_eager", fullgraph=True)
    bk.distributed.fully_shard(model, mesh=mesh)
    return _train(model, rank, world)


def _compiled_anew(mesh: Any = None, rank: int = 0, world: int = 1, parts: bool = False) -> list[dict[str, Tensor]]:
    model = _model("checkpoint around")
    if mesh is not None:
        around = [m for m in model.modules() if isinstance(m, Around)]
        if parts:
            around[0].parts[0] = torch.compile(around[0].parts[0], backend="aot_eager")
        else:
            around[0].parts[0].compile(backend="aot_eager")
        bk.distributed.fully_shard(model, mesh=mesh, blocks=around if parts else None)
    return _train(model, rank, world)


def _different(mesh: Any, rank: int, rule: str, seed: int) -> str:
    model = Net()
    bk.convert_(model, rule, seed=seed)
    bk.distributed.fully_shard(model, mesh=mesh)
    with pytest.raises(RuntimeError) as caught:
        model(_words()[0])
    return str(caught.value)


def _tools(model: nn.Module, rank: int = 0, world: int = 1) -> list[Any]:
    x, y, z = _words()
    with bk.frozen_signs(model):
        _step(model, x, rank, world)
        _step(model, y, rank, world)
    found: list[Any] = [_gradients(model)]
    model.zero_grad()
    with bk.metrics.backprop(model):
        _step(model, z, rank, world)
    found.append(_gradients(model))
    angles = bk.metrics.updates(model, lambda: model(x.chunk(world)[rank]).square().mean())
    return [*found, {name: torch.tensor(each.angle) for name, each in angles.items()}]


def _align(model: nn.Module, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    x = _words()[0]
    _step(model, x, rank, world)
    bk.align_(model, x.chunk(world)[rank])
    return _gradients(model)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return processes.run(_work)[0]


def _close(found: Any, wanted: Any) -> None:
    if isinstance(found, dict):
        assert found.keys() == wanted.keys()
        for name, grad in found.items():
            torch.testing.assert_close(grad, wanted[name], rtol=2e-4, atol=1e-6)
    else:
        for one, other in zip(found, wanted, strict=True):
            _close(one, other)


@pytest.mark.filterwarnings("ignore:a rule does not act everywhere")
@pytest.mark.parametrize("case", CASES)
def test_kinds_of_models(case: str, found: dict[str, Any]) -> None:
    first, third, wanted_rows = CASES[case][2:]
    seen = found[case]
    _close(seen["grads"], _train(_model(case)))
    assert (seen["gathers"][0], seen["gathers"][2]) == (first, third)
    for name, (outcome, why) in wanted_rows.items():
        assert seen["rows"][name][0] == outcome
        assert seen["rows"][name][1].startswith(why)


@pytest.mark.parametrize("rule", EVERY)
def test_every_layer(rule: str, found: dict[str, Any]) -> None:
    grads, outcomes = found["every"][rule]
    _close(grads, _every(rule)[0])
    # Cells in no block.
    assert outcomes == {"gathered once", "gathered and kept"}


def test_accumulation_without_reduction_and_prefetch(found: dict[str, Any]) -> None:
    _close(found["accumulated"], _accumulate(_sharded(None)))


def test_a_checkpoint_of_two_ranks_loads_into_one(found: dict[str, Any]) -> None:
    for two, one in found["saved"].values():
        _close(two, one)


def test_a_compiled_block(found: dict[str, Any]) -> None:
    _close(found["compiled"], _train(_sharded(None, MATCH)))
    _close(found["compiled anew"], [_compiled_anew()] * 2)


def test_ranks_of_different_feedback_say_so(found: dict[str, Any]) -> None:
    assert all("the ranks have different feedback" in said for said in found["different"])


def test_tools(found: dict[str, Any]) -> None:
    _close(found["tools"], _tools(_sharded(None)))


def test_alignment_is_the_mean_over_ranks(found: dict[str, Any]) -> None:
    _close(found["aligned"], _align(_sharded(None, "aa")))


def test_converted_afterwards_says_the_order(found: dict[str, Any]) -> None:
    reasons, grads = found["converted after"]
    assert reasons["blocks.1.up"] == reasons["head"] == "sharded by itself: convert_ first, then fully_shard"
    _close(grads, _train(_sharded(None)))


def test_bytes_moved_and_bytes_waiting(found: dict[str, Any]) -> None:
    model = sharding.Net()
    whole = sum(p.nbytes for p in model.parameters())
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and name != "words.weight"]
    signs = sum(bk.ops.pack_signs(p.detach()).nbytes for p in matrices)
    root = sum(p.nbytes for name, p in model.named_parameters() if "norm" in name or "words" in name)
    twice, once, ours = (found["bytes"][way] for way in sharding.WAYS)
    assert [each["reduced"] for each in (twice, once, ours)] == [whole] * 3
    assert [each["gathered"] for each in (twice, once, ours)] == [2 * whole, whole, whole]
    assert [each["waiting"] for each in (twice, once, ours)] == [0, whole, signs + root]
    assert signs < 0.065 * sum(p.nbytes for p in matrices)


def test_errors() -> None:
    with pytest.raises(ValueError, match="module: expected a layer with a rule, got none: convert_ first"):
        bk.distributed.fully_shard(Net())
