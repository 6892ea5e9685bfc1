"""What is counted of the documents of a piece, and how the counts of pieces are added up.

Lengths are counted exactly, as a mapping from a length to its documents; of the longest and the strangest documents
(the most tokens a byte) only five of each are kept, with the place where they stand.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from gptcli.data.encode import Encoded
from gptcli.data.media.counted import MediaCounts, count_media
from gptcli.data.reading.row import Mark

QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
NOTABLE = 5
STRANGE_BYTES = 200  # shorter documents are strange by chance
EXCERPT = 60

# (score, where it stands, how it begins); in the file of a piece the marks are of the piece's own inputs.
Notable: TypeAlias = tuple[float, tuple[Any, ...], str]


@dataclass
class Counts:
    """What is counted of documents on one side, besides what the shards' manifest has."""

    lengths: Counter[int] = field(default_factory=Counter)
    with_nul: int = 0
    specials_in_text: int = 0
    longest: list[Notable] = field(default_factory=list)
    strangest: list[Notable] = field(default_factory=list)
    counted_media: dict[str, MediaCounts] = field(default_factory=dict)

    def add(
        self, texts: Sequence[str], encoded: Encoded, specials: set[int], added: int, mark: Callable[[int], Mark]
    ) -> None:
        """Count a batch; `added`: special tokens put at the ends of each document; `mark` tells where one stands."""
        values, counts = np.unique(encoded.lengths, return_counts=True)
        self.lengths.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        self.with_nul += sum("\0" in text for text in texts)
        found = sum(int(np.count_nonzero(encoded.tokens == special)) for special in specials)
        self.specials_in_text += found - added * len(texts)
        in_media = count_media(self.counted_media, encoded.media or [()] * len(texts))
        text_tokens = (encoded.lengths - added).astype(np.float64)
        strange = np.where(encoded.bytes >= STRANGE_BYTES, (text_tokens - in_media) / np.maximum(encoded.bytes, 1), 0.0)
        for kept, scores in ((self.longest, text_tokens), (self.strangest, strange)):
            least = kept[0][0] if len(kept) == NOTABLE else 0.0
            for index in _highest(scores, least):
                self._keep(kept, (float(scores[index]), tuple(mark(index)), texts[index][:EXCERPT]))

    def merge(self, other: Counts) -> None:
        """Add the counts of a piece that comes after."""
        self.lengths.update(other.lengths)
        self.with_nul += other.with_nul
        self.specials_in_text += other.specials_in_text
        for mine, theirs in ((self.longest, other.longest), (self.strangest, other.strangest)):
            for entry in theirs:
                self._keep(mine, entry)
        for kind, counts in other.counted_media.items():
            self.counted_media.setdefault(kind, MediaCounts()).add(counts)

    def quantiles(self) -> dict[str, int]:
        """The length of the document at each of `QUANTILES`, documents ordered by length (nearest rank, from below)."""
        if not self.lengths:
            return {}
        values = np.array(sorted(self.lengths), dtype=np.int64)
        ends = np.cumsum([self.lengths[int(value)] for value in values])
        ranks = {name: int(share * (int(ends[-1]) - 1)) for name, share in QUANTILES.items()}
        return {name: int(values[np.searchsorted(ends, rank, side="right")]) for name, rank in ranks.items()}

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON, for the file of a piece."""
        media = {kind: vars(counts) for kind, counts in self.counted_media.items()}
        return {**vars(self), "lengths": sorted(self.lengths.items()), "counted_media": media}

    @classmethod
    def from_json(cls, value: dict[str, Any], piece: int) -> Counts:
        """The counts that `to_json` wrote for a piece; its number goes before the marks."""
        kept = {
            name: [(score, (piece, *mark), text) for score, mark, text in value[name]]
            for name in ("longest", "strangest")
        }
        media = {kind: MediaCounts(**counts) for kind, counts in value.get("counted_media", {}).items()}
        return cls(
            Counter(dict(value["lengths"])), value["with_nul"], value["specials_in_text"], **kept, counted_media=media
        )

    @staticmethod
    def _keep(kept: list[Notable], entry: Notable) -> None:
        if len(kept) < NOTABLE:
            heapq.heappush(kept, entry)
        else:
            heapq.heappushpop(kept, entry)


def _highest(scores: Any, least: float) -> list[int]:
    top = np.argpartition(scores, -NOTABLE)[-NOTABLE:] if len(scores) > NOTABLE else np.arange(len(scores))
    return [index for index in top.tolist() if scores[index] > least]
