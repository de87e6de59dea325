"""A run's folder: one process at a time, and a checkpoint that is whole or refused.

A checkpoint is MAGIC, the SHA-256 of what follows in hexadecimal digits, a line's end, and what torch.save writes.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

MAGIC = b"bioplaus_kernels recipes checkpoint 1\n"
HOW = "move its folder away to start the run anew"


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder`, made where it is missing. The system lets go when the process ends, however it does.

    Raises RuntimeError where another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"{folder}: another process trains into it; wait for it, or give another --out"
            ) from error
        yield


def save(path: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getvalue()
    write(path, MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


def load(path: Path, advice: str = HOW) -> dict[str, Any]:
    """What `save` was given, on the CPU. Raises ValueError that names the file and ends in `advice` where it is not
    that, whole.
    """
    data = path.read_bytes()
    if not data.startswith(MAGIC):
        raise ValueError(f"{path}: not a checkpoint of recipes; {advice}")
    digest, payload = data[len(MAGIC) : len(MAGIC) + 64], data[len(MAGIC) + 65 :]
    if hashlib.sha256(payload).hexdigest().encode() != digest:
        raise ValueError(f"{path}: damaged, its checksum is another; {advice}")
    try:
        content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        if isinstance(content, dict) and {"rows", "header", "experiment", "model"} <= content.keys():
            return content
    except Exception as error:  # torch.load raises whatever its parsers do
        raise ValueError(f"{path}: torch.load cannot read it; {advice}") from error
    raise ValueError(f"{path}: not a checkpoint of a run; {advice}")


def write(path: Path, content: bytes) -> None:
    """Write the file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
