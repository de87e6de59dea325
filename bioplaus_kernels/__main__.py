"""`python -m bioplaus_kernels`: versions, what was built, and which backend serves each op, with the reason.

`python -m bioplaus_kernels describe CHECKPOINT`: the rule and seed of each weight that has feedback in the file.
"""

import argparse
import platform
from importlib.util import find_spec

import torch

from . import __version__, backends
from .backends import native
from .describe import describe_file


def main() -> None:
    """Print what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bioplaus_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    describe = commands.add_parser("describe", help="the rule and seed of each weight in a checkpoint")
    describe.add_argument("checkpoint", help="a file of torch.save or safetensors, or a folder of these or of DCP")
    arguments = parser.parse_args()
    if arguments.command is None:
        report()
        return
    try:
        print(describe_file(arguments.checkpoint))
    except (FileNotFoundError, ValueError, ImportError) as error:
        raise SystemExit(str(error)) from error


def report() -> None:
    """Print what is built and what serves each op."""
    print(f"bioplaus_kernels {__version__}")
    print(f"python {platform.python_version()}, torch {torch.__version__} (CUDA {torch.version.cuda or 'no'})")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    print(f"triton {'found' if find_spec('triton') else 'not found'}, CUDA device: {'' if gpus else 'none'}".rstrip())
    for index in range(gpus):
        major, minor = torch.cuda.get_device_capability(index)
        print(f"  {index}: {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
        for backend in ("cuda", "triton"):
            # A backend that cannot run at all is named below.
            if not backends.unavailable(backend) and (reason := backends.lacks_kernels(backend, index)):
                print(f"     not served by {backend}: {reason}")
    if native.library is None:
        print(f"native library: {native.reason}")
    else:
        config = native.library.build_config()
        print(f"native library: built with torch {config['torch']}, {config['cxx_compiler']}")
        if native.outdated():
            print("  built from other sources than csrc beside the package: build again")
        product = native.product_level()
        print(
            f"  CPU levels {', '.join(config['cpu_levels'])}; active here: {native.library.active_cpu_level()}, "
            f"integer products {product}"
        )
        print(f"  OpenMP {'yes' if config['openmp'] else 'no'}, {native.library.num_threads_used()} threads")
        cuda = f"{config['cuda']} for {', '.join(config['cuda_archs'])}" if config["cuda"] else "not built"
        print(f"  CUDA {cuda}")
    print(f"backend: {backends.chosen() or 'automatic'} ({backends.VARIABLE}, bioplaus_kernels.backends.use)")
    for name in backends.NAMES:
        reason = backends.unavailable(name)
        print(f"  {name}: {reason or 'can run'}")
    print()
    rows = [("op", "device", "backend", "why"), *backends.choices()]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
