"""The state of a layer's feedback: how it is drawn, moved, saved and loaded, and how it is told from anything else."""

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.parallel import DistributedDataParallel

from ..backends.reference import checks
from ..backends.reference.philox import LAYOUT_VERSION
from ..feedback import Frozen, Key, Record, Rule, State, Stateful, decode, drawn_key, encode, identity, whole
from ..feedback.record import UNKNOWN, attribute_of, readable, sum_of, sums_of
from .agree import agree
from .held import FrozenSigns, Held, draw, in_form_of, kept_by, supported, version_of, writable
from .load import Load

Keys = Callable[[str], Key | Tensor]
_STALE = (
    "feedback: the state of a layer was replaced since its last call, by something else than load_state_dict or a "
    "move; call the model once without torch.compile, which reads it"
)


class StatefulLayer(torch.nn.Module):
    """Keeps a rule's state. For the weight called `weight` it is

    * `feedback_state`, a uint8 buffer, the record of rule, key and content that a state_dict carries. It is written at
      a save and read at a load or where it was replaced; a call goes by the integers that it stands for;
    * `feedback_<name>`, what the rule keeps as <name>: a buffer (`feedback_signs`, `feedback_scale`), or a Parameter
      (`feedback_weight`) that is never trained, or by W's own gradient (`kp`);

    and `in_proj_feedback_state` and so on for `in_proj_weight`. Back-propagation keeps nothing.
    """

    _feedback: Stateful
    _held: dict[str, Held]
    # Set by frozen_signs: packed signs of each weight, until the block ends.
    _frozen: FrozenSigns | None = None
    _REMEDY = "convert_ with this rule"
    # The names that convert_ told DistributedDataParallel to leave alone, and this layer's among them.
    _ignored: tuple[list[str], list[str]] | None = None

    def weights(self) -> list[str]:
        """Names of the weights that have a B."""
        return ["weight"]

    def weight_of(self, name: str = "weight") -> Tensor:
        """W of weight `name`, as the product has it: (out, in) of a linear map."""
        weight = self._parameters.get(name)
        return getattr(self, name) if weight is None else weight

    @property
    def uses_feedback(self) -> bool:
        """Whether B is anything but W."""
        return not self._feedback.transports_weight

    # Drawing.

    def install_feedback(self, rule: Any, key: Keys | None = None) -> None:
        """Make `rule` the layer's, with fresh state as in `reset_feedback`: wholly, or an error changes nothing."""
        with writable():
            rules = {name: rule.of(name) for name in self.weights()}
            made = {
                name: self._made(own, name, self._weight(name), key)
                for name, own in rules.items()
                if not own.transports_weight
            }
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
        kept = kept_by(rule, weight)
        attributes = {n: attribute_of(name, n) for n in kept}
        held = Held(rule, self._constants(rule, name), attributes, attribute_of(name, "state"))
        for n, tensor in kept.items():
            if isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad:
                if getattr(type(rule), "learning", Rule.learning) is Rule.learning:
                    checks.shape(f"{type(rule).__name__}.state: {n!r}, a trained Parameter", tensor, weight.shape)
                if held.trained:
                    checks.fail(f"{type(rule).__name__}.state", "one trained Parameter", "more")
                held.trained = held.kept[n]
        if rule.keyed:
            held.key = Key.of(drawn_key() if key is None else key(name))
        draw(held, kept, weight)
        return held, {held.kept[n]: tensor for n, tensor in kept.items()}

    def _constants(self, rule: Any, name: str) -> State:
        # What the rule is given beside what it keeps.
        return {}

    def _identity(self, rule: Stateful) -> tuple[str, dict[str, Any]]:
        return identity(rule)

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
        with writable():
            for name, held in self._held.items():
                if held.rule.keyed:
                    held.key = Key.of(drawn_key() if key is None else key(name))
                    if key is None:
                        # Each rank has drawn its own, which they are to agree on again.
                        self._broadcast_again()
                        self._held[name] = replace(held)
                weight = self._weight(name)
                # Draws are of the whole, which every rank of a sharded weight forms.
                self._draw_again(name, whole(weight))

    def _draw_again(self, name: str, weight: Tensor) -> None:
        self._place(name, weight.device)
        held = self._held[name]
        draw(held, self._kept(held), weight)
        self._settle(name, weight.device)

    def _lose(self, name: str, weight: Tensor) -> None:
        # What is kept is memory that nobody wrote.
        held = self._held[name]
        if held.rule.keyed and not held.rule.initial and held.key is not None:
            self._draw_again(name, weight)
        else:
            held.lost = bool(self._kept(held))

    def _place(self, name: str, device: torch.device) -> bool:
        # Brings what is kept to `device`, to be written there; whether some of it had no content to bring.
        empty, held = False, self._held[name]
        for n, tensor in self._kept(held).items():
            if tensor.device == device and version_of(tensor) >= 0:
                continue
            old = tensor.detach()
            empty |= old.is_meta and device.type != "meta"
            content = torch.empty_like(old, device=device) if old.is_meta else old.to(device, copy=True)
            moved = in_form_of(tensor, content)
            if isinstance(tensor, torch.nn.Parameter):
                # The optimizer may have it already.
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
        return self.weight_of(name).detach()

    def _record(self, held: Held) -> Tensor:
        record = self._buffers[held.record]
        assert record is not None
        return record

    def _kept(self, held: Held) -> dict[str, Tensor]:
        return {n: getattr(self, attribute) for n, attribute in held.kept.items()}

    def _settle(self, name: str, device: torch.device) -> None:
        # Writes, on `device`, the record, and the key as the ops read it.
        held = self._held[name]
        if held.rule.seeded and held.key is not None:
            old = held.constants.get("key")
            if old is None or old.device != device or held.given != held.key[:2]:
                held.constants, held.given = held.constants | {"key": held.key.tensor(device)}, held.key[:2]
        sums = held.sums | sums_of(held.rule, self._kept(held), torch.nn.Parameter)
        record = encode(Record(*self._identity(held.rule), held.key, sums), device)
        self._overwrite(held.record, torch.zeros_like(record) if held.lost else record)
        held.seen = self._record(held)
        held.version = version_of(held.seen)

    def _write(self, name: str) -> None:
        # Before a save or a move.
        held = self._held[name]
        record = self._record(held)
        if readable(record):
            sums = sums_of(held.rule, self._kept(held))
            if held.was_written(record):
                self._read_record(name)
                held.doubted = sums != held.sums
            elif sums != held.sums and not held.doubted:
                # Written through .data, the content is what calls have used.
                held.sums, held.key = sums, held.key if held.rule.seeded else None
            self._settle(name, record.device)

    def _overwrite(self, attribute: str, content: Tensor) -> None:
        buffer = self._buffers.get(attribute)
        if buffer is None or version_of(buffer) < 0 or not _alike(buffer, content):
            # With what loaders have marked it by.
            vars(content).update({} if buffer is None else vars(buffer))
            self._buffers[attribute] = content
        else:
            buffer.copy_(content)

    # Use.

    def _state(self, name: str, weight: Tensor) -> State:
        # What the rule takes in a call.
        held = self._held[name]
        state = held.constants
        if held.kept or "key" in state:
            if DistributedDataParallel._active_ddp_module is not None:
                agree() if is_compiling() else agree(held)
                state = held.constants
            buffers = self._buffers
            record: Any = buffers[held.record]
            stale = False
            if held.seen is not None:
                # torch.compile cannot read a version.
                stale = record is not held.seen or not (is_compiling() or version_of(record) == held.version)
            device = weight.device
            stale = stale or ("key" in state and state["key"].device != device)
            state = state.copy()
            for n, attribute in held.kept.items():
                tensor: Any = buffers.get(attribute)
                if tensor is None:
                    tensor = self._parameters[attribute]
                stale = stale or tensor.device != device
                state[n] = tensor
            if stale:
                self._look_again(name, weight)
                state = held.constants | self._kept(held)
            if held.lost:
                raise RuntimeError(
                    f"the feedback state of {self.called(name)} was lost, by to_empty() or a load without it: "
                    "call reset_feedback() or reset_parameters(), convert_ the model again, or load a state_dict"
                )
        if self._frozen is not None:
            state = {**state, "frozen": self._frozen.signs.get(name)}
        return state

    def look_again(self, name: str) -> None:
        """Read the record of weight `name` if someone replaced or wrote it."""
        held = self._held[name]
        record = self._record(held)
        if readable(record) and held.was_written(record):
            self._notice(name, self._weight(name))

    def _look_again(self, name: str, weight: Tensor) -> None:
        if is_compiling():
            raise RuntimeError(_STALE)
        # What torch.compile left to run as it is, it looks into again.
        notice = torch.compiler.disable(self._notice) if "torch._dynamo" in sys.modules else self._notice
        notice(name, weight)

    @property
    def feedback_key(self) -> Tensor | None:
        """(layout version, key, 0) as the ops read it, of a rule that is seeded, for the layer's first weight."""
        held = next(iter(self._held.values()), None)
        return None if held is None else held.constants.get("key")

    # Identity.

    def called(self, name: str) -> str:
        """How errors name weight `name`."""
        held = self._held[name]
        return f"{held.path or (held.key.name if held.key and held.key.name else name)} of {self}"

    def feedback_record(self, name: str = "weight") -> Record:
        """What identifies the feedback of weight `name`: the rule's class and fields, and the key."""
        held = self._held[name]
        return Record(*self._identity(held.rule), held.key, held.sums)

    def _mismatch(self, held: Held, found: Record) -> str:
        # Why `found` is not of this weight's rule, if it is not.
        own = Record(*self._identity(held.rule), None, {})
        if (found.rule, found.fields) == (own.rule, own.fields):
            if found.key is None:
                return "expected a key, got none" if held.rule.seeded else ""
            known = 1 <= found.key.version <= LAYOUT_VERSION
            return "" if known else f"expected a layout version up to {LAYOUT_VERSION}, got {found.key.version}"
        return f"expected the state of {own}, got that of {found}: {self._REMEDY} to go on with it"

    def _notice(self, name: str, weight: Tensor) -> None:
        # Someone replaced or wrote the record, or what is kept is not where the weight is.
        with writable():
            held = self._held[name]
            written = self._read_record(name)
            if self._place(name, weight.device) or not written:
                self._lose(name, weight)
            else:
                buffers = {n: self._buffers.get(a) for n, a in held.kept.items()}
                self._check_content(name, weight, buffers, held.sums)
            self._settle(name, weight.device)

    def _read_record(self, name: str) -> bool:
        # Takes what the record says; False where nobody ever wrote it. Integers that went through an average say
        # nothing: those of the layer hold.
        held = self._held[name]
        record = self._record(held)
        if not readable(record):
            return True
        # transformers fills what a checkpoint lacks with memory that may be another layer's record.
        unwritten = held.unwritten or (held.seen is not None and held.seen.is_meta)
        held.unwritten = held.in_pieces = False
        if unwritten and "_is_hf_initialized" in vars(self) and not hasattr(record, "_is_hf_initialized"):
            return False
        try:
            found = decode(record)
        except ValueError:
            return True
        if found is None:
            # What is written in place is never memory that nobody wrote.
            return record is held.seen
        if why := self._mismatch(held, found):
            raise RuntimeError(f"{self.called(name)}: {why}")
        self._adopt_key(held, found.key)
        held.sums |= {n: found.sums[n] for n in held.sums.keys() & found.sums.keys()}
        return True

    def _adopt_key(self, held: Held, key: Key | None) -> None:
        held.key = key
        if note := "" if key is None else held.rule.outdated(key):
            warnings.warn(note, stacklevel=2)

    def _check_content(
        self, name: str, weight: Tensor, tensors: dict[str, Tensor | None], sums: dict[str, str]
    ) -> None:
        # Raises RuntimeError where a tensor is not what `sums` say and the key draws nothing near it.
        held, rule = self._held[name], self._held[name].rule
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
        with writable():
            marks = {name: self._mark(name) for name in vars(self).get("_held", {})}
        try:
            return super()._apply(fn, recurse)
        finally:
            with writable():
                for name, (mark, integers) in marks.items():
                    self._moved(name, mark, integers)

    def _mark(self, name: str) -> tuple[list[int], dict[str, torch.dtype]]:
        # Something in the record that memory which nobody wrote, a record's of before for one, does not have.
        held, mark = self._held[name], list(os.urandom(16))
        integers = {n: t.dtype for n, t in self._kept(held).items() if not t.is_floating_point()}
        if not readable(self._record(held)):
            return [], integers
        self._write(name)
        record = self._record(held)
        record[:16] = torch.tensor(mark, dtype=torch.uint8, device=record.device)
        return mark, integers

    def _moved(self, name: str, mark: list[int], integers: dict[str, torch.dtype]) -> None:
        held = self._held[name]
        self._freeze(held)
        record, weight = self._record(held), self._weight(name)
        held.seen, held.version = record, version_of(record)
        if not readable(record):
            return
        for n, dtype in integers.items():
            # What casts every buffer, as type() does, casts integers too.
            if (tensor := self._kept(held)[n]).dtype != dtype:
                self._set(held.kept[n], tensor.to(dtype))
        if not weight.is_meta and self._place(name, weight.device) | (record[:16].tolist() != mark):
            self._lose(name, weight)
        self._settle(name, weight.device if not weight.is_meta else record.device)

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

    def share_feedback(self, name: str, other: "StatefulLayer", its: str) -> None:
        """Take the very state tensors that `other` has for its weight `its`, which is weight `name` of this layer."""
        held, theirs = self._held[name], other._held[its]
        for n, attribute in held.kept.items():
            self._set(attribute, getattr(other, theirs.kept[n]))
        self._set(held.record, getattr(other, theirs.record))
        self._held[name] = replace(theirs, kept=held.kept, record=held.record, trained=held.trained)

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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_plans" in state:
            with writable():
                self._upgrade()
        for held in self._held.values():
            self._freeze(held)

    def _upgrade(self) -> None:
        # A pickle of version 0.1.
        lost = [vars(self).pop(attribute, False) for attribute in ("_plans", "_state_lost")][1]
        self._held = {}
        for name in self.weights() if self.uses_feedback else ():
            attributes = {n: attribute_of(name, n) for n in ("weight", "signs", "scale")}
            kept = {n: a for n, a in attributes.items() if getattr(self, a, None) is not None}
            key = self._buffers.pop(attribute_of(name, "key"), None)
            constants = self._constants(self._feedback, name)
            held = self._held[name] = Held(self._feedback, constants, kept, attribute_of(name, "state"))
            if key is not None:
                held.key = Key.of(key)
            held.sums, held.lost = sums_of(held.rule, self._kept(held)), lost
            held.trained = next((kept[n] for n, t in self._kept(held).items() if t.requires_grad), "")
            self._settle(name, self._weight(name).device)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with writable():
            for name in self._held:
                self._write(name)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A class of another library may save only what it knows.
        for held in self._held.values():
            for attribute in (held.record, *held.kept.values()):
                tensor: Tensor = getattr(self, attribute)
                destination.setdefault(prefix + attribute, tensor if keep_vars else tensor.detach())

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
        loads = [Load(self, name, state_dict, prefix, error_msgs) for name in self._held]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        with writable():
            for load in loads:
                load.finish(missing_keys, error_msgs)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
