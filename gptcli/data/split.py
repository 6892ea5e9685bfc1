"""Which text is held out for validation, and which texts a tokenizer is trained on: both chosen by a hash of the text.

A hash of the text alone makes the choice independent of seed, order and number of processes, and puts equal documents
on the same side.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from gptcli.recipe.schema import Source, Tail

SAMPLE_BYTES = 200_000_000

Split: TypeAlias = Callable[[str], tuple[str | None, str | None]]


def splitter(validation: float | Tail | list[Source]) -> Split:
    """The function that gives a training text's (training part, validation part), None for a part it does not have."""
    if isinstance(validation, int | float):
        threshold = int(validation * 2**64)
        return lambda text: (None, text) if text_hash(text, b"validation") < threshold else (text, None)
    if isinstance(validation, list):
        return lambda text: (text, None)
    share = validation.tail
    return lambda text: split_tail(text, share)


def split_tail(text: str, share: float) -> tuple[str | None, str | None]:
    """Cut a text at `int(n * (1 - share))` characters, as nanoGPT's prepare.py does; an empty part is None."""
    at = int(len(text) * (1 - share))
    return text[:at] or None, text[at:] or None


def text_hash(text: str, purpose: bytes) -> int:
    """64 bits of BLAKE2b of the UTF-8 text, another function for every `purpose`."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=purpose).digest(), "big")


def sample(texts: Iterable[str], budget: int = SAMPLE_BYTES) -> list[str]:
    """The texts with the smallest hashes that together hold at most `budget` UTF-8 bytes, in their order.

    Memory is the budget. Which texts are chosen does not depend on their order. A sole text over the budget is cut.
    """
    heap: list[tuple[int, int, int, str]] = []
    total = 0
    limit = 2**64
    for index, text in enumerate(texts):
        size = len(text.encode("utf-8"))
        if size > budget:
            text = text.encode("utf-8")[:budget].decode("utf-8", "ignore")
            size = len(text.encode("utf-8"))
        key = text_hash(text, b"sample")
        if key >= limit:
            continue
        heapq.heappush(heap, (-key, -index, size, text))
        total += size
        while total > budget:
            negative, _, dropped, _ = heapq.heappop(heap)
            limit = -negative
            total -= dropped
    return [text for _, _, _, text in sorted(heap, key=lambda item: -item[1])]
