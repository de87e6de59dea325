"""dX = dY B for a linear layer, against dY @ W and against forming B and multiplying."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from bioplaus_kernels import ops
from bioplaus_kernels.feedback import feedback_key

from .device import Device, ways, with_tf32
from .gate import mm_gate
from .registry import Bench, Case, Run, Work, register

SHAPES = ((512, 512), (1024, 4096), (4096, 4096))
BATCHES = (1, 8, 32, 128, 512, 2048, 4096)
# Of the square shape, on a GPU alone.
GPU_BATCHES = (64, 16384)
# Few columns, as convolutions have: an operand that a core holds whole.
FEW = tuple(((2304, n), m) for n in (256, 64, 16, 1) for m in (64, 512, 3136))
WAYS = ("digits", "int_mm", "formed")  # of CUDA C++
# Those of most worth first.
DTYPES = (torch.float32, torch.bfloat16)
_FIRST = (128, 4096, 1, 512, 8)
HEADLINE = [*product(SHAPES[2:], (*_FIRST, 16384, 64), DTYPES), *product(SHAPES[1:2], _FIRST, DTYPES)]


@register("feedback_mm")
def cases() -> Iterator[Case]:
    """Shapes out x in, batches and dtypes; --quick keeps 1024 x 4096 in float32."""
    more = tuple(product(SHAPES[-1:], GPU_BATCHES))
    for dtype in DTYPES:
        for (out, n), m in (*product(SHAPES, BATCHES), *more, *FEW):
            label = f"{out}x{n} M={m} {str(dtype).removeprefix('torch.')}"
            yield Case(
                "feedback_mm",
                label,
                lambda device, m=m, out=out, n=n, dtype=dtype: build(device, m, out, n, dtype),
                quick=(out, n) == (1024, 4096) and m in (8, 128) and dtype == torch.float32,
                cold=(out, n) == (4096, 4096) and m in (8, 128),
                gpu=((out, n), m) in more,
                headline=HEADLINE.index(key) + 1 if (key := ((out, n), m, dtype)) in HEADLINE else 0,
            )


def sign_then_matmul(g: torch.Tensor, w: torch.Tensor, s: float) -> torch.Tensor:
    """What every peer does."""
    return g @ (torch.sign(w) * s)


def magnitude_then_matmul(g: torch.Tensor, w: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """The plain-torch way of frsf with a stored magnitude."""
    return g @ (torch.sign(w) * magnitude.abs())


def draw_then_matmul(g: torch.Tensor, w: torch.Tensor, s: float, generator: torch.Generator) -> torch.Tensor:
    """The plain-torch way of seeded feedback that keeps no tensor (which would seed the generator anew each time)."""
    return g @ torch.empty_like(w).uniform_(-s, s, generator=generator)


def bf16_parts(g: torch.Tensor, w: torch.Tensor, s: float) -> torch.Tensor:
    """The strongest plain-torch composition: dY as three bf16 parts times bf16 signs."""
    high = g.bfloat16()
    middle = (g - high).bfloat16()
    low = (g - high - middle).bfloat16()
    sign = torch.sign(w).bfloat16()
    return ((low @ sign).float() + (middle @ sign).float() + (high @ sign).float()) * s


def stacked_int_mm(g: torch.Tensor, w: torch.Tensor, s: float) -> torch.Tensor:
    """The plain-torch way by integers: dY as four int8 digits (two of half types), stacked, times signs as int8."""
    m, count = g.shape[0], 4 if g.dtype == torch.float32 else 2
    _, exponent = torch.frexp(g.abs().amax(1, keepdim=True).double())
    place = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - (8 * count - 2))
    q, digits = (g / place).round().to(torch.int32), []
    for _ in range(count):
        digits.append(q.to(torch.int8))
        q = (q + 128) >> 8
    # _int_mm wants more than 16 rows, and the second operand's columns contiguous.
    rows = torch.nn.functional.pad(torch.cat(digits), (0, 0, 0, max(0, 17 - count * m)))
    sums = torch._int_mm(rows, torch.sign(w).to(torch.int8).t().contiguous().t())[: count * m].view(count, m, -1)
    total = sum(digit.double() * 256.0**i for i, digit in enumerate(sums))
    return (total * (place * s)).to(g.dtype)


def form_then_matmul(g: torch.Tensor, *feedback: Any) -> torch.Tensor:
    """B by its own kernel, then the vendor's product."""
    b = ops.feedback_weight(*feedback[:-1], (g.shape[1], feedback[-1]), dtype=g.dtype)
    return g @ b


def products(device: Device) -> dict[str, Callable[..., torch.Tensor]]:
    """dY B as a layer makes it, and where there is a choice of ways by each of them."""
    found = {way: backend.feedback_mm for way, backend in ways(device).items()}
    if not device.backends:
        return found
    if hasattr(torch.ops.bioplaus, "feedback_mm_by"):
        for way in WAYS:
            found[f", {way}"] = lambda *arguments, way=way: torch.ops.bioplaus.feedback_mm_by(*arguments, way)
    return found | {", feedback_weight + cuBLAS": form_then_matmul}


def build(device: Device, m: int, out: int, n: int, dtype: torch.dtype) -> Bench:
    """All rules on one shape, by every way there is."""
    torch._dynamo.reset()
    names = "sign, then matmul, torch.compile", "sign x magnitude, then matmul, torch.compile"
    functions = sign_then_matmul, magnitude_then_matmul
    compiled = {name: torch.compile(f, dynamic=False) for name, f in zip(names, functions, strict=True)}
    generator = torch.Generator(device.device)
    size = torch.finfo(dtype).bits // 8
    # The least that a way reads and writes: packed signs in the place of W.
    sets = device.sets((m * out + m * n) * size + out * n // 8)
    made = products(device)
    (variants, gate), *others = [one_set(device, m, out, n, dtype, i, generator, compiled, made) for i in range(sets)]
    return Bench(
        variants,
        gate,
        (Work(2.0 * m * out * n, float((m * out + out * n + m * n) * size)),),
        str(dtype).removeprefix("torch."),
        copies=[copy for copy, _ in others],
        generators=(generator,),
    )


def one_set(
    device: Device,
    m: int,
    out: int,
    n: int,
    dtype: torch.dtype,
    seed: int,
    generator: torch.Generator,
    compiled: dict[str, Callable[..., torch.Tensor]],
    made: dict[str, Callable[..., torch.Tensor]],
) -> tuple[dict[str, Run], dict[str, Callable[[], float]]]:
    """Every variant over operands of its own, and their gates."""
    torch.manual_seed(seed)
    g, w = torch.randn(m, out).to(dtype), (torch.randn(out, n) / out**0.5).to(dtype)
    s, key, signs = n**-0.5, feedback_key(seed).to(w.device), ops.pack_signs(w)
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
    sign, magnitude = compiled.items()
    variants: dict[str, Run] = {
        "torch dY @ W": lambda: g @ w,
        "sign, then matmul": lambda: sign_then_matmul(g, w, s),
        sign[0]: lambda: sign[1](g, w, s),
        "sign x magnitude, then matmul": lambda: magnitude_then_matmul(g, w, stored),
        magnitude[0]: lambda: magnitude[1](g, w, stored),
        "draw uniform, then matmul": lambda: draw_then_matmul(g, w, s, generator),
    }
    gate: dict[str, Callable[[], float]] = {}

    def add(name: str, function: Run, b: Callable[[], torch.Tensor]) -> None:
        variants[name], gate[name] = function, lambda: mm_gate(function(), g, b())

    def signed() -> torch.Tensor:
        return torch.sign(w.double()) * s

    if device.backends:
        if dtype == torch.float32:
            variants["torch dY @ W, TF32"] = with_tf32(variants["torch dY @ W"])
        add("stacked digits by torch._int_mm", lambda: stacked_int_mm(g, w, s), signed)
    # Without the instructions a processor takes minutes.
    if dtype == torch.float32 and (w.is_cuda or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        add("three bf16 parts x sign", lambda: bf16_parts(g, w, s), signed)
    for name, feedback in arguments.items():
        formed = partial(ops.feedback_weight, *feedback, w.shape, dtype=torch.float64)
        for way, ours in made.items():
            if way not in (", digits", ", int_mm") or (feedback[4] == "constant" and dtype == torch.float32):
                add(name + way, partial(ours, g, *feedback, n), formed)
    return variants, gate
