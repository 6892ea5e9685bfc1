"""Which text is held out for validation, and which texts a tokenizer is trained on: both chosen by a hash of the text.

A hash of the text alone makes the choice independent of seed, order and number of processes, and puts equal documents
on the same side. A second hash of 128 bits chooses a sample and tells duplicates.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gptcli.recipe.schema import Source, Tail

SIDES = ("train", "validation")
SAMPLE_BYTES = 200_000_000
SAMPLE_BUCKETS = 1 << 16
DIGEST_BYTES = 16


@dataclass(frozen=True)
class Split:
    """The rule by which training texts are held out: a `share` of the documents, or the `tail` of each; 0: neither."""

    share: float = 0.0
    tail: float = 0.0

    def __call__(self, text: str, raw: bytes) -> tuple[str | None, str | None]:
        """A text's (training part, validation part), `raw` being its UTF-8; None for a part that it does not have."""
        if self.tail:
            at = self.cut(len(text))
            return text[:at] or None, text[at:] or None
        return (None, text) if self.holds_out(raw) else (text, None)

    def holds_out(self, raw: bytes) -> bool:
        """Whether `share` holds out the document of these bytes: by 64 bits of BLAKE2b."""
        if not self.share:
            return False
        return hashlib.blake2b(raw, digest_size=8, person=b"validation").digest() < self._threshold

    @functools.cached_property
    def _threshold(self) -> bytes:
        return int(self.share * 2**64).to_bytes(8, "big")

    def cut(self, length: int) -> int:
        """Where `tail` cuts a text of `length` characters: nanoGPT's prepare.py has the same rule."""
        return int(length * (1 - self.tail))


def split_of(validation: float | Tail | list[Source]) -> Split:
    """The rule of `data.validation`; a list of sources holds nothing out of the training texts."""
    if isinstance(validation, int | float):
        return Split(share=validation)
    return Split() if isinstance(validation, list) else Split(tail=validation.tail)


def digest_of(raw: bytes) -> bytes:
    """The 16 bytes that stand for a document, from its UTF-8 bytes."""
    return hashlib.blake2b(raw, digest_size=DIGEST_BYTES).digest()


def sample_bucket(digest: bytes) -> int:
    """Which of `SAMPLE_BUCKETS` a document falls in: a sample takes the first so many buckets."""
    return int.from_bytes(digest[8:10], "big")


def bucket_column(digests: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """`sample_bucket` of every row of digests (uint8, [documents, 16])."""
    return digests[:, 8:10].copy().view(">u2")[:, 0]


def sample_buckets(sizes: Iterable[tuple[NDArray[np.uint16], NDArray[np.int64]]], budget: int = SAMPLE_BYTES) -> int:
    """How many buckets hold at most `budget` bytes (at least one that holds any), given (bucket, bytes) of documents.

    Memory is a number a bucket. Which documents are chosen does not depend on their order.
    """
    totals = np.zeros(SAMPLE_BUCKETS, dtype=np.int64)
    for buckets, bytes_ in sizes:
        totals += np.bincount(buckets, weights=bytes_, minlength=SAMPLE_BUCKETS).astype(np.int64)
    if not totals.any():
        return SAMPLE_BUCKETS
    filled = int(np.searchsorted(np.cumsum(totals), budget, side="right"))
    return max(filled, int(np.flatnonzero(totals)[0]) + 1)
