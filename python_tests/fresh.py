"""Programs in processes of their own, which find torch imported and nothing of ours: torch's import takes a second.

torch reads ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS when it first computes, so a program may
still be given them, and asserts the level that it got.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

# Each process is forked from a server that has imported torch: also torch.multiprocessing's with this start method.
START_METHOD = "forkserver"
context = multiprocessing.get_context(START_METHOD)
context.set_forkserver_preload(["torch"])


def _program(code: str, arguments: tuple[str, ...], environment: dict[str, str], folder: Path) -> None:
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})


class Fresh:
    """`python -c code arguments…`, running; the program finds `environment` in os.environ."""

    def __init__(self, code: str, *arguments: str, environment: Mapping[str, str] = os.environ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        given = (code, arguments, dict(environment), Path(self._folder.name))
        self._process = context.Process(target=_program, args=given)
        self._process.start()

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Its exit status and what it wrote, once it has ended."""
        self._process.join()
        with self._folder as folder:
            output = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess((), self._process.exitcode, *output)


def run(code: str, *arguments: str, environment: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
    """What `python -c code arguments…` ends with."""
    return Fresh(code, *arguments, environment=environment).wait()
