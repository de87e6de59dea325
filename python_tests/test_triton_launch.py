"""How Triton's kernels are launched: on which device, with which tile, at what cost. Nothing is compiled or run."""

import itertools
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bioplaus_kernels as bk

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from bioplaus_kernels.backends.triton import feedback_mm, launch, lc
from bioplaus_kernels.backends.triton.launch import Tile

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the current device is made up")


class Kernel(JITFunction):
    """What a compiled kernel looks like from outside; keeps how it was called."""

    def __init__(self, like: Any, gpu: "Gpu") -> None:
        self.arg_names, self.gpu = like.arg_names, gpu

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def first(*args: object, **constants: object) -> "Compiled":
            self.gpu.calls.append(("compiled", self.gpu.current, grid, (*args, *constants.values())))
            return Compiled(self.gpu)

        return first


class Compiled:
    def __init__(self, gpu: "Gpu") -> None:
        self.gpu = gpu

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.gpu.calls.append(("run", self.gpu.current, grid, args))


class Gpu:
    """The current device, and what was launched on it."""

    def __init__(self) -> None:
        self.current: Any = 0
        self.calls: list[tuple] = []


class On(torch.Tensor):
    """A tensor that says it is on a GPU."""

    where = torch.device("cuda:1")

    @property
    def device(self) -> torch.device:
        return self.where


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    made = Gpu()

    class Guard:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            self.before, made.current = made.current, self.index

        def __exit__(self, *_: object) -> None:
            made.current = self.before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: made.current)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(launch, "_runners", {})
    yield made


@no_gpu
def test_a_kernel_runs_on_the_device_of_its_tensors(gpu: Gpu) -> None:
    kernel = Kernel(feedback_mm.add_kernel, gpu)
    x = torch.zeros(4).as_subclass(On)
    for _ in range(2):
        launch.launch(kernel, (1, 1, 1), (x, x), (1.0, 4, 1), {"BLOCK": 1024})
    assert [call[:2] for call in gpu.calls] == [("compiled", 1), ("run", 1)] and gpu.current == 0


@no_gpu
def test_a_compiled_kernel_serves_what_it_was_compiled_for(gpu: Gpu) -> None:
    """Everything that Triton specialises on makes another one: alignment, dtype, numbers, constants."""
    kernel, gpu.current = Kernel(feedback_mm.add_kernel, gpu), None
    memory = torch.zeros(64)
    calls = [
        ((memory[:4], memory), (1.0, 4, 1), {"BLOCK": 1024}),
        ((memory[1:5], memory), (1.0, 4, 1), {"BLOCK": 1024}),
        ((memory[:4].half(), memory), (1.0, 4, 1), {"BLOCK": 1024}),
        ((memory[:4], memory), (1.0, 16, 1), {"BLOCK": 1024}),
        ((memory[:4], memory), (1.0, 4, 1), {"BLOCK": 512}),
        ((memory[:4], None), (1.0, 4, 1), {"BLOCK": 1024}),
    ]
    for _ in range(2):
        for tensors, numbers, constants in calls:
            launch.launch(kernel, (1, 1, 1), tensors, numbers, constants | {"num_warps": 4, "num_stages": 2})
    assert [call[0] for call in gpu.calls] == ["compiled"] * 6 + ["run"] * 6
    # What is run gets the constants of the code, not the compiler's options.
    assert gpu.calls[0][3] == (*calls[0][0], *calls[0][1], 1024, 4, 2)
    assert gpu.calls[6][3] == (*calls[0][0], *calls[0][1], 1024)


@no_gpu
def test_what_is_kept_has_an_end(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_MOST", 3)
    kernel, gpu.current = Kernel(feedback_mm.add_kernel, gpu), None
    x = torch.zeros(4)
    for count in range(8):
        launch.launch(kernel, (1, 1, 1), (x, x), (1.0, count, 1), {"BLOCK": 1024})
        assert len(launch._runners) <= 3


CALLS = {
    "feedback_mm": lambda x, w, g: feedback_mm.feedback_mm(x, w, None, None, None, "constant", 0.5, 64),
    "lc_forward": lambda x, w, g: lc.lc_forward(x, w, None, [1, 1], [1, 1, 1, 1], [1, 1], 1),
    "lc_backward_input": lambda x, w, g: lc.lc_backward_input(
        g, w, None, None, None, "constant", 0.5, w.shape, [6, 6], [1, 1], [1, 1, 1, 1], [1, 1], 1
    ),
    "lc_backward_weight": lambda x, w, g: lc.lc_backward_weight(g, x, [3, 3], [1, 1], [1, 1, 1, 1], [1, 1], 1),
}


@no_gpu
@pytest.mark.parametrize("name", CALLS)
def test_host_cost(name: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of functions, Python's and C's, in a call of a product whose kernel is compiled: 10 to 20 µs of them.

    Triton's own launch makes several hundred more.
    """
    gpu.current = None
    for module in (feedback_mm, lc):
        for attribute in [a for a in vars(module) if a.endswith("_kernel")]:
            monkeypatch.setattr(module, attribute, Kernel(getattr(module, attribute), gpu))
    if name == "feedback_mm":
        x, w, g = torch.randn(8, 4096).bfloat16(), torch.randn(4096, 64).bfloat16(), None
    else:
        channels_last = torch.channels_last
        x, g = (torch.randn(4, c, 6, 6).bfloat16().to(memory_format=channels_last) for c in (8, 16))
        w = torch.randn(6, 6, 16, 3, 3, 8).bfloat16()
    CALLS[name](x, w, g)
    count = 0

    def profile(_: object, event: str, __: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    CALLS[name](x, w, g)
    sys.setprofile(None)
    assert any(call[0] == "run" for call in gpu.calls)
    assert count <= 130, f"{count} calls"


def test_a_tile_fits() -> None:
    small, large = Tile(16, 128, 64, 4, 4), Tile(256, 128, 64, 8, 3)
    tiles = (small, large)
    # A stage of the large one: 64 * (256 * 2 + 128 * 4) bytes = 64 KiB.
    assert launch.fitting(tiles, 256, 2, 4, 3 * 65536) == large
    assert launch.fitting(tiles, 256, 2, 4, 3 * 65536 - 1) == large._replace(stages=2)
    assert launch.fitting(tiles, 256, 2, 4, 2 * 65536 - 1) == small._replace(stages=3)
    assert launch.fitting(tiles, 16, 2, 4, 232_448) == small
    assert launch.fitting(tiles, 17, 2, 4, 232_448) == launch.fitting(tiles, 1000, 2, 4, 232_448) == large
    assert launch.fitting(tiles, 1, 2, 4, 1) == small._replace(stages=1)


@pytest.mark.skipif(not bk.backends.interpreted(), reason="TRITON_INTERPRET is not set")
def test_limits_are_asked_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(major=8, minor=9, shared_memory_per_block_optin=101_376, shared_memory_per_block=49_152)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    launch.device_limits.cache_clear()
    for _ in range(2):
        assert launch.device_limits(torch.device("cuda:3")) == ((8, 9), 101_376)
    assert asked == [torch.device("cuda:3")]
    launch.device_limits.cache_clear()
    # The 118 784 bytes that a table for A100s once asked of an RTX 4090.
    for dtype, rows, source in itertools.product((torch.float32, torch.bfloat16), (1, 64, 4096), (0, 2, 4)):
        tile = feedback_mm.tile_for(dtype, rows, source, (8, 9), 101_376)
        held = 10 if dtype == torch.float32 else 2
        assert tile.stages * tile.depth * (tile.rows * held + tile.columns * source) <= 101_376
