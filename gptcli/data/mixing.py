"""Which source each row of the run comes from: in any prefix of n rows source i has n * share_i rows to within one.

Shares are integers over their sum (the period), so nothing is rounded. The rule is earliest deadline first with
releases: Pfair scheduling on one processor (Baruah, Cohen, Plaxton and Varvel, "Proportionate Progress", 1996), which
solves the chairman assignment problem (Tijdeman, 1980). Memory: a byte (above 256 sources two) for every row asked for,
at most one period; time: about 0.6 microseconds a row, once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 16
BLOCKS_KEPT = 4
# Rows are counted in int64: a longer period never comes round.
ENDLESS = 1 << 62


@dataclass(frozen=True)
class Proportions:
    """How the rows of a run are shared out among its sources.

    Attributes:
        rows: what each source has.
        parts: whole numbers without a common divisor; source i gets parts[i] of every sum(parts) rows of the run.
    """

    rows: tuple[int, ...]
    parts: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[int], weights: Sequence[float] | None = None) -> Proportions:
        """The proportions of positive `weights` (of their decimal text: 0.7 is 7/10); None: those of the sizes."""
        exact = [Fraction(count) for count in rows] if weights is None else [Fraction(str(each)) for each in weights]
        denominator = math.lcm(*(value.denominator for value in exact))
        parts = [int(value * denominator) for value in exact]
        divisor = math.gcd(*parts)
        return cls(tuple(rows), tuple(part // divisor for part in parts))

    @property
    def shares(self) -> list[float]:
        """Each source's share of the rows; together 1."""
        return [part / sum(self.parts) for part in self.parts]

    def epochs(self, rows: int) -> list[float]:
        """How often each source was gone through after so many rows of the run, to within one row of the source."""
        pairs = zip(self.parts, self.rows, strict=True)
        return [float(Fraction(rows * part, sum(self.parts) * own)) if own else 0.0 for part, own in pairs]


class Mixture:
    """The endless sequence of sources that `parts` give; its first `sum(parts)` rows are repeated.

    Job j of source i (its j-th row in a period of Q) may have the slots from floor(j * Q / parts[i]) to before
    ceil((j + 1) * Q / parts[i]); of the jobs that may have a slot the one with the earliest deadline gets it, ties go
    to the lower index. A source of 0 parts has no rows.
    """

    def __init__(self, parts: Sequence[int]) -> None:
        self.parts = tuple(parts)
        self.period = sum(parts)
        self._dtype = np.dtype(np.uint8 if len(parts) <= 256 else np.uint16)
        self._blocks: list[NDArray[Any]] = []
        self._begins = [np.zeros(len(parts), dtype=np.int64)]
        self._ranked: dict[int, NDArray[np.int64]] = {}
        # Where the schedule stands: rows that each source has had, and two heaps of (slot * sources + source).
        self._done = [0] * len(parts)
        self._waiting = [source for source, part in enumerate(parts) if part]
        self._ready: list[int] = []

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For rows of the run (int64 [n]): the source of each, and how many rows of it come before (both int64 [n])."""
        if self.period < ENDLESS:
            periods, slots = np.divmod(rows, self.period)
        else:
            periods, slots = np.zeros_like(rows), rows
        sources, before = np.empty_like(rows), np.empty_like(rows)
        blocks = slots // BLOCK
        for block in np.unique(blocks).tolist():
            chosen = np.flatnonzero(blocks == block)
            places = slots[chosen] - block * BLOCK
            before[chosen] = self._ranks(block)[places]
            sources[chosen] = self._blocks[block][places]
        if periods.any():
            before += periods * np.array(self.parts, dtype=np.int64)[sources]
        return sources, before

    def counts(self, rows: int) -> list[int]:
        """How many of the first `rows` rows of the run are each source's."""
        periods, slots = divmod(rows, self.period) if self.period < ENDLESS else (0, rows)
        block, rest = divmod(slots, BLOCK)
        while rest and len(self._blocks) <= block:
            self._extend()
        while len(self._begins) <= block:
            self._extend()
        found = self._begins[block].copy()
        if rest:
            found += np.bincount(self._blocks[block][:rest], minlength=len(self.parts))
        return [periods * part + int(count) for part, count in zip(self.parts, found, strict=True)]

    def _ranks(self, block: int) -> NDArray[np.int64]:
        """How many rows of its source come before each row of a block, in this period."""
        if block not in self._ranked:
            while len(self._blocks) <= block:
                self._extend()
            if len(self._ranked) >= BLOCKS_KEPT:
                self._ranked.pop(next(iter(self._ranked)))
            sources = self._blocks[block]
            order = np.argsort(sources, kind="stable")
            counts = np.bincount(sources, minlength=len(self.parts))
            starts = np.cumsum(counts) - counts
            ranks = np.empty(len(sources), dtype=np.int64)
            ranks[order] = np.arange(len(sources)) + (self._begins[block] - starts)[sources[order]]
            self._ranked[block] = ranks
        return self._ranked[block]

    def _extend(self) -> None:
        """Schedule the next block."""
        begin = len(self._blocks) * BLOCK
        end = min(begin + BLOCK, self.period)
        parts, period, count = self.parts, self.period, len(self.parts)
        done, waiting, ready = self._done, self._waiting, self._ready
        chosen = []
        for following in range((begin + 1) * count, (end + 1) * count, count):
            while waiting and waiting[0] < following:
                source = heappop(waiting) % count
                heappush(ready, -((done[source] + 1) * period // -parts[source]) * count + source)
            source = heappop(ready) % count
            chosen.append(source)
            done[source] += 1
            heappush(waiting, done[source] * period // parts[source] * count + source)
        block = np.array(chosen, dtype=self._dtype)
        self._blocks.append(block)
        self._begins.append(self._begins[-1] + np.bincount(block, minlength=count))
