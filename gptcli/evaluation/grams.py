"""The runs of 13 words of texts, as hashes: what `gptcli.evaluation.overlap` compares.

A word is what stands between white space, lowercased and without punctuation and symbols, as GPT-3 was checked (Brown
et al. 2020, arXiv:2005.14165, appendix C). Texts are hashed in batches of 256 KiB by arithmetic on whole arrays, with
64 bits a gram: with E grams looked for among T the chance of one false find is below E * T / 2^64.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

GRAM = 13
BATCH_BYTES = 1 << 18
MERGE_GRAMS = 1 << 20

Hashes = NDArray[np.uint64]
# The positions of hashes in a sorted array, of those that are in it, and which of them are.
Finder = Callable[[Hashes], tuple[NDArray[np.int64], NDArray[np.bool_]]]

_SPACES = bytes(code for code in range(128) if chr(code).isspace())
_PLAIN = bytes.maketrans(
    string.ascii_uppercase.encode() + _SPACES, string.ascii_lowercase.encode() + b" " * len(_SPACES)
)
# NUL is no character of a word, so that it can stand between documents.
_DROPPED = string.punctuation.encode() + b"\0"
_OTHERS = re.compile(r"[^\x00-\x7f]+")
_BETWEEN = b" \0 "
_BASE = 0x9E3779B97F4A7C15
_FACTORS = np.random.default_rng(GRAM).integers(1 << 63, size=GRAM, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def normalized(text: str) -> bytes:
    """The words of a text in UTF-8 with spaces between them: lowercased, without punctuation and symbols."""
    if text.isascii():
        return text.encode("ascii").translate(_PLAIN, _DROPPED)
    others = _OTHERS.sub(lambda run: run[0].translate(_UNICODE), text.lower())
    return others.encode("utf-8").translate(_PLAIN, _DROPPED)


class _Unicode(dict[int, int | None]):
    """What `str.translate` asks for each character: punctuation goes, white space becomes a space."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        kept = None if unicodedata.category(character)[0] in "PS" else 32 if character.isspace() else code
        self[code] = kept
        return kept


_UNICODE = _Unicode()


def grams(texts: Iterable[str]) -> Iterator[tuple[int, Hashes, NDArray[np.int64]]]:
    """For each batch: the number of its first document, the hashes of its grams, and whose they are from that number.

    A document without grams is in a batch too, so that all were read when a batch comes that begins behind them.
    """
    first = size = 0
    batch: list[bytes] = []
    for number, text in enumerate(texts):
        *whole, rest = pieces(normalized(text))
        for piece in whole:
            if batch:
                yield (first, *hashes(_BETWEEN.join(batch)))
            yield (number, *hashes(piece))
            batch, size = [], 0
        if batch and size + len(rest) + len(_BETWEEN) > BATCH_BYTES:
            yield (first, *hashes(_BETWEEN.join(batch)))
            batch, size = [], 0
        if not batch:
            first = number
        batch.append(rest)
        size += len(rest) + len(_BETWEEN)
    if batch:
        yield (first, *hashes(_BETWEEN.join(batch)))


def pieces(words: bytes) -> Iterator[bytes]:
    """A document in pieces of at most a batch, each beginning with the last 12 words of the one before."""
    begin = 0
    while len(words) - begin > BATCH_BYTES - len(_BETWEEN):
        end = words.rfind(b" ", begin, begin + BATCH_BYTES - len(_BETWEEN))
        if end <= begin:  # no word is that long: it counts as several
            end = begin + BATCH_BYTES - len(_BETWEEN)
        yield words[begin:end]
        again = end
        for _ in range(GRAM - 1):
            again = words.rfind(b" ", begin, len(words[begin:again].rstrip()) + begin) + 1
        begin = again if again > begin else end
    yield words[begin:]


def hashes(text: bytes) -> tuple[Hashes, NDArray[np.int64]]:
    """The hash of every 13 words in a row of one document, and how many documents of the text come before it.

    A word's is its bytes as the coefficients of a polynomial, from sums that run over the whole text.
    """
    letters = np.frombuffer(text, dtype=np.uint8)
    space = np.ones(len(letters) + 2, dtype=np.int8)
    space[1:-1] = letters == 32
    edges = np.diff(space)
    starts, ends = np.flatnonzero(edges == -1), np.flatnonzero(edges == 1)
    count = len(starts) - GRAM + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    powers, inverse = _powers()
    sums = np.zeros(len(letters) + 1, dtype=np.uint64)
    np.cumsum(letters * powers[: len(letters)], out=sums[1:])
    words = (sums[ends] - sums[starts]) * inverse[starts]
    for shift, factor in ((32, 0xD6E8FEB86659FD93), (29, 0xBF58476D1CE4E5B9), (32, 1)):
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    between = letters[starts] == 0
    document = np.cumsum(between)
    result = np.zeros(count, dtype=np.uint64)
    for at, odd in enumerate(_FACTORS):
        result += words[at : at + count] * odd
    inside = (document[GRAM - 1 :] == document[:count]) & ~between[:count]
    return result[inside], document[:count][inside]


@cache
def _powers() -> tuple[Hashes, Hashes]:
    """The powers of the hash's base modulo 2^64, and their inverses."""
    powers = np.ones((2, BATCH_BYTES), dtype=np.uint64)
    powers[0, 1:], powers[1, 1:] = _BASE, pow(_BASE, -1, 1 << 64)
    powers = np.cumprod(powers, axis=1, dtype=np.uint64)
    return powers[0], powers[1]


def distinct(batches: Iterator[tuple[int, Hashes, NDArray[np.int64]]]) -> Hashes:
    """The distinct hashes of all batches, sorted."""
    known = np.empty(0, dtype=np.uint64)
    waiting: list[Hashes] = []
    size = 0
    for _, found, _ in batches:
        waiting.append(found)
        size += len(found)
        if size > max(MERGE_GRAMS, len(known)):
            known, waiting, size = np.unique(np.concatenate((known, *waiting))), [], 0
    return np.unique(np.concatenate((known, *waiting)))


def finder(known: Hashes) -> Finder:
    """A function of hashes: the positions in `known` (sorted) of those that are in it, and which of them are."""
    # Most hashes are not: a table of their first bits tells, in one look, all but an eighth of these.
    bits = min(28, max(16, int(8 * len(known)).bit_length()))
    shift = np.uint64(64 - bits)
    table = np.zeros(1 << bits, dtype=np.bool_)
    table[known >> shift] = True

    def find(asked: Hashes) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        among = table[asked >> shift]
        candidates = asked[among]
        at = np.searchsorted(known, candidates)
        at[at == len(known)] = 0
        equal = known[at] == candidates if len(known) else np.zeros(0, dtype=np.bool_)
        among[among] = equal
        return at[equal], among

    return find
