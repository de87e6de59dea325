"""Goals: each is of cases that are measured, and reads its own; means by batch."""

import pytest

from bench import device, goals, registry, report, steps

VARIANTS = {
    "feedback_mm": (*goals.CONSTANT, *goals.PLAIN, "torch dY @ W, TF32", "sign, then matmul"),
    "convolution": ("backprop", "bioplaus, usf"),
    "locally_connected": (*goals.TORCH_LC, "bioplaus, backprop", "bioplaus, usf", "LocallyConnected2d"),
    "training_step": ("torch.nn, backprop", "usf", "frsf", "brsf", "fa", "fa stored"),
    "recurrent": ("torch.nn, backprop", "bioplaus, usf", "bioplaus, fa"),
    "overhead": ("torch.nn", "usf"),
}


def result(level: str) -> goals.Result:
    """Every case of a machine of `level`, each variant in 1 ms."""
    gpu = level.startswith("CUDA")
    row = {"error_over_bound": 0.5, "ms": 1.0, "ratio": 1.0, "work": [[1e6, 0, 0]], "unit": "float32"}
    row |= {"inputs": 1, "outputs": 0, "peak_bytes": 0}
    return {
        "machine": {"library_level": level} | ({"gpu": "name"} if gpu else {}),
        "roofline": {"float32": 1e9, "read": 1e9, "write": 1e9},
        "rows": [
            row | {"op": case.op, "case": case.label, "variant": variant, "state": state}
            for case in registry.cases(gpu=gpu)
            for variant in VARIANTS.get(case.op, ())
            for state in (("warm", "graph") if gpu else ("warm",))
        ],
    }


def test_every_goal_has_its_cases() -> None:
    for what, levels, _, _, find in goals.GOALS:
        for level in (levels or "AMX").split(", "):
            assert find(result(level)) is not None, (what, level)


def test_goals_of_a_gpu() -> None:
    gpu, named = result(goals.HOPPER), {what: find for what, *_, find in goals.GOALS}
    tf32 = named["usf fp32, signs from W, M ≥ 4096, over TF32's product"]
    either = next(find for what, find in named.items() if "2.5 rooflines" in what)
    step = next(find for what, find in named.items() if "compiled" in what)
    # A millisecond is the roofline too.
    assert tf32(gpu) == 1 and either(gpu) == pytest.approx(0.4) and step(gpu) == 1
    for row in gpu["rows"]:
        if row["variant"] == "torch dY @ W, TF32" and "M=16384" in row["case"]:
            row["ms"] = 0.5
        if row["variant"] == "bioplaus, usf" and row["case"] == "CIFAR 3 N=16 forward + backward":
            row["ms"] = 4.0
        if row["op"] == "training_step" and row["state"] == "warm" and row["variant"] == "usf":
            row["ratio"] = 1.5
    assert tf32(gpu) == 2 and either(gpu) == pytest.approx(1.6) and step(gpu) == 1.5


def test_means() -> None:
    named = {"a": {"base": {1: 1.0, 8: 1.0}, "ours": {1: 0.5, 8: 2.0}}, "b": {"base": {1: 1.0}, "ours": {1: 2.0}}}
    header, _, line = report.means(named).splitlines()
    assert header.split("|")[2:4] == [" batch 1   ", " batch 8   "] and "base" not in line
    assert [cell.strip() for cell in line.split("|")[1:4]] == ["ours", "1.00 (2)", "2.00 (1)"]
    assert report.means({"a": named["a"]}) == ""


@pytest.mark.slow
def test_a_compiled_step() -> None:
    bench = steps.build_compiled(device.Cpu(), steps.lenet, (4, 1, 32, 32))
    assert list(bench.variants) == ["torch.nn, backprop", "usf"]
    for step in bench.variants.values():
        step()
