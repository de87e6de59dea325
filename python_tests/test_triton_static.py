"""The Triton kernels compiled ahead of time for every target, and what the machine code must show.

Compiled in a process of its own, as this one has the interpreter.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from bench import gpu_static
from bench.gpu_static import Row

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, sys
from dataclasses import asdict
from bench import gpu_static_triton as t
rows = t.rows(sys.argv[1] == "every")
print(json.dumps([
    (asdict(row), variant.product, variant.tensor_cores(row.target), t.SHARED[row.target]) for variant, row in rows
]))
"""


def outcome(program: str, *arguments: str) -> Any:
    """What `program` prints last, in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def compile_all(what: str) -> list[tuple[Row, bool, bool, int]]:
    return [(Row(**row), *rest) for row, *rest in outcome(PROGRAM, what)]


def check(rows: list[tuple[Row, bool, bool, int]], every: bool = False) -> None:
    assert rows
    committed = gpu_static.read()
    # The table has what `make test` compiles.
    known = {row.name for row in committed}
    wrong = gpu_static.worse((row for row, *_ in rows if not every or row.name in known), committed)
    for row, product, tensor_cores, shared in rows:
        if row.static_shared + row.dynamic_shared > shared:
            wrong.append(f"{' '.join(row.name)}: {row.dynamic_shared} bytes of shared memory, of {shared}")
        if row.spill_bytes > 0:
            wrong.append(f"{' '.join(row.name)}: {row.spill_bytes} bytes spilled")
        if tensor_cores and row.tensor_core_instructions == 0:
            wrong.append(f"{' '.join(row.name)}: no tensor-core instruction")
        if product and row.loop_products == 0:
            wrong.append(f"{' '.join(row.name)}: no loop with products")
        # Weights and dY move 16 bytes at a time; bits and draws need not.
        if row.vector_global_loads == 0 and "sign_kernel weight" in row.kernel:
            wrong.append(f"{' '.join(row.name)}: no 128-bit load")
        if not row.target.startswith("gfx") and row.occupancy_blocks < 1:
            wrong.append(f"{' '.join(row.name)}: does not fit on a processor")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_compiled_kernels() -> None:
    check(compile_all("few"))


@pytest.mark.exhaustive
def test_every_compiled_kernel() -> None:
    check(compile_all("every"), every=True)


def test_worse_is_seen() -> None:
    row = Row("s.py", "kernel", "sm_80", "triton 1.2", 100, 0, 0, 1024, 128, 4, 0, 8, 2, 40, 8)
    assert gpu_static.worse([row, replace(row, registers=90)], [row]) == []
    for change, text in (
        ({"registers": 101}, "registers 100 -> 101"),
        ({"spill_bytes": 8}, "spill_bytes 0 -> 8"),
        ({"dynamic_shared": 2048}, "dynamic_shared 1024 -> 2048"),
        ({"tensor_core_instructions": 0}, "tensor_core_instructions 8 -> 0"),
        ({"vector_global_loads": 0}, "vector_global_loads 2 -> 0"),
        ({"loop_instructions": 41}, "instructions a product 40 / 8 -> 41 / 8"),
        ({"kernel": "other"}, "not in the table"),
    ):
        assert len(found := gpu_static.worse([replace(row, **change)], [row])) == 1 and text in found[0]
    # Another toolchain is another table.
    assert gpu_static.worse([replace(row, toolchain="triton 1.3", registers=200)], [row]) == []


def test_the_table_keeps_rows_of_other_toolchains(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    ours = Row("s.py", "kernel", "sm_80", "triton 1.2", 100, 0, 0, 1024, 128, 4, 0, 8, 2, 40, 8)
    theirs = replace(ours, toolchain="nvcc 13.0")
    gpu_static.write([theirs], path)
    gpu_static.write([ours], path)
    gpu_static.write([replace(ours, registers=90)], path)
    assert gpu_static.read(path) == [theirs, replace(ours, registers=90)]


def test_a_worse_row_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the check of the real rows, against a table made up here."""
    good = Row("s.py", "sign_kernel weight", "sm_80", "triton 1.2", 100, 0, 0, 1024, 128, 4, 0, 8, 2, 40, 8)
    gpu_static.write([good], tmp_path / "t.csv")
    table = gpu_static.read(tmp_path / "t.csv")
    monkeypatch.setattr(gpu_static, "read", lambda: table)
    check([(good, True, True, 1024)])
    for change, text in (
        ({"registers": 101}, "registers 100 -> 101"),
        ({"spill_bytes": 8}, "8 bytes spilled"),
        ({"tensor_core_instructions": 0}, "no tensor-core instruction"),
        ({"loop_products": 0}, "no loop with products"),
        ({"vector_global_loads": 0}, "no 128-bit load"),
        ({"occupancy_blocks": 0}, "does not fit"),
        ({"static_shared": 1}, "of shared memory, of 1024"),
    ):
        with pytest.raises(AssertionError, match=text):
            check([(replace(good, **change), True, True, 1024)])


TRACED = """
import json
import torch
from functorch.compile import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode
from bioplaus_kernels.backends.triton import feedback_mm, lc

for module in (feedback_mm, lc):
    module.device_limits = lambda device: ((9, 0), 232_448)
launches = {}

def count(graph, inputs):
    targets = [str(node.target) for node in graph.graph.nodes]
    launches[name] = sum(t.startswith("triton_kernel_wrapper") for t in targets)
    assert not any("bioplaus" in t for t in targets)
    return graph

with FakeTensorMode():
    gpu = lambda *size, dtype=torch.bfloat16: torch.empty(size, device="cuda", dtype=dtype)
    signs = lambda g, w: feedback_mm.feedback_mm(g, w, None, None, None, "constant", 0.5, w.shape[1])
    x, w, g, rest = gpu(4, 8, 6, 6), gpu(6, 6, 16, 3, 3, 8), gpu(4, 16, 6, 6), ([1, 1], [1, 1, 1, 1], [1, 1], 1)
    for name, f, *inputs in (
        ("float32", signs, gpu(4096, 512, dtype=torch.float32), gpu(512, 4096, dtype=torch.float32)),
        ("signs", signs, gpu(4096, 512), gpu(512, 4096)),
        ("signs in parts", signs, gpu(8, 4096), gpu(4096, 512)),
        ("lc_forward", lambda x, w: lc.lc_forward(x, w, None, *rest), x, w),
        ("lc_backward_weight", lambda g, x: lc.lc_backward_weight(g, x, [3, 3], *rest), g, x),
        ("lc_backward_input", lambda g, w: lc.lc_backward_input(
            g, w, None, None, None, "constant", 0.5, w.shape, [6, 6], *rest), g, w),
    ):
        aot_function(f, fw_compiler=count)(*inputs)
from torch._library.triton import get_triton_kernels_for_op
kernels = {str(op): [k.fn.__name__ for k in get_triton_kernels_for_op(op)] for op in (
    "bioplaus_triton::feedback_mm", "bioplaus_triton::lc_forward", "bioplaus_triton::lc_backward_input",
    "bioplaus_triton::lc_backward_weight")}
print(json.dumps([launches, kernels]))
"""


@pytest.mark.slow
def test_compilers_see_every_launch() -> None:
    """torch.compile gets the kernels themselves, those of a second pass too, and no op that it cannot look into.

    It finds them in the ops' source too, by which it knows whether what it has in its cache is still right.
    """
    launches, kernels = outcome(TRACED)
    assert launches == {
        "float32": 1,
        "signs": 1,
        "signs in parts": 2,
        "lc_forward": 1,
        "lc_backward_weight": 1,
        "lc_backward_input": 1,
    }
    assert sorted(kernels.pop("bioplaus_triton::feedback_mm")) == ["add_kernel", "sign_kernel"]
    assert kernels == {
        f"bioplaus_triton::lc_{x}": [f"{x}_kernel"] for x in ("forward", "backward_input", "backward_weight")
    }


def test_occupancy() -> None:
    # 65536 registers: 128 threads of 255 registers (256 with rounding) take 32768, and two blocks fit.
    assert gpu_static.occupancy("sm_80", 255, 128, 0) == 2
    assert gpu_static.occupancy("sm_80", 32, 128, 80 * 1024) == 2
    assert gpu_static.occupancy("sm_80", 32, 1024, 0) == 2
    assert gpu_static.occupancy("sm_90", 128, 128, 200 * 1024) == 1
