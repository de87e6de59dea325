"""Whole training steps: forward, backward and SGD, against the same model of torch.nn and against BioTorch."""

import functools
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
import torchvision

import bioplaus_kernels as bk
from recipes import models

from .device import Device, with_tf32
from .registry import Bench, Case, Run, register

RULES = ("usf", "frsf", "brsf", "fa", bk.FeedbackAlignment(stored=True))


@register("training_step")
def cases() -> Iterator[Case]:
    """Models and batches, from many small operations to few large ones; --quick keeps LeNet."""
    for n in (64, 512):
        yield Case("training_step", f"MLP 5x2048 N={n}", lambda device, n=n: build(device, mlp, (n, 2048)))
        half = functools.partial(build, make=mlp, shape=(n, 2048), dtype=torch.bfloat16)
        yield Case("training_step", f"MLP 5x2048 N={n} bfloat16", half)
    yield Case("training_step", "LeNet N=64", lambda device: build(device, lenet, (64, 1, 32, 32)), quick=True)
    for size in (64, 224):
        images = (16, 3, size, size)
        yield Case("training_step", f"ResNet-18 N=16 {size}", lambda device, s=images: build(device, resnet, s))
        half = functools.partial(build, make=resnet, shape=images, dtype=torch.bfloat16)
        yield Case("training_step", f"ResNet-18 N=16 {size} bfloat16", half)
    large = (256, 3, 224, 224)
    label = "ResNet-18 N=256 224 bfloat16 compiled"
    yield Case("training_step", label, lambda device: build_compiled(device, resnet, large), gpu=True)
    yield Case("training_step", "CIFAR LC net N=16", lambda device: build(device, cifar_lc, (16, 3, 32, 32)))


def mlp() -> torch.nn.Module:
    """Five layers of 2048 units."""
    layers = [m for _ in range(5) for m in (torch.nn.Linear(2048, 2048), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers, torch.nn.Linear(2048, 10))


def lenet() -> torch.nn.Module:
    """The recipe's LeNet."""
    return models.build("lenet", (1, 32, 32), 10)


def resnet() -> torch.nn.Module:
    """torchvision's ResNet-18."""
    return torchvision.models.resnet18(num_classes=1000)


def cifar_lc() -> torch.nn.Module:
    """Bartunov et al. 2018, table 3."""
    return models.build("lc-cifar10", (3, 32, 32), 10)


def _step(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, forward: Callable[..., torch.Tensor]) -> Run:
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(forward(x).float(), y).backward()
        optimizer.step()

    return step


def build_compiled(device: Device, make: Callable[[], torch.nn.Module], shape: tuple[int, ...]) -> Bench:
    """As a GPU is used: channels-last, compiled, autocast to bfloat16; of the rules usf alone, as each compiles."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, y = torch.randn(shape).contiguous(memory_format=torch.channels_last), torch.randint(10, (shape[0],))
    state = make().state_dict()
    variants: dict[str, Run] = {}
    for rule in (None, "usf"):
        model = make().to(memory_format=torch.channels_last)
        model.load_state_dict(state)
        bk.convert_(model, rule, last_layer="backprop")
        forward = torch.autocast(device.device.type, torch.bfloat16)(torch.compile(model))
        variants[rule or "torch.nn, backprop"] = _step(model, x, y, forward)
    return Bench(variants)


def build(
    device: Device, make: Callable[[], torch.nn.Module], shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Bench:
    """One step by each rule, autocast to `dtype`; torch.nn's model is the baseline. On a GPU with TF32 too."""
    torch.manual_seed(0)
    # A context manager without effect would take its time in float32's steps.
    cast = torch.autocast(device.device.type, dtype) if dtype != torch.float32 else lambda model: model
    x, y = torch.randn(shape), torch.randint(10, (shape[0],))
    state = make().state_dict()
    variants: dict[str, Run] = {}
    for rule in (None, *RULES):
        model = make()
        model.load_state_dict(state)
        bk.convert_(model, rule, last_layer="backprop")
        name = "torch.nn, backprop" if rule is None else rule if isinstance(rule, str) else "fa stored"
        variants[name] = _step(model, x, y, cast(model))
    if find_spec("biotorch") and make is not cifar_lc:
        from biotorch.module.biomodule import BioModule

        for mode in ("usf", "frsf", "brsf", "fa"):
            model = BioModule(make(), mode=mode)
            variants[f"BioTorch {mode}"] = _step(model, x, y, cast(model))
    if device.backends and dtype == torch.float32:
        variants |= {f"{name}, TF32": with_tf32(step) for name, step in variants.items()}
    return Bench(variants)
