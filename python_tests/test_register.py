"""Layers of other libraries: what is converted, that it is proven, and its gradients against products patched by hand.

With `usf` B is a function of the product's W alone, so that patching torch's own products, by name, is an oracle for any
model: y = x Wᵀ has the gradient of W, and x Bᵀ that of x.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioplaus_kernels as bk

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
    linear, addmm, matmul = F.linear, torch.addmm, Tensor.__matmul__
    fed_linear, fed_matmul = fed(linear, linear_scale), fed(matmul, linear_scale, at=0)
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", fed_linear)
        for d in (1, 2, 3):
            patch.setattr(F, f"conv{d}d", fed(getattr(F, f"conv{d}d"), conv_scale))
        patch.setattr(torch, "addmm", lambda b, x, w: fed_linear(x, w.t(), b))
        patch.setattr(Tensor, "__matmul__", lambda a, b: (fed_matmul if isinstance(a, nn.Parameter) else matmul)(a, b))
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


def mamba(name: str, **config: Any) -> Any:
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


def graph(name: str, *args: Any, **config: Any) -> Any:
    convolutions = pytest.importorskip("torch_geometric").nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (getattr(convolutions, name)(8, 8, *args, **config) for _ in range(2))

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x, edges)), edges)

    return Net(), (torch.randn(4, 8), torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 0, 0]]))


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
    "Mamba": lambda: mamba("Mamba", state_size=4),
    "Mamba-2": lambda: mamba("Mamba2", state_size=4, num_heads=2, head_dim=8, n_groups=1, chunk_size=4),
    "Falcon-Mamba": lambda: mamba("FalconMamba", state_size=4),
    "Jamba": lambda: mamba(
        "Jamba", num_attention_heads=2, num_key_value_heads=1, intermediate_size=8, num_experts=1, mamba_d_state=4, use_cache=False
    ),
    "WavLM": wavlm,
    "BiT": bit,
    "Swin": lambda: swin(1),
    "Swin v2": lambda: swin(2),
    "R3D": r3d,
    "ResNet-v2": resnetv2,
    "NFNet": lambda: timm("test_nfnet"),
    "timm's layers": timms_layers,
    "timm Swin v2": lambda: timm("swinv2_tiny_window8_256", 32, img_size=32, embed_dim=8, depths=(2,), num_heads=(2,), window_size=4),
    "BEiT": lambda: timm("beit_base_patch16_224", img_size=32, embed_dim=8, depth=2, num_heads=2),
    "EVA": lambda: timm("eva02_tiny_patch14_224", 28, img_size=28, embed_dim=16, depth=2, num_heads=2),
    **{name: lambda name=name: graph(name) for name in ("GCNConv", "GATConv", "SAGEConv", "TransformerConv")},
    **{name: lambda name=name: computed(name) for name in ("weight_norm", "weight_norm by hooks", "pruning")},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_librarys_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    (model, example), plain = MODELS[name](), MODELS[name]()[0]
    model, plain = model.double().train(), plain.double().train()
    plain.load_state_dict(model.state_dict())
    double = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
    example = torch.utils._pytree.tree_map_only(Tensor, double, example)
    report = bk.convert_(model, "usf", example=example)
    open("/tmp/w/rows.txt", "a").write(
        name
        + "\n"
        + "".join(
            f"  {row}\n"
            for row in report.rows
            if row.outcome != "proven" and any(p.ndim > 1 for p in model.get_submodule(row.name).parameters())
        )
    )
    expected = by_hand(monkeypatch, plain, example)
    exact = gradients(plain, example)
    found = gradients(model, example)
    for parameter, f, e in zip(
        (n for n, p in model.named_parameters() if p.requires_grad), found, expected, strict=True
    ):
        torch.testing.assert_close(
            f, e, rtol=1e-7, atol=1e-9 * float(e.abs().max()) + 1e-14, msg=lambda m, p=parameter: f"{p}: {m}"
        )
    assert not all(torch.allclose(f, e, rtol=1e-3) for f, e in zip(found, exact, strict=True))
