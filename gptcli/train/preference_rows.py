"""The order of preference rows over a run, and a meter of rows that differ in length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Sampler

from gptcli.data.permutation import permute
from gptcli.train.meter import Meter

if TYPE_CHECKING:
    from gptcli.train.meter import Reduce
    from gptcli.train.plan import Plan


class _OneEach:
    """A token and a label a row."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def tokens_at(self, step: int) -> int:
        return min(step * self._plan.global_batch_size, self._plan.total_rows)

    labels_at = tokens_at


class RowMeter(Meter):
    """A meter of rows that differ in length: their losses are averaged over rows, and their tokens are counted.

    Args:
        plan: the run's plan.
        device: where the run trains.
        tokens: counts the tokens that were trained on so far.
    """

    def __init__(self, plan: Plan, device: torch.device, tokens: Callable[[], int]) -> None:
        # To `Meter` a row is one token, with all the work of one.
        flops = plan.total_flops // plan.total_rows
        super().__init__(replace(plan, sequence_length=1, flops_per_token=flops), _OneEach(plan), device)
        self._tokens = tokens
        self._tokens_before = 0
        self._timed = 0

    def line(self, step: int, *, rate: float, norm: Any, reduce: Reduce) -> Any:
        """As `Meter.line`, with the tokens that were counted."""
        seconds = max(self._step_seconds, 1e-9)
        line = super().line(step, rate=rate, norm=norm, reduce=reduce)
        now = self._tokens()
        self._timed += now - self._tokens_before
        self._rate = (now - self._tokens_before) / seconds
        self._tokens_before = now
        return {**line, "tokens": now, "tokens_per_second": round(self._rate, 1)}

    def begin_tokens(self, tokens: int) -> None:
        """Go on from a checkpoint after so many tokens."""
        self._tokens_before = tokens

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second over the logged steps."""
        return round(self._timed / self._all_seconds, 1) if self._all_seconds else None


class RunOrder(Sampler[list[int]]):
    """The rows of each micro-batch of a run, by their number in the data: another order in every epoch, by the seed.

    Args:
        plan: the run's plan.
        count: rows of the data.
        seed: of the order; None: as they stand.
        each: how often a row comes in a step, one after the other (the completions of a prompt).
        whole: every micro-batch is given all rows of its step, of which the trainer takes its part.
    """

    def __init__(self, plan: Plan, count: int, seed: int | None, *, each: int = 1, whole: bool = False) -> None:
        self._plan, self._count, self._seed, self._each, self._whole = plan, count, seed, each, whole

    def __len__(self) -> int:
        return self._plan.steps * self._plan.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self._plan.steps):
            rows, size = self.of_step(step), self._plan.micro_batch_size
            for turn in range(self._plan.gradient_accumulation_steps):
                yield rows if self._whole else rows[turn * size : (turn + 1) * size]

    def of_step(self, step: int) -> list[int]:
        """All rows of a step, counted from 0."""
        first = step * self._plan.global_batch_size
        numbers = np.arange(first, first + self._plan.global_batch_size, dtype=np.int64) // self._each
        epochs, positions = np.divmod(numbers, self._count)
        if self._seed is None:
            return [int(position) for position in positions]
        return [int(row) for row in permute(positions, epochs, self._count, self._seed)]
