"""torch.compile: one graph for every layer and rule, no second compilation, eager's gradients."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from small import FEW, LAYERS, RULES, assert_equal, build, call, gradients
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import bioplaus_kernels as bk
from bioplaus_kernels.backends import native

pytestmark = pytest.mark.usefixtures("one_thread")
# A block of a residual network, an attention block and a locally-connected one. With fewer than 8 channels oneDNN's
# weight gradient of a strided 1x1 convolution, channels-last, writes beyond its memory on AVX2 (oneDNN issue 6035).
MODELS = {
    "residual": (
        lambda: pytest.importorskip("torchvision").models.resnet.BasicBlock(
            8, 16, 2, nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16))
        ),
        (2, 8, 8, 8),
    ),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (2, 3, 8)),
    "locally-connected": (
        lambda: nn.Sequential(
            bk.nn.LocallyConnected2d(2, 3, 3, padding=1, input_size=5), nn.ReLU(), nn.Flatten(), nn.Linear(75, 4)
        ),
        (2, 2, 5, 5),
    ),
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    # torch's own switch for what is a torch.nn.LSTM, RNN or GRU.
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch._dynamo.reset()


def grid(rows: Iterable[str], columns: Iterable[str], fast: Callable[[str, str], bool]) -> list[Any]:
    """Every pair, marked slow where it is not `fast`."""
    pairs = itertools.product(rows, columns)
    return [pytest.param(*pair, marks=() if fast(*pair) else pytest.mark.slow) for pair in pairs]


# Every rule in one layer, and every family of layers with signs of W and with packed signs.
@pytest.mark.parametrize(
    ("layer", "rule"),
    grid(LAYERS, RULES, lambda n, rule: n == "Linear" or (n in FEW and rule in ("usf", "fa_signed_init"))),
)
def test_every_layer_and_rule_is_one_graph(layer: str, rule: str) -> None:
    module, x = build(layer, RULES[rule])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: call(module, x), fullgraph=True, backend=counter)
    trained = [p for p in module.parameters() if p.requires_grad]
    for _ in range(2):
        actual, expected = gradients(compiled, x, *trained), gradients(module, x)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
        # A step of an optimizer, other data: the same graph serves.
        with torch.no_grad():
            for p, grad in zip(trained, expected[1:], strict=True):
                p -= 0.1 * grad
            x.normal_()
    assert counter.frame_count == 1


def steps(model: nn.Module, run: nn.Module, x: Tensor, count: int) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for i in range(count):
        optimizer.zero_grad()
        run(x + i).square().mean().backward()
        seen += [x.grad.clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        x.grad = None
        optimizer.step()
    return seen


def check_training(model: str, rule: str, backend: str) -> None:
    make, shape = MODELS[model]
    x, results = torch.randn(shape, requires_grad=True), []
    for compiled in (False, True):
        torch.manual_seed(1)
        module = make()
        bk.convert_(module, RULES[rule])
        counter = CompileCounterWithBackend(backend)
        run = torch.compile(module, fullgraph=True, backend=counter) if compiled else module
        results.append(steps(module, run, x, 3))
    assert counter.frame_count == 1
    # brSF draws anew where a bit of W differs, so after an optimizer step rounding alone makes another B.
    count = len(results[0]) // 3 if rule == "brsf" and backend == "inductor" else None
    for a, e in zip(results[0][:count], results[1][:count], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


TRAINED = {"residual": "brsf", "transformer": "usf", "locally-connected": "fa-stored"}


@pytest.mark.parametrize(("model", "rule"), grid(MODELS, TRAINED.values(), lambda model, rule: TRAINED[model] == rule))
def test_a_model_trains_in_one_compilation(model: str, rule: str) -> None:
    check_training(model, rule, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "rule"),
    [
        ("residual", "usf"),
        ("residual", "brsf"),
        ("transformer", "frsf"),
        ("locally-connected", "fa"),
        ("residual", "fa"),
    ],
)
def test_inductor(model: str, rule: str) -> None:
    check_training(model, rule, "inductor")


@pytest.mark.parametrize(
    "rule", ["usf", "brsf", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("frsf", "fa", "fa_signed_init"))]
)
def test_dynamic_batch(rule: str) -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 3, padding="same"), nn.Flatten())
    # Proven now: the first eager forward would take hooks off, and torch.compile compile again without them.
    bk.convert_(module, RULES[rule], example=torch.randn(2, 6))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for batch in (4, 7, 3):
        x = torch.randn(batch, 6, requires_grad=True)
        trained = [p for p in module.parameters() if p.requires_grad]
        for a, e in zip(gradients(compiled, x, *trained), gradients(module, x), strict=True):
            torch.testing.assert_close(a, e)
        frames.append(counter.frame_count)
    # The first call may compile twice, to learn that a scale is constant; no later one compiles at all.
    assert frames[0] == frames[1] == frames[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_inside_the_graph(dtype: torch.dtype) -> None:
    module, x = build("Linear", "usf")

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return module(x)

    trained = [p for p in module.parameters() if p.requires_grad]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_equal(gradients(compiled, x, *trained), gradients(run, x, *trained))


def test_one_tensor_as_two_arguments() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    bilinear, cell = bk.nn.Bilinear(5, 5, 4, feedback="usf"), bk.nn.LSTMCell(5, 5, feedback="fa")
    for run in (lambda x: bilinear(x, x), lambda x: cell(x, (x, x))[0]):
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        assert_equal(*(list(torch.autograd.grad(f(x).square().sum(), x)) for f in (compiled, run)))


def test_a_compiled_layer_sees_a_changed_rule() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    x = torch.randn(4, 6, requires_grad=True)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    for rule in ("fa", "usf", None):
        bk.convert_(model, rule)
        assert_equal(gradients(compiled, x, *_trained(model)), gradients(model, x))


def test_frozen_signs_around_a_compiled_model() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    bk.convert_(model, "usf")
    x = torch.randn(4, 6, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = gradients(model, x)
    with pytest.raises(RuntimeError, match="changed in the block"), bk.frozen_signs(model):
        assert_equal(gradients(compiled, x, *_trained(model)), expected)
        with torch.no_grad():
            model[0].weight.neg_()
        torch.testing.assert_close(gradients(compiled, x, *_trained(model))[0], expected[0])
    torch.testing.assert_close(gradients(compiled, x, *_trained(model))[0], -expected[0])


def _trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.slow
@pytest.mark.skipif(native.library is None, reason="the other tests of this file ran without the native library")
def test_without_the_native_library() -> None:
    pairs = (
        "Linear-brsf",
        "Conv2d-fa",
        "ConvTranspose1d-fa_signed_init",
        "LocallyConnected2d-frsf",
        "MultiheadAttention-usf",
    )
    tests = [f"{__file__}::{test_every_layer_and_rule_is_one_graph.__name__}[{pair}]" for pair in pairs]
    program = (
        "import sys; sys.modules['bioplaus_kernels._C'] = None\n"
        "import pytest, bioplaus_kernels\n"
        "assert bioplaus_kernels.backends.native.library is None\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '--tb=line', '--show-capture=no', *{tests!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(pairs)} passed" in done.stdout, done.stdout + done.stderr
