"""Which row of which source is row k of the run: arithmetic, so nothing of the order is stored.

Epoch e of a source is a permutation of its N rows keyed by (seed, source, e): its k-th row of the run is row (k mod N)
of its epoch (k div N). Where rows have lengths of their own, those of 50 steps are dealt out again, so that a step has
like ones: each stays in its source's places and in its epoch, so that shares and epochs are what they were.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gptcli.data.mixing import Mixture, Proportions
from gptcli.data.permutation import permute

BLOCK = 8192
BLOCKS_KEPT = 4
GROUPED_STEPS = 50
SUMMED = 1 << 20
# Keys of the order of steps; those of rows are the seed and a source above 2^32.
_STEPS = 1 << 62


class Order:
    """The rows of the run: an endless sequence in which a source that runs out begins again.

    Args:
        proportions: how rows are shared out among sources.
        seed: of the order.
        shuffle: whether the rows of a source come in another order in each of its epochs; else as they stand.
        lengths: of each source's rows; the rows of a step are to be of like length. None: no matter.
        batch: rows of a step, for `lengths`.
    """

    def __init__(
        self,
        proportions: Proportions,
        *,
        seed: int,
        shuffle: bool,
        lengths: Sequence[NDArray[np.int32]] | None = None,
        batch: int = 1,
    ) -> None:
        self.proportions = proportions
        self._seed = seed
        self._shuffle = shuffle
        self._mixture = Mixture(proportions.parts)
        self._lengths = lengths if shuffle else None
        self._batch = batch
        self._size = BLOCK if self._lengths is None else GROUPED_STEPS * batch
        self._blocks: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def places(self, ks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each of the rows `ks` (int64 [n]), and which row of that source it is."""
        homes = ks // self._size
        blocks = np.unique(homes).tolist()
        if len(blocks) > BLOCKS_KEPT and self._lengths is None:
            sources, rows, _ = self._located(ks)
            return sources, rows
        sources, rows = np.empty_like(ks), np.empty_like(ks)
        for block in blocks:
            chosen = homes == block
            inside = ks[chosen] - block * self._size
            sources[chosen], rows[chosen] = (values[inside] for values in self._block(block))
        return sources, rows

    def epoch(self, k: int) -> int:
        """Which epoch of its source row k is of."""
        return int(self._located(np.array([k], dtype=np.int64))[2][0])

    def sums(self, values: Sequence[NDArray[np.int32]], totals: Sequence[int], rows: int) -> int:
        """The sum of a value that each row of each source has over the first `rows` rows of the run.

        Whole epochs are not gone through: time is that of an epoch's order at most.
        """
        begin = rows // self._size * self._size  # up to a block's end it does not matter how its rows are dealt out
        found = 0
        for source, count in enumerate(self._mixture.counts(begin)):
            size = self.proportions.rows[source]
            if not count or not size:
                continue
            epochs, rest = divmod(count, size)
            found += epochs * totals[source]
            for first in range(0, rest, SUMMED):
                positions = np.arange(first, min(first + SUMMED, rest), dtype=np.int64)
                chosen = self._permuted(positions, np.full_like(positions, epochs), source)
                found += int(values[source][chosen].sum(dtype=np.int64))
        sources, chosen = self.places(np.arange(begin, rows, dtype=np.int64))
        for source in np.unique(sources).tolist():
            found += int(values[source][chosen[sources == source]].sum(dtype=np.int64))
        return found

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        # Batches ask for neighbours, and permuting 8,192 numbers costs hardly more than permuting 64.
        if block not in self._blocks:
            if len(self._blocks) >= BLOCKS_KEPT:
                self._blocks.pop(next(iter(self._blocks)))
            ks = np.arange(block * self._size, (block + 1) * self._size, dtype=np.int64)
            sources, rows, epochs = self._located(ks)
            if self._lengths is not None:
                rows = self._grouped(block, sources, rows, epochs)
            self._blocks[block] = sources, rows
        return self._blocks[block]

    def _located(self, ks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The source, the row and the epoch of each of the rows `ks`, whatever their lengths."""
        sources, before = self._mixture.locate(ks)
        rows, epochs = np.empty_like(before), np.empty_like(before)
        for source in np.unique(sources).tolist():
            chosen = np.flatnonzero(sources == source)
            epochs[chosen], positions = np.divmod(before[chosen], self.proportions.rows[source])
            rows[chosen] = self._permuted(positions, epochs[chosen], source)
        return sources, rows, epochs

    def _permuted(self, positions: NDArray[np.int64], epochs: NDArray[np.int64], source: int) -> NDArray[np.int64]:
        # Seeds of recipes are below 2^32, so each (seed, source) has a key; that of the first source is the seed.
        size = self.proportions.rows[source]
        return permute(positions, epochs, size, self._seed + (source << 32)) if self._shuffle else positions

    def _grouped(
        self, block: int, sources: NDArray[np.int64], rows: NDArray[np.int64], epochs: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The rows of a block's 50 steps dealt out so that each step has like ones, the steps in a shuffled order.

        The rows of an epoch of a source, from short to long, go to its places in the order of the steps.
        """
        assert self._lengths is not None
        lengths = np.empty(len(rows), dtype=np.int64)
        for source in np.unique(sources).tolist():
            chosen = sources == source
            lengths[chosen] = self._lengths[source][rows[chosen]]
        steps = np.arange(GROUPED_STEPS, dtype=np.int64)
        turns = permute(steps, np.full_like(steps, block), GROUPED_STEPS, self._seed + _STEPS)
        by_length = np.lexsort((lengths, epochs, sources))
        by_step = np.lexsort((np.repeat(turns, self._batch), epochs, sources))
        dealt = np.empty_like(rows)
        dealt[by_step] = rows[by_length]
        return dealt
