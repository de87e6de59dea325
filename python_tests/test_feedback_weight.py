"""feedback_weight: every cell of the table of signs and magnitudes, native against reference."""

import os
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from bitwise import DTYPES, KEY, LAYOUTS, assert_same_bits, each_device, make, needs_native, special
from torch import Tensor

from bioplaus_kernels import ops
from bioplaus_kernels.backends import native, reference

# sign source, entries
CELLS = [
    ("weight", "constant"),
    ("signs", "constant"),
    (None, "constant"),
    *((sign, entries) for entries in ("stored", "uniform", "normal") for sign in ("weight", "signs", None)),
]

# dtypes of weight, magnitude, output: all alike, and mixtures in which each conversion occurs
MIXTURES = [(dtype,) * 3 for dtype in DTYPES] + [
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16, torch.float32),
    (torch.float16, torch.float64, torch.float16),
    (torch.float64, torch.bfloat16, torch.float64),
]


def arguments(
    weight: Tensor, magnitude: Tensor, sign: str | None, entries: str, scale: float = -0.37
) -> tuple[Any, ...]:
    """The op's positional arguments for one cell."""
    seeded = entries in ("uniform", "normal") or (entries == "constant" and sign is None)
    return (
        weight if sign == "weight" else None,
        reference.pack_signs(weight) if sign == "signs" else None,
        magnitude if entries == "stored" else None,
        KEY.to(weight.device) if seeded else None,
        entries,
        scale,
        list(weight.shape),
    )


@needs_native
@each_device
@pytest.mark.parametrize("dtypes", MIXTURES, ids=lambda d: "-".join(str(x).removeprefix("torch.") for x in d))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits(layout: str, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Same bits as the reference's; normal draws, which take a logarithm and a sine, within a few roundings."""
    weight, magnitude = (make(layout, dtype, device) for dtype in dtypes[:2])
    for sign, entries in CELLS:
        args = arguments(weight, magnitude, sign, entries)
        actual = torch.ops.bioplaus.feedback_weight(*args, dtype=dtypes[2])
        expected = reference.feedback_weight(*args, dtype=dtypes[2])
        if entries == "normal":
            assert actual.stride() == expected.stride()
            acc = torch.float64 if dtypes[2] == torch.float64 else torch.float32
            roundings = 4 * torch.finfo(acc).eps + torch.finfo(dtypes[2]).eps
            torch.testing.assert_close(actual, expected, rtol=roundings, atol=roundings, equal_nan=True)
        else:
            assert_same_bits(actual, expected)


@needs_native
@each_device
@pytest.mark.parametrize("order", ["contiguous weight", "contiguous magnitude"])
def test_orders_that_differ(order: str, device: torch.device) -> None:
    """Weight and magnitude in different memory orders: B takes the weight's."""
    weight, magnitude = special(6, 5, 3, 3).to(device), special(6, 5, 3, 3).to(device)
    if order == "contiguous weight":
        magnitude = magnitude.to(memory_format=torch.channels_last)
    else:
        weight = weight.to(memory_format=torch.channels_last)
    args = arguments(weight, magnitude, "weight", "stored")
    b = torch.ops.bioplaus.feedback_weight(*args, dtype=torch.float32)
    assert_same_bits(b, reference.feedback_weight(*args, dtype=torch.float32))
    assert b.stride() == weight.stride()


@needs_native
@pytest.mark.parametrize("size", [(3, 50_000), (50_000, 3), (300, 513)])
def test_any_number_of_threads_gives_the_same_bits(size: tuple[int, int]) -> None:
    """Few rows, few columns, and both; enough of them that two threads take part."""
    weight, magnitude = torch.randn(size), torch.randn(size)
    before = torch.get_num_threads()
    try:
        for sign, entries in CELLS:
            args = arguments(weight, magnitude, sign, entries)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(torch.ops.bioplaus.feedback_weight(*args, dtype=torch.float32))
            assert torch.equal(results[0], results[1]), (sign, entries)
            assert torch.equal(results[0], results[2]), (sign, entries)
    finally:
        torch.set_num_threads(before)


@needs_native
def test_offsets_beyond_32_bits() -> None:
    """Rows 2³⁰ elements apart. The memory between them is never touched, so it costs nothing."""
    far = torch.UntypedStorage(2 * (2 * 2**30 + 64))
    weight = torch.empty(0, dtype=torch.bfloat16).set_(far, 0, (3, 64), (2**30, 1))
    weight.copy_(torch.randn(3, 64))
    near = weight.clone(memory_format=torch.contiguous_format)
    pack, form, redraw = (getattr(torch.ops.bioplaus, n) for n in ("pack_signs", "feedback_weight", "redraw_key"))
    assert torch.equal(pack(weight), pack(near))
    assert torch.equal(redraw(KEY, weight), redraw(KEY, near))
    for entries in ("constant", "uniform"):
        args = arguments(weight, near, "weight", entries)
        assert torch.equal(form(*args, dtype=torch.float32), reference.feedback_weight(*args, dtype=torch.float32))


@pytest.mark.slow
@needs_native
def test_every_lower_level() -> None:
    """The bits of each instruction-set level that this processor has, by running the same tests at that level."""
    levels = native.library.build_config()["cpu_levels"]
    here = Path(__file__).resolve().parent
    program = "\n".join(
        [
            "import sys, pytest, torch",
            "from bioplaus_kernels.backends import native",
            "assert native.library.active_cpu_level() == sys.argv[1], native.library.active_cpu_level()",
            "sys.exit(pytest.main(sys.argv[2:]))",
        ]
    )
    for level in levels[: levels.index(native.library.active_cpu_level())]:
        tests = ["test_feedback_weight.py", "test_pack_signs.py", "test_redraw_key.py"]
        # Ragged words, several chunks, and the two ways to gather.
        layouts = "bits and cpu and (beyond or several or channels or sliced)"
        options = ["-q", "-x", "-p", "no:cacheprovider", "-k", layouts]
        command = [level, *options, *(str(here / test) for test in tests)]
        result = fresh.run(program, *command, environment=os.environ | {"ATEN_CPU_CAPABILITY": level.lower()})
        assert result.returncode == 0, f"{level}:\n{result.stdout[-3000:]}{result.stderr[-3000:]}"


W = torch.randn(4, 6)
S = reference.pack_signs(W)

BAD = {
    # what is wrong: (arguments that differ from the good ones, dtype, error, words of its message)
    "both sign sources": ({"weight": W, "signs": S}, torch.float32, ValueError, "signs: expected None"),
    "no source at all for constant": (
        {"weight": None, "key": None},
        torch.float32,
        ValueError,
        "entries: expected exactly",
    ),
    "sign source and key for constant": ({"key": KEY}, torch.float32, ValueError, "entries: expected exactly one"),
    "unknown entries": ({"entries": "gauss"}, torch.float32, ValueError, "entries: expected one of"),
    "NaN scale": ({"scale": float("nan")}, torch.float32, ValueError, "scale: expected a finite number, got nan"),
    "infinite scale": ({"scale": float("inf")}, torch.float32, ValueError, "scale: expected a finite number, got inf"),
    "stored without magnitude": ({"entries": "stored"}, torch.float32, ValueError, "magnitude: expected a tensor"),
    "magnitude without stored": ({"magnitude": W}, torch.float32, ValueError, "magnitude: expected None"),
    "stored with key": (
        {"entries": "stored", "magnitude": W, "key": KEY},
        torch.float32,
        ValueError,
        "key: expected None",
    ),
    "uniform without key": ({"entries": "uniform"}, torch.float32, ValueError, "key: expected a tensor"),
    "normal without key": ({"entries": "normal"}, torch.float32, ValueError, "key: expected a tensor"),
    "weight of another size": ({"size": [4, 7]}, torch.float32, ValueError, r"weight: expected shape .*4, 7"),
    "magnitude of another size": (
        {"entries": "stored", "magnitude": W[:, 1:]},
        torch.float32,
        ValueError,
        r"magnitude: expected shape .*4, 6",
    ),
    "negative size": (
        {"weight": None, "signs": S, "size": [4, -6]},
        torch.float32,
        ValueError,
        "size: expected no negative",
    ),
    "integer weight": ({"weight": W.int()}, torch.float32, TypeError, "weight: expected float32"),
    "complex magnitude": (
        {"entries": "stored", "magnitude": W + 0j},
        torch.float32,
        TypeError,
        "magnitude: expected float32",
    ),
    "integer output": ({}, torch.int32, TypeError, "dtype: expected float32"),
    "signs of another size": ({"weight": None, "signs": S[:-1]}, torch.float32, ValueError, "signs: expected shape"),
    "float signs": ({"weight": None, "signs": S.float()}, torch.float32, TypeError, "signs: expected int32"),
    "short key": ({"entries": "uniform", "key": KEY[:2]}, torch.float32, ValueError, r"key: expected shape .*3"),
    "float key": ({"entries": "uniform", "key": KEY.double()}, torch.float32, TypeError, "key: expected int64"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    """An error of the right type that names the argument, what it got and what is wanted."""
    wrong, dtype, error, message = BAD[case]
    good = {
        "weight": W,
        "signs": None,
        "magnitude": None,
        "key": None,
        "entries": "constant",
        "scale": 1.0,
        "size": [4, 6],
    }
    with pytest.raises(error, match=message):
        ops.feedback_weight(**(good | wrong), dtype=dtype)


@needs_native
def test_key_of_a_later_layout() -> None:
    """A key that another release wrote under another layout is not misread; a GPU would have to be waited for."""
    key = KEY + torch.tensor([1, 0, 0])
    with pytest.raises(ValueError, match="key: expected layout version 1 or 2, got 3"):
        ops.feedback_weight(None, None, None, key, "uniform", 1.0, [4, 6], dtype=torch.float32)


@needs_native
@each_device
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_opcheck(cell: tuple[str | None, str], device: torch.device) -> None:
    """torch's own checks of the schema, the fake and the dispatch."""
    weight, magnitude = (torch.randn(6, 5, 3, 3, device=device) for _ in range(2))
    args = arguments(weight.to(memory_format=torch.channels_last), magnitude, *cell)
    torch.library.opcheck(torch.ops.bioplaus.feedback_weight.default, args, {"dtype": torch.bfloat16})


@pytest.mark.gpu
def test_devices_apart() -> None:
    """All operands lie on one device."""
    for weight, key in ((W.cuda(), KEY), (W, KEY.cuda())):
        with pytest.raises(ValueError, match="expected a tensor on"):
            ops.feedback_weight(weight, None, None, key, "uniform", 1.0, [4, 6], dtype=torch.float32)


@pytest.mark.gpu
def test_no_synchronisation() -> None:
    """Every cell can be captured in a CUDA graph: nothing is read back, nothing is allocated outside torch."""
    weight, magnitude = torch.randn(65, 129, device="cuda"), torch.randn(65, 129, device="cuda")
    key = KEY.cuda()
    # A kernel's first launch loads it, which a capture does not allow everywhere.
    torch.ops.bioplaus.pack_signs(weight)
    torch.ops.bioplaus.redraw_key(key, weight)
    for cell in CELLS:
        args = arguments(weight, magnitude, *cell)
        expected = torch.ops.bioplaus.feedback_weight(*args, dtype=torch.float32)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            b = torch.ops.bioplaus.feedback_weight(*args, dtype=torch.float32)
            torch.ops.bioplaus.pack_signs(weight)
            torch.ops.bioplaus.redraw_key(key, weight)
        graph.replay()
        assert torch.equal(b, expected)
