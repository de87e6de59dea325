"""pack_signs and unpack_signs: the planes and flags bit by bit, the round trip, and bad input."""

import pytest
import torch
from bitwise import DTYPES, LAYOUTS, assert_same_bits, each_device, make, needs_native

from bioplaus_kernels import ops
from bioplaus_kernels.backends import reference


@needs_native
@each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """Native against reference: all planes and flags, and what is unpacked from them."""
    weight = make(layout, dtype, device)
    packed = torch.ops.bioplaus.pack_signs(weight)
    expected = reference.pack_signs(weight)
    assert packed.dtype == torch.int32
    assert torch.equal(packed, expected)
    unpacked = torch.ops.bioplaus.unpack_signs(packed, weight.shape, dtype=dtype)
    assert_same_bits(unpacked, reference.unpack_signs(packed, weight.shape, dtype=dtype))
    assert torch.equal(unpacked, torch.sign(weight))


@each_device
def test_layout_by_hand(device: torch.device) -> None:
    """65 rows of 129 columns, positive but for four entries: where their bits and flags lie."""
    weight = torch.ones(65, 129, device=device)
    weight[0, 31], weight[1, 32], weight[64, 128], weight[63, 0] = -1, 0, 0, -0.0
    packed = ops.pack_signs(weight).cpu()
    assert packed.shape == (2 * 65 + 2, 8)
    sign, nonzero, flags = packed.split((65, 65, 2))
    assert sign[0, 0] == -(2**31)  # bit 31 of an int32
    assert sign.count_nonzero() == 1
    assert nonzero[1].tolist() == [-1, -2, -1, -1, 1, 0, 0, 0]  # bit 0 of word 1 is missing
    assert nonzero[63].tolist() == [-2, -1, -1, -1, 1, 0, 0, 0]
    assert nonzero[64].tolist() == [-1, -1, -1, -1, 0, 0, 0, 0]
    assert flags.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0]]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(130, 4200), (9, 9000), (7, 4097), (1, 8192)])
def test_wide(rows: int, columns: int, dtype: torch.dtype) -> None:
    """More columns than the kernel reads at once, adjacent and not."""
    weight = torch.randn(rows, columns, dtype=dtype)
    weight[rows // 2, 4095:] = 0
    for w in (weight, weight.t().contiguous().t(), torch.cat([weight, weight], 1)[:, 5 : columns + 5]):
        assert torch.equal(torch.ops.bioplaus.pack_signs(w), reference.pack_signs(w))


@each_device
def test_zeros_and_nan(device: torch.device) -> None:
    """What torch.sign makes of NaN is 0, and that is what is packed; subnormals have a sign."""
    values = [0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45]
    weight = torch.tensor(values, device=device).expand(2, 8)
    unpacked = ops.unpack_signs(ops.pack_signs(weight), [2, 8], dtype=torch.float32)
    assert unpacked[0].tolist() == [0, 0, 0, 0, 1, -1, 1, -1]
    assert torch.equal(unpacked, torch.sign(weight))


@needs_native
@each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [256, 37])
def test_every_number_of_a_half_type(columns: int, dtype: torch.dtype, device: torch.device) -> None:
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(256, 256)[:, :columns].to(device)
    assert torch.equal(torch.ops.bioplaus.pack_signs(weight), reference.pack_signs(weight))


@needs_native
@each_device
def test_reader_trusts_the_flags(device: torch.device) -> None:
    """Where a flag is 0 the non-zero plane says nothing."""
    weight = torch.randn(3, 40, device=device)
    packed = ops.pack_signs(weight)
    assert not packed[6].any()
    packed[3:6] = 0
    assert torch.equal(torch.ops.bioplaus.unpack_signs(packed, [3, 40], dtype=torch.float32), torch.sign(weight))


@pytest.mark.parametrize(
    ("size", "dtype", "error", "message"),
    [
        ((4, 7), torch.float32, None, ""),  # as many words as 4 × 6
        ((5, 6), torch.float32, ValueError, "signs: expected shape"),
        ((4, 129), torch.float32, ValueError, "signs: expected shape"),
        ((4, 6), torch.int64, TypeError, "dtype: expected float32"),
    ],
)
def test_bad_unpack(size: tuple[int, ...], dtype: torch.dtype, error: type[Exception] | None, message: str) -> None:
    """Packed signs do not know their exact number of columns, but anything that cannot be theirs is an error."""
    packed = ops.pack_signs(torch.randn(4, 6))
    if error is None:
        assert ops.unpack_signs(packed, size, dtype=dtype).shape == size
        return
    with pytest.raises(error, match=message):
        ops.unpack_signs(packed, size, dtype=dtype)


def test_bad_pack() -> None:
    """Only the four floating dtypes have a sign here."""
    with pytest.raises(TypeError, match="weight: expected float32"):
        ops.pack_signs(torch.ones(2, 2, dtype=torch.int32))
    with pytest.raises(TypeError, match="signs: expected int32"):
        ops.unpack_signs(torch.ones(5, 4), [2, 2], dtype=torch.float32)


@needs_native
@each_device
def test_opcheck(device: torch.device) -> None:
    """torch's own checks of the schema, the fake and the dispatch."""
    weight = make("channels-last", torch.float32, device)
    torch.library.opcheck(torch.ops.bioplaus.pack_signs.default, (weight,))
    arguments = (reference.pack_signs(weight), list(weight.shape))
    torch.library.opcheck(torch.ops.bioplaus.unpack_signs.default, arguments, {"dtype": torch.float16})
