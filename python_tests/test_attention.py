"""MultiheadAttention in all of torch's forms: the oracle is torch's own attention with other backward weights.

`FeedbackLinear` gives every torch.nn.functional.linear on a known weight, or on rows of it, B's gradient; the attention
around it is torch.nn's code.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import RULES, assert_same, with_feedback
from torch import Tensor

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")

N, L, S, E, HEADS = 3, 5, 4, 8, 2
STORED = bk.FeedbackAlignment(stored=True)


class FeedbackLinear:
    """Within it, torch.nn.functional.linear gives its input the gradient by the matrix that goes with the weight."""

    def __init__(self, matrices: list[tuple[Tensor, Tensor]]) -> None:
        self.matrices = {weight.untyped_storage().data_ptr(): b.contiguous() for weight, b in matrices}
        self.plain = F.linear
        self.used = 0

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        b = self.matrices.get(weight.untyped_storage().data_ptr())
        if b is None:
            return self.plain(x, weight, bias)
        self.used += 1
        rows = b.as_strided(weight.shape, weight.stride(), weight.storage_offset())
        return with_feedback(self.plain, x, weight, rows, bias)

    def __enter__(self) -> None:
        F.linear = self.linear

    def __exit__(self, *_: object) -> None:
        F.linear = self.plain


@dataclass(frozen=True)
class Case:
    """An attention, its inputs and masks: `inputs` is "self", "cross" (key is value) or "distinct"."""

    reason: str
    inputs: str = "self"
    make: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Callable[[], Any]] = field(default_factory=dict)
    batched: bool = True
    kdim: int = E
    vdim: int = E

    def __str__(self) -> str:
        return f"{self.reason} {self.inputs}".replace(" ", "_")

    def query_key_value(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        def tensor(length: int, width: int) -> Tensor:
            shape = (length, N, width) if self.batched else (length, width)
            if self.batched and self.make.get("batch_first"):
                shape = (N, length, width)
            return torch.randn(shape, dtype=dtype, requires_grad=True)

        query = tensor(L, E)
        if self.inputs == "self":
            return query, query, query
        key = tensor(S, self.kdim)
        return query, key, key if self.inputs == "cross" else tensor(S, self.vdim)

    def arguments(self) -> dict[str, Any]:
        return {name: value() for name, value in self.call.items()}

    def modules(self, rule: bk.Rule | str | None, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
        """The layer and its torch.nn twin, with biases that are not zero."""
        layer = bk.nn.MultiheadAttention(E, HEADS, **self.make, dtype=dtype, feedback=rule)
        twin = torch.nn.MultiheadAttention(E, HEADS, **self.make, dtype=dtype)
        with torch.no_grad():
            for name, p in twin.named_parameters():
                if name.endswith("bias"):
                    layer.get_parameter(name).normal_()
                p.copy_(layer.get_parameter(name))
        return layer, twin


def bool_padding() -> Tensor:
    mask = torch.zeros(N, S, dtype=torch.bool)
    mask[0, 2:] = mask[2, 0] = True
    return mask


def bool_mask(*lead: int, columns: int = S) -> Tensor:
    mask = torch.rand(*lead, L, columns) < 0.4
    mask[..., 1] = False
    return mask


def causal() -> Tensor:
    return torch.ones(L, L, dtype=torch.bool).triu(1)


def no() -> bool:
    return False


def yes() -> bool:
    return True


# need_weights=False takes torch through scaled_dot_product_attention, True through explicit scores: both are tried.
CASES = [
    Case("plain"),
    Case("plain", "cross"),
    Case("plain", "distinct"),
    Case("without weights", call={"need_weights": no}),
    Case("without weights", "cross", call={"need_weights": no}),
    Case("without weights", "distinct", call={"need_weights": no}),
    Case("weights of each head", "cross", call={"average_attn_weights": no}),
    Case("no bias", "distinct", {"bias": False}),
    Case("no bias", make={"bias": False}),
    Case("batch first", make={"batch_first": True}),
    Case("batch first", "cross", {"batch_first": True}, {"need_weights": no}),
    Case("unbatched", batched=False),
    Case("unbatched batch first", "cross", {"batch_first": True}, batched=False),
    Case("unbatched padding mask", "cross", call={"key_padding_mask": lambda: bool_padding()[0]}, batched=False),
    Case("unbatched head masks", "cross", call={"attn_mask": lambda: bool_mask(HEADS)}, batched=False),
    Case("other widths", "distinct", {"kdim": 5, "vdim": 7}, kdim=5, vdim=7),
    Case("other key width, no bias", "distinct", {"kdim": 5, "bias": False}, kdim=5),
    Case("other equal widths", "cross", {"kdim": 6, "vdim": 6}, {"need_weights": no}, kdim=6, vdim=6),
    Case("bias_k and bias_v", make={"add_bias_kv": True}),
    Case("bias_k and bias_v", "distinct", {"add_bias_kv": True, "batch_first": True}, {"need_weights": no}),
    Case("zero attention", "cross", {"add_zero_attn": True}),
    Case("zero attention", make={"add_zero_attn": True}, call={"need_weights": no}),
    Case(
        "bias_k, zero attention and masks",
        "cross",
        {"add_bias_kv": True, "add_zero_attn": True},
        {"key_padding_mask": bool_padding, "attn_mask": bool_mask},
    ),
    Case("bool padding mask", "cross", call={"key_padding_mask": bool_padding}),
    Case("bool padding mask", "distinct", call={"key_padding_mask": bool_padding, "need_weights": no}),
    Case("float padding mask", "cross", call={"key_padding_mask": lambda: torch.randn(N, S).double()}),
    Case("bool mask", "cross", call={"attn_mask": bool_mask}),
    Case("bool mask", "distinct", call={"attn_mask": bool_mask, "need_weights": no}),
    Case("float mask", "cross", call={"attn_mask": lambda: torch.randn(L, S).double()}),
    Case("bool mask of each head", "cross", call={"attn_mask": lambda: bool_mask(N * HEADS), "need_weights": no}),
    Case("float mask of each head", "cross", call={"attn_mask": lambda: torch.randn(N * HEADS, L, S).double()}),
    Case(
        "float mask and float padding mask",
        "cross",
        call={"attn_mask": lambda: torch.randn(L, S).double(), "key_padding_mask": lambda: torch.randn(N, S).double()},
    ),
    Case("causal", call={"attn_mask": causal, "is_causal": yes}),
    Case("causal without weights", call={"attn_mask": causal, "is_causal": yes, "need_weights": no}),
    Case(
        "causal with bias_k",
        make={"add_bias_kv": True},
        call={"attn_mask": causal, "is_causal": yes, "need_weights": no},
    ),
    Case(
        "causal and padding mask",
        call={
            "attn_mask": causal,
            "is_causal": yes,
            "need_weights": no,
            "key_padding_mask": lambda: torch.arange(L).expand(N, L) == L - 1,
        },
    ),
    Case("unbatched without weights", "cross", call={"need_weights": no}, batched=False),
]


def matrices_of(layer: Any) -> list[tuple[str, Tensor]]:
    """(parameter name, B) of an attention's projections."""
    out = layer.out_proj.feedback_matrix() if layer.uses_feedback else layer.out_proj.weight
    return [*((name, layer.feedback_matrix(name)) for name in layer.weights()), ("out_proj.weight", out)]


def results(module: Any, inputs: tuple[Tensor, ...], call: dict[str, Any], oracle: Any = None) -> dict[str, Tensor]:
    """Output, attention weights, and the gradients of both together for inputs and parameters, by name."""
    if oracle is None:
        outputs = module(*inputs, **call)
    else:
        with oracle:
            outputs = module(*inputs, **call)
    outputs = {name: t for name, t in zip(("output", "weights"), outputs, strict=True) if t is not None}
    leaves = {f"input {i}": t for i, t in enumerate(inputs) if all(t is not u for u in inputs[:i])}
    leaves |= {name: p for name, p in module.named_parameters() if p.requires_grad}
    torch.manual_seed(1)
    grad_outputs = [torch.randn(t.shape, dtype=t.dtype) for t in outputs.values()]
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), grad_outputs)
    return outputs | {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}


def assert_all_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_same(ours[name], theirs[name], name)


def check(case: Case, rule: bk.Rule | str) -> None:
    layer, twin = case.modules(rule)
    inputs, call = case.query_key_value(), case.arguments()
    oracle = FeedbackLinear([(twin.get_parameter(name), b) for name, b in matrices_of(layer)])
    ours, expected = results(layer, inputs, call), results(twin, inputs, call, oracle)
    assert oracle.used >= 2
    assert_all_same(ours, expected)
    # The oracle is not back-propagation.
    plain = results(twin, inputs, call)
    assert not torch.allclose(plain["gradient of input 0"], expected["gradient of input 0"])


@pytest.mark.parametrize("rule", ["usf", "fa"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_form(case: Case, rule: str) -> None:
    check(case, rule)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule: str) -> None:
    for inputs in ("self", "cross", "distinct"):
        check(Case("every rule", inputs, call={"need_weights": no}), RULES[rule])
    check(Case("every rule", "distinct", {"kdim": 5, "vdim": 7}, kdim=5, vdim=7), RULES[rule])


@pytest.mark.parametrize("rule", ["usf", "frsf", "frsf-match", "brsf"])
@pytest.mark.parametrize("inputs", ["self", "cross", "distinct"])
def test_frozen_signs_is_the_same_rule(inputs: str, rule: str) -> None:
    case = Case("frozen", inputs)
    layer, _ = case.modules(RULES[rule])
    tensors = case.query_key_value()
    free = results(layer, tensors, {})
    with bk.frozen_signs(layer):
        assert_all_same(results(layer, tensors, {}), free)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_b_set_to_w_is_torch_nn(case: Case) -> None:
    layer, twin = case.modules(STORED)
    with torch.no_grad():
        for name in layer.weights():
            getattr(layer, name.removesuffix("weight") + "feedback_weight").copy_(getattr(layer, name))
        layer.out_proj.feedback_weight.copy_(layer.out_proj.weight)
    inputs, call = case.query_key_value(), case.arguments()
    assert_all_same(results(layer, inputs, call), results(twin, inputs, call))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_back_propagation_is_torch_nn_bit_for_bit(case: Case) -> None:
    layer, twin = case.modules(None, torch.float32)
    inputs = case.query_key_value(torch.float32)
    call = {
        name: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for name, v in case.arguments().items()
    }
    ours, theirs = results(layer, inputs, call), results(twin, inputs, call)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


BIASES = ["in_proj_bias", "bias_k", "bias_v", "out_proj.bias"]


def replica_of(layer: Any) -> Any:
    """As DataParallel makes it, whose parameters are plain tensors."""
    replica = layer._replicate_for_data_parallel()
    for key, p in layer._parameters.items():
        setattr(replica, key, None if p is None else p.view_as(p))
    for key, part in layer._modules.items():
        setattr(replica, key, replica_of(part))
    return replica


@pytest.mark.parametrize("replica", [False, True])
@pytest.mark.parametrize(
    "wanted", ["query", "key", "value", "query key", "in_proj_weight", "out_proj.weight", *BIASES, "k_proj_weight"]
)
def test_gradients_wanted_for_some(wanted: str, replica: bool) -> None:
    width = E + (wanted == "k_proj_weight")
    case = Case("some", "distinct", {"add_bias_kv": True, "kdim": width}, kdim=width)
    layer, twin = case.modules("fa")
    tensors = dict(zip(("query", "key", "value"), case.query_key_value(), strict=True))
    named = {**tensors, **dict(layer.named_parameters())}
    for name, t in named.items():
        t.requires_grad_(name in wanted.split())
    for name, p in twin.named_parameters():
        p.requires_grad_(name in wanted.split())
    oracle = FeedbackLinear([(twin.get_parameter(name), b) for name, b in matrices_of(layer)])
    ours, _ = (replica_of(layer) if replica else layer)(**tensors)
    with oracle:
        theirs, _ = twin(**tensors)
    assert_same(ours, theirs)
    grad_output = torch.randn(ours.shape, dtype=ours.dtype)
    their_named = {**tensors, **dict(twin.named_parameters())}
    for name in wanted.split():
        (a,) = torch.autograd.grad(ours, named[name], grad_output, retain_graph=True)
        (b,) = torch.autograd.grad(theirs, their_named[name], grad_output, retain_graph=True)
        assert_same(a, b, name)


@pytest.mark.parametrize("wanted", ["in_proj_weight", "out_proj.weight", "in_proj_bias"])
def test_a_trained_b_takes_the_gradient_of_its_weight_alone(wanted: str) -> None:
    layer, _ = Case("kp").modules("kp")
    for name, p in layer.named_parameters():
        p.requires_grad_(name == wanted or "feedback" in name)
    x = torch.randn(L, N, E, dtype=torch.float64)
    layer(x, x, x)[0].square().sum().backward()
    taken = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    b = wanted.replace("weight", "feedback_weight")
    assert taken.keys() == {wanted, b}
    assert_same(taken[b], taken[wanted])


def test_dropout_acts_in_training_only() -> None:
    case = Case("dropout", make={"dropout": 0.5})
    layer, twin = case.modules("usf")
    inputs = case.query_key_value()
    for need_weights in (True, False):
        layer.eval(), twin.eval()
        assert_same(layer(*inputs, need_weights=need_weights)[0], twin(*inputs, need_weights=need_weights)[0])
        layer.train()
        first, second = (layer(*inputs, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.allclose(first, second)


def test_inference_takes_torchs_fast_path() -> None:
    case = Case("inference", make={"batch_first": True})
    layer, twin = case.modules("fa", torch.float32)
    layer.eval(), twin.eval()
    x = case.query_key_value(torch.float32)[0]
    with torch.no_grad():
        assert torch.equal(layer(x, x, x, need_weights=False)[0], twin(x, x, x, need_weights=False)[0])
        # The fast path is one op; the slow one calls scaled_dot_product_attention.
        with torch.profiler.profile() as profile:
            layer(x, x, x, need_weights=False)
    assert "aten::_native_multi_head_attention" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("mask", [False, True])
def test_encoder_layer(mask: bool) -> None:
    torch.manual_seed(2)
    plain = torch.nn.TransformerEncoderLayer(E, HEADS, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    converted = deepcopy(plain)
    # torch has no fast path under hooks, as the proof is until a forward with gradients.
    bk.convert_(converted.self_attn, "fa", example=(torch.ones(N, L, E, dtype=torch.float64),) * 3)
    assert (
        type(converted.self_attn) is bk.nn.MultiheadAttention and type(plain.self_attn) is torch.nn.MultiheadAttention
    )
    plain.eval(), converted.eval()
    x = torch.randn(N, L, E, dtype=torch.float64, requires_grad=True)
    padding = (torch.arange(L) >= torch.tensor([[5], [3], [4]])) if mask else None

    with torch.no_grad(), torch.profiler.profile() as profile:
        fast = converted(x, src_key_padding_mask=padding)
    assert "aten::_transformer_encoder_layer_fwd" in {event.key for event in profile.key_averages()}
    with torch.no_grad():
        assert torch.equal(fast, plain(x, src_key_padding_mask=padding))

    # With gradients the feedback acts: the oracle is the plain encoder layer, linear by linear.
    attention = plain.self_attn
    oracle = FeedbackLinear([(attention.get_parameter(name), b) for name, b in matrices_of(converted.self_attn)])
    with oracle:
        expected = plain(x, src_key_padding_mask=padding)
    assert oracle.used == 2
    ours, backprop = converted(x, src_key_padding_mask=padding), plain(x, src_key_padding_mask=padding)
    assert_same(ours, expected)
    # Where nothing is padded, the fast path computes the same.
    kept = torch.ones(N, L, dtype=torch.bool) if padding is None else ~padding
    assert_same(ours[kept], fast[kept])
    grad_output = torch.randn(ours.shape, dtype=ours.dtype)
    grads = [torch.autograd.grad(y, x, grad_output)[0] for y in (ours, expected, backprop)]
    assert_same(grads[0], grads[1])
    assert not torch.allclose(grads[0], grads[2])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_with_padding_in_inference() -> None:
    # torch.nn.TransformerEncoder hands its layers a nested tensor here.
    layer = torch.nn.TransformerEncoderLayer(E, HEADS, 16, dropout=0.0, batch_first=True)
    plain = torch.nn.TransformerEncoder(layer, 2).eval()
    converted = deepcopy(plain)
    bk.convert_(converted, "usf")
    x, padding = torch.randn(N, L, E), torch.arange(L) >= torch.tensor([[5], [3], [4]])
    with torch.no_grad():
        assert torch.equal(converted(x, src_key_padding_mask=padding), plain(x, src_key_padding_mask=padding))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("inputs", ["self", "cross", "distinct"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast_dtypes_are_torch_nns(inputs: str, dtype: torch.dtype, need_weights: bool) -> None:
    case = Case("autocast", inputs)
    layer, twin = case.modules("usf", torch.float32)
    tensors, call = case.query_key_value(torch.float32), {"need_weights": need_weights, "attn_mask": None}
    if inputs != "self":
        call["attn_mask"] = bool_mask()
    with torch.autocast("cpu", dtype):
        ours, theirs = results(layer, tensors, call), results(twin, tensors, call)
    assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in theirs.items()}
    exact = results(layer.double(), tuple(t.double() for t in tensors), call)
    for name in ("output", "weights"):
        if name in ours:
            allowed = 2 * (theirs[name].double() - exact[name]).abs().max() + torch.finfo(dtype).eps / 2
            assert (ours[name].double() - exact[name]).abs().max() <= allowed, name


@pytest.mark.parametrize("inputs", ["self", "cross", "distinct"])
def test_signs_come_from_the_parameter_under_autocast(inputs: str) -> None:
    # Projection weights of 1e-8 are zero in float16; their signs are not.
    case = Case("signs", inputs)
    layer, _ = case.modules("usf", torch.float32)
    with torch.no_grad():
        layer.in_proj_weight.copy_(1e-8 * torch.randn_like(layer.in_proj_weight).sign())
    tensors = case.query_key_value(torch.float32)
    with torch.autocast("cpu", torch.float16):
        output = layer(*tensors)[0]
    grads = torch.autograd.grad(output.float().square().sum(), tensors[-1])
    assert grads[0].count_nonzero() == grads[0].numel()


@pytest.mark.parametrize("key_is_value", [True, False])
def test_packed_signs_of_each_projection(key_is_value: bool) -> None:
    # They are laid out for all three, and cut where a width is a multiple of their tiles.
    layer = bk.nn.MultiheadAttention(64, 2, batch_first=True, feedback="usf")
    with torch.no_grad():
        layer.in_proj_weight[70, 5] = 0
    grads = []
    for packed in (False, True):
        layer.reads_no_weight = layer.out_proj.reads_no_weight = packed
        x = [torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3)]
        y = layer(x[0], x[1], x[1] if key_is_value else x[2])[0]
        saved = {tuple(t.shape) for t in _saved(y) if t.dtype.is_floating_point}
        assert ((64, 64) in saved or (128, 64) in saved) != packed
        grads.append(torch.autograd.grad(y.sum(), x[: 3 - key_is_value]))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def _saved(y: torch.Tensor) -> list[torch.Tensor]:
    found, stack = [], [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None:
            stack += [n for n, _ in node.next_functions]
            found += [t for t in getattr(node, "saved_tensors", ()) if t is not None]
    return found
