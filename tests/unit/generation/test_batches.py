from __future__ import annotations

import numpy as np
import pytest

from gptcli.generation.batches import Units, plan_units, prompts_a_unit, share

LENGTHS = np.random.default_rng(0).integers(1, 400, 1000)


def plan(lengths: np.ndarray, **others: int | None) -> Units:
    settings = {"new_tokens": 50, "copies": 1, "context": None, "most_prompts": 64, "most_tokens": 10_000, **others}
    return plan_units(lengths, **settings)  # type: ignore[arg-type]


def test_every_prompt_is_in_one_unit_the_longest_first_and_equals_in_the_files_order() -> None:
    units = plan(LENGTHS)
    order = [number for unit in range(len(units)) for number in units.prompts(unit)]
    assert sorted(order) == list(range(1000))
    assert order == sorted(range(1000), key=lambda number: (-LENGTHS[number], number))


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("context", [None, 256])
def test_a_unit_is_as_large_as_its_bounds_allow(copies: int, context: int | None) -> None:
    lengths = LENGTHS[LENGTHS < 256]
    units = plan(lengths, copies=copies, context=context)

    def cost(prompts: list[int]) -> int:
        full = [lengths[number] + 50 for number in prompts]
        return copies * sum(each if context is None else min(each, context) for each in full)

    for unit in range(len(units)):
        prompts = units.prompts(unit)
        assert 1 <= len(prompts) <= 64 and cost(prompts) <= 10_000
        if unit + 1 < len(units):
            more = [*prompts, units.prompts(unit + 1)[0]]
            assert len(more) > 64 or cost(more) > 10_000


def test_a_prompt_that_passes_the_bound_alone_is_a_unit() -> None:
    units = plan(np.array([5, 90_000, 7]))
    assert [units.prompts(unit) for unit in range(len(units))] == [[1], [2, 0]]


def test_units_are_divided_over_processes_without_a_rest() -> None:
    for processes in (1, 2, 3, 7):
        shares = [share(20, rank, processes) for rank in range(processes)]
        assert sorted(unit for each in shares for unit in each) == list(range(20))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_small_file_still_gives_every_process_something_to_do() -> None:
    for prompts in (2, 40, 256, 5000):
        for processes in (1, 2, 8):
            for copies in (1, 5, 1000):
                size = prompts_a_unit(prompts, copies=copies, processes=processes)
                assert 1 <= size <= 256
                assert -(-prompts // size) >= min(processes, prompts)
