"""Forming B, packing signs and hashing W: bound by memory."""

from collections.abc import Iterator

import torch

from bioplaus_kernels import ops
from bioplaus_kernels.backends import reference
from bioplaus_kernels.feedback import feedback_key

from .device import Device
from .registry import Bench, Case, Work, register


@register("feedback_weight")
def cases() -> Iterator[Case]:
    """4096 x 4096 and a convolution's channels-last weight."""
    yield Case("feedback_weight", "4096x4096 float32", lambda device: build(device, (4096, 4096)), quick=True)
    conv = "512x512x3x3 channels-last float32"
    yield Case("feedback_weight", conv, lambda device: build(device, (512, 512, 3, 3)))


def build(device: Device, size: tuple[int, ...]) -> Bench:
    """All cells of the table, by the device's own kernels."""
    w = torch.randn(size)
    if len(size) == 4:
        w = w.contiguous(memory_format=torch.channels_last)
    key, signs, s = feedback_key(0).to(w.device), ops.pack_signs(w), 0.01
    cells = {
        "usf": (w, None, None, None, "constant", s),
        "usf, packed signs": (None, signs, None, None, "constant", s),
        "frsf stored": (w, None, w, None, "stored", 1.0),
        "frsf seeded, uniform": (w, None, None, key, "uniform", s),
        "fa seeded, ±s": (None, None, None, key, "constant", s),
        "fa seeded, uniform": (None, None, None, key, "uniform", s),
        "fa seeded, normal": (None, None, None, key, "normal", s),
    }
    variants = {"torch sign(W) * s": lambda: torch.sign(w) * s, "torch.rand_like": lambda: torch.rand_like(w)}
    for name, cell in cells.items():
        variants[name] = lambda c=cell: ops.feedback_weight(*c, w.shape, dtype=w.dtype)
    variants["pack_signs"] = lambda: ops.pack_signs(w)
    if w.dim() == 2:
        variants["pack_signs, transposed W"] = lambda: ops.pack_signs(w.t())
    variants["unpack_signs"] = lambda: ops.unpack_signs(signs, w.shape, dtype=w.dtype)
    return Bench(variants, work=(Work(read=2.0 * w.numel() * w.element_size()),))


@register("redraw_key")
def keys() -> Iterator[Case]:
    """brSF's hash of W beside the other passes over it, and of a W that a call's own cost hides."""
    for size in ((2048, 2048), (4096, 4096), (512, 512, 3, 3), (8, 8)):
        for dtype in (torch.float32, torch.bfloat16):
            label = f"{'x'.join(map(str, size))}{' channels-last' * (len(size) == 4)} {str(dtype)[6:]}"
            quick = size == (2048, 2048)
            yield Case("redraw_key", label, lambda device, s=size, d=dtype: key_of(s, d), quick=quick)


def key_of(size: tuple[int, ...], dtype: torch.dtype) -> Bench:
    """Its bits are the reference's."""
    w = torch.randn(size).to(dtype)
    if len(size) == 4:
        w = w.contiguous(memory_format=torch.channels_last)
    key = feedback_key(0).to(w.device)
    variants = {
        "torch W.sum()": lambda: w.sum(),
        "pack_signs": lambda: ops.pack_signs(w),
        "redraw_key": lambda: ops.redraw_key(key, w),
    }
    gate = {
        "pack_signs": lambda: 2.0 * (not torch.equal(ops.pack_signs(w), reference.pack_signs(w))),
        "redraw_key": lambda: 2.0 * (not torch.equal(ops.redraw_key(key, w), reference.redraw_key(key, w))),
    }
    return Bench(variants, gate, work=(Work(read=float(w.nbytes)),), unit=str(dtype)[6:])
