"""One weight's part of a load_state_dict: whose state a file holds, and whether it is whole."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..feedback import Key, Record, decode
from ..feedback.record import attribute_of, readable, sums_of

if TYPE_CHECKING:
    from .state import StatefulLayer


class Load:
    """Before torch.nn has copied the tensors (the constructor) and after it (`finish`)."""

    def __init__(
        self, layer: "StatefulLayer", name: str, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]
    ) -> None:
        held = layer._held[name]
        self.layer, self.name, self.prefix, self.found = layer, name, prefix, None
        self.errors = len(error_msgs)
        # Some loaders give one tensor at a time, memory that nobody wrote where they have none.
        self.piece = all("feedback_" in key for key in state_dict)
        where = prefix + held.record
        record, key = state_dict.pop(where, None), state_dict.pop(prefix + attribute_of(name, "key"), None)
        if any(t.is_meta for t in (layer._record(held), *layer._kept(held).values())):
            held.unwritten = True
        elif record is not None and not self.piece:
            held.unwritten = False
        held.in_pieces |= held.unwritten and self.piece
        self.given = {n: state_dict[prefix + a] for n, a in held.kept.items() if prefix + a in state_dict}
        # Version 0.1 has no records. A rule that keeps nothing takes plain weights.
        self.complete = record is not None or key is not None or bool(self.given) or not (held.kept or held.key)
        if record is not None and readable(record):
            self._read(record, where, error_msgs)
        elif key is not None and not (isinstance(key, Tensor) and key.is_meta):
            try:
                self.found = Record("", {}, Key.of(key), {})
            except ValueError as error:
                error_msgs.append(f"{prefix}{attribute_of(name, 'key')}: {error}")
        elif self.given and not self.piece:
            # Drawn from a key that is not known.
            self.found = Record("", {}, None, {})
        if len(error_msgs) > self.errors:
            self.found, self.complete = None, True
            for n in self.given:
                del state_dict[prefix + held.kept[n]]

    def _read(self, record: Tensor, where: str, error_msgs: list[str]) -> None:
        try:
            self.found = decode(record)
        except ValueError as error:
            error_msgs.append(
                f"{where}: expected a record as it was saved, got one {error}; average the parameters alone, and leave "
                "what is called feedback_* out of the state_dict to keep this layer's"
            )
            return
        if self.found is None:
            if not self.piece:
                error_msgs.append(f"{where}: expected a record of a layer's feedback, got something else")
        elif why := self.layer._mismatch(self.layer._held[self.name], self.found):
            error_msgs.append(f"{where}: {why}")

    def finish(self, missing_keys: list[str], error_msgs: list[str]) -> None:
        layer, name = self.layer, self.name
        held = layer._held[name]
        if self.complete:
            drop = {self.prefix + held.record}
            if self.found is None and len(error_msgs) > self.errors:
                drop |= {self.prefix + a for a in held.kept.values()}
            missing_keys[:] = [key for key in missing_keys if key not in drop]
        layer._freeze(held)
        if self.found is not None:
            layer._adopt_key(held, self.found.key)
        weight = layer._weight(name)
        if weight.is_meta:
            return
        wanted = layer._kept(held)
        partial = self.found is not None and held.rule.fixed and not wanted.keys() <= self.given.keys()
        if layer._place(name, weight.device) or (partial and not self.piece):
            layer._lose(name, weight)
        elif wanted.keys() <= self.given.keys() and wanted:
            held.lost, held.sums = False, sums_of(held.rule, wanted)
            if self.found is not None:
                try:
                    layer._check_content(name, weight, self.given, self.found.sums)
                except RuntimeError as error:
                    error_msgs.append(str(error))
        layer._settle(name, weight.device)
        if held.unwritten and held.in_pieces:
            # The next call looks again: who loads marks what it had, when it is done.
            held.seen = torch.empty(0, device="meta")
