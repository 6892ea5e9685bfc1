"""A permutation of N numbers by arithmetic: any element of any epoch in constant time and memory.

A Feistel network over the next power of two, walked until it falls below N (cycle walking; Black and Rogaway, "Ciphers
with Arbitrary Finite Domains", 2002). Its round function is the finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
Only uint64 arithmetic, so that the order never changes with the version of numpy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
MIN_BITS = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer of each value, a bijection of 64 bits."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def permute(positions: NDArray[np.int64], epochs: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Where each position (0 <= position < size) lies in the permutation of its epoch, keyed by (seed, epoch)."""
    if size == 1:
        return np.zeros_like(positions)
    key = mix(mix(np.full(len(positions), seed % 2**64, dtype=np.uint64)) ^ epochs.astype(np.uint64))
    keys = [mix(key + np.uint64(number)) for number in range(ROUNDS)]
    bits = max(MIN_BITS, (size - 1).bit_length())
    values = _feistel(positions.astype(np.uint64), keys, bits)
    while len(outside := np.flatnonzero(values >= np.uint64(size))):
        values[outside] = _feistel(values[outside], [key[outside] for key in keys], bits)
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], keys: list[NDArray[np.uint64]], bits: int) -> NDArray[Any]:
    left_bits, right_bits = bits // 2, bits - bits // 2
    for key in keys:
        right = values & np.uint64((1 << right_bits) - 1)
        left = values >> np.uint64(right_bits)
        mixed = (left ^ mix(right ^ key)) & np.uint64((1 << left_bits) - 1)
        # The halves change places, so an odd number of bits moves its longer half.
        values = (right << np.uint64(left_bits)) | mixed
        left_bits, right_bits = right_bits, left_bits
    return values
