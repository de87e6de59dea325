"""What an experiment's file may say, from the classes that it is read into."""

from __future__ import annotations

import dataclasses
import inspect
import json

from recipes import experiment
from recipes.experiment import DIRECT, MIRROR, OPTIMIZERS, RULES, TARGETS, VARIANTS, Data, Model, Train, beside


def text() -> str:
    """What `recipes.experiment` says of such a file, then every key, its default and the names that it takes."""
    lines = [experiment.__doc__ or "", "Keys and their defaults:", ""]
    for part, cls in (("data", Data), ("model", Model), ("train", Train)):
        source = {}
        for line in inspect.getsource(cls).splitlines():
            name, _, rest = line.strip().partition(":")
            source[name] = rest.partition("#")[2].strip()
        values = {key: json.dumps(value) for key, value in vars(cls()).items()}
        lines += [f"{part}.{key} = {value}".ljust(40) + f" {source[key]}" for key, value in values.items()]
    mirror = (f"algorithm.mirror.{key} = {json.dumps(value)}" for key, value in MIRROR.items())
    lines += [line.ljust(40) + " of bioplaus_kernels.mirror_" for line in mirror]
    lines += [
        "",
        "algorithm.name, and the other keys of [algorithm] with it, which help(bioplaus_kernels.CLASS) explains:",
    ]
    for name, rule in (RULES | DIRECT).items():
        own = [f.name for f in dataclasses.fields(rule)] + beside(name)
        lines.append(f"{name} ({'direct.' if name in DIRECT else ''}{rule.__name__}): {', '.join(own)}")
    lines += [f"{', '.join(VARIANTS)} (TargetProp): {', '.join(TARGETS)}", ""]
    lines.append("optimizer.name, and the keys with it, which help(torch.optim.CLASS) explains:")
    for name, optimizer in OPTIMIZERS.items():
        own = [p for p in inspect.signature(optimizer).parameters if p != "params"]
        package = "bioplaus_kernels.optim." if optimizer.__module__.startswith("bioplaus") else ""
        lines.append(f"{name} ({package}{optimizer.__name__}): {', '.join(own)}, last_layer (a table of the same keys)")
    return "\n".join(lines)
