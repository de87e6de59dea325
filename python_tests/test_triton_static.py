"""The Triton kernels compiled ahead of time for sm_80, sm_90, sm_100 and gfx942, and what the machine code must show.

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
import torch

pytest.importorskip("triton")
from bench import gpu_static
from bench.gpu_static import Row

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, sys
from dataclasses import asdict
from bench import gpu_static_triton as t
print(json.dumps([(asdict(row), variant.product) for variant, row in t.rows(sys.argv[1] == "every")]))
"""


def outcome(program: str, *arguments: str) -> Any:
    """What `program` prints last, in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def compile_all(what: str) -> list[tuple[Row, bool]]:
    return [(Row(**row), product) for row, product in outcome(PROGRAM, what)]


def check(rows: list[tuple[Row, bool]], every: bool = False) -> None:
    assert rows
    committed = gpu_static.read()
    # The table has what `make test` compiles.
    known = {row.name for row in committed}
    wrong = gpu_static.worse((row for row, *_ in rows if not every or row.name in known), committed)
    for row, product in rows:
        if row.spill_bytes > 0:
            wrong.append(f"{' '.join(row.name)}: {row.spill_bytes} bytes spilled")
        if product and row.tensor_core_instructions == 0:
            wrong.append(f"{' '.join(row.name)}: no tensor-core instruction")
        if not row.kernel.startswith(("quantise", "add_")) and row.loop_products == 0:
            wrong.append(f"{' '.join(row.name)}: no loop with products")
        # Weights and dY move 16 bytes at a time; bits, draws and digits of few rows need not.
        if row.vector_global_loads == 0 and any(name in row.kernel for name in ("quantise", "product_kernel weight")):
            wrong.append(f"{' '.join(row.name)}: no 128-bit load")
        if row.target != "gfx942" and row.occupancy_blocks < 1:
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
    good = Row("s.py", "product_kernel weight", "sm_80", "triton 1.2", 100, 0, 0, 1024, 128, 4, 0, 8, 2, 40, 8)
    gpu_static.write([good], tmp_path / "t.csv")
    table = gpu_static.read(tmp_path / "t.csv")
    monkeypatch.setattr(gpu_static, "read", lambda: table)
    check([(good, True)])
    for change, text in (
        ({"registers": 101}, "registers 100 -> 101"),
        ({"spill_bytes": 8}, "8 bytes spilled"),
        ({"tensor_core_instructions": 0}, "no tensor-core instruction"),
        ({"loop_products": 0}, "no loop with products"),
        ({"vector_global_loads": 0}, "no 128-bit load"),
        ({"occupancy_blocks": 0}, "does not fit"),
    ):
        with pytest.raises(AssertionError, match=text):
            check([(replace(good, **change), True)])


def test_a_bound_on_registers_reaches_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a tuning with one configuration; kernels without a bound are launched as they are."""
    from bioplaus_kernels.backends.triton import configs, lc

    bounded, free = configs.Tile(16, 64, 32, 4, 3, 168), configs.Tile(32, 64, 32, 8, 2)
    monkeypatch.setitem(configs.TABLES["sm_80"], "made_up", (bounded, free))
    monkeypatch.setattr(configs, "_autotune", False)
    x = torch.empty(0)
    (config,) = configs.tunable(lc.forward_kernel, "made_up", x, 16, ("N",)).configs
    assert config.all_kwargs() == {"BM": 16, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3, "maxnreg": 168} | {
        k: v for k, v in config.all_kwargs().items() if k == "num_ctas"
    }
    assert configs.tile_for("made_up", x, 16) == {}
    assert configs.tunable(lc.forward_kernel, "made_up", x, 17, ("N",)) is lc.forward_kernel
    assert configs.tile_for("made_up", x, 17) == {"BM": 32, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 2}


TRACED = """
import json
import torch
from functorch.compile import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode
from bioplaus_kernels.backends.triton import configs, feedback_mm, lc

configs.architecture = lambda device: "sm_80"
ops, launches = torch.ops.bioplaus_triton, {}

def count(graph, inputs):
    targets = [str(node.target) for node in graph.graph.nodes]
    launches[name] = sum(t.startswith("triton_kernel_wrapper") for t in targets)
    assert not any("bioplaus" in t for t in targets)
    return graph

with FakeTensorMode():
    gpu = lambda *size, dtype=torch.bfloat16: torch.empty(size, device="cuda", dtype=dtype)
    key = gpu(3, dtype=torch.int64)
    signs = lambda g, w: ops.feedback_mm(g, w, None, None, None, "constant", 0.5, w.shape[1])
    drawn = lambda g, key: ops.feedback_mm(g, None, None, None, key, "uniform", 0.5, 512)
    x, w, g, rest = gpu(4, 8, 6, 6), gpu(6, 6, 16, 3, 3, 8), gpu(4, 16, 6, 6), ([1, 1], [1, 1, 1, 1], [1, 1], 1)
    for name, f, *inputs in (
        ("float32 signs", signs, gpu(4096, 512, dtype=torch.float32), gpu(512, 4096, dtype=torch.float32)),
        ("float32 signs in parts", signs, gpu(8, 4096, dtype=torch.float32), gpu(4096, 512, dtype=torch.float32)),
        ("bfloat16 signs", signs, gpu(4096, 512), gpu(512, 4096)),
        ("bfloat16 signs in parts", signs, gpu(8, 4096), gpu(4096, 512)),
        ("drawn", drawn, gpu(4096, 4096), key),
        ("drawn in parts", drawn, gpu(8, 4096), key),
        ("lc_forward", lambda x, w: ops.lc_forward(x, w, None, *rest), x, w),
        ("lc_backward_weight", lambda g, x: ops.lc_backward_weight(g, x, [3, 3], *rest), g, x),
        ("lc_backward_input", lambda g, w: ops.lc_backward_input(
            g, w, None, None, None, "constant", 0.5, w.shape, [6, 6], *rest), g, w),
    ):
        aot_function(f, fw_compiler=count)(*inputs)
print(json.dumps(launches))
"""


def test_compilers_see_every_launch() -> None:
    """torch.compile gets the kernels themselves, those of a second pass too, and no op that it cannot look into."""
    assert outcome(TRACED) == {
        "float32 signs": 2,  # digits, product
        "float32 signs in parts": 3,
        "bfloat16 signs": 3,  # and a product of four digits for the rows that need them
        "bfloat16 signs in parts": 4,
        "drawn": 1,
        "drawn in parts": 2,
        "lc_forward": 1,
        "lc_backward_weight": 1,
        "lc_backward_input": 1,
    }


def test_occupancy() -> None:
    # 65536 registers: 128 threads of 255 registers (256 with rounding) take 32768, and two blocks fit.
    assert gpu_static.occupancy("sm_80", 255, 128, 0) == 2
    assert gpu_static.occupancy("sm_80", 32, 128, 80 * 1024) == 2
    assert gpu_static.occupancy("sm_80", 32, 1024, 0) == 2
    assert gpu_static.occupancy("sm_90", 128, 128, 200 * 1024) == 1
