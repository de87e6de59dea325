"""Bugs planted in feedback_mm's CUDA kernels, which cuda_host/cases_feedback_mm.py must find.

test_cuda_host.py runs that file on the kernels as they are.
"""

import re

import pytest
from cuda_host import build, run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))]
CASES = "cases_feedback_mm.py"

DIGITS, QUANTISE, TILES = "feedback_mm_digits.cu", "feedback_mm_quantise.cu", "feedback_mm.cu"
WAIT = "      cp_async_wait<kStages - 2>();\n      __syncthreads();\n"
TILE_WAIT = "    cp_async_wait<Tile::kStages - 2>();\n    __syncthreads();\n"

# what: (file, text, what takes its place, tests that find it, words of what they say)
BUGS = {
    "digits: wait for cp.async missing": (
        *(DIGITS, WAIT, "      __syncthreads();\n"),
        *("test_bits and primes and float32", "use-after-poison"),
    ),
    "digits: wait one group short": (
        *(DIGITS, "cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>"),
        *("test_bits and wraps and float32", "use-after-poison"),
    ),
    "digits: barrier after the wait missing": (
        *(DIGITS, WAIT, "      cp_async_wait<kStages - 2>();\n"),
        *("test_bits and primes and float32", "use-after-poison|[Aa]ssert"),
    ),
    "digits: barrier between passes missing": (
        *(DIGITS, "    // The next pass fills what slower warps may still read.\n    __syncthreads();\n", ""),
        *("test_width", "use-after-poison|[Aa]ssert"),
    ),
    "digits: wrong lane of the signs": (
        *(DIGITS, "bits[j][half] = t[j % 4] >> lane / 4", "bits[j][half] = t[j % 4] >> lane / 8"),
        *("test_bits and primes and float32", "[Aa]ssert"),
    ),
    "digits: wrong lane of ldmatrix": (
        *(DIGITS, "* 16 + lane % 16, k / 16 + lane / 16", "* 16 + lane % 8, k / 16 + lane / 16"),
        *("test_bits and primes and float32", "[Aa]ssert"),
    ),
    "digits: flag of zeros a tile late": (
        *(DIGITS, "    ++tile_;\n    zeros_ = flag();\n", "    zeros_ = flag();\n    ++tile_;\n"),
        *("test_bits and wraps and float32", "[Aa]ssert|use-after-poison"),
    ),
    "digits: a row too many": (
        *(DIGITS, "of < p.rows && (block", "of <= p.rows && (block"),
        *("test_bits and primes and float16", "heap-buffer-overflow"),
    ),
    "digits: column stored beyond the last": (
        *(DIGITS, "    if (col + 1 < p.cols) {\n      store(", "    if (true) {\n      store("),
        *("test_bits and primes and float32", "heap-buffer-overflow"),
    ),
    "quantise: largest entry above the digits' range": (
        *(QUANTISE, "    --shift;\n", ""),
        *("test_bits and primes and float32", "[Aa]ssert"),
    ),
    "quantise: barrier missing": (
        *(QUANTISE, "  __syncthreads();\n  for (int w", "  for (int w"),
        *("test_bits and primes and float32", "[Aa]ssert|runtime error"),
    ),
    "quantise: rows of dY by 32 bits": (
        *(QUANTISE, "+ i * p.row_stride", "+ static_cast<int>(i * p.row_stride)"),
        *("test_offsets and float32", "SEGV|heap-buffer|[Aa]ssert"),
    ),
    "tiles: wait for cp.async missing": (
        *(TILES, TILE_WAIT, "    __syncthreads();\n"),
        *("test_tiles and whole and float16", "use-after-poison"),
    ),
    "tiles: barrier after the wait missing": (
        *(TILES, TILE_WAIT, "    cp_async_wait<Tile::kStages - 2>();\n"),
        *("test_tiles and wraps and float16", "use-after-poison|[Aa]ssert"),
    ),
    "tiles: wrong lane of ldmatrix.trans": (
        *(
            TILES,
            "entry_place(k + lane % 16, warp_col / 8 + j + lane / 16)",
            "entry_place(k + lane % 16, warp_col / 8 + j)",
        ),
        *("test_tiles and wraps and bfloat16", "[Aa]ssert"),
    ),
    "tiles: float barrier missing": (
        *(TILES, "    __syncthreads();\n    float* after", "    float* after"),
        *("test_tiles and wraps and float32", "[Aa]ssert"),
    ),
    "tiles: last entries of a row of dY dropped": (
        *(TILES, "row < p.rows && k + t < p.b.rows", "row < p.rows && k + N <= p.b.rows"),
        *("test_tiles and wraps and float32", "[Aa]ssert"),
    ),
    "tiles: rows of dY by 32 bits": (
        *(TILES, "+ row * p.row_stride + k * p.column_stride", "+ static_cast<int>(row * p.row_stride) + k"),
        *("test_offsets and float32", "SEGV|heap-buffer|[Aa]ssert"),
    ),
    "tiles: copied rows of dY by 32 bits": (
        *(TILES, "+ (first + row) * p.row_stride + at", "+ static_cast<int>((first + row) * p.row_stride) + at"),
        *("test_offsets and float16", "SEGV|heap-buffer|[Aa]ssert"),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_found(bug: str) -> None:
    *patch, which, words = BUGS[bug]
    done = run(CASES, build.library([tuple(patch)]), "-k", which)
    assert done.returncode not in (0, 2, 4, 5), done.stdout[-4000:]
    assert re.search(words, done.stdout), done.stdout[-4000:]


# Without parts of K, sums of 4096 products are one.
ONE_PART = (TILES, "  return most <= 1 || wanted <= 1 ? 1 : wanted < most ? wanted : most;", "  return 1;")


@pytest.mark.parametrize("promotes", [True, False])
def test_second_sum(promotes: bool) -> None:
    """What truncating tensor cores lose in a long sum stays within the bound by the second sum, and only by it."""
    patches = [ONE_PART] if promotes else [ONE_PART, (TILES, "kPromote = 64", "kPromote = 1 << 30")]
    done = run(CASES, build.library(patches), "-k", "test_small_terms and truncating and float16")
    assert (done.returncode == 0) == promotes, done.stdout[-4000:]
    assert promotes or re.search("[Aa]ssert", done.stdout), done.stdout[-4000:]


def test_constant_entries_in_tiles() -> None:
    """Beyond 2²⁰ along K constant entries take the way of the others; here they do from the start."""
    done = run(
        CASES, build.library([("feedback_mm.cpp", "size[0] <= kMaxDepth", "size[0] <= 0")]), "-k", "test_every_cell"
    )
    assert done.returncode == 0, done.stdout[-4000:]
