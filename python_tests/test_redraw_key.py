"""redraw_key: brSF's stream changes exactly when the weight's bits do."""

import pytest
import torch
from bitwise import DTYPES, KEY, LAYOUTS, each_device, make, needs_native

from bioplaus_kernels import ops
from bioplaus_kernels.backends import reference


@needs_native
@each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """Native against reference."""
    weight, key = make(layout, dtype, device), KEY.to(device)
    assert torch.equal(torch.ops.bioplaus.redraw_key(key, weight), reference.redraw_key(key, weight))


@each_device
def test_what_moves_the_stream(device: torch.device) -> None:
    """The last bit of a sampled element, the layer's key and its stream do; the memory order does not."""
    weight, key = torch.randn(8, 8, device=device), KEY.to(device)  # all 64 elements are sampled
    redrawn = ops.redraw_key(key, weight)
    assert redrawn[:2].tolist() == KEY[:2].tolist()
    assert torch.equal(redrawn, ops.redraw_key(key, weight.t().contiguous().t()))
    changed = weight.clone()
    changed.view(torch.int32)[5, 3] ^= 1
    streams = {
        int(ops.redraw_key(k, w)[2])
        for k, w in (
            (key, weight),
            (key, changed),
            (key + torch.tensor([0, 1, 0], device=device), weight),
            (key + torch.tensor([0, 0, 1], device=device), weight),
        )
    }
    assert len(streams) == 4
    assert KEY[2].item() not in streams


@each_device
def test_result_is_a_new_tensor(device: torch.device) -> None:
    """An op may not return its argument."""
    key = KEY.to(device)
    for weight in (torch.randn(3, 3, device=device), torch.randn(0, 3, device=device)):
        redrawn = ops.redraw_key(key, weight)
        assert redrawn.data_ptr() != key.data_ptr()
    assert torch.equal(redrawn, key)


def test_bad_input() -> None:
    """Errors name the argument."""
    weight = torch.randn(2, 2)
    with pytest.raises(TypeError, match="key: expected int64"):
        ops.redraw_key(KEY.int(), weight)
    with pytest.raises(ValueError, match="key: expected shape"):
        ops.redraw_key(KEY[:2], weight)
    with pytest.raises(TypeError, match="weight: expected float32"):
        ops.redraw_key(KEY, weight.long())


@needs_native
@each_device
def test_opcheck(device: torch.device) -> None:
    """torch's own checks of the schema, the fake and the dispatch."""
    weight = make("channels-last", torch.float32, device)
    torch.library.opcheck(torch.ops.bioplaus.redraw_key.default, (KEY.to(device), weight))
