"""RNN, LSTM, GRU and their cells against back-propagation through time, unrolled a sequence at a time by autograd."""

import copy
import itertools
from typing import Any

import pytest
import torch
from oracle import RULES, assert_same
from small import assert_equal
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import bioplaus_kernels as bk
from bioplaus_kernels import ops
from bioplaus_kernels.backends import reference

pytestmark = pytest.mark.usefixtures("one_thread")

Weights = dict[str, tuple[Tensor, Tensor]]
LENGTHS = [3, 5, 1, 5]


def through(x: Tensor, weight: tuple[Tensor, Tensor] | None) -> Tensor:
    """x Wᵀ with the gradient of x Bᵀ for x."""
    if weight is None:
        return x
    w, b = weight
    z = x @ b.detach().t()
    return x.detach() @ w.t() + (z - z.detach())


def step(mode: str, x: Tensor, h: Tensor, c: Tensor, weights: Weights, biases: list[Any], suffix: str) -> Any:
    a, b = through(x, weights[f"weight_ih{suffix}"]), through(h, weights[f"weight_hh{suffix}"])
    a, b = (t if bias is None else t + bias for t, bias in zip((a, b), biases, strict=True))
    if mode == "LSTM":
        i, f, g, o = (a + b).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return through(o.sigmoid() * c.tanh(), weights.get(f"weight_hr{suffix}")), c
    if mode == "GRU":
        (r, z, n), (hr, hz, hn) = a.chunk(3, -1), b.chunk(3, -1)
        z, n = (z + hz).sigmoid(), (n + (r + hr).sigmoid() * hn).tanh()
        return (1 - z) * n + z * h, c
    return (torch.tanh if mode == "RNN_TANH" else torch.relu)(a + b), c


def layer_weights(layer: Any) -> Weights:
    return {name: (getattr(layer, name), layer.feedback_matrix(name)) for name in layer.weights()}


def unrolled(layer: Any, sequences: list[Tensor], h0: Tensor, c0: Tensor) -> list[Tensor]:
    """The output of each sequence (length, features), and the last states of all."""
    weights, found, last_h, last_c = layer_weights(layer), [], [], []
    for k, x in enumerate(sequences):
        hs, cs = [], []
        for level in range(layer.num_layers):
            outputs = []
            for direction in range(1 + layer.bidirectional):
                suffix = f"_l{level}{'_reverse' if direction else ''}"
                biases = [getattr(layer, f"bias_{kind}{suffix}", None) for kind in ("ih", "hh")]
                h, c = h0[len(hs), k], c0[len(hs), k]
                steps: list[Tensor] = []
                for t in reversed(range(len(x))) if direction else range(len(x)):
                    h, c = step(layer.mode, x[t], h, c, weights, biases, suffix)
                    steps.append(h)
                hs.append(h)
                cs.append(c)
                outputs.append(torch.stack(steps[::-1] if direction else steps))
            x = torch.cat(outputs, -1)
        found.append(x)
        last_h.append(torch.stack(hs))
        last_c.append(torch.stack(cs))
    return [*found, torch.stack(last_h, 1), torch.stack(last_c, 1)]


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "LSTM rich": ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "GRU rich": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "GRU no bias": ("GRU", {"bias": False}),
    "RNN tanh": ("RNN", {"bidirectional": True}),
    "RNN relu": ("RNN", {"nonlinearity": "relu", "num_layers": 2, "bias": False}),
}


def check(layer: Any, packed: bool, given: bool, frozen: tuple[str, ...] = (), needs_x: bool = True) -> None:
    lengths = LENGTHS if packed else [4] * 4
    sequences = [torch.randn(n, 5, dtype=torch.float64, requires_grad=needs_x) for n in lengths]
    count = layer.num_layers * (1 + layer.bidirectional)
    sizes = (layer.proj_size or 4, 4)
    h0, c0 = (
        (torch.randn if given else torch.zeros)(count, 4, n, dtype=torch.float64, requires_grad=given) for n in sizes
    )
    for name, p in layer.named_parameters():
        if name.startswith(frozen) and frozen:
            p.requires_grad_(False)
    lstm = layer.mode == "LSTM"
    hx = ((h0, c0) if lstm else h0) if given else None
    x: Any = nn.utils.rnn.pad_sequence(sequences, batch_first=layer.batch_first)
    if packed:
        x = pack_padded_sequence(x, lengths, batch_first=layer.batch_first, enforce_sorted=False)
    y, last = layer(x, hx)
    if packed:
        y, _ = nn.utils.rnn.pad_packed_sequence(y, batch_first=layer.batch_first)
    rows = y if layer.batch_first else y.transpose(0, 1)
    ours = [*(row[:n] for row, n in zip(rows, lengths, strict=True)), *(last if lstm else [last])]
    theirs = unrolled(layer, sequences, h0, c0)[: len(ours)]
    for a, e in zip(ours, theirs, strict=True):
        assert_same(a, e)
    inputs = [*(sequences if needs_x else []), *([h0, c0] if given and lstm else [h0] if given else [])]
    inputs += [p for p in layer.parameters() if p.requires_grad]
    directions = [torch.randn_like(a) for a in ours]
    for a, e in zip(*(torch.autograd.grad(out, inputs, directions) for out in (ours, theirs)), strict=True):
        assert_same(a, e)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str, packed: bool) -> None:
    name, options = KINDS[kind]
    for given in (False, True):
        rule = bk.InputHidden("usf", bk.FeedbackAlignment(scale=0.5))
        layer = getattr(bk.nn, name)(5, 4, dtype=torch.float64, feedback=rule, batch_first=given, **options)
        check(layer, packed, given)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule: str) -> None:
    check(bk.nn.LSTM(5, 4, proj_size=3, dtype=torch.float64, feedback=RULES[rule]), True, True)
    check(bk.nn.GRU(5, 4, dtype=torch.float64, feedback=RULES[rule]), False, True)


@pytest.mark.parametrize("frozen", [("weight_ih",), ("weight_hh",), ("bias",), ("weight", "bias_ih"), ("weight_hr",)])
def test_what_is_frozen_changes_no_other_gradient(frozen: tuple[str, ...]) -> None:
    for given, needs_x in ((True, False), (False, True)):
        check(bk.nn.LSTM(5, 4, 2, proj_size=3, dtype=torch.float64, feedback="fa"), True, given, frozen, needs_x)
        check(bk.nn.GRU(5, 4, 2, dtype=torch.float64, feedback="fa"), False, given, frozen, needs_x)


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN"])
def test_cells(mode: str) -> None:
    cell = getattr(bk.nn, f"{mode}Cell")(5, 4, dtype=torch.float64, feedback=bk.InputHidden("fa", "usf"))
    weights, biases = layer_weights(cell), [cell.bias_ih, cell.bias_hh]
    x, h, c = (torch.randn(3, n, dtype=torch.float64, requires_grad=True) for n in (5, 4, 4))
    states = (h, c) if mode == "LSTM" else (h,)
    for given, unbatched in itertools.product((True, False), repeat=2):
        wanted = [x, *(states if given else ()), *cell.parameters()]
        zero = torch.zeros_like(h)
        first = tree_leaves(cell(*(t[0] if unbatched else t for t in (x,)), _hx(states, given, unbatched)))
        second = step(cell.mode, x, h if given else zero, c if given else zero, weights, biases, "")[: len(states)]
        second = [t[0] if unbatched else t for t in second]
        directions = [torch.randn_like(t) for t in second]
        for a, e in zip(first, second, strict=True):
            assert_same(a, e)
        for a, e in zip(*(torch.autograd.grad(out, wanted, directions) for out in (first, second)), strict=True):
            assert_same(a, e)


def _hx(states: tuple[Tensor, ...], given: bool, unbatched: bool) -> Any:
    if not given:
        return None
    found = tuple(s[0] if unbatched else s for s in states)
    return found if len(found) == 2 else found[0]


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_forward_is_torchs(name: str) -> None:
    """In every form of input, with dropout between layers, and in eval mode."""
    layer = getattr(bk.nn, name)(5, 4, 2, dropout=0.5, bidirectional=True, feedback="fa", batch_first=True)
    plain = copy.deepcopy(layer)
    bk.convert_(plain, None)
    assert type(plain) is getattr(nn, name)
    x = torch.randn(3, 6, 5)
    for given in (x, x[0], pack_padded_sequence(x, [6, 4, 1], batch_first=True)):
        for training in (True, False):
            found = []
            for m in (layer, plain):
                torch.manual_seed(0)
                found.append(tree_leaves(m.train(training)(given)))
            for a, e in zip(*found, strict=True):
                if isinstance(e, Tensor):
                    torch.testing.assert_close(a, e)
    for bad in (x[:, :0], x[0, 0], torch.randn(3, 6, 4)):
        with pytest.raises((ValueError, RuntimeError)):
            layer(bad)
    with pytest.raises(ValueError, match=r"hx: expected 3 dimensions, as the input's, got shapes"):
        layer(x, (torch.zeros(4, 4),) * 2 if name == "LSTM" else torch.zeros(4, 4))
    with pytest.raises(RuntimeError, match="Expected hidden"):
        layer(x, (torch.zeros(5, 3, 4),) * 2 if name == "LSTM" else torch.zeros(5, 3, 4))
    cell, state = getattr(bk.nn, f"{name}Cell")(5, 4, feedback="fa"), torch.zeros(3, 4)
    for m, given, s in ((layer, x, torch.zeros(4, 3, 4)), (cell, x[:, 0].requires_grad_(), state)):
        for hx in ((s, s, s), (s, None), s) if name == "LSTM" else ((s,), 3):
            with pytest.raises((ValueError, TypeError), match=r"hx(\[1\])?: expected (a tensor|2 states)"):
                m(given, hx)
        with pytest.raises(ValueError, match=r"name: expected one of weight_ih.*, got 'weight'"):
            m.feedback_matrix("weight")
    # Without a gradient through input, state or weights it is torch's own.
    for m in (layer, plain):
        m.requires_grad_(False)
    for a, e in zip(tree_leaves(layer(x)), tree_leaves(plain(x)), strict=True):
        assert torch.equal(a, e)


def test_an_empty_batch() -> None:
    for name in ("LSTM", "GRU", "RNN"):
        layer, x = getattr(bk.nn, name)(5, 4, feedback="fa"), torch.randn(3, 0, 5, requires_grad=True)
        y, _ = layer(x)
        y.sum().backward()
        assert y.shape == (3, 0, 4) and x.grad.shape == x.shape and not layer.weight_hh_l0.grad.any()


def test_weights_in_place_between_forward_and_backward() -> None:
    x = torch.randn(3, 2, 5, requires_grad=True)
    for name in ("weight_ih_l0", "weight_hh_l0", "weight_hr_l0"):
        for rule, raises in (("usf", True), ("fa", False)):
            layer = bk.nn.LSTM(5, 4, proj_size=3, feedback=rule)
            y, _ = layer(x)
            with torch.no_grad():
                getattr(layer, name).add_(1)
            if raises:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    y.sum().backward()
            else:
                y.sum().backward()


def test_one_rule_for_input_and_another_for_hidden() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(5, 4), "b": nn.Linear(4, 3), "c": nn.GRUCell(5, 4)})
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = bk.convert_(model, bk.InputHidden("usf", bk.FeedbackAlignment(stored=True)), seed=3)
    assert report.converted == ["a", "b", "c"]
    assert model["b"].feedback == bk.SignSymmetry()
    assert "usf" in str(report) and "hidden=FeedbackAlignment" in str(report)
    described = {row[0]: row[1] for row in bk.describe(model).rows}
    assert described["a.weight_ih_l0"].startswith("SignSymmetry")
    assert described["a.weight_hh_l0"].startswith("FeedbackAlignment") and "c.weight_hh" in described
    assert str(bk.describe(model.state_dict())) == str(bk.describe(model))
    assert "hh_l0_feedback_weight" in dict(model["a"].named_parameters())
    other = nn.ModuleDict({"a": nn.LSTM(5, 4), "b": nn.Linear(4, 3), "c": nn.GRUCell(5, 4)})
    bk.convert_(other, bk.InputHidden("fa", bk.FeedbackAlignment(stored=True)))
    with pytest.raises(RuntimeError, match=r"a.ih_l0_feedback_state: expected the state of FeedbackAlignment"):
        other.load_state_dict(model.state_dict())
    # Back-propagation in one of the two.
    bk.convert_(model, bk.InputHidden(None, "fa"))
    assert type(model["b"]) is nn.Linear and isinstance(model["a"], bk.nn.LSTM)
    assert torch.equal(model["a"].feedback_matrix("weight_ih_l0"), model["a"].weight_ih_l0)
    assert not [n for n in model.state_dict() if n.startswith("a.ih_l0_feedback")]
    check(bk.nn.LSTM(5, 4, dtype=torch.float64, feedback=bk.InputHidden(None, "fa")), False, True)
    check(bk.nn.GRU(5, 4, dtype=torch.float64, feedback=bk.InputHidden("fa", None)), True, True)
    check(bk.nn.LSTM(5, 4, proj_size=3, dtype=torch.float64, feedback=bk.InputHidden("fa", None)), True, True)
    with pytest.raises(ValueError, match=r"hidden: expected one of .*got 'fb'"):
        bk.InputHidden("fa", "fb")
    bk.convert_(model, None)
    assert_equal([p.detach() for p in model.parameters()], [t.detach() for t in before.values()])


class Reads(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.lstm, self.name = nn.LSTM(5, 5, proj_size=3), name

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        return (y.sum() * getattr(self.lstm, self.name)).sum()


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"])
def test_a_weight_read_elsewhere_is_found(name: str) -> None:
    x = torch.randn(3, 2, 5)
    model = Reads(name)
    with pytest.warns(UserWarning, match="its weight goes into MulBackward0"):
        assert bk.convert_(model, "fa", example=x).names("called and read") == ["lstm"]
    model = Reads("bias_ih_l0")
    assert bk.convert_(model, "fa", example=x).proven == ["lstm"]
    # One step without a state: nothing goes through a B.
    cell = nn.Sequential(nn.GRUCell(5, 4))
    assert bk.convert_(cell, "fa", example=x[0]).proven == []
    assert bk.check(cell, x[0].requires_grad_()).proven == ["0"]


def test_a_model_with_packed_sequences_is_proven() -> None:
    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rnn = nn.Linear(5, 5), nn.GRU(5, 4, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> PackedSequence:
            return self.rnn(pack_padded_sequence(self.first(x), lengths, batch_first=True, enforce_sorted=False))[0]

    model = Packs()
    assert bk.convert_(model, "fa", example=(torch.randn(3, 4, 5), torch.tensor([2, 4, 1]))).proven == ["rnn"]


def test_functional_call_and_computed_weights() -> None:
    layer, x = bk.nn.LSTM(5, 4, feedback="usf"), torch.randn(3, 2, 5, requires_grad=True)
    parameters = {n: torch.randn_like(p, requires_grad=True) for n, p in layer.named_parameters()}
    y, _ = torch.func.functional_call(layer, parameters, (x,))
    other = copy.deepcopy(layer)
    other.load_state_dict(parameters, strict=False)
    z, _ = other(x)
    ours = torch.autograd.grad(y.square().sum(), [x, *parameters.values()])
    assert_equal(list(ours), list(torch.autograd.grad(z.square().sum(), [x, *other.parameters()])))
    nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    y, _ = layer(x)
    y.square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_a_replica_of_data_parallel_has_the_rule() -> None:
    """Its parameters are plain tensors."""
    for name in ("LSTM", "GRUCell"):
        layer = getattr(bk.nn, name)(5, 4, feedback="fa")
        replica = layer._replicate_for_data_parallel()
        for key, p in layer._parameters.items():
            setattr(replica, key, p.view_as(p))
        x = torch.randn(3, 2, 5) if name == "LSTM" else torch.randn(2, 5, requires_grad=True)
        found = [
            torch.autograd.grad(tree_leaves(m(x))[0].square().sum(), [*layer.parameters()]) for m in (layer, replica)
        ]
        assert_equal(*map(list, found))


def test_what_is_saved_and_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """B of the hidden weights once a backward, the input's by a product; none of a first input's, or of one step's."""
    calls: list[str] = []
    for name in ("feedback_weight", "feedback_mm"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, name=name, op=op, **k: calls.append(name) or op(*a, **k))
    x = torch.randn(6, 2, 5)
    for name, needs, formed in (("GRU", True, 2), ("GRU", False, 1), ("GRUCell", False, 0), ("GRUCell", True, 1)):
        layer = getattr(bk.nn, name)(5, 4, feedback="fa")
        given = (x if name == "GRU" else x[0]).detach().requires_grad_(needs)
        tree_leaves(layer(given))[0].sum().backward()
        assert len(calls) == formed, (name, needs)
        calls.clear()
    layer = bk.nn.LSTM(5, 4, feedback="fa")
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        layer(x)
    assert not {p.untyped_storage().data_ptr() for p in layer.parameters() if p.dim() > 1} & {*saved}


def test_half_types_and_autocast() -> None:
    for name, dtype in itertools.product(("LSTM", "GRU", "RNN"), (torch.bfloat16, torch.float16)):
        layer = getattr(bk.nn, name)(5, 4, 2, bidirectional=True, feedback="fa")
        x = torch.randn(4, 3, 5)
        wanted = [x.requires_grad_(), *layer.parameters()]
        exact = torch.autograd.grad(layer(x)[0].sum(), wanted)
        with torch.autocast("cpu", dtype):
            y, last = layer(x)
        assert {t.dtype for t in tree_leaves((y, last))} == {dtype}
        lowered = copy.deepcopy(layer).to(dtype)
        z = x.detach().to(dtype).requires_grad_()
        for found in (
            torch.autograd.grad(y.sum(), wanted),
            torch.autograd.grad(lowered(z)[0].sum(), [z, *lowered.parameters()]),
        ):
            for a, e in zip(found, exact, strict=True):
                torch.testing.assert_close(a.float(), e, rtol=0.1, atol=0.05 * float(e.abs().max()))


MODES = ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"]


def op_arguments(mode: str, packed: bool, reverse: bool, projected: bool) -> tuple[list[Any], list[Any]]:
    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64)

    size, width = 3 if projected else 5, 5 * reference.MODES[mode]
    sizes = torch.tensor([4, 4, 2, 1, 1]) if packed else None
    cell, projection = random(4, 5) if mode == "LSTM" else None, random(size, 5) if projected else None
    x = random(12, width) if packed else random(6, 4, width)
    forward = [x, random(4, size), cell, random(width, size), random(width), projection, sizes, mode, reverse]
    output, _, _, gates, cells = reference.recurrent_forward(*forward)
    grad_cell = None if cell is None else random(4, 5)
    backward = [random(*output.shape), random(4, size), grad_cell, output, gates, cells, forward[1], cell]
    return forward, [*backward, random(width, size), projection, sizes, mode, reverse, [True, True, projected]]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", [*MODES, "LSTM projected"])
def test_ops(mode: str, packed: bool, reverse: bool) -> None:
    """The native loop against the reference's, and torch's checks of an op."""
    name, _, projected = mode.partition(" ")
    forward, backward = op_arguments(name, packed, reverse, bool(projected))
    for op, arguments in (("recurrent_forward", forward), ("recurrent_backward", backward)):
        for a, e in zip(getattr(ops, op)(*arguments), getattr(reference, op)(*arguments), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)
        if hasattr(torch.ops.bioplaus, op):
            torch.library.opcheck(getattr(torch.ops.bioplaus, op).default, tuple(arguments))
    backward[8] = None
    for a, e in zip(ops.recurrent_backward(*backward), reference.recurrent_backward(*backward), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_ops_of_any_strides_and_of_no_units(mode: str) -> None:
    forward, backward = op_arguments(mode, True, False, False)
    for op, arguments in (("recurrent_forward", forward), ("recurrent_backward", backward)):
        turned = [x.t().contiguous().t() if torch.is_tensor(x) and x.dim() == 2 else x for x in arguments]
        expected = getattr(reference, op)(*arguments)
        for a, e in zip(getattr(ops, op)(*turned), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)
    cell = getattr(bk.nn, f"{mode if mode in ('LSTM', 'GRU') else 'RNN'}Cell")(3, 0, feedback="usf")
    x = torch.randn(2, 3, requires_grad=True)
    h = cell(x)
    assert (h[0] if mode == "LSTM" else h).shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("units", [7, 150])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", [*MODES, "LSTM projected"])
def test_operands_copied_for_all_steps(mode: str, packed: bool, units: int, dtype: torch.dtype) -> None:
    """Products by blocks of rows, columns and terms: against float64's, by one thread and by several."""
    name, _, projected = mode.partition(" ")
    torch.manual_seed(0)
    size = 70 if projected else units
    width = units * reference.MODES[name]
    sizes = torch.tensor([21, 21, 13, 8, 3, 1, 1]) if packed else None
    rows = (68,) if packed else (4, 21)
    lstm = name == "LSTM"
    forward: list[Any] = [torch.randn(*rows, width), torch.randn(21, size), torch.randn(21, units) if lstm else None]
    # A state of every sequence alike, as `expand` makes it.
    forward[1] = forward[1][:1].expand(21, size)
    forward += [torch.randn(width, size) / size**0.5, torch.randn(width) if units == 7 else None]
    forward += [torch.randn(size, units) / units**0.5 if projected else None, sizes, name, packed]
    forward = [a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a for a in forward]
    # A step of a half type rounds what it keeps.
    near = 2e-6 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps

    def exact(op: Any, arguments: list[Any]) -> tuple[Tensor, ...]:
        is_real = [torch.is_tensor(a) and a.is_floating_point() for a in arguments]
        return op(*(a.double() if real else a for a, real in zip(arguments, is_real, strict=True)))

    output, _, _, gates, cells = ops.recurrent_forward(*forward)
    backward = [torch.randn_like(output), torch.randn(21, size).to(dtype), forward[2], output, gates, cells]
    backward += forward[1:3]
    backward += [forward[3], *forward[5:], [True, True, bool(projected)]]
    for op, arguments in (("recurrent_forward", forward), ("recurrent_backward", backward)):
        found = getattr(ops, op)(*arguments)
        for a, e in zip(found, exact(getattr(reference, op), arguments), strict=True):
            torch.testing.assert_close(
                a.double(), e, rtol=5 * near, atol=near * float(e.abs().amax() if e.numel() else 0)
            )
        torch.set_num_threads(3)
        try:
            again = getattr(ops, op)(*arguments)
        finally:
            torch.set_num_threads(1)
        # Weight gradients are products of torch's own.
        for a, b in zip(again[:3], found[:3], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("implementation", [ops, reference], ids=["active", "reference"])
def test_wrong_arguments_of_ops(implementation: Any) -> None:
    forward, backward = op_arguments("LSTM", True, False, True)
    for i, value, error, message in (
        (0, forward[0][:, 1:], ValueError, r"input: expected shape \(12, 20\), got \(12, 19\)"),
        (0, forward[0][1:], ValueError, "batch_sizes: expected a sum of 11, the input's rows, got 12"),
        (1, forward[1].float(), TypeError, "hidden: expected torch.float64, got torch.float32"),
        (2, None, ValueError, "cell: expected a tensor with mode='LSTM', got None"),
        (3, forward[3].t(), ValueError, r"weight: expected shape \(20, 3\), got \(3, 20\)"),
        (6, torch.tensor([4, 2, 4, 2]), ValueError, "batch_sizes: expected positive integers that do not grow"),
        (6, torch.tensor([4.0]), TypeError, "batch_sizes: expected int64"),
        (7, "GRU", ValueError, "projection: expected None with mode='GRU', got a tensor"),
        (7, "lstm", ValueError, "mode: expected one of .*got 'lstm'"),
    ):
        with pytest.raises(error, match=message):
            implementation.recurrent_forward(*forward[:i], value, *forward[i + 1 :])
    for i, value, message in (
        (0, backward[0][:, 1:], r"grad_output: expected shape \(12, 3\), got \(12, 2\)"),
        (2, None, "grad_cell: expected a tensor with mode='LSTM', got None"),
        (8, backward[8][1:], r"feedback: expected shape \(20, 3\), got \(19, 3\)"),
        (13, [True], "wanted: expected 3 of them, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            implementation.recurrent_backward(*backward[:i], value, *backward[i + 1 :])
