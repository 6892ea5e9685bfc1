"""Random numbers that are a function of where they are used, and of nothing else.

A token is drawn by adding Gumbel noise to the log-probabilities and taking the largest sum (the Gumbel-max trick,
Gumbel 1954, https://arxiv.org/abs/1411.0030). The noise of one token is SplitMix64 (Steele, Lea and Flood 2014) at a
place that (seed, prompt, index of the sequence, position, token) name. So no state is carried from draw to draw: a text
is the same alone, in any batch and after a restart, and only the tokens that can be drawn cost anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS = 2**64 - 1
_STEP = 2.0**-53  # half a step away from it, a uniform number is never 0 nor 1


def sequence_key(seed: int, prompt_ids: Sequence[int], index: int, media: Sequence[str] = ()) -> int:
    """A number of 64 bits that stands for one sequence of one prompt; `media`: the hashes of its images and sounds."""
    import numpy as np
    import xxhash

    ids = np.asarray(prompt_ids, dtype="<i8").tobytes()
    prompt = xxhash.xxh64_intdigest(ids + "".join(media).encode())
    return _mixed(_mixed(_mixed(seed & _BITS) ^ prompt) + index)


def position_key(key: int, position: int) -> int:
    """A number of 64 bits that stands for one position of the sequence with this key."""
    return _mixed(key + (position + 1) * _GOLDEN)


def gumbel(keys: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
    """Gumbel noise, float64 [rows, n], of tokens, int64 [rows, n] or [n], where row i has the key `keys[i]`."""
    import torch

    signed = [_signed(key) for key in keys]
    if tokens.device.type == "cpu":  # where an operation of numpy costs a quarter of torch's for a few tokens
        import numpy as np

        uniform = _bits(np.array(signed)[:, None], tokens.numpy()).astype(np.float64) + 0.5
        return torch.from_numpy(-np.log(-np.log(uniform * _STEP)))
    places = torch.tensor(signed, device=tokens.device).unsqueeze(1)
    return -torch.log(-torch.log((_bits(places, tokens).to(torch.float64) + 0.5) * _STEP))


def _bits(places: Any, tokens: Any) -> Any:
    """SplitMix64's 53 upper bits, of int64 arrays of numpy or torch, whose products and sums wrap around."""
    bits = places + tokens * _signed(_GOLDEN)
    bits = (bits ^ _shifted(bits, 30)) * _signed(_FIRST)
    bits = (bits ^ _shifted(bits, 27)) * _signed(_SECOND)
    return _shifted(bits ^ _shifted(bits, 31), 11)


def _shifted(bits: Any, by: int) -> Any:
    """A shift to the right that fills with zeros; that of int64 keeps the sign."""
    return (bits >> by) & (2 ** (64 - by) - 1)


def _mixed(bits: int) -> int:
    bits &= _BITS
    bits = (bits ^ (bits >> 30)) * _FIRST & _BITS
    bits = (bits ^ (bits >> 27)) * _SECOND & _BITS
    return bits ^ (bits >> 31)


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits
