"""Which rows each process takes, by arithmetic alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptcli.train.rows import FILLER, MicroBatches, inputs_and_labels, label_count


def batches(processes: int, micro: int, accumulation: int, rows: int) -> list[MicroBatches]:
    size = processes * micro * accumulation
    plan: Any = SimpleNamespace(
        processes=processes,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        global_batch_size=size,
        total_rows=rows,
        steps=-(-rows // size),
    )
    return [MicroBatches(plan, rank) for rank in range(processes)]


@pytest.mark.parametrize("rows", [96, 97, 100, 101, 113, 119, 120])
@pytest.mark.parametrize(("processes", "micro"), [(1, 4), (2, 4), (4, 2), (3, 2), (24, 1)])
def test_every_row_comes_once_in_the_step_that_it_has_on_one_process(processes: int, micro: int, rows: int) -> None:
    members = batches(processes, micro, 24 // processes // micro, rows)
    assert len({len(member) for member in members}) == 1, "each has as many passes, which collectives need"
    for step in range(-(-rows // 24)):
        taken = [row for member in members for batch in member.of_step(step) for row in batch if row != FILLER]
        assert sorted(taken) == list(range(step * 24, min(step * 24 + 24, rows)))
    for member in members:
        found = list(member)
        assert len(found) == len(member)
        assert all(1 <= len(batch) <= micro for batch in found)


def test_the_rows_of_one_process_are_in_order() -> None:
    assert [row for batch in batches(1, 5, 4, 93)[0] for row in batch] == list(range(93))


def test_a_row_that_stands_in_for_none_is_not_counted_and_has_valid_inputs() -> None:
    filler = torch.full((1, 9), -100)
    assert label_count(filler) == 0
    found = inputs_and_labels(filler, torch.device("cpu"))
    assert found["input_ids"].tolist() == [[0] * 8]
    assert found["labels"].tolist() == [[-100] * 8]
