"""DDP while the whole model fits, else FSDP; what the recipe says stands, and a resume chooses anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gptcli.train.plan import make_plan, with_micro_batch
from gptcli.train.strategy import HEAD_ROOM, STRATEGY, room
from tests.unit.train.test_plan import COUNTS, CPU, GPU, plan, recipe

EIGHT = replace(GPU, processes=8)
LARGE = replace(COUNTS, total=10**9, largest_units=10**7)


def test_one_process_has_nothing_to_decide(tmp_path: Path) -> None:
    made = make_plan(recipe(tmp_path), LARGE, replace(GPU, memory_bytes=1), rows_per_epoch=10)
    assert made.strategy == "ddp"
    assert STRATEGY not in made.decided


def test_the_whole_model_while_it_fits_else_divided(tmp_path: Path) -> None:
    loaded = recipe(tmp_path)
    one_row = make_plan(recipe(tmp_path, "train.micro_batch_size=1"), LARGE, EIGHT, rows_per_epoch=10)
    assert one_row.strategy == one_row.decided[STRATEGY] == "ddp"
    needed = int(one_row.memory_bytes / (1 - HEAD_ROOM))
    for spare, expected in ((10, "ddp"), (-10, "fsdp")):
        hardware = replace(EIGHT, memory_bytes=needed + spare)
        made = make_plan(loaded, LARGE, hardware, rows_per_epoch=10)
        assert made.strategy == made.decided[STRATEGY] == expected
        assert made.memory_bytes <= room(hardware)  # the micro-batch is one that fits the strategy


def test_a_divided_model_leaves_room_for_more_rows(tmp_path: Path) -> None:
    hardware = replace(EIGHT, memory_bytes=22 * 10**9)
    rows = [
        make_plan(
            recipe(tmp_path, f"launch.strategy={name}", "train.global_batch_size=16384"),
            replace(LARGE, layers=40, width=1024),
            hardware,
            rows_per_epoch=10,
        ).micro_batch_size
        for name in ("ddp", "fsdp")
    ]
    assert rows[0] < rows[1]


@pytest.mark.parametrize(
    "overrides, sharing",
    [
        (("launch.strategy=ddp",), "ddp"),
        (("launch.strategy=fsdp",), "fsdp"),
        (("launch.strategy=deepspeed",), "zero2"),
        (("launch.strategy=deepspeed", "launch.deepspeed={zero_optimization: {stage: 3}}"), "zero3"),
        (("launch.strategy=deepspeed", "launch.deepspeed={zero_optimization: {stage: 0}}"), "zero0"),
    ],
)
def test_what_the_recipe_says_stands_without_a_line(tmp_path: Path, overrides: tuple[str, ...], sharing: str) -> None:
    made = plan(recipe(tmp_path, *overrides), EIGHT)
    assert made.sharing == sharing
    assert STRATEGY not in made.decided


def test_a_resume_chooses_anew(tmp_path: Path) -> None:
    made = make_plan(recipe(tmp_path), COUNTS, EIGHT, rows_per_epoch=10, decided={STRATEGY: "fsdp"})
    assert made.strategy == "ddp"


def test_another_micro_batch_keeps_the_strategy_and_its_memory(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, "launch.strategy=fsdp", "train.global_batch_size=64")
    made = plan(loaded, EIGHT)
    found = with_micro_batch(made, loaded.recipe.train, COUNTS, 2, "why")
    assert found.strategy == "fsdp"
    assert found.memory["weights"] == made.memory["weights"] == 4 * COUNTS.total // 8


def test_the_processes_of_a_cpu_share_its_memory() -> None:
    assert room(replace(CPU, processes=8, nodes=2)) == int((1 - HEAD_ROOM) * CPU.memory_bytes) // 4
    assert room(EIGHT) == int((1 - HEAD_ROOM) * EIGHT.memory_bytes)
