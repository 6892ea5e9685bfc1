"""Documents as the windows that are scored, and windows as padded batches, with little padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gptcli.data.media.item import Medium
from gptcli.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch

BUFFERED_BATCHES = 32

Document = tuple[NDArray[np.int64], int | None]


@dataclass(frozen=True)
class Window:
    """A stretch of one document: `ids[:-1]` are the inputs, `ids[1:]` the targets, of which the last `scored` count.

    With `wanted` (bool, one a target) those that count are where it is True, `scored` of them. `first` is the number,
    from 0, of the first that counts among the tokens of the document. `media`: what its placeholders stand for.
    """

    document: int
    ids: NDArray[np.int64]
    scored: int
    wanted: NDArray[np.bool_] | None = None
    first: int = 0
    media: tuple[Medium, ...] = ()

    @property
    def length(self) -> int:
        """The number of inputs."""
        return len(self.ids) - 1


def windows_of(
    documents: Iterable[Document], prefix_id: int, length: int, stride: int | None, vocabulary: int | None
) -> Iterator[tuple[int | None, Iterable[Window]]]:
    """The bytes and the windows of each document.

    Raises:
        UsageError: length or stride make no sense.
        DataError: a token id is outside the vocabulary.
    """
    if length < 1:
        raise UsageError(f"sequence_length is {length}; it must be at least 1")
    step = length if stride is None else stride
    if not 1 <= step <= length:
        raise UsageError(
            f"stride is {step}; it must lie between 1 and the window of {length} tokens",
            remedy="A larger stride would leave tokens unscored.",
        )
    for number, (ids, size) in enumerate(documents):
        if vocabulary is not None and len(ids) and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
            bad = int(ids.max() if ids.max() >= vocabulary else ids.min())
            raise DataError(
                f"token {bad} in document {number + 1}, but the model knows {vocabulary} tokens",
                remedy="The tokens were made by another tokenizer than the model's.",
            )
        yield size, document_windows(number, ids, prefix_id, length, step)


def document_windows(number: int, ids: NDArray[np.int64], prefix_id: int, length: int, stride: int) -> Iterator[Window]:
    """Cut one document into windows in which every token is scored once, with the longest context there is."""
    whole = np.concatenate((np.array([prefix_id], dtype=np.int64), ids.astype(np.int64, copy=False)))
    scored = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        yield Window(number, whole[begin : end + 1], end - scored, first=scored)
        scored = end
        if end == len(ids):
            return


def batches(windows: Iterable[Window], limit: int) -> Iterator[list[Window]]:
    """Batches of at most `limit` padded inputs, of windows that stand near each other."""
    buffer: list[Window] = []
    tokens = 0
    for window in windows:
        buffer.append(window)
        tokens += window.length
        if tokens >= BUFFERED_BATCHES * limit:
            yield from _cut(buffer, limit)
            buffer, tokens = [], 0
    yield from _cut(buffer, limit)


def shared(made: Iterator[list[Window]], index: int, count: int) -> Iterator[tuple[list[Window], bool]]:
    """One of each `count` batches; where the last ones do not suffice, one that another scores and that does not count.

    The passes of a model that is divided over processes need all of these.
    """
    while several := list(islice(made, count)):
        yield several[min(index, len(several) - 1)], index < len(several)


def _cut(buffer: list[Window], limit: int) -> Iterator[list[Window]]:
    """Batches of at most `limit` padded inputs, longest first (so that too little memory shows at once)."""
    batch: list[Window] = []
    for window in sorted(buffer, key=lambda window: -window.length):
        if batch and batch[0].length * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def padded_ids(batch: list[Window], pad_id: int) -> NDArray[np.int64]:
    """The inputs of a batch, [windows, longest]."""
    inputs = np.full((len(batch), max(window.length for window in batch)), pad_id, dtype=np.int64)
    for row, window in enumerate(batch):
        inputs[row, : window.length] = window.ids[:-1]
    return inputs


def padded(batch: list[Window], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs, the targets and the mask of what counts of a batch, [windows, longest]."""
    import torch

    inputs = padded_ids(batch, pad_id)
    targets = np.zeros(inputs.shape, dtype=np.int64)
    wanted = np.zeros(inputs.shape, dtype=bool)
    for row, window in enumerate(batch):
        targets[row, : window.length] = window.ids[1:]
        if window.wanted is not None:
            wanted[row, : window.length] = window.wanted
        else:
            wanted[row, window.length - window.scored : window.length] = True
    return torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(wanted)
