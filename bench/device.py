"""Where a benchmark runs: how calls are timed there, caches emptied, memory counted, and what is compared."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch

import bioplaus_kernels as bk
from bioplaus_kernels import ops
from bioplaus_kernels.backends import reference

from .quiet import Probe
from .registry import Run


class Cpu:
    """The processor, by its clock."""

    device = torch.device("cpu")
    # Backends with variants of their own beside the automatic choice.
    backends: tuple[str, ...] = ()
    # What a variant may raise and be reported for, the others going on.
    failures: tuple[type[Exception], ...] = ()
    # Of the roofline: a square product's size, and numbers that no cache holds.
    product, numbers = 2048, 2**26
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    @cached_property
    def probe(self) -> Probe:
        """What tells whether others use the processor."""
        return Probe()

    def states(self, cold: bool) -> tuple[str, ...]:
        """In which states a case is timed; `cold`: the case asks for empty caches."""
        return ("warm", "cold") if cold else ("warm",)

    def sets(self, size: int) -> int:
        """How many sets of operands of `size` bytes a state needs that is to find none of them in a cache."""
        return 1

    def prepared(self, functions: Sequence[Run], state: str, generators: Sequence[torch.Generator] = ()) -> Run:
        """What is timed in `state` for a variant over each of its sets of operands."""
        return functions[0]

    def flusher(self) -> Run:
        """A function that leaves nothing useful in the caches."""
        buffer = torch.empty(2**27)
        return lambda: buffer.add_(1.0)

    def seconds(self, function: Run, times: int = 1) -> float:
        """Taken by so many calls, one after another."""
        start = time.perf_counter()
        for _ in range(times):
            function()
        return time.perf_counter() - start

    def host_seconds(self, function: Run, times: int) -> float | None:
        """Of the processor for one of so many calls, where another device does the work."""
        return None

    def lost(self) -> bool:
        """Whether nothing more can run in this process."""
        return False

    def peak_bytes(self, function: Run) -> int:
        """Most bytes that torch's allocator held at once for one call, above what was held before it."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            function()
        held = most = 0
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        return most


class Cuda:
    """The current GPU, by its own clock: CUDA events around the calls, in the current stream.

    Each case is timed warm, with an empty L2 cache before each call ("cold"), and as the replay of a CUDA graph
    ("graph"), which leaves out what the processor takes to launch: of calls over sets of operands that the L2 cache
    does not hold together, or of one call, L2 cache empty, where a case has one set. `cuda` is torch.cuda, or what
    stands in for it in a test.
    """

    device = torch.device("cuda")
    backends: tuple[str, ...] = ("cuda", "triton")
    failures: tuple[type[Exception], ...] = (Exception,)
    product, numbers = 8192, 2**28
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    # The processor's neighbours do not slow a GPU, and a probe would leave it idle.
    probe = None

    def __init__(self, cuda: Any = torch.cuda) -> None:
        if not cuda.is_available():
            built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
            raise RuntimeError(f"no CUDA device in this machine (torch {torch.__version__}, built with {built})")
        self.cuda = cuda

    def states(self, cold: bool) -> tuple[str, ...]:
        """All three, whatever the case asks for."""
        return ("warm", "cold", "graph")

    def sets(self, size: int) -> int:
        """Three times what the L2 cache holds, in at most 64 sets."""
        return min(64, 3 * self.cuda.get_device_properties().L2_cache_size // size + 1)

    def prepared(self, functions: Sequence[Run], state: str, generators: Sequence[torch.Generator] = ()) -> Run:
        """The first function, run once, or the replay of what all of them launch; raises what these raise."""
        if state != "graph":
            functions[0]()
            self.cuda.synchronize()
            return functions[0]
        stream = self.cuda.Stream()
        stream.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(stream):
            for _ in range(3):
                functions[0]()
        self.cuda.current_stream().wait_stream(stream)
        graph = self.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with self.cuda.graph(graph):
            for function in functions:
                function()
        return graph.replay

    def flusher(self) -> Run:
        """Reads four times what the L2 cache holds, so that no line has to be written back in what is timed next.

        It also keeps the GPU busy until the processor has launched what is timed.
        """
        buffer = torch.zeros(self.cuda.get_device_properties().L2_cache_size, dtype=torch.int32, device=self.device)
        return buffer.sum

    def seconds(self, function: Run, times: int = 1) -> float:
        """Between two events, before the first call's kernels and after the last's."""
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def host_seconds(self, function: Run, times: int) -> float | None:
        """Of the processor for one of so many calls that wait for nothing: the least of three."""
        taken = []
        for _ in range(3):
            self.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(times):
                function()
            taken.append((time.perf_counter() - start) / times)
        self.cuda.synchronize()
        return min(taken)

    def lost(self) -> bool:
        """Whether an error, an illegal access say, has left this process without its GPU."""
        try:
            self.cuda.synchronize()
        except self.failures:
            return True
        return False

    def peak_bytes(self, function: Run) -> int:
        """Most bytes that torch's allocator held at once for one call, above what was held before it."""
        self.cuda.synchronize()
        before = self.cuda.memory_allocated()
        self.cuda.reset_peak_memory_stats()
        function()
        self.cuda.synchronize()
        return self.cuda.max_memory_allocated() - before


Device = Cpu | Cuda


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether torch's products and convolutions may round float32 to TF32 inside."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32
    matmul.allow_tf32 = allowed
    flags = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    try:
        with cudnn.flags(**flags, allow_tf32=allowed):
            yield
    finally:
        matmul.allow_tf32 = before


def with_tf32(function: Run) -> Run:
    """`function` where TF32 is allowed."""

    def allowed() -> object:
        with tf32(True):
            return function()

    return allowed


def ways(device: Device) -> dict[str, Any]:
    """The ops as layers call them, and by each backend of the device alone; keys end the names of variants."""
    found: dict[str, Any] = {"": ops}
    for backend in device.backends:
        if not bk.backends.unavailable(backend):
            with bk.backends.use(backend):
                found[f", {backend}"] = SimpleNamespace(**{name: getattr(ops, name) for name in reference.OPS})
    return found


def best(device: Device, function: Callable[[], object], seconds: float = 0.5) -> float:
    """Shortest of the calls that fit in `seconds`, after a warm-up."""
    function()
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        times.append(device.seconds(function))
    return min(times)
