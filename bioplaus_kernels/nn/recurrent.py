"""Recurrent layers with a rule for the input-to-hidden weights and one for the hidden-to-hidden weights."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map_only

from ..backends.reference import checks
from ..feedback import BACKPROP, Fans, linear_fans
from ..functional import captured, carries, explain, linear_with, recurrent_with
from .base import FeedbackLayer


class _Recurrent(FeedbackLayer):
    # What the sequences and the cells share: a layer in one direction, its weights called weight_ih + suffix and so on.
    mode: str

    def fans(self, name: str = "weight_ih_l0") -> Fans:
        return linear_fans(getattr(self, name))

    def _states(self, hx: Any) -> list[Tensor]:
        # Hidden, and of LSTM cell, if they are given.
        if hx is None:
            return []
        if self.mode == "LSTM":
            return checks.tensors("hx", hx, 2, "states, hidden and cell")
        checks.tensor("hx", hx)
        return [hx]

    def _plain(self, input: Any, *others: Tensor) -> bool:
        checks.tensor("input", input)
        tensors = (input, *others)
        return self.is_plain(next((x for x in tensors if x.requires_grad), tensors[0]))

    def _run(
        self, x: Tensor, states: list[Tensor], batch_sizes: Tensor | None, suffix: str, reverse: bool
    ) -> tuple[Tensor, ...]:
        bias, bias_hh = (getattr(self, f"{name}{suffix}", None) for name in ("bias_ih", "bias_hh"))
        weight, op = self.used(f"weight_ih{suffix}", feedback=x.requires_grad)
        made = linear_with(x, weight, bias, op)
        weight, op = self.used(f"weight_hh{suffix}", feedback=carries(made, batch_sizes, states[0].requires_grad))
        projection, projection_op = None, BACKPROP
        if getattr(self, "proj_size", 0):
            projection, projection_op = self.used(f"weight_hr{suffix}")
        return recurrent_with(
            made, weight, projection, bias_hh, (*states,), batch_sizes, self.mode, reverse, op, projection_op
        )


class _Sequence(_Recurrent):
    # Over torch.nn's RNN, LSTM and GRU.
    def weights(self) -> list[str]:
        return [name for name in cast(Any, self)._flat_weights_names if name.startswith("weight")]

    def forward(self, input: Any, hx: Any = None) -> Any:
        own: Any = self
        packed = isinstance(input, PackedSequence)
        data: Tensor = input.data if packed else input
        batch_sizes: Any = input.batch_sizes if packed else None
        lstm = self.mode == "LSTM"
        given = self._states(hx)
        # DataParallel's replicas have no parameters.
        trained = [*self.parameters()] or [getattr(self, name) for name in own._flat_weights_names]
        # A gradient goes through the states of any step but the first.
        if not self.uses_feedback or self._plain(data, *given, *trained):
            return super().forward(input, hx)
        if captured():
            return tree_map_only(Tensor, Tensor.detach, super().forward(input, hx))
        explain(data, trained[0], None)
        batched = packed or data.dim() == 3
        if not batched and data.dim() != 2:
            checks.fail("input", "3 dimensions, or 2 unbatched", f"shape {tuple(data.shape)}")
        if any(s.dim() != 2 + batched for s in given):
            wanted = f"{2 + batched} dimensions, as the input's"
            checks.fail("hx", wanted, f"shapes {[tuple(s.shape) for s in given]}")
        x = data if batched else data.unsqueeze(0 if own.batch_first else 1)
        if packed:
            batch, given = int(batch_sizes[0]), [_permuted(s, input.sorted_indices) for s in given]
        else:
            batch, given = x.shape[0 if own.batch_first else 1], [s if batched else s.unsqueeze(1) for s in given]
        directions = 1 + own.bidirectional
        if not given:
            sizes = [own.proj_size or own.hidden_size, *[own.hidden_size] * lstm]
            given = [x.new_zeros(own.num_layers * directions, batch, size) for size in sizes]
        own.check_forward_args(x, tuple(given) if lstm else given[0], batch_sizes)
        x = x.transpose(0, 1) if own.batch_first and not packed else x
        if not packed and len(x) == 0:
            checks.fail("input", "a sequence of at least one step", f"shape {tuple(data.shape)}")

        firsts = list(zip(*(s.unbind() for s in given), strict=True))
        lasts: list[tuple[Tensor, ...]] = []
        for k in range(own.num_layers):
            outputs = []
            for direction in range(directions):
                suffix = f"_l{k}{'_reverse' if direction else ''}"
                output, *last = self._run(x, list(firsts[len(lasts)]), batch_sizes, suffix, bool(direction))
                outputs.append(output)
                lasts.append(tuple(last))
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if k < own.num_layers - 1:
                x = F.dropout(x, own.dropout, self.training)
        found = [torch.stack(s) for s in zip(*lasts, strict=True)]
        if packed:
            found = [_permuted(s, input.unsorted_indices) for s in found]
            y: Any = PackedSequence(x, batch_sizes, input.sorted_indices, input.unsorted_indices)
        else:
            y = x.transpose(0, 1) if own.batch_first else x
        if not batched:
            y, found = y.squeeze(0 if own.batch_first else 1), [s.squeeze(1) for s in found]
        return y, tuple(found) if lstm else found[0]


def _permuted(states: Tensor, order: Tensor | None) -> Tensor:
    return states if order is None else states.index_select(1, order)


class RNN(_Sequence, torch.nn.RNN):
    """torch.nn.RNN with B in the place of its weights as gradients go back through layers and time."""


class LSTM(_Sequence, torch.nn.LSTM):
    """torch.nn.LSTM with B in the place of its weights as gradients go back through layers and time."""


class GRU(_Sequence, torch.nn.GRU):
    """torch.nn.GRU with B in the place of its weights as gradients go back through layers and time."""


class _Cell(_Recurrent):
    # Over torch.nn's cells, one step.
    def weights(self) -> list[str]:
        return ["weight_ih", "weight_hh"]

    def fans(self, name: str = "weight_ih") -> Fans:
        return super().fans(name)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        lstm = self.mode == "LSTM"
        given = self._states(hx)
        if not self.uses_feedback or self._plain(input, *given):
            return super().forward(input, hx)
        if captured():
            return tree_map_only(Tensor, Tensor.detach, super().forward(input, hx))
        batched, size = input.dim() == 2, cast(Any, self).hidden_size
        if input.dim() not in (1, 2):
            checks.fail("input", "2 dimensions, or 1 unbatched", f"shape {tuple(input.shape)}")
        x = input if batched else input.unsqueeze(0)
        if not given:
            given = [x.new_zeros(*input.shape[:-1], size)] * (1 + lstm)
        elif any(s.shape != (*input.shape[:-1], size) for s in given):
            wanted = f"shape {(*input.shape[:-1], size)}"
            checks.fail("hx", wanted, f"shapes {[tuple(s.shape) for s in given]}")
        states = [s if batched else s.unsqueeze(0) for s in given]
        _, *last = self._run(x.unsqueeze(0), states, None, "", False)
        found = [s if batched else s.squeeze(0) for s in last]
        return tuple(found) if lstm else found[0]


class RNNCell(_Cell, torch.nn.RNNCell):
    """torch.nn.RNNCell with B in the place of its weights in the gradients of its input and state."""

    @property
    def mode(self) -> str:  # type: ignore[override]
        """The cell as the ops name it: RNN_TANH or RNN_RELU."""
        return f"RNN_{self.nonlinearity.upper()}"


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """torch.nn.LSTMCell with B in the place of its weights in the gradients of its input and states."""

    mode = "LSTM"


class GRUCell(_Cell, torch.nn.GRUCell):
    """torch.nn.GRUCell with B in the place of its weights in the gradients of its input and state."""

    mode = "GRU"
