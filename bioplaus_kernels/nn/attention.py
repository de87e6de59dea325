"""MultiheadAttention with a feedback rule in its projections."""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..backends.reference import checks
from ..backends.reference.pack_signs import TILE_ROWS
from ..feedback import Fans, Operands, linear_fans, stored
from ..functional import CUT, captured, formed, linear_with
from .base import FeedbackLayer
from .linear import Linear
from .state import Keys


class MultiheadAttention(FeedbackLayer, torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention with B in the input gradients of its projections; the attention itself is torch's.

    torch.nn.MultiheadAttention's arguments and `feedback=`. The packed input projection has one B (3E, E), `out_proj`
    becomes a `Linear` with the same rule. torch's inference fast path is taken only where no gradient can follow.
    """

    def weights(self) -> list[str]:
        if self._qkv_same_embed_dim:
            return ["in_proj_weight"]
        return ["q_proj_weight", "k_proj_weight", "v_proj_weight"]

    def fans(self, name: str = "in_proj_weight") -> Fans:
        return linear_fans(getattr(self, name))

    def install_feedback(self, rule: Any, key: Keys | None = None) -> None:
        super().install_feedback(rule, key)
        if rule.transports_weight:
            if isinstance(self.out_proj, Linear):
                self.out_proj.install_feedback(rule)
            self.out_proj.__class__ = NonDynamicallyQuantizableLinear
        else:
            self.out_proj.__class__ = Linear  # type: ignore[assignment]
            cast(Linear, self.out_proj).install_feedback(rule, _of_out_proj(key))

    def reset_parameters(self) -> None:
        """torch.nn's initialisation, then fresh feedback."""
        self._reset_parameters()
        self.reset_feedback()

    def reset_feedback(self, key: Keys | None = None) -> None:
        super().reset_feedback(key)
        if isinstance(self.out_proj, Linear) and hasattr(self.out_proj, "_feedback"):
            self.out_proj.reset_feedback(_of_out_proj(key))

    def feedback_matrix(self, name: str = "in_proj_weight") -> Tensor:
        return super().feedback_matrix(name)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        for name, given in (("query", query), ("key", key), ("value", value)):
            checks.tensor(name, given)
        weights = {}
        # torch's fast path in a capture would be an operator that ONNX lacks, and depend on the grad mode.
        if self.uses_feedback and (torch.is_grad_enabled() or captured()):
            weights = {name: getattr(self, name) for name in self.weights()}
        # A gradient goes through out_proj's B to any of the others, if only a bias.
        trained: list[Tensor | None] = [*self.parameters()]
        # DataParallel's replicas have no parameters.
        trained = trained or [self.in_proj_bias, self.bias_k, self.bias_v, self.out_proj.weight]
        tensors = (query, key, value, *weights.values(), *trained)
        if not weights or self.is_plain(next((t for t in tensors if t is not None and t.requires_grad), query)):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            shapes = tuple(tuple(t.shape) for t in (query, key, value))
            raise ValueError(f"query, key, value: expected 3 dimensions each, or 2 unbatched, got shapes {shapes}")
        batch = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1] or (query.dim() == 3 and query.shape[batch] != key.shape[batch]):
            shapes = tuple(tuple(t.shape) for t in (query, key, value))
            raise ValueError(f"key, value: expected equal lengths, and query's batch, got shapes {shapes}")
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask: expected a mask with is_causal=True, got None")
        batched = query.dim() == 3
        q, k, v = (self._heads(t, batched) for t in self._project(query, key, value, weights))
        if isinstance(key_padding_mask, Tensor) and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        n, _, length, _ = q.shape
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat((t, b.reshape(1, 1, self.num_heads, -1).transpose(1, 2).expand(n, -1, -1, -1)), 2)
                for t, b in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        extra = k.shape[2] - key.shape[1 if self.batch_first and batched else 0]
        # As in torch.nn, the hint then stands for the mask, bias_k and the zeros of add_zero_attn hidden with it.
        causal_only = is_causal and key_padding_mask is None and not need_weights
        mask = (
            None
            if causal_only
            else self._mask(key_padding_mask, attn_mask, n, length, k.shape[2] - extra, extra, q.dtype)
        )

        dropout = self.dropout if self.training else 0.0
        found = None
        if need_weights:
            scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
            found = F.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
            attended = found @ v
            if average_attn_weights:
                found = found.mean(dim=1)
            if not batched:
                found = found.squeeze(0)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal_only)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), found
        return (output if self.batch_first else output.transpose(0, 1)), found

    def _project(self, query: Tensor, key: Tensor, value: Tensor, weights: dict[str, Tensor]) -> list[Tensor]:
        e, bias = self.embed_dim, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            inputs = zip((query, key, value), weights.items(), biases, strict=True)
            used = [(x, b, *self.used(*named)) for x, named, b in inputs]
            return [linear_with(x, weight, b, op) for x, b, weight, op in used]
        weight, op = self.used(*weights.popitem())
        if query is key and key is value:
            return list(linear_with(query, weight, bias, op).chunk(3, dim=-1))

        def rows(x: Tensor, start: int, stop: int) -> Tensor:
            b = None if bias is None else bias[start:stop]
            return linear_with(x, weight[start:stop], b, self._rows(op, weight, start, stop))

        if key is value:
            return [rows(query, 0, e), *rows(key, e, 3 * e).chunk(2, dim=-1)]
        return [rows(x, i * e, (i + 1) * e) for i, x in enumerate((query, key, value))]

    @staticmethod
    def _rows(op: Operands, weight: Tensor, start: int, stop: int) -> Operands:
        if op is CUT:
            return op
        # Draws are laid out for the whole matrix, so B is formed and sliced, as it is where packed signs of these rows
        # begin within a tile; signs of W itself slice.
        if op.key is None and op.entries != "factors" and (op.signs is None or start % TILE_ROWS == 0):
            signs, magnitude = op.signs, op.magnitude
            if signs is not None:
                rows, tiles = weight.shape[0], slice(start // TILE_ROWS, -(-stop // TILE_ROWS))
                signs = torch.cat((signs[start:stop], signs[rows:][start:stop], signs[2 * rows :][tiles]))
            return op._replace(signs=signs, magnitude=None if magnitude is None else magnitude[start:stop])
        with torch.no_grad():
            return stored(formed(op, weight)[start:stop])

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        # (N, heads, length, head size)
        x = x if batched else x.unsqueeze(0)
        x = x if self.batch_first or not batched else x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(
        self,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        n: int,
        length: int,
        source: int,
        extra: int,
        dtype: torch.dtype,
    ) -> Tensor | None:
        total = None
        for name, mask, shapes in (
            ("key_padding_mask", key_padding_mask, [(n, source)]),
            ("attn_mask", attn_mask, [(length, source), (n * self.num_heads, length, source)]),
        ):
            if mask is None:
                continue
            checks.tensor(name, mask)
            if tuple(mask.shape) not in shapes:
                raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
            elif not mask.is_floating_point():
                raise TypeError(f"{name}: expected bool or a floating dtype, got {mask.dtype}")
            mask = F.pad(mask.to(dtype), (0, extra))
            if name == "key_padding_mask":
                mask = mask[:, None, None]
            elif mask.dim() == 3:
                mask = mask.unflatten(0, (n, self.num_heads))
            total = mask if total is None else total + mask
        return total


def _of_out_proj(key: Keys | None) -> Keys | None:
    return None if key is None else lambda name: key(f"out_proj.{name}")
