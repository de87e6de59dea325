"""What every test gets: a fixed seed, full precision, and memory from torch.empty that is not zero by luck."""

import os
from collections.abc import Iterator

import pytest
import torch

# Where there is no GPU Triton's kernels run in its interpreter, which it must hear of before it is first imported. That
# of Triton 3.6 does not go with numpy 2.5, and torch 2.11 wraps no interpreted kernel.
if not torch.cuda.is_available() and torch.__version__ >= (2, 12):
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "exhaustive: compiles every configuration of every GPU kernel")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """Seed 0, and no TF32."""
    torch.manual_seed(0)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    # torch.testing forbids setting this flag but by its context manager.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN (integers: their largest value), so a result that reads what nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # Filling happens in deterministic mode only; warn_only keeps ops without such a variant usable.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of many tiny products, where a second thread that has to be waited for only costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
