"""Locally-connected weights of Keras and Flax, by what those libraries compute with them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")

# Of Keras 2.15 and Flax 0.10.4: layout, implementation, input size, kernel, strides, padding, and y · cos(2.1 n) of the
# layer from 2 to 3 channels, channels first, with x = cos(0.7 n), kernel = cos(1.3 n), bias = cos(0.4 n), n the index
# in each array as that library lays it out, but in x, which is channels first.
ROWS: list[tuple[str, int, tuple[int, ...], tuple[int, ...], tuple[int, ...], str, float]] = [
    ("keras", 1, (7,), (3,), (2,), "valid", 3.6394),
    ("keras channels first", 1, (7,), (3,), (2,), "valid", 1.1161),
    ("keras", 2, (7,), (3,), (2,), "valid", 4.1076),
    ("keras", 2, (7,), (3,), (2,), "same", -2.4013),
    ("keras channels first", 2, (7,), (3,), (2,), "valid", 2.4483),
    ("keras channels first", 2, (7,), (3,), (2,), "same", 0.062),
    ("keras", 3, (7,), (3,), (2,), "valid", 3.4452),
    ("keras", 3, (7,), (3,), (2,), "same", 0.0071),
    ("keras channels first", 3, (7,), (3,), (2,), "valid", 0.7255),
    ("keras channels first", 3, (7,), (3,), (2,), "same", 3.5948),
    ("keras", 1, (5, 4), (3, 2), (1, 2), "valid", -0.6661),
    ("keras channels first", 1, (5, 4), (3, 2), (1, 2), "valid", 0.1352),
    ("keras", 2, (5, 4), (3, 2), (1, 2), "valid", -0.9134),
    ("keras", 2, (5, 4), (3, 2), (1, 2), "same", -2.1943),
    ("keras channels first", 2, (5, 4), (3, 2), (1, 2), "valid", -0.0879),
    ("keras channels first", 2, (5, 4), (3, 2), (1, 2), "same", 0.2524),
    ("keras", 3, (5, 4), (3, 2), (1, 2), "valid", 0.1582),
    ("keras", 3, (5, 4), (3, 2), (1, 2), "same", -2.9502),
    ("keras channels first", 3, (5, 4), (3, 2), (1, 2), "valid", 2.5467),
    ("keras channels first", 3, (5, 4), (3, 2), (1, 2), "same", -7.9638),
    ("keras", 1, (4, 4), (2, 2), (2, 1), "valid", -6.075),
    ("keras channels first", 1, (4, 4), (2, 2), (2, 1), "valid", 0.247),
    ("keras", 2, (4, 4), (2, 2), (2, 1), "valid", -0.1243),
    ("keras", 2, (4, 4), (2, 2), (2, 1), "same", 5.1837),
    ("keras channels first", 2, (4, 4), (2, 2), (2, 1), "valid", -0.1596),
    ("keras channels first", 2, (4, 4), (2, 2), (2, 1), "same", 14.824),
    ("keras", 3, (4, 4), (2, 2), (2, 1), "valid", 0.0505),
    ("keras", 3, (4, 4), (2, 2), (2, 1), "same", 0.5422),
    ("keras channels first", 3, (4, 4), (2, 2), (2, 1), "valid", 25.925),
    ("keras channels first", 3, (4, 4), (2, 2), (2, 1), "same", 9.0785),
    ("flax", 0, (7,), (3,), (2,), "valid", 4.0627),
    ("flax", 0, (7,), (3,), (2,), "same", -0.6904),
    ("flax", 0, (7,), (3,), (2,), "circular", -2.1255),
    ("flax", 0, (5, 4), (3, 2), (1, 2), "valid", 0.0702),
    ("flax", 0, (5, 4), (3, 2), (1, 2), "same", 3.6798),
    ("flax", 0, (5, 4), (3, 2), (1, 2), "circular", 1.3569),
    ("flax", 0, (3, 3, 4), (2, 1, 3), (2, 1, 1), "valid", 2.2974),
    ("flax", 0, (3, 3, 4), (2, 1, 3), (2, 1, 1), "same", -0.1462),
    ("flax", 0, (3, 3, 4), (2, 1, 3), (2, 1, 1), "circular", -10.3506),
]


def wave(shape: Any, step: float) -> Tensor:
    return torch.cos(step * torch.arange(math.prod(shape), dtype=torch.float64)).reshape(shape)


def options(layout: str, size: Any, kernel: Any, strides: Any, padding: str) -> dict[str, Any]:
    """What a layer of ours takes for that library's padding; docs/locally-connected.md has the same."""
    if padding == "circular":
        return {"padding": [((k - 1) // 2, k // 2) for k in kernel], "padding_mode": "circular"}
    if padding == "same" and layout != "flax":
        sides = zip(size, kernel, strides, strict=True)
        return {"padding": [(k // 2, max((-(-n // s) - 1) * s + k - n - k // 2, 0)) for n, k, s in sides]}
    return {"padding": padding}


def kernel_shape(layer: Any, layout: str, implementation: int) -> tuple[int, ...]:
    """As those libraries document it."""
    taps, out = math.prod(layer.kernel_size) * 2, layer.output_size
    if layout == "flax":
        return (*out, taps, 3)
    if implementation == 2:
        size = layer.input_size
        return (2, *size, 3, *out) if "first" in layout else (*size, 2, *out, 3)
    return (math.prod(out), taps, 3)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row[:6])))
def test_a_kernel_computes_what_it_did_there(row: Any) -> None:
    layout, implementation, size, kernel, strides, _, expected = row
    kind = getattr(bk.nn, f"LocallyConnected{len(size)}d")
    layer = kind(2, 3, kernel, strides, input_size=size, dtype=torch.float64, **options(*row[:1], *row[2:6]))
    if implementation == 3:
        # The number of taps that lie in the input.
        ones = torch.ones(1, 2, *size, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.fill_(1)
            layer.bias.zero_()
        shape: tuple[int, ...] = (round(layer(ones).sum().item()),)
    else:
        shape = kernel_shape(layer, layout, implementation)
    bk.nn.load_kernel_(layer, wave(shape, 1.3), wave((*layer.output_size, 3), 0.4).numpy(), layout=layout)
    y = layer(wave((1, 2, *size), 0.7)).detach().flatten()
    assert float(y @ wave(y.shape, 2.1)) == pytest.approx(expected, abs=2e-3)


def test_a_load_copies_all_or_nothing() -> None:
    layer = bk.nn.LocallyConnected2d(2, 3, 2, input_size=4, bias=False)
    kernel, before = torch.randn(3, 3, 8, 3), layer.weight.clone()
    for wrong, message in (
        ({"kernel": kernel[1:]}, r"kernel: expected shape \(3, 3, 8, 3\), got \(2, 3, 8, 3\)"),
        ({"kernel": [1.0]}, "kernel: expected a tensor or an array, got list"),
        ({"kernel": kernel.long()}, "kernel: expected float32"),
        ({"bias": torch.zeros(3, 3, 3)}, "bias: expected None, as the layer has none"),
        ({"layout": "jax"}, "layout: expected one of keras, keras channels first, flax"),
        ({"layer": torch.nn.Conv2d(2, 3, 2)}, "layer: expected a locally-connected layer, got Conv2d"),
        ({"layer": bk.nn.LocallyConnected2d(2, 4, 2, groups=2, input_size=4)}, "layer: expected one group"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            bk.nn.load_kernel_(**({"layer": layer, "kernel": kernel, "layout": "flax"} | wrong))
        assert torch.equal(layer.weight, before)
    with_bias = bk.nn.LocallyConnected2d(2, 3, 2, input_size=4)
    before = with_bias.bias.clone()
    with pytest.raises(ValueError, match=r"bias: expected shape \(3, 3, 3\), got None"):
        bk.nn.load_kernel_(with_bias, kernel, layout="flax")
    with pytest.raises(ValueError, match=r"kernel: expected shape"):
        bk.nn.load_kernel_(with_bias, kernel[1:], torch.zeros(3, 3, 3), layout="flax")
    assert torch.equal(with_bias.bias, before)
    circular = bk.nn.LocallyConnected1d(2, 3, 3, padding=1, padding_mode="circular", input_size=4, bias=False)
    with pytest.raises(ValueError, match="layer: expected padding_mode='zeros', as Keras has it"):
        bk.nn.load_kernel_(circular, torch.ones(4, 2, 4, 3), layout="keras")
