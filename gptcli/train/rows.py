"""The rows of a run as the data set that transformers' Trainer reads: one tensor a batch, until it is on the device.

A batch of one stream's rows is [n, T + 1]: T inputs and their next tokens. One of rows of documents is [n, 3, T]: input
ids, labels (-100 where there is none) and positions in the documents; without positions where a row is one document.
Beside a batch with images or sounds stands what the model takes of these (`WithMedia`): no dimension of that is the
batch's, so that a part of such a batch is read again. Which rows a process takes is arithmetic on their numbers: nobody
sends rows, and nobody reads another's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, get_worker_info

from gptcli.data.media.fault import MediaFault
from gptcli.data.media.features import by_rows
from gptcli.data.media.reader import TYPE_IDS, changed
from gptcli.data.packed import PackedRows
from gptcli.errors import GptcliError, RecipeError
from gptcli.train.loss import IGNORED
from gptcli.train.reading import Failed

if TYPE_CHECKING:
    from gptcli.data.media.features import FeatureStore, Layouts
    from gptcli.data.media.item import Medium, Modality
    from gptcli.data.media.reader import MediaReader
    from gptcli.data.packed import Rows
    from gptcli.train.plan import Plan

# Stands for a row that does not count: in a last, smaller step a process may have none, and still has to take part.
FILLER = -1
# Rows among which the one with the most documents with media is looked for, and how many of its documents are tried.
LOOKED_AT, DOCUMENTS = 16, 3


class WithMedia(NamedTuple):
    """A batch of the rows `numbers`, and what the model takes of their images and sounds.

    With `features`, what is kept of a frozen tower's output for them, `media` is their layout alone.
    """

    rows: torch.Tensor
    media: dict[str, torch.Tensor]
    numbers: list[int]
    features: list[torch.Tensor] | None = None


class Features(NamedTuple):
    """Outputs of a tower for media of one kind, and how a batch of these is laid out."""

    store: FeatureStore
    layouts: Layouts
    modality: Modality


Batch: TypeAlias = torch.Tensor | WithMedia


class RunRows(Dataset[Batch]):
    """The rows of the whole run in order, as the Trainer's data set: item k is row k of the run.

    `reader`: of their images and sounds, where they have some; `features`: what is kept of these.
    """

    def __init__(
        self, rows: Rows, plan: Plan, reader: MediaReader | None = None, features: Features | None = None
    ) -> None:
        self._rows, self._plan, self._reader, self._features = rows, plan, reader, features
        self._batch, self._total = plan.global_batch_size, plan.total_rows

    def __len__(self) -> int:
        return self._total

    @property
    def isolated(self) -> bool:
        """Whether a row holds documents that are not to see each other."""
        return self._rows.isolated

    def __getitems__(self, indices: list[int]) -> Batch | Failed:
        """A batch (see `read`); in a worker an error takes its place."""
        try:
            return self.read(indices)
        except GptcliError as error:
            if get_worker_info() is None:
                raise
            return Failed(error)

    def read(self, indices: list[int]) -> Batch:
        """A batch as this module describes it, made by vectorised copies; the filler is all -100.

        Raises:
            DataError: an image or a sound is not what it was when the data was prepared.
        """
        if indices == [FILLER]:
            return torch.full((1, *self._rows.batch(np.zeros(1, dtype=np.int64)).shape[1:]), IGNORED)
        numbers = np.asarray(indices, dtype=np.int64)
        rows = torch.from_numpy(self._rows.batch(numbers))
        if self._reader is None:
            return rows
        assert isinstance(self._rows, PackedRows)
        found, types = self._rows.media(numbers), self._reader.beside(rows[:, 0], packed=rows.shape[1] > 2)
        if self._features is not None:
            every = [medium for row in found for medium in row]
            known = self._features.store.find(every) if self._of_one_kind(every) else None
            if known is not None:
                layout = self._features.layouts.of(by_rows(known.sizes, found))
                return WithMedia(rows, layout | types, indices, known.parts)
        try:
            media = self._reader.inputs(found, rows[:, 0])
        except MediaFault as fault:
            named = ", ".join(self._rows.row_id(number) for number in indices[:2])
            raise changed(fault, f"in a batch that begins with the rows {named}") from None
        return WithMedia(rows, media | types, indices)

    def with_features(self, features: Features) -> RunRows:
        """The same rows, with what is kept of their media."""
        return RunRows(self._rows, self._plan, self._reader, features)

    def _of_one_kind(self, media: list[Medium]) -> bool:
        assert self._features is not None
        return all(medium.modality == self._features.modality for medium in media)

    def parts(self, batch: Batch, rows: int) -> list[Batch]:
        """A batch of this process in parts of so many rows."""
        if isinstance(batch, torch.Tensor):
            return list(torch.split(batch, rows))
        return [self.read(batch.numbers[at : at + rows]) for at in range(0, len(batch.numbers), rows)]

    def tokens_at(self, step: int) -> int:
        """Inputs, without padding, of the first `step` steps."""
        return self._rows.tokens_at(min(step * self._batch, self._total))

    def labels_at(self, step: int) -> int:
        """Labels that count of the first `step` steps."""
        return self._rows.labels_at(min(step * self._batch, self._total))

    def first(self, count: int) -> Batch:
        """The first rows of the run, at most `count` of them, for a trial."""
        return self.read(list(range(min(count, self._total))))

    def trial(self, device: torch.device) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]] | None:
        """Some documents of a row as inputs of a model, and each of them as it is alone; None: no images or sounds.

        Raises:
            RecipeError: the model attends to images beside the text, which all that follows them in a row sees.
        """
        reader = self._reader
        if reader is None:
            return None
        if reader.crossed:
            raise RecipeError(
                "data.packing: isolated needs a model that keeps the documents of a row apart, and one that attends to "
                "images beside the text shows them to all that follows in the row",
                remedy="Set data.packing: none (a document a row).",
            )
        assert isinstance(self._rows, PackedRows)

        def count(number: int) -> int:
            return sum(bool(media) for media in self._rows.media(np.array([number])))  # type: ignore[union-attr]

        number = max(range(min(LOOKED_AT, self._total)), key=count)
        ids, _, positions = torch.from_numpy(self._rows.batch(np.array([number], dtype=np.int64)))[0]
        media = self._rows.media(np.array([number], dtype=np.int64))[:DOCUMENTS]
        begins = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]

        def inputs(first: int, last: int) -> dict[str, torch.Tensor]:
            row = ids[None, begins[first] : begins[last]]
            try:
                found = {"input_ids": row, **reader.inputs(media[first:last], row), **reader.beside(row, packed=True)}
            except MediaFault as fault:
                raise changed(fault, f"in the row {self._rows.row_id(number)}") from None
            return {name: values.to(device) for name, values in found.items()}

        whole = inputs(0, len(media)) | {"position_ids": positions[None, : begins[len(media)]].to(device)}
        return whole, [inputs(at, at + 1) for at in range(len(media))]


class MicroBatches(Sampler[list[int]]):
    """The numbers of the rows of each micro-batch that one process runs, over the whole run.

    The rows of a step go to the processes in turns of a micro-batch each, so that the step has the same rows on any
    number of them. Every process has as many micro-batches as the others.
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        self._plan = plan
        self._rank = rank

    def __len__(self) -> int:
        plan = self._plan
        last = plan.total_rows - (plan.steps - 1) * plan.global_batch_size
        return (plan.steps - 1) * plan.gradient_accumulation_steps + self._passes(last)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self._plan.steps):
            yield from self.of_step(step)

    def of_step(self, step: int) -> list[list[int]]:
        """Those of one step, counted from 0."""
        plan, rank = self._plan, self._rank
        first = step * plan.global_batch_size
        end = min(first + plan.global_batch_size, plan.total_rows)
        found = []
        for turn in range(self._passes(end - first)):
            begin = first + turn * plan.micro_batch_size * plan.processes
            each, more = divmod(min(plan.micro_batch_size * plan.processes, end - begin), plan.processes)
            start = begin + rank * each + min(rank, more)
            found.append(list(range(start, start + each + (rank < more))) or [FILLER])
        return found

    def _passes(self, rows: int) -> int:
        return -(-rows // (self._plan.micro_batch_size * self._plan.processes))


def whole(batch: Any) -> Any:
    """The batch as it is: it goes to the device in one copy."""
    return batch


def inputs_and_labels(batch: Batch, device: torch.device, *, flat: bool = False) -> dict[str, torch.Tensor]:
    """A batch of the host as inputs and labels on a device, [n, T] each; labels are not shifted again.

    `flat`: all rows of documents as one, [1, n * T], since positions tell them apart.
    """
    if isinstance(batch, WithMedia):
        media = {name: values.to(device, non_blocking=True) for name, values in batch.media.items()}
        if flat and TYPE_IDS in media:
            media[TYPE_IDS] = media[TYPE_IDS].reshape(1, -1)
        return {**inputs_and_labels(batch.rows, device, flat=flat), **media}
    filler = _is_filler(batch)
    batch = batch.to(device, non_blocking=True)
    if batch.ndim == 2:
        ids = batch[:, :-1]
        return {"input_ids": torch.zeros_like(ids) if filler else ids, "labels": batch[:, 1:]}
    ids, labels, *positions = batch.unbind(1)
    found = {"input_ids": ids, "labels": labels}
    if positions:
        found["position_ids"] = positions[0]
    if filler:
        found |= {name: torch.zeros_like(ids) for name in found if name != "labels"}
    return {name: values.reshape(1, -1) for name, values in found.items()} if flat else found


def label_count(batch: Batch) -> int:
    """The labels that count of a batch on the host."""
    if isinstance(batch, WithMedia):
        return label_count(batch.rows)
    if batch.ndim == 3:
        return int(batch[:, 1].ne(IGNORED).sum())
    return 0 if _is_filler(batch) else batch.shape[0] * (batch.shape[1] - 1)


def _is_filler(batch: torch.Tensor) -> bool:
    return len(batch) == 1 and int(batch.flatten()[0]) == IGNORED
