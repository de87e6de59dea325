"""What a layer knows of one weight's feedback, and how a rule fills what it keeps."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backends.reference import checks
from ..backends.reference.philox import LAYOUT_VERSION
from ..feedback import Frozen, Key, State, Stateful, fill
from ..feedback.record import readable, sums_of

_TAKEN = ("key", "state", "rms", "frozen")


def supported(weight: Tensor) -> bool:
    """Whether a rule other than back-propagation can take `weight`."""
    return weight.dtype in checks.DTYPES


@contextmanager
def writable() -> Iterator[None]:
    # What is made in inference mode could be neither saved for a backward nor written later.
    with torch.inference_mode(False), torch.no_grad():
        yield


def version_of(tensor: Tensor) -> int:
    """How often `tensor` was written in place; -1 where torch does not count, and lets no one write it any more.

    Such are tensors made in inference mode, and Parameters that were, whatever a move has made of them since.
    """
    try:
        return tensor._version
    except RuntimeError:
        return -1


@dataclass(eq=False)
class Held:
    """Of one weight: what is known of its feedback beside the tensors that the layer registers."""

    rule: Stateful
    # What a call gives the rule beside what it keeps: "rms", and "key" if the rule is seeded.
    constants: State
    # The attributes of what the rule keeps, by the rule's names for them.
    kept: dict[str, str]
    record: str
    key: Key | None = None
    shape: torch.Size | None = None
    # The weight's name in the model that convert_ was given.
    path: str = ""
    # The Parameter that takes the weight's gradient.
    trained: str = ""
    # The sums of buffers that stay as they were drawn.
    sums: dict[str, str] = field(default_factory=dict)
    # The record's buffer as it was last read or written; None in a replica of DataParallel, which asks nothing.
    seen: Tensor | None = None
    # Its `version_of` then.
    version: int = 0
    # The version and value of constants["key"].
    given: tuple[int, int] | None = None
    # Whether the layer was on the meta device and no record was loaded since.
    unwritten: bool = False
    # Whether something was loaded alone since.
    in_pieces: bool = False
    # Whether what was kept was found to be other than the sums say when it was last saved.
    doubted: bool = False
    # Whether a kept tensor is memory that nobody wrote, and no key can draw it.
    lost: bool = False

    def was_written(self, record: Tensor) -> bool:
        """Whether someone replaced the record, or wrote into it, since it was last read or written."""
        return record is not self.seen or version_of(record) != self.version


@dataclass
class FrozenSigns:
    """Packed signs of each weight. A copy of the layer has none of them, however it is made."""

    signs: dict[str, Tensor]

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


def kept_by(rule: Stateful, weight: Tensor) -> dict[str, Tensor]:
    where, kept = f"{type(rule).__name__}.state", rule.state(weight)
    if not isinstance(kept, dict):
        checks.fail(where, "a dictionary of tensors", type(kept).__name__, TypeError)
    for name, tensor in kept.items():
        if not isinstance(name, str) or name in _TAKEN or not name.isidentifier():
            checks.fail(where, f"names other than {_TAKEN}", repr(name))
        if not isinstance(tensor, Tensor):
            checks.fail(where, f"a tensor as {name!r}", type(tensor).__name__, TypeError)
        if not tensor.is_meta and readable(tensor) and _shares(tensor, weight):
            kept[name] = in_form_of(tensor, tensor.detach().clone())
        if tensor.dim() == 2 and not tensor.is_contiguous():
            # Like a W that another library keeps transposed; FSDP shards no such Parameter.
            kept[name] = in_form_of(tensor, kept[name].detach().contiguous())
    return kept


def in_form_of(tensor: Tensor, content: Tensor) -> Tensor:
    """`content` as `tensor` is registered: a buffer, a Parameter that is never trained, or one that is."""
    if not isinstance(tensor, torch.nn.Parameter):
        return content
    return torch.nn.Parameter(content) if tensor.requires_grad else Frozen(content)


def _shares(tensor: Tensor, weight: Tensor) -> bool:
    return readable(weight) and tensor.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


def draw(held: Held, kept: dict[str, Tensor], weight: Tensor) -> None:
    rule = held.rule
    if kept:
        if type(rule).draw is Stateful.draw:
            for n, tensor in kept_by(rule, weight).items():
                fill(kept[n], tensor)
        key = held.key or Key(LAYOUT_VERSION, 0)
        rule.draw(held.constants | kept, weight, key.tensor(weight.device))
    held.lost, held.sums, held.shape = False, sums_of(rule, kept), weight.shape
