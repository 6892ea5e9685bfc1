"""Row k of the run, by arithmetic on the memory-mapped shards: the same on any number of processes.

Row r of a source reads its tokens [r*T, r*T + T + 1); a row never crosses sources, and `mixing` says whose row k is.
Epoch e of a source is a permutation of its N rows keyed by (seed, source, e), so nothing of the order is stored: its
k-th row of the run is row (k mod N) of its epoch (k div N).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gptcli.data.mixing import Mixture, Proportions
from gptcli.data.permutation import permute
from gptcli.data.shards import Shards
from gptcli.errors import DataError

BLOCK = 8192
BLOCKS_KEPT = 4


class TrainingRows:
    """The rows of the training stream: an endless sequence in which a source that runs out begins again.

    Args:
        shards: the tokens, one stream a source.
        sequence_length: inputs of a row.
        seed: of the order.
        shuffle: whether the rows of a source come in another order in each of its epochs; else as they stand.
        weights: of the sources, positive; None: every row comes once in `rows_per_epoch` rows.

    Raises:
        DataError: no source has tokens for one row, or one with a weight has none.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        sequence_length: int,
        seed: int,
        shuffle: bool,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.shards = shards
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle = shuffle
        sources = [(stream.name, len(stream)) for stream in shards.streams]
        self.proportions = proportions(sources, sequence_length, weights)
        self.rows_per_epoch = sum(self.proportions.rows)
        self._mixture = Mixture(self.proportions.parts)
        self._blocks: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def batch(self, ks: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows `ks` of the run: int64 of shape [len(ks), sequence_length + 1]."""
        sources, rows = self._places(np.asarray(ks, dtype=np.int64))
        begins = rows * self.sequence_length
        if len(self.shards.streams) == 1:
            return self.shards.streams[0].rows(begins, self.sequence_length + 1)
        result = np.empty((len(begins), self.sequence_length + 1), dtype=np.int64)
        for source in np.unique(sources).tolist():
            chosen = np.flatnonzero(sources == source)
            result[chosen] = self.shards.streams[source].rows(begins[chosen], self.sequence_length + 1)
        return result

    def row_id(self, k: int) -> str:
        """What row k is: the source, the tokens of its stream and the source's epoch."""
        number = np.array([k], dtype=np.int64)
        source, row = (int(values[0]) for values in self._places(number))
        epoch = int(self._mixture.locate(number)[1][0]) // self.proportions.rows[source]
        begin = row * self.sequence_length
        return f"{self.shards.streams[source].name} tokens {begin}-{begin + self.sequence_length} (epoch {epoch})"

    def source_epochs(self, rows: int) -> list[float]:
        """How often each source was gone through after so many rows of the run, to within one row of the source."""
        return self.proportions.epochs(rows)

    def _places(self, ks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each of the rows `ks`, and which row of that source it is."""
        homes = ks // BLOCK
        blocks = np.unique(homes).tolist()
        if len(blocks) > BLOCKS_KEPT:
            return self._located(ks)
        sources, rows = np.empty_like(ks), np.empty_like(ks)
        for block in blocks:
            chosen = homes == block
            inside = ks[chosen] - block * BLOCK
            sources[chosen], rows[chosen] = (values[inside] for values in self._block(block))
        return sources, rows

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        # Batches ask for neighbours, and permuting 8,192 numbers costs hardly more than permuting 64.
        if block not in self._blocks:
            if len(self._blocks) >= BLOCKS_KEPT:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[block] = self._located(np.arange(block * BLOCK, (block + 1) * BLOCK, dtype=np.int64))
        return self._blocks[block]

    def _located(self, ks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        sources, before = self._mixture.locate(ks)
        rows = np.empty_like(before)
        for source in np.unique(sources).tolist():
            chosen = np.flatnonzero(sources == source)
            size = self.proportions.rows[source]
            epochs, positions = np.divmod(before[chosen], size)
            # Seeds of recipes are below 2^32, so each (seed, source) has a key; that of the first source is the seed.
            rows[chosen] = permute(positions, epochs, size, self.seed + (source << 32)) if self.shuffle else positions
        return sources, rows


def proportions(
    sources: Sequence[tuple[str, int]],
    sequence_length: int,
    weights: Sequence[float] | None = None,
    *,
    where: str | None = None,
) -> Proportions:
    """How rows are shared out among sources, given as (name, tokens).

    Raises `DataError` (at `where`, the place of the length) when no source has tokens for one row, or one with a weight
    has none.
    """
    rows = [row_count(tokens, sequence_length) for _, tokens in sources]
    if not any(rows):
        raise _too_short([tokens for _, tokens in sources], sequence_length, where)
    if weights is not None and 0 in rows:
        name, tokens = sources[rows.index(0)]
        raise DataError(
            f"{name} has a weight but not one row: {tokens:,} tokens, and a row takes {sequence_length:,} + 1",
            where=where,
            remedy="Give it more text, take it out of data.train, or set a smaller data.sequence_length.",
        )
    return Proportions.of(rows, weights)


def row_count(tokens: int, sequence_length: int) -> int:
    """Rows of `sequence_length` inputs and as many next tokens in a stream."""
    return max(0, (tokens - 1) // sequence_length)


def _too_short(tokens: list[int], sequence_length: int, where: str | None) -> DataError:
    """The error for a corpus without a single row, with a `sequence_length` that would fit."""
    most = max(tokens, default=0)
    what = f"the training data has {sum(tokens):,} tokens, which is less than one row of {sequence_length:,} + 1"
    if len(tokens) > 1:
        what = f"no source has the {sequence_length:,} + 1 tokens of a row (the longest has {most:,})"
    if most < 3:
        return DataError(what, where=where, remedy="Give more text in data.train.")
    fitting = 1 << ((most - 1).bit_length() - 1)
    return DataError(what, where=where, remedy=f"Give more text in data.train, or set data.sequence_length: {fitting}.")
