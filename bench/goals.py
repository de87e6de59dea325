"""What the kernels are to reach, and what one set of runs reached: the worst row unless a mean is named."""

import re
from collections.abc import Callable, Iterable
from statistics import geometric_mean
from typing import Any

from tabulate import tabulate

from . import pictures
from .report import least_seconds

Result = dict[str, Any]
Cases = dict[str, dict[str, dict[str, Any]]]

SQUARE = "4096x4096 M={} {}"
FEW = "2304x256 M={} {}"
WHOLE = r"forward \+ backward$"
TORCH_LC = "unfold + bmm", "unfold + einsum"
CONSTANT = ("usf, signs from W", "usf, packed signs", "fa seeded, ±s")
# Our variants, and the plain-torch ways to compute the same.
PLAIN = {
    **dict.fromkeys(CONSTANT, ("sign, then matmul", "sign, then matmul, torch.compile")),
    "frsf stored": ("sign x magnitude, then matmul", "sign x magnitude, then matmul, torch.compile"),
    "fa seeded, uniform": ("draw uniform, then matmul",),
    "fa stored": ("torch dY @ W",),
}


def cases(result: Result, op: str, state: str = "") -> Cases:
    """Timed rows of `op` by case and variant: calls one after another, on a GPU as graphs, without the host's time."""
    state = state or pictures.state(result)
    found: Cases = {}
    for row in result["rows"]:
        if row["op"] == op and row["state"] == state and "ms" in row:
            found.setdefault(row["case"], {})[row["variant"]] = row
    return found


def _ratio(
    result: Result, variant: str, batches: Iterable[int], dtype: str = "float32", shape: str = SQUARE
) -> float | None:
    mm = cases(result, "feedback_mm")
    rows = [mm.get(shape.format(m, dtype), {}).get(variant) for m in batches]
    return max((row["ratio"] for row in rows if row), default=None)


def _few(result: Result, variant: str, batches: Iterable[int]) -> float | None:
    return _ratio(result, variant, batches, shape=FEW)


def _faster(result: Result) -> float | None:
    mm = cases(result, "feedback_mm")
    square = [rows for case, rows in mm.items() if re.fullmatch(SQUARE.format(r"\d+", "float32"), case)]
    means = [
        geometric_mean(rows["sign, then matmul"]["ms"] / rows[variant]["ms"] for rows in square)
        for variant in CONSTANT
        if square and all(variant in rows for rows in square)
    ]
    return min(means, default=None)


def _against_plain(result: Result) -> float | None:
    return max(
        (
            rows[ours]["ms"] / min(rows[p]["ms"] for p in plain if p in rows)
            for rows in cases(result, "feedback_mm").values()
            for ours, plain in PLAIN.items()
            if ours in rows and not rows.keys().isdisjoint(plain)
        ),
        default=None,
    )


def _error(result: Result) -> float | None:
    errors = (row["error_over_bound"] for row in result["rows"] if not row["variant"].startswith("three bf16"))
    return max((e for e in errors if e is not None), default=None)


def _step(result: Result, case: str, variants: Iterable[str], state: str = "") -> float | None:
    rows = cases(result, "training_step", state).get(case, {})
    return max((rows[v]["ratio"] for v in variants if v in rows), default=None)


def _lstm(result: Result) -> float | None:
    found = [
        rows for case, rows in cases(result, "recurrent").items() if case.startswith("LSTM") and "bfloat16" not in case
    ]
    ours = ("bioplaus, usf", "bioplaus, fa")
    return max((rows[way]["ratio"] for rows in found for way in ours if way in rows), default=None)


def _convolution(result: Result, channels: Iterable[int]) -> float | None:
    # Against the vendor's faster memory format.
    others = ("contiguous", "bfloat16")
    last = {case: rows for case, rows in cases(result, "convolution").items() if not case.endswith(others)}
    first = cases(result, "convolution")
    ratios = []
    for case, rows in last.items():
        out = re.match(r"3x3 \d+ to (\d+)", case)
        if not out or int(out[1]) not in channels or "bioplaus, usf" not in rows:
            continue
        both = [rows["backprop"], first.get(f"{case}, contiguous", rows)["backprop"]]
        ratios.append(rows["bioplaus, usf"]["ms"] / min(row["ms"] for row in both))
    return max(ratios, default=None)


def _layers(result: Result, part: str, variant: str = "bioplaus, backprop") -> list[dict[str, dict[str, Any]]]:
    lc = cases(result, "locally_connected")
    wanted = {variant, *TORCH_LC}
    return [rows for case, rows in lc.items() if re.search(part, case) and rows.keys() >= wanted]


def _lc_speedup(result: Result) -> float | None:
    faster = [1 / _over_torch(rows, "bioplaus, backprop") for rows in _layers(result, WHOLE)]
    return geometric_mean(faster) if faster else None


def _over_torch(rows: dict[str, dict[str, Any]], variant: str) -> float:
    return rows[variant]["ms"] / min(rows[way]["ms"] for way in TORCH_LC)


def _over_roofline(result: Result, row: dict[str, Any]) -> float:
    return row["ms"] / 1e3 / (least_seconds(row, result["roofline"]) or 1.0)


def _lc_weight(result: Result) -> float | None:
    rows = _layers(result, "backward weight bfloat16")
    return max((_over_torch(r, "bioplaus, backprop") for r in rows), default=None)


def _lc_either(result: Result) -> float | None:
    usf = "bioplaus, usf"
    rows = _layers(result, "forward [+] backward", usf)
    return max((min(_over_torch(r, usf) / 0.4, _over_roofline(result, r[usf]) / 2.5) for r in rows), default=None)


def _against_tf32(result: Result) -> float | None:
    mm, ours = cases(result, "feedback_mm"), CONSTANT[0]
    rows = [mm.get(SQUARE.format(m, "float32"), {}) for m in (4096, 16384)]
    rows = [r for r in rows if r.keys() >= {ours, "torch dY @ W, TF32"}]
    # With errors below those of torch's float32: the bound is twice these, and one rounding.
    found = [
        r[ours]["ms"] / r["torch dY @ W, TF32"]["ms"] if r[ours]["error_over_bound"] <= 0.5 else float("inf")
        for r in rows
    ]
    return max(found, default=None)


def _lc_roofline(result: Result) -> float | None:
    times = [_over_roofline(result, rows["bioplaus, backprop"]) for rows in _layers(result, WHOLE)]
    return geometric_mean(times) if times else None


def _lc_memory(result: Result) -> float | None:
    shares = [
        (row["peak_bytes"] - row["outputs"]) / (row["inputs"] + row["outputs"])
        for rows in cases(result, "locally_connected").values()
        for name, row in rows.items()
        if name == "bioplaus, backprop" and row["inputs"]
    ]
    return max(shares, default=None)


def _construction(result: Result) -> float | None:
    rows = cases(result, "locally_connected").get("building the ImageNet network's layers")
    return rows["LocallyConnected2d"]["ratio"] if rows else None


def _overhead(result: Result, backward: bool) -> float | None:
    found = cases(result, "overhead")
    extra = []
    for layer in ("Linear", "Conv2d"):
        forward, both = (found.get(f"{layer} 1x8x8 {what}") for what in ("forward", "forward + backward"))
        if not forward or not both:
            continue
        for rule in forward.keys() - {"torch.nn"}:
            first, whole = (rows[rule]["ms"] - rows["torch.nn"]["ms"] for rows in (forward, both))
            extra.append(1e3 * (whole - first if backward else first))
    return max(extra, default=None)


LARGE, SMALL = (128, 512, 2048, 4096), (1, 8, 32)
ANY = (*SMALL, 64, *LARGE, 16384)
RESNET = "ResNet-18 N=16 {}"
HOPPER = "CUDA sm_90"
AVX512 = "AMX, AVX512_VNNI"
# What, levels it is for (None: any), limit, at least rather than at most, how it is found.
GOALS: tuple[tuple[str, str | None, float, bool, Callable[[Result], float | None]], ...] = (
    ("usf fp32, signs from W, M ≥ 128", AVX512, 0.40, False, lambda r: _ratio(r, CONSTANT[0], LARGE)),
    ("usf fp32, packed signs, M ≤ 32", "AMX", 0.30, False, lambda r: _ratio(r, CONSTANT[1], SMALL)),
    ("usf fp32, packed signs, M ≥ 128", AVX512, 0.30, False, lambda r: _ratio(r, CONSTANT[1], LARGE)),
    ("usf bf16, packed signs, M ≤ 32", "AMX", 0.40, False, lambda r: _ratio(r, CONSTANT[1], SMALL, "bfloat16")),
    ("usf bf16, packed signs, M ≥ 128", "AMX", 1.0, False, lambda r: _ratio(r, CONSTANT[1], LARGE, "bfloat16")),
    ("usf fp32, 2304×256, signs from W, M ≥ 512", AVX512, 0.35, False, lambda r: _few(r, CONSTANT[0], (512, 3136))),
    ("usf fp32, 2304×256, packed signs, M ≥ 512", AVX512, 0.35, False, lambda r: _few(r, CONSTANT[1], (512, 3136))),
    ("usf fp32, 2304×256, packed signs, M = 64", AVX512, 0.45, False, lambda r: _few(r, CONSTANT[1], (64,))),
    ("3×3 convolution, 128 to 512 channels, usf", AVX512, 0.40, False, lambda r: _convolution(r, (128, 256, 512))),
    ("3×3 convolution, 64 channels, usf", AVX512, 0.60, False, lambda r: _convolution(r, (64,))),
    ("seeded ±s fa fp32, M = 8, 32", "AMX", 0.50, False, lambda r: _ratio(r, CONSTANT[2], (8, 32))),
    ("seeded ±s fa fp32, M ≥ 128", "AMX", 0.35, False, lambda r: _ratio(r, CONSTANT[2], LARGE)),
    ("usf fp32, packed signs, M ≤ 8", "AVX512_VNNI", 0.35, False, lambda r: _ratio(r, CONSTANT[1], (1, 8))),
    ("usf fp32, packed signs, M = 128", "AVX512_VNNI", 1.0, False, lambda r: _ratio(r, CONSTANT[1], (128,))),
    ("usf fp32, packed signs, M = 128", "AVX2", 1.2, False, lambda r: _ratio(r, CONSTANT[1], (128,))),
    ("usf fp32, packed signs, M ≥ 512", "AVX2", 1.1, False, lambda r: _ratio(r, CONSTANT[1], (512, 2048))),
    ("±s rules over sign-then-matmul, eager, geometric mean over M", "AMX", 5.0, True, _faster),
    ("any rule, shape, dtype: time / best plain-torch way", "AMX", 1.05, False, _against_plain),
    ("error / bound, every gated row", None, 1.0, False, _error),
    ("MLP 5×2048 step, batch 64, usf / torch.nn", AVX512, 0.93, False, lambda r: _step(r, "MLP 5x2048 N=64", ["usf"])),
    (
        "MLP 5×2048 step, batch 512, usf / torch.nn",
        AVX512,
        0.88,
        False,
        lambda r: _step(r, "MLP 5x2048 N=512", ["usf"]),
    ),
    ("ResNet-18 step 64²: usf / torch.nn", AVX512, 0.87, False, lambda r: _step(r, RESNET.format(64), ("usf",))),
    ("ResNet-18 step 224²: usf / torch.nn", AVX512, 0.85, False, lambda r: _step(r, RESNET.format(224), ("usf",))),
    (
        *("ResNet-18 step 64²: frsf, stored fa / torch.nn", "AMX", 1.04, False),
        lambda r: _step(r, RESNET.format(64), ("frsf", "fa stored")),
    ),
    (
        *("ResNet-18 step 64²: brsf, seeded fa / torch.nn", "AMX", 1.10, False),
        lambda r: _step(r, RESNET.format(64), ("brsf", "fa")),
    ),
    (
        *("ResNet-18 step 224²: any rule / torch.nn", "AMX", 1.02, False),
        lambda r: _step(r, RESNET.format(224), ("usf", "frsf", "brsf", "fa", "fa stored")),
    ),
    ("LSTM forward + backward, usf and fa / torch.nn", None, 1.5, False, _lstm),
    ("LC forward + backward, speed-up over faster torch way, geometric mean", "AMX", 4.0, True, _lc_speedup),
    ("LC forward + backward, time / roofline, geometric mean", "AMX", 2.0, False, _lc_roofline),
    ("LC, peak extra memory / operands", "AMX", 0.05, False, _lc_memory),
    ("building the ImageNet LC layers / torch.empty and uniform_", "AMX", 1.05, False, _construction),
    ("layer forward on 1×8×8, µs over torch.nn", "AMX", 5.0, False, lambda r: _overhead(r, False)),
    ("layer backward on 1×8×8, µs over torch.nn", "AMX", 5.0, False, lambda r: _overhead(r, True)),
    ("usf fp32, signs from W, M = 512", HOPPER, 0.25, False, lambda r: _ratio(r, CONSTANT[0], (512,))),
    ("usf fp32, signs from W, M ≥ 4096", HOPPER, 0.22, False, lambda r: _ratio(r, CONSTANT[0], (4096, 16384))),
    ("usf fp32, signs from W, M ≥ 4096, over TF32's product", HOPPER, 1.6, False, _against_tf32),
    (
        "usf fp32, packed signs, M ≥ 512",
        HOPPER,
        0.20,
        False,
        lambda r: _ratio(r, CONSTANT[1], (512, 2048, 4096, 16384)),
    ),
    ("usf bf16, signs from W", HOPPER, 1.2, False, lambda r: _ratio(r, CONSTANT[0], ANY, "bfloat16")),
    ("usf bf16, signs from W, M = 16384", HOPPER, 1.05, False, lambda r: _ratio(r, CONSTANT[0], (16384,), "bfloat16")),
    ("usf bf16, packed signs, M ≤ 64", HOPPER, 0.6, False, lambda r: _ratio(r, CONSTANT[1], (*SMALL, 64), "bfloat16")),
    (
        *("LC forward + backward, usf, over the larger of 0.4 of torch's faster way and 2.5 rooflines", HOPPER),
        *(1.0, False, _lc_either),
    ),
    ("LC weight gradient bf16 / faster torch way", HOPPER, 0.8, False, _lc_weight),
    (
        *("ResNet-18 step, batch 256, bf16, compiled, eager calls: usf / torch.nn", HOPPER, 1.03, False),
        lambda r: _step(r, "ResNet-18 N=256 224 bfloat16 compiled", ["usf"], "warm"),
    ),
)


def table(results: list[Result]) -> str:
    """One row for each goal that some run measured."""
    rows = []
    for what, levels, limit, at_least, find in GOALS:
        for result in results:
            level = result["machine"]["library_level"]
            if (levels and level not in levels.split(", ")) or (value := find(result)) is None:
                continue
            met = value >= limit if at_least else value <= limit
            goal = f"{'≥' if at_least else '≤'}\N{NO-BREAK SPACE}{limit:g}"
            rows.append([what, level, goal, f"{value:.3g}", "yes" if met else "no"])
    header = ("4096² unless said, ratio to torch's dY @ W; worst row", "level", "goal", "reached", "met")
    return tabulate(rows, header, tablefmt="pipe", disable_numparse=True)
