"""The key of a draw that changes exactly when W changes (brSF)."""

import functools

import torch
from torch import Tensor

from . import checks
from .philox import _MASK, _MULTIPLIERS, philox4x32

_TAG = 0x42525346  # keeps these calls apart from the draws made under the same key
_SAMPLES = 64
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int32}
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_CHUNK = 2**18  # words, so that the int64 temporaries are few


def redraw_key(key: Tensor, weight: Tensor) -> Tensor:
    """(version, key, stream ^ H), H a hash of the bits of W in logical order: the memory order does not matter.

    Version 2 takes all of W as 32-bit words x_0, x_1, ...: an element of 2 or 4 bytes is one (zero-extended), one of 8
    bytes two, the low half first. All modulo 2^64, with lo and hi the halves of 64 bits:

        K = splitmix64(key)
        z_i = (K + i * 0x9E3779B97F4A7C15) ^ (x_i * 0xD2511F53)
        H = splitmix64(K + sum over i of (lo(z_i) * hi(z_i)) ^ (lo(z_i) * 2^32 + hi(z_i)))

    Sums of parts of W add up in any order. Version 1 took a Philox call of each of 64 evenly spread elements: H is the
    exclusive or of them. An empty W leaves the key as it is.
    """
    checks.key(key)
    checks.floating("weight", weight)
    weight = torch.atleast_1d(weight.detach())
    if weight.numel() == 0:
        return key.clone()
    # Which version it is lies on the device, and is not waited for.
    h = torch.where(key[0] == 1, _hash_of_samples(key, weight), _hash(key, weight))
    return torch.stack((key[0], key[1], key[2] ^ h))


def _splitmix64(z: Tensor) -> Tensor:
    """The output of Steele, Lea and Flood's generator (2014) in state z; int64 arithmetic wraps."""
    z = z + _GAMMA
    z = (z ^ (z >> 30 & 2**34 - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ (z >> 27 & 2**37 - 1)) * (0x94D049BB133111EB - 2**64)
    return z ^ (z >> 31 & 2**33 - 1)


def _words(weight: Tensor) -> Tensor:
    """The 32-bit words of W in logical order, as int64."""
    size = weight.element_size()
    return weight.reshape(-1).contiguous().view(_BITS[size]).to(torch.int64) & (0xFFFF if size == 2 else _MASK)


def _hash(key: Tensor, weight: Tensor) -> Tensor:
    start = _splitmix64(key[1])
    total, first = start, 0
    # Not all of W at once, which would be copied where it does not lie in logical order.
    for rows in weight.split(max(1, _CHUNK * len(weight) // weight.numel())):
        for x in _words(rows).split(_CHUNK):
            i = torch.arange(first, first + len(x), device=x.device)
            z = (start + i * _GAMMA) ^ (x * _MULTIPLIERS[0])
            low, high = z & _MASK, z >> 32 & _MASK
            total = total + ((low * high) ^ (low << 32 | high)).sum()
            first += len(x)
    return _splitmix64(total)


def _hash_of_samples(key: Tensor, weight: Tensor) -> Tensor:
    k = torch.arange(_SAMPLES, device=weight.device)
    sample = weight[torch.unravel_index(k * weight.numel() // _SAMPLES, weight.shape)]
    bits = _words(sample).view(_SAMPLES, -1)
    high = bits[:, 1] if bits.shape[1] == 2 else torch.zeros_like(k)
    word = philox4x32((bits[:, 0], high, k, torch.full_like(k, _TAG)), (key[1] & _MASK, (key[1] >> 32) & _MASK))
    return functools.reduce(torch.bitwise_xor, (word[:, 0] | (word[:, 1] << 32)).unbind())
