"""Every public callable, each argument of it in turn replaced by each of a list of bad values.

ValueError or TypeError must begin with the argument's name and a colon. Exempt: what a torch.nn or torch.optim class
does with its own arguments, what a model does with its inputs, and the ops, whose types the dispatcher checks.
"""

import math
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bioplaus_kernels as bk
from bioplaus_kernels import functional as F
from bioplaus_kernels import metrics, targetprop
from bioplaus_kernels.backends import reference
from bioplaus_kernels.feedback import feedback_key, linear_fans

pytestmark = pytest.mark.usefixtures("one_thread")


def w(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).reshape(shape)


def x(*shape: int) -> Tensor:
    return w(*shape).requires_grad_()


NONE, NAN, INF, BOOL, STR, NEG = None, math.nan, math.inf, True, "wrong", -1
ARRAY, LIST, OBJECT = np.ones(3), [1.0, 2.0], object()

# What is bad for an argument of each kind. A kind that may be None is written with "?".
KINDS: dict[str, list[Any]] = {
    "tensor": [NONE, 3, 1.5, BOOL, STR, LIST, ARRAY, OBJECT, torch.float32],
    "float tensor": [NONE, 3, STR, LIST, ARRAY, torch.ones(3, 4, dtype=torch.int64)],
    "tensors": [NONE, 3, STR, LIST, ARRAY, OBJECT, [], w(3, 4), [w(3, 4)] * 20],
    "module": [NONE, 3, BOOL, STR, LIST, ARRAY, OBJECT, w(3), torch.nn.Linear],
    "function": [NONE, 3, BOOL, STR, LIST, ARRAY, OBJECT, w(3)],
    "integer": [NONE, 1.0, 1.5, NAN, INF, BOOL, STR, "3", LIST, [1], ARRAY, OBJECT, w(1), np.float64(2), np.True_],
    "size": [0, NEG, -(2**70)],
    "number": [NONE, BOOL, STR, "1.0", LIST, ARRAY, OBJECT, 1j, w(1), NAN, np.True_],
    "finite": [INF, -INF, 10**400, np.float32(INF)],
    "not negative": [NEG, -0.5],
    "fraction": [NEG, 1.5, INF, 2],
    "boolean": [NONE, 0, 1, 1.0, NAN, STR, LIST, ARRAY, OBJECT, np.True_],
    "name": [NONE, 3, 1.5, NAN, BOOL, STR, LIST, ARRAY, OBJECT, w(3)],
    "string": [NONE, 3, 1.5, BOOL, LIST, ARRAY, OBJECT, b"bytes"],
    "entries": [NONE, 3, 1.5, BOOL, OBJECT],
    "rule": [3, 1.5, NAN, BOOL, STR, LIST, ARRAY, OBJECT, bk.SignSymmetry],
    "direct rule": [NONE, 3, NAN, BOOL, STR, LIST, ARRAY, OBJECT, bk.SignSymmetry(), bk.direct.DFA],
    "instance": [NONE, 3, 1.5, BOOL, STR, LIST, ARRAY, OBJECT],
    "dtype": [3, BOOL, STR, LIST, ARRAY, torch.int64, torch.complex64],
    "device": [1.5, STR, LIST, ARRAY, OBJECT, torch.float32],
}


def ints(d: int, least: int = 0) -> list[Any]:
    """Bad values for one integer or `d` of them."""
    some = [*KINDS["integer"], NEG, 2**31, 2**63 - 1, 2**70, [1] * (d + 1), [1.0] * d, [True] * d, [NEG] * d, ()]
    some = [v for v in some if d > 1 or repr(v) != "[1]"]
    return [*some, "1" * d, {1: 2}, [[1] * d] * d, [2**63 - 1] * d] + [0, [0] * d] * (least > 0)


def padding(d: int) -> list[Any]:
    """Bad values for a padding that can be nested pairs, "same" or "valid" in a locally-connected function."""
    nested = [[(1, 2)] * (d + 1), [(1, 2, 3)] * d, [(1.5, 2)] * d, [(True, 2)] * d, [(NEG, 1)] * d, ["ab"] * d]
    return [v for v in ints(d) if d != 2 or repr(v) != "[[1, 1], [1, 1]]"] + nested


class Case:
    """`call` with `right` arguments works; each argument is bad for the values of its kinds in `kinds`."""

    def __init__(self, name: str, call: Callable[..., Any], right: dict[str, Any], /, **kinds: Any) -> None:
        self.name, self.call, self.right, self.kinds = name, call, right, kinds

    def tries(self) -> Iterator[tuple[str, Any]]:
        for argument, kind in self.kinds.items():
            for part in kind if isinstance(kind, list) else kind.split(" + "):
                if not isinstance(part, str) or part.rstrip("?") not in KINDS:
                    yield argument, part
                    continue
                for value in KINDS[part.rstrip("?")]:
                    if value is not None or not part.endswith("?"):
                        yield argument, value


def run(case: Case, /, **wrong: Any) -> Any:
    return case.call(**(case.right | wrong))


CASES: list[Case] = []


def add(name: str, call: Callable[..., Any], right: dict[str, Any], /, **kinds: Any) -> None:
    CASES.append(Case(name, call, right, **kinds))


# Rules.
for rule in (bk.SignSymmetry, bk.FixedMagnitude, bk.BatchMagnitude, bk.FeedbackAlignment, bk.SignedInit):
    scale = {"scale": [*KINDS["number"], *KINDS["finite"], 0, NEG]}
    own = {"stored": "boolean", "entries": "name"}
    add(rule.__name__, rule, {}, **scale, **{k: v for k, v in own.items() if k in rule.__dataclass_fields__})
for learned in (bk.KolenPollack, bk.WeightMirror):
    add(learned.__name__, learned, {}, **scale, stored=[*KINDS["boolean"], False], entries="name")
for aligned in (bk.SymmetricAlignment, bk.ActivationAlignment, bk.InformationAlignment):
    kinds = dict.fromkeys(("alpha", "beta", "gamma")[: 2 + (aligned.name == "ia")], "number + finite + not negative")
    add(aligned.__name__, aligned, {}, **scale, **kinds, stored=[*KINDS["boolean"], False], entries="name")
add("LowRank", bk.LowRank, {}, **scale, rank="integer + size", learned="boolean", entries="name")
add("SignConcordance", bk.SignConcordance, {}, **scale, p="number + fraction")
for direct_rule in (bk.direct.DFA, bk.direct.SDFA, bk.direct.DRTP, bk.direct.Shallow):
    more = {"reduction": "name"} if direct_rule is bk.direct.DRTP else {}
    add(direct_rule.__name__, direct_rule, {}, **scale, entries="name", shared="boolean", stored="boolean", **more)
add("DKP", bk.direct.DKP, {}, **scale, entries="name", shared="boolean", stored=[*KINDS["boolean"], False])
add("feedback_key", feedback_key, {"seed": 0, "name": ""}, seed="integer", name="string")
add("as_rule", bk.feedback.as_rule, {"feedback": "fa"}, feedback="rule")

# Functions. Back-propagation's are torch's own, which also takes a bool for an integer and integers as tensors.
KEY = feedback_key(0)
BAD_B = [w(2, 2), torch.ones(3, 4, dtype=torch.int64)]
for name, feedback in {"usf": "usf", "fa": "fa", "backprop": None}.items():
    taken = {"feedback": feedback, "key": KEY if feedback == "fa" else None}
    bad_key = [3, STR, LIST, ARRAY, w(3), KEY[:2]] + [NONE] * (feedback == "fa") + [KEY] * (feedback != "fa")
    both: dict[str, Any] = {"weight": "tensor", "feedback": [*KINDS["rule"], *BAD_B], "key": bad_key}
    both |= {"bias": "tensor? + float tensor?", "input": "tensor"}
    if feedback is not None:
        both |= {"input": "tensor + float tensor", "weight": "tensor + float tensor"}
    right = {"input": x(2, 4), "weight": w(3, 4), "bias": w(3), **taken}
    add(f"linear {name}", F.linear, right, **both)

    def geometry(d: int, feedback: Any = feedback) -> dict[str, Any]:
        def own(values: list[Any]) -> list[Any]:
            # torch takes one element for all dimensions and any 64 bits.
            torchs = "[1]", str(2**31), str(2**63 - 1), str([2**63 - 1] * d)
            return values if feedback is not None else [v for v in values if repr(v) not in torchs]

        found = {"stride": own(ints(d, 1)), "padding": own(ints(d)), "dilation": own(ints(d, 1))}
        return found | {"groups": own([*KINDS["integer"], 0, NEG])}

    for d in (1, 2, 3):
        conv, transposed = getattr(F, f"conv{d}d"), getattr(F, f"conv_transpose{d}d")
        right = {"input": x(2, 4, *[5] * d), "weight": w(6, 4, *[3] * d), "bias": w(6), **taken}
        add(f"conv{d}d {name}", conv, right, **both, **geometry(d))
        right = right | {"weight": w(4, 6, *[3] * d)}
        extra = {"output_padding": geometry(d)["padding"]}
        add(f"conv_transpose{d}d {name}", transposed, right, **both, **geometry(d), **extra)
        right = right | {"weight": w(*[3] * d, 6, *[3] * d, 4)}
        lc = getattr(F, f"locally_connected{d}d")
        strict = {"stride": ints(d, 1), "padding": padding(d), "dilation": ints(d, 1)}
        strict |= {"groups": [*KINDS["integer"], 0, NEG], "input": "tensor + float tensor"}
        strict |= {"weight": "tensor + float tensor"}
        add(f"locally_connected{d}d {name}", lc, right, **(both | strict))
# What the layers call: their geometry and operands are checked already.
given = {"stride": [1, 1], "dilation": [1, 1], "groups": 1, "op": F.resolve("usf", w(3, 4), linear_fans(w(3, 4)))}
flat_pads, pads = {"padding": [0] * 4}, {"padding": [0, 0]}
lc_weight = w(3, 3, 6, 3, 3, 4)
for call, weight, more in (
    (F.conv_with, w(6, 4, 3, 3), {"d": 2, **pads, **given}),
    (F.conv_transpose_with, w(4, 6, 3, 3), {"d": 2, "output_padding": [0, 0], **pads, **given}),
    (F.locally_connected_with, lc_weight, {**flat_pads, **given}),
    (F.locally_connected_transpose_with, lc_weight, {"output_size": [5, 5], **flat_pads, **given}),
    (F.linear_with, w(3, 4), {"op": given["op"]}),
):
    linear = call is F.linear_with
    shape = (2, 4) if linear else (2, 6, 3, 3) if call is F.locally_connected_transpose_with else (2, 4, 5, 5)
    out = 3 if linear else 4 if call is F.locally_connected_transpose_with else 6
    right = {"input": x(*shape), "weight": weight, "bias": w(out), **more}
    floats = "tensor + float tensor"
    add(call.__name__, call, right, input=floats, weight=floats, bias="tensor? + float tensor?")
add("ints", lambda value: F.ints("value", value, 2, 1), {"value": 1}, value=ints(2, 1))
add("needs_feedback", F.needs_feedback, {"input": x(2)}, input="tensor")
add("is_backprop", F.is_backprop, {"feedback": None}, feedback="rule")
add("no_key", F.no_key, {"key": None}, key=[3, KEY])

# Layers: a torch.nn class checks its own arguments.
LAYERS: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {"Linear": ((4, 3), {}, (2, 4))}
for d in (1, 2, 3):
    LAYERS[f"Conv{d}d"] = LAYERS[f"ConvTranspose{d}d"] = ((4, 6, 3), {}, (2, 4, *[5] * d))
    LAYERS[f"LocallyConnected{d}d"] = ((4, 6, 3), {"input_size": 5}, (2, 4, *[5] * d))
    LAYERS[f"LocallyConnectedTranspose{d}d"] = ((4, 6, 3), {"output_size": 5}, (2, 4, *[3] * d))
for name, (args, named, shape) in LAYERS.items():
    kind = getattr(bk.nn, name)
    add(f"nn.{name}()", lambda feedback, k=kind, a=args, n=named: k(*a, feedback=feedback, **n), {"feedback": "fa"})
    CASES[-1].kinds = {"feedback": "rule"}
    for rule_name in ("usf", "fa", "kp"):
        layer = kind(*args, feedback=rule_name, **named)
        bad: Any = [*KINDS["tensor"], x(5), x(2, 9, *shape[2:])]
        add(f"nn.{name}.forward {rule_name}", layer, {"input": x(*shape)}, input=bad)
    if name.startswith("LocallyConnected"):
        d = int(name[-2])
        add(f"nn.{name}.forward backprop", kind(*args, **named), {"input": x(*shape)}, input=bad)
        whole = dict(zip(("in_channels", "out_channels", "kernel_size"), args, strict=True)) | named
        sizes = {"kernel_size": ints(d, 1), "stride": ints(d, 1), "dilation": ints(d, 1), "padding": padding(d)}
        sizes |= {next(iter(named)): ints(d, 1)}
        channels = dict.fromkeys(("in_channels", "out_channels", "groups"), "integer + size")
        rest = {"bias": "boolean", "bias_per": "name", "device": "device?", "dtype": "dtype?"}
        add(f"nn.{name}()", kind, whole, **sizes, **channels, **rest)
    if name.startswith("LocallyConnected") and "Transpose" not in name:
        modes = [*KINDS["name"], ["circular"] * (d + 1), ["wrong"] * d, [1] * d, ()]
        add(f"nn.{name}()", kind, whole, padding_mode=modes)
        add(f"nn.{name}.init_", kind(*args, **named).init_, {"init": torch.nn.init.zeros_}, init="function")
        right = {
            "layer": kind(*args, **named),
            "kernel": w(*[3] * d, 4 * 3**d, 6),
            "bias": w(*[3] * d, 6),
            "layout": "flax",
        }
        arrays = [NONE, 3, STR, LIST, OBJECT, w(3), w(2, 3).long()]
        modules = [*KINDS["module"], torch.nn.Linear(4, 6)]
        add(f"load_kernel_ {d}", bk.nn.load_kernel_, right, layer=modules, kernel=arrays, bias=arrays, layout="name")
        conv = getattr(torch.nn, f"Conv{d}d")(4, 6, 3)
        right = {"conv": conv, "input_size": 5}
        add(f"nn.{name}.from_conv", kind.from_conv, right, conv="module", input_size=ints(d, 1), feedback="rule")
for name in ("Conv1d", "Conv2d"):
    layer = getattr(bk.nn, name)(4, 6, 3, padding=1, padding_mode="circular", feedback="fa")
    shape = LAYERS[name][2]
    add(f"nn.{name}.forward circular", layer, {"input": x(*shape)}, input=[*bad, x(2, 4, 5, 5, 5)])
attention = bk.nn.MultiheadAttention(8, 2, batch_first=True, feedback="fa")
qkv = {name: x(2, 3, 8) for name in ("query", "key", "value")}
masks = {"attn_mask": "tensor?", "key_padding_mask": "tensor?"}
add("nn.MultiheadAttention.forward", attention, qkv, query="tensor", key="tensor", value="tensor", **masks)
unbatched = {name: x(3, 8) for name in qkv}
add("nn.MultiheadAttention.forward unbatched", attention, unbatched, query="tensor", **masks)


def mlp() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))


# Conversion, and what takes a model.
def converted(feedback: str) -> torch.nn.Module:
    bk.convert_(model := mlp(), feedback)
    return model


add(
    "convert_",
    lambda **named: bk.convert_(**({"model": mlp()} | named)),
    {"feedback": "fa"},
    model="module",
    feedback="rule",
    last_layer="rule?",
    filter_fn="function?",
    seed="integer",
)
add(
    "untie_",
    lambda **named: bk.untie_(**({"model": torch.nn.Sequential(torch.nn.Conv1d(4, 6, 3))} | named)),
    {"example": x(2, 4, 5)},
    model="module",
    example=[NONE, 3, 1.5, BOOL, STR, LIST, ARRAY, OBJECT],
    filter_fn="function?",
)


class Own(torch.nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


add("register", bk.register, {"cls": Own}, cls="module", how="function?", weight="function?")
add("check", bk.check, {"model": mlp()}, model="module")
CASES[-1].call = lambda model: bk.check(model, x(2, 4))


def frozen(model: Any) -> None:
    with bk.frozen_signs(model):
        pass


def by_backprop(model: Any) -> None:
    with metrics.backprop(model):
        pass


add("frozen_signs", frozen, {"model": converted("usf")}, model="module")
add(
    "mirror_",
    bk.mirror_,
    {"model": converted("wm")},
    model=[*KINDS["module"], mlp()],
    lr="number + fraction",
    decay="number + fraction",
    batch_size="integer + size",
    normalise="boolean",
    generator="instance?",
)

add(
    "align_",
    bk.align_,
    {"model": converted("sa"), "example": x(2, 4)},
    model=[*KINDS["module"], mlp()],
    example=[NONE, 3, 1.5, BOOL, STR, LIST, ARRAY, OBJECT],
)

# Direct feedback.
add(
    "DirectFeedback()",
    lambda **named: bk.DirectFeedback(**({"model": mlp()} | named)),
    {"blocks": ["1"], "example": x(2, 4)},
    model="module",
    blocks=[*KINDS["entries"], STR, "1", [], ["1", "1"], ["9"], [""], [1], [[]], [None], [NAN], ARRAY, w(3)],
    feedback="direct rule",
    example=[NONE, 3, 1.5, BOOL, STR, LIST, ARRAY, OBJECT, ()],
    seed="integer",
    logits=[3, 1.5, BOOL, STR, LIST, ARRAY, OBJECT, "", "1"],
    output="function?",
    class_dim=[*KINDS["integer"][1:], 2, -3],
)
direct = {name: bk.DirectFeedback(mlp(), ["1"], name, example=x(2, 4)) for name in ("dfa", "drtp")}
classes = torch.tensor([0, 2])
bad_targets = [*KINDS["tensor"], w(2), classes[:1], classes[None], classes.to("meta")]
add(
    "DirectFeedback.forward",
    lambda **named: direct["drtp"](x(2, 4), **named),
    {"targets": classes, "loss_scale": 1.0},
    targets=bad_targets,
    loss_scale=[NONE, BOOL, STR, LIST, ARRAY, OBJECT, 1j, w(2), w(1)],
)
add("DirectFeedback.forward dfa", lambda **n: direct["dfa"](x(2, 4), **n), {}, targets=[3, classes, LIST])
add("DirectFeedback.feedback_matrix", direct["dfa"].feedback_matrix, {"block": "1"}, block="name")

# Target propagation.
layers = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(2)] + [torch.nn.Linear(4, 3)]
inverses = [None, targetprop.learned_inverse(layers[1]), None]
tp = bk.TargetProp(layers, inverses, "dtp")
labels = bk.TargetProp(layers, [None, torch.nn.Linear(4, 4), torch.nn.Linear(3, 4)], "sdtp")
h = [t.detach() for t in tp.activations(w(2, 4))]
hidden = tp.targets(h, classes)
add(
    "TargetProp()",
    bk.TargetProp,
    {"layers": layers, "inverses": inverses, "variant": "dtp"},
    layers=[*KINDS["entries"], [], layers[:1], [None] * 3, [3] * 3, STR, LIST, ARRAY, w(3)],
    inverses=[*KINDS["entries"], [], [None] * 3, [None, 3, None], [None] * 4, STR, LIST, ARRAY, w(3), inverses * 2],
    variant="name",
    alpha="number + finite + not negative",
    sigma="number + finite + not negative",
    mix="number + fraction",
    loss="function",
    output="function",
    reduction="name",
    auxiliary="module?",
    inverse_objective=KINDS["name"][1:],
)
for name, net in {"dtp": tp, "sdtp": labels}.items():
    bad_y = KINDS["tensor"] + [torch.tensor([0, 3]), torch.tensor([-1, 0]), w(2, 2)] * (name == "sdtp")
    add(f"TargetProp.targets {name}", net.targets, {"h": h, "y": classes}, h="tensors", y=bad_y)
add("TargetProp.activations", tp.activations, {"x": w(2, 4)}, x="tensor")
wrong_targets = [*KINDS["tensors"], [w(2, 1)] * 2, [w(2, 5)] * 2]
add(
    "TargetProp.forward_loss",
    tp.forward_loss,
    {"h": h, "targets": hidden, "y": classes},
    h="tensors",
    targets=wrong_targets,
    y="tensor",
)
add("TargetProp.inverse_losses", tp.inverse_losses, {"h": h}, h="tensors")
add("TargetProp.inverse_loss", tp.inverse_loss, {"h": h}, h="tensors")
bad_layers = [*KINDS["module"], torch.nn.Tanh(), torch.nn.Sequential()]
add(
    "learned_inverse",
    targetprop.learned_inverse,
    {"layer": torch.nn.Conv2d(2, 3, 3), "input_size": (2, 5, 5)},
    layer=bad_layers,
    input_size=[*KINDS["entries"], STR, ARRAY, w(3), (5, 5), (1, 5, 5), (2, 5, -5), (2, 5, 5.0), (2, 5, True), ()],
    activation="module?",
    extra="integer",
)
flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 2))
bad_sizes = [*KINDS["entries"], (2, 5), (9,)]
add("learned_inverse flat", targetprop.learned_inverse, {"layer": flat, "input_size": (2, 4)}, input_size=bad_sizes)
add(
    "rhl_inverses",
    targetprop.rhl_inverses,
    {"sizes": [4, (2, 2)], "classes": 3, "hidden": 5},
    sizes=[*KINDS["entries"], STR, [], [1.5], [True], [0], [(2, 0)], ["ab"], [None], [NEG], ARRAY, w(3)],
    classes="integer + size",
    hidden="integer + size",
    activation="module?",
    device="device?",
    dtype="dtype?",
)

# The optimizer: `params` is torch.optim's.
weights = torch.nn.Parameter(w(3, 4))
nonnegative = dict.fromkeys(("momentum", "weight_decay"), "number + finite + not negative")
number = [v for v in KINDS["number"] if not isinstance(v, Tensor)]
options = nonnegative | {"lr": [*number, *KINDS["finite"], NEG, w(1), w(2)], "foreach": KINDS["boolean"][1:]}
options |= {"manhattan": "boolean", "no_sign_change": "boolean"}
manhattan = bk.optim.BatchManhattan
add("BatchManhattan()", lambda **named: manhattan([weights], **named), {}, **options)
add("BatchManhattan() group", lambda **named: manhattan([{"params": [weights], **named}]), {}, **options)
optimizer = manhattan([torch.nn.Parameter(w(3))])
add("BatchManhattan.step", optimizer.step, {}, closure="function?")
bad_groups = [NONE, 3, STR, LIST, OBJECT, {}, {"lr": 0.1}]


def group(param_group: Any) -> None:
    manhattan([torch.nn.Parameter(w(3))]).add_param_group(param_group)


add("BatchManhattan.add_param_group", group, {"param_group": {"params": [weights]}}, param_group=bad_groups)

# Measures.
rich = converted("fa")
loss = lambda: rich(w(2, 4)).sum()  # noqa: E731
bad_loss: list[Any] = [lambda: 3.0, lambda: None, lambda: w(2), lambda: w(1), lambda: rich(w(2, 4))]
add("metrics.compare", metrics.compare, {"a": w(3), "b": w(3)}, a="tensor", b=[*KINDS["tensor"], w(4)])
for name, call in {"weights": metrics.weights, "backprop": by_backprop, "trained": metrics.trained}.items():
    add(f"metrics.{name}", call, {"model": rich}, model="module")
right = {"model": rich, "loss": loss}
add("metrics.updates", metrics.updates, right, model="module", loss=[*KINDS["function"], *bad_loss])
add("metrics.row", metrics.row, right, model="module", loss=[*KINDS["function"][1:], *bad_loss])
right = {"tp": tp, "h": h, "y": classes, "damping": 0.1}
damping: Any = "number + not negative"
instance = "instance"
add("gauss_newton_targets", metrics.gauss_newton_targets, right, tp=instance, h="tensors", y="tensor", damping=damping)
right = {"tp": tp, "x": w(2, 4), "y": classes, "damping": 0.1}
add("gauss_newton", metrics.gauss_newton, right, tp="instance", x="tensor", y="tensor", damping=damping)
right = {"layer": layers[1], "inverse": inverses[1], "h": w(2, 4)}
for name in ("jacobian_spectrum", "inverse_loss"):
    add(f"metrics.{name}", getattr(metrics, name), right, layer="module", inverse="module", h="tensor")
add(
    "metrics.Monitor",
    metrics.Monitor,
    {"model": rich, "every": 1, "to": print},
    model="module",
    every="integer + size",
    to=[NONE, 3, BOOL, LIST, ARRAY, OBJECT],
    loss="function?",
    measure="function?",
    steps=[*KINDS["integer"], NEG],
)
add("backends.choose", bk.backends.choose, {"backend": None}, backend=KINDS["name"][1:])


@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_a_wrong_argument_is_named(case: Case) -> None:
    run(case)
    wrong = []
    for argument, value in case.tries():
        try:
            run(case, **{argument: value})
            raised = "no error"
        except Exception as error:
            named = re.match(rf"{argument}(\[-?\d+\])?: (.+ got .|.* keeps state)", str(error), re.DOTALL)
            if named and isinstance(error, ValueError | TypeError):
                continue
            raised = f"{type(error).__name__}: {error}"
        wrong.append(f"{argument}={value!r}: {raised}".replace("\n", " ")[:200])
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)


def integers(value: Any) -> Any:
    """Every integer in `value` as one of numpy's."""
    if isinstance(value, list | tuple):
        return type(value)(integers(v) for v in value)
    return np.int64(value) if type(value) is int else value


def test_numpys_integers_are_integers() -> None:
    geometry = {"kernel_size": (3, 3), "stride": [2, 1], "padding": [(1, 0), (0, 2)], "dilation": 1, "groups": 2}
    arguments = {"in_channels": 4, "out_channels": 6, **geometry}
    for name, size in {"LocallyConnected2d": "input_size", "LocallyConnectedTranspose2d": "output_size"}.items():
        given = {k: integers(v) for k, v in (arguments | {size: (5, 6)}).items()}
        ours, theirs = getattr(bk.nn, name)(**given), getattr(bk.nn, name)(**arguments, **{size: (5, 6)})
        for key, value in vars(theirs).items():
            if not key.startswith("_") or key == "_pairs":
                assert repr(getattr(ours, key)) == repr(value)
    weight, image = w(6, 2, 3, 3), x(2, 4, 5, 5)
    conv = {"stride": 2, "padding": (1, 0), "dilation": [1, 1], "groups": 2}
    for feedback in ("usf", None):
        y = F.conv2d(image, weight, **{k: integers(v) for k, v in conv.items()}, feedback=feedback)
        assert torch.equal(y, F.conv2d(image, weight, **conv, feedback=feedback))
    assert torch.equal(feedback_key(np.int64(5), "a"), feedback_key(5, "a"))
    assert torch.equal(feedback_key(np.uint8(5), "a"), feedback_key(5, "a"))
    keys = []
    for seed in (np.int32(3), 3):
        bk.convert_(model := mlp(), "fa", seed=seed)
        direct = bk.DirectFeedback(mlp(), ["1"], example=x(2, 4), seed=seed)
        keys.append([model[0].feedback_key, direct.feedback_key])
    assert all(map(torch.equal, *keys))
    bk.mirror_(converted("wm"), batch_size=np.int64(2), lr=np.float32(0.5), decay=np.int8(0))
    assert type(metrics.Monitor(mlp(), np.int64(2), print).every) is int
    assert targetprop.rhl_inverses(integers([4, (2, 2)]), np.int64(3), np.int64(5))[1][0][0].out_features == 5


def test_numpys_numbers_are_numbers() -> None:
    for rule in (bk.SignSymmetry(scale=np.float32(0.5)), bk.direct.DFA(scale=np.float64(0.5))):
        assert type(rule.scale) is float and rule == type(rule)(scale=0.5)
    assert type(bk.TargetProp(layers, inverses, "dtp", alpha=np.float32(0.5), sigma=np.int64(1)).sigma) is float
    assert type(manhattan([weights], lr=np.float32(0.5)).param_groups[0]["lr"]) is float


@pytest.mark.parametrize("name", ["padding", "dilation", "stride"])
def test_geometry_that_overflows_is_refused(name: str) -> None:
    geometry = {"stride": [1], "padding": [0, 0], "dilation": [1], "groups": 1}
    huge = [2**63 - 1] * len(geometry[name])
    for op in (reference.OPS["lc_forward"], bk.ops.lc_forward):
        with pytest.raises(ValueError, match=f"{name}: expected . integers from . to 2147483647, got"):
            op(w(2, 4, 5), w(3, 6, 3, 4), None, *(geometry | {name: huge}).values())


def anything(source: random.Random) -> Tensor:
    """A tensor of any shape and dtype, on the CPU or the meta device."""
    shape = source.choices(range(7), k=source.randint(0, 6))
    others = [torch.float64, torch.int64, torch.bfloat16, torch.complex64]
    device = source.choice(["cpu"] * 8 + ["meta"])
    return torch.zeros(shape, dtype=source.choice([torch.float32] * 6 + others), device=device)


@pytest.mark.parametrize("feedback", ["usf", None])
@pytest.mark.parametrize("kind", ["linear", "conv", "conv_transpose", "locally_connected"])
def test_shapes_that_do_not_fit_are_named(kind: str, feedback: str | None) -> None:
    source, worked, tries = random.Random(0), 0, 300
    for _ in range(tries):
        d = source.choice([1, 2, 3])
        weights = {"linear": (3, 4), "conv": (6, 4, *[3] * d), "conv_transpose": (4, 6, *[3] * d)}
        weight = weights.get(kind, (*[3] * d, 6, *[3] * d, 4))
        linear = kind == "linear"
        given: dict[str, Any] = {"input": w(2, 4, *[5] * (0 if linear else d)), "weight": w(*weight)}
        given["bias"] = w(3 if linear else 6)
        if not linear:
            given |= {"stride": source.choice([1, 1, 2, [1] * d, 7]), "dilation": source.choice([1, 1, 2, 5])}
            given |= {"groups": source.choice([1, 1, 2, 3]), "padding": source.choice([0, 0, 1, 7])}
            if kind == "conv_transpose":
                given["output_padding"] = source.choice([0, 0, 1, 3])
            elif source.random() < 0.2:
                given["padding"] = source.choice(["same", "valid"])
        for name in source.sample(["input", "weight", "bias"], source.choice([0, 1, 1, 2])):
            given[name] = anything(source)
        try:
            getattr(F, kind if linear else f"{kind}{d}d")(**given, feedback=feedback)
            worked += 1
        except (ValueError, TypeError) as error:
            assert re.match(rf"({'|'.join(given)}): .+ got .", str(error), re.DOTALL), error
    assert 0 < worked < tries / 2
