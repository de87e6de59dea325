"""What feedback a model, or a file of one, has: the rule, its fields and the seed of each weight."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backends.reference import checks
from .direct import DirectFeedback
from .feedback import Record, decode
from .feedback.record import readable, weight_of
from .nn.base import FeedbackLayer

_SUFFIX = "feedback_state"
_KINDS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


@dataclass
class Description:
    """A row (weight, rule with its fields, seed) for each weight with feedback; str() is a table."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.rows:
            return "no weight with feedback"
        lines = [("weight", "rule", "seed"), *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def describe(model: torch.nn.Module | Mapping[str, Any]) -> Description:
    """Which rule, with which fields, each weight of `model`, a module or a state_dict, has, and the seed of its draw.

    The seed is convert_'s; "-" where nothing is drawn, and the key itself where that came from torch's generator.
    Raises TypeError for anything else.
    """
    if isinstance(model, torch.nn.Module):
        found = [
            (f"{prefix}.{name}".removeprefix("."), layer.feedback_record(name))
            for prefix, layer in model.named_modules()
            if isinstance(layer, FeedbackLayer | DirectFeedback)
            for name in layer._held
        ]
        return Description([_row(name, record) for name, record in found])
    wanted = "a torch.nn.Module or a state_dict (of a file: python -m bioplaus_kernels describe FILE)"
    checks.instance("model", model, Mapping, wanted)
    return Description([_read(name, data) for name, data in _tensors(model, "")])


def describe_file(path: str | Path) -> Description:
    """`describe` of what torch.save, safetensors or torch.distributed.checkpoint wrote; only records are read.

    Raises FileNotFoundError where there is nothing, and ValueError where it cannot be read as any of these.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        if (path / ".metadata").exists():
            return describe(_distributed(path))
        files = [f for kind in _KINDS for f in sorted(path.glob(kind))] if path.is_dir() else [path]
        found = [_safetensors(file) if file.suffix == ".safetensors" else _torch(file) for file in files]
        rows = [row for content in found for row in describe({"": content}).rows]
    except ImportError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: cannot be read as a checkpoint ({why})") from error
    if not files:
        raise ValueError(f"{path}: expected a checkpoint of torch.distributed, or files {', '.join(_KINDS)}")
    return Description(rows)


def _torch(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return {
            name: opened.get_tensor(name)
            for name in opened.keys()  # noqa: SIM118
            if name.endswith(_SUFFIX)
        }


def _distributed(folder: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(folder)
    found: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.endswith(_SUFFIX) and isinstance(entry, TensorStorageMetadata)
    }
    load(found, storage_reader=reader, no_dist=True)
    return found


def _tensors(found: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    todo = [(prefix, found)]
    while todo:
        name, value = todo.pop()
        if isinstance(value, Mapping | list | tuple):
            inner = value.items() if isinstance(value, Mapping) else enumerate(value)
            todo += [(f"{name}.{key}".removeprefix("."), v) for key, v in reversed(list(inner))]
        elif isinstance(value, Tensor) and name.endswith((_SUFFIX, "feedback_key")):
            yield name, value


def _read(name: str, data: Tensor) -> tuple[str, str, str]:
    if not readable(data):
        return weight_of(name, "state"), "unknown: on the meta device, or sharded", "-"
    if name.endswith("feedback_key"):
        return weight_of(name, "key"), "unknown: saved by version 0.1", f"key {data.flatten().tolist()[1:2]}"
    try:
        record = decode(data)
    except ValueError as error:
        return weight_of(name, "state"), f"unknown: {error}", "-"
    if record is None:
        return weight_of(name, "state"), "unknown: no record of a layer's feedback", "-"
    return _row(weight_of(name, "state"), record)


def _row(name: str, record: Record) -> tuple[str, str, str]:
    key = record.key
    seed = "-" if key is None else f"key {key.value & (2**64 - 1):016x}" if key.seed is None else str(key.seed)
    return name, str(record), seed
