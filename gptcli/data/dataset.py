"""Row k of the run, by arithmetic on the memory-mapped shards: the same on any number of processes.

Row r of a source reads its tokens [r*T, r*T + T + 1); a row never crosses sources, `mixing` says whose row k is, and
`order` which row of it. Rows of whole documents are in `packed`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gptcli.data.mixing import Proportions
from gptcli.data.order import Order
from gptcli.data.shards import Shards
from gptcli.errors import DataError


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

    isolated = False  # a row is one text

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
        sources = [(stream.name, len(stream)) for stream in shards.streams]
        self.proportions = proportions(sources, sequence_length, weights)
        self.rows_per_epoch = sum(self.proportions.rows)
        self._order = Order(self.proportions, seed=seed, shuffle=shuffle)

    def batch(self, ks: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows `ks` of the run: int64 of shape [len(ks), sequence_length + 1]."""
        sources, rows = self._order.places(np.asarray(ks, dtype=np.int64))
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
        source, row = (int(values[0]) for values in self._order.places(np.array([k], dtype=np.int64)))
        begin, epoch = row * self.sequence_length, self._order.epoch(k)
        return f"{self.shards.streams[source].name} tokens {begin}-{begin + self.sequence_length} (epoch {epoch})"

    def tokens_at(self, rows: int) -> int:
        """Inputs in the first `rows` rows of the run."""
        return rows * self.sequence_length

    def labels_at(self, rows: int) -> int:
        """Labels in the first `rows` rows of the run."""
        return rows * self.sequence_length

    def source_epochs(self, rows: int) -> list[float]:
        """How often each source was gone through after so many rows of the run, to within one row of the source."""
        return self.proportions.epochs(rows)


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
