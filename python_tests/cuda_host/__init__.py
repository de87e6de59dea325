"""Runs the CUDA kernels and their host side on CPU tensors, without a GPU.

`build.py` compiles csrc/cuda with g++ against `host_execution.h`; `run` here starts the tests of a `cases_*.py` in a
process that has AddressSanitizer loaded; `host.py` gives them the ops.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from . import build

HERE = Path(__file__).resolve().parent
# Answers each request, a library and pytest's arguments, by a process of its own, forked when what conftest.py imports
# is there: under the sanitizer imports take longer than most of what is tested.
SERVER = """
import json, os, sys
import pytest, torch._inductor.config

for line in sys.stdin:
    library, options, output = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ["BK_CUDA_HOST"] = library
        to = os.open(output, os.O_WRONLY)
        for descriptor in 1, 2:
            os.dup2(to, descriptor)
        code = pytest.main(options)
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _server() -> subprocess.Popen[str]:
    environment = os.environ | {
        "LD_PRELOAD": build.preload(),
        "ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=6",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=environment,
        cwd=HERE.parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run(cases: str, library: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs python_tests/cuda_host/`cases` with pytest against `library`; what goes wrong in it is in its output."""
    # The sanitizers write to the process's own stderr, which pytest must not hold back: they abort it.
    arguments = ["-v", "--tb=short", "-x", "-p", "no:cacheprovider", "--capture=sys", *options, str(HERE / cases)]
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        print(json.dumps([str(library), arguments, output.name]), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        # Python's own frames, of which a sanitizer's report holds hundreds.
        frames = r"^ +#\d+ .*(?: (?:Python|Objects|Include|Modules)/\S+|libc_start\S+|_start .*)\n"
        return subprocess.CompletedProcess(arguments, code, re.sub(frames, "", output.read(), flags=re.M))
