"""Row k of the run where rows are whole documents (`data.packing: isolated` or `none`), from the index of rows.

Of each piece the inputs are its tokens but the last and the labels its tokens but the first, -100 where they are not
to be learnt. A row of `isolated` is filled with a piece without labels; one of `none` as far as its batch's longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gptcli.data.dataset import TrainingRows
from gptcli.data.media.item import Medium
from gptcli.data.mixing import Proportions
from gptcli.data.order import SUMMED, Order
from gptcli.data.packing import Packing
from gptcli.data.shards import Shards
from gptcli.errors import DataError

if TYPE_CHECKING:
    from gptcli.data.row_index import RowIndex
    from gptcli.recipe.schema import Recipe

IGNORED = -100
# Rows of which the padding is taken for that of all.
LOOKED_AT = 1 << 17


class PackedRows:
    """The rows of the training stream, as `TrainingRows` but of whole documents.

    Args:
        shards: the tokens.
        index: which pieces of them make a row.
        seed: of the order.
        shuffle: whether the order is another one in each epoch; for `none` rows of like length are then together.
        weights: of the sources, positive; None: every row comes once in `rows_per_epoch` rows.
        batch: rows of a step, for the lengths of `none`.
        where: the place of the length, for errors.

    Raises:
        DataError: a source with a weight has no row.
    """

    def __init__(
        self,
        shards: Shards,
        index: RowIndex,
        *,
        seed: int,
        shuffle: bool,
        weights: Sequence[float] | None = None,
        batch: int = 1,
        where: str | None = None,
    ) -> None:
        self.shards = shards
        self.index = index
        self.sequence_length = index.packing.sequence_length
        self.proportions = row_proportions(index, [stream.name for stream in shards.streams], weights, where=where)
        self.rows_per_epoch = sum(self.proportions.rows)
        self.isolated = index.packing.packing == "isolated"
        lengths = None if self.isolated else [source.tokens for source in index.sources]
        self._order = Order(self.proportions, seed=seed, shuffle=shuffle, lengths=lengths, batch=batch)
        self._all_labels = index.packing.every_label
        self._filling = next((i for i in (shards.specials.pad, shards.specials.eos) if i is not None), 0)
        self._last: dict[str, tuple[int, int]] = {}

    @classmethod
    def of(cls, shards: Shards, index: RowIndex, recipe: Recipe, batch: int, where: str | None = None) -> PackedRows:
        """The rows of a recipe, with so many of them a step."""
        data = recipe.data
        assert data is not None
        return cls(
            shards, index, seed=recipe.seed, shuffle=data.shuffle, weights=data.weights, batch=batch, where=where
        )

    def batch(self, ks: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows `ks` of the run: input ids, labels and, for `isolated`, the position of each in its document.

        int64 of shape [len(ks), 3, sequence_length], for `none` [len(ks), 2, the longest row's inputs].
        """
        sources, rows = self._order.places(np.asarray(ks, dtype=np.int64))
        lengths = self._lengths(sources, rows)
        width = self.sequence_length if self.isolated else int(lengths.max(initial=1))
        result = np.empty((len(ks), 3 if self.isolated else 2, width), dtype=np.int64)
        result[:, 0], result[:, 1] = self._filling, IGNORED
        if self.isolated:
            result[:, 2] = np.maximum(0, np.arange(width) - lengths[:, None])
        for source in np.unique(sources).tolist():
            self._fill(result, np.flatnonzero(sources == source), source, rows)
        return result

    def _fill(self, result: NDArray[np.int64], chosen: NDArray[np.int64], source: int, rows: NDArray[np.int64]) -> None:
        """Write the rows of a source into the places `chosen` of a batch."""
        of, stream = self.index.sources[source], self.shards.streams[source]
        first, last = of.offsets[rows[chosen]], of.offsets[rows[chosen] + 1]
        counts = last - first
        pieces = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        inputs = of.lengths[pieces].astype(np.int64) - 1
        ends = np.cumsum(inputs)
        inside = np.arange(ends[-1]) - np.repeat(ends - inputs, inputs)
        begins = of.begins[pieces]
        # Where in its row each piece begins: what is before it in all of them, less what is before its row.
        before = np.repeat(np.concatenate([[0], ends])[np.cumsum(counts) - counts], counts)
        places = np.repeat(ends - inputs - before, inputs) + inside
        homes = np.repeat(np.repeat(chosen, counts), inputs)
        at = np.repeat(begins, inputs) + inside
        labels = stream.gather(at + 1)
        if not self._all_labels and stream.supervised is not None:
            labels = np.where(stream.gather_supervised(at + 1), labels, IGNORED)
        result[homes, 0, places] = stream.gather(at)
        result[homes, 1, places] = labels
        if self.isolated:
            result[homes, 2, places] = inside

    def media(self, ks: NDArray[np.int64]) -> list[list[Medium]]:
        """The media of the documents of the rows `ks`, one list a document, in the order of their placeholders."""
        found: list[list[Medium]] = []
        for source, row in zip(*self._order.places(np.asarray(ks, dtype=np.int64)), strict=True):
            of = self.index.sources[int(source)]
            begins = of.begins[of.offsets[row] : of.offsets[row + 1]]
            found += self.shards.media(int(source), np.asarray(begins))
        return found

    def row_id(self, k: int) -> str:
        """What row k is: the source, where in its tokens the row's documents begin, and the source's epoch."""
        source, row = (int(values[0]) for values in self._order.places(np.array([k], dtype=np.int64)))
        of = self.index.sources[source]
        begins = [int(begin) for begin in of.begins[of.offsets[row] : of.offsets[row + 1]]]
        ends = int(of.begins[of.offsets[row + 1] - 1]) + int(of.lengths[of.offsets[row + 1] - 1]) - 1
        where = f"tokens {begins[0]}-{ends}" if len(begins) == 1 else f"{len(begins)} documents from token {begins[0]}"
        return f"{self.shards.streams[source].name} {where} (epoch {self._order.epoch(k)})"

    def tokens_at(self, rows: int) -> int:
        """Inputs in the first `rows` rows of the run, without what fills them."""
        return self._sum("tokens", rows)

    def labels_at(self, rows: int) -> int:
        """Labels that count in the first `rows` rows of the run."""
        return self._sum("labels", rows)

    def lengths(self, ks: NDArray[np.int64]) -> NDArray[np.int64]:
        """The inputs of the rows `ks`."""
        return self._lengths(*self._order.places(np.asarray(ks, dtype=np.int64)))

    def source_epochs(self, rows: int) -> list[float]:
        """How often each source was gone through after so many rows of the run, to within one row of the source."""
        return self.proportions.epochs(rows)

    def _lengths(self, sources: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        lengths = np.empty(len(rows), dtype=np.int64)
        for source in np.unique(sources).tolist():
            chosen = sources == source
            lengths[chosen] = self.index.sources[source].tokens[rows[chosen]]
        return lengths

    def _sum(self, name: str, rows: int) -> int:
        values = [getattr(source, name) for source in self.index.sources]
        known, found = self._last.get(name, (0, 0))
        if abs(rows - known) > min(SUMMED, self.rows_per_epoch):
            totals = [getattr(source, f"total_{name}") for source in self.index.sources]
            found = self._order.sums(values, totals, rows)
        elif rows != known:
            sources, places = self._order.places(np.arange(min(rows, known), max(rows, known), dtype=np.int64))
            between = 0
            for source in np.unique(sources).tolist():
                between += int(values[source][places[sources == source]].sum(dtype=np.int64))
            found += between if rows > known else -between
        self._last[name] = rows, found
        return found


Rows = TrainingRows | PackedRows


def training_rows(shards: Shards, index: RowIndex | None, recipe: Recipe, batch: int) -> Rows:
    """The rows of a run; `index`: of documents, None for one stream cut into rows; `batch`: rows of a step."""
    data = recipe.data
    assert data is not None
    if index is None:
        return TrainingRows(
            shards,
            sequence_length=data.sequence_length,
            seed=recipe.seed,
            shuffle=data.shuffle,
            weights=data.weights,
        )
    return PackedRows.of(shards, index, recipe, batch)


def packing_of(recipe: Recipe, *, media: bool = False) -> Packing | None:
    """How the documents of a recipe become rows; None where its rows are cut from one stream.

    `media`: they hold images or sounds, of which a part is no use: one that is too long is dropped, or an error.
    """
    data = recipe.data
    assert data is not None
    if data.packing == "concat":
        return None
    overlong = "error" if media and data.overlong != "drop" else data.overlong
    return Packing(data.sequence_length, data.packing, overlong, recipe.finetune.train_on == "all")


def row_proportions(
    index: RowIndex, names: Sequence[str], weights: Sequence[float] | None, *, where: str | None = None
) -> Proportions:
    """How rows of documents are shared out among sources. Raises `DataError` where one with a weight has none."""
    rows = index.rows
    if weights is not None and 0 in rows:
        raise DataError(
            f"{names[rows.index(0)]} has a weight but not one row: none of its documents has something to learn",
            where=where,
            remedy="Give it other text, take it out of data.train, or set data.overlong: split.",
        )
    return Proportions.of(rows, weights)


def padding(rows: PackedRows, batch: int, limit: int = LOOKED_AT) -> float:
    """The share of what a pass works on that is filling, with so many rows in each; of at most `limit` rows."""
    count = min(rows.rows_per_epoch, max(1, limit // batch) * batch)
    lengths = rows.lengths(np.arange(count, dtype=np.int64))
    if rows.isolated:
        return 1 - float(lengths.sum()) / (count * rows.sequence_length)
    widest = np.maximum.reduceat(lengths, np.arange(0, count, batch))
    sizes = np.full(len(widest), batch)
    sizes[-1] = count - batch * (len(widest) - 1)
    return 1 - float(lengths.sum()) / float((widest * sizes).sum())
