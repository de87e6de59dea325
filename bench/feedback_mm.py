"""dX = dY B for a linear layer, against dY @ W and against forming B and multiplying."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bioplaus_kernels import ops
from bioplaus_kernels.feedback import feedback_key

from .device import Device, ways
from .gate import mm_gate
from .registry import Bench, Case, Run, Work, register

SHAPES = ((512, 512), (1024, 4096), (4096, 4096))
BATCHES = (1, 8, 32, 128, 512, 2048, 4096)


@register("feedback_mm")
def cases() -> Iterator[Case]:
    """Shapes out x in, batches and dtypes of the issue; --quick keeps 1024 x 4096 in float32."""
    for dtype in (torch.float32, torch.bfloat16):
        for out, n in SHAPES:
            for m in BATCHES:
                label = f"{out}x{n} M={m} {str(dtype).removeprefix('torch.')}"
                yield Case(
                    "feedback_mm",
                    label,
                    lambda device, m=m, out=out, n=n, dtype=dtype: build(device, m, out, n, dtype),
                    quick=(out, n) == (1024, 4096) and m in (8, 128) and dtype == torch.float32,
                    cold=(out, n) == (4096, 4096) and m in (8, 128),
                )


def sign_then_matmul(g: torch.Tensor, w: torch.Tensor, s: float) -> torch.Tensor:
    """What every peer does."""
    return g @ (torch.sign(w) * s)


def magnitude_then_matmul(g: torch.Tensor, w: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """The plain-torch way of frsf with a stored magnitude."""
    return g @ (torch.sign(w) * magnitude.abs())


def draw_then_matmul(g: torch.Tensor, w: torch.Tensor, s: float) -> torch.Tensor:
    """The plain-torch way of seeded feedback that keeps no tensor."""
    generator = torch.Generator(w.device).manual_seed(0)
    return g @ torch.empty_like(w).uniform_(-s, s, generator=generator)


def bf16_parts(g: torch.Tensor, w: torch.Tensor, s: float) -> torch.Tensor:
    """The strongest plain-torch composition: dY as three bf16 parts times bf16 signs."""
    high = g.bfloat16()
    middle = (g - high).bfloat16()
    low = (g - high - middle).bfloat16()
    sign = torch.sign(w).bfloat16()
    return ((low @ sign).float() + (middle @ sign).float() + (high @ sign).float()) * s


def form_then_matmul(g: torch.Tensor, *feedback: Any) -> torch.Tensor:
    """B by its own kernel, then the vendor's product."""
    b = ops.feedback_weight(*feedback[:-1], (g.shape[1], feedback[-1]), dtype=g.dtype)
    return g @ b


def products(device: Device) -> dict[str, Callable[..., torch.Tensor]]:
    """dY B as a layer makes it, and where there is a choice of ways by each of them."""
    found = {way: backend.feedback_mm for way, backend in ways(device).items()}
    return found | {", feedback_weight + cuBLAS": form_then_matmul} if device.backends else found


def build(device: Device, m: int, out: int, n: int, dtype: torch.dtype) -> Bench:
    """All rules on one shape, by every way there is."""
    torch.manual_seed(0)
    g, w = torch.randn(m, out).to(dtype), (torch.randn(out, n) / out**0.5).to(dtype)
    s, key, signs = n**-0.5, feedback_key(0).to(w.device), ops.pack_signs(w)
    torch._dynamo.reset()
    compiled = torch.compile(sign_then_matmul, dynamic=False)
    magnitudes = torch.compile(magnitude_then_matmul, dynamic=False)
    stored = ops.feedback_weight(None, None, None, key, "uniform", s, w.shape, dtype=dtype)
    arguments = {
        "usf, signs from W": (w, None, None, None, "constant", s),
        "usf, packed signs": (None, signs, None, None, "constant", s),
        "fa seeded, ±s": (None, None, None, key, "constant", s),
        "fa seeded, uniform": (None, None, None, key, "uniform", s),
        "frsf seeded, uniform": (w, None, None, key, "uniform", s),
        "frsf stored": (w, None, stored, None, "stored", 1.0),
        "fa stored": (None, None, stored, None, "stored", 1.0),
    }
    variants: dict[str, Run] = {
        "torch dY @ W": lambda: g @ w,
        "sign, then matmul": lambda: sign_then_matmul(g, w, s),
        "sign, then matmul, torch.compile": lambda: compiled(g, w, s),
        "sign x magnitude, then matmul": lambda: magnitude_then_matmul(g, w, stored),
        "sign x magnitude, then matmul, torch.compile": lambda: magnitudes(g, w, stored),
        "draw uniform, then matmul": lambda: draw_then_matmul(g, w, s),
    }
    gate = {}
    # Without the instructions a processor takes minutes.
    if dtype == torch.float32 and (w.is_cuda or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        variants["three bf16 parts x sign"] = lambda: bf16_parts(g, w, s)
        gate["three bf16 parts x sign"] = lambda: mm_gate(bf16_parts(g, w, s), g, torch.sign(w) * s)
    for name, feedback in arguments.items():
        for way, product in products(device).items():
            variants[name + way] = lambda f=feedback, product=product: product(g, *f, n)
            gate[name + way] = lambda f=feedback, product=product: mm_gate(
                product(g, *f, n), g, ops.feedback_weight(*f, w.shape, dtype=torch.float64)
            )
    traffic = (g.numel() + w.numel() + m * n) * g.element_size()
    return Bench(variants, gate, (Work(2.0 * m * out * n, traffic),), str(dtype).removeprefix("torch."))
