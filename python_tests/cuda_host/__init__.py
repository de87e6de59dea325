"""Runs the CUDA kernels and their host side on CPU tensors, without a GPU.

`build.py` compiles csrc/cuda with g++ against `host_execution.h`; `run` here starts the tests of a `cases_*.py` in a
process that has AddressSanitizer loaded; `host.py` gives them the ops.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from . import build

HERE = Path(__file__).resolve().parent


def run(cases: str, library: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs python_tests/cuda_host/`cases` with pytest against `library`; what goes wrong in it is in its output."""
    environment = os.environ | {
        "BK_CUDA_HOST": str(library),
        "LD_PRELOAD": build.preload(),
        "ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=6",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    # The sanitizers write to the process's own stderr, which pytest must not hold back: they abort it.
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-x", "-p", "no:cacheprovider", "--capture=sys"]
    done = subprocess.run(
        [*command, *options, str(HERE / cases)],
        env=environment,
        cwd=HERE.parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    # Python's own frames, of which a sanitizer's report holds hundreds.
    done.stdout = re.sub(
        r"^ +#\d+ .*(?: (?:Python|Objects|Include|Modules)/\S+|libc_start\S+|_start .*)\n", "", done.stdout, flags=re.M
    )
    return done
