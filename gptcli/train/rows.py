"""The rows of a run as the data set that transformers' Trainer reads: one tensor a batch, until it is on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from gptcli.data.dataset import TrainingRows


class RunRows(Dataset[torch.Tensor]):
    """The rows of the whole run in order, as the Trainer's data set: item k is row k of the run."""

    def __init__(self, rows: TrainingRows, total: int) -> None:
        self._rows = rows
        self._total = total

    def __len__(self) -> int:
        return self._total

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        """A batch [len(indices), sequence_length + 1] of token ids in one vectorised copy."""
        return torch.from_numpy(self._rows.batch(np.asarray(indices, dtype=np.int64)))

    def first(self, count: int) -> torch.Tensor:
        """The first rows of the run, at most `count` of them, for a trial."""
        return self.__getitems__(list(range(min(count, self._total))))


def whole(batch: Any) -> Any:
    """The batch as it is: it goes to the device in one copy."""
    return batch


def inputs_and_labels(batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch [n, T + 1] as T inputs and the T next tokens; the labels are not shifted again."""
    return {"input_ids": batch[:, :-1], "labels": batch[:, 1:]}


def label_count(batch: torch.Tensor) -> int:
    """The labels of a batch [n, T + 1], without looking at it."""
    return batch.shape[0] * (batch.shape[1] - 1)
