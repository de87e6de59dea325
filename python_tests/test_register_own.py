"""Classes that a user registers, and those that need it not: converted, proven, and with the gradients of an oracle."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same, with_feedback
from torch import Tensor, nn

import bioplaus_kernels as bk
from bioplaus_kernels.register import _made, _registered

pytestmark = pytest.mark.usefixtures("one_thread")


class Scaled(nn.Linear):
    """Its forward is its own."""

    def forward(self, input: Tensor, gain: float = 3.0) -> Tensor:
        return super().forward(torch.tanh(input)) * gain


class Centred(nn.Conv1d):
    """Its weight is computed."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


class Transposed(nn.Module):
    """A linear map of another library."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns))

    def forward(self, input: Tensor) -> Tensor:
        return input.matmul(self.weight)


class Deconvolution(nn.ConvTranspose1d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv_transpose1d(input, weight=self.weight, bias=self.bias, stride=self.stride) + 1


class Reads(nn.Module):
    """The weights of children, in other ways than a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(torch.addmm(self.a.bias, x, self.a.weight.T))
        y = (self.b.weight.float().to(y.dtype) @ y.t()).mT
        return F.linear(torch.tanh(y), bias=self.c.bias, weight=self.c.weight)


class ReadsBelow(nn.Module):
    """Weights of layers that its children hold, in products that are laid out as torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.list, self.table = nn.ModuleList([nn.Linear(6, 5)]), nn.ModuleDict({"b": nn.Linear(5, 4)})
        self.c = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(F.linear(x, self.list[0].weight)).mT
        y = (self.table["b"].weight @ y).view(-1, 4, x.shape[-2]).mT
        return F.linear(torch.tanh(y), self.c.weight)


class Tied(nn.Module):
    """An autoencoder with one weight: the decoder's is the encoder's, turned over."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(columns, rows)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.mT)


class Turned(nn.Linear):
    """Its weight is (in, out), square or not."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.mm(input, self.weight) + self.bias


class Inherits(nn.Linear):
    """All that computes is torch.nn's."""

    def extra_repr(self) -> str:
        return "mine"


class Merged(Reads):
    """The sum of two layers' weights."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.linear(x, self.a.weight + self.b.weight))


class InPlace(Reads):
    """What begins as a Parameter's and is written."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(self.a.weight)[:, :2].T.clone()
        h = h.copy_(self.a(x))
        return self.c(F.linear(h, self.b.weight))


class Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x, need_weights=False)[0] * 2


def doubled(module: Any, input: Tensor) -> Tensor:
    return F.linear(input, module.weight, module.bias) * 2


def centred(module: Any) -> Tensor:
    return module.weight - module.weight.mean()


def transposed(module: Any) -> Tensor:
    return module.weight.t()


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What a test registers."""
    yield
    _registered.clear()
    _made.clear()


users = pytest.mark.usefixtures("forgotten")
# A layer, how it is registered, its input, and what it computes of the W that its product has.
USERS: dict[str, tuple[Callable[[], Any], tuple[Any, ...], tuple[int, ...], Callable[..., Tensor]]] = {
    "subclass": (lambda: Scaled(6, 5), (Scaled,), (3, 6), lambda x, w, c: F.linear(torch.tanh(x), w, c) * 3),
    "another forward": (lambda: Scaled(6, 5), (Scaled, doubled), (3, 6), lambda x, w, c: F.linear(x, w, c) * 2),
    "the parent's forward": (lambda: Scaled(6, 5), (Scaled, nn.Linear), (3, 6), F.linear),
    "computed": (lambda: Centred(2, 3, 2), (Centred, None, centred), (3, 2, 5), F.conv1d),
    "another library's": (lambda: Transposed(6, 5), (Transposed, nn.Linear, transposed), (2, 3, 6), F.linear),
    "transposed convolution": (
        lambda: Deconvolution(2, 3, 2, stride=2),
        (Deconvolution,),
        (3, 2, 5),
        lambda x, w, c: F.conv_transpose1d(x, w, c, stride=2) + 1,
    ),
}


@users
@pytest.mark.parametrize("rule", ["usf", "fa", "kp", "frsf"])
@pytest.mark.parametrize("case", USERS)
def test_a_users_layer(case: str, rule: str) -> None:
    build, (cls, *how), shape, f = USERS[case]
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    plain = copy.deepcopy(layer)
    assert bk.convert_(layer, rule).left == [""]
    assert bk.register(cls, *how[:1], **({"weight": how[1]} if len(how) > 1 else {})) is cls
    assert bk.convert_(layer, rule, example=x).proven == [""]
    bias = getattr(layer, "bias", None)
    ours, theirs = layer(x), with_feedback(f, x, layer.weight_of(), layer.feedback_matrix(), bias)
    direction = torch.randn_like(ours)
    wanted = [p for p in (x, layer.weight, bias) if p is not None]
    for o, t in zip(*(torch.autograd.grad(y, wanted, direction) for y in (ours, theirs)), strict=True):
        assert_same(o, t)
    assert isinstance(layer, cls) and type(layer).__name__ == cls.__name__
    assert torch.equal(copy.deepcopy(layer)(x), pickle.loads(pickle.dumps(layer))(x))
    bk.convert_(layer, None)
    assert type(layer) is cls and torch.equal(layer(x), plain(x))


@users
@pytest.mark.parametrize(
    ("cls", "how", "other"),
    [(Transposed, None, True), (Transposed, transposed, False), (Scaled, None, True), (Inherits, None, False)],
)
def test_a_forward_that_is_not_run_and_gives_other_values_is_said(cls: Any, how: Any, other: bool) -> None:
    bk.register(cls, nn.Linear, weight=how)
    report = bk.convert_(cls(6, 6), "usf", example=torch.randn(3, 6, requires_grad=True))
    assert report.proven == [""]
    assert report.rows[0].reason == other * "the forward of its class gives other values, and is not run"


@users
def test_a_weight_by_any_name_is_proven() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.kernel + self.bias

    bk.register(Dense, nn.Linear, weight=lambda m: m.kernel.t())
    report = bk.convert_(Dense(), "usf", example=torch.randn(3, 6, requires_grad=True))
    assert report.proven == [""] and report.rows[0].reason == ""


@users
def test_a_users_parent() -> None:
    model, x = Reads(), torch.randn(2, 6, requires_grad=True)
    assert bk.convert_(model, "usf", example=x).left == ["a", "b", "c"]
    bk.register(Reads)
    report = bk.convert_(model, "usf", example=x)
    assert report.proven == ["a", "b", "c"] and type(model) is not Reads and isinstance(model, Reads)

    layers = {n: bk.nn.Linear(m.in_features, m.out_features, feedback="usf") for n, m in model.named_children()}
    for name, layer in layers.items():
        layer.weight, layer.bias = model.get_submodule(name).weight, model.get_submodule(name).bias

    def by_hand(x: Tensor) -> Tensor:
        return layers["c"](torch.tanh(layers["b"](torch.tanh(layers["a"](x)))))

    wanted = [x, *model.parameters()]
    for o, t in zip(*(torch.autograd.grad(f(x).square().sum(), wanted) for f in (model, by_hand)), strict=True):
        torch.testing.assert_close(o, t)
    bk.convert_(model, None)
    assert type(model) is Reads


@users
@pytest.mark.parametrize("rule", ["usf", "fa", "kp"])
def test_a_parent_reads_layers_anywhere_below_it(rule: str) -> None:
    model, x = ReadsBelow().double(), torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    report = bk.convert_(model, rule, example=x)
    assert report.left == ["list.0", "table.b", "c"]
    for row in report.rows:
        assert row.reason.endswith("to allow it: bioplaus_kernels.register(test_register_own.ReadsBelow)")
    bk.register(ReadsBelow)
    assert bk.convert_(model, rule, example=x).proven == ["list.0", "table.b", "c"]

    layers = [model.get_submodule(name) for name in ("list.0", "table.b", "c")]
    y = x
    for layer in layers:
        y = with_feedback(F.linear, y, layer.weight, layer.feedback_matrix(), None)
        y = y if layer is layers[2] else torch.tanh(y)
    wanted = [x, *(layer.weight for layer in layers)]
    for o, t in zip(*(torch.autograd.grad(z.square().sum(), wanted) for z in (model(x), y)), strict=True):
        assert_same(o, t)


@users
def test_no_weight_is_computed_for_the_search() -> None:
    class Counts(nn.Module):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            self.calls += 1
            return 2 * weight

    model, counts = Reads(), Counts()
    nn.utils.parametrize.register_parametrization(model.b, "weight", counts)
    bk.register(Reads)
    bk.convert_(model, "usf")
    for p in model.parameters():
        p.requires_grad_(False)
    counts.calls = 0
    model(torch.randn(2, 6, requires_grad=True))
    assert counts.calls == 1


@users
@pytest.mark.parametrize("rule", ["usf", "fa", "kp", "fa_signed_init", "low_rank", bk.SignSymmetry(scale="match")])
@pytest.mark.parametrize("rows", [4, 6])
def test_a_weight_turned_over_has_b_turned_over(rows: int, rule: Any) -> None:
    model, x = Tied(rows, 6).double(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    bk.register(Tied)
    assert bk.convert_(model, rule, example=x).proven == ["encoder"]
    layer = model.encoder
    w, b = layer.weight, layer.feedback_matrix()
    hidden = torch.tanh(with_feedback(F.linear, x, w, b, layer.bias))
    by_hand = with_feedback(F.linear, hidden, w.mT, b.mT, None)
    wanted = [x, *(p for n, p in model.named_parameters() if n.split(".")[-1] in ("weight", "bias"))]
    for o, t in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (model(x), by_hand)), strict=True):
        assert_same(o, t)


@users
@pytest.mark.parametrize("weight", [None, transposed])
@pytest.mark.parametrize("rule", ["usf", "fa", "fa_signed_init"])
def test_a_square_weight_that_is_another_librarys(rule: str, weight: Any) -> None:
    bk.register(Turned, weight=weight)
    layer, x = Turned(6, 6).double(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert bk.convert_(layer, rule, example=x).proven == [""]
    b = layer.feedback_matrix() if weight else layer.feedback_matrix().mT
    theirs = with_feedback(F.linear, x, layer.weight.mT, b, layer.bias)
    for o, t in zip(
        *(torch.autograd.grad(y.square().sum(), [x, layer.weight]) for y in (layer(x), theirs)), strict=True
    ):
        assert_same(o, t)
    if rule != "fa":
        assert torch.equal(b.sign(), layer.weight.mT.sign())


SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mm(x, mat2=)": lambda x, w, c: torch.mm(x, mat2=w),
    "mm(input=, mat2=)": lambda x, w, c: torch.mm(input=x, mat2=w),
    "x.mm(mat2=)": lambda x, w, c: x.mm(mat2=w),
    "matmul(input=, other=)": lambda x, w, c: torch.matmul(input=x, other=w),
    "addmm(beta=2)": lambda x, w, c: torch.addmm(c, x, mat2=w, beta=2) - 2 * c,
    "addmm(beta=0)": lambda x, w, c: torch.addmm(c / 0, x, w, beta=0),
}
# Those that torch gives no gradient, or that are not ours.
LEFT: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "matmul(out=)": lambda x, w, c: torch.matmul(x.detach(), w.detach(), out=torch.empty_like(x)),
    "addmm(out=)": lambda x, w, c: torch.addmm(c, x.detach(), w.detach(), out=torch.empty_like(x)) - c,
    "addmm(alpha=2)": lambda x, w, c: torch.addmm(c, x, w, alpha=2) / 2 - c / 2,
    "addmm(1, c, x, w)": lambda x, w, c: torch.addmm(1, c, x, w) - c,
}


@users
@pytest.mark.filterwarnings("ignore:This overload of addmm")
@pytest.mark.parametrize("spelling", [*SPELLINGS, *LEFT])
def test_a_product_by_any_of_torchs_spellings(spelling: str) -> None:
    class Spelt(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return (SPELLINGS | LEFT)[spelling](input, self.weight, torch.ones_like(input))

    bk.register(Spelt)
    layer, x = Spelt(6, 6).double(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    bk.convert_(layer, "fa")
    b = layer.feedback_matrix() if spelling in SPELLINGS else layer.weight
    theirs = with_feedback(F.linear, x, layer.weight.mT, b.mT, None)
    if "out" in spelling:
        assert_same(layer(x), theirs)
        return
    ours = layer.forward(x)
    assert_same(ours, theirs)
    for o, t in zip(*(torch.autograd.grad(y.square().sum(), [x, layer.weight]) for y in (ours, theirs)), strict=True):
        assert_same(o, t)


class Frees(nn.Linear):
    """Puts buffers away, whose identity what it computes then takes."""

    def forward(self, input: Tensor) -> Tensor:
        freed, kept = {id(self._buffers.pop(f"state{i}")) for i in range(50)}, []
        while len(kept) < 100 and id(input) not in freed:
            kept.append(input)
            (input,) = torch.tanh(input).chunk(1)
        return F.linear(input, self.weight)


@users
def test_a_buffer_that_is_put_away_is_no_other_tensor() -> None:
    bk.register(Frees)
    layer = Frees(6, 6)
    bk.convert_(layer, "fa")
    for i in range(50):
        layer.register_buffer(f"state{i}", torch.zeros(()))
    assert "_LinearBackward" in str(layer.forward(torch.randn(2, 6, requires_grad=True)).grad_fn)


@users
def test_what_is_computed_of_two_layers_is_neithers() -> None:
    bk.register(Merged)
    report = bk.convert_(model := Merged(), "usf", example=torch.randn(2, 6, requires_grad=True))
    assert report.proven == ["c"] and report.left == ["a", "b"] and type(model.a) is nn.Linear
    assert all("bioplaus_kernels.register" not in row.reason for row in report.rows)


@users
def test_what_is_written_in_place_is_known_no_longer() -> None:
    bk.register(InPlace)
    report = bk.convert_(InPlace(), "usf", example=torch.randn(2, 6, requires_grad=True))
    assert report.proven == ["a", "b", "c"]


@users
def test_attention_of_a_users_own() -> None:
    model, x = Attention(8, 2, batch_first=True).double(), torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    report = bk.convert_(model, "usf", example=x)
    assert report.left == ["", "out_proj"] and report.rows[1].reason == "Attention uses its weight without calling it"
    bk.register(Attention)
    assert bk.convert_(model, "usf", example=x).proven == [""]
    other = nn.MultiheadAttention(8, 2, batch_first=True).double()
    bk.convert_(other, "usf")
    other.load_state_dict(model.state_dict())
    ours = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
    theirs = torch.autograd.grad(2 * other(x, x, x, need_weights=False)[0].sum(), [x, *other.parameters()])
    for o, t in zip(ours, theirs, strict=True):
        assert_same(o, t)
    bk.convert_(model, None)
    assert type(model) is Attention and type(model.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear


@users
def test_they_compile_to_one_graph() -> None:
    for kind in (Reads, ReadsBelow, Scaled, Tied, Turned):
        bk.register(kind)
    below = nn.Sequential(Tied(4, 6), Turned(6, 6), nn.Unflatten(0, (1, 2)), ReadsBelow(), nn.Flatten(0, 1))
    model, x = nn.Sequential(Scaled(6, 6), below, nn.Linear(3, 6), Reads()), torch.randn(2, 6, requires_grad=True)
    bk.convert_(model, "fa", example=x)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    wanted = {"inputs": [x, *model.parameters()], "allow_unused": True, "materialize_grads": True}
    grads = [torch.autograd.grad(f(x).sum(), **wanted) for f in (compiled, model)]
    torch.testing.assert_close(*grads)


@users
def test_a_parents_forward_can_be_another() -> None:
    bk.register(Reads, lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x))))))
    model, x = Reads(), torch.randn(2, 6, requires_grad=True)
    y = model(x)
    assert bk.convert_(model, "fa", example=x).proven == ["a", "b", "c"]
    torch.testing.assert_close(model(x), y)


def test_a_subclass_that_computes_what_torch_nn_does_needs_no_register() -> None:
    model = nn.Sequential(Inherits(4, 4), nn.Tanh(), nn.utils.parametrizations.weight_norm(Inherits(4, 4)))
    x = torch.randn(2, 4, requires_grad=True)
    assert bk.convert_(model, "fa", example=x).proven == ["0", "2"]
    assert isinstance(model[0], Inherits) and "mine, feedback=" in str(model[0])
    nn.utils.parametrize.remove_parametrizations(model[2], "weight")
    assert bk.check(model, x).proven == ["0", "2"]
    bk.convert_(model, None)
    assert type(model[0]) is type(model[2]) is Inherits


@users
def test_as_a_decorator_and_in_a_file() -> None:
    layer = bk.register(Scaled)(4, 3)
    bk.convert_(layer, "fa")
    torch.save(layer, file := io.BytesIO())
    _registered.clear(), _made.clear()
    file.seek(0)
    with pytest.raises(TypeError, match=r"test_register_own.Scaled: bioplaus_kernels.register it first"):
        torch.load(file, weights_only=False)


@users
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), r"cls: expected a class of modules, got 3"),
        ((dict,), r"cls: expected a class of modules, got .*dict"),
        ((nn.Linear,), r"cls: expected a class that does not convert by itself, got Linear"),
        ((bk.nn.Linear,), r"cls: expected a class that does not convert by itself, got Linear"),
        ((Scaled, 3), r"how: expected a function of the module and its inputs, .* got 3"),
        ((Scaled, nn.Conv2d), r"how: expected torch.nn.Linear or a layer of torch.nn above Scaled, got Conv2d"),
        ((Reads, nn.ReLU), r"how: expected torch.nn.Linear or a layer of torch.nn above Reads, got ReLU"),
    ],
)
def test_errors(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        bk.register(*arguments)
    with pytest.raises(TypeError, match="weight: expected a function of the module or None"):
        bk.register(Scaled, weight=3)
    with pytest.raises(TypeError, match="weight: expected None where Reads is no layer"):
        bk.register(Reads, weight=transposed)
    for cls, layer, dims in ((Scaled, Scaled(4, 3), 2), (Centred, Centred(2, 3, 2), 3)):
        for weight, got in ((lambda m: 3, "3"), (lambda m: m.weight[None], r"shape \(1, ")):
            bk.register(cls, weight=weight)
            message = rf"\(root\): weight: expected a function that gives a tensor of {dims} dimensions, .* got {got}"
            with pytest.raises(TypeError, match=message):
                bk.convert_(layer, "usf")
            assert type(layer) is cls
