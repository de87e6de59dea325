"""feedback_mm's CUDA kernels and host side with small bounds of memory, and with bugs planted, which the tests in
cuda_host/ must find.

test_cuda_host.py runs cuda_host/cases_feedback_mm.py on the kernels as they are.
"""

import re

import pytest
from cuda_host import build, run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))]
CASES, BOUNDED = "cases_feedback_mm.py", "bounded_feedback_mm.py"
SMALL = [
    ("feedback_mm.cpp", "kSlabBytes = int64_t{32} << 20", "kSlabBytes = int64_t{32} << 10"),
    ("feedback_mm.cpp", "kDigitBytes = int64_t{64} << 20", "kDigitBytes = int64_t{32} << 10"),
    ("feedback_mm.cpp", "kSumBytes = int64_t{256} << 20", "kSumBytes = int64_t{128} << 10"),
]


def test_bounded_memory() -> None:
    done = run(BOUNDED, build.library(SMALL))
    assert done.returncode == 0, done.stdout[-8000:]


HOST = "feedback_mm.cpp"
DIGITS, PASSES = "feedback_mm_digits.cu", "feedback_mm_passes.cu"
WAIT = "    cp_async_wait<kStages - 2>();\n    __syncthreads();\n"

# what: (file, text, what takes its place, tests that find it, words of what they say)
BUGS = {
    "digits: wait for cp.async missing": (
        *(DIGITS, WAIT, "    __syncthreads();\n"),
        *("test_bits and primes and digits", "use-after-poison"),
    ),
    "digits: wait one group short": (
        *(DIGITS, "cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>"),
        *("test_bits and wraps and digits", "use-after-poison"),
    ),
    "digits: barrier after the wait missing": (
        *(DIGITS, WAIT, "    cp_async_wait<kStages - 2>();\n"),
        *("test_bits and primes and digits", "use-after-poison|[Aa]ssert"),
    ),
    "digits: wrong lane of the signs": (
        *(DIGITS, "bits[j][half] = t[j % 4] >> lane / 4", "bits[j][half] = t[j % 4] >> lane / 8"),
        *("test_bits and primes and digits", "[Aa]ssert"),
    ),
    "digits: wrong lane of ldmatrix": (
        *(DIGITS, "* 16 + lane % 16, k / 16 + lane / 16", "* 16 + lane % 8, k / 16 + lane / 16"),
        *("test_bits and primes and digits", "[Aa]ssert"),
    ),
    "digits: flag of zeros a tile late": (
        *(DIGITS, "    ++tile_;\n    zeros_ = flag();\n", "    zeros_ = flag();\n    ++tile_;\n"),
        *("test_bits and wraps and digits", "[Aa]ssert|use-after-poison"),
    ),
    "digits: a row too many": (
        *(DIGITS, "valid = row < left_", "valid = row <= left_"),
        *("test_bits and two and digits", "heap-buffer-overflow"),
    ),
    "digits: column stored beyond the last": (
        *(DIGITS, "if (col + c < p.cols)", "if (col < p.cols)"),
        *("test_bits and primes and digits", "heap-buffer-overflow"),
    ),
    "quantise: largest entry above the digits' range": (
        *(PASSES, "    --shift;\n", ""),
        *("test_bits and primes and digits", "signed integer overflow"),
    ),
    "quantise: barrier missing": (
        *(PASSES, "  __syncthreads();\n  for (int w", "  for (int w"),
        *("test_bits and primes and digits", "[Aa]ssert|runtime error"),
    ),
    "quantise: rows of dY by 32 bits": (
        *(PASSES, "+ i * p.row_stride", "+ static_cast<int>(i * p.row_stride)"),
        *("test_offsets and digits", "SEGV|heap-buffer|[Aa]ssert"),
    ),
    "quantise: rows that fill up read": (
        *(PASSES, "i < p.rows ? p.depth : 0", "p.depth"),
        *("test_bits and primes and digits", "heap-buffer-overflow"),
    ),
    "sign bytes: barrier missing": (
        *(PASSES, "  __syncthreads();\n  for (int i", "  for (int i"),
        *("test_bits and primes and int_mm", "[Aa]ssert"),
    ),
    "sign bytes: rows beyond the last read": (
        *(PASSES, "k < p.depth && word", "word"),
        *("test_bits and primes and int_mm", "heap-buffer-overflow"),
    ),
    "sign bytes: columns beyond the last written": (
        *(PASSES, "if (at < p.width)", "if (at <= p.width)"),
        *("test_bits and primes and int_mm", "heap-buffer-overflow"),
    ),
    "sign bytes: the next word's bits": (
        *(PASSES, "bit_of_four(nonzero[col / 32][run]", "bit_of_four(nonzero[(col + 1) / 32][run]"),
        *("test_bits and primes and int_mm", "[Aa]ssert|runtime error"),
    ),
    "finish: digits in a wrong order": (
        *(PASSES, "digit[3 * step], digit[2 * step]", "digit[2 * step], digit[3 * step]"),
        *("test_bits and primes and int_mm", "[Aa]ssert"),
    ),
    "finish: column stored beyond the last": (
        *(PASSES, "p.first + p.width && col < p.cols", "p.first + p.width && col <= p.cols"),
        *("test_bits and primes and int_mm", "heap-buffer-overflow"),
    ),
    "finish: a part of K left out": (
        *(PASSES, "s < p.splits", "s + 1 < p.splits"),
        *("test_bits and parts and digits", "[Aa]ssert"),
    ),
    "finish: ends at one lane's NaN": (
        *(PASSES, "__all_sync(kAll, isnan(sum))", "__any_sync(kAll, isnan(sum))"),
        *("test_bits and primes", "[Aa]ssert"),
    ),
    "finish: a lane missing from a collective": (
        *(
            PASSES,
            "  if (col < p.cols) {\n    p.out",
            "  if (col >= p.cols) return;\n  {\n    __syncwarp();\n    p.out",
        ),
        *("test_bits and primes and int_mm", "__syncwarp"),
    ),
    "finish: non-finite rows by 32 bits": (
        *(PASSES, "p.grad[row * p.row_stride", "p.grad[static_cast<int>(row * p.row_stride)"),
        *("test_offsets", "SEGV|heap-buffer|[Aa]ssert"),
    ),
    "finish: rows of the first warp's alone": (
        *(PASSES, "first = static_cast<int64_t>(blockIdx.y) * kWarpRows", "first = 0"),
        *("test_bits and large and digits", "[Aa]ssert"),
    ),
}
# The same, where rows and columns are cut.
BOUNDED_BUGS = {
    "a slab's columns written as B's": (
        *("feedback_weight.cu", "at = c.first - first", "at = c.first"),
        *("test_columns and float32", "heap-buffer-overflow"),
    ),
    "a slab's counters from 0 on": (
        *(
            "feedback_weight.cu",
            "      magnitudes(p, c);\n      signs(p, c);\n",
            "      c.first -= first;\n      magnitudes(p, c);\n      signs(p, c);\n      c.first += first;\n",
        ),
        *("test_columns and float32", "[Aa]ssert"),
    ),
    "a last slab as wide as the others": (
        *(HOST, "launch_feedback_weight, b, first, cols)", "launch_feedback_weight, b, first, width)"),
        *("test_columns and float32", "AddressSanitizer: unknown-crash"),
    ),
    "signs of the first columns": (
        *(PASSES, "word = p.first / 32 + first_word", "word = first_word"),
        *("test_bits and int_mm", "[Aa]ssert"),
    ),
    "results beyond the columns at hand": (
        *(PASSES, "col < p.first + p.width && col < p.cols", "col < p.cols"),
        *("test_bits and int_mm", "heap-buffer-overflow|[Aa]ssert"),
    ),
    "signs formed once for several slabs": (
        *(HOST, "first > 0 && p.width >= p.cols", "first > 0"),
        *("test_bits and int_mm", "[Aa]ssert"),
    ),
    "rows of the first cut alone": (
        *(HOST, "grad.const_data_ptr<float>() + first * p.row_stride", "grad.const_data_ptr<float>()"),
        *("test_bits and digits", "[Aa]ssert"),
    ),
    "digits of all rows at once": (
        *(HOST, "as_fit(kDigitBytes, 4 * depth, rows, 32)", "rows"),
        *("test_memory and rows and digits", "[Aa]ssert"),
    ),
    "sums of all rows at once": (
        *(HOST, "as_fit(kSumBytes, 4 * (depth + 4 * p.width), rows, 8)", "rows"),
        *("test_memory and rows and int_mm", "[Aa]ssert"),
    ),
    "all of B at once": (
        *(HOST, "width = as_fit(kSlabBytes, b.rows * grad.element_size(), b.cols, kSignsPerCall)", "width = b.cols"),
        *("test_memory and columns and formed", "[Aa]ssert"),
    ),
}


@pytest.mark.parametrize("bug", [*BUGS, *BOUNDED_BUGS])
def test_planted_bug_is_found(bug: str) -> None:
    *patch, which, words = (BUGS | BOUNDED_BUGS)[bug]
    patches = [tuple(patch), *(SMALL if bug in BOUNDED_BUGS else [])]
    done = run(BOUNDED if bug in BOUNDED_BUGS else CASES, build.library(patches), "-k", which)
    assert done.returncode not in (0, 2, 4, 5), done.stdout[-4000:]
    assert re.search(words, done.stdout), done.stdout[-4000:]
