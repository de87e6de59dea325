"""Recurrent layers, forward and backward: torch.nn's, ours, and ours as a loop over time in Python."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import bioplaus_kernels as bk

from .device import Device
from .gate import relative_gate
from .registry import Bench, Case, Run, register

# Steps, batch, units: one that products bound, one between, and one that calls bound.
SIZES = ((100, 32, 256), (50, 16, 64), (100, 1, 128))


@register("recurrent")
def cases() -> Iterator[Case]:
    """One layer of LSTM, GRU and RNN, as many inputs as units; --quick keeps the smallest in float32."""
    for name in ("LSTM", "GRU", "RNN"):
        for steps, batch, units in SIZES:
            label = f"{name} T={steps} N={batch} H={units} forward + backward"
            make = partial(build, name=name, steps=steps, batch=batch, units=units)
            yield Case("recurrent", label, make, quick=(steps, batch) == (100, 1))
            yield Case("recurrent", f"{label} bfloat16", partial(make, dtype=torch.bfloat16))


def build(device: Device, name: str, steps: int, batch: int, units: int, dtype: torch.dtype = torch.float32) -> Bench:
    """All gradients, of the input too; the gate is the input's gradient."""
    torch.manual_seed(0)
    plain: Any = getattr(torch.nn, name)(units, units, dtype=dtype)
    x, g = torch.randn(2, steps, batch, units).to(dtype)

    def layer(rule: Any) -> Any:
        ours = getattr(bk.nn, name)(units, units, feedback=rule, dtype=dtype)
        ours.load_state_dict(plain.state_dict(), strict=False)
        return ours

    def run(module: torch.nn.Module, x: Tensor = x, g: Tensor = g) -> Run:
        wanted = (x.clone().requires_grad_(), *(p for p in module.parameters() if p.requires_grad))
        return lambda: torch.autograd.grad(module(wanted[0])[0], wanted, g)

    layers = {f"bioplaus, {rule}": layer(rule) for rule in ("usf", "fa")}
    loop = _Loop(layer("fa"), dtype)
    variants = {"torch.nn": run(plain)} | {n: run(m) for n, m in layers.items()} | {"Python loop, fa": run(loop)}

    def error(module: torch.nn.Module) -> float:
        # B in W's place everywhere, in float64, by the loop; the bound is of the loop in the layer's dtype.
        loops = [_Loop(module, dtype), _Loop(module, torch.float64)]
        torchs, exact = (run(m, x.to(m.dtype), g.to(m.dtype))()[0] for m in loops)
        return relative_gate(run(module)()[0], exact, torchs)

    return Bench(variants, {n: partial(error, m) for n, m in layers.items()})


class _Loop(torch.nn.Module):
    """The layer as a cell in a loop, each product a Linear with the same B."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.mode, self.units, self.dtype = layer.mode, layer.hidden_size, dtype
        for part in ("ih", "hh"):
            weight, bias = (getattr(layer, f"{kind}_{part}_l0") for kind in ("weight", "bias"))
            linear = bk.nn.Linear(weight.shape[1], len(weight), feedback=bk.FeedbackAlignment(stored=True), dtype=dtype)
            with torch.no_grad():
                linear.weight.copy_(weight)
                linear.bias.copy_(bias)
                linear.feedback_weight.copy_(layer.feedback_matrix(f"weight_{part}_l0"))
            setattr(self, part, linear)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = c = x.new_zeros(x.shape[1], self.units)
        found = []
        for a in self.ih(x):
            b = self.hh(h)
            if self.mode == "LSTM":
                i, f, g, o = (a + b).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            elif self.mode == "GRU":
                (xr, xz, xn), (hr, hz, hn) = a.chunk(3, -1), b.chunk(3, -1)
                h = torch.lerp(torch.tanh(xn + (xr + hr).sigmoid() * hn), h, (xz + hz).sigmoid())
            else:
                h = torch.tanh(a + b)
            found.append(h)
        return torch.stack(found), h
