"""What a forward keeps for its backward, counted in bytes: what that backward reads and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import LAYERS, NOT_RECURRENT, ONE_WEIGHT, RULES, build, call
from torch import Tensor, nn

import bioplaus_kernels as bk
from bioplaus_kernels import ops
from bioplaus_kernels.backends.reference.pack_signs import packed_shape

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = 24  # bytes of a key: three int64


def by_hooks(run: Callable[[], Tensor]) -> tuple[dict[int, Tensor], Tensor]:
    """Tensors that go through saved-tensor hooks, by storage, and the output."""
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    return saved, y


def by_walking(y: Tensor) -> dict[int, Tensor]:
    """Tensors that hang on the graph behind `y` in any attribute, saved by hooks or not; leaves' own not counted."""
    found: dict[int, Tensor] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value
        elif isinstance(value, list | tuple | dict):
            for item in value.values() if isinstance(value, dict) else value:
                visit(item)

    nodes, seen = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen or hasattr(node, "variable"):
            continue
        seen.add(node)
        names = [n for n in dir(node) if n.startswith("_saved_") and not n.startswith("_saved_tensors_hooks")]
        for name in (*names, "saved_tensors"):
            visit(getattr(node, name, None))
        visit(getattr(node, "__dict__", {}))
        nodes += [parent for parent, _ in node.next_functions]
    return found


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes saved by `run`, the same by either count."""
    saved, _ = by_hooks(run)
    walked = by_walking(run())
    total = sum(t.untyped_storage().nbytes() for t in saved.values())
    assert sum(t.untyped_storage().nbytes() for t in walked.values()) == total
    return total


def packed_bytes(weight: Tensor) -> int:
    """Bytes of the packed signs of `weight`."""
    rows, words = packed_shape(weight.shape)
    return 4 * rows * words


def b_bytes(rule: str, weight: Tensor) -> int:
    """What B of `rule` needs for its backward."""
    return {
        "backprop": weight.nbytes,
        "usf": weight.nbytes,
        "usf-match": weight.nbytes + 4,  # and the factor
        "frsf": weight.nbytes + KEY,
        "frsf-stored": 2 * weight.nbytes,
        "brsf": weight.nbytes + KEY,
        "fa": KEY,
        "fa-constant": KEY,
        "fa-stored": weight.nbytes,
        "fa_signed_init": packed_bytes(weight),
        "concordance": packed_bytes(weight),
        "low_rank": 3 * (weight.shape[0] + weight[:1].numel()) * weight.element_size(),
        "wm": weight.nbytes,
    }[rule]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ONE_WEIGHT)
def test_exact_bytes(name: str, rule: str) -> None:
    layer, x = build(name, RULES[rule])
    assert saved_bytes(lambda: layer(x)) == x.nbytes + b_bytes(rule, layer.weight)
    # A frozen weight needs no input; torch.nn's own convolutions keep it all the same.
    layer.weight.requires_grad_(False)
    torch_saves_input = x.nbytes if rule == "backprop" and name.startswith("Conv") else 0
    assert saved_bytes(lambda: layer(x)) == torch_saves_input + b_bytes(rule, layer.weight)
    # A first layer needs nothing of its feedback; torch.nn's own forward may keep W as well.
    layer.weight.requires_grad_(True)
    torch_saves_weight = 0 if name == "Linear" or name.startswith("Locally") else layer.weight.nbytes
    assert saved_bytes(lambda: layer(x.detach())) == x.nbytes + torch_saves_weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "LocallyConnected2d"])
def test_exact_bytes_under_autocast(name: str, rule: str, dtype: torch.dtype) -> None:
    if rule == "backprop" and not name.startswith("Locally"):
        pytest.skip("torch.nn's own forward")
    layer, x = build(name, RULES[rule])

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return layer(x)

    # The input in the autocast dtype; the weight itself, not a copy, since its signs come from its own dtype.
    assert saved_bytes(run) == x.nbytes // 2 + b_bytes(rule, layer.weight)


@pytest.mark.parametrize("rule", ["fa", "fa-constant", "fa-stored", "fa_signed_init", "concordance", "low_rank", "wm"])
@pytest.mark.parametrize("name", ONE_WEIGHT)
def test_fixed_feedback_never_saves_the_weight(name: str, rule: str) -> None:
    layer, x = build(name, RULES[rule])
    saved, _ = by_hooks(lambda: layer(x))
    assert layer.weight.untyped_storage().data_ptr() not in saved
    # So the weight may change between forward and backward.
    y = layer(x)
    with torch.no_grad():
        layer.weight.zero_()
    y.sum().backward()


@pytest.mark.parametrize("rule", ["usf", "usf-match", "frsf", "frsf-stored", "brsf"])
@pytest.mark.parametrize("name", ONE_WEIGHT)
def test_signs_are_saved_as_the_weight_or_packed_never_both(name: str, rule: str) -> None:
    layer, x = build(name, RULES[rule])
    weight = layer.weight.untyped_storage().data_ptr()
    saved, _ = by_hooks(lambda: layer(x))
    assert weight in saved and not any(t.dtype == torch.int32 for t in saved.values())
    with bk.frozen_signs(layer):
        saved, _ = by_hooks(lambda: layer(x))
    assert weight not in saved
    packed = [t for t in saved.values() if t.dtype == torch.int32]
    assert [t.nbytes for t in packed] == [packed_bytes(layer.weight)]


@pytest.mark.parametrize("rule", ["usf", "fa", "fa_signed_init"])
def test_attention(rule: str) -> None:
    layer, x = build("MultiheadAttention", RULES[rule])
    saved, _ = by_hooks(lambda: call(layer, x))
    pointers = {p.untyped_storage().data_ptr() for p in (layer.in_proj_weight, layer.out_proj.weight)}
    assert len(pointers & saved.keys()) == (2 if rule == "usf" else 0)


def test_an_output_without_a_graph_saves_nothing() -> None:
    for rule in RULES.values():
        layer, x = build("Conv2d", rule)
        with torch.no_grad():
            saved, y = by_hooks(lambda layer=layer, x=x: layer(x))
        assert y.grad_fn is None and not saved


FORMING = ("feedback_weight", "feedback_mm", "lc_backward_input", "redraw_key", "pack_signs", "unpack_signs")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ops that form B, or something of it, as they are called."""
    calls: list[str] = []
    for name in FORMING:
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, name=name, op=op, **k: calls.append(name) or op(*a, **k))
    return calls


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NOT_RECURRENT)
def test_the_first_layer_never_forms_its_feedback(name: str, rule: str, counted: list[str]) -> None:
    layer, x = build(name, RULES[rule])
    weight = layer.in_proj_weight if name == "MultiheadAttention" else layer.weight
    # The forward of a transposed locally-connected layer is that op, with W.
    own = ["lc_backward_input"] if "ConnectedTranspose" in name else []
    counted.clear()
    call(layer, x.detach()).sum().backward()
    assert weight.grad is not None
    if name == "MultiheadAttention":
        # Its out_proj is no first layer, so one B is formed; brsf hashes each W for its key, concordance packs each.
        formed = [op for op in counted if op not in ("redraw_key", "pack_signs")]
        assert formed == ([] if rule in ("backprop", "low_rank") else ["feedback_mm"])
    else:
        assert counted == own
    counted.clear()
    with torch.no_grad():
        call(layer, x)
    assert counted == own


@pytest.mark.parametrize("rule", ["usf", "fa", "brsf"])
def test_the_first_layer_of_a_model(rule: str, counted: list[str]) -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 4))
    bk.convert_(model, rule)
    counted.clear()
    model(torch.randn(2, 2, 4)).sum().backward()
    assert counted == ["redraw_key", "feedback_mm"] if rule == "brsf" else ["feedback_mm"]


@pytest.mark.parametrize("rule", ["usf", "fa", "brsf"])
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "LocallyConnected2d"])
def test_frozen_parameters_get_no_gradient(name: str, rule: str) -> None:
    layer, x = build(name, rule)
    layer.requires_grad_(False)
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None and layer.bias.grad is None
    assert not layer(x.detach()).requires_grad


@pytest.mark.parametrize("name", ["Linear", "LocallyConnected2d", *(n for n in LAYERS if n not in ONE_WEIGHT[1:])])
def test_every_saved_tensor_is_read(name: str) -> None:
    """A NaN in any of them shows in a gradient, whatever is frozen."""
    for rule in ("fa-stored", "low_rank"):
        layer, x = build(name, RULES[rule])
        kinds = {n.split("_l")[0] for n, p in layer.named_parameters() if p.requires_grad}
        for frozen in [set(), kinds, *({kind} for kind in kinds)]:
            for n, p in layer.named_parameters():
                if "feedback" not in n:
                    p.requires_grad_(n.split("_l")[0] not in frozen)
            for needs_x in (True, False):
                wanted = [t for t in (x, *layer.parameters()) if t.requires_grad and (needs_x or t is not x)]
                saved: list[Tensor] = []
                spoiled: list[int] = [-1]

                def pack(t: Tensor, saved: list[Tensor] = saved) -> int:
                    saved.append(t)
                    return len(saved) - 1

                def unpack(k: int, saved: list[Tensor] = saved, spoiled: list[int] = spoiled) -> Tensor:
                    return torch.full_like(saved[k], torch.nan) if k in spoiled else saved[k]

                with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                    y = call(layer, x if needs_x else x.detach())
                if not wanted:
                    assert not saved
                    continue
                direction = torch.randn_like(y)
                right = torch.autograd.grad(y, wanted, direction, retain_graph=True)
                for k, t in enumerate(saved):
                    if not t.is_floating_point() or not t.numel():
                        continue
                    spoiled[0] = k
                    found = torch.autograd.grad(y, wanted, direction, retain_graph=True)
                    assert not all(map(torch.equal, found, right)), (frozen, needs_x, tuple(t.shape))
