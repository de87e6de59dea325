"""What identifies a layer's feedback: its key, and the record of rule, key and content that a state_dict carries."""

import hashlib
import json
import math
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import ops
from ..backends.reference import checks
from ..backends.reference.philox import LAYOUT_VERSION


class Key(NamedTuple):
    """The key of a layer's draws: layout version and 64 bits, and what these were derived from, where they were."""

    version: int
    value: int
    seed: int | None = None
    name: str = ""

    @classmethod
    def of(cls, key: "Key | Tensor") -> "Key":
        """The key that (layout version, key, stream) stands for; ValueError for another layout."""
        if isinstance(key, Key):
            return key
        if not isinstance(key, Tensor):
            raise ValueError(f"expected a tensor (layout version, key, stream), got {type(key).__name__}")
        if key.shape != (3,) or int(key[0]) not in range(1, LAYOUT_VERSION + 1):
            raise ValueError(f"expected (layout version up to {LAYOUT_VERSION}, key, stream), got {key.tolist()}")
        return cls(int(key[0]), int(key[1]))

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """(version, key, stream 0) as the ops take it."""
        return torch.tensor([self.version, self.value, 0], dtype=torch.int64, device=device)


def derived_key(seed: int, name: str = "") -> Key:
    """The key of the layer called `name` under `seed`, the same on every machine.

    Raises TypeError for a seed that is no integer and a name that is no string.
    """
    seed = checks.integer("seed", seed)
    checks.instance("name", name, str, "a string")
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return Key(LAYOUT_VERSION, int.from_bytes(digest, "little", signed=True), seed, name)


def drawn_key() -> Key:
    """A key drawn from torch's default generator, as torch.nn's initialisers draw."""
    with _disable_current_modes():
        return Key(LAYOUT_VERSION, int(torch.randint(2**63 - 1, (), device="cpu")))


def feedback_key(seed: int, name: str = "") -> Tensor:
    """`derived_key` as the ops take it: (layout version, key, stream 0)."""
    return derived_key(seed, name).tensor()


class Frozen(torch.nn.Parameter):
    """A Parameter that is never trained: what unfreezes a model's parameters leaves it as it is.

    A Parameter and no buffer, since data-parallel wrappers shard Parameters and broadcast buffers at each forward.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> "Frozen":
        return super().__new__(cls, data.detach(), requires_grad=False)

    @staticmethod
    def freeze(parameter: torch.nn.Parameter) -> None:
        """Make `parameter`, which optimizers may have already, one of these."""
        parameter.requires_grad_(False).grad = None
        parameter.__class__ = Frozen

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        pass

    def requires_grad_(self, requires_grad: bool = True) -> "Frozen":
        return self


class Record(NamedTuple):
    """Of one weight: the rule's class and fields, the key, and the sum of each tensor that stays as it was drawn."""

    rule: str
    fields: dict[str, Any]
    key: Key | None
    sums: dict[str, str]

    def __str__(self) -> str:
        return f"{self.rule}({', '.join(f'{name}={value!r}' for name, value in self.fields.items())})"


# The digest tells a record from memory that nobody wrote; the first bytes tell that from a record that was altered.
_MAGIC = b"bkfs"
_DIGEST = 8


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=_DIGEST).digest()


def encode(record: Record, device: torch.device | str = "cpu") -> Tensor:
    """`record` as uint8, in a multiple of 64 bytes."""
    key = record.key
    content: dict[str, Any] = {"rule": record.rule, "fields": record.fields, "sums": record.sums}
    if key is not None:
        content["key"] = [key.version, f"{key.value & (2**64 - 1):016x}", key.seed, key.name]
    text = json.dumps(content, separators=(",", ":"), default=repr).encode()
    # Few lengths, since some loaders write into the buffer that is there.
    text += b" " * (-(len(_MAGIC) + len(text) + _DIGEST) % 64)
    return torch.tensor(list(_MAGIC + text + _digest(text)), dtype=torch.uint8, device=device)


def decode(data: Tensor) -> Record | None:
    """The record in `data`, or None where there never was one.

    The floats of an average of equal records are taken as the integers next to them. Raises ValueError for a record
    that was altered.
    """
    if data.is_complex():
        return None
    numbers = data.detach().flatten().tolist()
    if not all(math.isfinite(x) and -1 < x < 256 for x in numbers):
        return None
    found = bytes(min(max(round(x), 0), 255) for x in numbers)
    text = found[len(_MAGIC) : -_DIGEST]
    if found != _MAGIC + text + _digest(text):
        # An average of integers that is cut off is one too low.
        if len(found) > len(_MAGIC) and all(abs(a - b) <= 1 for a, b in zip(_MAGIC, found, strict=False)):
            raise ValueError("altered since it was written, by an average of integers or a damaged file")
        return None
    try:
        content = json.loads(text)
        version, value, seed, name = content.get("key", (0, "0", None, ""))
        key = Key(version, int.from_bytes(bytes.fromhex(value.zfill(16)), signed=True), seed, name)
        record = Record(content["rule"], content["fields"], key if version else None, content["sums"])
        good = isinstance(record.rule, str) and isinstance(record.fields, dict) and isinstance(record.sums, dict)
        named = isinstance(version, int) and isinstance(name, str) and (seed is None or isinstance(seed, int))
        return record if good and named else None
    except (AttributeError, KeyError, TypeError, ValueError):
        return None  # whole, and none of ours


def attribute_of(name: str, kept: str) -> str:
    """What a layer calls what it keeps for weight `name`.

    feedback_signs; in_proj_feedback_signs for in_proj_weight, ih_l0_feedback_signs for weight_ih_l0.
    """
    if name.startswith("weight_"):
        return f"{name.removeprefix('weight_')}_feedback_{kept}"
    return f"{name.removesuffix('weight')}feedback_{kept}"


_RECURRENT = re.compile(r"(.*\.)?((?:ih|hh|hr)(?:_l\d+(?:_reverse)?)?)_")


def weight_of(attribute: str, kept: str) -> str:
    """The weight for which `attribute`, with what comes before it in a state_dict, is what a layer keeps."""
    stem = attribute.removesuffix(f"feedback_{kept}")
    found = _RECURRENT.fullmatch(stem)
    return f"{found[1] or ''}weight_{found[2]}" if found else f"{stem}weight"


def readable(tensor: Tensor | None) -> bool:
    """Whether the content is here: not on the meta device, sharded, or a stand-in of a tracer."""
    return tensor is not None and not tensor.is_meta and type(tensor) in (Tensor, torch.nn.Parameter, Frozen)


# The sum of what is not readable.
UNKNOWN = "0" * 16


def sum_of(tensor: Tensor) -> str:
    """A sum over all elements' bits and their logical indices, the same on every device and in every memory format."""
    if not readable(tensor):
        return UNKNOWN
    bits = tensor.detach()
    if bits.dtype not in checks.DTYPES:
        raw = bits.contiguous().flatten().view(torch.uint8)
        bits = torch.nn.functional.pad(raw, (0, -len(raw) % 4)).view(torch.float32)
    total = ops.redraw_key(Key(LAYOUT_VERSION, 0).tensor(bits.device), bits)[2]
    return f"{int(total) & (2**64 - 1):016x}"


def sums_of(rule: Any, kept: dict[str, Tensor], kind: type[Tensor] = Tensor) -> dict[str, str]:
    """Of what `rule` keeps and never changes: the integers', or of kind Parameter those', as they are when saved.

    The floats of a buffer have none, since an average may round them.
    """
    fixed = {n: t for n, t in kept.items() if isinstance(t, kind) and (kind is not Tensor or not t.is_floating_point())}
    return {n: sum_of(t) for n, t in fixed.items()} if rule.fixed else {}
