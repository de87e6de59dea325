"""Layers of other libraries: converted, proven, and with the gradients of products patched by hand.

With `usf` B is a function of the product's W alone, so that patching torch's products, by name, is an oracle for any
model: x Wᵀ of a detached x has W's gradient, x Bᵀ that of x.
"""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioplaus_kernels as bk
from bioplaus_kernels.register import Registered

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]


def fed(product: Callable[..., Tensor], scale: Callable[[Tensor], float], at: int = 1) -> Callable[..., Tensor]:
    """`product`, whose operand number 1 - `at` gets its gradient by s · sign of operand `at`."""

    def patched(*args: Any, **kwargs: Any) -> Tensor:
        operands = [*args[:2]] if len(args) > 1 else [args[0], kwargs.pop("weight")]
        rest, x, w = args[2:], operands[1 - at], operands[at]

        def call(x: Tensor, w: Tensor, rest: Any = rest, kwargs: Any = kwargs) -> Tensor:
            return product(*((x, w) if at else (w, x)), *rest, **kwargs)

        without_bias = call(x, scale(w) * w.detach().sign(), *_unbiased(rest, kwargs))
        return call(x.detach(), w) + without_bias - without_bias.detach()

    return patched


def _unbiased(rest: Any, kwargs: Any) -> tuple[Any, Any]:
    return (None, *rest[1:]) if rest else rest, kwargs | ({"bias": None} if "bias" in kwargs else {})


def linear_scale(w: Tensor) -> float:
    return 1 / math.sqrt(w.shape[-1])


def conv_scale(w: Tensor) -> float:
    return math.sqrt(2 / (w.shape[2:].numel() * w.shape[0]))


def by_hand(monkeypatch: pytest.MonkeyPatch, model: nn.Module, example: Any) -> list[Tensor]:
    matmul = Tensor.__matmul__
    fed_linear, fed_matmul = fed(F.linear, linear_scale), fed(matmul, linear_scale, at=0)

    def product(a: Tensor, b: Tensor) -> Tensor:
        if isinstance(a, nn.Parameter):
            return fed_matmul(a, b)
        return fed_linear(a, b.T) if isinstance(b._base, nn.Parameter) else matmul(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", fed_linear)
        for d in (1, 2, 3):
            patch.setattr(F, f"conv{d}d", fed(getattr(F, f"conv{d}d"), conv_scale))
        patch.setattr(torch, "addmm", lambda b, x, w: fed_linear(x, w.t(), b))
        patch.setattr(Tensor, "__matmul__", product)
        return gradients(model, example)


def gradients(model: nn.Module, example: Any) -> list[Tensor]:
    torch.manual_seed(0)
    output = model(**example) if isinstance(example, dict) else model(*example)
    tensors = output.values() if isinstance(output, dict) else [output]
    loss = sum(t.square().mean() for t in tensors if isinstance(t, Tensor) and t.is_floating_point())
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True))


# What a library has, tiny, with what to call it with.


def gpt2() -> Any:
    config = pytest.importorskip("transformers").GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    )
    return pytest.importorskip("transformers").GPT2LMHeadModel(config), {"input_ids": torch.arange(5)[None]}


def language(name: str, **config: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, f"{name}Config")(vocab_size=20, hidden_size=8, num_hidden_layers=1, **config)
    return getattr(transformers, f"{name}Model")(made), {"input_ids": torch.arange(5)[None]}


def wavlm() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.WavLMConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, conv_dim=(8,), conv_stride=(2,),
        conv_kernel=(3,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_buckets=8, layerdrop=0.0,
        attention_dropout=0.0, hidden_dropout=0.0, feat_proj_dropout=0.0, activation_dropout=0.0,
        apply_spec_augment=False
    )  # fmt: skip
    return transformers.WavLMModel(config), {"input_values": torch.randn(1, 30)}


def bit() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BitConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_groups=2, layer_type="bottleneck"
    )
    return transformers.BitModel(config), {"pixel_values": torch.randn(1, 3, 16, 16)}


def swin(version: int) -> Any:
    models = pytest.importorskip("torchvision").models
    attention = models.swin_transformer
    block = attention.SwinTransformerBlockV2 if version == 2 else None
    merging = {"downsample_layer": attention.PatchMergingV2} if version == 2 else {}
    model = models.SwinTransformer(
        [4, 4], 8, [2, 1], [2, 2], [2, 2], stochastic_depth_prob=0.0, num_classes=3, block=block, **merging
    )
    return model, (torch.randn(2, 3, 16, 16),)


def r3d() -> Any:
    model = pytest.importorskip("torchvision").models.video.r3d_18(num_classes=3)
    model.layer2 = model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(64, 3)
    return model, (torch.randn(1, 3, 4, 8, 8),)


def timm(name: str, size: int = 32, **config: Any) -> Any:
    model = pytest.importorskip("timm").create_model(name, num_classes=3, **config)
    return model, (torch.randn(2, 3, size, size),)


def resnetv2() -> Any:
    models = pytest.importorskip("timm").models
    model = models.resnetv2.ResNetV2([1, 1], (32, 32), num_classes=3, stem_chs=32, bottle_ratio=1)
    return model, (torch.randn(2, 3, 32, 32),)


def timms_layers() -> Any:
    layers = pytest.importorskip("timm").layers
    convolutions = [
        getattr(layers, name)(4, 4, 3, stride=2, bias=True)
        for name in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame", "Conv2dSame")
    ]
    model = nn.Sequential(*(m for c in convolutions for m in (c, nn.Tanh())), nn.Flatten(), layers.linear.Linear(4, 3))
    return model, (torch.randn(2, 4, 32, 32),)


class Graph(nn.Module):
    def __init__(self, convolution: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.first, self.second = convolution(8, 8), convolution(8, 8)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x, edges)), edges)


def graph(name: str) -> Any:
    model = Graph(getattr(pytest.importorskip("torch_geometric").nn, name))
    return model, (torch.randn(4, 8), torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 0, 0]]))


def lora(base: Callable[[], Any], target: str) -> Any:
    peft = pytest.importorskip("peft")
    model, example = base()
    config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False, fan_in_fan_out="c_" in target)
    return peft.get_peft_model(model, config).base_model, example


def computed(name: str) -> Any:
    from torch.nn.utils import parametrizations, prune, weight_norm

    how: dict[str, Callable[[nn.Module], object]] = {
        "weight_norm": parametrizations.weight_norm,
        "weight_norm by hooks": weight_norm,
        "pruning": lambda m: prune.random_unstructured(m, "weight", 0.5),
    }
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(4, 3))
    for layer in (model[0], model[2], model[4]):
        how[name](layer)
    return model, (torch.randn(2, 2, 4, 4),)


MODELS: dict[str, Callable[[], Any]] = {
    "GPT-2": gpt2,
    "LoRA on GPT-2": lambda: lora(gpt2, "c_attn"),
    "Falcon": lambda: language("Falcon", num_attention_heads=2),
    "Mamba": lambda: language("Mamba", state_size=4),
    "Mamba-2": lambda: language("Mamba2", state_size=4, num_heads=2, head_dim=8, n_groups=1, chunk_size=4),
    "Falcon-Mamba": lambda: language("FalconMamba", state_size=4),
    "Jamba": lambda: language(
        "Jamba", num_attention_heads=2, num_key_value_heads=1, intermediate_size=8, num_experts=1, mamba_d_state=4,
        use_cache=False
    ),
    "WavLM": wavlm,
    "BiT": bit,
    "Swin": lambda: swin(1),
    "Swin v2": lambda: swin(2),
    "R3D": r3d,
    "ResNet-v2": resnetv2,
    "NFNet": lambda: timm("test_nfnet"),
    "timm's layers": timms_layers,
    "timm Swin v2": lambda: timm(
        "swinv2_tiny_window8_256", img_size=32, embed_dim=8, depths=(2,), num_heads=(2,), window_size=4
    ),
    "BEiT": lambda: timm("beit_base_patch16_224", img_size=32, embed_dim=8, depth=2, num_heads=2),
    "EVA": lambda: timm("eva02_tiny_patch14_224", 28, img_size=28, embed_dim=16, depth=2, num_heads=2),
    **{name: lambda name=name: graph(name) for name in ("GCNConv", "GATConv", "SAGEConv", "TransformerConv")},
    **{name: lambda name=name: computed(name) for name in ("weight_norm", "weight_norm by hooks", "pruning")},
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model, example = MODELS[name]()
    return model.to(dtype).train(), torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, example
    )


def is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() > 1 and not isinstance(module, nn.Embedding)


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_is_proven_and_has_the_gradients_by_hand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (model, example), (plain, _) = build(name), build(name)
    before = list(model.state_dict())
    report = bk.convert_(model, "usf", example=example)
    first = "its input needs no gradient"
    for row in report.rows:
        if is_matrix(model.get_submodule(row.name)):
            assert row.outcome == "proven" or first in row.reason, row
    assert report.proven and report.names("read", "called and read", "unused") == []
    assert [key for key in model.state_dict() if "feedback" not in key] == before

    expected, exact, found = by_hand(monkeypatch, plain, example), gradients(plain, example), gradients(model, example)
    names = [n for n, p in plain.named_parameters() if p.requires_grad]
    for parameter, f, e in zip(names, found, expected, strict=True):
        assert (f - e).abs().max() <= 1e-8 * max(e.abs().max(), 1e-6), parameter
    assert any((f - e).norm() > 0.1 * e.norm() for f, e in zip(found, exact, strict=True))

    with bk.metrics.backprop(model):
        for f, e in zip(gradients(model, example), exact, strict=True):
            torch.testing.assert_close(f, e)
    assert bk.convert_(model, None).restored == report.converted
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        # Of torch.nn.utils.parametrize each module has a class of its own.
        assert type(ours) is type(theirs) or type(ours).__mro__[1:] == type(theirs).__mro__[1:]
        assert not isinstance(ours, bk.nn.FeedbackLayer | Registered)
    assert repr(model) == repr(plain) and list(model.state_dict()) == before
    assert all(map(torch.equal, gradients(model, example), exact))


ONE_OF_EACH = ["GPT-2", "timm's layers", "Swin", "WavLM", "Mamba", "GCNConv", "weight_norm"]


@pytest.mark.parametrize("rule", ["fa", "kp", "wm", "fa_signed_init", "frsf"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_what_a_rule_keeps(name: str, rule: str) -> None:
    model, example = build(name)
    bk.convert_(model, rule, example=example)
    expected = gradients(model, example)
    other = build(name)[0]
    bk.convert_(other, rule, seed=5)
    other.load_state_dict(model.state_dict())
    again = copy.deepcopy(model)
    for copied in (other, again):
        assert all(map(torch.equal, gradients(copied, example), expected))
    for layer in (m for m in model.modules() if isinstance(m, bk.nn.FeedbackLayer)):
        w, b = layer.weight_of(), layer.feedback_matrix()
        assert w.shape == b.shape
        assert all(t.is_contiguous() for t in layer.state_dict().values() if t.dim() == 2)
        if rule == "fa_signed_init":
            assert torch.equal(w.sign(), b.sign())


@pytest.mark.parametrize("name", ["GPT-2", "timm's layers", "Swin"])
def test_pickles(name: str) -> None:
    model, example = build(name)
    bk.convert_(model, "fa")
    loaded = pickle.loads(pickle.dumps(model))
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    assert all(map(torch.equal, gradients(loaded, example), gradients(model, example)))


@pytest.mark.parametrize(
    "name",
    ["weight_norm", *(pytest.param(n, marks=pytest.mark.slow) for n in ("GCNConv", "timm's layers", "Swin", "Mamba"))],
)
def test_compiles_to_one_graph(name: str) -> None:
    model, example = build(name)
    bk.convert_(model, "fa")
    expected = gradients(model, example)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for f, e in zip(gradients(compiled, example), expected, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.slow
def test_torchs_attention_within_another_forward_compiles() -> None:
    model, _ = build("WavLM")
    attention = model.encoder.layers[0].attention
    bk.convert_(attention, "fa")
    example = (torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True),)
    torch.compiler.reset()
    compiled = torch.compile(lambda h: attention(h)[0], backend="aot_eager", fullgraph=True)
    grads = [torch.autograd.grad(f(*example).square().sum(), example) for f in (lambda h: attention(h)[0], compiled)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["timm's layers", "Swin"])
def test_an_exported_program_computes_and_has_no_gradient(name: str) -> None:
    model, example = build(name)
    bk.convert_(model, "usf")
    program = torch.export.export(model, example).module()
    torch.testing.assert_close(program(*example), model(*example))
    assert not program(*example).requires_grad


def test_lazy_layers_of_others_are_left() -> None:
    linear = pytest.importorskip("torch_geometric").nn.Linear(-1, 3)
    row = bk.convert_(linear, "usf").rows[0]
    assert row.outcome == "left" and row.reason == "its shape is not known before the first call"


def test_opacus_and_a_model_with_feedback_are_refused() -> None:
    opacus = pytest.importorskip("opacus")
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"model: expected one without Opacus's GradSampleModule"):
        bk.convert_(opacus.GradSampleModule(model), "usf")
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    bk.convert_(model, "usf")
    with pytest.raises(NotImplementedError, match="that Opacus doesn't currently support"):
        opacus.GradSampleModule(model)
