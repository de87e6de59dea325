"""The state of a layer's feedback: how it is drawn, moved, saved and loaded, and how it is told from anything else."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..backends.reference import checks
from ..backends.reference.philox import LAYOUT_VERSION
from ..feedback import Frozen, Key, Record, State, Stateful, decode, drawn_key, encode, fill
from ..feedback.record import UNKNOWN, attribute_of, readable, sum_of, sums_of
from .load import Load

Keys = Callable[[str], Key | Tensor]
_STALE = (
    "feedback: the state of a layer was replaced since its last call, by something else than load_state_dict or a "
    "move; call the model once without torch.compile, which reads it"
)
_TAKEN = ("key", "state", "rms", "frozen")


def supported(weight: Tensor) -> bool:
    """Whether a rule other than back-propagation can take `weight`."""
    return weight.dtype in checks.DTYPES


@contextmanager
def _writable() -> Iterator[None]:
    # What is made in inference mode could be neither saved for a backward nor written later.
    with torch.inference_mode(False), torch.no_grad():
        yield


@dataclass
class Held:
    """Of one weight: what is known of its feedback beside the tensors that the layer registers."""

    constants: State
    # The attributes of what the rule keeps, by the rule's names for them; "key" is among them if the rule is seeded.
    kept: dict[str, str]
    record: str
    key: Key | None = None
    shape: torch.Size | None = None
    path: str = ""
    # The Parameter that takes the weight's gradient.
    trained: str = ""
    # The sums of buffers that stay as they were drawn.
    sums: dict[str, str] = field(default_factory=dict)
    # The record's buffer as it was last read or written; None in a replica of DataParallel, which asks nothing.
    seen: Tensor | None = None
    # Its version then; -1 where writes are DistributedDataParallel's, which sends the same at each forward.
    version: int = 0
    # Whether a kept tensor is memory that nobody wrote, and no key can draw it.
    lost: bool = False


class StatefulLayer(torch.nn.Module):
    """Keeps a rule's state. For the weight called `weight` it is

    * `feedback_state`, a uint8 buffer, the record of rule, key and content that a state_dict carries. It is written at
      a save and read at a load or where it was replaced; a call goes by the integers that it stands for;
    * `feedback_<name>`, what the rule keeps as <name>: a buffer (`feedback_signs`, `feedback_scale`), or a Parameter
      (`feedback_weight`) that is never trained, or by W's own gradient (`kp`);
    * `feedback_key`, of a seeded rule the key as the ops read it, in no state_dict;

    and `in_proj_feedback_state` and so on for `in_proj_weight`. Back-propagation keeps nothing.
    """

    _feedback: Stateful
    _held: dict[str, Held]
    # Set by frozen_signs: packed signs of each weight, until the block ends.
    _frozen: dict[str, Tensor] | None = None
    # The names that convert_ told DistributedDataParallel to leave alone, and this layer's among them.
    _ignored: tuple[list[str], list[str]] | None = None

    def weights(self) -> list[str]:
        """Names of the weights that have a B."""
        return ["weight"]

    @property
    def uses_feedback(self) -> bool:
        """Whether B is anything but W."""
        return not self._feedback.transports_weight

    # Drawing.

    def install_feedback(self, rule: Any, key: Keys | None = None) -> None:
        """Make `rule` the layer's, with fresh state as in `reset_feedback`: wholly, or an error changes nothing."""
        with _writable():
            names = [] if rule.transports_weight else self.weights()
            made = {name: self._made(rule, name, self._weight(name), key) for name in names}
            self.remove_feedback()
            self._feedback, self._held = rule, {}
            for name, (held, tensors) in made.items():
                for attribute, tensor in tensors.items():
                    if isinstance(tensor, torch.nn.Parameter):
                        self.register_parameter(attribute, tensor)
                    else:
                        self.register_buffer(attribute, tensor)
                self._held[name] = held
                self._settle(name, self._weight(name).device)

    def _made(self, rule: Stateful, name: str, weight: Tensor, key: Keys | None) -> tuple[Held, dict[str, Tensor]]:
        if not supported(weight):
            raise TypeError(f"feedback: {rule.name!r} takes a floating weight, got {name} of {weight.dtype}")
        kept = rule.state(weight)
        for own in kept:
            if own in _TAKEN or not own.isidentifier():
                raise ValueError(f"{type(rule).__name__}.state: expected names other than {_TAKEN}, got {own!r}")
        held = Held(self._constants(rule, name), {n: attribute_of(name, n) for n in kept}, attribute_of(name, "state"))
        for n, tensor in kept.items():
            if isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad:
                checks.shape(f"{type(rule).__name__}.state: {n!r}, a trained Parameter", tensor, weight.shape)
                held.trained = held.kept[n]
        if rule.keyed:
            held.key = Key.of(drawn_key() if key is None else key(name))
        _draw(rule, held, kept, weight)
        tensors = {held.kept[n]: tensor for n, tensor in kept.items()}
        if rule.seeded:
            held.kept["key"] = attribute_of(name, "key")
        return held, tensors

    def _constants(self, rule: Any, name: str) -> State:
        # What the rule is given beside what it keeps.
        return {}

    def _identity(self, rule: Stateful) -> tuple[str, dict[str, Any]]:
        # As a file gives them back.
        return type(rule).__name__, json.loads(json.dumps(vars(rule), default=repr))

    def remove_feedback(self) -> None:
        """Forget the rule, and delete what it keeps."""
        self._broadcast_again()
        for held in vars(self).get("_held", {}).values():
            for attribute in (*held.kept.values(), held.record):
                if attribute in self._buffers or attribute in self._parameters:
                    delattr(self, attribute)
        for attribute in ("_feedback", "_held", "_frozen"):
            vars(self).pop(attribute, None)

    def reset_feedback(self, key: Keys | None = None) -> None:
        """Draw the state again, in place: from `key(weight name)`, or from torch's generator as torch.nn draws."""
        with _writable():
            for name, held in self._held.items():
                if self._feedback.keyed:
                    held.key = Key.of(drawn_key() if key is None else key(name))
                    if key is None:
                        # Each rank has drawn its own.
                        self._broadcast_again()
                self._draw_again(name, self._weight(name))

    def _draw_again(self, name: str, weight: Tensor) -> None:
        self._place(name, weight.device)
        held = self._held[name]
        _draw(self._feedback, held, self._kept(held), weight)
        self._settle(name, weight.device)

    def _lose(self, name: str, weight: Tensor) -> None:
        # What is kept is memory that nobody wrote.
        rule, held = self._feedback, self._held[name]
        if rule.keyed and not rule.initial and held.key is not None:
            self._draw_again(name, weight)
        else:
            held.lost = bool(self._kept(held))

    def _place(self, name: str, device: torch.device) -> bool:
        # Brings what is kept to `device`; whether some of it had no content to bring.
        empty, held = False, self._held[name]
        for n, tensor in self._kept(held).items():
            if tensor.device == device:
                continue
            empty |= tensor.is_meta
            moved = torch.empty_like(tensor.detach(), device=device) if tensor.is_meta else tensor.detach().to(device)
            if isinstance(tensor, torch.nn.Parameter):
                # The optimizer may have it already.
                moved = torch.nn.Parameter(moved) if tensor.requires_grad else Frozen(moved)
                try:
                    torch.utils.swap_tensors(tensor, moved)
                    continue
                except RuntimeError:  # something refers to it weakly
                    pass
            self._set(held.kept[n], moved)
        return empty

    def _set(self, attribute: str, tensor: Tensor) -> None:
        # Where the attribute may be a Parameter or a buffer.
        registered: dict[str, Any] = self._parameters if attribute in self._parameters else self._buffers
        registered[attribute] = tensor

    def _weight(self, name: str) -> Tensor:
        # Without what a parametrization would compute.
        weight = self._parameters.get(name)
        return (getattr(self, name) if weight is None else weight).detach()

    def _record(self, held: Held) -> Tensor:
        record = self._buffers[held.record]
        assert record is not None
        return record

    def _kept(self, held: Held) -> dict[str, Tensor]:
        return {n: getattr(self, attribute) for n, attribute in held.kept.items() if n != "key"}

    def _settle(self, name: str, device: torch.device) -> None:
        # Writes, on `device`, the record, and the key as the ops read it.
        held = self._held[name]
        if "key" in held.kept:
            assert held.key is not None
            self._overwrite(held.kept["key"], held.key.tensor(device))
            self._non_persistent_buffers_set.add(held.kept["key"])
        sums = held.sums | sums_of(self._feedback, self._kept(held), torch.nn.Parameter)
        record = encode(Record(*self._identity(self._feedback), held.key, sums), device)
        self._overwrite(held.record, torch.zeros_like(record) if held.lost else record)
        held.seen = self._record(held)
        held.version = held.seen._version

    def _write(self, name: str) -> None:
        # Before a save or a move.
        held = self._held[name]
        record = self._record(held)
        if readable(record):
            if record is not held.seen or record._version != held.version:
                self._read_record(name)
            self._settle(name, record.device)

    def _overwrite(self, attribute: str, content: Tensor) -> None:
        buffer = self._buffers.get(attribute)
        if buffer is None or buffer.is_inference() or not _alike(buffer, content):
            self._buffers[attribute] = content
        else:
            buffer.copy_(content)

    # Use.

    def _state(self, name: str, weight: Tensor) -> State:
        # What the rule takes in a call.
        held = self._held[name]
        state = held.constants
        if held.kept:
            buffers = self._buffers
            record: Any = buffers[held.record]
            stale = record is not held.seen and held.seen is not None
            if not is_compiling():
                # torch.compile cannot read a version.
                stale = stale or (held.version >= 0 and record._version != held.version)
            state, device = state.copy(), weight.device
            for n, attribute in held.kept.items():
                tensor: Any = buffers.get(attribute)
                if tensor is None:
                    tensor = self._parameters[attribute]
                stale = stale or tensor.device != device
                state[n] = tensor
            if stale:
                self._look_again(name, weight)
                state |= {n: getattr(self, attribute) for n, attribute in held.kept.items()}
            if held.lost:
                raise RuntimeError(
                    f"the feedback state of {self.called(name)} was lost, by to_empty() or a load without it: "
                    "call reset_feedback() or reset_parameters(), convert_ the model again, or load a state_dict"
                )
        if self._frozen is not None:
            state = {**state, "frozen": self._frozen.get(name)}
        return state

    def _look_again(self, name: str, weight: Tensor) -> None:
        if is_compiling():
            raise RuntimeError(_STALE)
        # What torch.compile left to run as it is, it looks into again.
        notice = torch.compiler.disable(self._notice) if "torch._dynamo" in sys.modules else self._notice
        notice(name, weight)

    # Identity.

    def called(self, name: str) -> str:
        """How errors name weight `name`."""
        held = self._held[name]
        return f"{held.path or (held.key.name if held.key and held.key.name else name)} of {self}"

    def feedback_record(self, name: str = "weight") -> Record:
        """What identifies the feedback of weight `name`: the rule's class and fields, and the key."""
        held = self._held[name]
        return Record(*self._identity(self._feedback), held.key, held.sums)

    def _mismatch(self, found: Record) -> str:
        # Why `found` is not of this layer's rule, if it is not.
        own = Record(*self._identity(self._feedback), None, {})
        if (found.rule, found.fields) == (own.rule, own.fields):
            return "expected a key, got none" if self._feedback.seeded and found.key is None else ""
        return f"expected the state of {own}, got that of {found}: convert_ with this rule to go on with it"

    def _notice(self, name: str, weight: Tensor) -> None:
        # Someone replaced or wrote the record, or what is kept is not where the weight is.
        with _writable():
            held = self._held[name]
            written = self._read_record(name)
            if self._place(name, weight.device) or not written:
                self._lose(name, weight)
            else:
                buffers = {n: self._buffers.get(a) for n, a in held.kept.items()}
                self._check_content(name, weight, buffers, held.sums)
            self._settle(name, weight.device)
            if written and torch.distributed.is_available() and torch.distributed.is_initialized():
                held.version = -1

    def _read_record(self, name: str) -> bool:
        # Takes what the record says; False where nobody ever wrote it. Integers that went through an average say
        # nothing: those of the layer hold.
        held = self._held[name]
        record = self._record(held)
        if not readable(record):
            return True
        # transformers fills what a checkpoint lacks with memory that may be another layer's record.
        filled = held.seen is not None and held.seen.is_meta and "_is_hf_initialized" in vars(self)
        if filled and not hasattr(record, "_is_hf_initialized"):
            return False
        try:
            found = decode(record)
        except ValueError:
            return True
        if found is None:
            # What is written in place is never memory that nobody wrote.
            return record is held.seen
        if why := self._mismatch(found):
            raise RuntimeError(f"{self.called(name)}: {why}")
        self._adopt_key(held, found.key)
        held.sums |= {n: found.sums[n] for n in held.sums.keys() & found.sums.keys()}
        return True

    def _adopt_key(self, held: Held, key: Key | None) -> None:
        held.key = key
        if note := "" if key is None else self._feedback.outdated(key):
            warnings.warn(note, stacklevel=2)

    def _check_content(
        self, name: str, weight: Tensor, tensors: dict[str, Tensor | None], sums: dict[str, str]
    ) -> None:
        # Raises RuntimeError where a tensor is not what `sums` say and the key draws nothing near it.
        held, rule = self._held[name], self._feedback
        for n, wanted in sums.items():
            tensor = tensors.get(n)
            if tensor is None or wanted == UNKNOWN or sum_of(tensor) in (wanted, UNKNOWN):
                continue
            if not rule.keyed or rule.initial or held.key is None:
                break
            loaded = tensor.detach().clone()
            self._draw_again(name, weight)
            drawn = self._kept(held)[n].to(loaded)
            # An average or a cast of what never changes: the draw itself is what it was.
            if loaded.is_floating_point() and not torch.allclose(loaded, drawn, rtol=1e-2, atol=1e-3 * _largest(drawn)):
                break
        else:
            return
        raise RuntimeError(
            f"{self.called(name)}: {held.kept[n]} is not what was saved, as after an average of "
            "integers or other damage; load it from a state_dict that was not averaged, reset_feedback(), or convert_ "
            "the model again"
        )

    # Moves, copies, files.

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with _writable():
            marks = {name: self._mark(name) for name in vars(self).get("_held", {})}
        try:
            return super()._apply(fn, recurse)
        finally:
            with _writable():
                for name, mark in marks.items():
                    self._moved(name, mark)

    def _mark(self, name: str) -> list[int]:
        # Something in the record that memory which nobody wrote, a record's of before for one, does not have.
        record, mark = self._record(self._held[name]), list(os.urandom(16))
        if not readable(record):
            return []
        self._write(name)
        record = self._record(self._held[name])
        record[:16] = torch.tensor(mark, dtype=torch.uint8, device=record.device)
        return mark

    def _moved(self, name: str, mark: list[int]) -> None:
        held = self._held[name]
        self._freeze(held)
        record, weight = self._record(held), self._weight(name)
        held.seen, held.version = record, record._version
        if not readable(record) or weight.is_meta:
            return
        if record[:16].tolist() != mark or self._place(name, weight.device):
            self._lose(name, weight)
        self._settle(name, weight.device)

    def _freeze(self, held: Held) -> None:
        # What copies and loads make of a Frozen is a plain Parameter.
        for n, tensor in self._kept(held).items():
            if type(tensor) is torch.nn.Parameter and held.kept[n] != held.trained:
                Frozen.freeze(tensor)

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """torch.nn's; what takes the place of a stored B, by a loader's setattr for one, is frozen as that is."""
        super().register_parameter(name, param)
        for held in vars(self).get("_held", {}).values():
            if name in held.kept.values():
                self._freeze(held)

    def share_feedback(self, other: "StatefulLayer") -> None:
        """Take the very state tensors of `other`, a layer that shares this one's weights and has its rule."""
        for name, held in self._held.items():
            if (theirs := other._held.get(name)) is not None:
                for attribute in (*held.kept.values(), held.record):
                    self._set(attribute, getattr(other, attribute))
                self._held[name] = replace(theirs)

    def _broadcast_again(self) -> None:
        if self._ignored is not None:
            every, own = self._ignored
            every[:] = [name for name in every if name not in own]
            del self._ignored

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica._frozen = None
        replica._held = {name: replace(held, seen=None) for name, held in self._held.items()}
        return replica

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_frozen"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_plans" in state:
            with _writable():
                self._upgrade()
        for held in self._held.values():
            self._freeze(held)
            # Where DistributedDataParallel's writes were no news, others' are.
            held.version = max(held.version, 0)

    def _upgrade(self) -> None:
        # A pickle of version 0.1.
        lost = [vars(self).pop(attribute, False) for attribute in ("_plans", "_state_lost")][1]
        self._held = {}
        for name in self.weights() if self.uses_feedback else ():
            attributes = {n: attribute_of(name, n) for n in ("key", "weight", "signs", "scale")}
            kept = {n: a for n, a in attributes.items() if a in self._buffers or a in self._parameters}
            held = self._held[name] = Held(self._constants(self._feedback, name), kept, attribute_of(name, "state"))
            if "key" in kept:
                held.key = Key.of(getattr(self, kept["key"]))
            held.sums, held.lost = sums_of(self._feedback, self._kept(held)), lost
            held.trained = next((kept[n] for n, t in self._kept(held).items() if t.requires_grad), "")
            self._settle(name, self._weight(name).device)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with _writable():
            for name in self._held:
                self._write(name)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Records are read, and not copied; of each weight, what is given of the rest.
        loads = [Load(self, name, state_dict, prefix, strict, error_msgs) for name in self._held]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        with _writable():
            for load in loads:
                load.finish(missing_keys, error_msgs)


def _draw(rule: Stateful, held: Held, kept: dict[str, Tensor], weight: Tensor) -> None:
    if kept:
        if type(rule).draw is Stateful.draw:
            for n, tensor in rule.state(weight).items():
                fill(kept[n], tensor)
        key = held.key or Key(LAYOUT_VERSION, 0)
        rule.draw(held.constants | kept, weight, key.tensor(weight.device))
    held.lost, held.sums, held.shape = False, sums_of(rule, kept), weight.shape


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
