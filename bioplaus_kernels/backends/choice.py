"""The automatic choice on a GPU: which way makes a product, by thresholds. None was measured yet: "estimated".

The ways of dX = dY B:

    triton   ±1 as the tensor cores' operand, half types (float32 as three bf16 parts)
    digits   CUDA C++: float32 rows as four int8 digits times ±1, exact, the bits of the CPU's; a kernel of its own
    int_mm   the same digits and bits by the vendor's int8 product
    formed   B a slab of columns at a time, then the vendor's product

float32 takes the two integer ways (without CUDA C++ the reference), so that neither a shape nor a GPU decides its bits,
but where int8 is cut down (sm_103), for K above 2²⁰, and where TF32 is allowed: faster, a thousand times less accurate.
"""

import functools
from typing import Any, NamedTuple

import torch

# sm_103 has a thirtieth of sm_100's int8 rate.
_INT8_IS_SLOW = ((10, 3),)


class Gpu(NamedTuple):
    """What a device is, and which kernels it can run."""

    capability: tuple[int, int]
    cuda: bool
    triton: bool


@functools.cache
def _gpu(index: int) -> Gpu:
    from . import lacks_kernels, unavailable

    able = [not (unavailable(name) or lacks_kernels(name, index)) for name in ("cuda", "triton")]
    return Gpu(torch.cuda.get_device_capability(index), *able)


def gpu(index: int) -> Gpu:
    """Of CUDA device `index`."""
    return _gpu(index)


def tf32() -> bool:
    """Whether the user lets torch's products round float32 to TF32."""
    # The older flag raises where the newer one was set.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# What torch.compiler.assume_constant_result does, without its import of the compiler, which looks into caches and not
# at their marks; torch guards the flag itself.
gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]
tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def way(name: str, args: tuple[Any, ...], of: Gpu) -> str:
    """Who makes one product with arguments `args`: "triton", "reference", "cuda" or, of `feedback_mm`, a way of its."""
    if name != "feedback_mm":
        # estimated: float32 in parts (sm_90, sm_100) is three times CUDA C++'s FMA; elsewhere B of signs is not formed
        return "triton" if of.triton and args[0].dtype != torch.float64 else "cuda" if of.cuda else "reference"
    grad_output, weight, _, _, _, entries, _, n = args
    m, k = grad_output.shape if grad_output.dim() == 2 else (0, 0)
    formed, dtype = "formed" if of.cuda else "reference", grad_output.dtype
    if entries != "constant" or dtype == torch.float64 or m == 0 or k > 2**20:
        return formed
    if dtype != torch.float32:
        # estimated: each tile of rows makes its signs anew; B made once is 1.03 of back-propagation's at 16384 rows
        return "triton" if of.triton and m <= 2048 else formed
    if tf32() and (not of.cuda or m > (32 if weight is not None else 64)):
        return formed  # estimated: 350 against 670 µs at 4096 rows; at few rows what is read decides, and that is bits
    if of.capability in _INT8_IS_SLOW and of.triton:
        return "triton"
    if not of.cuda:
        return formed
    # estimated: sm_80's instructions, which `digits` is made of, reach a quarter of sm_100's rate; elsewhere, at 4096²
    # from W, 80 against 105 µs at 256 rows and 160 against 105 at 512
    many = m > 16 if of.capability[0] == 10 else m > 256 and k * n >= 2**20
    return "int_mm" if many else "digits"
