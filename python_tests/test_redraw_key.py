"""redraw_key: brSF's stream changes exactly when the weight's bits do."""

import pytest
import torch
from bitwise import BITS, DTYPES, KEY, LAYOUTS, each_device, make, needs_native
from torch import Tensor

import bioplaus_kernels as bk
from bioplaus_kernels import ops
from bioplaus_kernels.backends import reference

OLD = KEY - torch.tensor([1, 0, 0])
each_version = pytest.mark.parametrize("version_key", [OLD, KEY], ids=["version 1", "version 2"])


def stream(weight: Tensor, key: Tensor = KEY) -> int:
    """Of the redrawn key."""
    return int(ops.redraw_key(key.to(weight.device), weight)[2])


@needs_native
@each_device
@each_version
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits(layout: str, dtype: torch.dtype, version_key: Tensor, device: torch.device) -> None:
    """Native against reference."""
    weight, key = make(layout, dtype, device), version_key.to(device)
    assert torch.equal(torch.ops.bioplaus.redraw_key(key, weight), reference.redraw_key(key, weight))


def splitmix64(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


VALUES = torch.tensor([[1.5, -0.0, torch.inf], [-2.0, 1e-45, 3.25]])
VECTORS = {
    torch.float32: 0x509809218228A36E,
    torch.bfloat16: 0xED4346AA0B7C00B5,
    torch.float64: 0x82821AFA1B354FA6,
}


@pytest.mark.parametrize("dtype", VECTORS)
def test_layout_never_changes(dtype: torch.dtype) -> None:
    """The formula in integers, and its values when it was published: checkpoints depend on them."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # as published with the generator
    key, weight = torch.tensor([2, 0x0123456789ABCDEF, 0]), VALUES.to(dtype)
    words = weight.contiguous().view(BITS[min(weight.element_size(), 4)]).flatten().tolist()
    total = start = splitmix64(0x0123456789ABCDEF)
    for i, word in enumerate(words):
        x = word % 2 ** (8 * min(weight.element_size(), 4))
        z = (start + i * 0x9E3779B97F4A7C15) % 2**64 ^ x * 0xD2511F53
        low, high = z % 2**32, z >> 32
        total += low * high ^ (low << 32 | high)
    assert splitmix64(total % 2**64) == VECTORS[dtype]
    for redraw_key in (ops.redraw_key, reference.redraw_key):
        assert int(redraw_key(key, weight)[2]) % 2**64 == VECTORS[dtype]


def test_old_layout_never_changes() -> None:
    """Version 1's, which has a Philox call for each of 64 elements: `test_philox.py` has Philox's own vectors."""
    key = torch.tensor([1, 0x0123456789ABCDEF, 0])
    for redraw_key in (ops.redraw_key, reference.redraw_key):
        assert int(redraw_key(key, VALUES)[2]) % 2**64 == 0xD0301B3C945D9D64
    weight = torch.randn(64, 64)  # whose first column is sampled
    changed = weight.clone()
    changed[:, 1:] += 1
    assert stream(weight, OLD) == stream(changed, OLD)
    assert stream(weight) != stream(changed)


@each_device
@each_version
def test_what_moves_the_stream(version_key: Tensor, device: torch.device) -> None:
    """The last bit of an element, the layer's key and its stream do; the memory order does not."""
    weight, key = torch.randn(8, 8, device=device), version_key.to(device)  # version 1 samples 64 elements
    redrawn = ops.redraw_key(key, weight)
    assert redrawn[:2].tolist() == version_key[:2].tolist()
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_small_change_moves_the_stream(dtype: torch.dtype) -> None:
    """One ulp of one element, two elements swapped, a sign, a constant, the bits of a NaN: all streams differ."""
    weight = torch.randn(64, 64, dtype=torch.float64).to(dtype)
    weight[0, :7] = torch.tensor([0.0, 0.0, 0.0, torch.nan, 1.0, 1.0, 1.0], dtype=dtype)
    bits = weight.view(BITS[weight.element_size()])
    streams = [stream(weight), stream(-weight), stream(weight + 1), stream(weight.t()), stream(weight.flip(1))]
    streams.append(stream(torch.where(weight == 0, -weight, weight)))
    for i in torch.randperm(64 * 64)[:1000].tolist():
        changed = bits.clone()
        changed.view(-1)[i] += 1
        streams.append(stream(changed.view(dtype)))
    for i in range(0, 1000, 2):
        if bits.view(-1)[i] != bits.view(-1)[i + 1]:
            swapped = bits.clone().view(-1)
            swapped[[i, i + 1]] = swapped[[i + 1, i]]
            streams.append(stream(swapped.view(64, 64).view(dtype)))
    for value in (0.0, 1.0):  # where all elements are equal too
        for i in range(200):
            equal = torch.full((64, 64), value, dtype=dtype)
            equal.view(-1)[i] = 2.0
            streams.append(stream(equal))
    assert len(set(streams)) == len(streams)


def test_bits_of_the_stream_are_fair() -> None:
    """Half the bits change with a change of one bit: 64,000 coins, 6 standard deviations; and each bit does."""
    weight = torch.randn(64, 64)
    before, counts = stream(weight), torch.zeros(64)
    for i in range(1000):
        changed = weight.clone()
        changed.view(torch.int32).view(-1)[4 * i] ^= 1 << i % 31
        flipped = (stream(changed) ^ before) % 2**64
        counts += torch.tensor([flipped >> bit & 1 for bit in range(64)])
    assert abs(counts.sum() - 32_000) < 6 * 127
    assert (counts - 500).abs().max() < 6 * 16


@pytest.mark.parametrize("kind", ["98 % sparse", "below an ulp"])
def test_the_draw_moves_exactly_when_a_step_changes_w(kind: str) -> None:
    """SGD in bfloat16 at a rate that leaves most elements, and at times all, as they are."""
    torch.manual_seed(0)
    weight = torch.randn(64, 64, dtype=torch.bfloat16)
    weight.mul_(0.05).requires_grad_()
    sgd = torch.optim.SGD([weight], lr=1e-3)
    moved = []
    for step in range(60):
        before, streams = weight.detach().clone(), [stream(weight)]
        weight.grad = torch.randn_like(weight) * 10 ** -(step % 6)
        if kind == "98 % sparse":
            weight.grad *= torch.rand(64, 64) < 0.02
        sgd.step()
        streams.append(stream(weight))
        moved.append(streams[0] != streams[1])
        assert moved[-1] == (not torch.equal(before, weight))
    assert True in moved
    assert False in moved


def test_a_layer_redraws_when_unsampled_elements_change() -> None:
    layer = bk.nn.Linear(128, 64, feedback="brsf")
    before = layer.feedback_matrix().abs()
    with torch.no_grad():
        layer.weight[:, 1:] += 1
    after = layer.feedback_matrix().abs()
    assert not torch.equal(before, after)
    assert torch.equal(after, layer.feedback_matrix().abs())


def test_a_checkpoint_of_version_1_draws_as_it_did() -> None:
    """Its key keeps its version, and with it the hash of 64 elements."""
    layer = bk.nn.Linear(64, 64, feedback="brsf")
    old = {name: t for name, t in layer.state_dict().items() if name != "feedback_state"} | {"feedback_key": OLD}
    with pytest.warns(UserWarning, match="a key of layout version 1"):
        layer.load_state_dict(old)
    before = layer.feedback_matrix().abs()
    assert torch.equal(layer.feedback_key[:2], OLD[:2])
    with torch.no_grad():
        layer.weight[:, 1:] += 1
    assert torch.equal(before, layer.feedback_matrix().abs())


@needs_native
@pytest.mark.parametrize("size", [(3, 50_000), (50_000, 3), (300, 513)])
def test_any_number_of_threads_gives_the_same_bits(size: tuple[int, int]) -> None:
    """Also of a memory order that is not the logical one."""
    before = torch.get_num_threads()
    try:
        for dtype in DTYPES:
            weight = torch.randn(size, dtype=torch.float64).to(dtype)
            expected = reference.redraw_key(KEY, weight)
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                for same in (weight, weight.t().contiguous().t(), torch.stack((weight, weight), 2)[:, :, 0]):
                    assert torch.equal(torch.ops.bioplaus.redraw_key(KEY, same), expected)
    finally:
        torch.set_num_threads(before)


@each_device
@each_version
def test_result_is_a_new_tensor(version_key: Tensor, device: torch.device) -> None:
    """An op may not return its argument; an empty W leaves the stream alone."""
    key = version_key.to(device)
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
@each_version
def test_opcheck(version_key: Tensor, device: torch.device) -> None:
    """torch's own checks of the schema, the fake and the dispatch."""
    weight = make("channels-last", torch.float32, device)
    torch.library.opcheck(torch.ops.bioplaus.redraw_key.default, (version_key.to(device), weight))
