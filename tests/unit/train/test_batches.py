"""How a batch divides over processes: exactly, or an error that names what would."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gptcli.errors import RecipeError
from gptcli.train.batches import divisors, next_smaller
from tests.unit.train.test_plan import CPU, GPU, plan, recipe

WORLDS = (2, 3, 8, 1024)


@pytest.mark.parametrize("world", WORLDS)
def test_a_step_has_the_same_rows_on_any_number_of_processes(tmp_path: Path, world: int) -> None:
    for size in ("auto", "1"):
        loaded = recipe(tmp_path, "train.global_batch_size=6144", f"train.micro_batch_size={size}")
        for hardware in (CPU, GPU):
            made = plan(loaded, replace(hardware, processes=world))
            assert made.processes == made.world_size == world
            assert made.micro_batch_size * made.gradient_accumulation_steps * world == made.global_batch_size == 6144


@pytest.mark.parametrize("world, near", [(2, "8190 and 8192"), (3, "8190 and 8193"), (1024, "7168 and 8192")])
def test_rows_that_do_not_divide_over_processes_name_the_nearest(tmp_path: Path, world: int, near: str) -> None:
    # Odd, and one more than a multiple of three.
    loaded = recipe(tmp_path, "train.global_batch_size=8191")
    with pytest.raises(RecipeError, match=f"train.global_batch_size: 8191 rows do not divide over {world}") as caught:
        plan(loaded, replace(CPU, processes=world))
    assert near in str(caught.value.remedy)
    for rows in near.split(" and "):
        made = plan(recipe(tmp_path, f"train.global_batch_size={rows}"), replace(CPU, processes=world))
        assert made.global_batch_size == int(rows)


def test_fewer_rows_than_processes_name_one_row_each(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(recipe(tmp_path), replace(CPU, processes=1024))
    assert str(caught.value.remedy).endswith(": 1024.")


@pytest.mark.parametrize("world", WORLDS)
def test_tokens_that_do_not_divide_name_the_nearest_in_tokens(tmp_path: Path, world: int) -> None:
    tokens = 128 * (6 * 1024 + 1) + 5
    loaded = recipe(tmp_path, f"train.global_batch_tokens={tokens}")
    with pytest.raises(RecipeError, match=r"train\.global_batch_tokens") as caught:
        plan(loaded, replace(CPU, processes=world))
    near = [int(number) for number in str(caught.value.remedy).rstrip(".").split(": ")[1].split(" and ")]
    assert near[0] < tokens < near[1]
    assert near[1] - near[0] == world * 128
    for number in near:
        made = plan(recipe(tmp_path, f"train.global_batch_tokens={number}"), replace(CPU, processes=world))
        assert made.global_batch_size * 128 == number


def test_what_splits_a_model_does_not_split_the_batch(tmp_path: Path) -> None:
    made = plan(recipe(tmp_path, "launch.parallel={tp: 2, cp: 2}"), replace(GPU, processes=8))
    assert (made.processes, made.world_size) == (2, 8)
    assert made.micro_batch_size * made.gradient_accumulation_steps * 2 == 16
    with pytest.raises(RecipeError, match=r"launch\.parallel: 3 x 1") as caught:
        plan(recipe(tmp_path, "launch.parallel={tp: 3}"), replace(GPU, processes=8))
    assert "6 and 9" in str(caught.value.remedy)
    assert caught.value.exit_code == 2


def test_batch_tokens_are_rows_and_less_than_one_row_is_an_error(tmp_path: Path) -> None:
    assert plan(recipe(tmp_path, "train.global_batch_tokens=4Ki")).global_batch_size == 32
    with pytest.raises(RecipeError):
        plan(recipe(tmp_path, "train.global_batch_tokens=100"))


def test_a_micro_batch_is_halved_to_one_that_divides_it() -> None:
    assert [next_smaller(rows) for rows in (64, 12, 9, 15, 7, 3, 2)] == [32, 6, 3, 5, 1, 1, 1]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
