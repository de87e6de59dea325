"""Instructions of a call, counted by valgrind's callgrind: what a clock says of microseconds is mostly noise."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from . import device, registry

_CALLS = 20


def count(op: str) -> dict[tuple[str, str], float]:
    """Instructions of one call of each variant of `op`'s cases, by (case, variant), on one thread; takes minutes.

    Raises FileNotFoundError where valgrind is not installed, and RuntimeError where the program fails in it.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise FileNotFoundError("--instructions: valgrind is not installed (Debian: apt-get install valgrind)")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        ran = subprocess.run(
            [
                *(valgrind, "--quiet", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={out}"),
                *(sys.executable, "-m", "bench.instructions", op),
            ],
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
        )
        if ran.returncode:
            raise RuntimeError(f"valgrind: exit status {ran.returncode}: {ran.stderr[-1000:]}")
        keys = [tuple(key) for key in json.loads(ran.stdout)]
        dumps = [Path(f"{out}.{number}").read_text() for number in range(1, len(keys) + 1)]
        totals = [int(re.search(r"^totals: (\d+)", dump, re.M)[1]) for dump in dumps]
        return {key: total / _CALLS for key, total in zip(keys, totals, strict=True)}


def main(op: str) -> None:
    """In valgrind: one dump of its counters for each variant, whose names are printed in that order."""
    keys = []
    gc.disable()
    for case in registry.cases([op], quick=False):
        for name, function in case.build(device.Cpu()).variants.items():
            for _ in range(_CALLS):
                function()
            torch._C._valgrind_toggle()
            for _ in range(_CALLS):
                function()
            torch._C._valgrind_toggle_and_dump_stats()
            keys.append((case.label, name))
    print(json.dumps(keys))


if __name__ == "__main__":
    main(sys.argv[1])
