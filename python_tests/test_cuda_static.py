"""The CUDA kernels as nvcc compiles them: no spills, the occupancy they claim, tensor cores, 16-byte loads, and no
figure worse than that in bench/gpu_static.csv of the same compiler."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from bench import gpu_static, gpu_static_cuda
from bench.gpu_static import Row

needs_nvcc = pytest.mark.skipif(
    gpu_static_cuda.tools() is None, reason="nvcc, ptxas, c++filt or Triton's nvdisasm is not here"
)
# Kernels that move 16 bytes at once where rows allow it, and how many such loads they have at least: pack_signs eight,
# all of which are under way before any is looked at.
WIDE_LOADS = {"feedback_weight|quantise|multiply|lc_kernel<\\w+, (forward|input)": 1, "pack_signs": 8}


def check(rows: list[Row], table: Path = gpu_static.TABLE, every: bool = False) -> None:
    committed = gpu_static.read(table)
    # The table has what `make test` compiles.
    known = {row.name for row in committed}
    wrong = gpu_static.worse((row for row in rows if not every or row.name in known), committed)
    assert rows
    for row in rows:
        name = " ".join(row.name)
        if row.spill_bytes > 0:
            wrong.append(f"{name}: {row.spill_bytes} bytes spilled")
        # What is claimed is for processors of servers, which have more shared memory.
        if row.occupancy_blocks < (1 if row.target == "sm_120" else max(row.claimed_blocks, 1)):
            wrong.append(f"{name}: {row.occupancy_blocks} blocks fit on a processor, {row.claimed_blocks} claimed")
        products = [p for kernels, p in gpu_static_cuda.PRODUCTS.items() if re.match(kernels, row.kernel)]
        if gpu_static_cuda.TENSOR_CORE in products and row.tensor_core_instructions == 0:
            wrong.append(f"{name}: no tensor-core instruction")
        if products and row.loop_products == 0:
            wrong.append(f"{name}: no loop with products")
        least = next((n for kernels, n in WIDE_LOADS.items() if re.match(kernels, row.kernel)), 0)
        if row.vector_global_loads < least:
            wrong.append(f"{name}: {row.vector_global_loads} 128-bit loads, {least} wanted")
    assert not wrong, "\n".join(wrong)


@needs_nvcc
@pytest.mark.slow
def test_kernels() -> None:
    """All for sm_80, one of those that differ in the dtype alone for sm_90 and sm_100."""
    rows = gpu_static_cuda.rows()
    check(rows)
    files = {(row.source, row.target) for row in rows}
    assert files == {(f"csrc/cuda/{s.name}", t) for s in gpu_static_cuda.sources() for t in gpu_static_cuda.TARGETS}


@needs_nvcc
@pytest.mark.exhaustive
def test_every_kernel() -> None:
    check(gpu_static_cuda.rows(every=True), every=True)


GOOD = Row("csrc/cuda/a.cu", "multiply_kernel<4>", "sm_80", "nvcc 1", 40, 0, 1024, 0, 128, 4, 4, 8, 2, 90, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registers": 41}, "registers 40 -> 41"),
        ({"spill_bytes": 4}, "4 bytes spilled"),
        ({"static_shared": 1040}, "static_shared 1024 -> 1040"),
        ({"dynamic_shared": 16}, "dynamic_shared 0 -> 16"),
        ({"occupancy_blocks": 3}, "3 blocks fit on a processor, 4 claimed"),
        ({"tensor_core_instructions": 0}, "no tensor-core instruction"),
        ({"vector_global_loads": 0}, "0 128-bit loads, 1 wanted"),
        ({"loop_instructions": 91}, "instructions a product 90 / 8 -> 91 / 8"),
        ({"loop_products": 0}, "no loop with products"),
        ({"kernel": "another"}, "not in the table"),
    ],
)
def test_a_worse_row_fails(tmp_path: Path, change: dict[str, int | str], message: str) -> None:
    """By the same function as the real rows, against a table made up here."""
    table = tmp_path / "t.csv"
    gpu_static.write([GOOD], table)
    check([GOOD], table)
    check([replace(GOOD, registers=39, loop_instructions=180, loop_products=16)], table)
    with pytest.raises(AssertionError, match=message):
        check([replace(GOOD, **change)], table)


def test_other_compilers_are_not_compared(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    gpu_static.write([GOOD], table)
    check([replace(GOOD, toolchain="nvcc 2", registers=99)], table)


def test_names() -> None:
    mangled = "_ZN8bioplaus12_GLOBAL__N_19lc_kernelI13__nv_bfloat16LNS0_7ProductE1ELi64EEEvNS_8LcParamsEl"
    assert gpu_static_cuda.readable([mangled]) == {mangled: "lc_kernel<bfloat16, input, 64>"}
    names = {"a": "k<float, 8>", "b": "k<bfloat16, 8>", "c": "k<half, 8>", "d": "k<half, 64>", "e": "plain"}
    assert gpu_static_cuda.one_of_each(names) == ["b", "e", "d"]


def test_the_hot_loop() -> None:
    """The innermost loop with products, of two such the one with the larger share."""
    code = """
.L_x_0:
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/              @!P0 BRA `(.L_x_2) ;
        /*0020*/                   IMMA.16832.S8.S8 R4, R4, R6, R8 ;
.L_x_2:
        /*0030*/               @P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0040*/                   LDG.E.128 R4, [R2.64] ;
        /*0050*/                   IMMA.16832.S8.S8 R4, R4, R6, R8 ;
        /*0060*/                   IMMA.16832.S8.S8 R4, R4, R6, R8 ;
        /*0070*/               @P1 BRA `(.L_x_3) ;
        /*0080*/               @P2 BRA `(.L_x_0) ;
.L_x_4:
        /*0090*/                   BRA `(.L_x_4) ;
"""
    assert gpu_static.hot_loop(code, gpu_static_cuda.TENSOR_CORE) == (4, 2)
    assert gpu_static.hot_loop(code, r"\bFFMA\b") == (0, 0)
    assert gpu_static.hot_loop("\n.LBB0_1:\n\tv_mfma_f32 v0\n\ts_cbranch_scc1 .LBB0_1\n", r"\bv_mfma") == (2, 1)


def test_report_is_of_this_table() -> None:
    pytest.importorskip("triton")
    from bench import gpu_report

    assert gpu_report.text() == gpu_report.REPORT.read_text(), "run python -m bench gpu-report"
