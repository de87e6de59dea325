"""The CUDA kernels and their host side, executed on the CPU: cuda_host/__init__.py says how.

Each `cuda_host/cases_*.py` runs in one process. Then bugs are planted in the kernels, and those tests must find them.
"""

import re

import pytest
from cuda_host import HERE, build, run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))]


@pytest.mark.parametrize("cases", sorted(path.name for path in HERE.glob("cases_*.py")))
def test_cases(cases: str) -> None:
    done = run(cases, build.library())
    assert done.returncode == 0, done.stdout[-8000:]


# what: ((file, text, what takes its place), ..., tests that find it, words of what they say)
BUGS = {
    "barrier removed before reading": (
        ("pack_signs.cu", "  __syncthreads();\n  for (int at", "  for (int at"),
        ("cases_elementwise.py", "test_signs and several"),
        "[Aa]ssert",
    ),
    "barrier removed before the flags": (
        ("pack_signs.cu", "  __syncthreads();\n  if (threadIdx.x", "  if (threadIdx.x"),
        ("cases_elementwise.py", "test_signs and whole"),
        "[Aa]ssert",
    ),
    "barrier removed from a single tile": (
        ("redraw_key.cu", "  __syncthreads();\n", ""),
        ("cases_elementwise.py", "test_redraw_key and convolution"),
        "[Aa]ssert",
    ),
    "a piece beyond the last word": (
        ("redraw_key.cu", "p.size[0] % each == 0", "p.size[0] > 0"),
        ("cases_elementwise.py", "test_redraw_key and below"),
        "heap-buffer-overflow",
    ),
    "a warp's sum left out": (
        ("redraw_key.cu", "warp < kThreads / 32", "warp < kThreads / 32 - 1"),
        ("cases_elementwise.py", "test_redraw_key and convolution"),
        "[Aa]ssert",
    ),
    "early exit before a barrier": (
        (
            "pack_signs.cu",
            "  __syncthreads();\n  if (threadIdx.x",
            "  if (first_row == 56) return;\n  __syncthreads();\n  if (threadIdx.x",
        ),
        ("cases_elementwise.py", "test_signs and convolution"),
        "threads have left the kernel before it",
    ),
    "lane missing from a collective": (
        ("pack_signs.cu", "bits |= __shfl", "bits |= lane == 3 ? 0 : __shfl"),
        ("cases_elementwise.py", "test_signs and convolution"),
        "__shfl_xor_sync",
    ),
    "mask without its own lane": (
        ("pack_signs.cu", "__shfl_xor_sync(0xFFFFFFFFu", "__shfl_xor_sync(0x7FFFFFFFu"),
        ("cases_elementwise.py", "test_signs and convolution"),
        "lane 31 is not in its own mask",
    ),
    "lanes of a warp not met": (
        ("pack_signs.cu", "  __syncwarp();\n", ""),
        ("cases_elementwise.py", "test_signs and transposed"),
        "[Aa]ssert",
    ),
    "entries read before they have come": (
        ("pack_signs.cu", "  cp_async_wait<0>();\n", ""),
        ("cases_elementwise.py", "test_signs and whole"),
        "use-after-poison",
    ),
    "rows beyond the last copied": (
        ("pack_signs.cu", "inside ? row + col : p.weight.data, inside)", "row + col, true)"),
        ("cases_elementwise.py", "test_signs and whole"),
        "heap-buffer-overflow",
    ),
    "bound off by one": (
        (
            "pack_signs.cu",
            "32 * first_word + at;\n      const bool inside = first + r < p.rows && col < p.cols",
            "32 * first_word + at;\n      const bool inside = first + r < p.rows && col <= p.cols",
        ),
        ("cases_elementwise.py", "test_signs and below"),
        "heap-buffer-overflow",
    ),
    "ragged chunk stored whole": (
        ("feedback_weight.cu", "end - c.first < kColumns ? end - c.first : kColumns", "kColumns"),
        ("cases_elementwise.py", "test_feedback_weight and convolution"),
        "AddressSanitizer: unknown-crash",
    ),
    "vector load from an odd address": (
        ("feedback_weight.cu", "wide(c, p.out, row + at)", "c.n == kColumns && p.out.dense"),
        ("cases_elementwise.py", "test_feedback_weight and beyond"),
        "misaligned address",
    ),
    "rows of 32 bits": (
        ("pack_signs.cu", "row[r * p.weight.row_stride", "row[static_cast<int>(r * p.weight.row_stride)"),
        ("cases_elementwise.py", "test_offsets"),
        "SEGV|heap-buffer|[Aa]ssert",
    ),
    "wait for cp.async missing": (
        ("twins.cu", "    cp_async_wait<kStages - 2>();\n", ""),
        ("cases_twins.py", "test_pipeline"),
        "use-after-poison",
    ),
    "wait for cp.async one group short": (
        ("twins.cu", "cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>"),
        ("cases_twins.py", "test_pipeline"),
        "use-after-poison",
    ),
    "barrier after cp.async's wait missing": (
        ("twins.cu", "    __syncthreads();\n    sum +=", "    sum +="),
        ("cases_twins.py", "test_pipeline"),
        "use-after-poison|[Aa]ssert",
    ),
    "ragged cp.async reads on": (
        ("twins.cu", "in + i, i < count)", "in + i, true)"),
        ("cases_twins.py", "test_pipeline"),
        "heap-buffer-overflow",
    ),
    "one stage too few": (
        ("twins.cu", "    fetch(t + kStages - 1);", "    fetch(t + kStages);"),
        ("cases_twins.py", "test_pipeline"),
        "use-after-poison|[Aa]ssert",
    ),
    "barrier removed before a tile is multiplied": (
        ("lc.cu", "        __syncthreads();\n        sums.add", "        sums.add"),
        ("cases_lc.py", "test_sizes and channels and bfloat16 and cut"),
        "use-after-poison|[Aa]ssert",
    ),
    "wrong lane of a fragment": (
        ("lc.cu", "row + lane % 16, high, x", "row + lane % 16, k + lane / 8 % 2 * 8, x"),
        ("cases_lc.py", "test_geometries and wide_channels and bfloat16 and cut"),
        "[Aa]ssert",
    ),
    "activations by 32 bits": (
        (
            "lc.cu",
            "data[line[l] + depth[k]] :",
            "data[static_cast<int>(line[l] + depth[k])] :",
        ),
        ("cases_lc.py", "test_offsets and entries"),
        "SEGV|heap-buffer|[Aa]ssert",
    ),
    "pieces of activations by 32 bits": (
        ("lc.cu", "inside ? line[l] + depth[k] : 0", "inside ? static_cast<int>(line[l] + depth[k]) : 0"),
        ("cases_lc.py", "test_offsets and pieces"),
        "SEGV|heap-buffer|[Aa]ssert",
    ),
    "stage multiplied before it has come": (
        ("lc.cu", "cp_async_wait<1>", "cp_async_wait<2>"),
        ("cases_lc.py", "test_sizes and channels and float32"),
        "use-after-poison",
    ),
    "stage overwritten while it is multiplied": (
        ("lc.cu", "      __syncthreads();\n      if (next", "      if (next"),
        ("cases_lc.py", "test_sizes and channels and float32"),
        "use-after-poison|[Aa]ssert",
    ),
    "columns transposed twice": (
        ("lc.cu", "ldmatrix_x4_trans(x", "ldmatrix_x4(x"),
        ("cases_lc.py", "test_sizes and channels and bfloat16 and cut"),
        "[Aa]ssert",
    ),
    "no place read as one": (
        ("lc.cu", "(line[l] | depth[k]) >= 0 ?", "line[l] >= 0 ?"),
        ("cases_lc.py", "test_geometries and asymmetric"),
        "heap-buffer-overflow|[Aa]ssert",
    ),
    "padding read as input": (
        ("lc.cu", "at[d] < g.in[d]", "at[d] <= g.in[d]"),
        ("cases_lc.py", "test_geometries and asymmetric"),
        "heap-buffer-overflow|[Aa]ssert",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_found(bug: str) -> None:
    *patches, (cases, which), words = BUGS[bug]
    done = run(cases, build.library(patches), "-k", which)
    assert done.returncode not in (0, 2, 4, 5), done.stdout[-4000:]
    assert re.search(words, done.stdout), done.stdout[-4000:]


def test_grids_smaller_than_the_work() -> None:
    """A grid is bounded, and loops in the kernel take the rest; here it is bounded to a few blocks."""
    patches = [
        ("feedback_weight.cu", "kMaxBlocks = 1 << 16", "kMaxBlocks = 3"),
        ("redraw_key.cu", "kMaxBlocks = 2048", "kMaxBlocks = 2"),
    ]
    done = run("cases_elementwise.py", build.library(patches), "-k", "beyond_a or several or transposed")
    assert done.returncode == 0, done.stdout[-4000:]
