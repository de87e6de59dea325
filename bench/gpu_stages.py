"""What gpu_check runs in processes of their own: each writes what it finds at once, as lines of JSON."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "recipes" / "experiments" / "digits.toml"
TOOLS = ("nvcc", "ncu", "compute-sanitizer", "nvidia-smi", "cmake", "ninja", "c++", "git")
NETS = {"lenet": (1, 32, 32), "lc-cifar10": (3, 32, 32)}
RULES = ("usf", "fa")


def say(**found: Any) -> None:
    """One line of the results."""
    stage = os.environ.get("BIOPLAUS_STAGE", "")
    print(found, flush=True)
    if path := os.environ.get("BIOPLAUS_RESULTS"):
        with open(path, "a") as file:
            file.write(json.dumps({"stage": stage} | found) + "\n")


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


def machine() -> None:
    """What machine this is, which tools it has, and whether the library loads and its backends say they can run."""
    import bioplaus_kernels as bk
    from bioplaus_kernels.backends import native

    from . import device
    from . import machine as about

    library = "loads" if native.library is not None else native.reason
    tools = [tool for tool in TOOLS if shutil.which(tool)]
    found: dict[str, Any] = {"library": library, "tools": tools, "gpu": None}
    try:
        gpu = device.Cuda()
        found |= about.header(gpu) | about.driver_and_clocks(gpu)
        found["capability"] = found["library_level"].removeprefix("CUDA sm_")[:-1] + "." + found["library_level"][-1]
        where = f"{found['gpu']}, {found['library_level'].split()[1]}, driver {found['driver']}"
    except RuntimeError as error:
        found |= about.header(device.Cpu())
        found["no_gpu"] = str(error)
        where = f"no GPU: {error}"
    backends = [f"{b} {bk.backends.unavailable(b) or 'can run'}" for b in ("cuda", "triton")]
    found["said"] = (
        f"{where}; {found['processor']}, {found['cores']} cores; torch {found['torch']}, Python {found['python']}, "
        f"commit {found['commit']}; tools: {' '.join(tools)}; library: {library}; {'; '.join(backends)}"
    )
    say(**found)


def alive(backend: str) -> None:
    """One call of everything that `backend` has, against the reference."""
    import torch

    import bioplaus_kernels as bk

    from . import device, gpu_calls

    if reason := bk.backends.unavailable(backend):
        say(said=reason)
        return
    torch.manual_seed(0)
    gpu = device.Cuda()
    with bk.backends.use(backend), gpu.device, device.tf32(False):
        for call in gpu_calls.calls(backend):
            try:
                error = call.error(call.run())
            except Exception as raised:
                say(case=call.name, ok=False, said=_said(raised))
                if gpu.lost():
                    say(case="every later call", ok=False, said="not made: the process has lost its GPU")
                    return
            else:
                say(case=call.name, ok=error <= 1, said="" if error <= 1 else f"error {error:.2g} of its bound")


def user() -> None:
    """What a user does, all at the same time: nothing here is timed."""
    jobs = [["digits", row] for row in ("bp", "fa", "usf")]
    jobs += [["step", net, rule, backend] for backend in ("", "triton", "cuda") for net in NETS for rule in RULES]
    command = [sys.executable, "-m", "bench.gpu_stages"]
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    for process in [subprocess.Popen([*command, *job], cwd=ROOT, env=environment) for job in jobs]:
        process.wait()


def _reported(case: str, check: Callable[[], str]) -> None:
    # `check` says what is wrong.
    start = time.monotonic()
    try:
        wrong = check()
    except Exception as error:
        wrong = _said(error)
    say(case=case, ok=not wrong, said=wrong, seconds=round(time.monotonic() - start, 1))


def digits(name: str) -> None:
    """A recipe, on this machine's device, ends with most of the test set right."""

    def check() -> str:
        from recipes.__main__ import main

        with tempfile.TemporaryDirectory() as out:
            main(["run", str(DIGITS), "--rows", name, "--out", out, "--no-measure"])
            log = next(Path(out).rglob("log.jsonl")).read_text().splitlines()
        wrong = json.loads(log[-1])["test_error"]
        return "" if wrong < 0.2 else f"{wrong:.0%} of the test set are wrong"

    _reported(f"digits {name}", check)


def step(net: str, rule: str, backend: str, device: str = "cuda") -> None:
    """Three compiled steps under autocast; the first gives the gradients that eager mode gives."""

    def check() -> str:
        import torch

        import bioplaus_kernels as bk
        from recipes import models

        torch.manual_seed(0)
        model = models.build(net, NETS[net], 10).to(device)
        bk.convert_(model, rule)
        x, y = torch.randn(16, *NETS[net], device=device), torch.randint(10, (16,), device=device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

        def loss(run: Callable[[Any], Any]) -> Any:
            with torch.autocast(device, torch.bfloat16):
                return torch.nn.functional.cross_entropy(run(x), y)

        with bk.backends.use(backend) if backend else nullcontext():
            loss(model).backward()
            expected = [p.grad for p in model.parameters()]
            compiled, wrong = torch.compile(model, fullgraph=True), 0.0
            for number in range(3):
                optimizer.zero_grad()
                value = loss(compiled)
                value.backward()
                if number == 0:
                    found = [p.grad for p in model.parameters()]
                    wrong = max(
                        float((f - e).norm() / e.norm().clamp_min(1e-30)) for f, e in zip(found, expected, strict=True)
                    )
                optimizer.step()
        if not value.isfinite():
            return f"loss {float(value)}"
        # Compiled code rounds to bfloat16 in other places.
        return "" if wrong < 0.1 else f"gradients of compiled and eager code differ by {wrong:.2g} of their norm"

    _reported(f"compiled {net} {rule} {backend or 'automatic'}", check)


def called(backend: str) -> None:
    """Every call once, for a tool that watches."""
    import torch

    import bioplaus_kernels as bk

    from . import gpu_calls

    with bk.backends.use(backend), torch.device("cuda"):
        for call in gpu_calls.calls(backend):
            call.run()
    torch.cuda.synchronize()


def sanitizer(tool: str, out: str) -> None:
    """Every call of the CUDA C++ ops under one of NVIDIA's checkers (Triton's wgmma gives false reports)."""
    if shutil.which("compute-sanitizer") is None:
        say(said="skipped: compute-sanitizer is not installed")
        return
    # torch's pool would hide what lies beyond a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", "--tool", tool, sys.executable, "-m", "bench.gpu_stages", "called", "cuda"]
    with open(out, "a+") as file:
        start = file.tell()
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        file.seek(start)
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", file.read())
    ended = summary[-1] if summary else f"no summary, exit status {done.returncode}"
    say(case=tool, ok=bool(summary) and re.match(r"0 (errors|hazards)", ended) is not None, said=ended)


def counted() -> None:
    """Products of few rows and many, for ncu."""
    import torch

    import bioplaus_kernels as bk

    from . import gpu_calls

    for backend in ("triton", "cuda"):
        if bk.backends.unavailable(backend):
            continue
        with bk.backends.use(backend), torch.device("cuda"):
            for call in gpu_calls.products(backend, ((128, 4096, 4096), (4096, 4096, 4096))):
                if re.search(r"(float32|bfloat16) ±s", call.name):
                    call.run()
                    torch.cuda.synchronize()
                    torch.cuda.profiler.start()
                    call.run()
                    torch.cuda.synchronize()
                    torch.cuda.profiler.stop()


def counters(out: str) -> None:
    """Hardware's counters of the products' kernels."""
    if shutil.which("ncu") is None:
        say(said="skipped: ncu is not installed")
        return
    sections = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats")
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details"]
    command += [word for section in sections for word in ("--section", section)]
    with open(out, "w") as file:
        done = subprocess.run(
            [*command, sys.executable, "-m", "bench.gpu_stages", "counted"], cwd=ROOT, stdout=file, stderr=file
        )
    kernels = len(re.findall(r'^"\d+"', Path(out).read_text(), re.M))
    said = f"exit status {done.returncode}, {kernels} lines of counters"
    say(case="ncu", ok=done.returncode == 0 and kernels > 0, said=said)


if __name__ == "__main__":
    stage, *words = sys.argv[1:]
    {f.__name__: f for f in (machine, alive, user, digits, step, called, sanitizer, counted, counters)}[stage](*words)
