"""torch.utils.flop_counter counts a step with feedback as it does back-propagation's, by formulas of our own ops."""

import math
import textwrap
from collections.abc import Callable

import fresh
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import bioplaus_kernels as bk

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(step: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as mode:
        step()
    return mode.get_total_flops()


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 5),
        nn.Tanh(),
        nn.Unflatten(1, (1, 5)),
        nn.Conv1d(1, 4, 2),
        bk.nn.LocallyConnected1d(4, 3, 2, input_size=4),
        bk.nn.LocallyConnectedTranspose1d(3, 2, 2, output_size=4),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


# Batch 7: multiplications in the forward, and that of the first layer, which has no input gradient.
FIRST = 7 * 6 * 5
FORWARD = FIRST + 7 * (4 * 4 * 2 + 3 * 3 * 4 * 2 + 3 * 3 * 2 * 2 + 8 * 3)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("rule", ["backprop", "usf", "fa", "frsf", "brsf", "kp", "fa_signed_init", "concordance"])
def test_a_whole_step(rule: str, backend: str | None) -> None:
    model, x = network(), torch.randn(7, 6)
    with bk.backends.use(backend):
        bk.convert_(model, rule, example=x)
        # Forward, weight gradients, input gradients: as many each.
        assert counted(lambda: model(x).sum().backward()) == 2 * (3 * FORWARD - FIRST)
        with torch.no_grad():
            assert counted(lambda: model(x)) == 2 * FORWARD


@pytest.mark.parametrize("size", [0, 3])
def test_a_recurrent_step(size: int) -> None:
    layer, x = bk.nn.LSTM(5, 4, proj_size=size, feedback="fa"), torch.randn(3, 2, 5, requires_grad=True)
    # Three steps of two rows: of the input, of the state, and of the projection.
    forward = 6 * (16 * 5 + 16 * (size or 4) + 4 * size)
    assert counted(lambda: layer(x)[0].sum().backward()) == 2 * 3 * forward


def test_every_product_of_a_namespace_is_counted() -> None:
    pytest.importorskip("triton")
    from bioplaus_kernels.backends.triton import feedback_mm, lc  # noqa: F401

    schemas = [str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("bioplaus")]
    products = {s.partition("(")[0] for s in schemas if any(part in s for part in ("feedback_mm", "conv", "lc_"))}
    assert len([name for name in products if name.startswith("bioplaus_triton")]) == 4
    for name in products:
        namespace, op = name.split("::")
        formula = flop_registry[getattr(getattr(torch.ops, namespace), op)]
        b, w, signs = (torch.empty(size, device="meta") for size in ((2, 3, 4), (4, 5, 2, 3), (7, 5)))
        given = {
            "feedback_mm": ((signs, None, signs, None, None, "constant", 1.0, 9), 7 * 5 * 9),
            "feedback_conv": ((b, *(None,) * 4, "", 1.0, [3, 6, 2], [5], [1], [0], [1]), 2 * 3 * 4 * 6 * 2),
            "conv_backward_weight": ((b, b, [3], [1], [0], [1]), 2 * 3 * 4 * math.prod(w.shape[1:])),
            "lc_forward": ((b, w, None, [1], [0], [1], 1), 2 * math.prod(w.shape)),
            "lc_backward_input": ((b, w, *(None,) * 3, "", 1.0, w.shape, [4], [1], [0], [1], 1), 2 * 4 * 5 * 2 * 3),
            "lc_backward_weight": ((b, b, [2], [1], [0], [1], 1), 2 * math.prod(w.shape)),
        }[op.removesuffix("_by")]
        assert formula(*given[0], out_val=w) == 2 * given[1]


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import bioplaus_kernels", "import torch.utils.flop_counter"])
def test_whichever_is_imported_first(first: str) -> None:
    code = f"""
        import sys, torch
        {first}
        import bioplaus_kernels as bk
        assert {"flop" in first} or 'torch.utils.flop_counter' not in sys.modules
        from torch.utils.flop_counter import FlopCounterMode
        layer, x = bk.nn.Linear(4, 3, feedback="usf"), torch.randn(2, 4, requires_grad=True)
        with FlopCounterMode(display=False) as mode:
            layer(x).sum().backward()
        print(mode.get_total_flops(), sum(type(f).__name__ == '_Finder' for f in sys.meta_path))
    """
    done = fresh.run(textwrap.dedent(code))
    assert done.stdout.split() == ["144", "0"], done.stderr
