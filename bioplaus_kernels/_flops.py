"""What torch.utils.flop_counter counts for our ops: two operations a multiplication, as for torch's own products.

That module imports Triton, which takes as long as all the rest here: what it is told waits until someone imports it.
Signs, draws and B itself count nothing, as torch counts what is done element by element.
"""

import importlib.util
import math
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def _feedback_mm(grad_output: Shape, *feedback: Any, **_: Any) -> int:
    return 2 * math.prod(grad_output) * feedback[6]


def _feedback_conv(grad_output: Shape, *rest: Any, **_: Any) -> int:
    return 2 * math.prod(grad_output) * math.prod(rest[6][1:])


def _conv_backward_weight(grad_output: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * math.prod(grad_output) * math.prod(out_shape[1:])


def _recurrent_forward(input: Shape, hidden: Shape, *rest: Any, **_: Any) -> int:
    projection: Shape | None = rest[3]
    return 2 * math.prod(input) * hidden[1] + (
        0 if projection is None else 2 * math.prod(input[:-1]) * math.prod(projection)
    )


def _recurrent_backward(grad_output: Shape, *rest: Any, out_shape: Any, **_: Any) -> int:
    # B and the weight's gradient on the gates, then both of the projection.
    feedback, projection, wanted = rest[7], rest[8], rest[12]
    rows, made = math.prod(grad_output[:-1]), math.prod(out_shape[0])
    gates = 2 * made * grad_output[-1] * ((feedback is not None) + wanted[0])
    return gates + (0 if projection is None else 2 * rows * math.prod(projection) * (1 + wanted[2]))


def _lc_forward(input: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * input[0] * math.prod(weight)


def _lc_backward_input(grad_output: Shape, *rest: Any, **_: Any) -> int:
    return 2 * grad_output[0] * math.prod(rest[6])


def _lc_backward_weight(grad_output: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * grad_output[0] * math.prod(out_shape)


FORMULAS = {
    "feedback_mm": _feedback_mm,
    "feedback_mm_by": _feedback_mm,
    "feedback_conv": _feedback_conv,
    "feedback_conv_by": _feedback_conv,
    "conv_backward_weight": _conv_backward_weight,
    "recurrent_forward": _recurrent_forward,
    "recurrent_backward": _recurrent_backward,
    "lc_forward": _lc_forward,
    "lc_backward_input": _lc_backward_input,
    "lc_backward_weight": _lc_backward_weight,
}
_ops: list[tuple[Any, Any]] = []


def count(namespace: str, name: str) -> None:
    """Let torch count `torch.ops.<namespace>.<name>`."""
    _ops.append((getattr(getattr(torch.ops, namespace), name), FORMULAS[name]))
    if _COUNTER in sys.modules:
        _tell(sys.modules[_COUNTER])


def _tell(counter: ModuleType) -> None:
    for op, formula in _ops:
        if op not in counter.flop_registry:
            counter.register_flop_formula(op)(formula)


class _Finder:
    # For one import, of that module.
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _tell(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Finder())
