"""Row k of the run, by arithmetic on the memory-mapped shards: the same on any number of processes.

Row r of a source reads its tokens [r*T, r*T + T + 1); a row never crosses sources. Epoch e is a permutation of the N
rows keyed by (seed, e), so nothing of the order is stored: row k of the run is row (k mod N) of epoch (k div N).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gptcli.data.permutation import permute
from gptcli.data.shards import Shards
from gptcli.errors import DataError

BLOCK = 8192
BLOCKS_KEPT = 4


class TrainingRows:
    """The rows of the training stream. Raises `DataError` when no source has tokens for one row."""

    def __init__(self, shards: Shards, *, sequence_length: int, seed: int, shuffle: bool) -> None:
        self.shards = shards
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle = shuffle
        counts = [row_count(len(stream), sequence_length) for stream in shards.streams]
        self.rows_per_epoch = sum(counts)
        self._blocks: dict[int, NDArray[np.int64]] = {}
        self._ends = np.cumsum(np.array(counts, dtype=np.int64))
        if self.rows_per_epoch == 0:
            raise too_short([len(stream) for stream in shards.streams], sequence_length)

    def batch(self, ks: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows `ks` of the run: int64 of shape [len(ks), sequence_length + 1]."""
        ks = np.asarray(ks, dtype=np.int64)
        rows = self._rows(ks)
        if len(self.shards.streams) == 1:
            return self.shards.streams[0].rows(rows * self.sequence_length, self.sequence_length + 1)
        sources = np.searchsorted(self._ends, rows, side="right")
        result = np.empty((len(ks), self.sequence_length + 1), dtype=np.int64)
        for source in np.unique(sources):
            chosen = np.flatnonzero(sources == source)
            begins = (rows[chosen] - self._first_row(int(source))) * self.sequence_length
            result[chosen] = self.shards.streams[source].rows(begins, self.sequence_length + 1)
        return result

    def row_id(self, k: int) -> str:
        """What row k is: the epoch, the source and the tokens of its stream."""
        row = int(self._rows(np.array([k], dtype=np.int64))[0])
        source = int(np.searchsorted(self._ends, row, side="right"))
        begin = (row - self._first_row(source)) * self.sequence_length
        name = self.shards.streams[source].name
        return f"{name} tokens {begin}-{begin + self.sequence_length} (epoch {k // self.rows_per_epoch})"

    def _rows(self, ks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the rows `ks` lie in the unshuffled order."""
        if not self.shuffle:
            return ks % self.rows_per_epoch
        blocks = np.unique(ks // BLOCK)
        if len(blocks) > BLOCKS_KEPT:
            return self._permuted(ks)
        result = np.empty_like(ks)
        for block in blocks.tolist():
            chosen = ks // BLOCK == block
            result[chosen] = self._block(block)[ks[chosen] - block * BLOCK]
        return result

    def _block(self, block: int) -> NDArray[np.int64]:
        # Batches ask for neighbours, and permuting 8,192 numbers costs hardly more than permuting 64.
        if block not in self._blocks:
            if len(self._blocks) >= BLOCKS_KEPT:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[block] = self._permuted(np.arange(block * BLOCK, (block + 1) * BLOCK, dtype=np.int64))
        return self._blocks[block]

    def _permuted(self, ks: NDArray[np.int64]) -> NDArray[np.int64]:
        epochs, positions = np.divmod(ks, self.rows_per_epoch)
        return permute(positions, epochs, self.rows_per_epoch, self.seed)

    def _first_row(self, source: int) -> int:
        return int(self._ends[source - 1]) if source else 0


def row_count(tokens: int, sequence_length: int) -> int:
    """Rows of `sequence_length` inputs and as many next tokens in a stream."""
    return max(0, (tokens - 1) // sequence_length)


def too_short(tokens: list[int], sequence_length: int, *, where: str | None = None) -> DataError:
    """The error for a corpus without a single row, with a `sequence_length` that would fit."""
    most = max(tokens, default=0)
    what = f"the training data has {sum(tokens):,} tokens, which is less than one row of {sequence_length:,} + 1"
    if len(tokens) > 1:
        what = f"no source has the {sequence_length:,} + 1 tokens of a row (the longest has {most:,})"
    if most < 3:
        return DataError(what, where=where, remedy="Give more text in data.train.")
    fitting = 1 << ((most - 1).bit_length() - 1)
    return DataError(what, where=where, remedy=f"Give more text in data.train, or set data.sequence_length: {fitting}.")
