"""The key of a draw that changes exactly when W changes (brSF)."""

import torch
from torch import Tensor

from . import checks
from .philox import _MASK, philox4x32

_TAG = 0x42525346  # keeps these calls apart from the draws made under the same key
_SAMPLES = 64
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def redraw_key(key: Tensor, weight: Tensor) -> Tensor:
    """(version, key, stream ^ hash): the hash takes the bits of 64 evenly spread elements of W, in logical order."""
    checks.key(key)
    checks.floating("weight", weight)
    key = key.clone()
    if weight.numel() == 0:
        return key
    k = torch.arange(_SAMPLES, device=weight.device)
    sample = weight.detach()[torch.unravel_index(k * weight.numel() // _SAMPLES, weight.shape)]
    size = sample.element_size()
    bits = sample.contiguous().view(_BITS[size]).to(torch.int64)
    if size < 8:
        bits = bits & (2 ** (8 * size) - 1)
    word = philox4x32(
        (bits & _MASK, (bits >> 32) & _MASK, k, torch.full_like(k, _TAG)),
        (key[1] & _MASK, (key[1] >> 32) & _MASK),
    )
    for h in (word[:, 0] | (word[:, 1] << 32)).unbind():
        key[2] ^= h
    return key
