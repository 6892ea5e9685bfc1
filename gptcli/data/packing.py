"""Documents cut into pieces and packed into rows, for `data.packing: isolated` and `none`: arithmetic on lengths.

A document of n tokens has n - 1 inputs and as many labels; a row takes T inputs. Rows are packed by best fit decreasing
(Johnson 1974, "Fast algorithms for bin packing"), a window of 100 K documents at a time, which is what Ding et al. 2024
(arXiv:2404.10830) pack documents by: no more rows than concatenation but for a fraction of a percent. A window takes
about 0.1 s, and its rows are those of its content alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gptcli.data.shards import Stream

WINDOW = 100_000
# Tokens whose supervision is looked at together.
READ = 1 << 24


@dataclass(frozen=True)
class Packing:
    """How documents become rows.

    Attributes:
        sequence_length: the most inputs of a row.
        packing: isolated or none.
        overlong: what becomes of a document of more: split, truncate, drop or error.
        every_label: whether all labels count, whatever the data says is to be learnt.
    """

    sequence_length: int
    packing: str
    overlong: str
    every_label: bool = False


@dataclass
class Window:
    """The rows of some documents: row r has the pieces `offsets[r]` to `offsets[r + 1]`.

    Attributes:
        offsets: int64 [rows + 1].
        begins: int64 [pieces], the first token of each in its stream.
        lengths: int32 [pieces], tokens of each: one more than its inputs.
        tokens: int32 [rows], inputs.
        labels: int32 [rows], those that count.
        left_out: what is not in a row, by reason.
    """

    offsets: NDArray[np.int64]
    begins: NDArray[np.int64]
    lengths: NDArray[np.int32]
    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    left_out: dict[str, int] = field(default_factory=dict)


class Overlong(Exception):
    """A document is longer than a row and `overlong` is error: its number, from 0, and its tokens."""

    def __init__(self, document: int, tokens: int) -> None:
        super().__init__(document, tokens)
        self.document, self.tokens = document, tokens


TRUNCATED, DROPPED, WITHOUT_LABEL = "truncated", "dropped", "without_label"


def windows(stream: Stream, offsets: NDArray[np.int64], how: Packing) -> Iterator[Window]:
    """The rows of a source, window by window; `offsets`: of its documents, and the end [documents + 1].

    Raises:
        Overlong: a document is, and that is an error.
    """
    for first in range(0, len(offsets) - 1, WINDOW):
        ends = np.asarray(offsets[first : first + WINDOW + 1], dtype=np.int64)
        try:
            begins, lengths, left_out = pieces(ends, how.sequence_length, how.overlong)
        except Overlong as error:
            raise Overlong(first + error.document, error.tokens) from None
        labels = lengths - 1 if how.every_label else count_labels(stream, begins, lengths)
        known = labels > 0
        left_out[WITHOUT_LABEL] += int((~known).sum())
        begins, lengths, labels = begins[known], lengths[known], labels[known]
        if how.packing == "isolated":
            rows = best_fit(lengths - 1, how.sequence_length)
            order = np.argsort(rows, kind="stable")  # a row's pieces as they stand in the data
            rows, begins, lengths, labels = rows[order], begins[order], lengths[order], labels[order]
        else:
            rows = np.arange(len(lengths), dtype=np.int64)
        counts = np.bincount(rows)
        yield Window(
            np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)]),
            begins,
            lengths.astype(np.int32),
            np.bincount(rows, weights=lengths - 1).astype(np.int32),
            np.bincount(rows, weights=labels).astype(np.int32),
            left_out,
        )


def pieces(
    offsets: NDArray[np.int64], length: int, overlong: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], dict[str, int]]:
    """(begins, tokens) of the pieces of documents, each of at most `length` + 1 tokens, and how many were left out.

    Documents of less than two tokens have nothing to predict. The pieces of one that is split share a token, the last
    of one and the first of the next, so that no prediction is lost.

    Raises:
        Overlong: `overlong` is error, and a document is.
    """
    begins, tokens = offsets[:-1], np.diff(offsets)
    left_out = {TRUNCATED: 0, DROPPED: 0, WITHOUT_LABEL: int((tokens < 2).sum())}
    too_long = tokens > length + 1
    if overlong == "error" and too_long.any():
        document = int(np.flatnonzero(too_long)[0])
        raise Overlong(document, int(tokens[document]))
    if overlong == "drop":
        left_out[DROPPED] = int(too_long.sum())
        begins, tokens = begins[~too_long], tokens[~too_long]
    elif overlong == "truncate":
        left_out[TRUNCATED] = int(too_long.sum())
        tokens = np.minimum(tokens, length + 1)
    counts = np.maximum(0, -(-(tokens - 1) // length))
    home = np.repeat(np.arange(len(tokens)), counts)
    inside = (np.arange(len(home)) - np.repeat(np.cumsum(counts) - counts, counts)) * length
    return begins[home] + inside, np.minimum(length + 1, tokens[home] - inside), left_out


def count_labels(stream: Stream, begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many labels of each piece are supervised; pieces in the order of the stream."""
    if stream.supervised is None or not len(begins):
        return lengths - 1
    found = np.empty_like(lengths)
    ends = begins + lengths
    first = 0
    while first < len(begins):
        last = max(first + 1, int(np.searchsorted(ends, begins[first] + READ)))
        base = int(begins[first])
        sums = np.cumsum(stream.read_supervised(base, int(ends[last - 1])), dtype=np.int64)
        found[first:last] = sums[ends[first:last] - 1 - base] - sums[begins[first:last] - base]
        first = last
    return found


def best_fit(sizes: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The row of each of some sizes (1 to `capacity`): from large to small, each where the least room is left by it.

    The rows that have room are looked up in the bits of one number, bit r for those with room for r more.
    """
    rows = np.empty(len(sizes), dtype=np.int64)
    room: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_bits = count = 0
    order = np.argsort(-sizes, kind="stable")
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = open_bits >> size
        if fitting:
            left = (fitting & -fitting).bit_length() - 1
            stack = room[left + size]
            row = stack.pop()
            if not stack:
                open_bits ^= 1 << (left + size)
        else:
            left, row = capacity - size, count
            count += 1
        rows[index] = row
        if left:
            room[left].append(row)
            open_bits |= 1 << left
    return rows


def stored(window: Window) -> dict[str, NDArray[Any]]:
    """A window's arrays as they are written one after the other: its rows by their counts of pieces."""
    return {
        "pieces": np.diff(window.offsets).astype(np.int32),
        "begins": window.begins,
        "lengths": window.lengths,
        "tokens": window.tokens,
        "labels": window.labels,
    }
