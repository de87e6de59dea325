"""Locally-connected weights of other libraries."""

import math
from typing import Any

import torch
from torch import Tensor

from ..backends.reference import checks
from ..backends.reference.lc import tap_index
from .locally_connected import _LocallyConnected

_LAYOUTS = ("keras", "keras channels first", "flax")


@torch.no_grad()
def load_kernel_(layer: _LocallyConnected, kernel: Any, bias: Any = None, *, layout: str) -> None:
    """Copy a locally-connected kernel of Keras or of JAX's Flax into `layer`, of the same geometry.

    layout: "keras" (`LocallyConnected1D/2D`, up to 2.15), "keras channels first" (its data_format="channels_first") or
    "flax" (`ConvLocal`, on `jax.lax.conv_general_dilated_local`).
    kernel: a tensor or array, with K = ∏kernel, C and O the channels, by Keras's `implementation`

        1   (∏out, K·C, O), of channels first (∏out, C·K, O)
        2   (*in, C, *out, O), of channels first (C, *in, O, *out), read where a tap lies in the input
        3   the values alone, 1-D

    and of Flax (*out, C·K, O), the channel outermost. bias: (*out, O), or None.

    Raises ValueError or TypeError for an argument that does not fit; then nothing is copied. A rule whose B is of the
    first weights is given to the layer afterwards.
    """
    checks.instance("layer", layer, _LocallyConnected, "a locally-connected layer")
    checks.one_of("layout", layout, _LAYOUTS)
    if layer.groups != 1:
        checks.fail("layer", "one group, as Keras and Flax have it", layer)
    k, b = _tensor("kernel", kernel, layer), None if bias is None else _tensor("bias", bias, layer)
    d, out, taps, c, o = layer.d, layer.output_size, layer.kernel_size, layer.in_channels, layer.out_channels
    first = layout != "keras"
    if layout == "flax" or k.dim() == 3:
        positions = out if layout == "flax" else (math.prod(out),)
        checks.shape("kernel", k, (*positions, math.prod(taps) * c, o))
        weight = k.reshape(*out, *((c, *taps) if first else (*taps, c)), o)
        weight = (weight.movedim(d, -2) if first else weight).movedim(-1, d)
    else:
        weight = _with_zeros(layer, k, first)
    if layer.bias is None:
        if b is not None:
            checks.fail("bias", "None, as the layer has none", f"shape {tuple(b.shape)}")
    elif b is None:
        checks.fail("bias", f"shape {tuple(layer.bias.shape)}", "None")
    else:
        checks.shape("bias", b, layer.bias.shape)
        # Keras reads its bias as (O, *out) there.
        layer.bias.copy_(b.reshape(o, *out).movedim(0, -1) if layout == "keras channels first" else b)
    layer.weight.copy_(weight)


def _with_zeros(layer: _LocallyConnected, k: Tensor, first: bool) -> Tensor:
    # Of Keras's matrix from inputs to outputs the entries that are taps, or these alone.
    d, out, taps, c, o = layer.d, layer.output_size, layer.kernel_size, layer.in_channels, layer.out_channels
    if layer.padding_mode != "zeros":
        checks.fail("layer", "padding_mode='zeros', as Keras has it", layer)
    size, inside = layer.input_size, torch.ones((*out, *taps), dtype=torch.bool, device=k.device)
    places = tap_index(out, taps, layer.stride, layer.dilation, k.device)
    for i, before in enumerate(layer._pairs[::2]):
        places[i] = places[i] - before
        inside &= (places[i] >= 0) & (places[i] < size[i])
    weight = k.new_zeros(*out, o, *taps, c)
    if k.dim() == 1:
        # Sorted by output, then by input.
        view = weight.movedim(d, 0).movedim(-1, d + 1) if first else weight
        mask = inside.reshape(*out, 1, *taps, 1).expand(weight.shape)
        mask = mask.movedim(d, 0).movedim(-1, d + 1) if first else mask
        checks.shape("kernel", k, (int(mask.sum()),))
        view[mask] = k
        return weight
    checks.shape("kernel", k, (c, *size, o, *out) if first else (*size, c, *out, o))
    if first:
        k = k.movedim(0, d).movedim(d + 1, -1)
    positions = [torch.arange(n, device=k.device).reshape(-1, *[1] * (2 * d - 1 - i)) for i, n in enumerate(out)]
    where = [place.clamp(0, n - 1) for place, n in zip(places, size, strict=True)]
    index: Any = (*where, slice(None), *positions, slice(None))
    return torch.where(inside[..., None, None], k[index], 0).movedim(-1, d)


def _tensor(name: str, value: Any, layer: _LocallyConnected) -> Tensor:
    if not isinstance(value, Tensor):
        if not hasattr(value, "__array__"):
            checks.fail(name, "a tensor or an array", type(value).__name__, TypeError)
        value = torch.tensor(value.__array__())
    checks.floating(name, value)
    return value.to(layer.weight)
